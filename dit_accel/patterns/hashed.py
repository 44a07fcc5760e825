"""Hashed: tokens are sorted by a hash that similar vectors share, and each query reads the keys next to it.

HyperAttention (https://arxiv.org/abs/2310.05869) with the angular hash of random hyperplanes: bit i says on which side
of plane i a vector lies. In the order of a Gray code neighbours differ in one bit, that is, lie in cells that touch.
Queries and keys are sorted apart, each after their mean was taken off, so that planes through the origin divide them.
Within the sorted sequences attention is a band of blocks. `top_p` > 0 lets a row stop earlier, once the best of its
band hold that share of its mass, as the means of blocks estimate it. Text is not hashed.

`features` > 0 gives weights to the keys that are left out too, by so many random features (Scatterbrain,
https://arxiv.org/abs/2110.15343; see `dit_accel.kernels.low_rank`), where the remainder gives them that of their means.
"""

import functools
from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex
from dit_accel.patterns.base import (
    SERVES,
    BlockSpace,
    Family,
    Memory,
    Selection,
    check_share,
    for_heads,
    in_order,
    lists_of,
    lists_until,
)


def _arrange(
    grid: TokenGrid,
    density: float,
    block: int,
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    memory: Memory,
    planes: int,
    seed: int,
    top_p: float,
    features: int,
) -> Selection:
    """`planes`: bits of the hash, up to 30; `seed`: of the random planes and features."""
    check_share("hashed", "top_p", top_p)
    if features < 0:
        raise ValueError(f"option 'features' of family 'hashed': expected at least 0, got {features!r}")
    if not 1 <= planes <= 30:
        raise ValueError(f"option 'planes' of family 'hashed': expected 1 to 30, got {planes!r}")
    space = BlockSpace(grid, "frame", block, query.device)
    normals = _normals(query.shape[3], planes, seed, query.device)
    query_order, key_order = (
        _sorted_by_hash(grid, x[:, grid.video_slice].float(), normals) for x in (query, key)
    )
    mask, lists = _band(space, density)
    index = for_heads(lists, query.shape[2])
    if top_p and space.video_blocks:
        query, key = in_order(query, query_order), in_order(key, key_order)
        index = lists_until(space, mask, space.kept(density), query, key, scale, top_p)
    return Selection(index, query_order, key_order, grid, None)


@functools.lru_cache(maxsize=128)
def _band(space: BlockSpace, density: float) -> tuple[Tensor, BlockIndex]:
    """Mask of the video blocks, and lists of one head."""
    with torch.inference_mode(False):
        kept = space.kept(density)
        rows = torch.arange(space.blocks, device=space.device)
        first = (rows - kept // 2).clamp(0, max(space.video_blocks - kept, 0))[:, None]
        mask = (rows >= first) & (rows < first + kept)
        mask[space.video_blocks :] = True
        mask[:, space.video_blocks :] = True
        video = slice(space.video_blocks)
        return mask[video, video], lists_of(space, mask[None, None], 1)


# A copy to the device would have the host wait.
@functools.lru_cache(maxsize=32)
def _normals(dim: int, planes: int, seed: int, device: torch.device) -> Tensor:
    """The planes' normals, float32 `[dim, planes]`."""
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(dim, planes, generator=generator, device="cpu").to(device)


def _sorted_by_hash(grid: TokenGrid, tokens: Tensor, normals: Tensor) -> Tensor:
    """Order `[batch, heads, seq]` of `[batch, video, heads, dim]`, text behind."""
    bits = ((tokens - tokens.mean(1, keepdim=True)) @ normals > 0).transpose(1, 2)
    # The place of a word in the Gray code: every bit is the parity of those from the highest down to it.
    places = bits.cumsum(-1) % 2
    powers = 2 ** torch.arange(bits.shape[-1] - 1, -1, -1, device=tokens.device)
    order = (places * powers).sum(-1).argsort(dim=-1, stable=True) + grid.video_slice.start
    text = torch.arange(grid.text_tokens, device=tokens.device) + grid.text_slice.start
    return torch.cat((order, text.expand(*order.shape[:2], -1)), dim=-1)


HASHED = Family(
    "hashed",
    static=False,
    arrange=_arrange,
    options=MappingProxyType({"planes": 12, "seed": 0, "top_p": 0.0, "features": 0, **SERVES}),
)
