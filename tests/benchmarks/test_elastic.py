"""What a plan gives at settings that it was not calibrated for: the command, its JSON and its table."""

import json
from pathlib import Path

import elastic
import pytest
import tables
import torch

from dit_accel import AccelPlan
from dit_accel.pipelines import demo, load_demo

ROOT = Path(__file__).parents[2]
SETTINGS = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 4.0}


def plan_of(**objective):
    plan = AccelPlan.preset("window", density=0.4, block=16)
    return AccelPlan(plan.candidates, plan.choice, block=16, objective=objective)


def test_a_plan_is_compared_at_every_setting(tmp_path):
    pipe = load_demo(torch.float32)
    moves = {"as calibrated": {}, "other shape": {"height": 32, "width": 96}}
    arguments = {
        "moves": moves | {"more steps": {"num_inference_steps": 4}},
        "preset": "preset:pooled@{}",
        "seed": 5,
        "work": tmp_path / "work",
        "output": tmp_path / "elastic.json",
    }
    report = elastic.run(pipe, plan_of(**SETTINGS), demo.PROMPTS["held_out"][:1], **arguments)
    assert json.loads((tmp_path / "elastic.json").read_text()) == report
    assert [move["name"] for move in report["moves"]] == list(arguments["moves"])
    for move, changes in zip(report["moves"], arguments["moves"].values(), strict=True):
        assert move["evaluation"]["settings"] == SETTINGS | changes
        assert [row["name"] for row in move["evaluation"]["variants"]] == [
            "dense",
            "plan",
            "preset:pooled@0.4",
        ]
        assert all(0.2 < row["density_mean"] < 0.7 for row in move["evaluation"]["variants"][1:])
    # Nothing is generated again, and the table has a line for each setting.
    again = elastic.run(pipe, plan_of(**SETTINGS), demo.PROMPTS["held_out"][:1], **arguments)
    runs = [
        [[run["seconds"] for run in m["evaluation"]["runs"]] for m in r["moves"]] for r in (report, again)
    ]
    assert runs[0] == runs[1]
    table = tables._elastic(report).splitlines()
    assert table[3].startswith("| other shape | 9 of 96×32 | 3 |")
    assert table[-1].startswith("Demo, 1 held-out prompt; preset: `preset:pooled@0.4`; dense: SDPA")


def test_the_moves_are_two_sizes_and_two_step_counts():
    changed = [set(change) for change in elastic.MOVES.values()]
    assert changed[0] == set()
    assert sum("num_inference_steps" in change for change in changed) == 2
    assert sum("height" in change for change in changed) == 2


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        ({}, [], "expected one that was calibrated, got one without height, width"),
        (SETTINGS, ["--prompts", "0"], "prompts: expected a number from 1 to"),
        (SETTINGS, ["--device", "abacus"], "expected cpu, cuda or cuda:N"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(objective, arguments, message, tmp_path, capsys):
    plan_of(**objective).save_pretrained(tmp_path / "plan")
    with pytest.raises(SystemExit) as stop:
        elastic.main(["--plan", str(tmp_path / "plan"), "--work", str(tmp_path / "work"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
