"""What to skip between denoising steps, and how to bridge it: one frozen description, part of a plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["GATES", "CacheConfig", "Schedule", "Term"]

# What each gate looks at: nothing but the step, the input of the transformer or of its first block, or the output of
# its first blocks.
GATES = {
    "schedule": "step",
    "always": "step",
    "magcache": "step",
    "easycache": "latents",
    "teacache": "input",
    "first-block": "head",
    "cg-taylor": "head",
}
TARGETS = ("blocks", "output")
MAX_ORDER = 3


@dataclass(frozen=True)
class Term:
    """One summand of a forecast: `weight` times the output of `branch` at `step`, or times the latents of the step
    itself where `branch` is "latents"."""

    branch: str
    step: int
    weight: float


@dataclass(frozen=True)
class Schedule:
    """Which forwards of a generation are not computed, and what stands for their output.

    Attributes:
        steps: denoising steps that it was made for; others read it by their place between the first and the last.
        forecasts: by guidance branch and step, the terms whose sum is the output.
    """

    steps: int
    forecasts: Mapping[str, Mapping[int, tuple[Term, ...]]]

    def __post_init__(self) -> None:
        for branch, steps in self.forecasts.items():
            for step, terms in steps.items():
                where = f"schedule: forecasts of {branch!r} at step {step}"
                if not 0 <= step < self.steps:
                    raise ValueError(f"{where}: expected a step from 0 to {self.steps - 1}")
                if not terms:
                    raise ValueError(f"{where}: expected at least one term, got none")
                for term in terms:
                    forecast = term.step in self.forecasts.get(term.branch, {})
                    if term.branch != "latents" and (forecast or not 0 <= term.step <= step):
                        raise ValueError(
                            f"{where}: expected terms of computed forwards up to that step, got {term.branch!r} at "
                            f"step {term.step}"
                        )

    def skips(self, branch: str, step: int, steps: int) -> bool:
        """Whether a branch skips a step of a generation with `steps` steps, by the nearest step of its own."""
        return self.nearest(step, steps) in self.forecasts.get(branch, {})

    def nearest(self, step: int, steps: int) -> int:
        """The step of the schedule at the place of a step of a generation with `steps` steps."""
        return step if steps == self.steps else round(step * (self.steps - 1) / max(steps - 1, 1))

    @functools.cached_property
    def last_read(self) -> dict[tuple[str, int], int]:
        """Computed forwards (branch, step) that forecasts read, with the last step that does."""
        found: dict[tuple[str, int], int] = {}
        for steps in self.forecasts.values():
            for step, terms in steps.items():
                for term in terms:
                    if term.branch != "latents":
                        key = term.branch, term.step
                        found[key] = max(step, found.get(key, step))
        return found

    @property
    def most_held(self) -> int:
        """Most outputs that a generation keeps at a time."""
        spans = [(step, last) for (_, step), last in self.last_read.items()]
        return max((sum(start <= at <= last for start, last in spans) for at in range(self.steps)), default=0)

    def reach(self, branch: str, step: int) -> int:
        """Steps of the run of forecasts that a step of a branch lies in; none where the step is computed."""
        steps = self.forecasts.get(branch, {})
        if step not in steps:
            return 0
        before = next(gap for gap in range(1, step + 2) if step - gap not in steps)
        after = next(gap for gap in itertools.count(1) if step + gap not in steps)
        return before + after - 1

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as JSON values."""
        forecasts = {
            branch: {
                str(step): [[term.branch, term.step, term.weight] for term in terms]
                for step, terms in sorted(steps.items())
            }
            for branch, steps in sorted(self.forecasts.items())
        }
        return {"steps": self.steps, "forecasts": forecasts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """Build a schedule from what `to_dict` gave.

        Raises:
            ValueError: keys that are missing or too many, or values that make no schedule.
        """
        if set(values) != {"steps", "forecasts"}:
            raise ValueError(f"schedule: expected the keys forecasts and steps, got {sorted(values)}")
        forecasts = {
            branch: {int(step): tuple(Term(*term) for term in terms) for step, terms in steps.items()}
            for branch, steps in values["forecasts"].items()
        }
        return cls(values["steps"], forecasts)


@dataclass(frozen=True)
class CacheConfig:
    """Feature caching of one plan.

    A *gate* decides at every step whether the transformer is computed, a *forecast* stands for it where it is not. Both
    branches of guidance follow one decision, a schedule apart, which has its own for each.

    Attributes:
        gate: "schedule" follows `schedule`; "always" skips whenever `warm_up`, `cool_down` and `max_skips` allow it, so
            that with `max_skips` n every (n+1)-th step is computed; the others compare a signal with `threshold`, see
            `dit_accel.caching.gates`.
        threshold: of the gate's signal, without unit; 0 computes every step.
        target: what is forecast: "blocks", the hidden states after the last skipped block, or "output", what the
            transformer returns, which is as small as the latents.
        residual: forecast the difference to the input of the skipped part, and add that input.
        order: degree of the polynomial in the step number through the last `order + 1` computed values; 0 repeats the
            last one.
        first_blocks, last_blocks: blocks that run at every step, before and after the skipped part.
        warm_up, cool_down: steps computed at the start and at the end of a generation, at least 1 each; a warm-up below
            1 is a share of the steps. A schedule has its own.
        max_skips: most steps skipped in a row; a schedule has its own.
        min_steps: generations with fewer steps are left alone.
        gate_order: degree of the forecast of the head, gate "cg-taylor".
        polynomial: coefficients, highest power first, from the change of the signal to the change of the output, gate
            "teacache".
        curve: mean ratio of the norms of successive residuals at each step, gate "magcache".
        schedule: of the gate "schedule".

    Raises:
        ValueError: a field that makes no sense, or fields that do not go together.
    """

    gate: str
    threshold: float = 0.0
    target: str = "blocks"
    residual: bool = False
    order: int = 0
    first_blocks: int = 0
    last_blocks: int = 0
    warm_up: int | float = 1
    cool_down: int = 1
    max_skips: int = 3
    min_steps: int = 11
    gate_order: int = 1
    polynomial: tuple[float, ...] = ()
    curve: tuple[float, ...] = ()
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"gate: expected one of {', '.join(GATES)}, got {self.gate!r}")
        if self.target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {self.target!r}")
        numbers = (
            ("order", 0, MAX_ORDER),
            ("gate_order", 0, MAX_ORDER),
            ("first_blocks", 0, None),
            ("last_blocks", 0, None),
            ("cool_down", 1, None),
            ("max_skips", 1, None),
            ("min_steps", 2, None),
        )
        for name, low, high in numbers:
            value = getattr(self, name)
            if type(value) is not int or value < low or (high is not None and value > high):
                expected = f"an integer from {low}" + ("" if high is None else f" to {high}")
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        for name in ("polynomial", "curve"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not all(isinstance(x, int | float) for x in value):
                raise ValueError(f"{name}: expected numbers in a tuple, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        whole, share = type(self.warm_up) is int, type(self.warm_up) is float
        if not (whole and self.warm_up >= 1) and not (share and 0 < self.warm_up < 1):
            raise ValueError(
                f"warm_up: expected an integer from 1, or a share of the steps between 0 and 1, got {self.warm_up!r}"
            )
        if (
            isinstance(self.threshold, bool)
            or not isinstance(self.threshold, int | float)
            or self.threshold < 0
        ):
            raise ValueError(f"threshold: expected a number from 0, got {self.threshold!r}")
        if type(self.residual) is not bool:
            raise ValueError(f"residual: expected true or false, got {self.residual!r}")
        if GATES[self.gate] == "head" and not self.first_blocks:
            raise ValueError(
                f"first_blocks: expected at least 1 for gate {self.gate!r}, which reads them, got 0"
            )
        if self.target == "output" and self.last_blocks:
            raise ValueError(f"last_blocks: expected 0 for the target 'output', got {self.last_blocks}")
        for name, gate in (("polynomial", "teacache"), ("curve", "magcache")):
            value = getattr(self, name)
            if bool(value) != (self.gate == gate):
                remedy = "; dit_accel.calibration.measure_cache measures it" if self.gate == gate else ""
                expected = "numbers" if self.gate == gate else "none"
                raise ValueError(f"{name}: expected {expected} for gate {self.gate!r}, got {value!r}{remedy}")
        if (self.schedule is not None) != (self.gate == "schedule"):
            expected = "a Schedule" if self.gate == "schedule" else "none"
            raise ValueError(f"schedule: expected {expected} for gate {self.gate!r}, got {self.schedule!r}")
        if self.schedule is not None and self.target != "output":
            raise ValueError(
                f"target: expected 'output' for gate 'schedule', which forecasts outputs, got {self.target!r}"
            )

    def first_choice(self, steps: int) -> int:
        """The first of `steps` steps that a gate may skip."""
        return max(1, int(self.warm_up * steps)) if self.warm_up < 1 else int(self.warm_up)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values, those at their default left out."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name == "gate" or getattr(self, field.name) != field.default
        }
        if self.schedule is not None:
            values["schedule"] = self.schedule.to_dict()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CacheConfig:
        """Build a configuration from what `to_dict` gave.

        Raises:
            ValueError: an unknown field or a value that makes no configuration.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not set(values) <= known or "gate" not in values:
            raise ValueError(f"expected the keys gate and any of {sorted(known)}, got {sorted(values)}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if values.get("schedule") is not None:
            values["schedule"] = Schedule.from_dict(values["schedule"])
        return cls(**values)
