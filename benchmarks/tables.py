"""Write the README's tables from the committed results.

    python benchmarks/tables.py            # rewrite README.md
    python benchmarks/tables.py --check    # exit 1 if README.md is out of date

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``. A result that is not committed reads
"not measured yet".
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from dit_accel.evaluation import markdown_table
from dit_accel.evaluation.tuning import speedup_at

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOT_YET = "*not measured yet*"
_PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _demo_card(card: dict[str, Any], evaluation: dict[str, Any]) -> str:
    machine = evaluation["machine"]
    (dense,) = (row for row in evaluation["variants"] if row["name"] == "dense")
    above = sum(head["mass_25"] >= 0.9 for head in card["heads"])
    better = fmean(max(head["mass_25"], head["mass_25_balanced"]) for head in card["heads"])
    rows = [
        ("parameters of the transformer", f"{card['parameters'] / 1e6:.1f} M"),
        *(
            (f"prompts followed: {name}", f"{dense['semantic_parts'][name]:.0%}")
            for name in ("colour", "direction", "background", "shape")
        ),
        *(
            (
                f"softmax mass in the best {share} % of blocks, {where}",
                f"{card[f'mass_{share}{ending}_mean']:.3f}",
            )
            for ending, where in (("", "best order of the grid"), ("_balanced", "`balanced` blocks"))
            for share in (25, 10)
        ),
        ("softmax mass in the best 25 % of blocks, the better of both for each head", f"{better:.3f}"),
        ("heads with at least 0.9 in the best 25 %", f"{above} of {len(card['heads'])}"),
        ("seconds per dense generation (median)", f"{dense['seconds_p50']:.1f}"),
    ]
    lines = ["| demo model, dense | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    where = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['dtype']}"
    count = len(evaluation["prompts"])
    note = (
        f"{count} held-out prompts, mass over {card['prompts']} of them and the mean of all heads; {where}, torch "
        f"{machine['torch']}."
    )
    return "\n".join([*lines, "", note])


def _where(machine: dict[str, Any]) -> str:
    name = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{name}, {machine['dtype']}, torch {machine['torch']}"


def _resumed(evaluation: dict[str, Any]) -> str:
    count = evaluation["processes"]
    return "" if count == 1 else f"; measured in {count} processes, one after another"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cpu_attention(report: dict[str, Any]) -> str:
    """One line per length and density, the speed-up over SDPA of each backend."""
    names = list(dict.fromkeys(row["backend"] for row in report["rows"]))
    lines: dict[tuple[int, float], list[str]] = {}
    for row in report["rows"]:
        lines.setdefault((row["tokens"], row["density"]), []).append(f"{row['speedup']:.2f}×")
    rows = [[f"{tokens:,}", f"{density:.3f}", *cells] for (tokens, density), cells in lines.items()]
    first = report["rows"][0]
    return "\n".join(
        [
            _rows(["tokens", "density", *(f"`{name}`" for name in names)], rows),
            "",
            f"{first['heads']} heads × {first['dim']}; baseline {report['baseline']}; {_where(report['machine'])}.",
        ]
    )


def _least(numbers: list[int | None]) -> str:
    return "–" if None in numbers else str(min(n for n in numbers if n is not None))


def _compile_gate(report: dict[str, Any]) -> str:
    """One line per architecture and precision: the worst of all its configurations."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault((row["arch"], row["precision"]), []).append(row)
    rows = []
    for (arch, precision), members in groups.items():
        rows.append(
            [
                arch,
                f"`{precision}`",
                str(len(members)),
                str(max(row["registers"] for row in members)),
                f"{max(row['stack'] + row['local'] for row in members)} B",
                f"{max(row['shared'] for row in members) / 1024:.0f} KiB",
                _least([row["in_flight"] for row in members]),
                " ".join(sorted({name for row in members for name in row["matrix_instructions"]})),
            ]
        )
    return _rows(
        [
            "chip",
            "precision",
            "configurations",
            "registers",
            "spilled",
            "shared memory",
            "copies in flight",
            "matrix instructions",
        ],
        rows,
    )


