"""Compare plans with published systems, and with themselves when a part of the calibrator is taken away, at equal PSNR.

    python benchmarks/equal_psnr.py --group presets     # after benchmarks/presets.py, hours on two CPU cores
    python benchmarks/equal_psnr.py --group ablation

- ``presets``: the plan beside the best systems of ``presets.json``, each with the means of what it leaves out where
  that is better. Everything is as published but one dial: the share of the mass where the authors cut by it
  (``top_p``), else the density. ``reuse``, which authors count in 50 steps, is scaled to the steps of the run.
- ``ablation``: calibrations that may do less or weigh otherwise.

All rows are brought to every ``--targets`` on the same tuning prompts, presets by bisection of their dial
(``dit_accel.evaluation.tuning``), plans by the calibration's own search. Then all run the held-out prompts in one
process, with equal seeds, in an order that rotates, plans with their guard on, as everywhere. Prompts differ, so no row
has exactly the target's PSNR there: the speed-up at a PSNR is read between a row's measured points.

Each finished generation is kept in ``--work``, in a folder named after model, settings and machine. Started again, the
command goes on where it was.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dit_accel.bench.demo_work import DemoWork, add_arguments, demo_work
from dit_accel.calibration import calibrate, default_candidates
from dit_accel.calibration.checkpoint import Checkpoint
from dit_accel.candidate import Candidate
from dit_accel.evaluation.files import write_json
from dit_accel.evaluation.metrics import PSNR_CEILING_DB
from dit_accel.evaluation.run import evaluate
from dit_accel.evaluation.tuning import Dial, Tuned, Tuning, speedup_at
from dit_accel.evaluation.variants import DENSE, Variant, parse_variant, plan_variant
from dit_accel.plan import AccelPlan
from dit_accel.presets import PRESETS

FORMAT_VERSION = 1
PUBLISHED_STEPS = 50
HELD_OUT_SEED = 1000  # added to the seed: tuning has seen none of these
MEANS = "+means"


def dial_of(label: str, steps: int) -> Dial:
    """The dial of a published system, with the remainder where its label ends so.

    Raises:
        ValueError: an unknown system.
    """
    name = label.removesuffix(MEANS)
    if name not in PRESETS:
        raise ValueError(
            f"only: expected names out of {', '.join(sorted(PRESETS))}, also with {MEANS}, got {label!r}"
        )
    preset = PRESETS[name]
    options: dict[str, Any] = {
        **preset.options,
        "block": preset.block,
        "warm_up": preset.warm_up,
        "dense_layers": preset.dense_layers,
    }
    if "reuse" in options:
        options["reuse"] = max(1, round(int(options["reuse"]) * steps / PUBLISHED_STEPS))
    if label.endswith(MEANS):
        options["remainder"] = True
        options.pop("features", None)  # they are in the place of the means
    by_mass = options.pop("top_p", None) is not None
    settings = "".join(f":{option}={value}" for option, value in options.items())
    if by_mass:
        return Dial(label, f"preset:{preset.family}@1.0{settings}:top_p={{}}", 0.999, 0.2, share=True)
    return Dial(label, f"preset:{preset.family}@{{}}{settings}", 0.95, 0.03)


def best_presets(report: dict[str, Any], count: int) -> list[str]:
    """Labels of the systems in `presets.json` nearest to dense, of those that are faster than it.

    A system appears once, without or with the means of what it leaves out, and two that are one appear as one.
    """
    ways: list[tuple[float, str]] = []
    for row in report["generations"]["rows"]:
        name = row["preset"]
        if name in PRESETS and row["speedup"] > 1:
            ways.append((row["psnr_mean"], f"{name}{MEANS}" if row["remainder"] else name))
    chosen: dict[str, str] = {}  # labels by the dial, which tells systems that are one
    for _, label in sorted(ways, reverse=True):
        if label.removesuffix(MEANS) not in {other.removesuffix(MEANS) for other in chosen.values()}:
            chosen.setdefault(dial_of(label, PUBLISHED_STEPS).template, label)
    return list(chosen.values())[:count]


def only(*families: str) -> Callable[[Sequence[Candidate]], list[Candidate]]:
    """Keep dense and some families of the candidates."""
    return lambda candidates: [c for c in candidates if c.family in ("dense", *families)]


def without(family: str) -> Callable[[Sequence[Candidate]], list[Candidate]]:
    """Keep all candidates but those of a family."""
    return lambda candidates: [c for c in candidates if c.family != family]


def without_remainder(candidates: Sequence[Candidate]) -> list[Candidate]:
    """What is left out of a row no longer counts through its means."""
    return list(dict.fromkeys(replace(candidate, remainder=False) for candidate in candidates))


def native(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Nothing quantised."""
    return [candidate for candidate in candidates if candidate.precision == "native"]


