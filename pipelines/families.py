"""What has to be known about each diffusers transformer class; no other folder knows these classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.grid import TokenGrid

# Arguments of one forward call of a transformer, by the names its own signature gives them.
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class ModelFamily:
    """One diffusers transformer class: where its attention is, and how to read a forward call.

    Attributes:
        name: short name of the family, such as "wan".
        transformer_class: name of the diffusers class.
        blocks: (block list, attention) attribute names in forward order; only self-attention and joint
            attention over the video tokens is listed, cross-attention and text refiners never are.
        attention_function: the global its processors call: "dispatch_attention_fn" with tensors
            `[batch, seq, heads, dim]`, or "F.scaled_dot_product_attention" with `[batch, heads, seq, dim]`.
        read_grid: token grid of a forward call.
        noise_timestep: what `timestep` is at pure noise.
        block_returns: what a block returns, in order; its arguments have the same names and come first.
        modulated: the first block's modulated input, from the block and its arguments by name; what changes in it from
            step to step tells TeaCache how much the output will change.
        modulation_has_weights: whether `modulated` reads weights of the block.
    """

    name: str
    transformer_class: str
    blocks: tuple[tuple[str, str], ...]
    attention_function: str
    read_grid: Callable[[Any, Arguments], TokenGrid]
    noise_timestep: float
    block_returns: tuple[str, ...]
    modulated: Callable[[Any, Arguments], Tensor]
    modulation_has_weights: bool = True

    def attention_modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Attention modules that can be swapped, by name, in forward order."""
        return {
            f"{blocks}.{number}.{attention}": getattr(block, attention)
            for blocks, attention in self.blocks
            for number, block in enumerate(getattr(transformer, blocks))
        }

    def bind(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Name the arguments of a forward call; those left out have their defaults."""
        bound = inspect.signature(type(transformer).forward).bind(transformer, *args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def progress(self, arguments: Arguments, timestep: float | None = None) -> float:
        """Fraction of the denoising done, 0 at pure noise and 1 at the clean sample.

        Where tokens differ in their timestep (image-to-video keeps given frames clean) the noisiest counts.

        Args:
            arguments: of the transformer's call.
            timestep: its timestep where that is known; else it is read, for which the host waits.
        """
        if timestep is None:
            timestep = float(torch.as_tensor(arguments["timestep"]).max())
        return min(1.0, max(0.0, 1.0 - timestep / self.noise_timestep))


def transformers_of(pipe: Any) -> list[nn.Module]:
    """The transformers of a pipeline, one or two experts; a transformer is its own.

    Raises:
        ValueError: there is none.
    """
    found = (
        (pipe,)
        if isinstance(pipe, nn.Module)
        else (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    )
    transformers = [module for module in found if isinstance(module, nn.Module)]
    if not transformers:
        raise ValueError(
            f"pipe: expected a diffusers transformer or a pipeline that has one, got {type(pipe).__name__}"
        )
    return transformers


def family_of(transformer: nn.Module) -> ModelFamily:
    """Return the family of a diffusers transformer.

    Raises:
        ValueError: a class that is not supported.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    raise ValueError(
        f"transformer: expected one of the supported classes {', '.join(_FAMILIES)}, "
        f"got {type(transformer).__name__}"
    )


def _wan_grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch_frames, patch_height, patch_width = transformer.config.patch_size
    return TokenGrid(frames // patch_frames, height // patch_height, width // patch_width)


def _hunyuan_video_grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch, patch_frames = transformer.config.patch_size, transformer.config.patch_size_t
    text_tokens = arguments["encoder_hidden_states"].shape[1]
    return TokenGrid(frames // patch_frames, height // patch, width // patch, text_tokens)


def _cogvideox_grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch, patch_frames = transformer.config.patch_size, transformer.config.patch_size_t or 1
    text_tokens = arguments["encoder_hidden_states"].shape[1]
    return TokenGrid(frames // patch_frames, height // patch, width // patch, text_tokens, text_first=True)


def _ltx_grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    # The sequence comes packed, one latent pixel a token, and the call says how many there are of each axis.
    sizes = tuple(arguments[name] for name in ("num_frames", "height", "width"))
    if None in sizes:
        raise ValueError(
            "LTX: expected num_frames, height and width in the transformer's call, got "
            f"{sizes}; pipelines that pass only video_coords cannot run a sparse plan"
        )
    return _packed("LTX", "num_frames, height and width", sizes, arguments["hidden_states"].shape[1])


def _flux_grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    sizes = _id_sizes(arguments["img_ids"])
    text_tokens = arguments["encoder_hidden_states"].shape[1]
    return _packed("Flux", "img_ids", sizes, arguments["hidden_states"].shape[1], text_tokens)


# The sizes that ids speak of, which pipelines make once and pass in every step: the host waits for a GPU to tell them.
_sizes_of_ids = WeakTensorKeyDictionary()


def _id_sizes(ids: Tensor) -> tuple[int, ...]:
    """Images, rows and columns of FLUX's ids; a reference image of the same size is a second "frame"."""
    version = 0 if ids.is_inference() else ids._version
    known = _sizes_of_ids.get(ids)
    if known is None or known[0] != version:
        flat = ids[0] if ids.ndim == 3 else ids
        known = version, tuple(int(size) + 1 for size in (flat.amax(0) - flat.amin(0)).tolist())
        _sizes_of_ids[ids] = known
    return known[1]


def _packed(model: str, source: str, sizes: tuple[int, ...], tokens: int, text_tokens: int = 0) -> TokenGrid:
    frames, height, width = sizes
    if frames * height * width != tokens:
        raise ValueError(
            f"{model}: expected {frames} x {height} x {width} tokens (frames, height, width) from {source}, "
            f"got {tokens}; token sequences that are no full grid cannot run a sparse plan"
        )
    return TokenGrid(frames, height, width, text_tokens, text_first=text_tokens > 0)


def _normalised(block: Any, arguments: Arguments) -> Tensor:
    given = {"emb": arguments["temb"]}
    if (
        arguments.get("token_replace_emb") is not None
    ):  # HunyuanVideo from an image: the first frame has its own
        given["token_replace_emb"] = arguments["token_replace_emb"]
        given["first_frame_num_tokens"] = arguments["num_tokens"]
    return block.norm1(arguments["hidden_states"], **given)[0]


def _cogvideox_normalised(block: Any, arguments: Arguments) -> Tensor:
    names = ("hidden_states", "encoder_hidden_states", "temb")
    return block.norm1(*(arguments[name] for name in names))[0]


def _ltx_normalised(block: Any, arguments: Arguments) -> Tensor:
    hidden, embedding = arguments["hidden_states"], arguments["temb"]
    table = block.scale_shift_table
    ada = table[None, None] + embedding.reshape(hidden.shape[0], embedding.shape[1], table.shape[0], -1)
    return block.norm1(hidden) * (1 + ada[:, :, 1]) + ada[:, :, 0]


def _wan_time(block: Any, arguments: Arguments) -> Tensor:
    # As the authors of TeaCache do for Wan: the embedding of the timestep, the same for every prompt. Where each token
    # has its own, the given frames come first and the last token is among those to be denoised.
    embedding = arguments["temb"]
    return embedding if embedding.ndim == 3 else embedding[:, -1]


_FAMILIES = {
    family.transformer_class: family
    for family in (
        ModelFamily(
            name="wan",
            transformer_class="WanTransformer3DModel",
            blocks=(("blocks", "attn1"),),
            attention_function="dispatch_attention_fn",
            read_grid=_wan_grid,
            noise_timestep=1000.0,
            block_returns=("hidden_states",),
            modulated=_wan_time,
            modulation_has_weights=False,
        ),
        ModelFamily(
            name="hunyuan_video",
            transformer_class="HunyuanVideoTransformer3DModel",
            blocks=(("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")),
            attention_function="dispatch_attention_fn",
            read_grid=_hunyuan_video_grid,
            noise_timestep=1000.0,
            block_returns=("hidden_states", "encoder_hidden_states"),
            modulated=_normalised,
        ),
        ModelFamily(
            name="cogvideox",
            transformer_class="CogVideoXTransformer3DModel",
            blocks=(("transformer_blocks", "attn1"),),
            attention_function="F.scaled_dot_product_attention",
            read_grid=_cogvideox_grid,
            noise_timestep=1000.0,
            block_returns=("hidden_states", "encoder_hidden_states"),
            modulated=_cogvideox_normalised,
        ),
        ModelFamily(
            name="ltx",
            transformer_class="LTXVideoTransformer3DModel",
            blocks=(("transformer_blocks", "attn1"),),
            attention_function="dispatch_attention_fn",
            read_grid=_ltx_grid,
            noise_timestep=1000.0,
            block_returns=("hidden_states",),
            modulated=_ltx_normalised,
        ),
        ModelFamily(
            name="flux",
            transformer_class="FluxTransformer2DModel",
            blocks=(("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")),
            attention_function="dispatch_attention_fn",
            read_grid=_flux_grid,
            noise_timestep=1.0,
            block_returns=("encoder_hidden_states", "hidden_states"),
            modulated=_normalised,
        ),
    )
}
