"""Choose the key blocks of some heads with a named family."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex
from dit_accel.patterns.attention_tile import ATTENTION_TILE
from dit_accel.patterns.bands import BANDS
from dit_accel.patterns.base import BlockSpace, Family, Memory, Option, Selection
from dit_accel.patterns.clustered import CLUSTERED
from dit_accel.patterns.dense import DENSE
from dit_accel.patterns.hashed import HASHED
from dit_accel.patterns.radial import RADIAL
from dit_accel.patterns.scored import ANTIDIAGONAL, CHANNELS, LOWBIT, POOLED, SEARCHED
from dit_accel.patterns.skip import SKIP
from dit_accel.patterns.stripes import STRIPES
from dit_accel.patterns.window import WINDOW

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(DENSE, SKIP, WINDOW, BANDS, RADIAL, ATTENTION_TILE),
        *(STRIPES, POOLED, ANTIDIAGONAL, LOWBIT, CHANNELS, SEARCHED, CLUSTERED, HASHED),
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
    density: float,
    block: int = 64,
    scale: float | None = None,
    memory: Memory | None = None,
    **options: Option,
) -> Selection:
    """Choose key blocks for every head of `query`.

    Each row of video blocks keeps `round(density · blocks)` blocks, at least one of them video. Blocks that
    hold text are kept by every row and count towards that number; rows that hold text are dense and come on
    top.

    Args:
        name: a name in `FAMILIES`.
        query, key: `[batch, seq, heads, dim]` in the model's order, seq = `grid.total_tokens`.
        grid: the token grid.
        density: kept pairs divided by all pairs, 0 to 1.
        block: tokens per block.
        scale: softmax scale, 1/√dim if None.
        memory: of a dynamic family, between the steps of one layer and guidance branch: what it keeps for the next
            choice, and the choice itself for the option `reuse`. Empty at the start of a generation.
        options: of the family, see `FAMILIES[name].options`.

    Raises:
        ValueError: an unknown family or option, a density out of range, tensors that do not fit the grid.
    """
    family = family_named(name)
    chosen = family.with_defaults(options)
    family.check_density(density)
    for argument, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4 or tensor.shape[1] != grid.total_tokens:
            raise ValueError(
                f"{argument}: expected [batch, {grid.total_tokens}, heads, dim] for {grid}, "
                f"got {tuple(tensor.shape)}"
            )
    if block < 1:
        raise ValueError(f"block: expected at least 1 token, got {block!r}")
    heads = query.shape[2]
    if family.static:
        return _static_selection(name, tuple(chosen.items()), grid, density, block, heads, query.device)
    memory = {} if memory is None else memory
    reuse = int(chosen.pop("reuse"))
    if reuse < 1:
        raise ValueError(f"option 'reuse' of family {name!r}: expected at least 1 step, got {reuse}")
    if memory.get("left", 0) > 0:
        memory["left"] -= 1
        return memory["selection"]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if family.arrange is not None:
        selection = family.arrange(grid, density, block, query, key, scale, memory=memory, **chosen)
    else:
        selection = _chosen(family, grid, density, block, query, key, scale, memory, chosen)
    if reuse > 1:
        memory["selection"], memory["left"] = selection, reuse - 1
    return selection


def _chosen(
    family: Family,
    grid: TokenGrid,
    density: float,
    block: int,
    query: Tensor,
    key: Tensor,
    scale: float,
    memory: Memory,
    options: dict[str, Option],
) -> Selection:
    """The choice of a dynamic family among the blocks of an order of the grid."""
    space = BlockSpace(grid, str(options.pop("order")), block, query.device)
    if not space.video_blocks:
        return _finish(space, _everything(space), query.shape[2])
    kept = space.kept(density)
    mask = family.choose(
        space,
        kept,
        space.reorder(query),
        space.reorder(key),
        scale,
        memory=memory,
        **options,
    )
    longest = space.blocks if grid.text_tokens else kept
    return _finish(space, _with_text(family, space, mask), query.shape[2], longest)


# A grid and all it depends on is in the key; a mask of one head serves all, its lists are shared.
@functools.lru_cache(maxsize=128)
def _static_selection(
    name: str,
    options: tuple[tuple[str, Option], ...],
    grid: TokenGrid,
    density: float,
    block: int,
    heads: int,
    device: torch.device,
) -> Selection:
    family, chosen = FAMILIES[name], dict(options)
    with torch.inference_mode(False):
        space = BlockSpace(grid, str(chosen.pop("order", "frame")), block, device)
        if not space.video_blocks:
            return _finish(space, _everything(space), heads)
        mask = family.choose(space, space.kept(density), **chosen)
        return _finish(space, _with_text(family, space, mask[None, None]), heads)


def _everything(space: BlockSpace) -> Tensor:
    return torch.ones(1, 1, space.blocks, space.blocks, dtype=torch.bool, device=space.device)


def _with_text(family: Family, space: BlockSpace, mask: Tensor) -> Tensor:
    """Extend a mask over video blocks by the rows and columns of the blocks that hold text."""
    if space.video_blocks == space.blocks:
        return mask
    whole = mask.new_ones(*mask.shape[:2], space.blocks, space.blocks)
    whole[:, :, : space.video_blocks] = family.reads_text
    whole[:, :, : space.video_blocks, : space.video_blocks] = mask
    return whole


def _finish(space: BlockSpace, mask: Tensor, heads: int, longest: int | None = None) -> Selection:
    """longest: of the rows' lists, where a choice is made while a generation runs."""
    tokens = space.grid.total_tokens
    # Only a GPU runs ahead of the host; on a CPU lists without gaps are faster.
    room = longest if mask.device.type == "cuda" else None
    index = BlockIndex.from_mask(mask, space.block, space.block, tokens, tokens, room=room)
    if index.heads != heads:
        counts, offsets = (part.expand(-1, heads, -1).contiguous() for part in (index.counts, index.offsets))
        index = BlockIndex(counts, offsets, index.indices, space.block, space.block, tokens, tokens)
    order = space.order[None]
    return Selection(index, order, order, space.grid, space.order_name)
