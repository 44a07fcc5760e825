"""The comparison as pictures: frames side by side, a plan's heads, the speed–quality curve."""

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from dit_accel.evaluation.report import range_title
from dit_accel.plan import AccelPlan

INK, MUTED, PAPER = "#1b1f24", "#6b7280", "#ffffff"
FAMILY_COLOURS = {
    "dense": "#33415c",
    "skip": "#d5d9e0",
    "window": "#2a9d8f",
    "bands": "#e9a23b",
    "stripes": "#8a5fbf",
    "pooled": "#d1495b",
    "antidiagonal": "#b5651d",
    "lowbit": "#7a9e3f",
    "searched": "#3d5a98",
    "channels": "#a0792c",
    "clustered": "#9d4edd",
    "hashed": "#6b8f71",
    "balanced": "#d77fa1",
    "radial": "#5fb3b3",
    "attention_tile": "#c28fc2",
}
SPARE_COLOURS = ("#3a7ca5", "#7a9e3f", "#b5651d", "#c77dba")
DIFFERENCE_GAIN = 5


@dataclass(frozen=True, eq=False)
class Take:
    """One video of a prompt: the variant's name, frames `[frames, height, width, 3]` in [0, 1], and a note."""

    name: str
    frames: Tensor
    note: str


@dataclass(frozen=True, eq=False)
class Takes:
    """A prompt's dense video, and those to compare with it."""

    prompt: str
    dense: Take
    others: tuple[Take, ...]

    def strips(self) -> Iterator[tuple[str, str, Tensor]]:
        """Names, notes and frames from top to bottom: every video but the dense one with its amplified difference."""
        yield self.dense.name, self.dense.note, self.dense.frames
        for take in self.others:
            yield take.name, take.note, take.frames
            difference = (take.frames - self.dense.frames).abs() * DIFFERENCE_GAIN
            yield f"difference ×{DIFFERENCE_GAIN}", "", difference


