"""Exact attention on sampled query blocks, and what each candidate would keep and lose of it."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.calibration.head_profile import EVERY, SUMS, Head, key_tiles, of_head, profile_head
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex
from dit_accel.patterns import FAMILIES, Selection, select
from dit_accel.patterns.base import SHARED, Memory


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
        errors: bfloat16 `[heads, patterns, places, dim]`, output - dense output at places that are the same in all
            guidance branches of a step, of the candidates in native precision whose means have no weight or that of
            their tokens; 0 where each branch has a token order of its own, and where query blocks vary in length.
    """

    mass: Tensor
    error: Tensor
    effect: Tensor
    norm: Tensor
    rows: Tensor
    density: Tensor
    errors: Tensor


@dataclass(frozen=True, eq=False)
class _Arrangement:
    """Candidates whose token orders and blocks are the same, and what they keep of the sampled rows.

    members: positions of the candidates; keeps: which pattern each of them keeps; density: of each.
    spans: by batch item and head, runs of rows of the sampled stretches that lie in one query block: (start, stop,
        query block).
    kept: by batch item, bool `[patterns, heads, spans, cols]`.
    same_places: whether sampled rows, and those whose error is kept, are the same in all branches of a step.
    """

    members: list[int]
    query_order: Tensor
    key_order: Tensor
    key_starts: Tensor | None
    cols: int
    spans: list[list[list[tuple[int, int, int]]]]
    kept: list[Tensor]
    keeps: list[int]
    density: list[float]
    same_places: bool


