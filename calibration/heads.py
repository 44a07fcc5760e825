"""One attention call by itself: scores of every head's candidates, and a choice for that layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.calibration.candidates import default_candidates
from dit_accel.calibration.cost import measure_latency
from dit_accel.calibration.profile import profile_call
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid


@dataclass(frozen=True)
class HeadScore:
    """What one candidate does to one head.

    Attributes:
        candidate: the way to run the head; `family`, `options` and `precision` are its own.
        density: kept pairs / all pairs, as counted in the block lists of all heads of the call.
        recall: softmax mass on kept pairs, mean over the sampled rows.
        rel_l2: norm of output - dense output / norm of the dense output, over the sampled rows.
        latency_ms: of this head in a launch in which all heads run this candidate, selection included.
    """

    candidate: Candidate
    density: float
    recall: float
    rel_l2: float
    latency_ms: float

    @property
    def family(self) -> str:
        return self.candidate.family

    @property
    def options(self) -> dict[str, str | int | float]:
        return dict(self.candidate.options)

    @property
    def precision(self) -> str:
        return self.candidate.precision


def profile_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    candidates: Sequence[Candidate] | None = None,
    *,
    seed: int = 0,
    block: int = 64,
    query_blocks: int = 8,
    key_mask: Tensor | None = None,
) -> list[list[HeadScore]]:
    """Score the candidates of every head on one attention call.

    Exact attention is computed for sampled query blocks only, so memory grows with seq * block, never with seq^2.

    Args:
        query, key, value: `[batch, seq, heads, dim]` in the model's order, seq = `grid.total_tokens`.
        grid: the token grid.
        candidates: ways to run a head; those of `calibrate` if None.
        seed: picks the sampled query blocks. Scores but for `latency_ms` are equal for equal seeds.
        block: tokens per block.
        query_blocks: how many query blocks are sampled.
        key_mask: bool `[batch, seq]`, True = a real token.

    Returns:
        For each head a list of scores, in the order of the candidates.

    Example:
        >>> scores = dit_accel.profile_heads(query, key, value, dit_accel.TokenGrid(17, 20, 24))
        >>> row = dit_accel.choose(scores, max_rel_l2=0.1)

    Raises:
        ValueError: tensors that do not fit the grid or each other, no candidates, or nothing to sample.
    """
    candidates = default_candidates(query.device, query.dtype) if candidates is None else tuple(candidates)
    _check(query, key, value, grid, candidates, query_blocks)
    phase = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
    mask = None if key_mask is None else key_mask[:, None, None]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    with torch.no_grad():
        call = profile_call(
            query,
            key,
            value,
            grid,
            candidates,
            block=block,
            query_blocks=query_blocks,
            phase=phase,
            key_mask=key_mask,
        )
        latency = measure_latency(
            query, key, value, grid, candidates, dense, block=block, key_mask=key_mask
        ).candidates
    recall = call.mass / call.rows.clamp(min=1)
    rel_l2 = (call.error / call.norm.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return [
        [
            HeadScore(
                candidate,
                call.density[number].item(),
                recall[head, number].item(),
                rel_l2[head, number].item(),
                latency[number].item(),
            )
            for number, candidate in enumerate(candidates)
        ]
        for head in range(query.shape[2])
    ]


def choose(scores: Sequence[Sequence[HeadScore]], *, max_rel_l2: float) -> list[Candidate]:
    """The fastest candidate of every head of a layer whose error is at most `max_rel_l2`.

    The error of the whole layer's output then is at most `max_rel_l2` too. Of equally fast candidates the one with
    the smaller error is taken. A whole model is chosen for by `calibrate`, which weighs heads against each other.

    Raises:
        ValueError: a bound that is no error, or a head without a candidate that keeps it.
    """
    if not 0.0 <= max_rel_l2 < float("inf"):
        raise ValueError(f"max_rel_l2: expected a number of at least 0, got {max_rel_l2!r}")
    chosen = []
    for head, of_head in enumerate(scores):
        good = [score for score in of_head if score.rel_l2 <= max_rel_l2 or score.candidate.is_dense]
        if not good:
            least = min((score.rel_l2 for score in of_head), default=float("nan"))
            raise ValueError(
                f"max_rel_l2: expected at least the smallest error of head {head}, {least:.4g}, got "
                f"{max_rel_l2!r}; put the candidate 'dense' among them"
            )
        chosen.append(min(good, key=lambda score: (score.latency_ms, score.rel_l2)).candidate)
    return chosen


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    candidates: Sequence[Candidate],
    query_blocks: int,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.shape[1] != grid.total_tokens or tensor.shape[:3] != query.shape[:3]:
            raise ValueError(
                f"{name}: expected [batch, {grid.total_tokens}, heads, dim] for {grid}, alike in batch and heads, "
                f"got {tuple(tensor.shape)}"
            )
    if not candidates:
        raise ValueError("candidates: expected at least one, got none; leave them out for those of calibrate")
    if query_blocks < 1:
        raise ValueError(f"query_blocks: expected at least 1, got {query_blocks!r}")
