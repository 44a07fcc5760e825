"""`dit-accel generate`: one prompt to a video, dense or with a plan."""

import argparse
import sys
from dataclasses import replace
from typing import Any

from dit_accel.cli.options import add_device, add_model, add_output, add_settings, load, ready


def configure(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("generate", help="generate one video, dense or with a plan")
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="what to generate")
    parser.add_argument("--plan", metavar="DIR", help="plan directory or Hub id (default: dense)")
    add_settings(parser)
    add_device(parser)
    add_output(parser, "outputs/generate")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Generate and write `video.mp4`, `frames/*.png` and `generation.json`."""
    from tqdm import tqdm

    from dit_accel.evaluation.files import write_json
    from dit_accel.evaluation.generate import generate_variant, quiet
    from dit_accel.evaluation.media import write_frames, write_video
    from dit_accel.evaluation.variants import parse_variant

    variant = parse_variant("dense" if args.plan is None else f"plan:{args.plan}")
    ready(args.output)
    pipe, settings = load(args)
    with quiet(pipe), tqdm(total=settings.num_inference_steps, unit="step", desc=variant.name) as bar:
        made = generate_variant(pipe, variant, args.prompt, settings, seed=args.seed, on_step=bar.update)
    if not made.is_finite:
        raise ValueError(
            "the frames are not finite, NaN or infinity; give the model another --dtype, bfloat16 for instance"
        )
    count, height, width = made.frames.shape[:3]
    asked = (settings.num_frames, settings.height, settings.width)
    if (count, height, width) != asked:
        print(
            f"asked for {asked[0]} frames of {asked[2]}×{asked[1]}, the pipeline made {count} of {width}×{height}",
            file=sys.stderr,
        )
        settings = replace(settings, num_frames=count, height=height, width=width)
    write_frames(made.frames, args.output / "frames")
    video = write_video(made.frames, args.output / "video.mp4")
    data = {
        "model": args.model,
        "prompt": args.prompt,
        "plan": args.plan,
        "seed": args.seed,
        "settings": settings.to_dict(),
        "seconds": made.seconds,
        "density": made.density,
        "video": str(video),
        "frames": str(args.output / "frames"),
    }
    write_json(args.output / "generation.json", data)
    return data, f"{video} ({made.seconds:.1f} s, attention density {made.density:.3f})"