@dataclass(eq=False)
class Earlier:
    """What the calls of one layer remember of earlier ones, as attention does while a plan runs.

    families: what the families that arrange tokens remember, by name, options and guidance branch, None where branches
        share it.
    chosen: what the first branch of the running step chose, for the branches that share it; None before it has.
    """

    families: dict[tuple[Any, ...], Memory] = field(default_factory=dict)
    chosen: list[_Arrangement] | None = None

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: TokenGrid,
        candidates: Sequence[Candidate],
        *,
        branch: str,
        first: bool,
        block: int = 64,
        key_mask: Tensor | None = None,
    ) -> None:
        """Lets the families that arrange tokens see a call of the step before a profiled one.

        branch: of guidance; first: whether it is the first of the step.
        """
        seen: dict[tuple[Any, ...], Memory] = {}
        for c in candidates:
            name = _remembered_as(c, branch)
            if FAMILIES[c.family].arrange is None or name in seen or (_serves_all_branches(c) and not first):
                continue
            seen[name] = {}
            _select(c, query, key, value, grid, block, None, key_mask, seen[name])
        self.families |= seen


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
    earlier: Earlier | None = None,
    branch: str = "",
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
        earlier: of the layer, whose calls in the step before and in the first guidance branch of this one leave there
            what a running plan would remember of them; None for a call by itself.
        branch: of guidance.
    """
    batch, seq, heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    picks = _spread(-(-seq // block), query_blocks, phase).tolist()
    memory = Earlier() if earlier is None else earlier
    shared: list[int] = []
    own: list[int] = []
    for position, c in enumerate(candidates):
        (shared if _serves_all_branches(c) else own).append(position)
    chosen = functools.partial(
        _arranged, query, key, value, grid, candidates, block, scale, key_mask, picks, memory, branch
    )
    if memory.chosen is None:
        memory.chosen = chosen(shared, earlier is not None)
    arrangements = memory.chosen + chosen(own, False)
    density = torch.zeros(len(candidates), dtype=torch.float64)
    sums = torch.zeros(len(SUMS), heads, len(candidates), dtype=torch.float64)
    # What is made of random features stands for what is left out with its own weight.
    remainder = torch.tensor([1.0 if c.features else c.remainder for c in candidates], device=query.device)
    plain = torch.tensor([c.precision == "native" and c.remainder in (0, 1) for c in candidates])
    patterns = plain.cumsum(0) - 1
    ways = [(c.precision, c.features) for c in candidates]
    places_each = sum(-(-(stop - start) // EVERY) for start, stop in _stretches(picks, block, seq))
    errors = torch.zeros(heads, int(plain.sum()), batch, places_each, dim, dtype=torch.bfloat16)
    for group in arrangements:
        at = torch.tensor(group.members)
        density[at] = torch.tensor(group.density, dtype=torch.float64)
        keeps = torch.tensor(group.keeps, device=query.device)
        for b in range(batch):
            for h in range(heads):
                spans, places = group.spans[b][h], of_head(group.query_order, b, h)
                sampled = torch.cat([places[start:stop] for start, stop, _ in spans])
                starts = None if group.key_starts is None else of_head(group.key_starts, b, h)
                tiles = key_tiles(of_head(group.key_order, b, h), starts, block, group.cols)
                real = None if key_mask is None else key_mask[b]
                head = Head(
                    query[b, sampled, h].float(),
                    key[b, tiles.tokens, h],
                    value[b, tiles.tokens, h],
                    None if gradient is None else gradient[b, sampled, h].float(),
                    None if real is None else real[sampled],
                )
                hidden = tiles.hidden if real is None else ~real[tiles.tokens] | tiles.hidden
                lengths = [stop - start for start, stop, _ in spans]
                sums_of_head, errors_of_head = profile_head(
                    head,
                    tiles,
                    hidden,
                    lengths,
                    group.kept[b][:, h, : len(lengths)],
                    keeps,
                    remainder[at],
                    [ways[member] for member in group.members],
                    scale,
                )
                sums[:, h, at] += sums_of_head
                if group.same_places:
                    errors[h, patterns[at[plain[at]]], b] = errors_of_head[plain[at]]
    return CallProfile(**dict(zip(SUMS, sums, strict=True)), density=density, errors=errors.flatten(2, 3))


def _serves_all_branches(candidate: Candidate) -> bool:
    """Whether what the first guidance branch of a step keeps is kept in the others."""
    return FAMILIES[candidate.family].static or dict(candidate.options).get("branches") == SHARED


def _remembered_as(candidate: Candidate, branch: str) -> tuple[Any, ...]:
    return candidate.family, candidate.options, None if _serves_all_branches(candidate) else branch


def _select(
    candidate: Candidate,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    block: int,
    scale: float | None,
    key_mask: Tensor | None,
    memory: Memory,
) -> Selection:
    options: dict[str, Any] = dict(candidate.options)
    return select(
        candidate.family,
        query,
        key,
        grid,
        density=candidate.density,
        block=block,
        scale=scale,
        value=value,
        key_mask=key_mask,
        state=memory,
        **options,
    )


def _arranged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    candidates: Sequence[Candidate],
    block: int,
    scale: float,
    key_mask: Tensor | None,
    picks: Sequence[int],
    earlier: Earlier,
    branch: str,
    positions: Sequence[int],
    lasting: bool,
) -> list[_Arrangement]:
    """What the candidates at `positions` keep, by token orders and blocks.

    Those that differ in density alone share what their family remembers. lasting: whether other branches will read it.
    """
    found: dict[tuple[Any, ...], Selection] = {}
    for position in positions:
        c = candidates[position]
        if (same := (c.family, c.options, c.density)) in found:
            continue
        memory: Memory = {}
        if FAMILIES[c.family].arrange is not None:
            if (name := _remembered_as(c, branch)) not in earlier.families:
                earlier.families[name] = {}
                _select(c, query, key, value, grid, block, scale, key_mask, earlier.families[name])
            # As in the later steps of a generation, which go on from the orders before but choose anew.
            memory = {k: x for k, x in earlier.families[name].items() if k not in ("selection", "left")}
        found[same] = _select(c, query, key, value, grid, block, scale, key_mask, memory)
    selections = {
        p: found[candidates[p].family, candidates[p].options, candidates[p].density] for p in positions
    }
    arrangements = []
    for members in _by_arrangement(selections):
        first = selections[members[0]]
        # Candidates that differ in precision or remainder alone keep the same.
        distinct = list({id(selections[m]): selections[m] for m in members}.values())
        spans, kept = [], []
        for b in range(query.shape[0]):
            spans.append([_spans(first.index, b, h, picks, block) for h in range(query.shape[2])])
            width = max(len(one) for one in spans[b])
            rows = torch.tensor([[row for *_, row in s] + [0] * (width - len(s)) for s in spans[b]])
            rows = rows.to(query.device)
            kept.append(torch.stack([one.index.kept_blocks(b, rows) for one in distinct]))
        arrangements.append(
            _Arrangement(
                members,
                first.query_order,
                first.key_order,
                first.index.key_starts,
                first.index.cols,
                spans,
                kept,
                [next(n for n, one in enumerate(distinct) if one is selections[m]) for m in members],
                [selections[m].density for m in members],
                first.order_name is not None or (lasting and first.index.query_starts is None),
            )
        )
    return arrangements


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


def _spread(total: int, count: int, phase: float) -> Tensor:
    """`count` of `total` block numbers, one in each equal stretch, at the same `phase` of it."""
    count = min(count, total)
    return ((torch.arange(count, dtype=torch.float64) + phase) * total / count).long().clamp(max=total - 1)


def _by_arrangement(selections: Mapping[int, Selection]) -> list[list[int]]:
    """Keys of the selections that share their token orders and their blocks."""
    groups: list[list[int]] = []
    for position, selection in selections.items():
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
