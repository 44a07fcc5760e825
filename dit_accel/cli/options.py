"""Options that several subcommands share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.evaluation.models import GenerationSettings

DTYPE_NAMES = ("bfloat16", "float16", "float32")


def add_output(parser: argparse.ArgumentParser, default: str | None) -> None:
    """`--output DIR` and `--json`, which every subcommand has."""
    where = f"(default {default})" if default else "(default: nothing is written)"
    parser.add_argument("--output", type=Path, default=default and Path(default), metavar="DIR",
                        help=f"directory for what the command writes {where}")  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, and nothing else, on stdout"
    )


def ready(directory: Path) -> Path:
    """The directory, made and writable, before hours of work go into what it is to hold.

    Raises:
        OSError: it cannot be made or written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"output: expected a directory that can be written, got {directory}")
    return directory


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--dtype` and `--device`."""
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="bfloat16", help="weights (default %(default)s)"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (default: CUDA where there is one)"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Size, length, steps, guidance and seed of a generation."""
    group = parser.add_argument_group("generation (default: the model's own)")
    for name, kind in (("height", int), ("width", int), ("frames", int), ("steps", int), ("guidance", float)):
        group.add_argument(f"--{name}", type=kind, metavar="N")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the first prompt (default 0)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The positional MODEL."""
    parser.add_argument("model", metavar="MODEL", help="local pipeline directory, Hub id, or 'demo'")


def load(args: argparse.Namespace) -> tuple[Any, GenerationSettings]:
    """The pipeline and settings that the arguments ask for."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from dit_accel.evaluation.models import DTYPES, load_model, resolve_settings

    # One line on failure and one bar during work: the libraries' own loading bars and hints stay quiet.
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipe = load_model(args.model, dtype=DTYPES[args.dtype], device=args.device)
    settings = resolve_settings(
        args.model,
        pipe,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
    )
    return pipe, settings


def stage(title: str) -> None:
    """Say on stderr what comes next; its bar follows."""
    print(f"\n{title}", file=sys.stderr, flush=True)
