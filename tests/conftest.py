"""Shared fixtures: a tiny real transformer of each supported diffusers class, and a tiny Wan pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

FAMILIES = ("wan", "hunyuan_video", "cogvideox", "ltx", "flux")
HEADS, DIM, CHANNELS, TEXT_DIM = 2, 16, 4, 12
TEXT_TOKENS = 5


@dataclass
class Tiny:
    """A tiny transformer and what it takes to call it. Token counts are those of the grid."""

    name: str
    transformer: nn.Module

    def inputs(
        self, *, frames: int = 3, height: int = 5, width: int = 7, batch: int = 2, timestep: float = 500.0
    ) -> dict[str, Any]:
        """Arguments of a forward call; `timestep` goes from 1000 (pure noise) to 0."""
        return _INPUTS[self.name](frames, height, width, batch, timestep, torch.Generator().manual_seed(0))

    def run(self, inputs: dict[str, Any] | None = None, **sizes: Any) -> Tensor:
        """Forward without gradients, from `inputs` or fresh ones of the given sizes."""
        with torch.no_grad():
            return self.transformer(**(inputs or self.inputs(**sizes)), return_dict=False)[0]


@pytest.fixture
def tiny() -> Callable[..., Tiny]:
    """Builder of tiny transformers: `tiny("wan", layers=2)`."""

    def build(name: str, layers: int = 2) -> Tiny:
        torch.manual_seed(0)
        transformer = _BUILDERS[name](layers).eval()
        for parameter in transformer.parameters():
            # The classes start near zero; attention has to matter, or no test could see it change.
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        return Tiny(name, transformer.requires_grad_(False))

    return build


@pytest.fixture(params=FAMILIES)
def any_tiny(request: pytest.FixtureRequest, tiny: Callable[..., Tiny]) -> Tiny:
    """A tiny transformer of every family in turn."""
    return tiny(request.param)


@pytest.fixture
def wan_pipeline(tiny: Callable[..., Tiny]) -> Callable[..., TinyWanPipeline]:
    """Builder of a tiny `WanPipeline`; its `latents(...)` runs it from random prompt embeddings."""

    def build(experts: int = 1, layers: int = 2) -> TinyWanPipeline:
        second = (
            {"transformer_2": tiny("wan", layers).transformer, "boundary_ratio": 0.5} if experts == 2 else {}
        )
        pipe = TinyWanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=tiny("wan", layers).transformer,
            **second,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


class TinyWanPipeline(WanPipeline):
    """A `WanPipeline` without text encoder and VAE."""

    def latents(self, *, steps: int = 3, guidance_scale: float = 4.0, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        prompt, negative = torch.randn(2, 1, TEXT_TOKENS, TEXT_DIM, generator=generator)
        return self(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            height=80,
            width=112,
            num_frames=9,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="latent",
            **options,
        ).frames


def _wan(layers: int) -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    )


def _hunyuan_video(layers: int) -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        num_layers=layers - 1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )


def _cogvideox(layers: int) -> nn.Module:
    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=8,
        text_embed_dim=TEXT_DIM,
        num_layers=layers,
        sample_width=14,
        sample_height=10,
        sample_frames=9,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
    )


def _ltx(layers: int) -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        cross_attention_dim=HEADS * DIM,
        num_layers=layers,
        caption_channels=TEXT_DIM,
    )


def _flux(layers: int) -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=layers - 1,
        num_single_layers=1,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


_BUILDERS = {
    "wan": _wan,
    "hunyuan_video": _hunyuan_video,
    "cogvideox": _cogvideox,
    "ltx": _ltx,
    "flux": _flux,
}


def _wan_inputs(frames, height, width, batch, timestep, generator):
    return {
        "hidden_states": torch.randn(batch, CHANNELS, frames, 2 * height, 2 * width, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
    }


def _hunyuan_video_inputs(frames, height, width, batch, timestep, generator):
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.long)
    mask[-1, 2:] = 0
    return _wan_inputs(frames, height, width, batch, timestep, generator) | {
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "guidance": torch.full((batch,), 6000.0),
    }


def _cogvideox_inputs(frames, height, width, batch, timestep, generator):
    inputs = _wan_inputs(frames, height, width, batch, timestep, generator)
    angles = torch.randn(frames * height * width, DIM, generator=generator)
    return inputs | {
        "hidden_states": inputs["hidden_states"].transpose(1, 2),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _ltx_inputs(frames, height, width, batch, timestep, generator):
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.long)
    mask[-1, 2:] = 0
    return {
        "hidden_states": torch.randn(batch, frames * height * width, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _flux_inputs(frames, height, width, batch, timestep, generator):
    # Flux makes images; several "frames" are reference images of the same size, as Kontext has them.
    axes = (torch.arange(size, dtype=torch.float32) for size in (frames, height, width))
    return {
        "hidden_states": torch.randn(batch, frames * height * width, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "timestep": torch.full((batch,), timestep / 1000),
        "img_ids": torch.cartesian_prod(*axes),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


_INPUTS = {
    "wan": _wan_inputs,
    "hunyuan_video": _hunyuan_video_inputs,
    "cogvideox": _cogvideox_inputs,
    "ltx": _ltx_inputs,
    "flux": _flux_inputs,
}


@pytest.fixture(scope="session")
def tiny_wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an untrained `WanPipeline` for `from_pretrained`: 2 layers, 2 heads of dimension 16.

    80 × 96 pixels and 9 frames are 3 × 5 × 6 = 90 tokens.
    """
    directory = tmp_path_factory.mktemp("tiny-wan")
    torch.manual_seed(0)
    pipe = WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(WORDS), d_model=TEXT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
        ),
        transformer=_wan(layers=2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.save_pretrained(directory)
    return directory


WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moves", "left", "up", "over")


def _tokenizer(longest: int = 1024) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=longest, **special)


