"""Exact attention on sampled query blocks, and what each candidate would keep and lose of it."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.calibration.head_profile import EVERY, SUMS, Head, key_tiles, of_head, profile_head
from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex
from dit_accel.patterns import FAMILIES, Selection, select
from dit_accel.plan import Candidate


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
    sums = torch.zeros(len(SUMS), heads, len(candidates), dtype=torch.float64)
    remainder = torch.tensor([c.remainder for c in candidates], device=query.device)
    plain = torch.tensor([c.precision == "native" and c.remainder in (0, 1) for c in candidates])
    patterns = plain.cumsum(0) - 1
    precisions = [c.precision for c in candidates]
    picks = _spread(-(-seq // block), query_blocks, phase).tolist()
    places_each = sum(-(-(stop - start) // EVERY) for start, stop in _stretches(picks, block, seq))
    errors = torch.zeros(heads, int(plain.sum()), batch, places_each, dim, dtype=torch.bfloat16)
    for members in _by_arrangement(selections):
        first, at = selections[members[0]], torch.tensor(members)
        for b in range(batch):
            spans = [_spans(first.index, b, h, picks, block) for h in range(heads)]
            width = max(len(one) for one in spans)
            rows = torch.tensor([[row for *_, row in s] + [0] * (width - len(s)) for s in spans])
            # Candidates that differ in precision or remainder alone keep the same.
            distinct = list({id(selections[m]): selections[m] for m in members}.values())
            kept = torch.stack([_kept_blocks(one.index, b, rows.to(query.device)) for one in distinct])
            keeps = [next(n for n, one in enumerate(distinct) if one is selections[m]) for m in members]
            for h in range(heads):
                places = of_head(first.query_order, b, h)
                sampled = torch.cat([places[start:stop] for start, stop, _ in spans[h]])
                tiles = key_tiles(first, b, h, block)
                real = None if key_mask is None else key_mask[b]
                head = Head(
                    query[b, sampled, h].float(),
                    key[b, tiles.tokens, h],
                    value[b, tiles.tokens, h],
                    None if gradient is None else gradient[b, sampled, h].float(),
                    None if real is None else real[sampled],
                )
                hidden = tiles.hidden if real is None else ~real[tiles.tokens] | tiles.hidden
                lengths = [stop - start for start, stop, _ in spans[h]]
                sums_of_head, errors_of_head = profile_head(
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
                sums[:, h, at] += sums_of_head
                if first.order_name is not None:
                    errors[h, patterns[at[plain[at]]], b] = errors_of_head[plain[at]]
    density = torch.tensor([s.density for s in selections], dtype=torch.float64)
    return CallProfile(**dict(zip(SUMS, sums, strict=True)), density=density, errors=errors.flatten(2, 3))


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


def _stretches(picks: Sequence[int], block: int, seq: int) -> list[tuple[int, int]]:
    return [(pick * block, min((pick + 1) * block, seq)) for pick in picks]


def _spans(index: BlockIndex, b: int, h: int, picks: Sequence[int], block: int) -> list[tuple[int, int, int]]:
    """Runs of rows of the sampled stretches that lie in one query block: (start, stop, query block)."""
    stretches = _stretches(picks, block, index.seq_q)
    if index.query_starts is None:
        return [(start, stop, pick) for (start, stop), pick in zip(stretches, picks, strict=True)]
    starts = of_head(index.query_starts, b, h).tolist()
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
