"""Calibrate a plan, then compare it with dense and a preset on prompts that the calibration has not seen.

    python examples/calibrate_and_compare.py --target-psnr 30 --output outputs/compare

A model of your own needs `--model` and a file with prompts: the first two calibrate, all others compare.
"""

import argparse
from pathlib import Path

import torch

import dit_accel
from dit_accel.evaluation import (
    DENSE,
    console_table,
    evaluate,
    load_model,
    parse_variants,
    plan_variant,
    resolve_settings,
    write_outputs,
)
from dit_accel.evaluation.models import default_prompts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="pipeline directory, Hub id, or 'demo'")
    parser.add_argument("--prompts", type=Path, help="one prompt per line")
    parser.add_argument("--target-psnr", type=float, default=28.0, help="dB")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"))
    for name in ("height", "width", "num-frames", "num-inference-steps"):
        parser.add_argument(f"--{name}", type=int, help="default: the model's own")
    args = parser.parse_args()
    prompts = default_prompts(args.model, "calibration", args.prompts)
    unseen = prompts[2:] if args.prompts else default_prompts(args.model, "held_out", None)[:2]
    if not unseen:
        parser.error(
            f"--prompts: expected at least three, two to calibrate and others to compare, got {len(prompts)}"
        )

    pipe = load_model(args.model, dtype=torch.bfloat16)
    settings = resolve_settings(
        args.model,
        pipe,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
    )
    plan = dit_accel.calibrate(
        pipe,
        prompts[:2],
        **settings.to_dict(),
        target_psnr=args.target_psnr,
        output_dir=args.output / "plan",
    )

    variants = [DENSE, plan_variant(plan, "calibrated"), *parse_variants("preset:window@0.3")[1:]]
    result = evaluate(pipe, variants, unseen, settings, model=args.model, seed=100, output_dir=args.output)
    write_outputs(result, variants, args.output)
    print(console_table(result.to_dict()))


if __name__ == "__main__":
    main()
