"""Turns the dials of variants until all have one quality, so that their speeds can be compared.

A dial is the number in a variant's name: a cache's threshold, a preset's density. It is tuned on prompts and seeds of
its own, by bisection, to the least work that keeps the mean PSNR at a target. Each finished generation is a file:
killed and started again, a search goes on where it was, and searches for several targets share their generations.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from dit_accel.evaluation.files import slug, write_json
from dit_accel.evaluation.generate import generate_variant, quiet
from dit_accel.evaluation.metrics import psnr
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.store import GenerationStore
from dit_accel.evaluation.variants import DENSE, Variant

SLACK_DB = 0.5  # what is tuned to a PSNR misses it on other prompts


@dataclass(frozen=True)
class Dial:
    """A kind of variant with one number: `{}` in the variant's name, from `low`, which saves least, to `high`.

    Whole numbers make the dial whole; others are searched on a logarithmic scale, of a `share` what it leaves to 1.
    `high` may lie below `low`, as that of a density does.
    """

    label: str
    template: str
    low: float
    high: float
    share: bool = False

    @property
    def whole(self) -> bool:
        """Whether the dial has whole numbers only."""
        return isinstance(self.low, int)

    def middle(self, low: float, high: float) -> float:
        """Between two places, with no more digits than a name needs."""
        if self.whole:
            return (low + high) // 2
        if self.share:
            return round(1.0 - float(f"{((1.0 - low) * (1.0 - high)) ** 0.5:.3g}"), 6)
        return float(f"{(low * high) ** 0.5:.3g}")

    def name(self, value: float) -> str:
        """The variant at a place of the dial."""
        return self.template.format(f"{value:g}")

    def probes(self, most: int) -> int:
        """How many places of the dial a search looks at, at most."""
        return min(most, int(abs(self.high - self.low) + 1).bit_length()) if self.whole else most


@dataclass(frozen=True)
class Probe:
    """A place of a dial: mean PSNR in dB against dense, and the share of work saved, over the tuning prompts.

    saved: of the forwards times the query-key pairs that attention multiplies in each; what is unknown counts as done.
    """

    value: float
    psnr: float
    saved: float


@dataclass(frozen=True)
class Tuned:
    """What a search found: all its probes in order, the chosen one, and whether it keeps to the target."""

    probes: tuple[Probe, ...]
    chosen: Probe
    reached: bool


def tune(
    dial: Dial, target: float, most: int, measure: Callable[[float], Probe], known: Sequence[Probe] = ()
) -> Tuned:
    """Search a dial for the most work saved with a mean PSNR of at least `target`.

    PSNR falls with the dial on the whole, but not always: of all probes that keep to the target the one that saves most
    is chosen, of these the best one. Where none does, the one of the highest PSNR stands in.

    Args:
        most: places to look at beside the known ones.
        known: probes of searches for other targets, which say where to begin.
    """
    found: list[Probe] = []
    low, high = dial.low, dial.high
    sign = 1 if high >= low else -1
    step = sign if dial.whole else 0
    place = {probe.value: sign * probe.value for probe in known}
    good = [probe for probe in known if probe.psnr >= target]
    if good:
        low = max(good, key=lambda probe: place[probe.value]).value + step
    beyond = [p for p in known if p.psnr < target and place[p.value] >= sign * low]
    if beyond:
        high = min(beyond, key=lambda probe: place[probe.value]).value - step
    for _ in range(dial.probes(most)):
        if sign * low > sign * high:
            break
        middle = dial.middle(low, high)
        if any(probe.value == middle for probe in (*known, *found)):
            break  # the crossing is known to the digits that a name has
        found.append(measure(middle))
        if found[-1].psnr >= target:
            low = middle + step
        else:
            high = middle - step
    return chosen(target, (*known, *found))


def chosen(target: float, probes: tuple[Probe, ...]) -> Tuned:
    """The probe to run at a target, of all that are known."""
    kept = [probe for probe in probes if probe.psnr >= target]
    if kept:
        return Tuned(probes, max(kept, key=lambda probe: (probe.saved, probe.psnr)), True)
    return Tuned(probes, max(probes, key=lambda probe: probe.psnr), False)


@dataclass(eq=False)
class Tuning:
    """What dials are tuned on.

    variant: makes the variant of a name.
    work: folder of finished generations.
    """

    pipe: Any
    prompts: Sequence[str]
    settings: GenerationSettings
    seed: int
    work: Path
    variant: Callable[[str], Variant]

    def run(
        self, dials: Sequence[Dial], targets: Sequence[float], most: int
    ) -> dict[str, dict[float, Tuned]]:
        """Tune every dial to every target, by label and target.

        Args:
            targets: mean PSNR in dB; those after the first begin with what was found before, and each has the choice
                of all that was found for any.
            most: places of a dial to look at, at most, for each target.
        """
        count, steps = len(self.prompts), self.settings.num_inference_steps
        each = [count * len(targets) * dial.probes(most) * steps for dial in dials]
        found: dict[str, dict[float, Tuned]] = {}
        with quiet(self.pipe), tqdm(total=count * steps + sum(each), unit="step", smoothing=0.05) as bar:
            self._dense(bar)
            done = count * steps
            for dial, share in zip(dials, each, strict=True):
                bar.n = done  # some searches end early, and finished generations take no time
                bar.set_description(f"tuning, {dial.label}")
                known: tuple[Probe, ...] = ()
                measure = functools.partial(self._probe, dial, on_step=bar.update)
                for target in targets:
                    known = tune(dial, target, most, measure, known).probes
                found[dial.label] = {target: chosen(target, known) for target in targets}
                done += share
            bar.n = done
            bar.refresh()
        return found

    @property
    def _dense_store(self) -> GenerationStore:
        return GenerationStore(self.work / "dense")

    def _dense(self, bar: tqdm) -> None:
        for prompt, text in enumerate(self.prompts):
            bar.set_description(f"tuning, dense {prompt + 1} of {len(self.prompts)}")
            if not self._dense_store.has(prompt, "dense"):
                made = generate_variant(
                    self.pipe, DENSE, text, self.settings, seed=self.seed + prompt, on_step=bar.update
                )
                if not made.is_finite:
                    raise ValueError(
                        f"pipe: expected finite frames of its dense generation of {text!r}, got NaN or infinity; give "
                        "the model another dtype, bfloat16 for instance"
                    )
                self._dense_store.put(prompt, "dense", made)

    def _probe(self, dial: Dial, value: float, *, on_step: Callable[[], object]) -> Probe:
        """Generate the prompts at a place of a dial, as far as they are missing."""
        variant = self.variant(dial.name(value))
        runs = []
        for prompt, text in enumerate(self.prompts):
            path = self.work / f"{prompt:03d}-{slug(variant.identity)}.json"
            if not path.is_file():
                made = generate_variant(
                    self.pipe, variant, text, self.settings, seed=self.seed + prompt, on_step=on_step
                )
                near = psnr(made.frames, self._dense_store.get(prompt, "dense").frames)
                near = 0.0 if math.isnan(near) else near  # what diverged is as far away as can be
                done = (1 - (made.skipped_share or 0.0)) * (1.0 if made.density is None else made.density)
                write_json(path, {"variant": variant.name, "psnr": near, "saved": 1 - done})
            runs.append(json.loads(path.read_text(encoding="utf-8")))
        return Probe(value, fmean(run["psnr"] for run in runs), fmean(run["saved"] for run in runs))


def speedup_at(points: Sequence[tuple[float, float]], psnr: float) -> float | None:
    """The speed-up that a row has at a PSNR, on the best of what was measured.

    Between two points the logarithm of the speed-up is taken for linear in PSNR. Below the lowest PSNR it is the
    largest speed-up that was measured, up to `SLACK_DB` above the highest the smallest; further up it is unknown.
    """
    best: list[tuple[float, float]] = []  # from the highest PSNR downwards, faster at each
    for point in sorted(points, reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    if not best or psnr > best[0][0] + SLACK_DB:
        return None
    if psnr >= best[0][0]:
        return best[0][1]
    for (above, slow), (below, fast) in itertools.pairwise(best):
        if psnr >= below:
            share = (above - psnr) / (above - below)
            return math.exp((1 - share) * math.log(slow) + share * math.log(fast))
    return best[-1][1]
