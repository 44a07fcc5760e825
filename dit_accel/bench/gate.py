"""The compile gate as a table: every shipped configuration of the attention kernel on one architecture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import product
from typing import Any

from tqdm import tqdm

from dit_accel.kernels import PRECISIONS
from dit_accel.kernels.ahead import SHARED_LIMITS, Configuration, compile_attention, multiplies_e4m3

_COLUMN = {"all": "remainder", "varying": "varying"}
_EVERYTHING: dict[str, Any] = {"masked": True, "ordered": True, "remainder": True}


def shipped(architecture: str) -> list[Configuration]:
    """The configurations that models use: head dims 64 and 128, plain, with everything switched on, and that for
    blocks of varying length."""
    precisions = PRECISIONS if multiplies_e4m3(architecture) else ("native", "int8")
    extras: tuple[dict[str, Any], ...] = ({}, _EVERYTHING, _EVERYTHING | {"varying": True})
    return [
        Configuration(dim, block_q, 64, precision=precision, **extra)
        for dim, block_q, precision, extra in product((64, 128), (64, 128), precisions, extras)
    ]


def compile_all(architecture: str, *, progress: bool = True) -> list[dict[str, Any]]:
    """Compile all of them; one row each, with `ok` saying whether nothing spills, the shared memory suffices and the
    precision runs on the matrix instructions that it is meant for.

    Args:
        architecture: one of SHARED_LIMITS, or "all".

    Raises:
        ValueError: an unknown architecture.
    """
    if architecture not in (*SHARED_LIMITS, "all"):
        raise ValueError(f"arch: expected one of {', '.join(SHARED_LIMITS)} or all, got {architecture!r}")
    chips = SHARED_LIMITS if architecture == "all" else (architecture,)
    rows = []
    for architecture, configuration in tqdm(
        [(chip, configuration) for chip in chips for configuration in shipped(chip)],
        desc="compile",
        disable=not progress,
    ):
        compiled = compile_attention(configuration, architecture)
        fits = compiled.shared <= SHARED_LIMITS[architecture]
        rows.append(
            {
                "kernel": "attention",
                "arch": architecture,
                **asdict(configuration),
                **asdict(compiled),
                "ok": fits and not compiled.stack and not compiled.local and not compiled.missing,
            }
        )
    return rows


def failures(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What is wrong with each row that is not `ok`, in words."""
    found = []
    for row in rows:
        if row["ok"]:
            continue
        wrong = [f"no {name}" for name in row["missing"]]
        if row["stack"] or row["local"]:
            wrong.append(f"spills {row['stack'] + row['local']} B")
        if row["shared"] > SHARED_LIMITS[row["arch"]]:
            wrong.append(
                f"needs {row['shared']} B of shared memory, {SHARED_LIMITS[row['arch']]} B are there"
            )
        found.append(
            f"{row['kernel']} {row['precision']} dim {row['dim']} {row['block_q']}x{row['block_k']} on {row['arch']}: "
            + ", ".join(wrong)
        )
    return found


def as_text(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    head = [
        "kernel",
        "arch",
        "dim",
        "blocks",
        "dtype",
        "precision",
        "extras",
        "regs",
        "stack",
        "shared",
        "in flight",
        "instructions",
        "ok",
    ]
    lines = [head]
    for row in rows:
        lines.append(
            [
                row["kernel"],
                row["arch"],
                str(row["dim"]),
                f"{row['block_q']}x{row['block_k']}",
                row["dtype"],
                row["precision"],
                " ".join(name for name in ("all", "varying") if row[_COLUMN[name]]) or "-",
                str(row["registers"]),
                str(row["stack"]),
                f"{row['shared'] / 1024:.0f}K",
                "-" if row["in_flight"] is None else str(row["in_flight"]),
                " ".join(row["matrix_instructions"]),
                "yes" if row["ok"] else " ".join(("NO", *row["missing"])),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
