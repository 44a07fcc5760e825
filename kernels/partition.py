"""Equal blocks of queries that attend alike and of keys that are attended alike: principal axis trees in the metric of
attention.

Two keys are alike where every query scores them alike. The mean square of the difference of their logits over all
queries, `(k − k′)ᵀ C (k − k′)` with `C = mean q qᵀ`, is a squared distance between keys; so is the same with the
covariance of the keys between queries, since a shift of a query's logits that all keys share does not change its
softmax. With `C = L Lᵀ` it is the Euclidean distance of `Lᵀk`, and few axes of these points hold most of it.

The points are halved again and again, at a multiple of the block, until every part is a block: along the axis on which
a part spreads most, turned twice towards the difference of its two halves' means (the update of 2-means). Unlike those
of k-means the blocks are equal, so that attention over them wants no kernel of its own, and no cluster is so large that
its mean says nothing.

The tree is the principal axis tree of McNames (IEEE TPAMI 23(9), 2001); to build it in the metric of the other side's
tokens is ours.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers of queries and keys in float32 at a time, 4 bytes each.
CHUNK_NUMBERS = 1 << 27
_ROUNDS = 3  # of the orthogonal iteration
_TURNS = 2


@torch.no_grad()
def partition(query: Tensor, key: Tensor, *, block: int, axes: int = 8) -> tuple[Tensor, Tensor]:
    """Order the tokens of every (batch, head) so that each block of an order holds tokens that are alike.

    Nothing waits for the device, and equal inputs give the same orders in every run on a device.

    Args:
        query: `[batch, seq_q, heads, dim]`, any floating dtype and strides, finite.
        key: `[batch, seq_k, heads, dim]`.
        block: tokens per block; the last block may be short.
        axes: dimensions of the space that is halved, at most dim are used.

    Returns:
        int64 `[batch, heads, seq_q]` and `[batch, heads, seq_k]`, positions of the tokens, block by block.

    Raises:
        ValueError: shapes that do not fit together, or a block or axes below 1.

    Example:
        >>> query, key = torch.randn(1, 300, 2, 64), torch.randn(1, 517, 2, 64)
        >>> [tuple(order.shape) for order in partition(query, key, block=64)]
        [(1, 2, 300), (1, 2, 517)]
    """
    if query.ndim != 4 or 0 in query.shape:
        raise ValueError(
            f"query: expected [batch, seq, heads, dim], each at least 1, got {tuple(query.shape)}"
        )
    batch, _, heads, dim = query.shape
    if key.ndim != 4 or (key.shape[0], *key.shape[2:]) != (batch, heads, dim) or not key.shape[1]:
        raise ValueError(
            f"key: expected [{batch}, any, {heads}, {dim}] to go with query, got {tuple(key.shape)}"
        )
    for name, number in (("block", block), ("axes", axes)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number!r}")
    with torch.autocast(query.device.type, enabled=False):
        points = _points(query, key, min(axes, dim))
        # Of one length they are halved together.
        together = [torch.cat(points)] if query.shape[1] == key.shape[1] else list(points)
        orders = [order.unflatten(0, (-1, batch, heads)) for order in (_halved(x, block) for x in together)]
        first, second = orders[0].unbind() if len(orders) == 1 else (order[0] for order in orders)
        return first, second


def products(seq: int, dim: int, *, block: int, axes: int) -> int:
    """Multiply-adds of the matrix products in `partition` of one head with `seq` queries and as many keys."""
    axes = min(axes, dim)
    small = 2 * dim**3 + (_ROUNDS + 1) * dim**2 * axes + _ROUNDS * dim * axes**2
    # In a turn a part's points and its mean meet an axis, and the points again; once more for their places along it.
    levels = _levels(seq, block, torch.device("cpu"))
    halved = sum((2 * _TURNS + 1) * level.places.numel() + _TURNS * len(level.places) for level in levels)
    return 2 * (seq * dim**2 + small + seq * dim * axes + halved * axes)


def _points(query: Tensor, key: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Queries and keys on the main axes of their spread, each in the metric of the other: float32 `[n, seq, axes]`.

    Some heads at a time, since all of a long video would be gigabytes in float32.
    """
    step = max(1, CHUNK_NUMBERS // (query[:, :, 0].numel() + key[:, :, 0].numel()))
    parts = [_points_of(q, k, axes) for q, k in zip(query.split(step, 2), key.split(step, 2), strict=True)]
    first, second = (torch.cat(part, 1).flatten(0, 1) for part in zip(*parts, strict=True))
    return first, second


def _points_of(query: Tensor, key: Tensor, axes: int) -> list[Tensor]:
    """Both sides of some heads, float32 `[batch, heads, seq, axes]`."""
    batch = len(query)
    (query, mean), (key, _) = _centred(query), _centred(key)
    # Matrices of dim × dim: in float64 the powers of the iteration keep their small axes.
    queries, keys = ((x.mT @ x).double() / x.shape[1] for x in (query, key))
    mean = mean.double()
    seen = queries + mean.mT * mean
    points = query @ _axes(queries, keys, axes), key @ _axes(keys, seen, axes)
    return [x.unflatten(0, (batch, -1)) for x in points]


def _centred(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`[batch, seq, heads, dim]` less its mean, float32 `[n, seq, dim]`, and the mean `[n, 1, dim]`."""
    tokens = tokens.transpose(1, 2).flatten(0, 1).float()
    mean = tokens.mean(1, keepdim=True)
    return tokens - mean, mean


def _axes(spread: Tensor, metric: Tensor, axes: int) -> Tensor:
    """`L` times the main axes of `Lᵀ spread L`, where `metric = L Lᵀ`: float32 `[n, dim, axes]`."""
    root = _root(metric)
    inside = root.mT @ spread @ root
    # Orthogonal iteration from axes of a fixed draw.
    found = _draw(inside.shape[-1], axes, spread.device).expand(len(inside), -1, -1)
    for _ in range(_ROUNDS):
        grown = inside @ found
        # Q of a QR decomposition, by Cholesky.
        found = torch.linalg.solve_triangular(_root(grown.mT @ grown).mT, grown, upper=True, left=False)
    return (root @ found).float()


def _root(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a matrix that may be singular, float64 `[n, dim, dim]`."""
    size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # Without a look at whether it worked, for which the host would wait: the diagonal makes it work.
    return torch.linalg.cholesky_ex(matrix + (1e-9 * size + 1e-30) * identity).L


# A copy to the device would have the host wait.
@functools.lru_cache(maxsize=32)
def _draw(rows: int, columns: int, device: torch.device) -> Tensor:
    """float64 `[rows, columns]` of a normal distribution, the same in every run."""
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randn(rows, columns, dtype=torch.float64, generator=generator, device="cpu")
        return drawn.to(device)


def _halved(points: Tensor, block: int) -> Tensor:
    """Order `[n, seq]` of points `[n, seq, axes]`."""
    count, seq, axes = points.shape
    order = torch.arange(seq, device=points.device).expand(count, seq)
    own = torch.arange(count, device=points.device)[:, None] * seq
    numbers = torch.arange(axes, device=points.device)[:, None]
    for level in _levels(seq, block, points.device):
        parts, length = level.places.shape
        at = order.index_select(1, level.places.flatten())
        here = points.flatten(0, 1).index_select(0, (at + own).flatten()).view(count, parts, length, axes)
        hidden = level.hidden  # of no part where all are equally long
        if hidden is not None:
            here.masked_fill_(hidden, 0)
        mean = here.sum(2, keepdim=True) / level.sizes
        spread = here.square().sum(2) - mean[:, :, 0].square() * level.sizes[:, 0]
        axis = (numbers == spread.argmax(-1)[..., None, None]).to(here.dtype)
        for _ in range(_TURNS):
            above = (here @ axis > mean @ axis).to(here.dtype)
            if hidden is not None:
                above.masked_fill_(hidden, 0)
            # The sum of one half about the mean points away from the other half's.
            axis = here.mT @ above - mean.mT * above.sum(2, keepdim=True)
        along = here @ axis
        if hidden is not None:
            along.masked_fill_(hidden, torch.inf)
        moved = at.view(count, parts, length).gather(2, along[..., 0].argsort(dim=-1, stable=True)).flatten(1)
        if level.filled is not None:
            moved = moved.index_select(1, level.filled)
        order = order.index_copy(1, level.real, moved)
    return order


@dataclass(frozen=True, eq=False)
class _Level:
    """The parts of an order that are halved at once, beside each other and filled up to the longest.

    Attributes:
        places: int64 `[parts, longest]`.
        sizes: float32 `[parts, 1, 1]`, places of each part.
        real: int64, the places within parts, part by part.
        hidden: bool `[parts, longest, 1]`, those behind a part's end; None if there are none.
        filled: int64, which of all are not hidden; None if all.
    """

    places: Tensor
    sizes: Tensor
    real: Tensor
    hidden: Tensor | None
    filled: Tensor | None


@functools.lru_cache(maxsize=32)
def _levels(seq: int, block: int, device: torch.device) -> tuple[_Level, ...]:
    parts, levels = [(0, seq)], []
    with torch.inference_mode(False), torch.device("cpu"):
        while long := [(start, stop) for start, stop in parts if stop - start > block]:
            sizes = torch.tensor([stop - start for start, stop in long])
            steps = torch.arange(int(sizes.max()))
            hidden = steps >= sizes[:, None]
            places = (torch.tensor([start for start, _ in long])[:, None] + steps).clamp(max=seq - 1)
            filled = (~hidden).flatten().nonzero()[:, 0]
            uneven = bool(hidden.any())
            levels.append(
                _Level(
                    places.to(device),
                    sizes[:, None, None].float().to(device),
                    places.flatten()[filled].to(device),
                    hidden[..., None].to(device) if uneven else None,
                    filled.to(device) if uneven else None,
                )
            )
            parts = [half for start, stop in parts for half in _halves(start, stop, block)]
    return tuple(levels)


def _halves(start: int, stop: int, block: int) -> list[tuple[int, int]]:
    """The part itself if it is a block; else two, of which the first has as many blocks as the second or one more."""
    if stop - start <= block:
        return [(start, stop)]
    blocks = -(-(stop - start) // block)
    middle = start + (blocks + 1) // 2 * block
    return [(start, middle), (middle, stop)]
