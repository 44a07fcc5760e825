"""Balanced: queries and keys are divided into equal blocks of tokens that attend alike, wherever they are.

Like the clusters of Sparse VideoGen2 (https://arxiv.org/abs/2505.18875) these blocks are what a mean stands for well,
in the choice of blocks and as the remainder of those left out. But they are equal, as attention over blocks likes them,
and alike in the sense of attention: the distance of two keys is how differently the queries score them, see
`kernels/partition.py`. On heads of the demo model, at density .25 and with the means of what is left out, they err half
as much as k-means with the published numbers of clusters, and a third of what blocks of neighbours do.

A row keeps the blocks that hold most of the softmax mass between means, of `parts` to a block: runs of neighbours along
the last axis that was halved. The blocks serve `rebuild` steps, or as many choices where nobody knows the step; each of
these chooses among them anew. `top_p` > 0 lets a row stop earlier, once its blocks hold that share of the mass. Text is
not divided.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.kernels.backend import on_device
from dit_accel.kernels.partition import partition
from dit_accel.kernels.prepare import TINY
from dit_accel.kernels.scores import pooled_scores
from dit_accel.patterns.base import (
    SERVES,
    BlockSpace,
    Family,
    Memory,
    Selection,
    check_divisor,
    check_share,
    ranked_lists,
)


def _arrange(
    grid: TokenGrid,
    density: float | tuple[float, ...],
    block: int,
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    memory: Memory,
    axes: int,
    parts: int,
    rebuild: int,
    top_p: float,
) -> Selection:
    """`axes`: dimensions in which tokens are compared; `parts`: means per block; `rebuild`: steps that blocks serve."""
    for name, value in (("axes", axes), ("rebuild", rebuild)):
        if value < 1:
            raise ValueError(f"option {name!r} of family 'balanced': expected at least 1, got {value!r}")
    check_divisor("balanced", "parts", parts, block)
    check_share("balanced", "top_p", top_p)
    space = BlockSpace(grid, "frame", block, query.device)
    query_order, key_order = _orders(grid, block, query, key, memory, axes, rebuild)
    scores = pooled_scores(
        query,
        key,
        block_q=block,
        block_k=block,
        parts=parts,
        scale=scale,
        query_order=query_order,
        key_order=key_order,
    ).float()
    # Blocks with text have scores of their own here, which nothing needs.
    scores = scores[..., : space.video_blocks, : space.video_blocks]
    masses = scores / scores.sum(-1, keepdim=True).clamp(min=TINY) if top_p else None
    kept = tuple(map(space.kept, density)) if isinstance(density, tuple) else space.kept(density)
    index = ranked_lists(space, scores, kept, masses=masses, top_p=top_p)
    return Selection(index, query_order, key_order, grid, None)


def _orders(
    grid: TokenGrid, block: int, query: Tensor, key: Tensor, memory: Memory, axes: int, rebuild: int
) -> tuple[Tensor, Tensor]:
    """Orders `[batch, heads, seq]` of queries and keys, those of an earlier step while they serve."""
    step, built = memory.get("now"), memory.get("built")
    # Built before it was known that there are several branches, they only count the choices.
    age = memory.get("age", -1) + 1 if step is None or built is None else step - built
    if "orders" not in memory or not 0 <= age < rebuild:
        q, k = (x[:, grid.video_slice] for x in (query, key))
        orders = partition(q, k, block=block, axes=axes)
        memory["orders"] = tuple(_with_text(grid, order) for order in orders)
        memory["built"], age = step, 0
    memory["age"] = age
    return memory["orders"]


def _carried(memory: Memory, places: tuple[int, ...]) -> Memory:
    """Blocks depend on no density, and on no other head."""
    if "orders" not in memory:
        return {}
    at = on_device(places, memory["orders"][0].device)
    orders = tuple(order.index_select(1, at) for order in memory["orders"])
    return {"orders": orders, "built": memory["built"], "age": memory["age"]}


def _with_text(grid: TokenGrid, order: Tensor) -> Tensor:
    """An order of the video's tokens in the model's numbers, text behind."""
    text = torch.arange(grid.text_tokens, device=order.device) + grid.text_slice.start
    return torch.cat((order + grid.video_slice.start, text.expand(*order.shape[:2], -1)), dim=-1)


BALANCED = Family(
    "balanced",
    static=False,
    arrange=_arrange,
    ranked=True,
    carry=_carried,
    options=MappingProxyType({"axes": 8, "parts": 4, "rebuild": 3, "top_p": 0.0, **SERVES}),
)
