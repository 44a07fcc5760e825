"""What a choice of a pattern family costs: multiply-adds of its matrix products, and bytes moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel.grid import TokenGrid
from dit_accel.kernels.partition import products
from dit_accel.patterns.base import BlockSpace, Option
from dit_accel.patterns.clustered import cluster_numbers
from dit_accel.patterns.pooled import squares_looked_at
from dit_accel.patterns.profiled import order_names
from dit_accel.patterns.select import family_named
from dit_accel.patterns.sorted_keys import SAMPLES

_FLOAT = 4


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of matrix products, and bytes of the queries, keys and values read and of the results written."""

    multiply_adds: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.multiply_adds + other.multiply_adds, self.bytes + other.bytes)


def cost(
    name: str,
    grid: TokenGrid,
    heads: int,
    dim: int,
    block: int = 64,
    *,
    density: float = 0.25,
    batch: int = 1,
    item_bytes: int = 2,
    later: bool = False,
    **options: Option,
) -> Cost:
    """Return what one choice of a family costs, over all heads and batch entries.

    Static families choose once per grid and cost nothing at run time. With the options `reuse` and `layers` a choice
    serves `reuse` steps times `layers` layers, with `branches` all guidance branches of a step, and its cost is that of
    one choice all the same.

    Args:
        name, grid, block, density, options: as in `select`.
        heads, dim, batch: shape of the queries `[batch, grid.total_tokens, heads, dim]`.
        item_bytes: size of their numbers.
        later: whether it is not the first choice of a generation: the centroids of `clustered`, the log-sum-exp of
            `searched` and the blocks of `balanced` are there then.

    Example:
        >>> cost("pooled", TokenGrid(1, 16, 16), heads=1, dim=64, parts=1).multiply_adds
        1024

    Raises:
        ValueError: an unknown family or option, or a density out of range.
    """
    family = family_named(name)
    chosen: dict[str, Any] = family.with_defaults(options)
    family.check_density(density)
    if family.static:
        return Cost(0, 0)
    order = str(chosen.pop("order", "frame"))
    space = BlockSpace(grid, order, block, torch.device("cpu"))
    if name not in ("clustered", "balanced", "hashed") and not space.video_blocks:
        return Cost(0, 0)
    call = _Call(space, space.kept(density), dim, item_bytes, later, chosen)
    one = _COSTS[name](call)
    if chosen.get("segment"):
        copied = 2 * call.tokens * dim * item_bytes
        one += call.sampled(SAMPLES) + Cost(0, copied)
    return Cost(batch * heads * one.multiply_adds, batch * heads * one.bytes)


@dataclass(frozen=True)
class _Call:
    """One head of one batch entry."""

    space: BlockSpace
    kept: int
    dim: int
    item_bytes: int
    later: bool
    options: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.space.chosen_tokens

    def reads(self, tokens: int) -> int:
        return tokens * self.dim * self.item_bytes

    @property
    def scores(self) -> int:
        """Bytes of a score for every pair of blocks."""
        return self.space.video_blocks**2 * _FLOAT

    def sampled(self, samples: int) -> Cost:
        """Rows against all keys, their weights kept."""
        pairs = min(samples, self.tokens) * self.tokens
        rows = min(samples, self.tokens)
        return Cost(pairs * self.dim, self.reads(rows + self.tokens) + pairs * _FLOAT)


def _stripes(call: _Call) -> Cost:
    return call.sampled(call.options["samples"]) + Cost(0, call.scores)