def save_comparison(prompts: Sequence[Takes], path: Path, *, columns: int = 6) -> None:
    """Dense over the other videos, each over its amplified difference, evenly spaced frames, prompts as titles.

    Raises:
        ValueError: There is no prompt.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one to draw, got none")
    # Inches: a margin for the notes on the left, and for each prompt a title over strips of frames.
    margin, title, gap, frame_width = 1.55, 0.5, 0.05, 1.93
    strip = _strip(prompts[0].dense.frames, columns)
    strip_width = frame_width * min(columns, len(prompts[0].dense.frames))
    strip_height = strip_width * strip.shape[0] / strip.shape[1]
    width = margin + strip_width + 0.15
    strips = sum(1 + 2 * len(takes.others) for takes in prompts)
    height = len(prompts) * (title + 0.2) + strips * (strip_height + gap) + 0.1
    figure = Figure(figsize=(width, height), facecolor=PAPER)

    def write(x: float, y: float, text: str, size: float, *, strong: bool, above: bool) -> None:
        figure.text(
            x / width,
            y / height,
            text,
            fontsize=size,
            color=INK if strong else MUTED,
            weight="bold" if strong else "normal",
            va="bottom" if above else "top",
            parse_math=False,
            linespacing=1.35,
        )

    y = height
    for takes in prompts:
        y -= title
        shown = textwrap.shorten(takes.prompt, width=max(20, int(strip_width * 11)), placeholder=" …")
        write(margin, y + 0.13, shown, 11.5, strong=True, above=True)
        for name, note, frames in takes.strips():
            y -= strip_height
            write(0.12, y + strip_height / 2, name, 10.5, strong=True, above=True)
            write(0.12, y + strip_height / 2, note, 9, strong=False, above=False)
            place = (margin / width, y / height, strip_width / width, strip_height / height)
            axes = figure.add_axes(place)
            axes.imshow(_strip(frames, columns), interpolation="lanczos", aspect="auto")
            axes.set_axis_off()
            y -= gap
        y -= 0.2
    _save(figure, path)


def _strip(frames: Tensor, columns: int) -> np.ndarray:
    """Evenly spaced frames side by side with white between them, `[height, width, 3]`."""
    chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    white = np.ones((frames.shape[1], max(1, frames.shape[2] // 48), 3), dtype=np.float32)
    parts = [part for number in chosen for part in (frames[number].clamp(0, 1).numpy(), white)]
    return np.concatenate(parts[:-1], axis=1)


def save_heads(plan: AccelPlan, path: Path) -> None:
    """Layer × head map of a plan, a panel per step range.

    Colour is the family, number the density in %, and below it the precision where it is not the model's.
    """
    ranges, layers, heads = plan.choice.shape
    used = [plan.candidates[number].family for number in sorted(set(plan.choice.flatten().tolist()))]
    families = [name for name in (*FAMILY_COLOURS, *sorted(set(used))) if name in used]
    families = list(dict.fromkeys(families))
    spare = iter(SPARE_COLOURS * len(families))
    colours = {name: FAMILY_COLOURS.get(name) or next(spare) for name in families}
    cell = 0.62
    figure = Figure(
        figsize=(max(4.2, ranges * (heads * cell + 0.55) + 0.7), layers * cell * 0.8 + 1.75), facecolor=PAPER
    )
    panels = figure.subplots(1, ranges, squeeze=False, sharey=True)[0]
    for number, axes in enumerate(panels):
        _draw_heads(axes, plan, number, colours)
    panels[0].set_ylabel("layer", color=MUTED)
    figure.suptitle(
        f"planned density {plan.density_mean:.2f}", color=INK, weight="bold", fontsize=11.5, y=0.985
    )
    width, height = figure.get_size_inches()
    columns = min(len(families), int(width / 1.05))
    figure.legend(
        handles=[Patch(facecolor=colours[name], label=name) for name in families],
        loc="lower center",
        ncols=columns,
        title="number: kept query–key pairs in %; colour:",
        title_fontproperties={"size": 9},
        frameon=False,
        fontsize=9.5,
        handlelength=1.1,
        columnspacing=1.3,
    )
    legend_inches = 0.4 + 0.22 * math.ceil(len(families) / columns)
    figure.tight_layout(rect=(0, legend_inches / height, 1, 1), w_pad=1.2)
    _save(figure, path)


def _draw_heads(axes: Axes, plan: AccelPlan, number: int, colours: Mapping[str, str]) -> None:
    table = [[plan.candidates[index] for index in row] for row in plan.choice[number].tolist()]
    axes.imshow([[to_rgb(colours[entry.family]) for entry in row] for row in table], aspect="auto")
    for layer, row in enumerate(table):
        for head, entry in enumerate(row):
            red, green, blue = to_rgb(colours[entry.family])
            ink = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.6 else PAPER
            text = {"dense": "100", "skip": "0"}.get(entry.family, f"{100 * entry.density:.0f}")
            own = entry.precision == "native"
            place: dict[str, Any] = {"ha": "center", "color": ink}
            axes.text(head, layer, text, va="center" if own else "bottom", fontsize=9.5, **place)
            if not own:
                axes.text(
                    head, layer + 0.06, entry.precision.replace("_", " "), va="top", fontsize=6, **place
                )
    axes.set_xticks(range(len(table[0])))
    axes.set_yticks(range(len(table)))
    axes.set_xticks(np.arange(0.5, len(table[0]) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(table) - 1), minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=2)
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("head", color=MUTED)
    axes.set_title(range_title(plan, number), fontsize=9.5, color=MUTED)


def save_curve(evaluation: Mapping[str, Any], path: Path) -> None:
    """Speed-up against PSNR of every variant but dense; the line joins those that no other beats in both.

    Raises:
        ValueError: Nothing but dense was run.
    """
    rows = [row for row in evaluation["variants"] if row["name"] != "dense"]
    if not rows:
        raise ValueError("variants: expected at least one besides dense to draw a curve, got none")
    figure = Figure(figsize=(7.6, 4.8), facecolor=PAPER)
    axes = figure.add_subplot()
    best = [
        row
        for row in rows
        if not any(
            other["speedup"] >= row["speedup"] and other["psnr_mean"] >= row["psnr_mean"] and other is not row
            for other in rows
        )
    ]
    best.sort(key=lambda row: row["speedup"])
    axes.plot(
        [r["speedup"] for r in best], [r["psnr_mean"] for r in best], color="#2a9d8f", alpha=0.5, zorder=1
    )
    kinds = {
        "plan": "#d1495b",
        "accelerated": "#d1495b",
        "joint": "#6d4bc3",
        "preset": "#2a9d8f",
        "diffusers": "#e9a23b",
        "cache-dit": "#e9a23b",
    }
    for row in rows:
        colour = kinds.get(re.split("[:@]", row["name"])[0], "#33415c")
        axes.vlines(row["speedup"], row["psnr_min"], row["psnr_mean"], color=colour, alpha=0.35, linewidth=2)
        axes.scatter(row["speedup"], row["psnr_mean"], color=colour, s=46, zorder=3, edgecolor=PAPER)
        axes.annotate(
            row["name"].rstrip("/").split("/")[-1], (row["speedup"], row["psnr_mean"]), xytext=(7, 5),
            textcoords="offset points", fontsize=9, color=INK,
        )  # fmt: skip
    axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=":")
    axes.set_xlabel("speed-up of the whole generation over dense", color=INK)
    axes.set_ylabel("PSNR against dense (dB); line down to the worst prompt", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.12, y=0.12)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor=PAPER)
