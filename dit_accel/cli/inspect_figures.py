"""The pictures of `dit-accel inspect`: each takes the plan and draws what was measured for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from dit_accel.evaluation.figures import FAMILY_COLOURS, INK, MUTED, PAPER, SPARE_COLOURS, save_heads
from dit_accel.evaluation.report import range_title
from dit_accel.plan import AccelPlan

_LINE, _POINT, _CHOSEN = "#2a9d8f", "#33415c", "#d1495b"
_GOALS = {
    "target_psnr": ("psnr", "PSNR against dense (dB)"),
    "target_ssim": ("ssim", "SSIM against dense"),
    "target_latent_rel_l2": ("latent_rel_l2", "rel L2 of the latents against dense"),
}
# How far predicted and measured time may lie apart.
_TIME_TOLERANCE = 0.15


def save_figures(plan: AccelPlan, directory: Path) -> dict[str, str | None]:
    """Draw what can be drawn; the reason for each picture that cannot, None for those written."""
    made: dict[str, str | None] = {}
    for name, draw in _FIGURES.items():
        try:
            figure = draw(plan)
        except _Missing as missing:
            made[name] = str(missing)
            continue
        if figure is not None:
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(directory / name, dpi=150, facecolor=PAPER)
        else:
            save_heads(plan, directory / name)
        made[name] = None
    return made


class _Missing(Exception):
    """The plan holds no measurement that a picture needs."""


def _needed(plan: AccelPlan, name: str) -> Any:
    value = plan.validated.get(name)
    if not value:
        raise _Missing(f"the plan's calibration recorded no {name}")
    return value


def _sensitivity(plan: AccelPlan) -> Figure:
    """Relative change of the prediction per relative error of a head, a panel per step range."""
    table = np.array(_needed(plan, "sensitivity"))
    ranges, layers, heads = table.shape
    cell = 0.62
    figure = Figure(
        figsize=(max(5.2, ranges * (heads * cell + 0.55) + 1.6), layers * cell * 0.8 + 1.35), facecolor=PAPER
    )
    panels = figure.subplots(1, ranges, squeeze=False, sharey=True)[0]
    low, high = max(float(table.min()), float(table.max()) * 1e-4, 1e-12), max(float(table.max()), 1e-11)
    norm = LogNorm(low, high)
    for number, axes in enumerate(panels):
        image = axes.imshow(table[number].clip(low), norm=norm, cmap="YlGnBu", aspect="auto")
        for layer, head in np.ndindex(layers, heads):
            value = table[number, layer, head]
            ink = PAPER if norm(max(value, low)) > 0.6 else INK
            axes.text(head, layer, f"{100 * value:.2g}", ha="center", va="center", color=ink, fontsize=8.5)
        _cells(axes, heads, layers)
        axes.set_title(range_title(plan, number), fontsize=9.5, color=MUTED)
    panels[0].set_ylabel("layer", color=MUTED)
    figure.suptitle(
        "sensitivity: change of the prediction in % if a head's output is wrong by its own size",
        color=INK, weight="bold", fontsize=11, y=0.985,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 0.93, 1), w_pad=1.2)
    bar = figure.colorbar(image, cax=figure.add_axes((0.94, 0.2, 0.01, 0.6)))
    ticks = np.geomspace(low, high, 4)
    bar.set_ticks(ticks.tolist(), labels=[f"{100 * tick:.2g} %" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _histograms(plan: AccelPlan) -> Figure:
    """Recall and rel L2 of the chosen candidates, stacked by family."""
    if plan.recall is None or plan.rel_l2 is None:
        raise _Missing("the plan was not calibrated")
    figure = Figure(figsize=(9.6, 3.9), facecolor=PAPER)
    panels = figure.subplots(1, 2)
    names = [candidate.family for candidate in plan.candidates]
    families = np.array(names)[plan.choice.flatten().numpy()]
    used = [name for name in dict.fromkeys((*FAMILY_COLOURS, *names)) if name in families]
    spare = iter(SPARE_COLOURS * len(used))
    colours = [FAMILY_COLOURS.get(name) or next(spare) for name in used]
    for axes, values, title, top in (
        (panels[0], plan.recall, "recall: softmax mass on kept pairs", 1.0),
        (panels[1], plan.rel_l2, "rel L2 of the head's output", max(float(plan.rel_l2.max()), 0.05)),
    ):
        array = _flat(values)
        bins = np.linspace(0, top * 1.0001, 21)
        parts = [array[families == name].clip(0, top) for name in used]
        axes.hist(
            parts, bins=bins.tolist(), stacked=True, color=colours, label=used, edgecolor=PAPER, linewidth=0.6
        )
        axes.set_xlabel(title, color=INK)
        _clean(axes)
    panels[0].set_ylabel("heads, over all step ranges", color=INK)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", ncols=min(len(used), 8), frameon=False,
        fontsize=9.5, handlelength=1.1,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def _time(plan: AccelPlan) -> Figure:
    """Seconds of every generation that the calibration tried, predicted from the tables and measured."""
    trials = _needed(plan, "trials")
    figure = Figure(figsize=(5.4, 4.8), facecolor=PAPER)
    axes = figure.add_subplot()
    expected, measured = (np.array([t[name] for t in trials]) for name in ("seconds_expected", "seconds"))
    low, high = 0.85 * min(expected.min(), measured.min()), 1.15 * max(expected.max(), measured.max())
    line = np.array([low, high])
    axes.plot(line, line, color=MUTED, linewidth=1)
    axes.fill_between(
        line, line * (1 - _TIME_TOLERANCE), line * (1 + _TIME_TOLERANCE), color=_LINE, alpha=0.14, linewidth=0,
        label=f"within {_TIME_TOLERANCE:.0%}",
    )  # fmt: skip
    for chosen, colour, label in ((False, _POINT, "tried"), (True, _CHOSEN, "chosen")):
        at = [number for number, trial in enumerate(trials) if trial["chosen"] == chosen]
        if at:
            axes.scatter(
                expected[at], measured[at], color=colour, s=52, zorder=3, edgecolor=PAPER, label=label
            )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("seconds of a generation, predicted", color=INK)
    axes.set_ylabel("measured", color=INK)
    axes.legend(frameon=False, fontsize=9.5, loc="upper left")
    _clean(axes)
    figure.tight_layout()
    return figure


def _curve(plan: AccelPlan) -> Figure:
    """What the closed loop saw: quality against the generation's speed-up, the fitted line and the plan chosen."""
    trials, frontier = _needed(plan, "trials"), _needed(plan, "frontier")
    goal = next((name for name in _GOALS if plan.objective.get(name) is not None), "target_psnr")
    metric, label = _GOALS[goal]
    target = plan.objective.get(goal)
    attention_ms = sum(part["attention_ms_dense"] for part in _needed(plan, "ranges"))
    dense = float(np.mean([trial["seconds_dense"] for trial in trials]))

    def speedup(point: dict[str, Any]) -> float:
        """Of a plan of the tables."""
        return dense / (dense - (attention_ms - point["attention_ms"] + point.get("saved_ms", 0.0)) / 1000)

    def expected(trial: dict[str, Any]) -> float:
        return trial["seconds_dense"] / trial["seconds_expected"]

    figure = Figure(figsize=(7.2, 4.6), facecolor=PAPER)
    axes = figure.add_subplot()
    drawn = [point for point in frontier if "quality_expected" in point]
    if drawn:
        axes.plot(
            [speedup(point) for point in drawn],
            [point["quality_expected"] for point in drawn],
            color=_LINE, alpha=0.7, marker=".", zorder=1, label="plans of the tables, by the fitted line",
        )  # fmt: skip
    for chosen, colour, name in ((False, _POINT, "tried"), (True, _CHOSEN, "chosen")):
        at = [trial for trial in trials if trial["chosen"] == chosen]
        if at:
            x = [expected(trial) for trial in at]
            axes.scatter(
                x, [t[metric] for t in at], color=colour, s=56, zorder=3, edgecolor=PAPER, label=name
            )
    for number, trial in enumerate(trials, start=1):
        axes.annotate(
            str(number), (expected(trial), trial[metric]), xytext=(6, 5),
            textcoords="offset points", fontsize=9, color=INK,
        )  # fmt: skip
    if target is not None:
        axes.axhline(target, color=_CHOSEN, linewidth=1, linestyle=":", label="target")
    measured = [trial[metric] for trial in trials] + ([] if target is None else [target])
    room = max(0.6 * (max(measured) - min(measured)), 0.12 * abs(max(measured)))
    bottom, top = min(measured) - room, max(measured) + room
    axes.set_ylim(bottom, top)
    # The whole front reaches speed-ups that no target comes near.
    seen = [speedup(point) for point in drawn if bottom <= point["quality_expected"] <= top]
    seen += [expected(trial) for trial in trials]
    axes.set_xlim(min(*seen, 1.0) * 0.9, max(seen) * 1.15)
    axes.set_xlabel("speed-up of a generation over dense, predicted; numbers: order of the trials", color=INK)
    axes.set_ylabel(label, color=INK)
    axes.legend(frameon=False, fontsize=9.5)
    _clean(axes)
    figure.tight_layout()
    return figure


