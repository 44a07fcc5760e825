"""`dit-accel inspect` on a plan that carries what a calibration measured."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dit_accel import AccelPlan
from dit_accel.caching import CacheConfig, Schedule, Term, cache_preset
from dit_accel.candidate import Candidate
from dit_accel.cli import main

PICTURES = ("heads.png", "sensitivity.png", "histograms.png", "time.png", "curve.png", "ranges.png")
RANGES, LAYERS, HEADS = 2, 3, 4


def trial(number: int, *, chosen: bool) -> dict:
    return {
        "prompt": 0, "chosen": chosen, "density": 0.3, "error_expected": 1e-3 / number, "psnr": 24.0 + 4 * number,
        "ssim": 0.9, "latent_rel_l2": 0.2, "seconds": 8.0 + number, "attention_ms_expected": 900.0 * number,
        "seconds_expected": 8.1 + number, "seconds_dense": 20.0,
    }  # fmt: skip


@pytest.fixture
def plan() -> AccelPlan:
    choice = torch.arange(RANGES * LAYERS * HEADS).view(RANGES, LAYERS, HEADS) % 3
    measured = torch.linspace(0.05, 1.0, choice.numel()).view_as(choice)
    points = [
        {
            "density_mean": 0.1,
            "error": 1e-2,
            "attention_ms": 500.0,
            "saved_ms": 700.0,
            "quality_expected": 22.0,
        },
        {
            "density_mean": 0.3,
            "error": 1e-3,
            "attention_ms": 1500.0,
            "saved_ms": 0.0,
            "quality_expected": 29.0,
        },
        {"density_mean": 0.9, "error": 1e-5, "attention_ms": 4500.0, "quality_expected": 44.0},
    ]
    return AccelPlan(
        (Candidate("dense", 1.0), Candidate("window", 0.25, remainder=True), Candidate("hashed", 0.1)),
        choice.to(torch.int16),
        range_starts=(0.0, 0.4),
        layers=tuple(f"blocks.{n}.attn1" for n in range(LAYERS)),
        recall=measured,
        rel_l2=1 - measured,
        latency_ms=2 * measured,
        objective={"target_psnr": 30.0, "target_ssim": None},
        validated={
            "psnr_calibration": 30.2,
            "attention_error": 0.08,
            "layer_error": -0.06,
            "sensitivity": (0.01 * measured).tolist(),
            "trials": [trial(1, chosen=False), trial(2, chosen=True)],
            "frontier": points,
            "ranges": [
                {"start": 0.0, "error": 3e-4, "attention_ms": 1000.0, "attention_ms_dense": 3000.0},
                {"start": 0.4, "error": 1e-4, "attention_ms": 800.0, "attention_ms_dense": 2000.0},
            ],
        },
    )


def inspect(capsys, *arguments: object) -> tuple[int, str]:
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_pictures_and_tables_of_a_calibrated_plan(plan, capsys, tmp_path):
    plan.save_pretrained(tmp_path / "plan")
    code, out = inspect(capsys, tmp_path / "plan", "--json", "--output", tmp_path / "out")
    data = json.loads(out)
    assert code == 0
    assert data["pictures"] == dict.fromkeys(PICTURES)
    for name in PICTURES:
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 300
            assert image.convert("L").getextrema()[0] < 100  # something is drawn
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == data
    rows = {row["family"]: row for row in data["families"]}
    assert [row["heads"] for row in rows.values()] == [8, 8, 8]
    window = plan.choice == 1
    assert rows["window"]["density"] == 0.25
    assert rows["window"]["recall"] == pytest.approx(plan.recall[window].mean().item())
    assert rows["hashed"]["latency_ms"] == pytest.approx(plan.latency_ms[plan.choice == 2].mean().item())
    assert rows["dense"]["sensitivity"] == pytest.approx(0.01 * plan.recall[plan.choice == 0].mean().item())


def test_the_text_tells_what_each_range_spends(plan, capsys, tmp_path):
    plan.save_pretrained(tmp_path / "plan")
    _, text = inspect(capsys, tmp_path / "plan")
    lines = text.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("step range")]
    assert lines[head + 1].split()[-2:] == ["75.0%", "3.00"]
    assert lines[head + 2].split()[-2:] == ["25.0%", "2.50"]
    assert lines[head + 3 : head + 5] == [
        "attention took 1.08 times what was predicted of its heads",
        "layers timed alone 0.94 times, where they are furthest off",
    ]
    assert any(line.split()[:2] == ["window", "8"] for line in lines)
    assert not any("precision" in line for line in lines)


def test_the_text_tells_what_steps_and_attention_do(plan, capsys, tmp_path):
    schedule = Schedule(
        6, {"cond": {3: (Term("cond", 2, 1.0),)}, "uncond": {s: (Term("cond", 2, 1.0),) for s in (3, 4)}}
    )
    joint = replace(
        plan,
        cache=CacheConfig("schedule", target="output", schedule=schedule),
        validated=plan.validated
        | {
            "parts": {
                "attention": {"error": 3e-4, "saved_ms": 3200.0},
                "steps": {"error": 1e-4, "saved_ms": 1500.0},
            }
        },
    )
    joint.save_pretrained(tmp_path / "plan")
    _, text = inspect(capsys, tmp_path / "plan")
    lines = text.splitlines()
    at = lines.index("left out    error share  seconds saved")
    assert lines[at + 1].split() == ["attention", "75.0%", "3.20"]
    assert lines[at + 2].split() == ["steps", "25.0%", "1.50"]
    at = lines.index("steps (# computed, · forecast)")
    assert lines[at + 1 : at + 3] == ["cond    ###·##", "uncond  ###··#"]
    replace(plan, cache=cache_preset("cg-taylor")).save_pretrained(tmp_path / "gate")
    _, text = inspect(capsys, tmp_path / "gate")
    assert "steps           gate cg-taylor" in text.splitlines()
    assert "left out" not in text


def test_a_preset_says_what_its_authors_calibrate(capsys, tmp_path):
    AccelPlan.preset("sta").save_pretrained(tmp_path / "plan")
    _, text = inspect(capsys, tmp_path / "plan")
    assert "preset sta, uncalibrated its authors calibrate the window of each head, here all" in text


def test_families_are_listed_by_precision_where_it_differs(plan, capsys, tmp_path):
    dense, window, hashed = plan.candidates
    lower = replace(window, precision="int8_fp8")
    replace(plan, candidates=(dense, window, lower, hashed)).save_pretrained(tmp_path / "plan")
    _, text = inspect(capsys, tmp_path / "plan", "--json")
    rows = {(row["family"], row["precision"]): row["heads"] for row in json.loads(text)["families"]}
    assert rows == {("dense", "native"): 8, ("window", "native"): 8, ("window", "int8_fp8"): 8}
    _, text = inspect(capsys, tmp_path / "plan")
    assert any(line.split()[:3] == ["window", "int8_fp8", "8"] for line in text.splitlines())
    assert "window@0.25 int8_fp8 remainder" in text


def test_what_was_not_measured_is_named_and_not_drawn(capsys, tmp_path):
    AccelPlan.preset("window", density=0.3).save_pretrained(tmp_path / "plan")
    code, text = inspect(capsys, tmp_path / "plan", "--output", tmp_path / "out")
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"heads.png", "inspect.json"}
    assert "curve.png: not drawn, the plan's calibration recorded no trials" in text
    assert "histograms.png: not drawn, the plan was not calibrated" in text
    assert "step range" not in text


@pytest.mark.parametrize("goal", ["target_ssim", "density"])
def test_other_goals_are_drawn(plan, goal, capsys, tmp_path):
    objective = {"target_psnr": None, goal: 0.9}
    values = {name: value for name, value in vars(plan).items() if name != "objective"}
    AccelPlan(**values, objective=objective).save_pretrained(tmp_path / "plan")
    inspect(capsys, tmp_path / "plan", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "curve.png").stat().st_size > 5000
