"""Exact attention on sampled query blocks, and what each candidate would keep and lose of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex
from dit_accel.patterns import Selection, select
from dit_accel.plan import Candidate

_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class CallProfile:
    """Sums over the sampled query rows of one attention call, float64 on the CPU.

    Attributes:
        mass: `[heads, candidates]`, softmax mass on kept pairs.
        error: `[heads, candidates]`, squared norm of output - dense output.
        norm: `[heads, candidates]`, squared norm of the dense output on the rows that candidate was tried on.
        rows: `[candidates]`, number of those rows; candidates of one token order share their rows.
        density: `[candidates]`, kept pairs / all pairs of the whole call.
    """

    mass: Tensor
    error: Tensor
    norm: Tensor
    rows: Tensor
    density: Tensor


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
) -> CallProfile:
    """Profiles every candidate on one call's `[batch, seq, heads, dim]` tensors, computing in float32.

    Memory grows with seq * block, never with seq^2.

    Args:
        query_blocks: how many query blocks are sampled, evenly over each candidate's token order.
        phase: in [0, 1), shifts the sampled blocks between calls.
        key_mask: bool `[batch, seq]`, True = a real token; padded rows are not counted.
    """
    batch, seq, heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    selections = []
    for c in candidates:
        options: dict[str, Any] = dict(c.options)
        selections.append(
            select(c.family, query, key, grid, density=c.density, block=block, scale=scale, **options)
        )
    mass, error, norm = (torch.zeros(heads, len(candidates), dtype=torch.float64) for _ in range(3))
    rows = torch.zeros(len(candidates), dtype=torch.float64)
    for candidate, selection in zip(candidates, selections, strict=True):
        if selection.index.varies:
            raise ValueError(
                f"candidates: {candidate.label} has blocks of varying length, which cannot be profiled"
            )
    remainder = torch.tensor([c.remainder for c in candidates], device=query.device)
    picks = _spread(-(-seq // block), query_blocks, phase).to(query.device)

    for members in _by_order(selections):
        order = selections[members[0]].query_order
        at = torch.tensor(members)
        for b in range(batch):
            kept = torch.stack(
                [_kept_blocks(selections[m].index, b, picks).expand(heads, -1, -1) for m in members]
            )
            for h in range(heads):
                places = order[h % order.shape[0]]
                q_h, k_h, v_h = (t[b, :, h].index_select(0, places) for t in (query, key, value))
                real = None if key_mask is None else key_mask[b, places]
                sums = _profile_head(
                    q_h, k_h, v_h, real, picks.tolist(), kept[:, h], remainder[at], block, scale
                )
                for total, part in zip((mass, error, norm), sums, strict=True):
                    total[h, at] += part
            places = (picks[:, None] * block + torch.arange(block, device=picks.device)).flatten()
            places = order[0, places[places < seq]]
            rows[at] += len(places) if key_mask is None else key_mask[b, places].sum().item()
    density = torch.tensor([s.density for s in selections], dtype=torch.float64)
    return CallProfile(mass, error, norm, rows, density)


def _profile_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    picks: Sequence[int],
    kept: Tensor,
    remainder: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass and error `[candidates]` and norm of a head in one order.

    kept is bool `[candidates, picks, cols]`; remainder bool `[candidates]`, whether means stand for the rest.
    """
    candidates, _, cols = kept.shape
    seq, dim = query.shape
    padding = cols * block - seq
    keys = F.pad(key.float() * scale, (0, 0, 0, padding)).T
    values = F.pad(value.float(), (0, 0, 0, padding)).view(cols, block, dim)
    hidden = None
    if real is not None or padding:
        real = torch.ones(seq, dtype=torch.bool, device=query.device) if real is None else real
        hidden = ~F.pad(real, (0, padding))
    # One more "candidate" that keeps everything gives the dense output from the same sums.
    selected = F.pad(kept.to(torch.float32), (0, 0, 0, 0, 0, 1), value=1.0)
    stands_in = (1 - selected) * F.pad(remainder, (0, 1))[:, None, None]
    counts = torch.full((cols,), float(block), device=query.device)
    if hidden is not None:
        keys.masked_fill_(hidden, 0)
        counts = (~hidden).view(cols, block).sum(-1, dtype=torch.float32)
        values = values.masked_fill(hidden.view(cols, block, 1), 0)
    mean_keys = keys.view(dim, cols, block).sum(-1) / counts.clamp(min=1)
    mean_values = values.sum(1) / counts.clamp(min=1)[:, None]
    sums = torch.zeros(3, candidates, dtype=torch.float64, device=query.device)

    # Query block by query block: its scores stay in a CPU's cache.
    for number, pick in enumerate(picks):
        start = pick * block
        rows = query[start : start + block].float()
        scores = rows @ keys
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        scores.sub_(largest).exp_()
        if hidden is not None:
            scores *= ~hidden[start : start + len(rows), None]  # rows of padding count nothing
        by_block = scores.view(-1, cols, block)
        # What each key block adds to the output: a candidate's output is one row of a small product.
        parts = torch.bmm(by_block.transpose(0, 1), values)
        output = (selected[:, number] @ parts.view(cols, -1)).view(candidates + 1, -1, dim)
        mass = selected[:, number] @ by_block.sum(-1).T
        weight = mass
        if remainder.any():
            means = (rows @ mean_keys - largest).exp_() * counts
            if hidden is not None:
                means *= ~hidden[start : start + len(rows), None]
            weight = mass + stands_in[:, number] @ means.T
            output += torch.einsum("cb,rb,bd->crd", stands_in[:, number], means, mean_values)
        output /= weight.clamp(min=_TINY)[..., None]
        sums[0] += (mass[:-1] / mass[-1].clamp(min=_TINY)).sum(-1)
        sums[1] += (output[:-1] - output[-1]).square_().sum((1, 2))
        sums[2] += output[-1].square().sum()
    of_mass, of_error, of_norm = sums.cpu()
    return of_mass, of_error, of_norm


def _kept_blocks(index: BlockIndex, batch: int, rows: Tensor) -> Tensor:
    """bool `[heads, rows, cols]`: the kept key blocks of some query blocks, without the whole block mask."""
    b = batch % index.batch
    counts, offsets = index.counts[b][:, rows], index.offsets[b][:, rows]
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


def _by_order(selections: Sequence[Selection]) -> list[list[int]]:
    """Positions of the selections that share one token order."""
    groups: list[list[int]] = []
    for position, selection in enumerate(selections):
        for group in groups:
            order, other = selections[group[0]].query_order, selection.query_order
            if order is other or (order.shape == other.shape and torch.equal(order, other)):
                group.append(position)
                break
        else:
            groups.append([position])
    return groups