def _ranges(plan: AccelPlan) -> Figure:
    """What each step range spends of the error and of the time."""
    parts = _needed(plan, "ranges")
    figure = Figure(figsize=(9.6, 3.7), facecolor=PAPER)
    left, right = figure.subplots(1, 2)
    places = np.arange(len(parts))
    titles = [range_title(plan, number).replace(" of denoising", "") for number in range(len(parts))]
    total = sum(part["error"] for part in parts) or 1.0
    left.bar(places, [100 * part["error"] / total for part in parts], color=_CHOSEN, width=0.55)
    left.set_ylabel("share of the predicted error (%)", color=INK)
    right.bar(
        places - 0.19,
        [part["attention_ms_dense"] / 1000 for part in parts],
        width=0.36,
        color=_POINT,
        label="dense",
    )
    right.bar(
        places + 0.19, [part["attention_ms"] / 1000 for part in parts], width=0.36, color=_LINE, label="plan"
    )
    right.set_ylabel("attention (s), predicted", color=INK)
    right.legend(frameon=False, fontsize=9.5)
    for axes in (left, right):
        axes.set_xticks(places, titles)
        axes.set_xlabel("part of denoising", color=INK)
        _clean(axes)
    figure.tight_layout(w_pad=2)
    return figure


def _cells(axes: Axes, heads: int, layers: int) -> None:
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xticks(np.arange(0.5, heads - 1), minor=True)
    axes.set_yticks(np.arange(0.5, layers - 1), minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=2)
    axes.tick_params(which="both", length=0, colors=MUTED, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("head", color=MUTED)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9)


def _flat(values: Tensor) -> np.ndarray:
    return values.flatten().double().numpy()


# None stands for the picture that `figures` saves itself.
_FIGURES: dict[str, Callable[[AccelPlan], Figure | None]] = {
    "heads.png": lambda _: None,
    "sensitivity.png": _sensitivity,
    "histograms.png": _histograms,
    "time.png": _time,
    "curve.png": _curve,
    "ranges.png": _ranges,
}
