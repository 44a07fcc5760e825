"""Draw the demo model's speed-quality curve: plans of one calibration, of attention and of steps too, beside presets.

    dit-accel demo                                    # leaves its calibration in outputs/demo/plan
    python benchmarks/demo_curve.py --calibration outputs/demo/plan --prompts 1

The calibration's measurements are used as they are; only the choice is made anew for each density, and for each target
of attention and steps together, which takes a few generations. Writes
``benchmarks/results/demo_curve.json`` and ``demo_curve.png``; what each generation gave is kept in ``--work``, so a
killed run goes on where it was.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dit_accel.calibration import calibrate
from dit_accel.evaluation.figures import save_curve
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.run import evaluate
from dit_accel.evaluation.variants import DENSE, parse_variants, plan_variant
from dit_accel.pipelines import demo, load_demo
from dit_accel.plan import AccelPlan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calibration", type=Path, required=True, help="a plan directory written by calibrate"
    )
    parser.add_argument("--densities", type=float, nargs="+", default=[0.08, 0.15, 0.25, 0.4, 0.6])
    parser.add_argument(
        "--joint",
        type=float,
        nargs="*",
        default=[25.0, 28.0, 32.0, 36.0],
        help="target PSNR of joint plans, dB",
    )
    parser.add_argument("--presets", default="preset:pooled@0.25,preset:pooled@0.25:remainder=true")
    parser.add_argument("--prompts", type=int, default=1, help="held-out prompts to generate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("outputs/curve"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    measured, most = args.calibration / "calibration", len(demo.PROMPTS["held_out"])
    if not (measured / "fingerprint.json").is_file():
        parser.error(f"calibration: expected a directory written by calibrate, got {args.calibration}")
    if not 1 <= args.prompts <= most:
        parser.error(f"prompts: expected a number from 1 to {most}, got {args.prompts}")
    conditions = json.loads((measured / "fingerprint.json").read_text(encoding="utf-8"))
    settings = GenerationSettings(
        **{name: conditions[name] for name in GenerationSettings.__dataclass_fields__}
    )
    shutil.copytree(measured, args.work / "plan" / "calibration", dirs_exist_ok=True)
    pipe = load_demo(torch.bfloat16, args.device)

    given = {name: conditions[name] for name in ("seed", "downstream", "held_out_prompts")}
    given["candidates"] = AccelPlan.from_pretrained(args.calibration).candidates

    def planned(**goal: Any) -> AccelPlan:
        directory = args.work / "plan"
        return calibrate(
            pipe, conditions["prompts"], **settings.to_dict(), **given, **goal, output_dir=directory
        )

    variants = [DENSE]
    variants += [plan_variant(planned(density=d), f"plan@{d:g}") for d in args.densities]
    variants += [plan_variant(planned(target_psnr=t, cache=True), f"joint@{t:g}dB") for t in args.joint]
    variants += [variant for variant in parse_variants(args.presets) if variant.name != "dense"]
    # Seeds and prompts that neither the calibration nor the demo's comparison has seen.
    result = evaluate(
        pipe,
        variants,
        demo.PROMPTS["held_out"][-args.prompts :],
        settings,
        model="demo",
        seed=conditions["seed"] + 1000,
        scorer=demo.score,
        output_dir=args.work,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    result.save(args.work)
    shutil.copyfile(args.work / "evaluation.json", args.output / "demo_curve.json")
    save_curve(result.to_dict(), args.output / "demo_curve.png")


if __name__ == "__main__":
    main()
