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
  of dense attention and pays through `reuse`; from the second search on the first one's log-sum-exp saves a pass, and
  the blocks of a row are compared by their shares of its mass.
  `easy` = r > 0 is its budget by head: of the heads that run together, those that hold more than r of the mass, at most
  half of all, leave half of their blocks to as many that hold least.

`pooled` has two more options. `guard` > 0 is that of SpargeAttn (https://arxiv.org/abs/2502.18137): where the mean
cosine between the tokens of a block is lower, its mean says little; then all queries read that block of keys, or that
block of queries reads all keys. Such blocks come on top of the density. `coarse` = n > 1 chooses in two steps (HiP,
https://arxiv.org/abs/2406.09827; BiFormer, https://arxiv.org/abs/2303.08810): first squares of n × n blocks by their
means, twice as many as needed, then blocks within these.

As in AdaSpa every row keeps equally many blocks, so no part of the picture starves, and a row always keeps its own
block. With `budget` = "map" the rows of a head compete instead, for the best of its whole map (DraftAttention).
`top_p` > 0 lets a row stop earlier, once its blocks hold that share of the mass (XAttention, ZipVL
https://arxiv.org/abs/2410.08584). `segment` > 0 sorts the keys first, see `sorted_keys.py`. `reuse` = n makes a
choice serve n steps (AdaSpa), `layers` = n as many layers (TidalDecode, https://arxiv.org/abs/2410.05076): those from
a multiple of n on, as far as they give the same heads to the family, at the same densities. `branches` = "shared"
makes the first guidance branch of a step choose for the others too. Their latents are the same, so they want nearly
the same blocks; and what both leave out in the same places falls out of the difference that guidance magnifies.
"""

from collections.abc import Callable
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import BlockIndex
from dit_accel.kernels.prepare import TINY
from dit_accel.kernels.scores import (
    antidiagonal_scores,
    block_mass,
    lowbit_scores,
    pooled_scores,
    step_logits,
)
from dit_accel.patterns.base import (
    SERVES,
    BlockSpace,
    Family,
    Memory,
    Option,
    check_divisor,
    check_share,
    ranked_lists,
)

# score(space, kept, query, key, scale, memory, **options) -> mass [batch, heads, rows, cols] of the video blocks
Score = Callable[..., Tensor]

# Values of the option `budget`: every row of a head keeps equally many blocks, or the best of the head's whole map.
_ROW, _MAP = _BUDGETS = "row", "map"


def _family(name: str, score: Score, unranked_by: tuple[str, ...] = (), **options: Option) -> Family:
    def choose(
        space: BlockSpace,
        kept: int | tuple[int, ...],
        query: Tensor,
        key: Tensor,
        scale: float,
        *,
        top_p: float,
        budget: str,
        memory: Memory,
        **given: Option,
    ) -> BlockIndex:
        check_share(name, "top_p", top_p)
        if budget not in _BUDGETS:
            raise ValueError(
                f"option 'budget' of family {name!r}: expected {' or '.join(map(repr, _BUDGETS))}, got {budget!r}"
            )
        whole_map = budget == _MAP
        query, key = (x[:, : space.chosen_tokens] for x in (query, key))
        guard = float(given.pop("guard", 0.0))
        check_share(name, "guard", guard)
        easy = float(given.pop("easy", 0.0))
        if not 0.0 <= easy <= 1.0 or (easy and top_p):
            raise ValueError(
                f"option 'easy' of family {name!r}: expected a number from 0 to 1, and 0 beside 'top_p', got {easy!r}"
            )
        if whole_map and (easy or top_p):
            other = "easy" if easy else "top_p"
            raise ValueError(
                f"option 'budget' of family {name!r}: expected {_ROW!r} beside {other!r}, which has its own budgets, "
                f"got {budget!r}"
            )
        most = kept if isinstance(kept, int) else max(kept)
        mass = score(space, most, query, key, scale, memory, **given)
        if easy:
            return _by_head(space, mass, most, easy)
        if not guard:
            return _best(space, mass, kept, top_p, whole_map=whole_map)
        trusted_q, trusted_k = (_self_similarity(space, x) >= guard for x in (query, key))
        mass.clamp_(min=0).mul_(trusted_k[:, :, None])  # squares that were not looked into have a mass of -1
        mass /= mass.sum(-1, keepdim=True).clamp(min=TINY)
        untrusted = ~trusted_k[:, :, None] | ~trusted_q[..., None]
        untrusted.diagonal(dim1=-2, dim2=-1).fill_(False)  # a row keeps its own block in any case
        return _best(space, mass, kept, top_p, untrusted, whole_map)

    defaults = {"order": "tile:4x4x4", "top_p": 0.0, "segment": 0, "budget": _ROW, **SERVES, **options}
    return Family(
        name,
        choose,
        static=False,
        options=MappingProxyType(defaults),
        ranked=True,
        unranked_by=unranked_by,
    )


def _best(
    space: BlockSpace,
    mass: Tensor,
    kept: int | tuple[int, ...],
    top_p: float,
    extra: Tensor | None = None,
    whole_map: bool = False,
) -> BlockIndex:
    """The best `kept` of each row at most, or as many of the whole map; own blocks first, and those that are extra."""
    ranking = mass.clone() if top_p else mass
    ranking.diagonal(dim1=-2, dim2=-1).add_(2.0)
    masses = mass if top_p else None
    return ranked_lists(space, ranking, kept, masses=masses, top_p=top_p, extra=extra, whole_map=whole_map)


def _by_head(space: BlockSpace, mass: Tensor, kept: int, easy: float) -> BlockIndex:
    """The best `kept` of each row on average over the heads; easy heads leave half of theirs to hard ones."""
    spare = min(kept // 2, mass.shape[-1] - kept)
    mass.diagonal(dim1=-2, dim2=-1).add_(2.0)
    recall = (mass.topk(kept, dim=-1).values.sum(-1) - 2.0).mean(-1)
    rank, heads = recall.argsort(-1).argsort(-1), recall.shape[-1]
    pairs = (recall > easy).sum(-1, keepdim=True).clamp(max=heads // 2)
    budget = kept + spare * ((rank < pairs).int() - (rank >= heads - pairs).int())
    return ranked_lists(space, mass, kept + spare, budget=budget)


def _self_similarity(space: BlockSpace, tokens: Tensor) -> Tensor:
    """Mean cosine over all pairs of tokens of each block, float32 `[batch, heads, blocks]`."""
    # It is the squared length of the mean of the tokens' directions.
    means = space.means(F.normalize(tokens.float(), dim=-1), 1, space.block)
    return means.square().sum(-1).transpose(1, 2)


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


def _antidiagonal(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, memory: Memory, *, stride: int
) -> Tensor:
    check_divisor("antidiagonal", "stride", stride, space.block)
    return antidiagonal_scores(query, key, block=space.block, stride=stride, scale=scale)


def _lowbit(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, memory: Memory, *, bits: int
) -> Tensor:
    return lowbit_scores(query, key, block_q=space.block, block_k=space.block, bits=bits, scale=scale)


def _channels(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, memory: Memory, *, channels: int
) -> Tensor:
    if channels < 1:
        raise ValueError(f"option 'channels' of family 'channels': expected at least 1, got {channels}")
    # What a channel adds to a score, in size; a share that all keys have adds nothing that a softmax sees.
    varying = (key - key.mean(1, keepdim=True)).abs().mean(1, dtype=torch.float32)
    weight = query.abs().mean(1, dtype=torch.float32) * varying
    best = weight.topk(min(channels, query.shape[3]), dim=-1).indices[:, None]
    query, key = (x.gather(3, best.expand(*x.shape[:3], -1)) for x in (query, key))
    return block_mass(query, key, block_q=space.block, block_k=space.block, scale=scale)[0]


def _searched(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, memory: Memory
) -> Tensor:
    before = memory.get("lse")
    mass, memory["lse"] = block_mass(
        query, key, block_q=space.block, block_k=space.block, lse=before, scale=scale
    )
    if before is not None:
        # By the log-sum-exp of another step a row does not add up to 1.
        mass /= mass.sum(-1, keepdim=True).clamp(min=TINY)
    return mass


POOLED = _family("pooled", _pooled, ("coarse",), parts=4, guard=0.0, coarse=0)
ANTIDIAGONAL = _family("antidiagonal", _antidiagonal, stride=8)
LOWBIT = _family("lowbit", _lowbit, bits=4)
CHANNELS = _family("channels", _channels, channels=16)
SEARCHED = _family("searched", _searched, ("easy",), easy=0.0)
