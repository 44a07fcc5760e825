"""The demo model at work in a comparison: what its command lines share, and a folder for what was measured on it."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.evaluation.models import GenerationSettings, resolve_device
from dit_accel.evaluation.result import Scorer
from dit_accel.evaluation.timing import machine, pipeline_digest
from dit_accel.pipelines import demo, load_demo

_SIZES = {"height": "height", "width": "width", "frames": "num_frames", "steps": "num_inference_steps"}


@dataclass(frozen=True, eq=False, kw_only=True)
class DemoWork:
    """The demo pipeline and what to generate with it; comparisons add to it what they need.

    prompts: held-out ones, to compare on; tuning_prompts: others, to tune on.
    machine: as `evaluation.timing.machine` describes it.
    folder: for finished measurements; another for other weights, settings, seeds, machines or conditions.
    scorer: tells how much of a prompt its frames show.
    """

    pipe: Any
    settings: GenerationSettings
    seed: int
    prompts: list[str]
    tuning_prompts: list[str]
    machine: dict[str, Any]
    folder: Path
    scorer: Scorer | None = demo.score


def add_arguments(parser: argparse.ArgumentParser, *, work: str, tuning: bool) -> None:
    """Options for prompts, seed, size, device and `--work`; `--tuning-prompts` where there are dials to tune."""
    parser.add_argument("--prompts", type=int, default=4, help="held-out ones (default %(default)s)")
    if tuning:
        parser.add_argument("--tuning-prompts", type=int, default=1, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    for option, name in _SIZES.items():
        parser.add_argument(f"--{option}", type=int, default=demo.DEFAULTS[name])
    parser.add_argument("--device", help="default: CUDA where there is one, else the CPU")
    parser.add_argument("--work", type=Path, default=Path(work), help="finished measurements")


def demo_work(args: argparse.Namespace, *conditions: Any, tuning: bool) -> DemoWork:
    """Load the demo model in bfloat16 as the options say.

    Args:
        conditions: JSON values that measurements also depend on.
        tuning: as for `add_arguments`; without it there are no tuning prompts.

    Raises:
        ValueError: a number out of range, or a device that is not there.
    """
    counts = {"prompts": ("held_out", args.prompts)}
    if tuning:
        counts["tuning_prompts"] = ("calibration", args.tuning_prompts)
    for name, (part, count) in counts.items():
        most = len(demo.PROMPTS[part])
        if not 1 <= count <= most:
            raise ValueError(f"{name}: expected a number from 1 to {most}, got {count}; choose one of these")
    sizes = {name: getattr(args, option) for option, name in _SIZES.items()}
    settings = GenerationSettings(**{**demo.DEFAULTS, **sizes})
    pipe = load_demo(torch.bfloat16, str(resolve_device(args.device)))
    place = machine(pipe._execution_device, torch.bfloat16)
    kind = [pipeline_digest(pipe), settings.to_dict(), args.seed, demo.PROMPTS, place, *conditions]
    return DemoWork(
        pipe=pipe,
        settings=settings,
        seed=args.seed,
        prompts=demo.PROMPTS["held_out"][: args.prompts],
        tuning_prompts=demo.PROMPTS["calibration"][: args.tuning_prompts] if tuning else [],
        machine=place,
        folder=args.work / hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:12],
    )