@dataclass(frozen=True)
class Calibrator:
    """A way to calibrate.

    candidates: makes its candidates of the default ones.
    measured_cost: whether a candidate costs what it takes on this machine; else every pair costs alike.
    """

    candidates: Callable[[Sequence[Candidate]], Sequence[Candidate]] = list
    downstream: bool = False
    measured_cost: bool = True


PLAN = {"plan": Calibrator()}
ABLATION = {
    **PLAN,
    "with downstream weights": Calibrator(downstream=True),
    "without measured cost": Calibrator(measured_cost=False),
    "balanced only": Calibrator(only("balanced")),
    "without balanced": Calibrator(without("balanced")),
    "pooled only": Calibrator(only("pooled")),
    "without remainder": Calibrator(without_remainder),
    "native precision only": Calibrator(native),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench(DemoWork):
    """What to bring to the same PSNR, and where the result goes.

    beyond: further targets, which get no column of their own.
    """

    targets: list[float]
    probes: int
    beyond: list[float]
    dials: Sequence[Dial]
    calibrators: dict[str, Calibrator]
    output: Path

    def tuned(self) -> dict[str, dict[float, Tuned]]:
        """Every dial at every target."""
        if not self.dials:
            return {}
        folder = self.folder / "tuning"
        tuning = Tuning(self.pipe, self.tuning_prompts, self.settings, self.seed, folder, parse_variant)
        return tuning.run(self.dials, self._aims, self.probes)

    @property
    def _aims(self) -> list[float]:
        return list(dict.fromkeys((*self.targets, *self.beyond)))

    def plans(self) -> dict[str, dict[float, AccelPlan]]:
        """Every calibration at every target; one that could only repeat another is left out."""
        found: dict[str, dict[float, AccelPlan]] = {}
        done = set()
        for label, calibrator in self.calibrators.items():
            allowed = self._allowed(calibrator)
            same = (allowed, calibrator.downstream, calibrator.measured_cost)
            if same not in done:
                done.add(same)
                found[label] = {target: self._plan(calibrator, allowed, target) for target in self._aims}
        return found

    def _allowed(self, calibrator: Calibrator) -> tuple[Candidate, ...]:
        every = default_candidates(self.pipe._execution_device, self.pipe.transformer.dtype)
        return tuple(calibrator.candidates(every))

    def _plan(self, calibrator: Calibrator, allowed: Sequence[Candidate], target: float) -> AccelPlan:
        content = [[c.to_dict() for c in allowed], calibrator.downstream, self.tuning_prompts]
        folder = self.folder / f"plan-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"
        arguments: dict[str, Any] = {
            **self.settings.to_dict(),
            "candidates": allowed,
            "downstream": calibrator.downstream,
            "seed": self.seed,
        }
        if not calibrator.measured_cost:
            measured, folder = folder, folder.with_name(f"{folder.name}-by-pairs")
            if not folder.exists():
                calibrate(self.pipe, self.tuning_prompts, density=0.5, output_dir=measured, **arguments)
                price_by_pairs(measured / "calibration", folder, allowed)
        return calibrate(self.pipe, self.tuning_prompts, target_psnr=target, output_dir=folder, **arguments)


def price_by_pairs(measured: Path, folder: Path, candidates: Sequence[Candidate]) -> None:
    """Copy a calibration's dense generations, with latencies as if a kept pair cost alike in every candidate."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "calibration").mkdir(parents=True)
    for path in (measured / "fingerprint.json", *measured.glob("dense_*.safetensors")):
        shutil.copy2(path, partial / "calibration")
    conditions = json.loads((measured / "fingerprint.json").read_text(encoding="utf-8"))
    stage = Checkpoint(measured, conditions).load("latency")
    if stage is None:
        raise ValueError(f"{measured}: expected a finished calibration, got one without latencies")
    plain = stage[1]["plain"]
    densities = torch.tensor([candidate.density for candidate in candidates], dtype=torch.float64)
    Checkpoint(partial / "calibration", conditions).save(
        "latency", {"candidates": plain * densities}, {**stage[1], "split": 0.0}
    )
    partial.rename(folder)


def run(bench: Bench) -> dict[str, Any]:
    """Bring all rows to the targets, compare them on the held-out prompts and write the output."""
    tuned, plans = bench.tuned(), bench.plans()
    rows: list[dict[str, Any]] = []
    variants: dict[str, Variant] = {"dense": DENSE}
    for dial in bench.dials:
        for target, result in tuned[dial.label].items():
            variant = parse_variant(dial.name(result.chosen.value))
            name = f"{dial.label} {result.chosen.value:g}"
            variants[name] = Variant(name, variant.apply, variant.plan, variant.identity)
            found = {"variant": variant.name, "reached": result.reached, "tuned_psnr": result.chosen.psnr}
            rows.append({"label": dial.label, "ours": False, "target": target, "row": name, **found})
    for label, by_target in plans.items():
        for target, plan in by_target.items():
            name = f"{label}, {target:g} dB"
            variants[name] = plan_variant(plan, name)
            measured = plan.validated
            found = {
                "reached": measured["target_met"],
                "tuned_psnr": measured["psnr_calibration"],
                "calibration_dense_generations": measured["calibration_dense_generations"],
            }
            rows.append({"label": label, "ours": True, "target": target, "row": name, **found})
    identities = "\n".join(variant.identity for variant in variants.values())
    evaluation = evaluate(
        bench.pipe,
        list(variants.values()),
        bench.prompts,
        bench.settings,
        model="demo",
        seed=bench.seed + HELD_OUT_SEED,
        scorer=bench.scorer,
        attention_steps=0,
        output_dir=bench.folder / f"held-out-{hashlib.sha256(identities.encode()).hexdigest()[:12]}",
    ).to_dict()
    report = {
        "format_version": FORMAT_VERSION,
        "targets": bench.targets,
        "tuning_prompts": bench.tuning_prompts,
        "tuning_seed": bench.seed,
        "rows": rows,
        "speedup_at": {
            label: [speedup_at(points, target) for target in bench.targets]
            for label, points in measured_points(rows, evaluation).items()
        },
        "evaluation": evaluation,
    }
    write_json(bench.output, report)
    return report


def measured_points(
    rows: Sequence[dict[str, Any]], evaluation: dict[str, Any]
) -> dict[str, list[tuple[float, float]]]:
    """(mean PSNR, speed-up) of every label's rows on the held-out prompts, those that are the dense video left out."""
    found = {
        row["name"]: (row["psnr_mean"], row["speedup"])
        for row in evaluation["variants"]
        if not row["identical_to_dense"]
    }
    points: dict[str, list[tuple[float, float]]] = {row["label"]: [] for row in rows}
    for row in rows:
        if row["row"] in found:
            points[row["label"]].append(found[row["row"]])
    return points


def prepared(args: argparse.Namespace) -> Bench:
    """Load the model and open the folder of what was measured on it.

    Raises:
        ValueError: a number out of range, an unknown name, no `presets.json` to choose from, or an absent device.
    """
    if args.probes < 1:
        raise ValueError(f"probes: expected a number from 1, got {args.probes}")
    for name, targets in (("targets", args.targets), ("beyond", args.beyond)):
        if len(set(targets)) != len(targets) or not all(0 < t < PSNR_CEILING_DB for t in targets):
            raise ValueError(
                f"{name}: expected each once, above 0 and below {PSNR_CEILING_DB:g} dB, got {targets}"
            )
    if args.count < 1:
        raise ValueError(f"count: expected a number from 1, got {args.count}")
    dials: list[Dial] = []
    if args.group == "presets":
        labels = args.only.split(",") if args.only else best_presets(read_presets(args.presets), args.count)
        dials = [dial_of(label.strip(), args.steps) for label in dict.fromkeys(labels)]
    elif args.only:
        raise ValueError("only: expected --group presets with it, got --group ablation")
    at = demo_work(args, FORMAT_VERSION, tuning=True)
    output = args.output or Path("benchmarks/results") / f"equal_psnr_{args.group}.json"
    return Bench(
        **vars(at),
        targets=args.targets,
        probes=args.probes,
        beyond=args.beyond,
        dials=dials,
        calibrators=PLAN if args.group == "presets" else ABLATION,
        output=output,
    )


def read_presets(path: Path) -> dict[str, Any]:
    """`presets.json`.

    Raises:
        ValueError: it is not there, or not finished.
    """
    if not path.is_file():
        raise ValueError(f"presets: expected {path}; run benchmarks/presets.py, or name some with --only")
    report = json.loads(path.read_text(encoding="utf-8"))
    done, of = report["generations"]["done"], report["generations"]["of"]
    if done < of:
        raise ValueError(
            f"presets: expected {path} to hold all generations, got {done} of {of}; run benchmarks/presets.py again"
        )
    return report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", choices=("presets", "ablation"), default="presets")
    parser.add_argument("--targets", type=float, nargs="+", default=[28.0, 32.0, 36.0], metavar="DB")
    parser.add_argument(
        "--beyond",
        type=float,
        nargs="*",
        default=[],
        metavar="DB",
        help="further targets, without a column: what was tuned on one prompt may be less faithful on others",
    )
    parser.add_argument(
        "--only", metavar="NAMES", help=f"these systems, comma-separated; NAME{MEANS} adds means"
    )
    parser.add_argument("--count", type=int, default=6, help="best presets to take (default %(default)s)")
    parser.add_argument("--presets", type=Path, default=Path("benchmarks/results/presets.json"))
    parser.add_argument("--probes", type=int, default=5, help="places of a dial per target, at most")
    add_arguments(parser, work="outputs/equal_psnr", tuning=True)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/equal_psnr_GROUP.json")
    args = parser.parse_args(argv)
    try:
        bench = prepared(args)
    except ValueError as error:
        parser.error(str(error))
    run(bench)


if __name__ == "__main__":
    main()
