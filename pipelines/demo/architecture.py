"""The demo pipeline's parts, untrained: real diffusers and transformers classes at a size two CPU cores can train."""

from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_accel.pipelines.demo.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES

LATENT_CHANNELS = 8
FLOW_SHIFT = 5.0
TEXT_TOKENS = 512  # WanPipeline pads prompt embeddings with zeros to this length by default
_TEXT_DIM = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the demo world; unknown words become <unk>."""
    phrases = ["a", "an", "and", "moves", "over", "background", *COLOURS, *SHAPES, *BACKGROUNDS, *DIRECTIONS]
    words = list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder, trained together with the transformer."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary, d_model=_TEXT_DIM, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def build_vae() -> AutoencoderKLWan:
    """4 × 4 pixels and 2 frames per latent, 8 channels: a twelvefold compression."""
    return AutoencoderKLWan(
        base_dim=32, z_dim=LATENT_CHANNELS, dim_mult=[1, 2], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[True], in_channels=12, out_channels=12, patch_size=2,
        scale_factor_temporal=2, scale_factor_spatial=4,
        latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS,
    )  # fmt: skip


def build_transformer() -> WanTransformer3DModel:
    """Six blocks of four 64-wide heads; one token covers 8 × 8 pixels and 2 frames."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=_TEXT_DIM, freq_dim=256, ffn_dim=1024, num_layers=6,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=128,
    )  # fmt: skip


def build_pipeline() -> WanPipeline:
    """A complete WanPipeline with random weights, from torch's global random state."""
    tokenizer = build_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        transformer=build_transformer(),
        vae=build_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
    )


def encode_prompts(pipe: WanPipeline, prompts: list[str]) -> torch.Tensor:
    """Prompt embeddings [batch, TEXT_TOKENS, text dim] as WanPipeline makes them, with gradients."""
    parts = cast(Any, pipe)  # diffusers sets a pipeline's parts as attributes without declaring them
    tokens = parts.tokenizer(prompts, padding=True, return_tensors="pt").to(parts.text_encoder.device)
    hidden = parts.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    hidden = hidden * tokens.attention_mask[..., None]
    return torch.nn.functional.pad(hidden, (0, 0, 0, TEXT_TOKENS - hidden.shape[1]))