def _t5() -> T5EncoderModel:
    sizes = {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), **sizes))


def _clip() -> CLIPTextModel:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), eos_token_id=1, **sizes))


def _hunyuan_video_pipeline(transformer: nn.Module) -> DiffusionPipeline:
    sizes = {
        "hidden_size": TEXT_DIM,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
    }
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **sizes)),
        tokenizer=_tokenizer(),
        transformer=transformer,
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_clip(),
        tokenizer_2=_tokenizer(77),
    )


def _cogvideox_pipeline(transformer: nn.Module) -> DiffusionPipeline:
    return CogVideoXPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_t5(),
        vae=AutoencoderKLCogVideoX(
            latent_channels=CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        ),
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )


def _ltx_pipeline(transformer: nn.Module) -> DiffusionPipeline:
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(
            latent_channels=CHANNELS,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            patch_size=1,
        ),
        text_encoder=_t5(),
        tokenizer=_tokenizer(128),
        transformer=transformer,
    )


def _flux_pipeline(transformer: nn.Module) -> DiffusionPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(4,),
            latent_channels=1,
            norm_num_groups=2,
            shift_factor=0.1,
            scaling_factor=1.5,
        ),
        text_encoder=_clip(),
        tokenizer=_tokenizer(77),
        text_encoder_2=_t5(),
        tokenizer_2=_tokenizer(512),
        transformer=transformer,
    )


_PIPELINES = {
    "hunyuan_video": _hunyuan_video_pipeline,
    "cogvideox": _cogvideox_pipeline,
    "ltx": _ltx_pipeline,
    "flux": _flux_pipeline,
}


@pytest.fixture
def whole_pipeline(tiny: Callable[..., Tiny]) -> Callable[[str], DiffusionPipeline]:
    """Builder of an untrained pipeline with everything from tokenizer to VAE: `whole_pipeline("ltx")`."""

    def build(name: str) -> DiffusionPipeline:
        pipe = _PIPELINES[name](tiny(name).transformer)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval()  # as `from_pretrained` leaves them
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build
