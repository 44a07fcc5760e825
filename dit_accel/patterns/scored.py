"""What the families share that score every pair of blocks from the queries and keys of a call.

They are `pooled`, `antidiagonal`, `lowbit`, `channels` and `searched`; each tells what mass it believes a query
block to have in a key block.

As in AdaSpa (https://arxiv.org/abs/2502.21079) every row keeps equally many blocks, so no part of the picture
starves, and a row always keeps its own block. With `budget` = "map" the rows of a head compete instead, for the best
of its whole map (DraftAttention, https://arxiv.org/abs/2505.14708). `top_p` > 0 lets a row stop earlier, once its
blocks hold that share of the mass (XAttention, https://arxiv.org/abs/2503.16428; ZipVL,
https://arxiv.org/abs/2410.08584). `segment` > 0 sorts the keys first, see `sorted_keys.py`. `reuse` = n makes a
choice serve n steps (AdaSpa), `layers` = n as many layers (TidalDecode, https://arxiv.org/abs/2410.05076): those
from a multiple of n on, as far as they give the same heads to the family, at the same densities. `branches` =
"shared" makes the first guidance branch of a step choose for the others too. Their latents are the same, so they
want nearly the same blocks; and what both leave out in the same places falls out of the difference that guidance
magnifies.
"""

from collections.abc import Callable
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import BlockIndex
from dit_accel.kernels.prepare import TINY
from dit_accel.patterns.base import (
    SERVES,
    BlockSpace,
    Family,
    Memory,
    Option,
    check_share,
    ranked_lists,
)

# score(space, kept, query, key, scale, memory, **options) -> mass [batch, heads, rows, cols] of the video blocks
Score = Callable[..., Tensor]

# Values of the option `budget`: every row of a head keeps equally many blocks, or the best of the head's whole map.
_ROW, _MAP = _BUDGETS = "row", "map"


def scored_family(name: str, score: Score, unranked_by: tuple[str, ...] = (), **options: Option) -> Family:
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
