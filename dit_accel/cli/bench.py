"""`dit-accel bench`: what the compiler makes of the kernels, and how fast they are on this device."""

import argparse
from pathlib import Path
from typing import Any

from dit_accel.cli.options import ready


def configure(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("bench", help="benchmark the kernels, or only compile them")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--compile-only", action="store_true", help="compile every shipped configuration")
    what.add_argument("--suite", choices=("cpu", "gpu"), help="measure on this device")
    what.add_argument(
        "--fit", action="store_true", help="fit what attention costs on this device, and check the fit"
    )
    parser.add_argument(
        "--arch",
        default="sm_90",
        metavar="ARCH",
        help="sm_80 ... sm_120, gfx942 or all (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="also write the JSON to a file (--suite gpu: default outputs/bench_gpu.json)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run what was asked for; JSON and text."""
    from dit_accel.evaluation.files import write_json

    if args.output is not None:
        if args.output.is_dir():
            raise ValueError(f"output: expected a file, got the directory {args.output}")
        ready(args.output.parent)
    if args.compile_only:
        from dit_accel.bench import gate

        rows = gate.compile_all(args.arch)
        data: dict[str, Any] = {"arch": args.arch, "rows": rows}
        data["failures"] = gate.failures(rows)
        text = gate.as_text(rows)
    elif args.fit:
        from dit_accel.bench import fit

        data = fit.run()
        data["failures"] = [f"predicted wrong: {check}" for check in data["checks"] if not check["ok"]]
        text = fit.as_text(data)
    elif args.suite == "cpu":
        from dit_accel.bench import cpu

        data = cpu.run()
        text = "\n".join(
            f"{row['tokens']:6d} tokens  density {row['density']:.2f}  {row['backend']:6s} {row['ms']['p50']:8.1f} ms  "
            f"{row['speedup']:.2f}x over {data['baseline']}"
            for row in data["rows"]
        )
    else:
        from dit_accel.bench import gpu

        data = gpu.run(args.output or Path("outputs/bench_gpu.json"))
        wrong = [row for row in data["correctness"] if not row.get("ok")]
        data["failures"] = [f"wrong: {row}" for row in wrong]
        data["failures"] += [f"left out: {name}" for name in data["left_out"]]
        lines = [
            f"correctness: {len(data['correctness']) - len(wrong)} of {len(data['correctness'])} cases right"
        ]
        for row in data["rows"]:
            cells = (
                f"{name} {result['p50']:.2f} ms"
                + (f" ({result['speedup_over_cudnn']:.2f}x)" if result.get("speedup_over_cudnn") else "")
                for name, result in row.get("results", {}).items()
            )
            lines.append(f"{row['shape']} density {row['asked']}: " + (row.get("error") or ", ".join(cells)))
        text = "\n".join(lines)
    if args.output is not None:
        write_json(args.output, data)
    return data, text
