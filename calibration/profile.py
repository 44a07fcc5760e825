"""Exact attention on sampled query blocks, and what each candidate would keep and lose of it."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex
from dit_accel.kernels.prepare import E4M3_MAX, TINY, key_group, quantise
from dit_accel.patterns import FAMILIES, Selection, select
from dit_accel.plan import Candidate

_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class CallProfile:
    """Sums over the sampled query rows of one attention call, float64 on the CPU.

    Attributes:
        mass: `[heads, candidates]`, softmax mass on kept pairs.
        error: `[heads, candidates]`, squared norm of output - dense output.
        effect: `[heads, candidates]`, squared products of that error with the gradient of each row; 0 without one.
        norm: `[heads, candidates]`, squared norm of the dense output on the rows that candidate was tried on.
        rows: `[heads, candidates]`, number of those rows; candidates of one token order share their rows.
        density: `[candidates]`, kept pairs / all pairs of the whole call.
        errors: bfloat16 `[heads, patterns, places, dim]`, output - dense output at places that depend on the grid and
            the arguments alone, of the candidates in native precision whose means have no weight or that of their
            tokens; 0 where the token order comes from the data.
    """

    mass: Tensor
    error: Tensor
    effect: Tensor
    norm: Tensor
    rows: Tensor
    density: Tensor
    errors: Tensor


def profile_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    candidates: Sequence[Candidate],
    *,
    block: int = 64,
    query_blocks: int = 8,
    phase: float = 0.0,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    gradient: Tensor | None = None,
) -> CallProfile:
    """Profiles every candidate on one call's `[batch, seq, heads, dim]` tensors, computing in float32.

    Candidates of a lower precision are computed from operands rounded as the kernel rounds them, and their weights too,
    relative to the row's largest among all keys. Mass is that of the exact weights.

    Memory grows with seq * block, never with seq^2. Where query blocks vary in length, runs of `block` rows of the
    candidate's order are sampled all the same, and each row reads what its own block keeps.

    Args:
        query_blocks: how many query blocks are sampled, evenly over each candidate's token order.
        phase: in [0, 1), shifts the sampled blocks between calls.
        key_mask: bool `[batch, seq]`, True = a real token; padded rows are not counted.
        gradient: like query, of a number by the dense output of this call; gives `effect`.
    """
    batch, seq, heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    selections = _selections(query, key, value, grid, candidates, block, scale)
    sums = torch.zeros(len(_SUMS), heads, len(candidates), dtype=torch.float64)
    remainder = torch.tensor([c.remainder for c in candidates], device=query.device)
    plain = torch.tensor([c.precision == "native" and c.remainder in (0, 1) for c in candidates])
    patterns = plain.cumsum(0) - 1
    precisions = [c.precision for c in candidates]
    picks = _spread(-(-seq // block), query_blocks, phase).tolist()
    places_each = sum(-(-(stop - start) // _EVERY) for start, stop in _stretches(picks, block, seq))
    errors = torch.zeros(heads, int(plain.sum()), batch, places_each, dim, dtype=torch.bfloat16)
    for members in _by_arrangement(selections):
        first, at = selections[members[0]], torch.tensor(members)
        for b in range(batch):
            spans = [_spans(first.index, b, h, picks, block) for h in range(heads)]
            width = max(len(of_head) for of_head in spans)
            rows = torch.tensor([[row for *_, row in s] + [0] * (width - len(s)) for s in spans])
            # Candidates that differ in precision or remainder alone keep the same.
            distinct = list({id(selections[m]): selections[m] for m in members}.values())
            kept = torch.stack([_kept_blocks(one.index, b, rows.to(query.device)) for one in distinct])
            keeps = [next(n for n, one in enumerate(distinct) if one is selections[m]) for m in members]
            for h in range(heads):
                places = _of(first.query_order, b, h)
                sampled = torch.cat([places[start:stop] for start, stop, _ in spans[h]])
                tiles = _key_tiles(first, b, h, block)
                real = None if key_mask is None else key_mask[b]
                head = _Head(
                    query[b, sampled, h].float(),
                    key[b, tiles.tokens, h],
                    value[b, tiles.tokens, h],
                    None if gradient is None else gradient[b, sampled, h].float(),
                    None if real is None else real[sampled],
                )
                hidden = tiles.hidden if real is None else ~real[tiles.tokens] | tiles.hidden
                lengths = [stop - start for start, stop, _ in spans[h]]
                of_head, errors_of_head = _profile_head(
                    head,
                    tiles,
                    hidden,
                    lengths,
                    kept[:, h, : len(lengths)],
                    torch.tensor(keeps, device=query.device),
                    remainder[at],
                    [precisions[member] for member in members],
                    scale,
                )
                sums[:, h, at] += of_head
                if first.order_name is not None:
                    errors[h, patterns[at[plain[at]]], b] = errors_of_head[plain[at]]
    density = torch.tensor([s.density for s in selections], dtype=torch.float64)
    return CallProfile(**dict(zip(_SUMS, sums, strict=True)), density=density, errors=errors.flatten(2, 3))


_EVERY = 8  # rows from one whose error is kept to the next
_SUMS = ("mass", "error", "effect", "norm", "rows")
# Key blocks of varying length are cut into tiles of this many tokens, the last one of a block partly empty.
_VARYING_TILE = 16


@dataclass(frozen=True, eq=False)
class _Head:
    """The sampled rows of one head `[rows, dim]`, its keys and values tile by tile `[tiles * tile, dim]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor | None
    real: Tensor | None


@dataclass(frozen=True, eq=False)
class _Tiles:
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


def _key_tiles(selection: Selection, b: int, h: int, block: int) -> _Tiles:
    index, places = selection.index, _of(selection.key_order, b, h)
    device, seq = places.device, index.seq_k
    if index.key_starts is None:
        slots = torch.arange(index.cols * block, device=device)
        return _Tiles(places[slots.clamp(max=seq - 1)], slots >= seq, None, index.cols)
    starts = _of(index.key_starts, b, h).long()
    tiles = (starts.diff() + _VARYING_TILE - 1) // _VARYING_TILE
    of = torch.arange(index.cols, device=device).repeat_interleave(tiles)
    within = torch.arange(len(of), device=device) - (tiles.cumsum(0) - tiles)[of]
    slots = (starts[of] + within * _VARYING_TILE)[:, None] + torch.arange(_VARYING_TILE, device=device)
    hidden = slots >= starts[of + 1][:, None]
    return _Tiles(places[slots.clamp(max=seq - 1).flatten()], hidden.flatten(), of, index.cols)


def _profile_head(
    head: _Head,
    tiles: _Tiles,
    hidden: Tensor,
    lengths: Sequence[int],
    kept: Tensor,
    keeps: Tensor,
    remainder: Tensor,
    precisions: Sequence[str],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The sums `_SUMS` of a head in one arrangement, `[5, candidates]`, and the errors of every eighth row of each run.

    lengths: rows of each run of rows that read the same blocks; kept: bool `[patterns, runs, blocks]`; keeps: int64
    `[candidates]`, the pattern of each; remainder: float `[candidates]`, what the means of the rest weigh;
    precisions: of the candidates.
    """
    candidates, everything = len(keeps), len(kept)
    dim = head.query.shape[1]
    members = {p: [m for m, own in enumerate(precisions) if own == p] for p in ("native", *precisions)}
    operands = {p: _operands(head, tiles, hidden, p, scale) for p in members}
    # One more pattern that keeps everything gives the dense output from the same sums.
    selected = F.pad(kept.to(torch.float32), (0, 0, 0, 0, 0, 1), value=1.0)
    left_out = 1 - selected
    if tiles.block is not None:
        selected = selected[..., tiles.block]
    sums = torch.zeros(len(_SUMS), candidates, dtype=torch.float64, device=head.query.device)

    # Run by run: the scores stay in a CPU's cache.
    some_errors = []
    stop = 0
    for number, length in enumerate(lengths):
        start, stop = stop, stop + length
        real = None if head.real is None else head.real[start:stop, None]
        error = torch.empty(candidates, length, dim, device=head.query.device)
        for precision, of_precision in members.items():
            parts, mass, rest, rest_mass = operands[precision].attend(
                slice(start, stop), selected[:, number], left_out[:, number], real
            )
            if precision == "native":
                # Of exact weights, whatever the precision a candidate runs in.
                exact = mass
                dense = parts[everything] / mass[everything].clamp(min=_TINY)[:, None]
            own, weight = keeps[of_precision], remainder[of_precision][:, None]
            total = (mass[own] + weight * rest_mass[own]).clamp(min=_TINY)
            error[of_precision] = (parts[own] + weight[..., None] * rest[own]) / total[..., None] - dense
        sums[0] += (exact[keeps] / exact[everything].clamp(min=_TINY)).sum(-1)
        sums[1] += error.square().sum((1, 2))
        some_errors.append(error[:, ::_EVERY].to("cpu", torch.bfloat16))
        if head.gradient is not None:
            sums[2] += (error * head.gradient[start:stop]).sum(-1).square_().sum(-1)
        sums[3] += dense.square().sum()
        sums[4] += length if real is None else real.sum()
    return sums.cpu(), torch.cat(some_errors, dim=1)


@dataclass(frozen=True, eq=False)
class _Operands:
    """One head in one precision, as float32 numbers that the precision has.

    query `[rows, dim]`, with the softmax scale in it; key `[dim, tiles * tile]`; value `[tiles, tile, dim]`; of every
    key block the mean key and value `[blocks, dim]` and the number of its keys `[blocks]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mean_key: Tensor
    mean_value: Tensor
    counts: Tensor
    hidden: Tensor | None
    e4m3: bool

    def attend(
        self, rows: slice, selected: Tensor, left_out: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of weighted values `[patterns, rows, dim]` and of weights `[patterns, rows]`, of keys and of means.

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


def _operands(head: _Head, tiles: _Tiles, hidden: Tensor, precision: str, scale: float) -> _Operands:
    """See `dit_accel.kernels.prepare` for what a precision does to its operands."""
    dim, count = head.query.shape[1], tiles.blocks if tiles.block is None else len(tiles.block)
    query, keys, values = head.query, head.key.float(), head.value.float()
    real = ~hidden
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
    )


