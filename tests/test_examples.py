"""The examples run as scripts on a tiny pipeline."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = ["--height", "48", "--width", "80", "--num-frames", "5", "--num-inference-steps", "2"]


@pytest.fixture
def example(monkeypatch, capsys, tiny_wan_dir):
    """Run an example on the tiny pipeline and return what it printed."""

    def call(name: str, *arguments: object) -> str:
        argv = [name, *map(str, arguments), "--model", str(tiny_wan_dir), *SIZES]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_generate_wan(example, tmp_path):
    from dit_accel import AccelPlan

    video = tmp_path / "video.mp4"
    assert "attention ran at density" in example("generate_wan.py", "a red circle", "--output", video)
    assert video.stat().st_size > 500
    AccelPlan.preset("skip").save_pretrained(tmp_path / "plan")
    printed = example("generate_wan.py", "a red circle", "--output", video, "--plan", tmp_path / "plan")
    assert "density 0.000" in printed


def test_calibrate_and_compare(example, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na red square\n")
    arguments = ["--prompts", prompts, "--target-psnr", 50, "--output", tmp_path / "compare"]
    assert "calibrated" in example("calibrate_and_compare.py", *arguments)
    data = json.loads((tmp_path / "compare" / "evaluation.json").read_text())
    assert data["prompts"] == ["a red square"]
    assert [row["name"] for row in data["variants"]] == ["dense", "calibrated", "preset:window@0.3"]
    assert (tmp_path / "compare" / "comparison.png").is_file()


def test_two_prompts_leave_nothing_to_compare(example, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    with pytest.raises(SystemExit) as stopped:
        example("calibrate_and_compare.py", "--prompts", prompts, "--output", tmp_path)
    assert stopped.value.code == 2
    assert "--prompts: expected at least three, two to calibrate and others to compare, got 2" in (
        capsys.readouterr().err
    )
