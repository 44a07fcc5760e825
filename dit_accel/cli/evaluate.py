"""`dit-accel evaluate`: compare ways to run a model, interleaved in one process with equal seeds."""

import argparse
from pathlib import Path
from typing import Any

from dit_accel.cli.options import add_device, add_model, add_output, add_settings, load


def configure(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("evaluate", help="compare variants of a model by speed and quality")
    add_model(parser)
    parser.add_argument(
        "--variants",
        required=True,
        metavar="NAMES",
        help="comma-separated: dense (always runs), plan:DIR, preset:window@0.3[:order=space], "
        "preset:cg-taylor[@0.1], diffusers:first_block[@0.08] (or mag_cache, taylorseer), cache-dit:dbcache[@0.08]",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt per line (demo: its held-out ones)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N prompts only")
    parser.add_argument(
        "--warmup-steps", type=int, default=2, metavar="N", help="untimed (default %(default)s)"
    )
    parser.add_argument(
        "--attention-steps",
        type=int,
        default=3,
        metavar="N",
        help="steps of the pass that times dense attention alone (default %(default)s, 0 leaves it out)",
    )
    add_settings(parser)
    add_device(parser)
    add_output(parser, "outputs/evaluate")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the comparison, write JSON, table and pictures."""
    from dit_accel.evaluation.models import default_prompts, semantic_scorer
    from dit_accel.evaluation.outputs import write_outputs
    from dit_accel.evaluation.report import console_table
    from dit_accel.evaluation.run import evaluate
    from dit_accel.evaluation.variants import parse_variants

    variants = parse_variants(args.variants)
    prompts = default_prompts(args.model, "held_out", args.prompts)
    if args.limit is not None:
        if args.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {args.limit}")
        prompts = prompts[: args.limit]
    pipe, settings = load(args)
    result = evaluate(
        pipe,
        variants,
        prompts,
        settings,
        model=args.model,
        seed=args.seed,
        scorer=semantic_scorer(args.model),
        output_dir=args.output,
        warmup_steps=args.warmup_steps,
        attention_steps=args.attention_steps,
    )
    written = write_outputs(result, variants, args.output)
    data = result.to_dict()
    return data, "\n".join([console_table(data), "", *(str(path) for path in written)])
