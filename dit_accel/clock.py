"""Which generation a pipeline runs, and where its steps are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Clock"]

_ROUNDED = 2.0**-8  # of progress: what bfloat16 leaves of a timestep
_STANDS_STILL = (
    3  # steps of a transformer during which a scheduler that is not stepped is taken for another's
)


class Clock:
    """Tells the generations of one pipeline apart, for all of its transformers.

    A generation begins with `scheduler.set_timesteps`, which makes a new tensor. Timesteps themselves cannot tell: the
    second step may round to the first one's, and the second expert of Wan 2.2 never sees the first steps.

    Attributes:
        memory: what the transformers share for one generation.
        on_new: called when another generation begins, before any of its forwards.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._timesteps: Tensor | None = None
        self._progress: list[float] | None = None
        self._values: list[float] | None = None
        self.memory: dict[str, Any] = {}
        self.on_new: list[Callable[[], None]] = []

    def forget(self) -> None:
        """A generation is over: whatever comes next is another one."""
        self._timesteps, self._progress, self._values, self.memory = None, None, None, {}

    def generation(self) -> Tensor | None:
        """The timesteps of the running generation, the same object throughout it; None without a scheduler."""
        timesteps = getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)
        if timesteps is not self._timesteps:
            self.forget()
            self._timesteps = timesteps
            for forget in self.on_new:
                forget()
        return timesteps

    def value_of(self, timestep: Any) -> float | None:
        """The value of a timestep that is an element of the scheduler's tensor, possibly expanded; None for others.

        Which element it is shows from where it lies in memory. To read it from a device would have the host wait.
        """
        timesteps = self.generation()
        if not isinstance(timestep, Tensor) or not isinstance(timesteps, Tensor) or timesteps.ndim != 1:
            return None
        if timestep.dtype != timesteps.dtype or not timestep.numel():
            return None
        if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
            return None
        if any(size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
            return None
        offset = int(timestep.storage_offset()) - int(timesteps.storage_offset())
        places, rest = divmod(offset, max(int(timesteps.stride(0)), 1))
        if rest or not 0 <= places < len(timesteps):
            return None
        if self._values is None:
            self._values = timesteps.tolist()
        return self._values[places]

    def step_index(self) -> int | None:
        """How often the scheduler has stepped in this generation, as far as it tells."""
        return getattr(getattr(self._pipe, "scheduler", None), "step_index", None)

    def stands_still(self, progress: float) -> bool:
        """Whether forwards went on, the one at `progress` included, while the scheduler did not: it is not theirs."""
        if not hasattr(getattr(self._pipe, "scheduler", None), "step_index"):
            return False
        first, seen = self.memory.setdefault("seen", (self.step_index(), set()))
        seen.add(progress)
        return len(seen) >= _STANDS_STILL and self.step_index() == first

    def progress(self) -> list[float]:
        """Progress of every step that the scheduler has for this generation, see `ModelFamily.progress`.

        Raises:
            ValueError: the pipeline has no scheduler.
        """
        if self.generation() is None:
            raise ValueError(
                f"pipe: expected a scheduler with timesteps, which a cache of steps needs, got "
                f"{type(self._pipe).__name__} without; set them, or use a plan without a cache"
            )
        timesteps = torch.as_tensor(self.generation())
        if self._progress is None:
            train = self._pipe.scheduler.config.num_train_timesteps
            self._progress = (1.0 - timesteps.double() / train).tolist()
        return self._progress

    def unrounded(self, progress: float) -> float:
        """That of the scheduler's step where it is the same but for rounding: pipelines hand on 16-bit timesteps."""
        if self.generation() is None:
            return progress
        scheduler = self._pipe.scheduler
        index = self.step_index()
        index = (getattr(scheduler, "begin_index", None) or 0) if index is None else index
        of_steps = self.progress()
        exact = of_steps[index] if 0 <= index < len(of_steps) else math.inf
        return exact if abs(exact - progress) <= _ROUNDED else progress
