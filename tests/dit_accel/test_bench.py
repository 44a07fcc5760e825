"""The benchmarks without a GPU; tests/kernels/interpreted.py runs the GPU suite in the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from dit_accel.bench import cpu, gate, gpu
from dit_accel.bench.problem import SHAPES, Shape, block_mask, index_of
from dit_accel.bench.timing import in_turns, quantile
from dit_accel.bench.workers import TaskError, Worker, compile_ahead
from dit_accel.cli import main
from dit_accel.kernels.ahead import SHARED_LIMITS, Compiled, Configuration

CPU = torch.device("cpu")


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
    assert row["in_flight"] > 0
    assert json.loads(file.read_text()) == data
    text = gate.as_text(data["rows"])
    assert text.splitlines()[1].split() == [
        "attention", "sm_80", "64", "64x64", "bf16", "native", "-", str(row["registers"]), "0",
        f"{row['shared'] / 1024:.0f}K", str(row["in_flight"]), "HMMA", "yes",
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
        return Compiled(168, 0, 0, 65536, ("HGMMA",), (), 2)
    return Compiled(255, 8, 16, 300000, ("HMMA",), ("HGMMA",), None)


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


def test_the_suites_need_no_model_library():
    """A machine that only measures kernels has torch and Triton."""
    lacking = ("diffusers", "transformers", "einops", "safetensors", "matplotlib", "torchmetrics", "PIL")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking})); "
        "import dit_accel.bench.gpu, dit_accel.bench.cpu, dit_accel.bench.fit, dit_accel.bench.gate; print('all')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["all"], done.stderr


def test_compiling_ahead_outlives_what_fails_and_ends_in_time(tmp_path):
    files = [tmp_path / name for name in "ab"]
    tasks = [partial(files[0].write_text, "x"), partial(int, "no number"), partial(files[1].write_text, "x")]
    assert compile_ahead(tasks, CPU, 120.0) == 3
    assert all(file.is_file() for file in files)
    assert compile_ahead([partial(time.sleep, 600.0)], CPU, 0.1) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="loses a device by asking for one that is not there")
def test_compiling_ahead_does_not_wait_for_processes_that_lost_the_device():
    start = time.perf_counter()
    assert compile_ahead([partial(int, 1)] * 3, torch.device("cuda"), 600.0) == 0
    assert time.perf_counter() - start < 300


def test_a_worker_that_dies_or_hangs_makes_way_for_a_new_one():
    worker = Worker(CPU)
    try:
        first = worker.run(os.getpid, 120.0)
        assert first != os.getpid()
        with pytest.raises(TaskError, match="ValueError: invalid literal for int"):
            worker.run(partial(int, "no number"), 120.0)
        assert worker.run(os.getpid, 120.0) == first
        with pytest.raises(TaskError, match="its process died"):
            worker.run(partial(os._exit, 3), 120.0)
        second = worker.run(os.getpid, 120.0)
        assert second != first
        with pytest.raises(TaskError, match="did not end within 0 s"):
            worker.run(partial(time.sleep, 600.0), 0.2)
        assert worker.run(os.getpid, 120.0) not in (first, second)
    finally:
        worker.stop()


def test_every_call_of_a_row_has_a_name_before_it_is_made():
    for shape in (SHAPES["flux-1024"], SHAPES["cogvideox1.5"]):
        dense, sparse = (gpu.names_of_calls(shape, density) for density in (1.0, 0.25))
        assert {"native", "int8_fp8", "prepare:fp8", "select", "partition", "flex"} <= set(dense)
        layers = {"layer:" + ":".join(map(str, way)) for way in gpu.WHOLE}
        assert layers == {name for name in sparse if name.startswith("layer:")}
        assert not layers & set(dense)


def test_models_shapes_are_those_of_their_grids():
    for shape in SHAPES.values():
        assert shape.tokens == shape.grid.total_tokens
    tokens = {name: shape.tokens for name, shape in SHAPES.items()}
    assert tokens == {
        "wan2.1-1.3b-480p": 32_760,
        "wan2.1-14b-720p": 75_600,
        "hunyuanvideo-720p": 118_800 + 256,
        "cogvideox1.5": 45_106,
        "flux-1024": 4_608,
        "flux-2048": 16_896,
    }


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
