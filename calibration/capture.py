"""Profiles the attention calls of a running dense generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.calibration.downstream import Downstream
from dit_accel.calibration.profile import Earlier, profile_call
from dit_accel.calibration.tables import ProfileSums
from dit_accel.candidate import Candidate
from dit_accel.evaluation.timing import now
from dit_accel.state import AccelState

_QUERY_BLOCKS = 4  # profiled in each call; the ranges of a plan sum up several calls
_GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly, so calls sample different query blocks

# once(state, branches, query, key, value, key_mask) of the first call that knows how many guidance branches a step has
Once = Callable[[AccelState, int, Tensor, Tensor, Tensor, Tensor | None], None]


_CONDITIONAL, _UNCONDITIONAL = "cond", "uncond"


def _by_branch(state: AccelState, query: Tensor, *others: Tensor | None) -> Iterator[tuple[str, list[Any]]]:
    """The guidance branches of the running forward, each with its part of the tensors' batch."""
    half = query.shape[0] // 2
    parts = {state.branch: slice(None)}
    if state.paired:
        parts = {_CONDITIONAL: slice(half, None), _UNCONDITIONAL: slice(half)}
    for branch, part in parts.items():
        yield branch, [None if x is None else x[part] for x in (query, *others)]


class Recorder:
    """Profiles what the attention calls of a pipeline's transformers see during one dense generation.

    Where one batch holds both guidance branches each half is profiled as a branch, the conditional one first, which is
    how attention serves them.

    Attributes:
        sums: profiles by guidance branch.
        progress: of every denoising step so far.
        forwards: of a step, at most.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        sampled: Mapping[int, int],
        layers: int,
        steps: int,
        *,
        once: Once | None = None,
        downstream: bool = True,
        share: int = 0,
        seed: int = 0,
    ) -> None:
        self.sums: dict[str, ProfileSums] = {}
        self.progress: list[float] = []
        self.forwards = 1
        self._seconds = 0.0
        self._candidates = candidates
        self._sampled = sampled
        self._layers = layers
        self._steps = steps
        self._once = once
        self._downstream = downstream
        self._share = share
        self._seed = seed
        self._errors: dict[int, Tensor] = {}  # by layer, of the first branch of the running step
        self._earlier: dict[tuple[int, int], Earlier] = {}  # by expert and layer
        self._branches: list[str] = []  # of the running step, in the order of their forwards
        self._branches_before = 1
        self._probing = False
        self._probes: list[Downstream] = []

    @property
    def spent(self) -> float:
        """Seconds spent here so far instead of generating."""
        return self._seconds + sum(probe.seconds for probe in self._probes)

    @contextmanager
    def attached(self, state: AccelState, transformer: nn.Module) -> Iterator[None]:
        """Listens to the calls of a transformer. A pipeline's experts share one recorder.

        With `downstream` one forward of each sampled step is sent a gradient through, and its calls are profiled on
        the way back, when the gradient is known too. The prompts, of which this is number `share`, take turns in the
        guidance branch, but for the very first step, where it is not known yet that there are several.
        """
        state.capture = functools.partial(self._call, state)
        if not self._downstream:
            yield
            return
        probe = Downstream(state, self._layers, self._is_probed, self._profile, self._seed)
        self._probes.append(probe)
        with probe.watching(transformer):
            yield

    def _is_probed(self, state: AccelState) -> bool:
        sampled = self._span(state) is not None
        turn = self._share % self._branches_before
        self._probing = sampled and state.branch == self._branches[min(turn, len(self._branches) - 1)]
        self._probing &= len(self._branches) == turn + 1
        return self._probing

    def _span(self, state: AccelState) -> int | None:
        """The span of steps that the running forward is profiled for."""
        if not self.progress or self.progress[-1] != state.progress:
            self._branches_before, self._branches = max(len(self._branches), 1), []
            self.progress.append(state.progress)
            self._errors.clear()
            for earlier in self._earlier.values():
                earlier.chosen = None
            if len(self.progress) > max(self._sampled, default=-1) + 1:
                self._earlier.clear()  # large, and nobody will ask again
        if state.branch not in self._branches:
            self._branches.append(state.branch)
            self.forwards = max(self.forwards, len(self._branches))
        return self._sampled.get(len(self.progress) - 1)

    def _call(
        self,
        state: AccelState,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
    ) -> None:
        span = self._span(state)
        timed = self._once is not None and len(self.progress) == min(2, self._steps)
        if span is None and not timed and len(self.progress) not in self._sampled:
            return  # without waiting for the device
        start = now(query.device)
        if timed and self._once is not None:
            self._once(state, self._branches_before, query, key, value, key_mask)
            self._once = None
        if span is None:
            for branch, tensors in _by_branch(state, query, key, value, key_mask):
                self._observe(state, branch, layer, *tensors)
        elif not self._probing:
            self._profile(state, layer, query, key, value, key_mask, None)
        self._seconds += now(query.device) - start

    def _profile(
        self,
        state: AccelState,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        gradient: Tensor | None,
    ) -> None:
        for branch, tensors in _by_branch(state, query, key, value, key_mask, gradient):
            self._profile_branch(state, branch, layer, *tensors)

    def _profile_branch(
        self,
        state: AccelState,
        branch: str,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        gradient: Tensor | None,
    ) -> None:
        if state.grid is None:
            raise RuntimeError(
                "the token grid is unknown during profiling; set AccelState.capture before generating"
            )
        if branch not in self.sums:
            spans = max(self._sampled.values()) + 1
            self.sums[branch] = ProfileSums.zeros(spans, self._layers, query.shape[2], len(self._candidates))
        # In the first step a run does not know either whether another branch will come.
        earlier = self._earlier_of(state, layer) if state.paired or len(self.progress) > 1 else None
        with torch.no_grad():
            call = profile_call(
                query,
                key,
                value,
                state.grid,
                self._candidates,
                block=state.plan.block,
                query_blocks=_QUERY_BLOCKS,
                # Alike in all branches of a step, whose errors are compared.
                phase=(len(self.progress) * self._layers + layer) * _GOLDEN % 1.0,
                key_mask=key_mask,
                gradient=gradient,
                earlier=earlier,
                branch=branch,
            )
        first = self._errors.get(layer)
        if first is None:
            self._errors[layer] = call.errors
        self.sums[branch].add_call(self._sampled[len(self.progress) - 1], layer, call, gradient, first)
        self._observe(state, branch, layer, query, key, value, key_mask)

    def _observe(
        self,
        state: AccelState,
        branch: str,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
    ) -> None:
        """Notes what a running plan would remember of this call in the next step, if that one is profiled."""
        if len(self.progress) not in self._sampled or state.grid is None:
            return
        with torch.no_grad():
            self._earlier_of(state, layer).observe(
                query,
                key,
                value,
                state.grid,
                self._candidates,
                branch=branch,
                first=branch == (_CONDITIONAL if state.paired else self._branches[0]),
                block=state.plan.block,
                key_mask=key_mask,
            )

    def _earlier_of(self, state: AccelState, layer: int) -> Earlier:
        return self._earlier.setdefault((id(state), layer), Earlier())
