"""Pooled: blocks whose mean queries and mean keys agree.

MInference (https://arxiv.org/abs/2407.02490) and DraftAttention (https://arxiv.org/abs/2505.14708) score a pair of
blocks by q̄·k̄/√d and keep the best of each row. The mean of a whole block blurs what its tokens read, so here each
block is pooled in `parts` runs: the logit between a run of queries and one of keys is q̄·k̄/√d + log(tokens of the
run of keys), a softmax over all runs of keys gives masses, and those of a block add up. On synthetic smooth and
moving patterns, in blocks of 64, four parts recover about half of the mass that whole-block means lose against the
best possible choice.

`guard` > 0 is that of SpargeAttn (https://arxiv.org/abs/2502.18137): where the mean cosine between the tokens of a
block is lower, its mean says little; then all queries read that block of keys, or that block of queries reads all
keys. Such blocks come on top of the density. `coarse` = n > 1 chooses in two steps (HiP,
https://arxiv.org/abs/2406.09827; BiFormer, https://arxiv.org/abs/2303.08810): first squares of n × n blocks by their
means, twice as many as needed, then blocks within these. Other options: see `scored.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.scores import pooled_scores, step_logits
from dit_accel.patterns.base import BlockSpace, Memory, check_divisor
from dit_accel.patterns.scored import scored_family


def _pooled(
    space: BlockSpace,
    kept: int,
    query: Tensor,
    key: Tensor,
    scale: float,
    memory: Memory,
    *,
    parts: int,
    coarse: int,
) -> Tensor:
    check_divisor("pooled", "parts", parts, space.block)
    if coarse < 0:
        raise ValueError(f"option 'coarse' of family 'pooled': expected at least 0, got {coarse}")
    if coarse > 1:
        return _coarse_then_fine(space, kept, query, key, scale, parts, coarse)
    return pooled_scores(query, key, block_q=space.block, block_k=space.block, parts=parts, scale=scale)


def _coarse_then_fine(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, parts: int, coarse: int
) -> Tensor:
    """Mass like `pooled_scores` over the blocks in the best squares of `coarse` × `coarse` blocks, -1 in others."""
    side, blocks = coarse * space.block, space.video_blocks
    squares = pooled_scores(query, key, block_q=side, block_k=side, scale=scale)
    squares.diagonal(dim1=-2, dim2=-1).add_(2.0)
    rows, looked_at = squares_looked_at(space, kept, coarse)
    best = squares.topk(looked_at, dim=-1).indices

    run = space.block // parts
    sizes = space.run_sizes(run)
    missing = rows * coarse * parts - len(sizes)
    sizes = F.pad(sizes, (0, missing))
    q, k = (space.means(x.transpose(1, 2).float(), 2, run) for x in (query, key))
    q, k = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (rows, -1)) for x in (q, k))
    weights, counts = sizes.view(rows, coarse, parts), sizes.view(rows, -1).log()
    shares = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    batch, heads, _, runs, dim = k.shape
    mass = query.new_full((batch, heads, rows, coarse, rows * coarse), -1.0, dtype=torch.float32)
    step = max(1, step_logits(k.device) // (batch * heads * looked_at * runs * max(runs, dim)))
    for first in range(0, rows, step):
        near = best[:, :, first : first + step]
        taken = near.flatten(2)[..., None, None].expand(-1, -1, -1, runs, dim)
        keys = k.gather(2, taken).view(*near.shape[:3], looked_at * runs, dim)
        logits = q[:, :, first : first + step] @ keys.transpose(3, 4) * scale
        p = (logits + counts[near].flatten(3)[:, :, :, None]).softmax(-1)
        p = p.view(*near.shape[:3], coarse, parts, looked_at * coarse, parts).sum(-1)
        p = (p * shares[first : first + step, :, :, None]).sum(-2)
        columns = near[..., None] * coarse + torch.arange(coarse, device=near.device)
        columns = columns.flatten(3)[:, :, :, None].expand_as(p)
        mass[:, :, first : first + step].scatter_(4, columns, p)
    return mass.flatten(2, 3)[:, :, :blocks, :blocks].contiguous()


def squares_looked_at(space: BlockSpace, kept: int, coarse: int) -> tuple[int, int]:
    """Squares of `coarse` × `coarse` blocks in a row of them, and how many of them are looked into."""
    squares = -(-space.video_blocks // coarse)
    return squares, min(squares, -(-2 * kept // coarse) + 1)


POOLED = scored_family("pooled", _pooled, ("coarse",), parts=4, guard=0.0, coarse=0)