def _gpu_attention(report: dict[str, Any]) -> str:
    """One line per shape and density: milliseconds of cuDNN and everybody's speed-up over it; then whole layers."""
    names = ("native", "native+remainder", "int8", "int8_fp8", "fp8", "flex", "sageattention-triton")
    layers = dict.fromkeys(
        name for row in report["rows"] for name in row.get("results", {}) if name.startswith("layer:")
    )
    right = sum(bool(check.get("ok")) for check in report["correctness"])
    parts = [_speedups_over_cudnn(report["rows"], names)]
    if layers:
        timed = [row for row in report["rows"] if layers.keys() & row.get("results", {}).keys()]
        parts += [
            "Whole layers of a plan: all heads of one family, tokens per block and precision, with everything that a "
            "layer does.",
            _speedups_over_cudnn(timed, tuple(layers)),
        ]
    parts.append(
        f"{right} of {len(report['correctness'])} correctness checks passed; {_where(report['machine'])}."
    )
    return "\n\n".join(parts)


def _speedups_over_cudnn(report_rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    rows = []
    for row in report_rows:
        results = row.get("results", {})
        base = results.get("sdpa-cudnn")
        cells = [
            f"{speedup:.2f}×" if (speedup := results.get(name, {}).get("speedup_over_cudnn")) else "–"
            for name in names
        ]
        rows.append([row["shape"], f"{row['asked']:.2f}", f"{base['p50']:.2f}" if base else "–", *cells])
    shown = (f"`{name.removeprefix('layer:')}`" for name in names)
    return _rows(["shape", "density", "cuDNN ms", *shown], rows)


def _preset_heads(report: dict[str, Any]) -> str:
    """One line per system: recall and rel L2 without and with remainder at each density, a selection's cost.

    Those that err least come first, with or without remainder, on the mean of their logarithms over the densities.
    """
    heads = report["heads"]
    if not heads["rows"]:
        return NOT_YET
    densities = list(dict.fromkeys(row["asked"] for row in heads["rows"]))
    lines: dict[str, list[str]] = {}
    chosen: dict[str, list[str]] = {}
    least: dict[str, float] = {}
    for row in heads["rows"]:
        error = min(row["rel_l2"], row["rel_l2_remainder"])
        least[row["preset"]] = least.get(row["preset"], 1.0) * error
    for row in sorted(heads["rows"], key=lambda row: least[row["preset"]]):
        cells = [f"{row[name]:.3f}" for name in ("recall", "rel_l2", "rel_l2_remainder")]
        lines.setdefault(row["preset"], []).extend(cells)
        chosen[row["preset"]] = [
            _first_and_later(row[f"{name}_first"] / 1e6, row[f"{name}_later"] / 1e6)
            for name in ("multiply_adds", "bytes")
        ]
    names = ("recall", "rel L2", "+ means")
    head = [
        "preset",
        *(f"{name} @{density:g}" for density in densities for name in names),
        "M multiply-adds",
        "MB",
    ]
    return "\n".join(
        [
            _rows(head, [[f"`{name}`", *cells, *chosen[name]] for name, cells in lines.items()]),
            "",
            f"{_presets_caption(report, heads)}; steps {', '.join(map(str, heads['steps']))}, all heads; "
            "+ means: rel L2 with the remainder; multiply-adds and bytes: of a selection for one layer, the first of a "
            "generation / a later one.",
        ]
    )


def _first_and_later(first: float, later: float) -> str:
    return f"{later:,.0f}" if first == later else f"{first:,.0f} / {later:,.0f}"


def _preset_generations(report: dict[str, Any]) -> str:
    """One line per system, the best first, cells without / with remainder, and one for dense."""
    part = report["generations"]
    lines: dict[str, dict[bool, dict[str, Any]]] = {}
    for row in sorted(part["rows"], key=lambda row: -row["psnr_mean"]):
        lines.setdefault(row["preset"], {})[row["remainder"]] = row
    columns = (
        ("density", "density", ".2f"),
        ("PSNR mean", "psnr_mean", ".1f"),
        ("PSNR min", "psnr_min", ".1f"),
        ("SSIM", "ssim", ".3f"),
        ("semantic", "semantic", ".2f"),
        ("selection s", "selection_seconds", ".1f"),
        ("attention s", "attention_seconds", ".1f"),
        ("whole s", "seconds", ".1f"),
        ("speed-up", "speedup", ".2f"),
    )
    rows = []
    if dense := part["dense"]:
        of_dense = {"density": 1.0, "speedup": 1.0, **dense}
        cells = [format(of_dense[key], form) if key in of_dense else "–" for _, key, form in columns]
        rows.append(["dense", *cells])
    for preset, ways in lines.items():
        cells = [
            " / ".join(format(ways[way][key], form) if way in ways else "–" for way in (False, True))
            for _, key, form in columns
        ]
        rows.append([f"`{preset}`", *cells])
    head = ["preset", *(heading for heading, _, _ in columns)]
    caption = f"{_presets_caption(report, part)}; density {part['asked']:g}; cells: without / with remainder"
    return "\n".join([_rows(head, rows), "", f"{caption}; dense: {report['dense_backend']}."])


def _presets_caption(report: dict[str, Any], part: dict[str, Any]) -> str:
    settings, prompts = report["settings"], len(report["prompts"])
    unfinished = (
        "" if part["done"] == part["of"] else f" ({part['done']} of {part['of']} measurements so far)"
    )
    counted = f"{prompts} held-out {'prompt' if prompts == 1 else 'prompts'}{unfinished}"
    return (
        f"Demo, {counted}, {settings['num_frames']} frames of "
        f"{settings['width']}×{settings['height']}, {settings['num_inference_steps']} steps; "
        f"{_where(report['machine'])}"
    )


# A row counts as having kept to the target if it misses it on the held-out prompts by no more than this, in dB.
PSNR_SLACK = 0.5


def _caches(report: dict[str, Any]) -> str:
    """The comparison on the held-out prompts, and where a peer is better than all of ours."""
    evaluation, target = report["evaluation"], report["target_psnr"]
    peers = {row["variant"] for row in report["tuned"] if row["peer"]}
    rows = [row for row in evaluation["variants"] if row["name"] != "dense" and not row["identical_to_dense"]]
    theirs = [row for row in rows if row["name"] in peers]
    ours = [row for row in rows if row["name"] not in peers]
    missed = [f"`{row['variant']}`" for row in report["tuned"] if not row["reached"]]
    count = len(report["tuning_prompts"])
    notes = [
        f"Dials tuned to {target:g} dB on {count} other {'prompt' if count == 1 else 'prompts'}"
        + (f"; not reached by {', '.join(missed)}" if missed else "")
        + "."
    ]
    fastest = [
        max(kept, key=lambda row: row["speedup"])
        for side in (theirs, ours)
        if (kept := [row for row in side if row["psnr_mean"] >= target - PSNR_SLACK])
    ]
    if len(fastest) == 2:
        them, us = fastest
        notes.append(
            f"Fastest at {target - PSNR_SLACK:g} dB and above: of the peers `{them['name']}` with "
            f"{them['speedup']:.2f}×, of ours `{us['name']}` with {us['speedup']:.2f}×, "
            f"{us['speedup'] / them['speedup']:.2f} times as fast."
        )
    better = [
        f"`{peer['name']}`"
        for peer in theirs
        if not any(
            own["speedup"] >= peer["speedup"] and own["psnr_mean"] >= peer["psnr_mean"] for own in ours
        )
    ]
    if theirs:
        listed = ", ".join(better) or "none"
        notes.append(f"Peers that none of ours matches in both speed-up and PSNR: {listed}.")
    return "\n".join([markdown_table(evaluation), *notes])


def _equal_psnr(report: dict[str, Any]) -> str:
    """One line per system or calibrator: its speed-up at each PSNR, and what was measured."""
    evaluation, targets = report["evaluation"], report["targets"]
    found = {row["name"]: row for row in evaluation["variants"]}
    lines = []
    for label, at in report["speedup_at"].items():
        own = [row for row in report["rows"] if row["label"] == label]
        measured = sorted(
            {
                (found[row["row"]]["psnr_mean"], found[row["row"]]["speedup"])
                for row in own
                if not found[row["row"]]["identical_to_dense"]
            }
        )
        lowest = min(psnr for psnr, _ in measured) if measured else 0.0
        # Whoever was measured from a higher PSNR on is as fast there, and might be faster.
        cells = [
            "–" if speedup is None else f"{'≥' * (target < lowest)}{speedup:.2f}"
            for target, speedup in zip(targets, at, strict=True)
        ]
        points = ", ".join(f"{psnr:.1f} dB {speedup:.2f}×" for psnr, speedup in measured)
        lines.append([f"`{label}`" if not own[0]["ours"] else label, *cells, points])
    head = ["", *(f"{target:g} dB" for target in targets), "measured"]
    count, tuned = len(evaluation["prompts"]), len(report["tuning_prompts"])
    settings = evaluation["settings"]
    notes = [
        f"Speed-up of whole generations at equal mean PSNR, read between the measured points; ≥: that of the lowest "
        f"PSNR measured, which lies above. Demo, {count} held-out "
        f"{'prompt' if count == 1 else 'prompts'}, tuned on {tuned} other; {settings['num_frames']} frames of "
        f"{settings['width']}×{settings['height']}, {settings['num_inference_steps']} steps; dense: "
        f"{evaluation['dense_backend']}; {_where(evaluation['machine'])}{_resumed(evaluation)}."
    ]
    others = {row["label"] for row in report["rows"] if not row["ours"]}
    curves = {
        label: [
            (one["psnr_mean"], one["speedup"])
            for row in report["rows"]
            if row["label"] == label and not (one := found[row["row"]])["identical_to_dense"]
        ]
        for label in report["speedup_at"]
    }
    if others and "plan" in curves:
        ahead = [
            f"`{label}` at {psnr:.1f} dB"
            for label in sorted(others)
            for psnr, speedup in curves[label]
            # Beyond what was measured of plans there is dense attention.
            if (speedup_at(curves["plan"], psnr) or 1.0) < speedup
        ]
        notes.append(f"Measured points above the plan's curve: {', '.join(ahead) or 'none'}.")
    for place, target in enumerate(targets):
        known = {label: at[place] for label, at in report["speedup_at"].items() if at[place] is not None}
        rivals = {label: speedup for label, speedup in known.items() if label in others}
        if rivals and "plan" in known:
            best = max(rivals, key=lambda label: rivals[label])
            fewer = "" if len(rivals) == len(others) else f" that reach it ({len(rivals)} of {len(others)})"
            from_psnr = min(psnr for psnr, _ in curves[best])
            lowest = f", measured from {from_psnr:.1f} dB on" if target < from_psnr else ""
            notes.append(
                f"At {target:g} dB the plan is {known['plan'] / rivals[best]:.2f} times as fast as the best of "
                f"the others{fewer}, `{best}`{lowest}."
            )
        elif rivals:
            best = max(rivals, key=lambda label: rivals[label])
            notes.append(
                f"{target:g} dB no plan was measured to reach; `{best}` does, {rivals[best]:.2f} times dense."
            )
    return "\n".join([_rows(head, lines), "", *notes])


def _elastic(report: dict[str, Any]) -> str:
    """One line per setting: the plan beside the preset of its density."""
    rows = []
    for move in report["moves"]:
        evaluation = move["evaluation"]
        settings = evaluation["settings"]
        _, plan, preset = evaluation["variants"]
        rows.append(
            [
                move["name"],
                f"{settings['num_frames']} of {settings['width']}×{settings['height']}",
                str(settings["num_inference_steps"]),
                f"{plan['seconds_dense_p50']:.1f}",
                f"{plan['speedup']:.2f}",
                f"{plan['psnr_mean']:.2f}",
                f"{preset['speedup']:.2f}",
                f"{preset['psnr_mean']:.2f}",
            ]
        )
    head = ["setting", "frames", "steps", "dense s", "plan: speed-up", "PSNR", "preset: speed-up", "PSNR"]
    evaluation = report["moves"][0]["evaluation"]
    count = len(evaluation["prompts"])
    preset = evaluation["variants"][2]["name"]
    caption = (
        f"Demo, {count} held-out {'prompt' if count == 1 else 'prompts'}; preset: `{preset}`; "
        f"dense: {evaluation['dense_backend']}; {_where(evaluation['machine'])}."
    )
    return "\n".join([_rows(head, rows), "", caption])


def _steps(report: dict[str, Any]) -> str:
    """One line per part of the steps."""
    evaluation = report["evaluation"]
    _, *variants = evaluation["variants"]
    noise = ["–", *(f"{first:.2f} to {last:.2f}" for first, last in report["noise"])]
    rows = [
        [
            row["name"],
            level,
            f"{row['psnr_mean']:.2f}",
            f"{row['psnr_min']:.2f}",
            f"{row['ssim_mean']:.4f}",
            f"{row['latent_rel_l2']:.3f}",
        ]
        for row, level in zip(variants, noise, strict=True)
    ]
    settings, count = evaluation["settings"], len(evaluation["prompts"])
    caption = (
        f"Demo, {count} held-out {'prompt' if count == 1 else 'prompts'}, {settings['num_frames']} frames of "
        f"{settings['width']}×{settings['height']}; sparse: `{report['candidate']}`; {_where(evaluation['machine'])}."
    )
    return "\n".join(
        [
            _rows(["sparse", "noise level", "PSNR mean", "PSNR min", "SSIM", "latent rel L2"], rows),
            "",
            caption,
        ]
    )


TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "demo": (("demo_evaluation.json",), markdown_table),
    "curve": (("demo_curve.json",), markdown_table),
    "cpu": (("cpu_attention.json",), _cpu_attention),
    "gate": (("compile_gate.json",), _compile_gate),
    "gpu": (("gpu_attention.json",), _gpu_attention),
    "preset_heads": (("presets_heads.json",), _preset_heads),
    "preset_generations": (("presets.json",), _preset_generations),
    "equal_psnr": (("equal_psnr_presets.json",), _equal_psnr),
    "equal_psnr_full": (("equal_psnr_full.json",), _equal_psnr),
    "ablation": (("equal_psnr_ablation.json",), _equal_psnr),
    "caches": (("caches.json",), _caches),
    "elastic": (("elastic.json",), _elastic),
    "steps": (("steps.json",), _steps),
    "card": (("demo_card.json", "demo_evaluation.json"), _demo_card),
}


def filled(text: str) -> str:
    """A README text with every table made anew."""

    def table(match: re.Match[str]) -> str:
        files, write = TABLES[match[2]]
        paths = [RESULTS / file for file in files]
        body = NOT_YET
        if all(path.exists() for path in paths):
            body = write(*(json.loads(path.read_text(encoding="utf-8")) for path in paths))
        return f"{match[1]}{body}\n{match[3]}"

    return _PLACE.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a table is out of date"
    )
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if check and new != old:
        print("README.md: tables are out of date; run python benchmarks/tables.py", file=sys.stderr)
        return 1
    if not check:
        readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
