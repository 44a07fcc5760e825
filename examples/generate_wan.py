"""Generate one video with your own Wan checkpoint, or the demo model, accelerated by a plan.

    python examples/generate_wan.py "a red circle moves left over a striped background"
    python examples/generate_wan.py "a cat on a sofa" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --plan my-plan

Without a plan every head attends within a window of 30 % of the keys; `dit-accel calibrate` makes plans.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import export_to_video

import dit_accel
from dit_accel.evaluation import load_model, resolve_settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt")
    parser.add_argument("--model", default="demo", help="pipeline directory, Hub id, or 'demo'")
    parser.add_argument("--plan", help="plan directory or Hub id")
    parser.add_argument("--output", default="video.mp4")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("height", "width", "num-frames", "num-inference-steps"):
        parser.add_argument(f"--{name}", type=int, help="default: the model's own")
    args = parser.parse_args()

    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    pipe = load_model(args.model, dtype=torch.bfloat16)
    settings = resolve_settings(
        args.model,
        pipe,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
    )
    if args.plan:
        plan = dit_accel.AccelPlan.from_pretrained(args.plan)
    else:
        plan = dit_accel.AccelPlan.preset("window", density=0.3)

    dit_accel.enable(pipe, plan)
    generator = torch.Generator("cpu").manual_seed(args.seed)
    video = pipe(args.prompt, generator=generator, **settings.to_dict()).frames[0]
    export_to_video(video, args.output, fps=16)
    print(f"{args.output}: attention ran at density {dit_accel.stats(pipe)['density_mean']:.3f}")


if __name__ == "__main__":
    main()
