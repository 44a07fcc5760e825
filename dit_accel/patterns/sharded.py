"""Sharded: all heads read their neighbourhood, and each its own share of the other columns.

S2-Attention (https://arxiv.org/abs/2407.17678) without the causal mask: head h reads the blocks j next to its own and
those with (j + h) mod stride = 0, so that the heads together read everything. Here density governs instead of the
stride: columns come in by the reversed bits of j + h. At 1/2, 1/4, 1/8 of the columns these are the strides 2, 4, 8,
and between them the strided columns of the lower density with evenly spread ones added.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.patterns.base import BlockSpace, Family, first_of


def _choose(space: BlockSpace, kept: int, *, heads: tuple[int, ...], local: float) -> Tensor:
    """`local`: share of a row's blocks that goes to its neighbours, its own block always among them."""
    if not 0.0 <= local <= 1.0:
        raise ValueError(f"option 'local' of family 'sharded': expected a number from 0 to 1, got {local!r}")
    blocks = torch.arange(space.video_blocks)
    apart = blocks - blocks[:, None]
    near = first_of(2 * apart.abs() + (apart > 0), max(round(local * kept), 1))
    bits = (space.video_blocks - 1).bit_length()
    columns = (blocks + torch.tensor(heads)[:, None]) % 2**bits
    reversed_bits = torch.zeros_like(columns)
    for bit in range(bits):
        reversed_bits += (columns >> bit & 1) << bits - 1 - bit
    ranks = reversed_bits[:, None].expand(-1, space.video_blocks, -1).masked_fill(near, -1)
    return first_of(ranks, kept).to(space.device)


SHARDED = Family(
    "sharded",
    _choose,
    static=True,
    per_head=True,
    options=MappingProxyType({"order": "frame", "local": 0.5}),
)
