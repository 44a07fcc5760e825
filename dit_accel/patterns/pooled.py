"""Pooled: blocks whose mean query and mean key agree.

MInference's block-sparse heads (https://arxiv.org/abs/2407.02490), DraftAttention
(https://arxiv.org/abs/2505.14708): score of a block pair = q_mean . k_mean * scale, softmax over the row. As
in AdaSpa (https://arxiv.org/abs/2502.21079) every row keeps equally many blocks, so no part of the picture
starves; a row always keeps its own block.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.patterns.base import BlockSpace, Family, keep_best


def _choose(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, *, top_p: float
) -> Tensor:
    """`top_p` > 0: a row stops as soon as its blocks hold that share of the pooled mass."""
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"option 'top_p' of family 'pooled': expected a number from 0 to 1, got {top_p!r}")
    sizes = space.block_sizes()
    q = (space.block_sums(query, dim=1) / sizes[:, None, None]).transpose(1, 2)
    k = (space.block_sums(key, dim=1) / sizes[:, None, None]).permute(0, 2, 3, 1)
    mass = torch.softmax((q @ k) * scale + sizes.log(), dim=-1)
    mass.diagonal(dim1=-2, dim2=-1).add_(2.0)
    if not top_p:
        return keep_best(mass, kept)
    best, blocks = mass.topk(kept, dim=-1)
    best[..., 0] -= 2.0
    before = best.cumsum(-1) - best
    before[..., 0] = -1.0
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, blocks, before < top_p)


POOLED = Family(
    "pooled", _choose, static=False, options=MappingProxyType({"order": "tile:4x4x4", "top_p": 0.0})
)
