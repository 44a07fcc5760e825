"""README tables come from the committed results."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def test_readme_tables_are_up_to_date() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"]
    done = subprocess.run([str(c) for c in command], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_readme_shows_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_commands_are_the_makefile_s() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in text
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


MACHINE = {"gpu": None, "cpu": "Chip", "cores": 2, "dtype": "bfloat16", "torch": "2.13.0"}


def test_cpu_table_has_a_line_per_length_and_density() -> None:
    report = {
        "machine": MACHINE,
        "baseline": "SDPA",
        "rows": [
            {"tokens": 8192, "density": d, "backend": name, "speedup": s, "heads": 4, "dim": 64}
            for d, name, s in (
                (1.0, "torch", 1.5),
                (1.0, "flex", 0.5),
                (0.25, "torch", 4.0),
                (0.25, "flex", 2.0),
            )
        ],
    }
    lines = tables.TABLES["cpu"][1](report).splitlines()
    assert lines[0] == "| tokens | density | `torch` | `flex` |"
    assert lines[2:4] == ["| 8,192 | 1.000 | 1.50× | 0.50× |", "| 8,192 | 0.250 | 4.00× | 2.00× |"]
    assert lines[-1] == "4 heads × 64; baseline SDPA; Chip, 2 cores, bfloat16, torch 2.13.0."


def test_gpu_table_shows_what_failed_as_a_dash() -> None:
    report = {
        "machine": MACHINE | {"gpu": "GPU"},
        "correctness": [{"ok": True}, {"error": "no"}],
        "rows": [
            {
                "shape": "wan",
                "asked": 0.25,
                "results": {
                    "sdpa-cudnn": {"p50": 8.0, "speedup_over_cudnn": 1.0},
                    "int8": {"speedup_over_cudnn": 4.0},
                },
            },
            {"shape": "flux", "asked": 0.1, "error": "out of memory"},
        ],
    }
    lines = tables.TABLES["gpu"][1](report).splitlines()
    assert lines[2] == "| wan | 0.25 | 8.00 | – | – | 4.00× | – | – | – | – |"
    assert lines[3] == "| flux | 0.10 | – | – | – | – | – | – | – | – |"
    assert lines[-1].startswith("1 of 2 correctness checks passed; GPU, bfloat16")


def test_gate_table_shows_the_worst_of_each_precision() -> None:
    row = {"arch": "sm_90", "precision": "int8", "stack": 0, "local": 0, "shared": 2048}
    rows = [
        row | {"registers": 100, "matrix_instructions": ["IGMMA"]},
        row | {"registers": 200, "stack": 8, "matrix_instructions": ["HGMMA"]},
        row | {"arch": "gfx942", "registers": None, "matrix_instructions": ["v_mfma"]},
    ]
    lines = tables.TABLES["gate"][1]({"rows": rows}).splitlines()
    assert lines[2:] == [
        "| sm_90 | `int8` | 2 | 200 | 8 B | 2 KiB | HGMMA IGMMA |",
        "| gfx942 | `int8` | 1 | ? | ? | 2 KiB | v_mfma |",
    ]
