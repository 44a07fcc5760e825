"""What it costs that a plan serves sizes and step counts that it was not calibrated for.

    dit-accel demo                                    # leaves its calibration in outputs/demo/plan
    python benchmarks/elastic.py --plan outputs/demo/plan

A plan keeps its budgets as shares of the tokens and its step ranges as noise levels, so it runs anywhere. For each
other setting the demo model generates densely, with the plan, and with a preset of the plan's density, which loses
nothing by the move. Writes ``benchmarks/results/elastic.json``; finished generations are kept in ``--work``, so a
killed run goes on where it was.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from dit_accel.evaluation.files import write_json
from dit_accel.evaluation.models import GenerationSettings, resolve_device
from dit_accel.evaluation.run import evaluate
from dit_accel.evaluation.variants import DENSE, parse_variant, plan_variant
from dit_accel.pipelines import demo, load_demo
from dit_accel.plan import AccelPlan

FORMAT_VERSION = 1
# The calibration's own setting, two other sizes, two other step counts.
MOVES: dict[str, dict[str, int]] = {
    "as calibrated": {},
    "fewer pixels": {"height": 128, "width": 128},
    "other shape, fewer frames": {"height": 128, "width": 256, "num_frames": 17},
    "fewer steps": {"num_inference_steps": 12},
    "more steps": {"num_inference_steps": 30},
}


def settings_of(plan: AccelPlan) -> GenerationSettings:
    """The setting a plan was calibrated for.

    Raises:
        ValueError: it was not calibrated.
    """
    names = [field.name for field in fields(GenerationSettings)]
    missing = [name for name in names if plan.objective.get(name) is None]
    if missing:
        raise ValueError(f"plan: expected one that was calibrated, got one without {', '.join(missing)}")
    return GenerationSettings(**{name: plan.objective[name] for name in names})


def run(
    pipe: Any,
    plan: AccelPlan,
    prompts: Sequence[str],
    *,
    moves: dict[str, dict[str, int]],
    preset: str,
    seed: int,
    work: Path,
    output: Path,
) -> dict[str, Any]:
    """Evaluate the plan and a preset of its density (a name of `evaluate` with {} for the density) at every setting."""
    calibrated = settings_of(plan)
    variants = [DENSE, plan_variant(plan, "plan"), parse_variant(preset.format(round(plan.density_mean, 3)))]
    report: dict[str, Any] = {"format_version": FORMAT_VERSION, "plan": plan.objective, "moves": []}
    for name, changes in moves.items():
        found = evaluate(
            pipe,
            variants,
            prompts,
            replace(calibrated, **changes),
            model="demo",
            seed=seed,
            scorer=demo.score,
            attention_steps=0,
            output_dir=work / name.replace(" ", "_").replace(",", ""),
        ).to_dict()
        report["moves"].append({"name": name, "evaluation": found})
        write_json(output, report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", required=True, help="directory of a plan for the demo model")
    parser.add_argument("--prompts", type=int, default=1, help="held-out ones (default %(default)s)")
    parser.add_argument("--preset", default="preset:pooled@{}:remainder=true", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument("--device", help="default: CUDA where there is one, else the CPU")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/elastic.json"))
    parser.add_argument("--work", type=Path, default=Path("outputs/elastic"), help="finished generations")
    args = parser.parse_args(argv)
    try:
        plan = AccelPlan.from_pretrained(args.plan)
        settings_of(plan)
        prompts = demo.PROMPTS["held_out"]
        if not 1 <= args.prompts <= len(prompts):
            raise ValueError(f"prompts: expected a number from 1 to {len(prompts)}, got {args.prompts}")
        device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    run(
        load_demo(torch.bfloat16, str(device)),
        plan,
        prompts[: args.prompts],
        moves=MOVES,
        preset=args.preset,
        seed=args.seed,
        work=args.work,
        output=args.output,
    )


if __name__ == "__main__":
    main()
