"""Whether a step may be skipped: one small object per gate and generation.

Each sees every step of the branch that decides (the first one of each step) in order. `skip` is asked only where the
plan's warm-up, cool-down and limits leave a choice; `computed` is told of every step that was computed. Except for
"always" and "magcache", a gate reads one number from the device per step; a calibrated schedule needs none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.caching.config import CacheConfig
from dit_accel.caching.forecast import History

__all__ = ["Gate", "gate_of"]


class Gate:
    """Skips whatever it is asked about: the gate "always"."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config

    def skip(self, step: int, steps: int, signal: Tensor | None) -> bool:
        """Whether step `step` of `steps` may be skipped; `signal` is what `GATES` says that the gate looks at."""
        return True

    def computed(self, step: int, steps: int, signal: Tensor | None, output: Tensor) -> None:
        """Take note of a step that was computed, and of the transformer's output."""

    @property
    def bytes(self) -> int:
        """Memory of the tensors that it keeps."""
        kept = vars(self).values()
        tensors = {id(part): part for part in kept if isinstance(part, Tensor)}.values()
        histories = sum(part.bytes for part in kept if isinstance(part, History))
        return histories + sum(part.numel() * part.element_size() for part in tensors)


class MagCache(Gate):
    """Skips while the product of the measured norm ratios since the last computed step stays near 1.

    MagCache, arXiv 2506.09045: with Γ the product, the sum of |1 − Γ| over the skipped steps must stay below the
    threshold.
    """

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self._ratio, self._error = 1.0, 0.0

    def skip(self, step: int, steps: int, signal: Tensor | None) -> bool:
        curve = self.config.curve
        # A curve measured at another number of steps is read at the same place between first and last.
        self._ratio *= curve[round(step * (len(curve) - 1) / max(steps - 1, 1))]
        self._error += abs(1.0 - self._ratio)
        return self._error < self.config.threshold

    def computed(self, step: int, steps: int, signal: Tensor | None, output: Tensor) -> None:
        self._ratio, self._error = 1.0, 0.0


def _known(signal: Tensor | None) -> Tensor:
    """What a gate looks at, of this step or of the one before; the runtime hands it to every gate that asks for it.

    Raises:
        RuntimeError: it did not.
    """
    if signal is None:
        raise RuntimeError("a gate was asked before it was given what it looks at")
    return signal


class TeaCache(Gate):
    """Skips while the accumulated estimate of the output's change stays below the threshold.

    TeaCache, arXiv 2411.19108: the estimate is a polynomial of the relative L1 change of the first block's modulated
    input from one step to the next.
    """

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self._last: Tensor | None = None
        self._sum = 0.0

    def skip(self, step: int, steps: int, signal: Tensor | None) -> bool:
        signal = _known(signal)
        change, estimate = relative_l1(signal, _known(self._last)), 0.0
        for coefficient in self.config.polynomial:
            estimate = estimate * change + coefficient
        self._sum += max(estimate, 0.0)
        if self._sum < self.config.threshold:
            self._last = signal
            return True
        return False

    def computed(self, step: int, steps: int, signal: Tensor | None, output: Tensor) -> None:
        self._last, self._sum = signal, 0.0


class EasyCache(Gate):
    """Skips while the expected change of the velocity, summed since the last computed step, stays below the threshold.

    EasyCache, arXiv 2507.02860: the change of the velocity is taken as k times that of the latents, k from the last two
    computed steps.
    """

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self._seen: Tensor | None = None  # the latents of the last step
        self._input: Tensor | None = None  # the latents and velocity of the last computed one
        self._output: Tensor | None = None
        self._rate: float | None = None
        self._sum = 0.0

    def skip(self, step: int, steps: int, signal: Tensor | None) -> bool:
        signal = _known(signal)
        if self._rate is None or self._seen is None or self._output is None:
            return False
        change = float((signal.float() - self._seen.float()).abs().mean() / self._output.float().abs().mean())
        self._sum += self._rate * change
        if self._sum < self.config.threshold:
            self._seen = signal
            return True
        return False

    def computed(self, step: int, steps: int, signal: Tensor | None, output: Tensor) -> None:
        signal = _known(signal)
        if self._input is not None and self._output is not None:
            moved = (signal.float() - self._input.float()).abs().mean().clamp(min=1e-12)
            self._rate = float((output.float() - self._output.float()).abs().mean() / moved)
        self._seen = self._input = signal
        self._output, self._sum = output, 0.0


class FirstBlock(Gate):
    """Skips where the residual of the head is like that of the last computed step, by relative L1.

    First Block Cache of ParaAttention and diffusers; with more head blocks and some at the end, DBCache of cache-dit.
    """

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self._last: Tensor | None = None

    def skip(self, step: int, steps: int, signal: Tensor | None) -> bool:
        return relative_l1(_known(signal), _known(self._last)) < self.config.threshold

    def computed(self, step: int, steps: int, signal: Tensor | None, output: Tensor) -> None:
        self._last = signal


class ConfidenceGatedTaylor(Gate):
    """Skips where the head's own forecast is right: its error tells how far the last block's forecast can be trusted.

    Confidence-gated Taylor forecasting: mean |p − h| ÷ mean |h| of the forecast p of the head's output h, made from the
    computed steps.
    """

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self._history = History(config.gate_order + 1)

    def skip(self, step: int, steps: int, signal: Tensor | None) -> bool:
        if not self._history.steps:
            return False
        return relative_l1(self._history.forecast(step)[0], _known(signal)) < self.config.threshold

    def computed(self, step: int, steps: int, signal: Tensor | None, output: Tensor) -> None:
        self._history.push(step, (_known(signal),))


_CLASSES: dict[str, type[Gate]] = {
    "schedule": Gate,
    "always": Gate,
    "magcache": MagCache,
    "teacache": TeaCache,
    "easycache": EasyCache,
    "first-block": FirstBlock,
    "cg-taylor": ConfidenceGatedTaylor,
}


def gate_of(config: CacheConfig) -> Gate:
    """A fresh gate for one generation."""
    return _CLASSES[config.gate](config)


def relative_l1(value: Tensor, reference: Tensor) -> float:
    """mean |value − reference| ÷ mean |reference|, from the device; unlike tensors differ by infinity."""
    if value.shape != reference.shape:
        return float("inf")
    difference = (value.float() - reference.float()).abs().mean()
    return float(difference / reference.float().abs().mean().clamp(min=1e-12))


def polynomial_fit(changes: Sequence[float], outcomes: Sequence[float], degree: int = 4) -> tuple[float, ...]:
    """Least-squares coefficients, highest power first, of the outcomes as a polynomial of the changes."""
    powers = torch.tensor(changes, dtype=torch.float64)[:, None] ** torch.arange(degree, -1, -1)
    solution = torch.linalg.lstsq(
        powers, torch.tensor(outcomes, dtype=torch.float64)[:, None], driver="gelsd"
    )
    return tuple(solution.solution[:, 0].tolist())
