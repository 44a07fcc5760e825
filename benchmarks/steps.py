"""Which denoising steps bear sparse attention: one part of the steps is sparse at a time, the others are dense.

    python benchmarks/steps.py                                   # full size, hours on two CPU cores
    python benchmarks/steps.py --height 96 --width 128           # what the README shows

The steps are cut into equal parts. Each held-out prompt is generated densely, with every step sparse, and with the
steps of one part sparse, by one uncalibrated preset. Published advice on where attention should stay dense conflicts
(first steps, last steps, both); this says it for the model at hand. Writes ``benchmarks/results/steps.json``; finished
generations are kept in ``--work``, so a killed run goes on where it was.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_accel.bench.demo_work import DemoWork, add_arguments, demo_work
from dit_accel.calibration.schedule import range_starts
from dit_accel.candidate import Candidate
from dit_accel.clock import Clock
from dit_accel.evaluation.files import write_json
from dit_accel.evaluation.run import evaluate
from dit_accel.evaluation.variants import DENSE, Variant, plan_variant
from dit_accel.plan import AccelPlan

FORMAT_VERSION = 1
EVERYWHERE = "all steps"


def parts_of(steps: int, parts: int) -> list[tuple[int, int]]:
    """First step of each part, and the one after its last.

    Raises:
        ValueError: a part would have no step.
    """
    if not 1 <= parts <= steps:
        raise ValueError(f"parts: expected a number from 1 to {steps}, the steps, got {parts}")
    return list(itertools.pairwise(round(number * steps / parts) for number in range(parts + 1)))


def candidate_of(sparse: AccelPlan) -> Candidate:
    """The one way in which a plan that is the same everywhere runs its heads."""
    (candidate,) = {sparse.candidates[number] for number in sparse.choice.unique().tolist()}
    return candidate


def variants_of(sparse: AccelPlan, progress: Sequence[float], parts: int) -> list[Variant]:
    """Dense, the plan everywhere, and the plan in one part at a time.

    Args:
        sparse: a plan that is the same for all steps, layers and heads.
        progress: of each step.
    """
    candidate = candidate_of(sparse)
    variants = [DENSE, plan_variant(sparse, EVERYWHERE)]
    for start, stop in parts_of(len(progress), parts):
        bounds = sorted({0, start, stop, len(progress)})
        choice = torch.tensor([int(bound == start) for bound in bounds[:-1]], dtype=torch.int16)
        plan = replace(
            sparse,
            candidates=(Candidate("dense", 1.0), candidate),
            choice=choice[:, None, None],
            range_starts=range_starts(bounds, progress),
        )
        variants.append(plan_variant(plan, f"steps {start + 1}-{stop}"))
    return variants


def run(work: DemoWork, sparse: AccelPlan, parts: int, output: Path) -> dict[str, Any]:
    """Compare what sparse attention costs in each part of the steps."""
    work.pipe.scheduler.set_timesteps(work.settings.num_inference_steps)
    progress = Clock(work.pipe).progress()
    found = evaluate(
        work.pipe,
        variants_of(sparse, progress, parts),
        work.prompts,
        work.settings,
        model="demo",
        seed=work.seed,
        scorer=work.scorer,
        attention_steps=0,
        output_dir=work.folder,
    )
    report = {
        "format_version": FORMAT_VERSION,
        "candidate": candidate_of(sparse).label,
        "noise": [
            [1 - progress[start], 1 - progress[stop - 1]] for start, stop in parts_of(len(progress), parts)
        ],
        "evaluation": found.to_dict(),
    }
    write_json(output, report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, work="outputs/steps", tuning=False)
    parser.add_argument("--parts", type=int, default=5, help="default %(default)s")
    parser.add_argument(
        "--density", type=float, default=0.25, help="of the sparse steps (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/steps.json"))
    args = parser.parse_args(argv)
    try:
        parts_of(args.steps, args.parts)
        sparse = AccelPlan.preset("pooled", density=args.density, remainder=True)
        work = demo_work(args, args.parts, args.density, tuning=False)
    except ValueError as error:
        parser.error(str(error))
    run(work, sparse, args.parts, args.output)


if __name__ == "__main__":
    main()
