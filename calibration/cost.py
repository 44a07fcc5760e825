"""Measured latency of every candidate on this device at the real shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from dit_accel.attention import attend
from dit_accel.bench.timing import milliseconds
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.patterns import FAMILIES
from dit_accel.patterns.base import SHARED

_ROUNDS = 3
_CANDIDATES_PER_REFERENCE = 12


@dataclass(frozen=True, eq=False)
class Latency:
    """Milliseconds.

    candidates: float64, of a head in the sparse launch, by candidate; plain: of a head on the original path; split:
    what a layer takes longer if its heads need a second launch, for another precision.
    """

    candidates: Tensor
    plain: float
    split: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the milliseconds as JSON values."""
        return {"dense": self.plain, "split": self.split, "candidates": self.candidates.tolist()}


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
    branches: int = 1,
    paired: bool = False,
    on_call: Callable[[], object] | None = None,
) -> Latency:
    """Times one attention call of `[batch, seq, heads, dim]` with all heads on each candidate, selection
    included.

    Dynamic families find what a step before left them, as in the middle of a generation, and choose anew: what the
    option `reuse` saves is not counted. One that chooses once for all guidance branches is timed over all of them, one
    that rebuilds its blocks every few steps in a step that does and in one that does not.
    Every few calls the original attention is timed too, and candidates are taken relative to it, so that a machine that
    slows down half-way does not favour the candidates measured first. Median of three rounds after one warm-up; on a
    GPU of the device's own time.

    Args:
        original: the attention that an all-dense layer runs.
        branches: of guidance that run one after the other in a step.
        paired: see `attend`.
        on_call: called after each timed candidate, `latency_calls(candidates)` times in all.
    """
    heads = query.shape[2]
    kinds = _kinds(candidates)
    layer = _Layer(query, key, value, grid, _fresh(kinds), block, key_mask, backend, branches, paired)
    caches = [_memory() for _ in kinds]
    relative: list[list[float]] = [[] for _ in kinds]
    references: list[float] = []
    for round_number in range(_ROUNDS + 1):
        for number in range(len(kinds)):
            if number % _CANDIDATES_PER_REFERENCE == 0:
                reference = milliseconds(lambda: original(query, key, value), query.device)
            taken = layer.over_steps([number], caches[number], round_number)
            if round_number > 0:
                references.append(reference)
                relative[number].append(taken / reference)
            if on_call is not None:
                on_call()
    plain = median(references) / heads
    of_kinds = torch.tensor([plain * median(ratios) for ratios in relative], dtype=torch.float64)
    found = of_kinds[[kinds.index(_kind(candidate)) for candidate in candidates]]
    pair = _in_two_precisions(kinds)
    if pair is None or heads < 2:
        return Latency(found, plain)
    row = [pair[head % 2] for head in range(heads)]
    alone = float(of_kinds[row].sum())
    return Latency(found, plain, max(0.0, layer.milliseconds(row) - alone))


def measure_layers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    candidates: Sequence[Candidate],
    rows: Sequence[Sequence[int]],
    *,
    block: int = 64,
    key_mask: Tensor | None = None,
    backend: str = "auto",
    branches: int = 1,
    paired: bool = False,
) -> list[float]:
    """Milliseconds of a layer whose heads have the candidates of a row, for each row; as `measure_latency` else.

    What the sum over the heads of their own latencies is checked with.
    """
    layer = _Layer(query, key, value, grid, _fresh(candidates), block, key_mask, backend, branches, paired)
    return [layer.milliseconds(list(row)) for row in rows]


@dataclass(frozen=True, eq=False)
class _Layer:
    """Times a layer on the tensors of one call, as in the middle of a generation."""

    query: Tensor
    key: Tensor
    value: Tensor
    grid: TokenGrid
    candidates: Sequence[Candidate]
    block: int
    key_mask: Tensor | None
    backend: str
    branches: int
    paired: bool

    def milliseconds(self, row: list[int]) -> float:
        """Of a call: median of three rounds after one."""
        kept = _memory()
        return median([self.over_steps(row, kept, number) for number in range(_ROUNDS + 1)][1:])

    def over_steps(self, row: list[int], kept: dict[str, dict[Any, Any]], round_number: int) -> float:
        """Milliseconds of a call, mean over the steps from one rebuilding to the next."""
        every = max(int(_options(self.candidates[number]).get("rebuild", 1)) for number in row)
        built = self._over_branches(row, kept, round_number * every)
        if every == 1:
            return built
        return (built + (every - 1) * self._over_branches(row, kept, round_number * every + 1)) / every

    def _over_branches(self, row: list[int], kept: dict[str, dict[Any, Any]], step: int) -> float:
        """Milliseconds of a call, mean over those of a step."""
        shared = any(("branches", SHARED) in self.candidates[number].options for number in row)
        turns = range(self.branches if shared else 1)
        taken = fmean(
            milliseconds(partial(self._call, row, kept, step, turn), self.query.device) for turn in turns
        )
        # Lists of a step that is over: those of all candidates together would not fit beside a large model.
        for memories in kept["patterns"].values():
            for memory in memories.values():
                memory.pop("selection", None)
        return taken

    def _call(self, row: list[int], kept: dict[str, dict[Any, Any]], step: int, branch: int) -> object:
        return attend(
            self.query,
            self.key,
            self.value,
            self.grid,
            self.candidates,
            row,
            block=self.block,
            key_mask=self.key_mask,
            backend=self.backend,
            layer=0,
            branch=str(branch),
            step=step,
            paired=self.paired,
            cache=kept["patterns"],
            launches=kept["launches"],
        )


def _options(candidate: Candidate) -> dict[str, Any]:
    return FAMILIES[candidate.family].with_defaults(dict(candidate.options))


def _fresh(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that choose anew in every step."""
    return [replace(c, options=tuple(o for o in c.options if o[0] != "reuse")) for c in candidates]


def _memory() -> dict[str, dict[Any, Any]]:
    """What a generation keeps from step to step."""
    return {"patterns": {}, "launches": {}}


def _kind(candidate: Candidate) -> Candidate:
    """One that takes as long, whatever its means weigh."""
    return replace(candidate, remainder=bool(candidate.remainder))


def _kinds(candidates: Sequence[Candidate]) -> list[Candidate]:
    return list(dict.fromkeys(map(_kind, candidates)))


def _in_two_precisions(candidates: Sequence[Candidate]) -> tuple[int, int] | None:
    """Numbers of two candidates that differ in precision alone and leave something out, None if there are none."""
    native = {c: number for number, c in enumerate(candidates) if c.precision == "native"}
    for number, candidate in enumerate(candidates):
        twin = replace(candidate, precision="native")
        if candidate.precision != "native" and candidate.family != "dense" and twin in native:
            return native[twin], number
    return None


def latency_calls(candidates: Sequence[Candidate]) -> int:
    """How many timed calls `measure_latency` makes."""
    return (_ROUNDS + 1) * len(_kinds(candidates))
