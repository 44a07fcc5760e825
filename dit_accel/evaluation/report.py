"""The comparison as text: console and markdown tables, and a plan as a map of letters."""

from collections.abc import Mapping, Sequence
from typing import Any

from dit_accel.plan import AccelPlan


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# Heading, field of a variant's summary, format.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("seconds", "seconds_p50", ".2f"),
    ("speed-up", "speedup", ".2f"),
    ("attention speed-up", "attention_speedup", ".2f"),
    ("PSNR mean", "psnr_mean", ".2f"),
    ("PSNR min", "psnr_min", ".2f"),
    ("SSIM", "ssim_mean", ".4f"),
    ("latent rel L2", "latent_rel_l2", ".4f"),
    ("density", "density_mean", ".3f"),
    ("skipped", "skipped_share", ".0%"),
    ("cache MB", "cache_mb", ".1f"),
    ("guarded heads", "guarded_heads", ".1f"),
    ("semantic", "semantic", ".3f"),
)


# Shown where some variant has them, and where some variant has more than 0 of them.
OPTIONAL = ("semantic", "attention_speedup")
IF_ANY = ("skipped_share", "cache_mb", "guarded_heads")


def _cells(evaluation: Mapping[str, Any]) -> list[list[str]]:
    variants = [_in_megabytes(row) for row in evaluation["variants"]]
    columns = [
        column
        for column in COLUMNS
        if (column[1] not in OPTIONAL or any(row[column[1]] is not None for row in variants))
        and (column[1] not in IF_ANY or any(row[column[1]] for row in variants))
    ]
    rows = [["variant", *(heading for heading, _, _ in columns)]]
    for row in variants:
        hidden: set[str] = set()
        if row["name"] == "dense":
            hidden = {"psnr_mean", "psnr_min", "ssim_mean", "latent_rel_l2"}
        elif row["identical_to_dense"]:
            hidden = {"speedup"}
        rows.append(
            [row["name"], *("–" if key in hidden else _number(row[key], form) for _, key, form in columns)]
        )
    return rows


def _in_megabytes(row: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's row with what older results do not have."""
    row = {
        **dict.fromkeys(("skipped_share", "cache_bytes", "guarded_heads")),
        "identical_to_dense": False,
        **row,
    }
    return {**row, "cache_mb": None if row["cache_bytes"] is None else row["cache_bytes"] / 1e6}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _processor(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores"


def _caption(evaluation: Mapping[str, Any]) -> str:
    machine, settings = evaluation["machine"], evaluation["settings"]
    share = evaluation["attention_share"]
    parts = [
        f"{evaluation['model']}, {_counted(len(evaluation['prompts']), 'prompt')}, {settings['num_frames']} frames of "
        f"{settings['width']}×{settings['height']}, {settings['num_inference_steps']} steps",
        f"{machine['gpu'] or _processor(machine)}, {machine['dtype']}",
        f"torch {machine['torch']}",
        f"dense: {evaluation['dense_backend']}",
    ]
    if share is not None:
        parts.append(f"attention is {share:.0%} of a dense step")
    if (count := evaluation.get("processes", 1)) > 1:
        parts.append(f"measured in {count} processes, one after another")
    same = [row["name"] for row in evaluation["variants"] if row.get("identical_to_dense")]
    if same:
        parts.append(f"identical to dense in every generation, so no speed-up: {', '.join(same)}")
    return "; ".join(parts)


def console_table(evaluation: Mapping[str, Any]) -> str:
    """Aligned plain text for a terminal, from the content of `evaluation.json`."""
    rows = _cells(evaluation)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    return "\n".join([_caption(evaluation), "", lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(evaluation: Mapping[str, Any]) -> str:
    """A GitHub table, from the content of `evaluation.json`."""
    head, *rows = _cells(evaluation)
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|",
        *("| " + " | ".join([f"`{row[0]}`", *row[1:]]) + " |" for row in rows),
    ]
    return "\n".join([*lines, "", _caption(evaluation) + "."])


def range_title(plan: AccelPlan, number: int) -> str:
    """Where a step range lies in the denoising, e.g. "0 – 30 % of the denoising"."""
    ends = [*plan.range_starts[1:], 1.0]
    return f"{plan.range_starts[number]:.0%} to {ends[number]:.0%} of denoising"


def plan_map(plan: AccelPlan) -> str:
    """A plan as text: one line per layer, one cell per head, for each step range."""
    ranges, layers, heads = plan.choice.shape
    lines: list[str] = []
    for number in range(ranges):
        cells = [
            [plan.candidates[int(plan.choice[number, layer, head])].label for head in range(heads)]
            for layer in range(layers)
        ]
        lines.append(range_title(plan, number))
        lines += _grid(cells, _layer_names(plan, layers))
    return "\n".join(lines)


def _layer_names(plan: AccelPlan, layers: int) -> list[str]:
    return list(plan.layers) if plan.layers is not None else ["every layer"] * layers


def _grid(cells: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    width = max(len(cell) for row in cells for cell in row)
    margin = max(len(name) for name in names)
    return [
        f"  {name.ljust(margin)}  " + "  ".join(cell.ljust(width) for cell in row).rstrip()
        for name, row in zip(names, cells, strict=True)
    ]
