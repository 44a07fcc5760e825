"""Shared fixtures: a tiny real transformer of each supported diffusers class, and a tiny Wan pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

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
    words = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moves", "left", "up", "over")
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(words), d_model=TEXT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
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
