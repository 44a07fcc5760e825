"""What the candidates of one head keep and lose of exact attention at its sampled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.low_rank import Features
from dit_accel.kernels.prepare import E4M3_MAX, TINY, key_group, quantise

EVERY = 8  # rows from one whose error is kept to the next
SUMS = ("mass", "error", "effect", "norm", "rows")
# Key blocks of varying length are cut into tiles of this many tokens, the last one of a block partly empty.
_VARYING_TILE = 16
_TINY = 1e-30
_MOST = 80.0  # a weight's logarithm in float32


@dataclass(frozen=True, eq=False)
class Head:
    """The sampled rows of one head `[rows, dim]`, its keys and values tile by tile `[tiles * tile, dim]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor | None
    real: Tensor | None


@dataclass(frozen=True, eq=False)
class Tiles:
    """Key tokens in tiles of equal length.

    tokens: int64 `[tiles * length]`, model position of each; any at places that hold none.
    hidden: bool like tokens, places that hold none.
    block: int64 `[tiles]`, key block of each tile; None where they are the blocks.
    blocks: number of key blocks.
    """

    tokens: Tensor
    hidden: Tensor
    block: Tensor | None
    blocks: int


def key_tiles(places: Tensor, starts: Tensor | None, block: int, blocks: int) -> Tiles:
    """Tiles of one head, whose key tokens stand at `places` and whose `blocks` begin at `starts`, if they vary."""
    device, seq = places.device, len(places)
    if starts is None:
        slots = torch.arange(blocks * block, device=device)
        return Tiles(places[slots.clamp(max=seq - 1)], slots >= seq, None, blocks)
    starts = starts.long()
    tiles = (starts.diff() + _VARYING_TILE - 1) // _VARYING_TILE
    of = torch.arange(blocks, device=device).repeat_interleave(tiles)
    within = torch.arange(len(of), device=device) - (tiles.cumsum(0) - tiles)[of]
    slots = (starts[of] + within * _VARYING_TILE)[:, None] + torch.arange(_VARYING_TILE, device=device)
    hidden = slots >= starts[of + 1][:, None]
    return Tiles(places[slots.clamp(max=seq - 1).flatten()], hidden.flatten(), of, blocks)


def profile_head(
    head: Head,
    tiles: Tiles,
    hidden: Tensor,
    lengths: Sequence[int],
    kept: Tensor,
    keeps: Tensor,
    remainder: Tensor,
    ways: Sequence[tuple[str, tuple[int, int] | None]],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The sums `SUMS` of a head in one arrangement, `[5, candidates]`, and the errors of every eighth row of each run.

    lengths: rows of each run of rows that read the same blocks; kept: bool `[patterns, runs, blocks]`; keeps: int64
    `[candidates]`, the pattern of each; remainder: float `[candidates]`, what stands for the rest weighs;
    ways: of the candidates, their precision, and their random features, see `Candidate.features`.
    """
    candidates, everything = len(keeps), len(kept)
    dim = head.query.shape[1]
    exactly = ("native", None)
    members = {way: [m for m, own in enumerate(ways) if own == way] for way in (exactly, *ways)}
    operands = {way: _operands(head, tiles, hidden, *way, scale) for way in members}
    # One more pattern that keeps everything gives the dense output from the same sums.
    selected = F.pad(kept.to(torch.float32), (0, 0, 0, 0, 0, 1), value=1.0)
    left_out = 1 - selected
    if tiles.block is not None:
        selected = selected[..., tiles.block]
    sums = torch.zeros(len(SUMS), candidates, dtype=torch.float64, device=head.query.device)

    # Run by run: the scores stay in a CPU's cache.
    some_errors = []
    stop = 0
    for number, length in enumerate(lengths):
        start, stop = stop, stop + length
        real = None if head.real is None else head.real[start:stop, None]
        error = torch.empty(candidates, length, dim, device=head.query.device)
        for way, of_way in members.items():
            parts, mass, rest, rest_mass = operands[way].attend(
                slice(start, stop), selected[:, number], left_out[:, number], real
            )
            if way == exactly:
                # Of exact weights, whatever the precision a candidate runs in.
                exact = mass
                dense = parts[everything] / mass[everything].clamp(min=_TINY)[:, None]
            own, weight = keeps[of_way], remainder[of_way][:, None]
            total = (mass[own] + weight * rest_mass[own]).clamp(min=_TINY)
            error[of_way] = (parts[own] + weight[..., None] * rest[own]) / total[..., None] - dense
        sums[0] += (exact[keeps] / exact[everything].clamp(min=_TINY)).sum(-1)
        sums[1] += error.square().sum((1, 2))
        some_errors.append(error[:, ::EVERY].to("cpu", torch.bfloat16))
        if head.gradient is not None:
            sums[2] += (error * head.gradient[start:stop]).sum(-1).square_().sum(-1)
        sums[3] += dense.square().sum()
        sums[4] += length if real is None else real.sum()
    return sums.cpu(), torch.cat(some_errors, dim=1)


@dataclass(frozen=True, eq=False)
class _Operands:
    """One head in one precision, as float32 numbers that the precision has.

    query `[rows, dim]`, with the softmax scale in it, and `plain_query` as it was; key `[dim, tiles * tile]`; value
    `[tiles, tile, dim]`; of every key block the mean key and value `[blocks, dim]` and the number of its keys
    `[blocks]`, or random features.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mean_key: Tensor
    mean_value: Tensor
    counts: Tensor
    hidden: Tensor | None
    e4m3: bool
    plain_query: Tensor
    features: Features | None

    def attend(
        self, rows: slice, selected: Tensor, left_out: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of weighted values `[patterns, rows, dim]` and of weights `[patterns, rows]`, of keys and of what stands
        for the others, their means or random features.

        selected: `[patterns, tiles]`; left_out: `[patterns, blocks]`; real: bool `[rows, 1]`, rows of padding count
        nothing. Weights are relative to the row's largest of a key.
        """
        query = self.query[rows]
        count, _, dim = self.value.shape
        scores = query @ self.key
        if self.hidden is not None:
            scores.masked_fill_(self.hidden, -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        weights = self._rounded(scores.sub_(largest).exp_())
        if real is not None:
            weights *= real
        by_tile = weights.view(len(query), count, -1)
        # What each tile adds to the output: a pattern's output is one row of a small product.
        parts = torch.bmm(by_tile.transpose(0, 1), self.value)
        output = (selected @ parts.view(count, -1)).view(len(selected), -1, dim)
        mass = selected @ by_tile.sum(-1).T
        if self.features is not None:
            # Patterns stand for rows of blocks: each reads the same queries.
            wanted = self.plain_query[rows].expand(1, len(left_out), -1, -1)
            rest, logarithms = (x[0] for x in self.features.attend(wanted, left_out[None]))
            weight = (logarithms - largest[:, 0]).clamp(max=_MOST).exp()
            if real is not None:
                weight = weight * real[:, 0]
            return output, mass, rest * weight[..., None], weight
        means = (query @ self.mean_key.T - largest).exp_() * self.counts
        # A block's stand-in may weigh more than any single key.
        top = means.amax(-1, keepdim=True).clamp_(min=1)
        means = self._rounded(means / top) * top
        if real is not None:
            means *= real
        rest = torch.einsum("pb,rb,bd->prd", left_out, means, self.mean_value)
        return output, mass, rest, left_out @ means.T

    def _rounded(self, weights: Tensor) -> Tensor:
        return (weights * E4M3_MAX).to(torch.float8_e4m3fn).float() / E4M3_MAX if self.e4m3 else weights


def _operands(
    head: Head,
    tiles: Tiles,
    hidden: Tensor,
    precision: str,
    features: tuple[int, int] | None,
    scale: float,
) -> _Operands:
    """See `dit_accel.kernels.prepare` for what a precision does to its operands; random features are not rounded."""
    dim, count = head.query.shape[1], tiles.blocks if tiles.block is None else len(tiles.block)
    query, keys, values = head.query, head.key.float(), head.value.float()
    real = ~hidden
    of_keys = None
    if features is not None:
        rank, seed = features
        length = len(hidden) // count
        one = (x[None] for x in (keys, values, real))
        of_keys = Features.of_keys(*one, block=length, features=rank, seed=seed, scale=scale)
    if precision != "native":
        keys = keys - (keys * real[:, None]).sum(0) / real.sum().clamp(min=1)
    shown = [x.masked_fill(hidden[:, None], 0).view(count, -1, dim).sum(1) for x in (keys, values)]
    counts = _per_block(tiles, real.view(count, -1).sum(-1, dtype=torch.float32))
    mean_key, mean_value = (_per_block(tiles, x) / counts.clamp(min=1)[:, None] for x in shown)
    e4m3 = precision in ("int8_fp8", "fp8")
    if precision != "native":
        dtype = torch.float8_e4m3fn if precision == "fp8" else torch.int8
        group = key_group(len(hidden) // count) if tiles.block is None else 1
        query, mean_key = (_rounded(x[:, None], dtype)[:, 0] for x in (query, mean_key))
        keys = _rounded(keys.view(-1, group, dim), dtype).view(-1, dim)
    if e4m3:
        channel = (values.abs().amax(0) / E4M3_MAX).clamp(min=TINY)
        values, mean_value = (
            (x / channel).to(torch.float8_e4m3fn).float() * channel for x in (values, mean_value)
        )
    return _Operands(
        query * scale,
        keys.masked_fill(hidden[:, None], 0).T,
        values.masked_fill(hidden[:, None], 0).view(count, -1, dim),
        mean_key,
        mean_value,
        counts,
        hidden if hidden.any() else None,
        e4m3,
        head.query,
        of_keys,
    )


def _rounded(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """`[groups, tokens, dim]` in an 8-bit format with a scale per group, as float32."""
    numbers, scales = quantise(groups, dtype)
    return numbers.float() * scales[:, None, None]


def _per_block(tiles: Tiles, x: Tensor) -> Tensor:
    """Sums of `[tiles, ...]` over the tiles of each block."""
    if tiles.block is None:
        return x
    return x.new_zeros(tiles.blocks, *x.shape[1:]).index_add_(0, tiles.block, x)


def of_head(x: Tensor, b: int, h: int) -> Tensor:
    """One head of `[1 or heads, ...]` or of `[1 or batch, 1 or heads, ...]`."""
    return x[h % x.shape[0]] if x.ndim == 2 else x[b % x.shape[0], h % x.shape[1]]