def _pooled(call: _Call) -> Cost:
    parts, coarse = call.options["parts"], call.options["coarse"]
    passes = 4 if call.options["guard"] else 2
    run = call.space.block // parts
    runs = -(-call.tokens // run)
    if coarse <= 1:
        return Cost(runs**2 * call.dim, call.reads(passes * call.tokens) + call.scores)
    squares, looked_at = squares_looked_at(call.space, call.kept, coarse)
    each = coarse * parts
    fetched = squares * looked_at * each * call.dim
    products = squares**2 * call.dim + fetched * each
    moved = call.reads((passes + 2) * call.tokens) + (squares**2 + fetched) * _FLOAT + call.scores
    return Cost(products, moved)


def _antidiagonal(call: _Call) -> Cost:
    stride = call.options["stride"]
    runs = -(-call.tokens // stride)
    return Cost(runs**2 * stride * call.dim, call.reads(2 * call.tokens) + call.scores)


def _lowbit(call: _Call) -> Cost:
    return Cost(call.tokens**2 * call.dim, call.reads(2 * call.tokens) + call.scores)


def _channels(call: _Call) -> Cost:
    channels = min(call.options["channels"], call.dim)
    copied = 2 * call.tokens * channels * call.item_bytes
    return Cost(call.tokens**2 * channels, call.reads(2 * call.tokens) + 2 * copied + call.scores)


def _searched(call: _Call) -> Cost:
    # The first search reads everything twice, the first time for the log-sum-exp.
    passes = 1 if call.later else 2
    moved = passes * call.reads(2 * call.tokens) + call.tokens * _FLOAT + call.scores
    return Cost(passes * call.tokens**2 * call.dim, moved)


def _clustered(call: _Call) -> Cost:
    tokens, options = call.space.grid.video_tokens, call.options
    query_clusters, key_clusters = cluster_numbers(tokens, options["query_clusters"], options["key_clusters"])
    iterations = 2 if call.later else options["iterations"]
    products = iterations * tokens * (query_clusters + key_clusters) + query_clusters * key_clusters
    # An iteration reads the tokens for the distances and again for the means.
    moved = call.reads(4 * iterations * tokens) + query_clusters * key_clusters * _FLOAT
    return Cost(products * call.dim, moved)


def _balanced(call: _Call) -> Cost:
    tokens, seq, options = call.space.grid.video_tokens, call.space.grid.total_tokens, call.options
    # Between means, for which queries and keys, text and all, are read, put in order and read again.
    runs, blocks = -(-seq // (call.space.block // options["parts"])), call.space.blocks
    chosen = Cost(runs**2 * call.dim, call.reads(3 * 2 * seq) + blocks**2 * _FLOAT)
    if call.later:
        return chosen
    divided = products(tokens, call.dim, block=call.space.block, axes=options["axes"])
    # Each side is read for its second moment and for its points, which are small beside it.
    return chosen + Cost(divided, call.reads(2 * 2 * tokens))


def _until_share(call: _Call) -> Cost:
    """Means of all tokens in their order, for `top_p`."""
    if not call.options["top_p"]:
        return Cost(0, 0)
    copied = call.reads(2 * 2 * call.space.grid.total_tokens)
    return Cost(call.space.video_blocks**2 * call.dim, copied + call.reads(2 * call.tokens) + call.scores)


def _hashed(call: _Call) -> Cost:
    tokens, planes = call.space.grid.video_tokens, call.options["planes"]
    # Once for the mean that is taken off, once for the sides of the planes; a hash is an int64.
    sort = Cost(2 * tokens * call.dim * planes, call.reads(4 * tokens) + 2 * tokens * 8)
    return sort + _until_share(call)


def _profiled(call: _Call) -> Cost:
    tried = len(order_names(call.options["orders"]))
    if tried == 1:
        return _until_share(call)
    rows, seq = min(call.options["samples"], call.tokens), call.space.grid.total_tokens
    # Scores, the full output and one output for each order.
    products = rows * seq * call.dim * (2 + tried)
    compared = Cost(products, call.reads(rows + 2 * seq) + (1 + tried) * rows * seq * _FLOAT)
    return compared + _until_share(call)


_COSTS: dict[str, Callable[[_Call], Cost]] = {
    "stripes": _stripes,
    "pooled": _pooled,
    "antidiagonal": _antidiagonal,
    "lowbit": _lowbit,
    "channels": _channels,
    "searched": _searched,
    "clustered": _clustered,
    "balanced": _balanced,
    "hashed": _hashed,
    "profiled": _profiled,
}
