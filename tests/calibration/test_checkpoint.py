"""Stages on disk."""

import pytest
import torch

from dit_accel.calibration.checkpoint import Checkpoint


def test_a_stage_is_found_by_the_next_process(tmp_path):
    frames = torch.rand(3, 5, 7, 3).movedim(-1, 1)
    Checkpoint(tmp_path / "a", {"seed": 1}).save(
        "dense_0", {"frames": frames}, {"seconds": 1.5, "names": ["x"]}
    )
    tensors, values = Checkpoint(tmp_path / "a", {"seed": 1}).load("dense_0")
    assert torch.equal(tensors["frames"], frames)
    assert values == {"seconds": 1.5, "names": ["x"]}


def test_a_stage_without_tensors_is_kept(tmp_path):
    Checkpoint(tmp_path, {}).save("trial_0", {}, {"psnr": 28.0})
    assert Checkpoint(tmp_path, {}).load("trial_0") == ({}, {"psnr": 28.0})


@pytest.mark.parametrize("directory", ["disk", None])
def test_unfinished_stages_are_none(tmp_path, directory):
    checkpoint = Checkpoint(tmp_path / directory if directory else None, {})
    assert checkpoint.load("dense_0") is None
    checkpoint.save("dense_0", {}, {"seconds": 2})
    assert checkpoint.load("dense_0") == ({}, {"seconds": 2})


def test_other_arguments_are_refused_by_name(tmp_path):
    Checkpoint(tmp_path, {"seed": 1, "height": 144, "density": None}).save("dense_0", {}, {})
    with pytest.raises(ValueError, match="holds a calibration with height = 144, got 160; .*another output"):
        Checkpoint(tmp_path, {"seed": 1, "height": 160, "density": None})


def test_an_attempt_that_finished_nothing_is_in_nobodys_way(tmp_path):
    Checkpoint(tmp_path, {"height": 100})
    Checkpoint(tmp_path, {"height": 96}).save("dense_0", {}, {})
    with pytest.raises(ValueError, match="holds a calibration with height = 96, got 100"):
        Checkpoint(tmp_path, {"height": 100})


def test_tuples_and_lists_are_the_same_arguments(tmp_path):
    Checkpoint(tmp_path, {"prompts": ("a", "b")})
    assert Checkpoint(tmp_path, {"prompts": ["a", "b"]}).load("dense_0") is None


def test_half_a_file_left_by_a_kill_does_not_count(tmp_path):
    Checkpoint(tmp_path, {})
    (tmp_path / "dense_0.tmp").write_bytes(b"half")
    checkpoint = Checkpoint(tmp_path, {})
    assert checkpoint.load("dense_0") is None
    checkpoint.save("dense_0", {"a": torch.ones(2)}, {})
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_a_corrupted_stage_is_named(tmp_path):
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save("dense_0", {"a": torch.ones(200)}, {})
    path = tmp_path / "dense_0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="dense_0.safetensors is not a readable .*; delete it"):
        checkpoint.load("dense_0")
