"""Profiled: every head reads a band, in the token order in which a band costs it least.

Sparse VideoGen (https://arxiv.org/abs/2502.01776): at run time some query rows are computed in full and with the band
of each order; the order with the smallest squared error of their output is the head's. The two orders of the authors
are frame-major (their spatial heads) and space-major (temporal heads); on Wan every row also reads as many keys at the
beginning of that order as a frame has (`sink` = 1), here out of the same budget. With the six axis orders it is the
choice that PAROAttention (https://arxiv.org/abs/2506.16054) makes per head, from the call itself where the authors
calibrate. `top_p` > 0 lets a row stop earlier, once the best of its band hold that share of its mass, as the means of
blocks estimate it.
"""

import functools
from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.grid import AXIS_ORDERS, TokenGrid
from dit_accel.kernels import BlockIndex
from dit_accel.patterns.bands import BANDS
from dit_accel.patterns.base import (
    SERVES,
    BlockSpace,
    Family,
    Memory,
    Selection,
    check_share,
    everything,
    for_heads,
    in_order,
    lists_of,
    lists_until,
    with_text,
)
from dit_accel.patterns.samples import sampled_rows


def _arrange(
    grid: TokenGrid,
    density: float,
    block: int,
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    value: Tensor,
    key_mask: Tensor | None,
    memory: Memory,
    orders: str,
    samples: int,
    sink: int,
    top_p: float,
) -> Selection:
    """`orders`: their names with a plus between; `samples`: rows; `sink`: frames' worth of first keys, in any order."""
    if sink < 0:
        raise ValueError(f"option 'sink' of family 'profiled': expected at least 0, got {sink!r}")
    if samples < 1:
        raise ValueError(f"option 'samples' of family 'profiled': expected at least 1, got {samples!r}")
    check_share("profiled", "top_p", top_p)
    names = order_names(orders)
    device, heads = query.device, query.shape[2]
    space = BlockSpace(grid, names[0], block, device)
    mask, lists = _band(space, density, -(-sink * grid.height * grid.width // block))
    index = for_heads(lists, heads)
    places = torch.stack([grid.order(name, device) for name in names])

    def cut(index: BlockIndex, order: Tensor) -> BlockIndex:
        if not top_p or not space.video_blocks:
            return index
        video = slice(space.video_blocks)
        q, k = in_order(query, order), in_order(key, order)
        return lists_until(space, mask[video, video], space.kept(density), q, k, scale, top_p)

    if len(names) == 1 or not space.video_blocks:
        return Selection(cut(index, places[None, :1]), places[:1], places[:1], grid, names[0])

    rows = places[0, sampled_rows(space, samples)]
    queries, keys, values = (x.transpose(1, 2) for x in (query.index_select(1, rows), key, value))
    values = values.float()
    scores = (queries * scale) @ keys.transpose(2, 3)
    if key_mask is not None:
        scores.masked_fill_(~key_mask[:, None, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    full = weights @ values
    errors = []
    for order in places:
        number = grid.inverse(order) // block
        read = weights * mask[number[rows]][:, number]
        output = (read @ values) / read.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        errors.append((output - full).square().mean((2, 3)))
    choice = torch.stack(errors, dim=-1).argmin(-1)
    order = places[choice]
    return Selection(cut(index, order), order, order, grid, None)


# Blocks are numbered in the order they are in, so that one band serves all orders.
@functools.lru_cache(maxsize=128)
def _band(space: BlockSpace, density: float, sinks: int) -> tuple[Tensor, BlockIndex]:
    """Mask `[blocks, blocks]` and lists of one head of the band, text included."""
    with torch.inference_mode(False), torch.device("cpu"):
        mask = everything(space)
        if space.video_blocks:
            mask = with_text(space, BANDS.choose(space, space.kept(density), sinks=sinks)[None, None])
        return mask[0, 0], lists_of(space, mask, 1)


def order_names(orders: str) -> list[str]:
    """Split the option `orders`."""
    names = orders.split("+")
    known = (*AXIS_ORDERS, "frame", "space")
    if not all(name in known for name in names):
        raise ValueError(
            f"option 'orders' of family 'profiled': expected names of {', '.join(known)} with + between, got {orders!r}"
        )
    return names


PROFILED = Family(
    "profiled",
    static=False,
    arrange=_arrange,
    reads_values=True,
    options=MappingProxyType({"orders": "fhw+hwf", "samples": 64, "sink": 0, "top_p": 0.0, **SERVES}),
)
