"""Families that score every pair of blocks from the queries and keys of the call, and keep the best of each row.

- `pooled`: blocks whose mean queries and mean keys agree: MInference (https://arxiv.org/abs/2407.02490), DraftAttention
  (https://arxiv.org/abs/2505.14708). The mean of a whole block blurs what its tokens read, so each block is pooled in a
  few parts. On synthetic smooth and moving patterns, in blocks of 64, four parts recover about half of the mass that
  whole-block means lose against the best possible choice.
- `antidiagonal`: XAttention (https://arxiv.org/abs/2503.16428), runs of tokens paired along their antidiagonals.
- `lowbit`: SALE (https://arxiv.org/abs/2505.24179), all tokens with queries and keys in 4 bits.
- `channels`: DoubleSparsity (https://arxiv.org/abs/2408.07092), all tokens with the few channels that weigh most in
  their scores, found per head from the call itself where the authors calibrate them.
- `searched`: AdaSpa (https://arxiv.org/abs/2502.21079), the exact mass of every block. It costs as much as the scores
  of dense attention and pays through `reuse`; from the second search on the first one's log-sum-exp saves a pass.

As in AdaSpa every row keeps equally many blocks, so no part of the picture starves, and a row always keeps its own
block. `top_p` > 0 lets a row stop earlier, once its blocks hold that share of the mass (XAttention, ZipVL
https://arxiv.org/abs/2410.08584). `reuse` = n makes a choice serve n steps (AdaSpa, TidalDecode
https://arxiv.org/abs/2410.05076).
"""

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.kernels.scores import antidiagonal_scores, block_mass, lowbit_scores, pooled_scores
from dit_accel.patterns.base import BlockSpace, Family, Memory, Option, keep_best

# score(space, query, key, scale, memory, **options) -> mass [batch, heads, rows, cols] of the video blocks
Score = Callable[..., Tensor]


def _family(name: str, score: Score, **options: Option) -> Family:
    def choose(
        space: BlockSpace,
        kept: int,
        query: Tensor,
        key: Tensor,
        scale: float,
        *,
        top_p: float,
        memory: Memory,
        **given: Option,
    ) -> Tensor:
        if not 0.0 <= top_p <= 1.0:
            raise ValueError(
                f"option 'top_p' of family {name!r}: expected a number from 0 to 1, got {top_p!r}"
            )
        tokens = space.chosen_tokens
        mass = score(space, query[:, :tokens], key[:, :tokens], scale, memory, **given)
        return _best(mass, kept, top_p)

    defaults = {"order": "tile:4x4x4", "top_p": 0.0, "reuse": 1, **options}
    return Family(name, choose, static=False, options=MappingProxyType(defaults))


def _best(mass: Tensor, kept: int, top_p: float) -> Tensor:
    mass.diagonal(dim1=-2, dim2=-1).add_(2.0)
    if not top_p:
        return keep_best(mass, kept)
    best, blocks = mass.topk(kept, dim=-1)
    best[..., 0] -= 2.0
    before = best.cumsum(-1) - best
    before[..., 0] = -1.0
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, blocks, before < top_p)


def _divisor(name: str, option: str, value: int, block: int) -> None:
    if value < 1 or block % value:
        raise ValueError(
            f"option {option!r} of family {name!r}: expected a divisor of the block, {block}, got {value}"
        )


def _pooled(
    space: BlockSpace, query: Tensor, key: Tensor, scale: float, memory: Memory, *, parts: int
) -> Tensor:
    _divisor("pooled", "parts", parts, space.block)
    return pooled_scores(query, key, block_q=space.block, block_k=space.block, parts=parts, scale=scale)


def _antidiagonal(
    space: BlockSpace, query: Tensor, key: Tensor, scale: float, memory: Memory, *, stride: int
) -> Tensor:
    _divisor("antidiagonal", "stride", stride, space.block)
    return antidiagonal_scores(query, key, block=space.block, stride=stride, scale=scale)


def _lowbit(
    space: BlockSpace, query: Tensor, key: Tensor, scale: float, memory: Memory, *, bits: int
) -> Tensor:
    return lowbit_scores(query, key, block_q=space.block, block_k=space.block, bits=bits, scale=scale)


def _channels(
    space: BlockSpace, query: Tensor, key: Tensor, scale: float, memory: Memory, *, channels: int
) -> Tensor:
    if channels < 1:
        raise ValueError(f"option 'channels' of family 'channels': expected at least 1, got {channels}")
    # What a channel adds to a score, in size; a share that all keys have adds nothing that a softmax sees.
    varying = (key - key.mean(1, keepdim=True)).abs().mean(1, dtype=torch.float32)
    weight = query.abs().mean(1, dtype=torch.float32) * varying
    best = weight.topk(min(channels, query.shape[3]), dim=-1).indices[:, None]
    query, key = (x.gather(3, best.expand(*x.shape[:3], -1)) for x in (query, key))
    return block_mass(query, key, block_q=space.block, block_k=space.block, scale=scale)[0]


def _searched(space: BlockSpace, query: Tensor, key: Tensor, scale: float, memory: Memory) -> Tensor:
    before = memory.get("lse")
    mass, memory["lse"] = block_mass(
        query, key, block_q=space.block, block_k=space.block, lse=before, scale=scale
    )
    return mass


POOLED = _family("pooled", _pooled, parts=4)
ANTIDIAGONAL = _family("antidiagonal", _antidiagonal, stride=8)
LOWBIT = _family("lowbit", _lowbit, bits=4)
CHANNELS = _family("channels", _channels, channels=16)
SEARCHED = _family("searched", _searched)
