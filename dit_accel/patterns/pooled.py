"""Pooled: blocks whose mean queries and mean keys agree.

MInference's block-sparse heads (https://arxiv.org/abs/2407.02490), DraftAttention
(https://arxiv.org/abs/2505.14708): attention between means instead of tokens, summed per block pair. As in
AdaSpa (https://arxiv.org/abs/2502.21079) every row keeps equally many blocks, so no part of the picture
starves; a row always keeps its own block.

The mean of a whole block blurs what its tokens read. So each block is pooled in a few parts and the
attention of the parts is summed. On synthetic smooth and moving patterns, in blocks of 64, four parts
recover about half of the mass that whole-block means lose against the best possible choice.
"""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.patterns.base import BlockSpace, Family, keep_best


def _choose(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, *, parts: int, top_p: float
) -> Tensor:
    """`parts`: means per block; `top_p` > 0: a row stops once its blocks hold that share of the mass."""
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"option 'top_p' of family 'pooled': expected a number from 0 to 1, got {top_p!r}")
    if parts < 1 or space.block % parts:
        raise ValueError(
            f"option 'parts' of family 'pooled': expected a divisor of the block, {space.block}, got {parts}"
        )
    run = space.block // parts
    sizes = space.run_sizes(run)
    missing = space.video_blocks * parts - len(sizes)

    def means(tokens: Tensor) -> Tensor:
        """`[batch, heads, parts · blocks, dim]`, part by part: sums over parts then run along whole rows."""
        mean = F.pad(space.means(tokens, 1, run), (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, parts))
        return mean.permute(0, 3, 2, 1, 4).flatten(2, 3)

    weights = F.pad(sizes, (0, missing)).unflatten(0, (-1, parts)).T.flatten()
    mass = (means(query) @ means(key).transpose(2, 3)).float().mul_(scale).add_(weights.log()).softmax(-1)
    mass = mass.unflatten(-1, (parts, -1)).sum(-2) * weights[:, None]
    mass = mass.unflatten(-2, (parts, -1)).sum(-3) / space.run_sizes(space.block)[:, None]
    mass.diagonal(dim1=-2, dim2=-1).add_(2.0)
    if not top_p:
        return keep_best(mass, kept)
    best, blocks = mass.topk(kept, dim=-1)
    best[..., 0] -= 2.0
    before = best.cumsum(-1) - best
    before[..., 0] = -1.0
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, blocks, before < top_p)


POOLED = Family(
    "pooled",
    _choose,
    static=False,
    options=MappingProxyType({"order": "tile:4x4x4", "parts": 4, "top_p": 0.0}),
)
