"""README tables come from the committed results."""

import re
import subprocess
import sys
from pathlib import Path

import tables

ROOT = Path(__file__).parents[2]


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
                    "layer:pooled:64:int8": {"speedup_over_cudnn": 3.5},
                },
            },
            {"shape": "flux", "asked": 0.1, "error": "out of memory"},
        ],
    }
    lines = tables.TABLES["gpu"][1](report).splitlines()
    assert lines[2] == "| wan | 0.25 | 8.00 | – | – | 4.00× | – | – | – | – |"
    assert lines[3] == "| flux | 0.10 | – | – | – | – | – | – | – | – |"
    assert lines[-5:-2] == [
        "| shape | density | cuDNN ms | `pooled:64:int8` |",
        "| --- | ---: | ---: | ---: |",
        "| wan | 0.25 | 8.00 | 3.50× |",
    ]
    assert lines[-1].startswith("1 of 2 correctness checks passed; GPU, bfloat16")
    for row in report["rows"]:
        row.get("results", {}).pop("layer:pooled:64:int8", None)
    assert "Whole layers" not in tables.TABLES["gpu"][1](report)


def test_gate_table_shows_the_worst_of_each_precision() -> None:
    row = {"arch": "sm_90", "precision": "int8", "stack": 0, "local": 0, "shared": 2048}
    rows = [
        row | {"registers": 100, "in_flight": 3, "matrix_instructions": ["IGMMA"]},
        row | {"registers": 200, "in_flight": 2, "stack": 8, "matrix_instructions": ["HGMMA"]},
        row
        | {
            "arch": "gfx942",
            "registers": 64,
            "in_flight": None,
            "local": 4,
            "matrix_instructions": ["v_mfma"],
        },
    ]
    lines = tables.TABLES["gate"][1]({"rows": rows}).splitlines()
    assert lines[2:] == [
        "| sm_90 | `int8` | 2 | 200 | 8 B | 2 KiB | 2 | HGMMA IGMMA |",
        "| gfx942 | `int8` | 1 | 64 | 4 B | 2 KiB | – | v_mfma |",
    ]


def presets_report() -> dict:
    settings = {"width": 192, "height": 160, "num_frames": 33, "num_inference_steps": 20}
    costs = {"multiply_adds_first": 5e9, "multiply_adds_later": 2e8, "bytes_first": 1e6, "bytes_later": 1e6}
    heads = [
        {
            "preset": name,
            "asked": density,
            "recall": density,
            "rel_l2": 0.5,
            "rel_l2_remainder": 0.25,
            **costs,
        }
        for name in ("sta", "svg2")
        for density in (0.5, 0.25)
    ]
    run = {"density": 0.25, "psnr_mean": 21.0, "psnr_min": 19.5, "ssim": 0.9, "semantic": 0.5}
    run |= {"selection_seconds": 1.0, "attention_seconds": 9.0, "seconds": 40.0, "speedup": 3.0}
    return {
        "machine": MACHINE,
        "dense_backend": "SDPA",
        "settings": settings,
        "prompts": ["a", "b"],
        "heads": {"done": 8, "of": 8, "steps": [3, 10, 16], "rows": heads},
        "generations": {
            "done": 5,
            "of": 6,
            "asked": 0.25,
            "dense": {"prompts": 2, "seconds": 120.0, "attention_seconds": 100.0, "semantic": 0.75},
            "rows": [
                {"preset": "sta", "remainder": False, **run},
                {"preset": "sta", "remainder": True, **run, "psnr_mean": 24.25},
                {"preset": "svg2", "remainder": True, **run},
            ],
        },
    }


def test_heads_table_has_a_line_per_preset() -> None:
    lines = tables.TABLES["preset_heads"][1](presets_report()).splitlines()
    assert lines[0] == (
        "| preset | recall @0.5 | rel L2 @0.5 | + means @0.5 | recall @0.25 | rel L2 @0.25 | + means @0.25 "
        "| M multiply-adds | MB |"
    )
    assert lines[2] == "| `sta` | 0.500 | 0.500 | 0.250 | 0.250 | 0.500 | 0.250 | 5,000 / 200 | 1 |"
    assert len(lines) == 6
    assert lines[-1].startswith("Demo, 2 held-out prompts, 33 frames of 192×160, 20 steps; Chip, 2 cores")


def test_generations_table_shows_both_ways_and_how_much_is_missing() -> None:
    lines = tables.TABLES["preset_generations"][1](presets_report()).splitlines()
    assert lines[2] == "| dense | 1.00 | – | – | – | 0.75 | – | 100.0 | 120.0 | 1.00 |"
    assert lines[3].startswith("| `sta` | 0.25 / 0.25 | 21.0 / 24.2 | 19.5 / 19.5 | 0.900 / 0.900 |")
    assert lines[4].startswith("| `svg2` | – / 0.25 | – / 21.0 |")
    assert "2 held-out prompts (5 of 6 measurements so far)" in lines[-1]
    assert lines[-1].endswith("density 0.25; cells: without / with remainder; dense: SDPA.")


def test_missing_results_read_not_measured_yet(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = "a\n<!-- table preset_heads -->\nold\n<!-- end -->\nb\n"
    assert tables.filled(text) == text.replace("old", "*not measured yet*")
