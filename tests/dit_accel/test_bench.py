"""The benchmarks without a GPU; tests/kernels/interpreted.py runs the GPU suite in the interpreter."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dit_accel.bench import cpu, gate
from dit_accel.bench.problem import SHAPES, Shape, block_mask, index_of
from dit_accel.bench.timing import in_turns, quantile
from dit_accel.cli import main
from dit_accel.kernels.ahead import SHARED_LIMITS, Compiled, Configuration


def test_shipped_configurations_leave_out_what_a_chip_lacks():
    for arch in SHARED_LIMITS:
        precisions = {configuration.precision for configuration in gate.shipped(arch)}
        assert {"native", "int8"} <= precisions
        assert ("fp8" in precisions) == (arch not in ("sm_80", "sm_86", "gfx942"))


def test_compile_only_prints_a_row_per_configuration(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gate, "shipped", lambda arch: [Configuration(64, 64, 64)])
    file = tmp_path / "gate.json"
    assert main(["bench", "--compile-only", "--arch", "sm_80", "--json", "--output", str(file)]) == 0
    data = json.loads(capsys.readouterr().out)
    (row,) = data["rows"]
    assert row["ok"] is True
    assert row["matrix_instructions"] == ["HMMA"]
    assert 0 < row["registers"] <= 255
    assert json.loads(file.read_text()) == data
    text = gate.as_text(data["rows"])
    assert text.splitlines()[1].split() == [
        "attention", "sm_80", "64", "64x64", "bf16", "native", "-", str(row["registers"]), "0",
        f"{row['shared'] / 1024:.0f}K", "HMMA", "yes",
    ]  # fmt: skip


def test_a_configuration_that_fails_the_gate_is_a_failure(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gate, "shipped", lambda arch: [Configuration(64, 64, 64), Configuration(128, 64, 64)])
    monkeypatch.setattr(gate, "compile_attention", spilling)
    file = tmp_path / "gate.json"
    assert main(["bench", "--compile-only", "--arch", "sm_90", "--output", str(file)]) == 1
    assert capsys.readouterr().err.endswith(
        "dit-accel bench: error: attention native dim 128 64x64 on sm_90: no HGMMA, spills 24 B, "
        "needs 300000 B of shared memory, 232448 B are there\n"
    )
    assert main(["bench", "--compile-only", "--arch", "sm_90", "--json"]) == 1
    rows = json.loads(file.read_text())["rows"]
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert [row["ok"] for row in rows] == [True, False]
    assert gate.as_text(rows).splitlines()[2].endswith("NO HGMMA")


def spilling(configuration, architecture):
    """As of a compiler that lacks registers for head dim 128."""
    if configuration.dim == 64:
        return Compiled(168, 0, 0, 65536, ("HGMMA",), ())
    return Compiled(255, 8, 16, 300000, ("HMMA",), ("HGMMA",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile-only", "--arch", "sm_75"], "arch: expected one of sm_80, .* or all, got 'sm_75'"),
        pytest.param(
            ["--suite", "gpu"],
            "suite 'gpu': needs a CUDA or ROCm device, found none; use --suite cpu or --compile-only",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_failures_are_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_cpu_suite_measures_every_density():
    report = cpu.run(tokens=(333,), heads=2, dim=32, backends=("torch",), progress=False)
    densities = [row["density"] for row in report["rows"]]
    assert densities[0] == 1.0
    assert densities == sorted(densities, reverse=True)
    assert all(row["speedup"] == row["sdpa_ms"]["p50"] / row["ms"]["p50"] > 0 for row in report["rows"])
    assert report["machine"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.05])
def test_problems_have_the_density_asked_for_in_ragged_lists(density):
    index = index_of(Shape(7_777, 3, 64), 128, 64, density, torch.device("cpu"))
    assert index.density == pytest.approx(density, abs=0.02)
    assert (index.counts > 0).all()
    if density < 1:
        assert index.counts.float().std() > 0.1 * index.counts.float().mean()
    assert block_mask(2, 3, 5, density, torch.device("cpu")).shape == (1, 2, 3, 5)


def test_shapes_have_their_published_cost():
    """117 TFLOP per layer of Wan2.1-14B at 720p: 4 x 75,600^2 x 40 x 128."""
    assert SHAPES["wan2.1-14b-720p"].flops == pytest.approx(117e12, rel=0.01)


def test_calls_take_turns():
    order = []
    calls = {name: lambda n=name: order.append(n) for name in ("a", "b")}
    times = in_turns(calls, torch.device("cpu"), rounds=4)
    assert order == ["a", "b"] * 5
    assert times["a"]["p20"] <= times["a"]["p50"] <= times["a"]["p80"]


def test_quantiles_interpolate():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == 2.0
    assert quantile([7.0], 0.8) == 7.0
