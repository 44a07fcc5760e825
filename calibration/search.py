"""Finds the plan that meets a quality target with few generations.

Qualities are in dB, see `goals`. Over the useful range they fall almost linearly with the logarithm of the plan's
predicted error, at a slope that all prompts share and a height that differs between them. Each generation adds
one point to that line, whatever its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from dit_accel.calibration.offers import Offer, Pick, most_faithful, pick_for_error
from dit_accel.evaluation.metrics import PSNR_CEILING_DB

TOLERANCE_DB = 0.5  # a plan may exceed the target by this much before a faster one is looked for
_AIM_DB = TOLERANCE_DB / 2
QUOTED_DB = 0.05  # less is met: 29.95 dB is told as 30.0
_LARGEST_MOVE = 1.0  # decades of error beyond the points measured so far

# What is believed before the first generation, as (mean, standard deviation).
_HEIGHT_DB = (6.5, 8.0)  # the demo model's, at two sizes
_SLOPE_DB = (10.0, 3.0)  # per decade of squared error; 10 is an error that reaches the frames unchanged
_PROMPT_DB = (0.0, 2.0)
_KIND_DB = (-0.9, 2.0)  # plans that leave out steps, against others at the same predicted error; the demo's
# A line describes the curve only near the target, so points far from it say less.
_MISFIT_DB, _MISFIT_PER_DB = 0.15, 0.15


@dataclass(frozen=True)
class Trial:
    """One generation: `plan` names the plan, `log_error` is log10 of its predicted error, `steps` whether it leaves out
    any."""

    plan: str
    prompt: int
    log_error: float
    quality: float
    steps: bool = False


class Line:
    """The lines fitted to trials, one for plans that leave out steps and one for others, of one slope.

    By least squares with the prior beliefs above.
    """

    def __init__(self, trials: Sequence[Trial], prompts: int, target: float) -> None:
        unknowns = 3 + prompts
        rows, values = [], []

        def observe(coefficients: dict[int, float], value: float, deviation: float) -> None:
            row = np.zeros(unknowns)
            row[list(coefficients)] = list(coefficients.values())
            rows.append(row / deviation)
            values.append(value / deviation)

        observe({0: 1.0}, *_HEIGHT_DB)
        observe({1: 1.0}, *_SLOPE_DB)
        for prompt in range(prompts):
            observe({2 + prompt: 1.0}, *_PROMPT_DB)
        observe({2 + prompts: 1.0}, *_KIND_DB)
        for trial in trials:
            misfit = _MISFIT_DB + _MISFIT_PER_DB * abs(trial.quality - target)
            point = {0: 1.0, 1: -trial.log_error, 2 + trial.prompt: 1.0, 2 + prompts: float(trial.steps)}
            observe(point, trial.quality, misfit)
        solution = np.linalg.lstsq(np.stack(rows), np.array(values), rcond=None)[0]
        self._height, self._slope = float(solution[0]), max(float(solution[1]), 1.0)
        self._offsets = [float(offset) for offset in solution[2:-1]]
        self._steps = float(solution[-1])

    def quality(self, prompt: int, log_error: float, steps: bool) -> float:
        """Expected quality in dB of one prompt with a plan that leaves out steps, or with one that does not."""
        return self._height + self._offsets[prompt] + steps * self._steps - self._slope * log_error

    def log_error(self, quality: float, steps: bool) -> float:
        """The log10 error at which the mean over the prompts is expected to have this quality."""
        height = self._height + float(np.mean(self._offsets)) + steps * self._steps
        return (height - quality) / self._slope


def next_log_error(trials: Sequence[Trial], prompts: int, target: float, steps: bool) -> float:
    """Where to try next: the error expected to land in the middle of the accepted band."""
    wanted = Line(trials, prompts, target).log_error(target + _AIM_DB, steps)
    if not trials:
        return wanted
    tried = [trial.log_error for trial in trials]
    return min(max(wanted, min(tried) - _LARGEST_MOVE), max(tried) + _LARGEST_MOVE)


@dataclass(frozen=True)
class Outcome:
    """What a search found: the plan, its mean quality in dB, and whether that meets the target; all trials run."""

    pick: Pick
    quality: float
    met: bool
    trials: tuple[Trial, ...]


def search(
    offers: Sequence[Offer],
    prompts: int,
    target: float,
    measure: Callable[[Pick, int], float],
    max_trials: int,
    known: Sequence[Trial] = (),
) -> Outcome:
    """Looks for the fastest plan whose mean quality over the prompts is at least `target`.

    Prompts take turns while the error is moved; a plan that should be right is then measured on the others
    too. Ends when a plan measured on every prompt lies in [target, target + TOLERANCE_DB], or after
    `max_trials` generations. What misses the target by less than `QUOTED_DB` meets it.

    Args:
        measure: `measure(pick, prompt)` generates and returns the quality in dB.
        known: trials of other searches over the same dense generations; they say where to begin.
    """
    trials: list[Trial] = []
    picks: dict[str, Pick] = {}
    while len(trials) < max_trials:
        wanted = _unfinished(trials, prompts, target)
        if wanted is None:
            found = _next(offers, [*known, *trials], prompts, target)
            if not trials and found.error == 0.0:
                # Belief alone does not rule out every plan that errs.
                found = most_faithful(offers)
            name = found.name
            picks.setdefault(name, found)
            left = [p for p in range(prompts) if not any((t.plan, t.prompt) == (name, p) for t in trials)]
            if not left:
                break  # the error wanted lies between two neighbouring plans, and both are known
            wanted = name, min(left, key=lambda p: sum(t.prompt == p for t in trials))
        name, prompt = wanted
        error = picks[name].error
        if error == 0.0:
            return Outcome(picks[name], PSNR_CEILING_DB, True, tuple(trials))
        quality = measure(picks[name], prompt)
        trials.append(Trial(name, prompt, math.log10(error), quality, leaves_out_steps(picks[name])))
        values = _measured(trials, name)
        if len(values) == prompts and _in_band(fmean(values.values()), target):
            break
    name = _best(trials, prompts, target)
    quality = _expected(trials, name, prompts, target)
    return Outcome(picks[name], quality, meets(quality, target), tuple(trials))


def meets(quality: float, target: float) -> bool:
    """Whether a quality is at least the target, to the digits that it is told with; both in dB."""
    return quality >= target - QUOTED_DB


def _in_band(quality: float, target: float) -> bool:
    return meets(quality, target) and quality <= target + TOLERANCE_DB


def leaves_out_steps(found: Pick) -> bool:
    """Whether a plan has a schedule."""
    return found.offer.cache is not None


def _next(offers: Sequence[Offer], trials: Sequence[Trial], prompts: int, target: float) -> Pick:
    """The plan to try next: the one that is where the line of its own kind says, else the more faithful one."""
    kinds = sorted({offer.cache is not None for offer in offers})
    found = {
        kind: pick_for_error(offers, 10 ** next_log_error(trials, prompts, target, kind)) for kind in kinds
    }
    fitting = [pick for kind, pick in found.items() if leaves_out_steps(pick) == kind]
    return min(fitting or found.values(), key=lambda pick: pick.cost if fitting else pick.error)


def _best(trials: Sequence[Trial], prompts: int, target: float) -> str:
    """The fastest plan that was measured to meet the target, else is expected to, else the one that comes nearest."""
    good = [trial for trial in trials if meets(_expected(trials, trial.plan, prompts, target), target)]
    measured = [trial for trial in good if len(_measured(trials, trial.plan)) == prompts]
    if measured or good:
        return max(measured or good, key=lambda trial: trial.log_error).plan
    return max(trials, key=lambda trial: _expected(trials, trial.plan, prompts, target)).plan


def _measured(trials: Sequence[Trial], plan: str) -> dict[int, float]:
    return {trial.prompt: trial.quality for trial in trials if trial.plan == plan}


def _expected(trials: Sequence[Trial], plan: str, prompts: int, target: float) -> float:
    """Mean quality of a plan; prompts it was not tried on are read off the line."""
    line = Line(trials, prompts, target)
    at = next(trial for trial in trials if trial.plan == plan)
    values = {prompt: line.quality(prompt, at.log_error, at.steps) for prompt in range(prompts)}
    values |= _measured(trials, plan)
    return fmean(values.values())


def _unfinished(trials: Sequence[Trial], prompts: int, target: float) -> tuple[str, int] | None:
    """A (plan, prompt) worth completing: measured on some prompts, expected to land in the band on all."""
    for plan in dict.fromkeys(trial.plan for trial in reversed(trials)):
        missing = sorted(set(range(prompts)) - set(_measured(trials, plan)))
        if missing and _in_band(_expected(trials, plan, prompts, target), target):
            return plan, missing[0]
    return None
