"""Tables and pictures."""

import subprocess
from dataclasses import replace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel import AccelPlan
from dit_accel.candidate import Candidate
from dit_accel.evaluation.figures import Take, Takes, save_comparison, save_curve, save_heads
from dit_accel.evaluation.media import to_images, write_frames, write_video
from dit_accel.evaluation.report import console_table, markdown_table, plan_map


def _row(name, **changes):
    row = {
        "name": name,
        "seconds_dense_p50": 100.0,
        "seconds_p50": 100.0,
        "speedup": 1.0,
        "psnr_mean": 100.0,
        "psnr_min": 100.0,
        "ssim_mean": 1.0,
        "latent_rel_l2": 0.0,
        "density_mean": 1.0,
        "semantic": None,
        "semantic_parts": None,
        "attention_speedup": None,
    }
    return row | changes


@pytest.fixture
def evaluation():
    fast = {"seconds_p50": 62.5, "speedup": 1.6, "psnr_mean": 28.1234, "psnr_min": 26.5, "density_mean": 0.21}
    return {
        "model": "demo",
        "machine": {"gpu": None, "cpu": "some cpu", "cores": 2, "dtype": "bfloat16", "torch": "2.13.0"},
        "dense_backend": "SDPA (CPU flash)",
        "settings": {
            "height": 224,
            "width": 256,
            "num_frames": 17,
            "num_inference_steps": 20,
            "guidance_scale": 4.0,
        },
        "prompts": ["one", "two"],
        "attention_share": 0.71,
        "variants": [
            _row("dense"),
            _row("plan:out/plan", **fast),
            _row("diffusers:first_block", speedup=0.9, psnr_mean=24.0, psnr_min=20.0, density_mean=None),
        ],
    }


@pytest.fixture
def plan():
    candidates = (
        Candidate("dense", 1.0),
        Candidate("window", 0.3),
        Candidate("bands", 0.1, (("order", "space"),)),
        Candidate("skip", 0.0),
    )
    choice = torch.tensor([[[0, 1, 2], [1, 1, 3]], [[2, 2, 2], [0, 0, 1]]], dtype=torch.int16)
    return AccelPlan(
        candidates, choice, (0.0, 0.4), ("blocks.0.attn1", "blocks.1.attn1"), "WanTransformer3DModel", "0"
    )


def _picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_the_console_table_is_aligned_and_complete(evaluation):
    text = console_table(evaluation)
    _, _, head, line, *rows = text.splitlines()
    assert {len(head), len(line), *map(len, rows)} == {len(head)}
    assert "71% of a dense step" in text
    assert "SDPA (CPU flash)" in text
    assert rows[1].split() == [
        "plan:out/plan",
        "62.50",
        "1.60",
        "28.12",
        "26.50",
        "1.0000",
        "0.0000",
        "0.210",
    ]
    # Nothing has a semantic score or a timed attention here, and dense is not compared with itself.
    assert "semantic" not in head
    assert "attention" not in head
    assert rows[0].split() == ["dense", "100.00", "1.00", "–", "–", "–", "–", "1.000"]


def test_optional_columns_appear_when_one_variant_has_them(evaluation):
    evaluation["variants"][1] |= {"semantic": 0.875, "attention_speedup": 2.5}
    head = console_table(evaluation).splitlines()[2]
    assert "semantic" in head
    assert "attention speed-up" in head
    assert "| `plan:out/plan` | 62.50 | 1.60 | 2.50 | 28.12 " in markdown_table(evaluation)


def test_columns_of_caches_appear_when_something_is_cached(evaluation):
    """Results from before caches were measured have no such fields; without a cache both are 0."""
    for row in evaluation["variants"][:2]:
        row |= {"skipped_share": 0.0, "cache_bytes": 0, "identical_to_dense": False}
    assert "skipped" not in markdown_table(evaluation)
    evaluation["variants"][1] |= {"skipped_share": 0.5, "cache_bytes": 1_500_000}
    lines = markdown_table(evaluation).splitlines()
    assert lines[0].endswith("| skipped | cache MB |")
    assert [line.split("|")[-3:-1] for line in lines[2:5]] == [
        [" 0% ", " 0.0 "],
        [" 50% ", " 1.5 "],
        [" – ", " – "],
    ]


def test_heads_that_the_guard_made_dense_are_told(evaluation):
    evaluation["variants"][1]["guarded_heads"] = 0.0
    assert "guarded" not in markdown_table(evaluation)
    evaluation["variants"][1]["guarded_heads"] = 1.5
    lines = markdown_table(evaluation).splitlines()
    assert lines[0].endswith("| guarded heads |")
    assert [line.split("|")[-2] for line in lines[2:5]] == [" – ", " 1.5 ", " – "]


def test_what_was_resumed_says_so(evaluation):
    """Generations of different processes are not interleaved."""
    assert "processes" not in markdown_table(evaluation | {"processes": 1})
    assert "; measured in 3 processes, one after another" in markdown_table(evaluation | {"processes": 3})


def test_what_is_identical_to_dense_has_no_speed_up(evaluation):
    evaluation["variants"][1] |= {"identical_to_dense": True}
    table = markdown_table(evaluation)
    assert "| `plan:out/plan` | 62.50 | – | 28.12 |" in table
    assert table.endswith("; identical to dense in every generation, so no speed-up: plan:out/plan.")


