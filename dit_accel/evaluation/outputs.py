"""Everything an evaluation leaves in its directory besides `evaluation.json`."""

from collections.abc import Sequence
from pathlib import Path

from dit_accel.evaluation.figures import Take, Takes, save_comparison, save_curve, save_heads
from dit_accel.evaluation.files import slug
from dit_accel.evaluation.media import write_video
from dit_accel.evaluation.report import markdown_table
from dit_accel.evaluation.result import Evaluation
from dit_accel.evaluation.variants import Variant

_COMPARED = 2  # other variants in the picture; more would be too small to look at


def write_outputs(
    result: Evaluation, variants: Sequence[Variant], folder: Path, *, fps: int = 16
) -> list[Path]:
    """Write the table, videos and pictures of a finished evaluation; returns their paths.

    `table.md`; an MP4 per pictured prompt and variant, as far as its frames are still there; `comparison.png` of dense
    and the first two other variants; `curve.png` where there are two or more others; `heads.png` of the first
    calibrated plan, and `heads-NAME.png` of further ones.
    """
    written = [folder / "table.md"]
    written[0].write_text(markdown_table(result.to_dict()) + "\n", encoding="utf-8")
    others = [variant for variant in variants if variant.name != "dense"]
    # Somebody may have removed generations that are measured, to save room.
    pictured = [
        number
        for number in result.pictured()
        if all(result.store.has(number, variant.name) for variant in variants)
    ]
    for number in pictured:
        for variant in variants:
            frames = result.store.get(number, variant.name).frames
            written.append(write_video(frames, folder / f"{number:03d}-{slug(variant.name)}.mp4", fps=fps))
    if others and pictured:
        written.append(folder / "comparison.png")
        names = [variant.name for variant in others[:_COMPARED]]
        save_comparison([_takes(result, number, names) for number in pictured], written[-1])
    if len(others) > 1:
        written.append(folder / "curve.png")
        save_curve(result.to_dict(), written[-1])
    calibrated = [
        variant for variant in others if variant.plan is not None and variant.plan.layers is not None
    ]
    for number, variant in enumerate(calibrated):
        if variant.plan is not None:
            written.append(folder / (f"heads-{slug(variant.name)}.png" if number else "heads.png"))
            save_heads(variant.plan, written[-1])
    return written


def _takes(result: Evaluation, number: int, names: Sequence[str]) -> Takes:
    dense = result.store.get(number, "dense")
    others = []
    for name in names:
        made = result.store.get(number, name)
        run = next(run for run in result.runs if (run.prompt, run.variant) == (number, name))
        speed = f"{made.seconds:.1f} s ({dense.seconds / made.seconds:.2f}×)"
        others.append(Take(name, made.frames, f"{speed}\nPSNR {run.psnr:.1f} dB"))
    return Takes(result.prompts[number], Take("dense", dense.frames, f"{dense.seconds:.1f} s"), tuple(others))
