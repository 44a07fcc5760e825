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
from typing import Any

from dit_accel.evaluation import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _demo_card(card: dict[str, Any], evaluation: dict[str, Any]) -> str:
    machine = evaluation["machine"]
    (dense,) = (row for row in evaluation["variants"] if row["name"] == "dense")
    above = sum(head["mass_25"] >= 0.9 for head in card["heads"])
    rows = [
        ("parameters of the transformer", f"{card['parameters'] / 1e6:.1f} M"),
        *(
            (f"prompts followed: {name}", f"{dense['semantic_parts'][name]:.0%}")
            for name in ("colour", "direction", "background", "shape")
        ),
        ("softmax mass in the best 25 % of blocks, mean over heads", f"{card['mass_25_mean']:.3f}"),
        ("softmax mass in the best 10 % of blocks, mean over heads", f"{card['mass_10_mean']:.3f}"),
        ("heads with at least 0.9 in the best 25 %", f"{above} of {len(card['heads'])}"),
        ("seconds per dense generation (median)", f"{dense['seconds_p50']:.1f}"),
    ]
    lines = ["| demo model, dense | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    where = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['dtype']}"
    count = len(evaluation["prompts"])
    return "\n".join([*lines, "", f"{count} held-out prompts; {where}, torch {machine['torch']}."])


TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "demo": (("demo_evaluation.json",), markdown_table),
    "curve": (("demo_curve.json",), markdown_table),
    "card": (("demo_card.json", "demo_evaluation.json"), _demo_card),
}


def filled(text: str) -> str:
    """A README text with every table made anew."""

    def table(match: re.Match[str]) -> str:
        files, write = TABLES[match[2]]
        paths = [RESULTS / file for file in files]
        body = "*not measured yet*"
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
