"""Measured latency of every candidate on this device at the real shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dit_accel.attention import attend
from dit_accel.evaluation.timing import now
from dit_accel.grid import TokenGrid
from dit_accel.plan import Candidate

_ROUNDS = 3
_CANDIDATES_PER_REFERENCE = 12


@dataclass(frozen=True, eq=False)
class Latency:
    """Milliseconds per head: each candidate's in the sparse launch (float64), `plain` the original path's."""

    candidates: Tensor
    plain: float


def measure_latency(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    candidates: Sequence[Candidate],
    original: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    block: int = 64,
    key_mask: Tensor | None = None,
    backend: str = "auto",
    on_call: Callable[[], object] | None = None,
) -> Latency:
    """Times one attention call of `[batch, seq, heads, dim]` with all heads on each candidate, selection
    included.

    Dynamic families find what a step before left them, as in the middle of a generation, and choose anew: what the
    option `reuse` saves is not counted. Every few calls the original attention is timed too, and candidates are taken
    relative to it, so that a machine that slows down half-way does not favour the candidates measured first. Median
    of three rounds after one warm-up.

    Args:
        original: the attention that an all-dense layer runs.
        on_call: called after each timed candidate, `latency_calls(candidates)` times in all.
    """
    heads = query.shape[2]

    def seconds(call: Callable[[], object]) -> float:
        start = now(query.device)
        call()
        return now(query.device) - start

    def sparse(number: int) -> Callable[[], object]:
        return lambda: attend(
            query,
            key,
            value,
            grid,
            fresh,
            [number],
            block=block,
            key_mask=key_mask,
            backend=backend,
            layer=0,
            cache=caches[number],
            launches=caches[number],
        )

    fresh = [replace(c, options=tuple(o for o in c.options if o[0] != "reuse")) for c in candidates]
    caches: list[dict[Any, Any]] = [{} for _ in candidates]  # what a generation keeps from step to step
    relative: list[list[float]] = [[] for _ in candidates]
    references: list[float] = []
    for round_number in range(_ROUNDS + 1):
        for number in range(len(candidates)):
            if number % _CANDIDATES_PER_REFERENCE == 0:
                reference = seconds(lambda: original(query, key, value))
            taken = seconds(sparse(number))
            if round_number > 0:
                references.append(reference)
                relative[number].append(taken / reference)
            if on_call is not None:
                on_call()
    plain = 1000 * median(references) / heads
    return Latency(torch.tensor([plain * median(ratios) for ratios in relative], dtype=torch.float64), plain)


def latency_calls(candidates: Sequence[Candidate]) -> int:
    """How many timed calls `measure_latency` makes."""
    return (_ROUNDS + 1) * len(candidates)
