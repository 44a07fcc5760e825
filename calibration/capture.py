"""Profiles the attention calls of a running dense generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dit_accel.calibration.downstream import Downstream
from dit_accel.calibration.profile import profile_call
from dit_accel.calibration.tables import ProfileSums
from dit_accel.evaluation.timing import now
from dit_accel.plan import Candidate
from dit_accel.state import AccelState

_GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly, so calls sample different query blocks

# first_call(state, query, key, value, key_mask) of the generation
FirstCall = Callable[[AccelState, Tensor, Tensor, Tensor, Tensor | None], None]


class Recorder:
    """Profiles what the attention calls of a pipeline's transformers see during one dense generation.

    Attributes:
        sums: profiles by guidance branch.
        progress: of every denoising step so far.
        seconds: time spent here instead of generating.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        sampled: Mapping[int, int],
        layers: int,
        *,
        first_call: FirstCall | None = None,
        downstream: bool = True,
        share: int = 0,
        seed: int = 0,
    ) -> None:
        self.sums: dict[str, ProfileSums] = {}
        self.progress: list[float] = []
        self.seconds = 0.0
        self._candidates = candidates
        self._sampled = sampled
        self._layers = layers
        self._first_call = first_call
        self._downstream = downstream
        self._share = share
        self._seed = seed
        self._calls = 0
        self._branches: list[str] = []  # of the running step, in the order of their forwards
        self._branches_before = 1
        self._probing = False

    @contextmanager
    def attached(self, state: AccelState, transformer: nn.Module) -> Iterator[None]:
        """Listens to the calls of a transformer. A pipeline's experts share one recorder.

        With `downstream` one forward of each sampled step is sent a gradient through, and its calls are profiled on
        the way back, when the gradient is known too. The prompts, of which this is number `share`, take turns in the
        guidance branch.
        """
        state.capture = functools.partial(self._call, state)
        if not self._downstream:
            yield
            return
        probe = Downstream(state, self._layers, self._is_probed, self._profile, self._seed)
        with probe.watching(transformer):
            yield
        self.seconds += probe.seconds

    def _is_probed(self, state: AccelState) -> bool:
        sampled = self._range(state) is not None
        if state.branch not in self._branches:
            self._branches.append(state.branch)
        turn = self._share % self._branches_before
        self._probing = sampled and state.branch == self._branches[min(turn, len(self._branches) - 1)]
        self._probing &= len(self._branches) == turn + 1
        return self._probing

    def _range(self, state: AccelState) -> int | None:
        """The range that the running forward is profiled for."""
        if not self.progress or self.progress[-1] != state.progress:
            self._branches_before, self._branches = max(len(self._branches), 1), []
            self.progress.append(state.progress)
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
        start = now(query.device)
        if self._first_call is not None:
            self._first_call(state, query, key, value, key_mask)
            self._first_call = None
        if self._range(state) is not None and not self._probing:
            self._profile(state, layer, query, key, value, key_mask, None)
        self.seconds += now(query.device) - start

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
        if state.grid is None:
            raise RuntimeError(
                "the token grid is unknown during profiling; set AccelState.capture before generating"
            )
        if state.branch not in self.sums:
            ranges = max(self._sampled.values()) + 1
            self.sums[state.branch] = ProfileSums.zeros(
                ranges, self._layers, query.shape[2], len(self._candidates)
            )
        with torch.no_grad():
            call = profile_call(
                query,
                key,
                value,
                state.grid,
                self._candidates,
                block=state.plan.block,
                phase=self._calls * _GOLDEN % 1.0,
                key_mask=key_mask,
                gradient=gradient,
            )
        self._calls += 1
        self.sums[state.branch].add_call(self._sampled[len(self.progress) - 1], layer, call, gradient)
