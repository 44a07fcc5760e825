"""Exact attention on sampled query blocks, and what each candidate would keep and lose of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dit_accel.kernels import BlockIndex
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.patterns import Selection, select
from dit_accel.plan import Candidate

_SCORES = (
    1 << 23
)  # float32 scores held at once; only their number is bounded, a block row is the smallest piece


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
    selections = [
        select(c.family, query, key, grid, density=c.density, block=block, scale=scale, **dict(c.options))
        for c in candidates
    ]
    mass, error, norm = (torch.zeros(heads, len(candidates), dtype=torch.float64) for _ in range(3))
    rows = torch.zeros(len(candidates), dtype=torch.float64)
    picks = _spread(-(-seq // block), query_blocks, phase).to(query.device)

    for members in _by_order(selections):
        order = selections[members[0]].order
        at = torch.tensor(members)
        for b in range(batch):
            kept = torch.stack(
                [_kept_blocks(selections[m].index, b, picks).expand(heads, -1, -1) for m in members], 2
            )
            for h in range(heads):
                places = order[h % order.shape[0]]
                q_h, k_h, v_h = (t[b, :, h].index_select(0, places) for t in (query, key, value))
                real = torch.ones_like(places, dtype=torch.bool) if key_mask is None else key_mask[b, places]
                sums = _profile_head(q_h, k_h, v_h, real, picks, kept[h], block, scale)
                mass[h, at] += sums[0]
                error[h, at] += sums[1]
                norm[h, at] += sums[2]
                if h == 0:
                    rows[at] += sums[3]
    density = torch.tensor([s.density for s in selections], dtype=torch.float64)
    return CallProfile(mass, error, norm, rows, density)


def _profile_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor,
    picks: Tensor,
    kept: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mass and error `[candidates]`, norm, row count of a head in one order; kept `[picks, candidates, cols]`."""
    cols = kept.shape[-1]
    seq, dim = query.shape
    padding = cols * block - seq
    key = torch.nn.functional.pad(key.float(), (0, 0, 0, padding))
    value = torch.nn.functional.pad(value.float(), (0, 0, 0, padding)).view(cols, block, dim)
    hidden = ~torch.nn.functional.pad(real, (0, padding))
    mass = torch.zeros(kept.shape[1], dtype=torch.float64, device=query.device)
    error, norm, count = (
        torch.zeros_like(mass),
        torch.zeros((), dtype=torch.float64, device=query.device),
        0.0,
    )

    for part in range(0, len(picks), step := max(1, _SCORES // (cols * block * block))):
        blocks = picks[part : part + step]
        places = (blocks[:, None] * block + torch.arange(block, device=blocks.device)).flatten()
        counted = (places < seq) & ~hidden[places]
        scores = (query[places.clamp(max=seq - 1)].float() * scale) @ key.T
        probabilities = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        probabilities *= counted[:, None]  # rows beyond the sequence or of padding count nothing
        by_block = probabilities.view(-1, cols, block)
        # What each key block adds to the output: a candidate's output is then one small matrix product away.
        partial = torch.bmm(by_block.transpose(0, 1), value)  # [cols, rows, dim]
        selected = kept[part : part + step].to(partial.dtype)
        kept_mass = _per_block(selected, by_block.sum(-1).T[..., None])[..., 0]  # [blocks, candidates, block]
        output = _per_block(selected, partial) / kept_mass.clamp(min=1e-30)[..., None]
        dense = partial.sum(0).view(len(blocks), 1, block, dim)
        mass += kept_mass.sum((0, 2), dtype=torch.float64)
        error += (output - dense).square().sum((0, 2, 3), dtype=torch.float64)
        norm += dense.square().sum(dtype=torch.float64)
        count += counted.sum().item()
    return mass.cpu(), error.cpu(), norm.cpu(), count


def _per_block(selected: Tensor, parts: Tensor) -> Tensor:
    """Sums parts `[cols, rows, n]` over the selected `[blocks, candidates, cols]` of each query block.

    Returns `[blocks, candidates, rows / blocks, n]`.
    """
    blocks, candidates, cols = selected.shape
    n = parts.shape[-1]
    by_query_block = parts.reshape(cols, blocks, -1).transpose(0, 1)
    return torch.bmm(selected, by_query_block).view(blocks, candidates, -1, n)


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
            order = selections[group[0]].order
            if order is selection.order or (
                order.shape == selection.order.shape and torch.equal(order, selection.order)
            ):
                group.append(position)
                break
        else:
            groups.append([position])
    return groups