def test_the_markdown_table_has_equal_columns(evaluation):
    rows = [line for line in markdown_table(evaluation).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(evaluation["variants"])
    assert len({row.count("|") for row in rows}) == 1


def test_the_plan_map_shows_every_head_of_every_range(plan):
    lines = plan_map(plan).splitlines()
    assert lines[0] == "0% to 40% of denoising"
    assert lines[3] == "40% to 100% of denoising"
    assert lines[1].split() == ["blocks.0.attn1", "dense@1.00", "window@0.30", "bands@0.10", "order=space"]
    assert lines[5].split() == ["blocks.1.attn1", "dense@1.00", "dense@1.00", "window@0.30"]
    assert "every layer" in plan_map(AccelPlan.preset("window", density=0.3))


def test_the_comparison_shows_both_videos_and_their_difference(tmp_path):
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(2, 20, 30, 3, generator=generator)
    first = Take("dense", dense, "10 s")
    save_comparison([Takes("a prompt", first, (Take("plan", dense, "5 s"),))], tmp_path / "same.png")
    save_comparison([Takes("a prompt", first, (Take("plan", 1 - dense, "5 s"),))] * 2, tmp_path / "other.png")
    same, other = _picture(tmp_path / "same.png"), _picture(tmp_path / "other.png")
    assert same.std() > 40
    assert other.shape[0] == pytest.approx(2 * same.shape[0], rel=0.1)
    # The lowest row of frames is the difference: black where nothing differs.
    black = (same.max(axis=-1) < 8).mean()
    assert black > 0.15
    assert (other.max(axis=-1) < 8).mean() < black / 4
    with pytest.raises(ValueError, match="prompts: expected at least one to draw"):
        save_comparison([], tmp_path / "none.png")


def test_one_frame_can_be_compared(tmp_path):
    image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    first = Take("dense", image, "1 s")
    save_comparison([Takes("an image", first, (Take("plan", image, "1 s"),))], tmp_path / "image.png")
    assert _picture(tmp_path / "image.png").std() > 20
    two = (Take("plan", image, "1 s"), Take("joint", image, "1 s"))
    save_comparison([Takes("an image", first, two)], tmp_path / "two.png")
    one, both = (_picture(tmp_path / name).shape[0] for name in ("image.png", "two.png"))
    # five strips instead of three
    assert both > 1.4 * one


def test_heads_has_the_colours_of_the_families(plan, tmp_path):
    save_heads(plan, tmp_path / "heads.png")
    pixels = {tuple(map(int, colour)) for colour in _picture(tmp_path / "heads.png").reshape(-1, 3)[::7]}
    assert {(0x33, 0x41, 0x5C), (0x2A, 0x9D, 0x8F), (0xE9, 0xA2, 0x3B), (0xD5, 0xD9, 0xE0)} <= pixels
    assert (0xD1, 0x49, 0x5B) not in pixels


def test_heads_name_a_precision_that_is_not_the_model_s(plan, tmp_path):
    save_heads(plan, tmp_path / "native.png")
    lower = tuple(replace(c, precision="int8_fp8") for c in plan.candidates)
    save_heads(replace(plan, candidates=lower), tmp_path / "heads.png")
    pictures = [_picture(tmp_path / name) for name in ("native.png", "heads.png")]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()


def test_heads_of_a_preset(tmp_path):
    save_heads(AccelPlan.preset("pooled", density=0.25), tmp_path / "heads.png")
    assert _picture(tmp_path / "heads.png").std() > 20


def test_the_curve_needs_something_to_draw(evaluation, tmp_path):
    save_curve(evaluation, tmp_path / "curve.png")
    assert _picture(tmp_path / "curve.png").std() > 10
    evaluation["variants"] = evaluation["variants"][:1]
    with pytest.raises(ValueError, match="at least one besides dense"):
        save_curve(evaluation, tmp_path / "curve.png")


def test_images_round_to_the_nearest_byte():
    frames = torch.tensor([0.0, 0.5, 1.0, 1.2, -0.1, 254.6 / 255]).reshape(1, 1, 2, 3)
    assert np.asarray(to_images(frames)[0]).flatten().tolist() == [0, 128, 255, 255, 0, 255]


def test_videos_and_frames_can_be_read_back(tmp_path):
    ramp = torch.linspace(0, 1, 32).reshape(1, 1, 32, 1).expand(6, 32, 32, 3)
    path = write_video(ramp, tmp_path / "deep" / "video.mp4")
    decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(decode, capture_output=True, check=True).stdout
    video = np.frombuffer(raw, np.uint8).reshape(6, 32, 32, 3)
    assert np.abs(video / 255 - ramp.numpy()).mean() < 0.03
    paths = write_frames(ramp, tmp_path / "frames")
    assert [path.name for path in paths] == [f"{number:03d}.png" for number in range(6)]
    assert np.array_equal(_picture(paths[5]), np.asarray(to_images(ramp)[5]).astype(float))


def test_frames_of_a_longer_video_go_and_other_pictures_stay(tmp_path):
    write_frames(torch.zeros(6, 16, 16, 3), tmp_path)
    for name in ("2024-trip.png", "0001.png", "12.png"):
        (tmp_path / name).write_bytes(b"mine")
    write_frames(torch.zeros(4, 16, 16, 3), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000.png", "0001.png", "001.png", "002.png", "003.png", "12.png", "2024-trip.png",
    ]  # fmt: skip
