"""The one thing a calibration is asked for."""

import math

import pytest

from dit_accel.calibration.goals import QUALITIES, the_goal

NAMES = ("target_psnr", "target_ssim", "target_latent_rel_l2", "density", "speedup")


def asked(**given):
    return the_goal(**dict.fromkeys(NAMES) | given)


@pytest.mark.parametrize(("name", "value"), [("target_psnr", 31.5), ("target_ssim", 0.97), ("speedup", 3)])
def test_the_goal_is_what_was_given(name, value):
    goal = asked(**{name: value})
    assert (goal.name, goal.value) == (name, value)
    assert (goal.quality is None) == (name == "speedup")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("target_psnr", (10, 28.3, 60)),
        ("target_ssim", (0.3, 0.97, 0.9999)),
        ("target_latent_rel_l2", (0.9, 0.1, 1e-3)),
    ],
)
def test_scales_rise_with_quality_and_lead_back(name, values):
    quality = QUALITIES[name]
    levels = [quality.decibel(value) for value in values]
    assert levels == sorted(levels)
    assert [quality.value(level) for level in levels] == pytest.approx(list(values))


@pytest.mark.parametrize(
    ("name", "better"), [("target_ssim", 1 - 0.003), ("target_latent_rel_l2", 0.1 / 10**0.5)]
)
def test_a_tenth_of_the_squared_error_is_ten_decibels(name, better):
    quality = QUALITIES[name]
    worse = {"target_ssim": 0.97, "target_latent_rel_l2": 0.1}[name]
    assert quality.decibel(better) - quality.decibel(worse) == pytest.approx(10.0)


@pytest.mark.parametrize(("name", "perfect"), [("target_ssim", 1.0), ("target_latent_rel_l2", 0.0)])
def test_perfection_is_finite(name, perfect):
    assert math.isfinite(QUALITIES[name].decibel(perfect))
    assert QUALITIES[name].decibel(perfect) == 100.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({}, "exactly one of target_psnr, .* speedup, got none", id="none"),
        pytest.param({"density": 0.5, "speedup": 2.0}, "got density=0.5, speedup=2.0", id="two"),
        pytest.param({"density": 0.0}, "density: expected a number above 0", id="no-density"),
        pytest.param(
            {"speedup": math.inf}, "speedup: expected a number of at least 1, got inf", id="infinite"
        ),
        pytest.param({"target_ssim": math.nan}, "target_ssim: expected .* got nan", id="nan"),
        pytest.param({"target_psnr": True}, "target_psnr: expected a number, got True", id="bool"),
        pytest.param({"target_psnr": 100.0}, "target_psnr: expected dB above 0 and below 100", id="ceiling"),
    ],
)
def test_what_is_no_goal_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        asked(**given)
