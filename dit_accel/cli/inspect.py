"""`dit-accel inspect`: what a plan does to each head, and what it was measured to give."""

import argparse
from typing import Any

from dit_accel.cli.options import add_output


def configure(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("inspect", help="show a plan: families, densities, validated quality")
    parser.add_argument("plan", metavar="PLAN", help="plan directory or Hub id")
    add_output(parser, None)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Describe the plan as text or JSON; with `--output` also draw `heads.png`."""
    from dit_accel.evaluation.report import plan_map
    from dit_accel.plan import AccelPlan

    plan = AccelPlan.from_pretrained(args.plan)
    used = plan.choice.flatten().tolist()
    data: dict[str, Any] = {
        "model_class": plan.model_class,
        "config_hash": plan.config_hash,
        "block": plan.block,
        "range_starts": list(plan.range_starts),
        "layers": None if plan.layers is None else list(plan.layers),
        "density_mean": plan.density_mean,
        "candidates": [
            candidate.to_dict() | {"label": candidate.label, "heads": used.count(number)}
            for number, candidate in enumerate(plan.candidates)
        ],
        "choice": plan.choice.tolist(),
        "objective": plan.objective,
        "validated": plan.validated,
    }
    if args.output is not None:
        from dit_accel.evaluation.figures import save_heads
        from dit_accel.evaluation.store import write_json

        save_heads(plan, args.output / "heads.png")
        write_json(args.output / "inspect.json", data)
    lines = [
        f"model           {plan.model_class or 'any (a preset)'}",
        f"density         {plan.density_mean:.3f} planned, blocks of {plan.block} tokens",
        *_facts("asked for", plan.objective),
        *_facts("measured", plan.validated),
        "",
        plan_map(plan),
    ]
    return data, "\n".join(lines)


def _facts(title: str, facts: dict[str, Any]) -> list[str]:
    """One line of the scalar facts; lists and tables are left to `--json`."""
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in facts.items()
        if isinstance(value, (int, float, str))
    ]
    return [f"{title:<15} {', '.join(shown)}"] if shown else []
