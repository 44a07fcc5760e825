"""What a plan does to whole generations: the closed loop to a target, and the final report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import log10
from statistics import fmean, stdev
from typing import Any

import torch

from dit_accel.calibration.goals import QUALITIES, Goal
from dit_accel.calibration.knapsack import dense_cost, range_cost, range_error
from dit_accel.calibration.offers import Offer, Pick, frontier, pick_for_cost
from dit_accel.calibration.search import Line, Outcome, Trial, meets, search
from dit_accel.calibration.stages import AcceleratedRun, DenseRun, Stages
from dit_accel.evaluation.metrics import PSNR_CEILING_DB
from dit_accel.plan import AccelPlan

_SEARCH_PROMPTS = 2
# Most generations of a search for a quality, by the number of prompts that it is searched on. On one prompt all that a
# calibration does, timing and profiling too, so takes less time than six dense generations of 20 steps.
MAX_TRIALS = {1: 4, 2: 6}
_SPEED_TRIALS = 3
# Student's t: 95 % lie below, for 1 to 20 degrees of freedom.
_T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812,
         1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725)  # fmt: skip
# A plan may be this much faster than asked for before a slower one is looked for.
_SPEED_TOLERANCE = 1.05


def generations_needed(prompts: int, held_out: int, goal: Goal, max_trials: int) -> int:
    """The most generations a calibration makes."""
    trials = 0
    if goal.quality is not None:
        # Of a search, and of the plan found on the prompts that it was not tried on.
        trials = max_trials + prompts - 1
    elif goal.searched:
        trials = _SPEED_TRIALS
    return prompts + 2 * held_out + trials


def most_trials(prompts: int) -> int:
    """Generations that a search for a quality makes at most, where nobody says otherwise."""
    return MAX_TRIALS[min(prompts, _SEARCH_PROMPTS)]


@dataclass(frozen=True, eq=False)
class _Tried:
    """A generation with a plan of one calibration prompt."""

    pick: Pick
    prompt: int
    run: AcceleratedRun


class Validation:
    """Generations with plans, made through `stages` and compared with the dense `runs` of the prompts.

    planned: the plan of a choice as users will run it, guard included.
    """

    def __init__(
        self,
        stages: Stages,
        planned: Callable[[Pick], AccelPlan],
        offers: Sequence[Offer],
        runs: Sequence[DenseRun],
        prompts: Sequence[str],
        held_out: Sequence[str],
        seed: int,
        goal: Goal,
        max_trials: int,
    ) -> None:
        self._stages = stages
        self._planned = planned
        self._offers = offers
        self._tables = offers[0].tables  # every step computed
        self._runs = runs
        self._prompts = prompts
        self._held_out = held_out
        self._seed = seed
        self._goal = goal
        self._max_trials = max_trials
        self._outcome: Outcome | None = None
        self._met = True
        self._tried: list[_Tried] = []

    def meet_quality(self) -> Pick:
        """The fastest plan found that meets the goal's quality over all prompts.

        A `search` looks at two of them: where the others are worse, a further one is to do better on these by as much.
        """
        goal, quality, prompts = self._goal, QUALITIES[self._goal.name], len(self._prompts)
        searched, target = min(prompts, _SEARCH_PROMPTS), quality.decibel(goal.value)
        name = f"{goal.name}_{goal.value:g}_{'steps' if len(self._offers) > 1 else 'attention'}"
        # Those without `steps` are of versions that measured a schedule's error otherwise.
        known = [Trial(**t) for t in self._stages.known_trials(goal.name, name) if "steps" in t]
        trials: list[Trial] = []
        levels: dict[str, tuple[float, Pick]] = {}
        wanted, left = target, self._max_trials
        while left > 0:
            outcome = search(self._offers, searched, wanted, self._on_prompt, left, [*known, *trials])
            trials += [trial for trial in outcome.trials if trial not in trials]
            found = outcome.pick
            if found.name in levels:
                break
            level = self._level(found, range(prompts))
            levels[found.name] = level, found
            if meets(level, target) or prompts == searched:
                break
            wanted = target + self._level(found, range(searched)) - level
            left = self._most_generations - len(self._tried) - (prompts - searched)
        found = self._best_of(levels, target)
        self._outcome = replace(outcome, trials=tuple(trials))
        self._stages.keep_trials(name, [asdict(trial) for trial in trials])
        self._stages.skip(self._most_generations - len(self._tried))
        return found

    def meet_speedup(self) -> Pick:
        """The most faithful plan whose generation of the first prompt is as much faster as asked for.

        What a generation takes besides attention is first what the dense one takes, then what was measured last. If
        no plan is fast enough the fastest one tried is taken.
        """
        dense, wanted = self._runs[0].seconds, self._goal.value
        besides = dense - dense_cost(self._tables) / 1000
        best: _Tried | None = None
        for _ in range(_SPEED_TRIALS):
            found = pick_for_cost(self._offers, 1000 * (dense / wanted - besides) + 1e-6 * dense)
            if found.error == 0.0 and wanted == 1.0:
                self._stages.skip(_SPEED_TRIALS)
                return found
            if any(found.name == tried.pick.name for tried in self._tried) or (best and found.error == 0.0):
                break
            run = self._accelerated(found, 0)
            tried, speedup = self._tried[-1], dense / run.seconds
            if best is None or _better(speedup, dense / best.run.seconds, wanted):
                best = tried
            if wanted <= speedup <= wanted * _SPEED_TOLERANCE:
                break
            besides = run.seconds - found.cost / 1000
        self._stages.skip(_SPEED_TRIALS - len(self._tried))
        if best is None:
            raise RuntimeError("a search for a speed-up ends with a plan that was tried")
        self._met = dense / best.run.seconds >= wanted
        return best.pick

    def report(self, found: Pick) -> dict[str, Any]:
        """Quality and speed of the plan chosen, as JSON values; the remaining prompts are generated for it.

        `psnr_*` are means in dB; `speedup` is that of whole generations, on the held-out prompts where there
        are any, else on the calibration prompts; `psnr_held_out_low`, or that of the goal's own measure, is what the
        mean over all prompts is better than with 95 % confidence; `calibration_dense_generations` is what it all
        took, held-out prompts apart, in units of one dense generation; `attention_error` is by how much attention took
        longer than the tables say, at the speed that the machine then had, `layer_error` the same of a few layers timed
        alone, of the one that is furthest off. `trials` are the generations with plans,
        `frontier` the plans that the tables offer, `ranges` what each step range spends, `parts` what attention and
        steps do.
        """
        tables, name = self._tables, found.name
        values: dict[str, Any] = {
            "density_mean": found.density,
            "attention_speedup_expected": dense_cost(tables) / max(found.attention_ms, 1e-9),
        }
        if self._outcome is not None:
            values |= self._calibration_quality(found)
        if self._goal.searched:
            values["target_met"] = self._met
        pairs = [
            (self._runs[tried.prompt].seconds, tried.run.seconds)
            for tried in self._tried
            if tried.pick.name == name
        ]
        spent = [run.seconds + run.profile_seconds for run in self._runs] + [
            tried.run.seconds for tried in self._tried
        ]
        if self._held_out:
            pairs, made = [], []
            for number, prompt in enumerate(self._held_out):
                seed = self._seed + len(self._prompts) + number
                dense = self._stages.dense(f"held_out_dense_{number}", prompt, seed)
                plan = self._planned(found)
                run = self._stages.accelerated(f"plan_{name}_held_out_{number}", plan, prompt, seed, dense)
                pairs.append((dense.seconds, run.seconds))
                made.append(run)
            values |= {
                "psnr_held_out": fmean(run.psnr for run in made),
                "psnr_held_out_min": min(run.psnr for run in made),
                "ssim_held_out": fmean(run.ssim for run in made),
                "latent_rel_l2_held_out": fmean(run.latent_rel_l2 for run in made),
                **self._sure_of(made),
            }
        if pairs:
            dense_seconds, accelerated = (sum(seconds) for seconds in zip(*pairs, strict=True))
            values["speedup"] = dense_seconds / accelerated
        own = [tried.run for tried in self._tried if tried.pick.name == name]
        if own and found.attention_ms > 0:
            measured = fmean(run.attention_ms / self._drift(run) for run in own)
            values["attention_error"] = measured / found.attention_ms - 1
        if errors := [error for run in own for error in run.layer_errors]:
            values["layer_error"] = max(errors, key=abs)
        values["calibration_dense_generations"] = sum(spent) / fmean(run.seconds for run in self._runs)
        values["trials"] = [self._trial(tried, chosen=tried.pick.name == name) for tried in self._tried]
        values["frontier"] = self._frontier()
        values["ranges"] = self._ranges(found)
        values["parts"] = self._parts(found)
        return values

    @property
    def _most_generations(self) -> int:
        """With plans, towards a quality: those of the search, and of a plan tried on one prompt for all others."""
        return self._max_trials + len(self._prompts) - 1

    def _best_of(self, levels: dict[str, tuple[float, Pick]], target: float) -> Pick:
        """The fastest plan to meet the target over all prompts, else the one that comes nearest.

        levels: mean quality over all prompts in dB and the plan, by name. Where none of these meets the target, more
        faithful plans that were tried are looked at, the fastest first, as far as generations are left.
        """
        met = [found for level, found in levels.values() if meets(level, target)]
        if met:
            return max(met, key=lambda found: found.error)
        tried = {t.pick.name: t.pick for t in self._tried if t.pick.name not in levels}
        for found in sorted(tried.values(), key=lambda pick: -pick.error):
            missing = sum(self._run_of(found, number) is None for number in range(len(self._prompts)))
            hopeful = all(found.error < one.error for _, one in levels.values())
            if not hopeful or len(self._tried) + missing > self._most_generations:
                continue
            levels[found.name] = self._level(found, range(len(self._prompts))), found
            if meets(levels[found.name][0], target):
                return found
        return max(levels.values(), key=lambda one: one[0])[1]

    def _level(self, found: Pick, numbers: Iterable[int]) -> float:
        """Mean quality of a plan over some calibration prompts in dB; what is missing is generated."""
        if found.error == 0.0:
            return PSNR_CEILING_DB
        return fmean(self._on_prompt(found, number) for number in numbers)

    def _on_prompt(self, found: Pick, number: int) -> float:
        """Quality of a plan on a calibration prompt in dB, which is generated once."""
        quality = QUALITIES[self._goal.name]
        run = self._run_of(found, number) or self._accelerated(found, number)
        return quality.decibel(getattr(run, quality.metric))

    def _run_of(self, found: Pick, number: int) -> AcceleratedRun | None:
        return next((t.run for t in self._tried if (t.prompt, t.pick.name) == (number, found.name)), None)

    def _calibration_quality(self, found: Pick) -> dict[str, float]:
        """The goal's measure over all calibration prompts, and whether it is met."""
        quality, level = QUALITIES[self._goal.name], self._level(found, range(len(self._prompts)))
        self._met = meets(level, quality.decibel(self._goal.value))
        return {f"{quality.metric}_calibration": quality.value(level)}

    def _sure_of(self, made: Sequence[AcceleratedRun]) -> dict[str, float | None]:
        """What the goal's mean over all prompts is better than with 95 % confidence; of PSNR without such a goal."""
        quality = self._goal.quality or QUALITIES["target_psnr"]
        low = lower_bound([quality.decibel(getattr(run, quality.metric)) for run in made])
        return {f"{quality.metric}_held_out_low": None if low is None else quality.value(low)}

    def _trial(self, tried: _Tried, *, chosen: bool) -> dict[str, Any]:
        run, dense, found = tried.run, self._runs[tried.prompt].seconds, tried.pick
        return {
            "prompt": tried.prompt,
            "chosen": chosen,
            "density": found.density,
            "skipped_forwards": _skipped(found),
            "error_expected": found.error,
            "psnr": run.psnr,
            "ssim": run.ssim,
            "latent_rel_l2": run.latent_rel_l2,
            "seconds": run.seconds,
            "attention_ms": run.attention_ms,
            "attention_ms_expected": found.attention_ms * self._drift(run),
            "seconds_expected": dense + (found.cost - dense_cost(self._tables)) / 1000,
            "seconds_dense": dense,
            "guarded_heads": run.guarded_heads,
        }

    def _drift(self, run: AcceleratedRun) -> float:
        """How much slower the machine was in a generation than when candidates were timed."""
        return run.plain_ms / self._stages.latency().plain

    def _frontier(self) -> list[dict[str, float]]:
        """What the tables offer; where a quality was searched also what the fitted line expects of it."""
        points = [
            {
                "density_mean": found.density,
                "skipped_forwards": _skipped(found),
                "error": found.error,
                "attention_ms": found.attention_ms,
                "saved_ms": found.offer.saved,
            }
            for found in frontier(self._offers)
        ]
        quality, outcome = self._goal.quality, self._outcome
        if quality is None or outcome is None or not outcome.trials:
            return points
        searched = min(len(self._prompts), _SEARCH_PROMPTS)
        line = Line(outcome.trials, searched, quality.decibel(self._goal.value))
        for point in points:
            if point["error"] > 0:
                steps = point["skipped_forwards"] > 0
                level = fmean(
                    line.quality(prompt, log10(point["error"]), steps) for prompt in range(searched)
                )
                point["quality_expected"] = quality.value(level)
        return points

    def _ranges(self, found: Pick) -> list[dict[str, float]]:
        dense = torch.full_like(found.choice, self._tables.dense)
        parts = (
            self._planned(found).range_starts,
            range_error(found.offer.tables, found.choice),
            range_cost(found.offer.tables, found.choice),
            range_cost(self._tables, dense),
        )
        return [
            {"start": start, "error": error, "attention_ms": cost, "attention_ms_dense": of_dense}
            for start, error, cost, of_dense in zip(*parts, strict=True)
        ]

    def _parts(self, found: Pick) -> dict[str, dict[str, float]]:
        """What attention and steps left out spend of the error, and milliseconds of a generation that each saves."""
        offer, steps_ms = found.offer, dense_cost(self._tables) - dense_cost(found.offer.tables)
        return {
            "attention": {
                "error": found.error - offer.error,
                "saved_ms": dense_cost(offer.tables) - found.attention_ms,
            },
            "steps": {"error": offer.error, "saved_ms": steps_ms + offer.saved},
        }

    def _accelerated(self, found: Pick, number: int) -> AcceleratedRun:
        name = f"plan_{found.name}_{number}"
        run = self._stages.accelerated(
            name, self._planned(found), self._prompts[number], self._seed + number, self._runs[number]
        )
        self._tried.append(_Tried(found, number, run))
        return run


def lower_bound(values: Sequence[float]) -> float | None:
    """What the mean over all prompts exceeds with 95 % confidence (Student's t, one side); None for a single value."""
    if len(values) < 2:
        return None
    quantile = _T_95[min(len(values) - 1, len(_T_95)) - 1]
    return fmean(values) - quantile * stdev(values) / len(values) ** 0.5


def _skipped(found: Pick) -> int:
    """Forwards that a plan's schedule leaves out."""
    cache = found.offer.cache
    if cache is None or cache.schedule is None:
        return 0
    return sum(len(steps) for steps in cache.schedule.forecasts.values())


def _better(speedup: float, than: float, wanted: float) -> bool:
    """Whether a speed-up is preferred: fast enough first, then the least of those, else the largest."""
    if (speedup >= wanted) != (than >= wanted):
        return speedup >= wanted
    return speedup < than if speedup >= wanted else speedup > than
