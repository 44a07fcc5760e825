"""What sparse attention costs in each part of the steps: the command, its JSON and its table."""

import json

import pytest
import steps
import tables
import torch

from dit_accel import AccelPlan
from dit_accel.bench.demo_work import DemoWork
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.pipelines import demo, load_demo

SETTINGS = GenerationSettings(48, 64, 9, 4, 4.0)


@pytest.mark.parametrize(("count", "parts"), [(20, 5), (7, 3), (4, 4), (3, 1)])
def test_parts_cover_all_steps(count, parts):
    found = steps.parts_of(count, parts)
    assert [step for start, stop in found for step in range(start, stop)] == list(range(count))
    assert len(found) == parts
    assert max(b - a for a, b in found) - min(b - a for a, b in found) <= 1


def test_one_part_at_a_time_is_sparse(tmp_path):
    sparse = AccelPlan.preset("window", density=0.4, block=16)
    work = DemoWork(
        pipe=load_demo(torch.float32),
        settings=SETTINGS,
        seed=3,
        prompts=demo.PROMPTS["held_out"][:1],
        tuning_prompts=[],
        machine={},
        folder=tmp_path / "work",
    )
    report = steps.run(work, sparse, 2, tmp_path / "steps.json")
    assert json.loads((tmp_path / "steps.json").read_text()) == report
    rows = {row["name"]: row for row in report["evaluation"]["variants"]}
    assert list(rows) == ["dense", "all steps", "steps 1-2", "steps 3-4"]
    # Two of four steps are sparse, the others dense.
    density = rows["all steps"]["density_mean"]
    for name in ("steps 1-2", "steps 3-4"):
        assert rows[name]["density_mean"] == pytest.approx((1 + density) / 2, rel=1e-6)
        assert not rows[name]["identical_to_dense"]
    assert rows["steps 1-2"]["psnr_mean"] != rows["steps 3-4"]["psnr_mean"]
    (first, last), (later, end) = report["noise"]
    assert 1 >= first > last > later > end > 0
    table = tables._steps(report).splitlines()
    assert table[3].startswith("| steps 1-2 | ")
    assert len(table) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "21"], "parts: expected a number from 1 to 20, the steps, got 21"),
        (["--prompts", "0"], "prompts: expected a number from 1 to"),
        (["--density", "2"], "density: expected a number from 0 to 1, got 2.0"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        steps.main(["--work", str(tmp_path / "work"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
