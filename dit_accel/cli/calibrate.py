"""`dit-accel calibrate`: measure a model's heads and write a plan."""

import argparse
from pathlib import Path
from typing import Any

from dit_accel.cli.options import add_device, add_model, add_output, add_settings, load

DEFAULT_TARGET_PSNR = 28.0


def configure(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("calibrate", help="measure a model's heads and write a plan")
    add_model(parser)
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt per line (demo: brings its own)"
    )
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE", help="prompts the finished plan is measured on"
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--target-psnr", type=float, metavar="DB",
                      help=f"PSNR to keep against dense (default {DEFAULT_TARGET_PSNR:g})")  # fmt: skip
    goal.add_argument("--target-ssim", type=float, metavar="S", help="SSIM to keep against dense instead")
    goal.add_argument("--target-latent-rel-l2", type=float, metavar="E",
                      help="relative L2 distance of the final latents to keep instead")  # fmt: skip
    goal.add_argument("--speedup", type=float, metavar="X", help="speed-up over dense to reach instead")
    goal.add_argument("--density", type=float, metavar="D", help="mean density to reach instead, in (0, 1]")
    parser.add_argument("--candidates", metavar="SYSTEM",
                        help="choose among what a system does whose authors calibrate it: doublesparsity, minference, "
                             "moa, paro, sale, sparge, sparse-vdit, sta or svoo")  # fmt: skip
    parser.add_argument("--cache", action="store_true",
                        help="also choose which steps to compute and forecast the others")  # fmt: skip
    parser.add_argument("--downstream", action="store_true",
                        help="weigh heads by how far they move the prediction (takes backward passes)")  # fmt: skip
    add_settings(parser)
    add_device(parser)
    add_output(parser, "outputs/plan")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Calibrate; started again with the same arguments it goes on where it was."""
    from dit_accel.calibration import calibrate
    from dit_accel.evaluation.models import default_prompts, read_prompts

    prompts = default_prompts(args.model, "calibration", args.prompts)
    held_out = read_prompts(args.held_out) if args.held_out else None
    goals = ("target_psnr", "target_ssim", "target_latent_rel_l2", "density", "speedup")
    goal = {name: getattr(args, name) for name in goals}
    if all(value is None for value in goal.values()):
        goal["target_psnr"] = DEFAULT_TARGET_PSNR
    pipe, settings = load(args)
    plan = calibrate(
        pipe,
        prompts,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        **goal,
        downstream=args.downstream,
        cache=args.cache,
        candidates=args.candidates,
        output_dir=args.output,
        seed=args.seed,
        held_out_prompts=held_out,
        progress=True,
    )
    data = {
        "plan": str(args.output),
        "density_mean": plan.density_mean,
        "objective": plan.objective,
        "validated": plan.validated,
    }
    measured = ", ".join(
        f"{name} {value}" if isinstance(value, bool) else f"{name} {value:.4g}"
        for name, value in plan.validated.items()
        if isinstance(value, (int, float))
    )
    return (
        data,
        f"{args.output} (planned density {plan.density_mean:.3f}{', ' + measured if measured else ''})",
    )