def _rounded(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """`[groups, tokens, dim]` in an 8-bit format with a scale per group, as float32."""
    numbers, scales = quantise(groups, dtype)
    return numbers.float() * scales[:, None, None]


def _per_block(tiles: _Tiles, x: Tensor) -> Tensor:
    """Sums of `[tiles, ...]` over the tiles of each block."""
    if tiles.block is None:
        return x
    return x.new_zeros(tiles.blocks, *x.shape[1:]).index_add_(0, tiles.block, x)


def _selections(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    candidates: Sequence[Candidate],
    block: int,
    scale: float,
) -> list[Selection]:
    """What every candidate keeps. Those that differ in density alone share what their family remembers."""
    memories: dict[tuple[Any, ...], dict[str, Any]] = {}
    found: dict[tuple[Any, ...], Selection] = {}
    for c in candidates:
        if (same := (c.family, c.options, c.density)) in found:
            continue
        options: dict[str, Any] = dict(c.options)
        chosen = functools.partial(
            select,
            c.family,
            query,
            key,
            grid,
            density=c.density,
            block=block,
            scale=scale,
            value=value,
            **options,
        )
        if FAMILIES[c.family].arrange is None:
            found[same] = chosen()
            continue
        name = (c.family, c.options)
        if name not in memories:
            memories[name] = {}
            chosen(state=memories[name])
        # As in the later steps of a generation, which go on from the centroids before but choose anew.
        kept = {part: x for part, x in memories[name].items() if part not in ("selection", "left")}
        found[same] = chosen(state=kept)
    return [found[c.family, c.options, c.density] for c in candidates]


def _of(x: Tensor, b: int, h: int) -> Tensor:
    """One head of `[1 or heads, ...]` or of `[1 or batch, 1 or heads, ...]`."""
    return x[h % x.shape[0]] if x.ndim == 2 else x[b % x.shape[0], h % x.shape[1]]


def _stretches(picks: Sequence[int], block: int, seq: int) -> list[tuple[int, int]]:
    return [(pick * block, min((pick + 1) * block, seq)) for pick in picks]


def _spans(index: BlockIndex, b: int, h: int, picks: Sequence[int], block: int) -> list[tuple[int, int, int]]:
    """Runs of rows of the sampled stretches that lie in one query block: (start, stop, query block)."""
    stretches = _stretches(picks, block, index.seq_q)
    if index.query_starts is None:
        return [(start, stop, pick) for (start, stop), pick in zip(stretches, picks, strict=True)]
    starts = _of(index.query_starts, b, h).tolist()
    spans = []
    for start, stop in stretches:
        while start < stop:
            row = bisect.bisect_right(starts, start) - 1
            spans.append((start, min(stop, starts[row + 1]), row))
            start = spans[-1][1]
    return spans


def _kept_blocks(index: BlockIndex, batch: int, rows: Tensor) -> Tensor:
    """bool `[heads, rows, cols]`: kept key blocks of query blocks `[heads, rows]`, without the whole mask."""
    b = batch % index.batch
    counts, offsets = (x[b].expand(len(rows), -1).gather(1, rows) for x in (index.counts, index.offsets))
    entry = torch.arange(max(int(counts.max()), 1), device=counts.device)
    valid = entry < counts[..., None]
    kept = torch.zeros(*counts.shape, index.cols + 1, dtype=torch.bool, device=counts.device)
    if index.indices.numel():
        place = (offsets[..., None] + entry).clamp(max=index.indices.numel() - 1)
        # Entries past a row's end go to one extra column, which is cut off.
        kept.scatter_(-1, torch.where(valid, index.indices[place].long(), index.cols), True)
    return kept[..., :-1]


def _spread(total: int, count: int, phase: float) -> Tensor:
    """`count` of `total` block numbers, one in each equal stretch, at the same `phase` of it."""
    count = min(count, total)
    return ((torch.arange(count, dtype=torch.float64) + phase) * total / count).long().clamp(max=total - 1)


def _by_arrangement(selections: Sequence[Selection]) -> list[list[int]]:
    """Positions of the selections that share their token orders and their blocks."""
    groups: list[list[int]] = []
    for position, selection in enumerate(selections):
        for group in groups:
            if _same_arrangement(selections[group[0]], selection):
                group.append(position)
                break
        else:
            groups.append([position])
    return groups


def _same_arrangement(a: Selection, b: Selection) -> bool:
    pairs = (
        (a.query_order, b.query_order),
        (a.key_order, b.key_order),
        (a.index.query_starts, b.index.query_starts),
        (a.index.key_starts, b.index.key_starts),
    )
    return all(
        x is y or (x is not None and y is not None and x.shape == y.shape and torch.equal(x, y))
        for x, y in pairs
    )
