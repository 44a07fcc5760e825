"""What a plan does to whole generations: the closed loop to a PSNR target, and the final report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor

from dit_accel.calibration.choose import choose, dense_cost, mean_density, total_cost
from dit_accel.calibration.search import Outcome, plan_name, search
from dit_accel.calibration.stages import AcceleratedRun, DenseRun, Stages
from dit_accel.calibration.tables import Tables
from dit_accel.plan import AccelPlan

MAX_TRIALS = 5
_SEARCH_PROMPTS = 2


def generations_needed(prompts: int, held_out: int, searching: bool) -> int:
    """The most generations a calibration makes."""
    return prompts + 2 * held_out + searching * (MAX_TRIALS + max(0, prompts - _SEARCH_PROMPTS))


class Validation:
    """Generations with plans, made through `stages` and compared with the dense `runs` of the prompts."""

    def __init__(
        self,
        stages: Stages,
        draft: AccelPlan,
        tables: Tables,
        runs: Sequence[DenseRun],
        prompts: Sequence[str],
        held_out: Sequence[str],
        seed: int,
    ) -> None:
        self._stages = stages
        self._draft = draft
        self._tables = tables
        self._runs = runs
        self._prompts = prompts
        self._held_out = held_out
        self._seed = seed
        self._outcome: Outcome | None = None
        self._tried: list[AcceleratedRun] = []

    def meet(self, target: float) -> Tensor:
        """The choice of the fastest plan found that meets a PSNR target in dB, see `search`."""

        def measure(choice: Tensor, prompt: int) -> float:
            run = self._accelerated(choice, prompt)
            self._tried.append(run)
            return run.psnr

        searched = min(len(self._prompts), _SEARCH_PROMPTS)
        self._outcome = search(self._tables, searched, target, measure, MAX_TRIALS)
        self._stages.skip(MAX_TRIALS - len(self._tried))
        return choose(self._tables, self._outcome.multiplier)

    def report(self, choice: Tensor) -> dict[str, Any]:
        """Quality and speed of the plan chosen, as JSON values; the remaining prompts are generated for it.

        `psnr_*` are means in dB; `speedup` is that of whole generations, on the held-out prompts where there
        are any, else on the calibration prompts; `calibration_dense_generations` is what the calibration
        took, held-out prompts apart, in units of one dense generation.
        """
        values: dict[str, Any] = {
            "density_mean": mean_density(self._tables, choice),
            "attention_speedup_expected": dense_cost(self._tables) / total_cost(self._tables, choice),
        }
        pairs = []
        spent = [run.seconds + run.profile_seconds for run in self._runs] + [
            run.seconds for run in self._tried
        ]
        if self._outcome is not None:
            psnrs, name = [self._outcome.psnr] * min(len(self._prompts), _SEARCH_PROMPTS), plan_name(choice)
            for trial, run in zip(self._outcome.trials, self._tried, strict=True):
                if trial.plan == name:
                    pairs.append((self._runs[trial.prompt].seconds, run.seconds))
            for number in range(_SEARCH_PROMPTS, len(self._prompts)):
                run = self._accelerated(choice, number)
                pairs.append((self._runs[number].seconds, run.seconds))
                psnrs.append(run.psnr)
                spent.append(run.seconds)
            values |= {"target_met": self._outcome.met, "psnr_calibration": fmean(psnrs)}
        if self._held_out:
            pairs, psnrs = [], []
            for number, prompt in enumerate(self._held_out):
                seed = self._seed + len(self._prompts) + number
                frames, seconds = self._stages.dense(f"held_out_dense_{number}", prompt, seed)
                plan = replace(self._draft, choice=choice)
                run = self._stages.accelerated(
                    f"plan_{plan_name(choice)}_held_out_{number}", plan, prompt, seed, frames
                )
                pairs.append((seconds, run.seconds))
                psnrs.append(run.psnr)
            values |= {"psnr_held_out": fmean(psnrs), "psnr_held_out_min": min(psnrs)}
        if pairs:
            dense, accelerated = (sum(seconds) for seconds in zip(*pairs, strict=True))
            values["speedup"] = dense / accelerated
        values["calibration_dense_generations"] = sum(spent) / fmean(run.seconds for run in self._runs)
        return values

    def _accelerated(self, choice: Tensor, number: int) -> AcceleratedRun:
        plan = replace(self._draft, choice=choice)
        dense = self._runs[number].frames
        name = f"plan_{plan_name(choice)}_{number}"
        return self._stages.accelerated(name, plan, self._prompts[number], self._seed + number, dense)
