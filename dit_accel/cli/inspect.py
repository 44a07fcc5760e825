"""`dit-accel inspect`: what a plan does to each head, and what it was measured to give."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dit_accel.cli.options import add_output

if TYPE_CHECKING:
    from dit_accel.plan import AccelPlan


def configure(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("inspect", help="show a plan: families, densities, validated quality")
    parser.add_argument("plan", metavar="PLAN", help="plan directory or Hub id")
    add_output(parser, None)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Describe the plan as text or JSON; with `--output` also draw what was measured, each as one PNG."""
    from dit_accel.evaluation.report import plan_map
    from dit_accel.plan import AccelPlan

    plan = AccelPlan.from_pretrained(args.plan)
    used = plan.choice.flatten().tolist()
    families = _families(plan)
    data: dict[str, Any] = {
        "model_class": plan.model_class,
        "config_hash": plan.config_hash,
        "block": plan.block,
        "grid": None if plan.grid is None else asdict(plan.grid),
        "dense_layers": plan.dense_layers,
        "cache": None if plan.cache is None else plan.cache.to_dict(),
        "range_starts": list(plan.range_starts),
        "layers": None if plan.layers is None else list(plan.layers),
        "density_mean": plan.density_mean,
        "candidates": [
            candidate.to_dict() | {"label": candidate.label, "heads": used.count(number)}
            for number, candidate in enumerate(plan.candidates)
        ],
        "choice": plan.choice.tolist(),
        "families": families,
        "objective": plan.objective,
        "validated": plan.validated,
    }
    drawn: list[str] = []
    if args.output is not None:
        from dit_accel.cli.inspect_figures import save_figures
        from dit_accel.evaluation.files import write_json

        pictures = save_figures(plan, args.output)
        data["pictures"] = pictures
        drawn = [
            str(args.output / name) if reason is None else f"{name}: not drawn, {reason}"
            for name, reason in pictures.items()
        ]
        write_json(args.output / "inspect.json", data)
    lines = [
        f"model           {plan.model_class or 'any (a preset)'}",
        f"density         {plan.density_mean:.3f} planned, blocks of {plan.block} tokens",
        *_facts("asked for", plan.objective),
        *_facts("measured", plan.validated),
        "",
        *_table(families),
        *_ranges(plan),
        *_parts(plan),
        *_steps(plan),
        "",
        plan_map(plan),
        *([""] if drawn else []),
        *drawn,
    ]
    return data, "\n".join(lines)


def _families(plan: AccelPlan) -> list[dict[str, Any]]:
    """The heads of each family and precision over all step ranges, and the mean of what was measured for them."""
    import torch

    density = torch.tensor([candidate.density for candidate in plan.candidates])[plan.choice.long()]
    measured = {
        "density": density,
        "recall": plan.recall,
        "rel_l2": plan.rel_l2,
        "latency_ms": plan.latency_ms,
        "sensitivity": torch.tensor(plan.validated["sensitivity"])
        if "sensitivity" in plan.validated
        else None,
    }
    rows = []
    kinds = [(candidate.family, candidate.precision) for candidate in plan.candidates]
    for family, precision in dict.fromkeys(kinds):
        numbers = [number for number, kind in enumerate(kinds) if kind == (family, precision)]
        at = torch.isin(plan.choice, torch.tensor(numbers, dtype=torch.int16))
        if at.any():
            means = {
                name: None if value is None else float(value[at].mean()) for name, value in measured.items()
            }
            rows.append({"family": family, "precision": precision, "heads": int(at.sum()), **means})
    return sorted(rows, key=lambda row: -row["heads"])


def _table(families: list[dict[str, Any]]) -> list[str]:
    """The families as aligned text, without columns that tell nothing: not measured, or the model's own precision."""
    names = [name for name in families[0] if any(row[name] not in (None, "native") for row in families)]
    cells = [[name.replace("_", " ") for name in names]]
    cells += [
        [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in names]
        for row in families
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    ]


def _ranges(plan: AccelPlan) -> list[str]:
    """One line per step range: how sensitive it is, what it spends and saves."""
    parts = plan.validated.get("ranges", [])
    if not parts:
        return []
    from dit_accel.evaluation.report import range_title

    total = sum(part["error"] for part in parts) or 1.0
    lines = ["", "step range                 sensitivity  error share  attention speed-up"]
    tables = plan.validated.get("sensitivity")
    for number, part in enumerate(parts):
        mean = "–" if tables is None else f"{_mean(tables[number]):.4f}"
        # A schedule may leave out all forwards of a range.
        took = part["attention_ms"]
        speedup = f"{part['attention_ms_dense'] / took:.2f}" if took else "–"
        lines.append(
            f"{range_title(plan, number):<25}  {mean:>11}  {part['error'] / total:>11.1%}  {speedup:>18}"
        )
    if (error := plan.validated.get("attention_error")) is not None:
        lines.append(f"attention took {1 + error:.2f} times what was predicted of its heads")
    if (error := plan.validated.get("layer_error")) is not None:
        lines.append(f"layers timed alone {1 + error:.2f} times, where they are furthest off")
    return lines


def _parts(plan: AccelPlan) -> list[str]:
    """One line each for attention and steps, where the plan leaves out both: what it spends and saves."""
    parts = {name: part for name, part in plan.validated.get("parts", {}).items() if part["saved_ms"] > 0}
    if len(parts) < 2:
        return []
    total = sum(part["error"] for part in parts.values()) or 1.0
    return [
        "",
        "left out    error share  seconds saved",
        *(
            f"{name:<10}  {part['error'] / total:>11.1%}  {part['saved_ms'] / 1000:>13.2f}"
            for name, part in parts.items()
        ),
    ]


def _steps(plan: AccelPlan) -> list[str]:
    """One line per guidance branch of a schedule: # is a step that it computes, · one that is forecast."""
    if plan.cache is None or plan.cache.schedule is None:
        return [] if plan.cache is None else ["", f"steps           gate {plan.cache.gate}"]
    schedule = plan.cache.schedule
    strips = {
        branch: "".join("·" if step in forecasts else "#" for step in range(schedule.steps))
        for branch, forecasts in sorted(schedule.forecasts.items())
    }
    width = max((len(branch) for branch in strips), default=0)
    return ["", "steps (# computed, · forecast)", *(f"{b:<{width}}  {strip}" for b, strip in strips.items())]


def _mean(table: list[list[float]]) -> float:
    values = [value for row in table for value in row]
    return sum(values) / len(values)


def _facts(title: str, facts: dict[str, Any]) -> list[str]:
    """One line of the scalar facts; lists and tables are left to `--json`."""
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in facts.items()
        if isinstance(value, (int, float, str))
    ]
    return [f"{title:<15} {', '.join(shown)}"] if shown else []
