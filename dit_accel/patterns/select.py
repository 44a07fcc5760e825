"""Choose the key blocks of some heads with a named family."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.patterns.antidiagonal import ANTIDIAGONAL
from dit_accel.patterns.attention_tile import ATTENTION_TILE
from dit_accel.patterns.balanced import BALANCED
from dit_accel.patterns.bands import BANDS
from dit_accel.patterns.base import (
    BRANCHES,
    SHARED,
    BlockSpace,
    Family,
    Memory,
    Option,
    Selection,
    everything,
    for_heads,
    in_order,
    lists_of,
    with_text,
)
from dit_accel.patterns.channels import CHANNELS
from dit_accel.patterns.clustered import CLUSTERED
from dit_accel.patterns.dense import DENSE
from dit_accel.patterns.hashed import HASHED
from dit_accel.patterns.lowbit import LOWBIT
from dit_accel.patterns.pooled import POOLED
from dit_accel.patterns.profiled import PROFILED
from dit_accel.patterns.radial import RADIAL
from dit_accel.patterns.searched import SEARCHED
from dit_accel.patterns.sharded import SHARDED
from dit_accel.patterns.skip import SKIP
from dit_accel.patterns.sorted_keys import sorted_keys
from dit_accel.patterns.stripes import STRIPES
from dit_accel.patterns.window import WINDOW

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(DENSE, SKIP, WINDOW, BANDS, RADIAL, ATTENTION_TILE, SHARDED),
        *(STRIPES, POOLED, ANTIDIAGONAL, LOWBIT, CHANNELS, SEARCHED, CLUSTERED, BALANCED, HASHED, PROFILED),
    )
}


def family_named(name: str) -> Family:
    """Return the family of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def select(
    name: str,
    query: Tensor,
    key: Tensor,
    grid: TokenGrid,
    *,
    density: float | Sequence[float],
    block: int = 64,
    scale: float | None = None,
    value: Tensor | None = None,
    key_mask: Tensor | None = None,
    state: Memory | None = None,
    heads: Sequence[int] | None = None,
    layer: int = 0,
    step: int | None = None,
    now: int | None = None,
    **options: Option,
) -> Selection:
    """Choose key blocks for every head of `query`.

    Each row of video blocks keeps `round(density · blocks)` blocks (with the option `budget` = "map" the rows of a head
    do on average), at least one of them video. Blocks that hold text are kept by every row and count towards that
    number; rows that hold text are dense and come on top.

    Args:
        name: a name in `FAMILIES`.
        query, key: `[batch, seq, heads, dim]` in the model's order, seq = `grid.total_tokens`.
        grid: the token grid.
        density: kept pairs divided by all pairs, 0 to 1; of families whose heads `Family.chooses_together` also one for
            each head.
        block: tokens per block.
        scale: softmax scale, 1/√dim if None.
        value: like `key`, for families that compare outputs (`profiled`).
        key_mask: bool `[batch, seq]`, True = may be read, for these too.
        state: of a dynamic family, between the steps of one layer and guidance branch: what it keeps for the next
            choice, and the choice itself for the options `reuse`, `layers` and `branches`. Layers may share one for
            `layers`, branches for `branches`. Empty at the start of a generation.
        heads: numbers of the heads in their layer, by which `sharded` tells them apart; 0, 1, 2 ... if None.
        layer: number of the layer. Within a step layers come in ascending order: with a memory that layers share, a
            number that is not above the one before begins a new step.
        step: number of the denoising step, which calls that share a choice by the option `branches` have in common;
            None if nobody knows, then each makes its own.
        now: its number in any case, by which what serves some steps grows old; `step` if None.
        options: of the family, see `FAMILIES[name].options`.

    Raises:
        ValueError: an unknown family or option, a density out of range, tensors that do not fit the grid.
    """
    family = family_named(name)
    chosen = family.with_defaults(options)
    density = _densities(family, chosen, density, query.shape[2])
    for argument, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4 or tensor.shape[1] != grid.total_tokens:
            raise ValueError(
                f"{argument}: expected [batch, {grid.total_tokens}, heads, dim] for {grid}, "
                f"got {tuple(tensor.shape)}"
            )
    if key.shape != query.shape:
        raise ValueError(f"key: expected {tuple(query.shape)} like query, got {tuple(key.shape)}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != key.shape[:2]):
        raise ValueError(
            f"key_mask: expected bool {tuple(key.shape[:2])}, got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if block < 1:
        raise ValueError(f"block: expected at least 1 token, got {block!r}")
    numbers = tuple(range(query.shape[2])) if heads is None else tuple(heads)
    if len(numbers) != query.shape[2]:
        raise ValueError(f"heads: expected {query.shape[2]} numbers, one for each head, got {len(numbers)}")
    if family.static:
        which = numbers if family.per_head else None
        found = _static_selection(name, tuple(chosen.items()), grid, density, block, which, query.device)
        return replace(found, index=for_heads(found.index, len(numbers)))
    if family.reads_values:
        if value is None or value.shape[:3] != key.shape[:3]:
            got = None if value is None else tuple(value.shape)
            raise ValueError(
                f"value: expected [{', '.join(map(str, key.shape[:3]))}, dim] like key, since family {name!r} compares "
                f"outputs, got {got}; pass the values"
            )
        chosen |= {"value": value, "key_mask": key_mask}  # type: ignore[dict-item]
    memory = {} if state is None else state
    reuse, layers = int(chosen.pop("reuse")), int(chosen.pop("layers"))
    if (branches := chosen.pop("branches")) not in BRANCHES:
        raise ValueError(
            f"option 'branches' of family {name!r}: expected {' or '.join(map(repr, BRANCHES))}, got {branches!r}"
        )
    shared = branches == SHARED and step is not None
    for option, least, unit in (("reuse", reuse, "step"), ("layers", layers, "layer")):
        if least < 1:
            raise ValueError(f"option {option!r} of family {name!r}: expected at least 1 {unit}, got {least}")
    later_layer = layers > 1 and layer > memory.get("layer", layer)
    later_branch = shared and memory.get("step") == step
    if "selection" in memory and (later_layer or later_branch):
        memory["layer"] = layer
        return memory["selection"]
    memory["layer"], memory["now"] = layer, step if now is None else now
    if memory.get("left", 0) > 0:
        memory["left"] -= 1
        memory["step"] = step
        return memory["selection"]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if family.arrange is not None:
        selection = family.arrange(grid, density, block, query, key, scale, memory=memory, **chosen)
    else:
        selection = _chosen(family, grid, density, block, query, key, scale, memory, chosen)
    if reuse > 1 or layers > 1 or shared:
        memory["selection"], memory["left"], memory["step"] = selection, reuse - 1, step
    return selection


def _densities(
    family: Family, options: dict[str, Option], density: float | Sequence[float], heads: int
) -> float | tuple[float, ...]:
    """One number, or one for each head where they differ."""
    if not isinstance(density, Sequence) or isinstance(density, str):
        family.check_density(density)
        return density
    for one in density:
        family.check_density(one)
    if len(density) != heads:
        raise ValueError(f"density: expected a number or {heads}, one for each head, got {len(density)}")
    if len(set(density)) == 1:
        return density[0]
    if not family.chooses_together(options):
        raise ValueError(
            f"density: expected one number for all heads of family {family.name!r} with these options, got "
            f"{len(set(density))} different ones; select for each on its own"
        )
    return tuple(density)


def _chosen(
    family: Family,
    grid: TokenGrid,
    density: float | tuple[float, ...],
    block: int,
    query: Tensor,
    key: Tensor,
    scale: float,
    memory: Memory,
    options: dict[str, Option],
) -> Selection:
    """The choice of a dynamic family among the blocks of an order of the grid."""
    space = BlockSpace(grid, str(options.pop("order")), block, query.device)
    order, heads = space.order[None], query.shape[2]
    segment = int(options.pop("segment", 0))
    if segment < 0:
        raise ValueError(f"option 'segment' of family {family.name!r}: expected at least 0, got {segment}")
    if not space.video_blocks:
        every = lists_of(space, everything(space), heads, space.blocks)
        return Selection(every, order, order, grid, space.order_name)
    kept = tuple(map(space.kept, density)) if isinstance(density, tuple) else space.kept(density)
    query, key = space.reorder(query), space.reorder(key)
    key_order: Tensor = order
    order_name: str | None = space.order_name
    if segment:
        places = sorted_keys(space, query, key, scale, segment)
        key = in_order(key, places)
        key_order, order_name = order[0][places], None
    index = family.choose(space, kept, query, key, scale, memory=memory, **options)
    return Selection(index, order, key_order, grid, order_name)


# A grid and all it depends on is in the key; a mask of one head serves all.
@functools.lru_cache(maxsize=128)
def _static_selection(
    name: str,
    options: tuple[tuple[str, Option], ...],
    grid: TokenGrid,
    density: float,
    block: int,
    numbers: tuple[int, ...] | None,
    device: torch.device,
) -> Selection:
    """`numbers`: of the heads if the family's choice depends on them; else the lists are those of one head."""
    family, chosen = FAMILIES[name], dict(options)
    # Whatever torch's default device is, choices from shapes are made on the CPU.
    with torch.inference_mode(False), torch.device("cpu"):
        space = BlockSpace(grid, str(chosen.pop("order", "frame")), block, device)
        mask = everything(space)
        if space.video_blocks:
            mask = family.choose(
                space, space.kept(density), **({} if numbers is None else {"heads": numbers}), **chosen
            )
            mask = with_text(space, mask[(None,) * (4 - mask.ndim)], family.reads_text)
        order = space.order[None]
        return Selection(lists_of(space, mask, mask.shape[1]), order, order, grid, space.order_name)
