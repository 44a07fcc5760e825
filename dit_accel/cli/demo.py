"""`dit-accel demo`: calibrate the demo model, then show what the plan gives."""

import argparse
from pathlib import Path
from typing import Any

from dit_accel.cli.options import add_device, add_output, add_settings, load, stage

# A second one would cost another dense generation, and the demo is to stay short.
CALIBRATION_PROMPTS = 1
HELD_OUT_PROMPTS = 2
# For each plan; a calibration for real use takes more, and lands nearer to its target.
MAX_TRIALS = 2


def configure(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("demo", help="calibrate the demo model and compare it with its dense self")
    parser.add_argument("--model", default="demo", metavar="MODEL", help="another model (default demo)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="three prompts for another model")
    parser.add_argument("--target-psnr", type=float, default=30.0, metavar="DB", help="default %(default)g")
    add_settings(parser)
    add_device(parser)
    add_output(parser, "outputs/demo")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Calibrate, generate held-out prompts dense and accelerated, write plans, JSON, videos and pictures.

    Two plans meet the same target: one with sparse attention alone, one that leaves out steps as well.

    Killed and started again it goes on where it was.
    """
    from dit_accel.calibration import calibrate
    from dit_accel.evaluation.models import semantic_scorer
    from dit_accel.evaluation.outputs import write_outputs
    from dit_accel.evaluation.report import console_table
    from dit_accel.evaluation.run import evaluate
    from dit_accel.evaluation.variants import DENSE, plan_variant
    from dit_accel.plan import AccelPlan

    calibration_prompts, held_out_prompts = _prompts(args)
    pipe, settings = load(args)

    def calibrated(*, cache: bool) -> AccelPlan:
        return calibrate(
            pipe,
            calibration_prompts,
            **settings.to_dict(),
            target_psnr=args.target_psnr,
            cache=cache,
            max_trials=MAX_TRIALS,
            output_dir=args.output / "plan",  # what is measured serves both
            seed=args.seed,
            progress=True,
        )

    stage("1 of 3: calibrate attention and steps together (dense generations, profiled, then the search)")
    joint = calibrated(cache=True)
    joint.save_pretrained(args.output / "joint_plan")
    stage("2 of 3: the same for attention alone")
    plan = calibrated(cache=False)
    stage("3 of 3: generate held-out prompts, dense and accelerated")
    variants = [DENSE, plan_variant(plan, "accelerated"), plan_variant(joint, "joint")]
    result = evaluate(
        pipe,
        variants,
        held_out_prompts,
        settings,
        model=args.model,
        # Seeds that the calibration has not seen either.
        seed=args.seed + len(calibration_prompts),
        scorer=semantic_scorer(args.model),
        output_dir=args.output,
        # The calibration has warmed the process up already, and dense steps all take the same time.
        warmup_steps=1,
        attention_steps=1,
    )
    written = write_outputs(result, variants, args.output)
    data = result.to_dict()
    return data, "\n".join(
        [
            console_table(data),
            "",
            f"plans: {args.output / 'plan'}, {args.output / 'joint_plan'}",
            *map(str, written),
        ]
    )


def _prompts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    from dit_accel.evaluation.models import default_prompts

    calibration = default_prompts(args.model, "calibration", args.prompts)
    if args.prompts is None:
        held_out = default_prompts(args.model, "held_out", None)
    else:
        calibration, held_out = calibration[:CALIBRATION_PROMPTS], calibration[CALIBRATION_PROMPTS:]
    if len(calibration) < CALIBRATION_PROMPTS or len(held_out) < HELD_OUT_PROMPTS:
        raise ValueError(
            f"prompts: expected {CALIBRATION_PROMPTS} to calibrate on and {HELD_OUT_PROMPTS} to compare, "
            f"got {len(calibration)} and {len(held_out)}"
        )
    return calibration[:CALIBRATION_PROMPTS], held_out[:HELD_OUT_PROMPTS]
