"""Distances between two generations."""

import math

import pytest
import torch

from dit_accel.evaluation.metrics import latent_rel_l2, psnr, ssim


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.rand(3, 17, 23, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offset", [0.5, 0.03125])
def test_psnr_is_ten_log_ten_of_the_inverse_error(offset):
    reference = torch.full((2, 13, 19, 3), 0.25)
    assert psnr(reference + offset, reference) == pytest.approx(-20 * math.log10(offset), abs=1e-4)


def test_psnr_is_over_the_whole_video_and_not_a_mean_over_frames():
    reference = torch.zeros(2, 13, 19, 3)
    frames = torch.stack([torch.full((13, 19, 3), 0.1), torch.full((13, 19, 3), 0.3)])
    assert psnr(frames, reference) == pytest.approx(-10 * math.log10((0.01 + 0.09) / 2), abs=1e-4)


def test_identical_frames_have_finite_values(frames):
    assert psnr(frames, frames) == 100.0
    assert ssim(frames, frames) == pytest.approx(1.0, abs=1e-6)


def test_ssim_sees_lost_structure_that_psnr_does_not(frames):
    flat = frames.mean(dim=(1, 2), keepdim=True).expand_as(frames)
    brighter = frames + (flat - frames).square().mean().sqrt()
    assert psnr(flat, frames) == pytest.approx(psnr(brighter, frames), abs=0.01)
    assert ssim(flat, frames) < 0.2 < ssim(brighter, frames)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bfloat16_frames_are_compared_in_float32(metric, frames):
    rounded = frames.bfloat16()
    assert metric(rounded, frames) == metric(rounded.float(), frames)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param(
            torch.zeros(3, 17, 23, 3, dtype=torch.uint8), "float tensor .* got torch.uint8", id="bytes"
        ),
        pytest.param(torch.zeros(3, 3, 17, 23), r"\[frames, height, width, 3\]", id="channels-first"),
        pytest.param(
            torch.zeros(2, 17, 23, 3), r"shape of the reference \[3, 17, 23, 3\], got \[2, 17,", id="short"
        ),
    ],
)
def test_wrong_frames_are_refused(metric, wrong, message, frames):
    with pytest.raises(ValueError, match=message):
        metric(wrong, frames)


def test_latent_rel_l2():
    reference = torch.tensor([[3.0, 4.0]])
    assert latent_rel_l2(reference, reference) == 0.0
    assert latent_rel_l2(torch.tensor([[3.0, 5.0]]), reference) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"expected the shape of the reference \[1, 2\], got \[2\]"):
        latent_rel_l2(torch.zeros(2), reference)
