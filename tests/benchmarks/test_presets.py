"""The comparison of all published systems: what it runs, that it goes on where it was killed, what it writes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import presets
import pytest
import torch
from PIL import Image

from dit_accel.patterns import FAMILIES, select
from dit_accel.pipelines import load_demo
from dit_accel.presets import PRESETS, Preset

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "presets.py"

# 3 x 6 x 8 = 144 tokens: three blocks of 64, the last one short.
TINY = [
    "--height",
    "48",
    "--width",
    "64",
    "--frames",
    "5",
    "--steps",
    "1",
    "--prompts",
    "1",
    "--device",
    "cpu",
]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_system_runs_at_the_density_asked_for(name):
    setting = presets.at_density(PRESETS[name], 0.15, steps=20)
    only = FAMILIES[PRESETS[name].family].density
    assert setting.candidate.family == PRESETS[name].family
    assert setting.candidate.density == (0.15 if only is None else only)
    assert setting.block == PRESETS[name].block
    options = dict(setting.candidate.options)
    assert "top_p" not in options
    published = {key: value for key, value in PRESETS[name].options.items() if key not in ("top_p", "reuse")}
    assert {key: value for key, value in options.items() if key != "reuse"} == published
    plan = setting.variant().plan
    assert (plan.candidates, plan.block, plan.range_starts) == ((setting.candidate,), setting.block, (0.0,))


@pytest.mark.parametrize(("steps", "reuse"), [(50, 20), (20, 8), (13, 5), (1, 1)])
def test_reuse_is_counted_in_fifty_steps(steps, reuse):
    preset = Preset("searched", 0.2, {"order": "frame", "reuse": 20}, warm_up=0.05)
    assert dict(presets.at_density(preset, 0.25, steps).candidate.options)["reuse"] == reuse


def test_families_of_one_density_keep_it():
    dense, skip = (presets.at_density(Preset(name, 0.3), 0.25, 20) for name in ("dense", "skip"))
    assert [c.remainder for c in dense.with_and_without()] == [False]
    assert [(c.density, c.remainder) for c in skip.with_and_without()] == [(0.0, False), (0.0, True)]


def test_means_take_the_place_of_random_features():
    hyperattention, scatterbrain = (
        presets.at_density(PRESETS[name], 0.25, 20).with_and_without()
        for name in ("hyperattention", "scatterbrain")
    )
    assert [(c.features, c.remainder) for c in scatterbrain] == [((64, 0), 0.0), (None, 1.0)]
    assert scatterbrain[1] == hyperattention[1]


def test_names_tell_settings_apart():
    base = presets.at_density(PRESETS["natten"], 0.25, 20)
    others = [
        presets.at_density(PRESETS["natten"], 0.2501, 20),
        presets.at_density(PRESETS["clear"], 0.25, 20),
        replace(base, block=128),
        replace(base, candidate=replace(base.candidate, remainder=True)),
    ]
    assert len({base.name, *(other.name for other in others)}) == 5
    assert presets.at_density(PRESETS["natten"], 0.25, 50).name == base.name


def test_a_dense_generation_comes_first_for_new_prompts_and_every_few_others():
    some = presets.at_density(PRESETS["natten"], 0.25, 20)
    every = presets.DENSE_EVERY
    missing = [(0, some)] * (every + 2) + [(1, some)] * 2 + [(2, some)]
    tasks = presets.schedule(missing, frames={0, 2})
    assert [task for task in tasks if task[1] is not None] == missing
    dense = [place for place, (_, setting) in enumerate(tasks) if setting is None]
    # First of all; after `every` others; before prompt 1, whose frames are missing, but not before prompt 2.
    assert dense == [0, every + 1, every + 4]
    assert [tasks[place][0] for place in dense] == [0, 0, 1]
    assert presets.schedule([], frames=set()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "svg2,nonsense"], r"only: expected names of presets, got nonsense; known: .*svg2"),
        (["--only", " , "], "only: expected names of presets, got none; known"),
        (["--only", "svg2,sta,svg2"], "only: expected each name once, got 'svg2,sta,svg2'; leave the second"),
        (
            ["--density", "0"],
            "density: expected numbers above 0 and up to 1, got '0'; give for instance 0.25",
        ),
        (["--density", "0.5,0.25"], "density: expected one number, got '0.5,0.25'; see --densities"),
        (["--densities", "0.5,1.5"], "density: expected numbers above 0 and up to 1, got '0.5,1.5'"),
        (["--densities", "a quarter"], "density: expected numbers above 0 and up to 1, got 'a quarter'"),
        (["--densities", "nan"], "density: expected numbers above 0 and up to 1, got 'nan'"),
        (["--prompts", "0"], "prompts: expected a number from 1 to 64, got 0"),
        (["--prompts", "65"], "prompts: expected a number from 1 to 64, got 65"),
        (["--levels", "0"], "levels: expected a number from 1 to 1000, got 0"),
        (["--query-blocks", "0"], "query_blocks: expected a number from 1 to 1000000, got 0"),
        (["--frames", "0"], "num_frames: expected a positive number, got 0"),
        (["--device", "abacus"], "device: expected cpu, cuda or cuda:N, got 'abacus'"),
        (
            ["--calibration", "nowhere", "--device", "cpu"],
            "calibration: expected a directory written by calibrate, got nowhere",
        ),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        presets.main([*arguments, "--work", str(tmp_path), "--output", str(tmp_path / "presets.json")])
    assert stopped.value.code == 2
    assert re.search(f"error: {message}", capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.iterdir())


def test_a_broken_measurement_is_named(tmp_path):
    work = presets.Work(tmp_path)
    assert work.get("runs", "natten", 3) is None
    work.put("runs", "natten", {"seconds": 1.5}, 3)
    assert work.get("runs", "natten", 3) == {"seconds": 1.5}
    (tmp_path / "runs" / "003-natten.json").write_text('{"seconds": ')
    with pytest.raises(
        ValueError, match=r"003-natten.json: expected a measurement, got broken JSON .*; delete it"
    ):
        work.get("runs", "natten", 3)


def test_clocked_functions_return_and_come_back():
    before = math.floor
    with presets.clocked(math, "floor", torch.device("cpu")) as taken:
        assert math.floor(2.5) == 2
        assert math.floor(-2.5) == -3
        with pytest.raises(TypeError):
            math.floor("text")
    assert len(taken) == 2
    assert all(seconds >= 0 for seconds in taken)
    assert math.floor is before


def test_heads_row_is_the_mean_over_heads_of_sums_over_prompts():
    generator = torch.Generator().manual_seed(0)
    records = []
    for number in range(3):
        tables = torch.rand(5, 2, 4, generator=generator, dtype=torch.float64) + 0.5
        tables[1] = 64.0 * (number + 1)
        record = dict(zip(presets.SUMS, tables.tolist(), strict=True))
        records.append(record | {"density": 0.1 * number} | dict.fromkeys(presets.COSTS, 7))
    row = presets._heads_row(records)
    recalls, errors = [], []
    for layer in range(2):
        for head in range(4):
            sums = {name: sum(r[name][layer][head] for r in records) for name in presets.SUMS}
            recalls.append(sums["mass"] / sums["rows"])
            errors.append(math.sqrt(sums["error"] / sums["norm"]))
    assert row["recall"] == pytest.approx(sum(recalls) / 8, rel=1e-12)
    assert row["recall_min"] == pytest.approx(min(recalls), rel=1e-12)
    assert row["rel_l2"] == pytest.approx(sum(errors) / 8, rel=1e-12)
    assert (row["prompts"], row["density"]) == (3, pytest.approx(0.1))
    assert [row[name] for name in presets.COSTS] == [7] * 4


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[list[str], Path, dict[Path, bytes]]:
    """Generations of two systems, killed right after the first finished one: arguments, folder, finished files."""
    folder = tmp_path_factory.mktemp("presets")
    arguments = [
        *TINY, "--only", "natten,svg2", "--densities", "0.5,0.25", "--levels", "1",
        "--work", str(folder / "work"), "--output", str(folder / "presets.json"),
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--stage", "generations"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ,
    )  # fmt: skip
    end = time.monotonic() + 240
    found: list[Path] = []
    while not found and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
        found = list(folder.glob("work/*/runs/000-window@0.25-*.json"))
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert found, output
    assert process.returncode == -signal.SIGKILL, output
    return arguments, folder, {path: path.read_bytes() for path in folder.glob("work/*/runs/*.json")}


def test_a_killed_comparison_goes_on_where_it_was(killed, capsys):
    arguments, folder, finished = killed
    partial = json.loads((folder / "presets.json").read_text())["generations"]
    assert 0 <= partial["done"] < partial["of"]
    presets.main([*arguments, "--stage", "generations"])
    assert "generation 1 of" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished} == finished
    report = json.loads((folder / "presets.json").read_text())
    part = report["generations"]
    rows = {(row["preset"], row["remainder"]): row for row in part["rows"]}
    assert {("natten", False), ("natten", True), ("svg2", False), ("svg2", True)} <= set(rows)
    # Systems that are the same at this density share measurements; all others are still missing.
    assert part["done"] == len(rows) < part["of"]
    assert part["of"] == sum(
        len(presets.at_density(p, 0.25, 1).with_and_without()) for p in presets.SYSTEMS.values()
    )
    for row in rows.values():
        assert 0 < row["density"] <= 1
        assert 0 < row["psnr_min"] == row["psnr_mean"] < 100
        assert 0 <= row["selection_seconds"] < row["attention_seconds"] < row["seconds"]
        assert row["speedup"] > 0
        assert 0 <= row["semantic"] <= 1
    assert rows["svg2", False]["selection_seconds"] > rows["natten", False]["selection_seconds"]
    assert 0 < part["dense"]["attention_seconds"] < part["dense"]["seconds"]
    assert report["machine"]["device"] == "cpu"

    # Nothing is left to do: no file changes, no generation is made.
    (folder / "presets.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("work/**/*") if path.is_file()}
    presets.main([*arguments, "--stage", "generations"])
    assert "generation" not in capsys.readouterr().err
    assert json.loads((folder / "presets.json").read_text())["generations"] == part
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_plan_of_ours_stands_among_them(tmp_path, capsys):
    pipe = load_demo(torch.bfloat16, "cpu")
    sizes = {"height": 48, "width": 64, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 5.0}
    for folder, seed in (("plan", 1000), ("seen", 1)):
        presets.calibrate(
            pipe, ["a red circle moves left"], **sizes, density=0.9, seed=seed, output_dir=tmp_path / folder,
            progress=False,
        )  # fmt: skip
    before = (tmp_path / "plan" / "accel_config.json").read_bytes()
    arguments = [
        *TINY, "--steps", "2", "--only", "natten", "--stage", "generations", "--density", "0.6",
        "--calibration", str(tmp_path / "plan"),
        "--work", str(tmp_path / "work"), "--output", str(tmp_path / "presets.json"),
    ]  # fmt: skip
    presets.main(arguments)
    rows = json.loads((tmp_path / "presets.json").read_text())["generations"]["rows"]
    (ours,) = [row for row in rows if row["preset"] == "calibrated"]
    # Three blocks leave few densities to choose from.
    assert 0.3 < ours["density"] < 0.9
    assert ours["psnr_mean"] > 10
    assert (tmp_path / "plan" / "accel_config.json").read_bytes() == before
    capsys.readouterr()
    seen = [str(tmp_path / "seen") if a == str(tmp_path / "plan") else a for a in arguments]
    with pytest.raises(SystemExit):
        presets.main([*seen, "--prompts", "2"])
    told = capsys.readouterr().err
    assert "expected seeds other than those of the held-out prompts, 0 to 1, got 1; calibrate with" in told
    presets.main(arguments)
    assert "generation 1" not in capsys.readouterr().err


def test_heads_of_equal_and_varying_blocks(killed, capsys):
    arguments, folder, _ = killed
    presets.main([*arguments, "--stage", "heads"])
    part = json.loads((folder / "presets.json").read_text())["heads"]
    rows = {(row["preset"], row["asked"]): row for row in part["rows"]}
    assert {(name, density) for name in ("natten", "svg2") for density in (0.5, 0.25)} <= set(rows)
    assert part["steps"] == [0]
    assert part["done"] == len(rows) < part["of"] == 2 * len(presets.SYSTEMS)
    for row in rows.values():
        assert 0 < row["recall_min"] <= row["recall"] < 1
        assert 0 < row["rel_l2_remainder"] < row["rel_l2"] < 2
    assert rows["natten", 0.5]["recall"] > rows["natten", 0.25]["recall"]
    assert [rows["natten", 0.5][name] for name in presets.COSTS] == [0] * 4
    for name in ("multiply_adds", "bytes"):
        assert rows["svg2", 0.5][f"{name}_first"] > rows["svg2", 0.5][f"{name}_later"] > 0
    times = {path: path.stat().st_mtime_ns for path in folder.glob("work/*/heads/*.json")}
    assert len(times) == 4

    assert "heads, prompt 1 of 1" in capsys.readouterr().err
    presets.main([*arguments, "--stage", "heads"])
    assert "heads, prompt" not in capsys.readouterr().err
    assert json.loads((folder / "presets.json").read_text())["heads"] == part
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_heads_are_the_brute_force_over_all_captured_calls(tmp_path):
    """Recall and rel L2 of the report against float64 sums over full masks of the calls that it was made from."""
    settings = presets.GenerationSettings(64, 80, 5, 2, 1.0)  # 3 x 8 x 10 tokens, one guidance branch
    bench = presets.Bench(
        pipe=load_demo(torch.bfloat16, "cpu"), settings=settings, prompts=["a red circle moves left"], seed=3,
        output=tmp_path / "presets.json", densities=[0.3], density=0.3,
        levels=1, query_blocks=1000, machine={}, tuning_prompts=[], folder=tmp_path,
    )  # fmt: skip
    calls = []

    def use(step, layer, query, key, value, grid):
        if step == 1:
            calls.append((layer, *(x.clone() for x in (query, key, value)), grid))

    presets.watch(bench, 0, settings, use)
    assert [layer for layer, *_ in calls] == list(range(6))
    presets.measure_heads(bench, ["natten", "svoo", "balanced"])
    rows = {row["preset"]: row for row in json.loads(bench.output.read_text())["heads"]["rows"]}
    for name in ("natten", "svoo", "balanced"):
        heads = [found for _, *call in calls for found in brute_force(presets.SYSTEMS[name], *call)]
        expected = dict(zip(("recall", "rel_l2", "rel_l2_remainder"), torch.tensor(heads).T, strict=True))
        # Float32 sums over 240 keys: some hundred roundings of 2^-24, relative to errors of a few percent and more.
        for measure, of_heads in expected.items():
            assert rows[name][measure] == pytest.approx(float(of_heads.mean()), rel=1e-3), (name, measure)
        assert rows[name]["recall_min"] == pytest.approx(float(expected["recall"].min()), rel=1e-3)


def brute_force(preset, query, key, value, grid) -> list[tuple[float, float, float]]:
    """Per head recall, rel L2 and rel L2 with means in place of the blocks left out."""
    options = {name: given for name, given in preset.options.items() if name not in ("top_p", "reuse")}
    memory = {}
    for _ in range(2):  # clusters of a later step go on from those before
        selection = select(
            preset.family, query, key, grid, density=0.3, block=preset.block, state=memory, **options
        )
    heads = []
    for h in range(query.shape[2]):
        q, k, v = (x[0, :, h].double() for x in (query, key, value))
        weights = (q @ k.T * q.shape[1] ** -0.5).exp()
        dense = weights @ v / weights.sum(-1, keepdim=True)
        kept = weights * selection.mask()[0, h]
        output, total = kept @ v, kept.sum(-1, keepdim=True)
        recall = (total / weights.sum(-1, keepdim=True)).mean()
        without = (output / total - dense).norm() / dense.norm()
        order = selection.key_order.expand(1, query.shape[2], -1)[0, h]
        blocks = selection.index.key_blocks().expand(1, query.shape[2], -1)[0, h]
        for block in blocks.unique():
            tokens = order[blocks == block]
            left_out = ~selection.mask()[0, h][:, tokens].any(-1, keepdim=True)
            stand_in = len(tokens) * (q @ k[tokens].mean(0) * q.shape[1] ** -0.5).exp()[:, None] * left_out
            output, total = output + stand_in * v[tokens].mean(0), total + stand_in
        remainder = (output / total - dense).norm() / dense.norm()
        heads.append((float(recall), float(without), float(remainder)))
    return heads


def test_picture_has_a_panel_for_every_family(killed):
    arguments, folder, _ = killed
    presets.main([*arguments, "--stage", "picture"])
    with Image.open(folder / "masks.png") as picture:
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        width, height = picture.size
    colourful = pixels.view(height, width, 3).float().std(-1) > 10
    panels = 1 + len(FAMILIES)
    lines = -(-panels // 5)
    # Each line of panels holds coloured pixels, and the last one ends where the panels end.
    for line in range(lines):
        top = int(height * (line + 0.25) / lines)
        assert colourful[top : top + height // (2 * lines)].any(), line
