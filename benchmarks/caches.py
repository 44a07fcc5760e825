"""Compare feature caches on the demo model at equal PSNR: those of diffusers and cache-dit, ours, and calibrated plans.

    pip install -e '.[peers]'
    python benchmarks/caches.py     # hours on two CPU cores

Every cache has one dial, a threshold or an interval. It is tuned on other prompts than the compared ones, by bisection,
to the largest skipped share that keeps the mean PSNR at ``--target-psnr``. Then all run the held-out prompts in one
process, with equal seeds, in an order that rotates, beside plans that were calibrated for the same PSNR on the same
prompts: a schedule of steps alone, sparse attention alone, and both. ``--schedule``, ``--sparse`` and ``--joint`` put
other variants in their place, any that ``dit-accel evaluate`` knows, or none.

All other settings are those of the authors, with these exceptions: the demo has 6 blocks and 20 steps, so DBCache looks
at 1 block (ours at 2) and warms up for 4 steps. Where there is a limit on skips in a row it is 6, since smaller ones
keep a dial from reaching the target. TaylorSeer of diffusers runs in its lite mode, since its default patterns match
nothing on Wan. Both MagCaches have one curve, measured by diffusers' calibration on the first tuning prompt. TeaCache's
polynomial is fitted to the same prompt.

Each finished generation is kept in ``--work``, in a folder named after model, settings and machine. Started again, the
command goes on where it was.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_accel.bench.demo_work import DemoWork, add_arguments, demo_work
from dit_accel.calibration import calibrate, measure_cache
from dit_accel.calibration.goals import the_goal
from dit_accel.candidate import Candidate
from dit_accel.evaluation.curve import magnitude_curve
from dit_accel.evaluation.files import write_json
from dit_accel.evaluation.result import Evaluation
from dit_accel.evaluation.run import evaluate
from dit_accel.evaluation.timing import package_version
from dit_accel.evaluation.tuning import Dial, Tuned, Tuning
from dit_accel.evaluation.variants import DENSE, Variant, parse_variant, plan_variant

FORMAT_VERSION = 1
# How the plans that stand beside the caches are calibrated.
PLANS: dict[str, dict[str, Any]] = {
    "schedule": {"cache": True, "candidates": [Candidate("dense", 1.0)]},
    "sparse": {},
    "joint": {"cache": True},
}
NONE = "none"
HELD_OUT_SEED = 1000  # added to the seed: tuning has seen none of these


_DBCACHE = "cache-dit:dbcache@{}:Fn_compute_blocks=1:max_warmup_steps=4"
DIALS = (
    Dial("diffusers:first_block", "diffusers:first_block@{}", 0.005, 1.0),
    Dial("diffusers:mag_cache", "diffusers:mag_cache@{}:max_skip_steps=6", 0.005, 1.0),
    Dial("diffusers:taylorseer", "diffusers:taylorseer@{}", 2, 8),
    # From 1 on, cache-dit takes everything as alike.
    Dial("cache-dit:dbcache", _DBCACHE, 0.005, 0.9),
    Dial("cache-dit:dbcache+taylorseer", f"{_DBCACHE}:taylorseer=true", 0.005, 0.9),
    Dial("cg-taylor", "preset:cg-taylor@{}:max_skips=6", 0.005, 1.0),
    Dial("dbcache", "preset:dbcache@{}:first_blocks=2:warm_up=4:max_skips=6", 0.005, 1.0),
    Dial("easycache", "preset:easycache@{}:max_skips=6", 0.005, 1.0),
    Dial("first-block", "preset:first-block@{}:max_skips=6", 0.005, 1.0),
    Dial("magcache", "preset:magcache@{}:max_skips=6", 0.005, 1.0),
    Dial("taylorseer", "preset:taylorseer:max_skips={}", 1, 7),
    Dial("teacache", "preset:teacache@{}:max_skips=6", 0.005, 1.0),
)


def of_peer(dial: Dial) -> bool:
    """Whether a cache belongs to another project."""
    return not dial.template.startswith("preset:")


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench(DemoWork):
    """What to tune and compare, and where the result goes.

    given: variants that are not tuned, by the name of their row; a name of `PLANS` without one is calibrated.
    """

    target: float
    probes: int
    dials: Sequence[Dial]
    given: dict[str, Variant | None]
    output: Path

    def variant(self, name: str) -> Variant:
        """The variant of a cache's name, with what has to be measured on the model."""
        variant = parse_variant(name)
        if variant.with_curve:
            return variant.with_curve(self.curve())
        if (
            variant.plan is not None
            and variant.plan.cache is not None
            and variant.plan.cache.gate == "teacache"
        ):
            cache = replace(variant.plan.cache, polynomial=self.polynomial())
            return plan_variant(replace(variant.plan, cache=cache), name)
        return variant

    def curve(self) -> tuple[float, ...]:
        """The curve of MagCache on the first tuning prompt, measured once."""
        return self._measured(
            "curve",
            lambda: magnitude_curve(self.pipe, self.tuning_prompts[0], self.settings, seed=self.seed),
        )

    def polynomial(self) -> tuple[float, ...]:
        """TeaCache's polynomial on the first tuning prompt, fitted once."""
        return self._measured(
            "polynomial",
            lambda: measure_cache(
                self.pipe, self.tuning_prompts[0], **self.settings.to_dict(), seed=self.seed
            )["polynomial"],
        )

    def _measured(self, name: str, measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_json(path, measure())
        return tuple(json.loads(path.read_text(encoding="utf-8")))


def tune_all(bench: Bench) -> dict[str, Tuned]:
    """Tune every cache; what finished generations gave is taken over."""
    tuning = Tuning(
        bench.pipe, bench.tuning_prompts, bench.settings, bench.seed, bench.folder / "tuning", bench.variant
    )
    found = tuning.run(bench.dials, [bench.target], bench.probes)
    return {label: by_target[bench.target] for label, by_target in found.items()}


def compare(bench: Bench, tuned: dict[str, Tuned]) -> Evaluation:
    """Run dense, the tuned caches and what was given on the held-out prompts.

    Each set of rows has a folder of its own: to add one leaves the others alone, but runs all anew, side by side.
    """
    variants = [DENSE]
    variants += [bench.variant(dial.name(tuned[dial.label].chosen.value)) for dial in bench.dials]
    variants += [
        planned(bench, label) if variant is None else _renamed(bench, variant, label)
        for label, variant in bench.given.items()
    ]
    rows = hashlib.sha256("\n".join(variant.identity for variant in variants).encode()).hexdigest()[:12]
    return evaluate(
        bench.pipe,
        variants,
        bench.prompts,
        bench.settings,
        model="demo",
        seed=bench.seed + HELD_OUT_SEED,
        scorer=bench.scorer,
        output_dir=bench.folder / f"held-out-{rows}",
    )


def planned(bench: Bench, label: str) -> Variant:
    """The plan of a row, calibrated on the tuning prompts for the PSNR of the dials; the dense runs are shared."""
    plan = calibrate(
        bench.pipe,
        bench.tuning_prompts,
        **bench.settings.to_dict(),
        **PLANS[label],
        target_psnr=bench.target,
        seed=bench.seed,
        output_dir=bench.folder / ("schedule" if label == "schedule" else "plan"),
    )
    return plan_variant(plan, label)


def _renamed(bench: Bench, variant: Variant, label: str) -> Variant:
    """A given variant under the name of its row: a directory's name tells a reader nothing."""
    if variant.with_curve:
        variant = variant.with_curve(bench.curve())
    if variant.plan is not None:
        return plan_variant(variant.plan, label)
    return Variant(label, variant.apply, None, f"{label} {variant.identity}")


def report(bench: Bench, tuned: dict[str, Tuned], evaluation: Evaluation) -> dict[str, Any]:
    """`caches.json`: how each dial was found, and the comparison on the held-out prompts."""
    rows = []
    for dial in bench.dials:
        result = tuned[dial.label]
        rows.append(
            {
                "label": dial.label,
                "peer": of_peer(dial),
                "variant": dial.name(result.chosen.value),
                "reached": result.reached,
                "chosen": vars(result.chosen),
                "probes": [vars(probe) for probe in result.probes],
            }
        )
    return {
        "format_version": FORMAT_VERSION,
        "machine": {**evaluation.machine, "cache_dit": package_version("cache-dit")},
        "target_psnr": bench.target,
        "tuning_prompts": bench.tuning_prompts,
        "tuning_seed": bench.seed,
        "tuned": rows,
        "given": {label: variant.name if variant else "calibrated" for label, variant in bench.given.items()},
        "evaluation": evaluation.to_dict(),
    }


def run(bench: Bench) -> dict[str, Any]:
    """Tune, compare and write the output."""
    tuned = tune_all(bench)
    found = report(bench, tuned, compare(bench, tuned))
    write_json(bench.output, found)
    return found


def parse_labels(text: str | None) -> list[Dial]:
    """The caches of a comma-separated list of labels, all where there is none.

    Raises:
        ValueError: a label is unknown.
    """
    if text is None:
        return list(DIALS)
    labels = [label.strip() for label in text.split(",") if label.strip()]
    unknown = sorted(set(labels) - {dial.label for dial in DIALS})
    if unknown:
        known = ", ".join(dial.label for dial in DIALS)
        raise ValueError(f"only: expected labels out of {known}, got {', '.join(unknown)}")
    return [dial for dial in DIALS if dial.label in labels]


def prepared(args: argparse.Namespace) -> Bench:
    """Load the model and open the folder of what was measured on it.

    Raises:
        ValueError: a number out of range, an unknown name, or a device or package that is not there.
    """
    dials = parse_labels(args.only)
    the_goal(target_psnr=args.target_psnr)  # refuses what calibrations would, before anything is tuned
    if args.probes < 1:
        raise ValueError(f"probes: expected a number from 1, got {args.probes}")
    for dial in dials:
        parse_variant(dial.name(dial.low))  # refuses at once where cache-dit is missing
    names = {label: getattr(args, label) for label in PLANS}
    given = {label: parse_variant(name) if name else None for label, name in names.items() if name != NONE}
    at = demo_work(args, FORMAT_VERSION, package_version("cache-dit"), tuning=True)
    return Bench(
        **vars(at),
        target=args.target_psnr,
        probes=args.probes,
        dials=dials,
        given=given,
        output=args.output,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target-psnr", type=float, default=30.0, metavar="DB", help="default %(default)g")
    for label in PLANS:
        parser.add_argument(
            f"--{label}", metavar="VARIANT", help=f"row {label!r}, for instance plan:DIR, or {NONE}"
        )
    parser.add_argument("--only", metavar="LABELS", help="these caches, comma-separated")
    parser.add_argument("--probes", type=int, default=6, help="most places of a dial (default %(default)s)")
    add_arguments(parser, work="outputs/caches", tuning=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/caches.json"))
    args = parser.parse_args(argv)
    try:
        bench = prepared(args)
    except ValueError as error:
        parser.error(str(error))
    run(bench)


if __name__ == "__main__":
    main()
