"""One target for attention and steps together, on a tiny Wan pipeline."""

import shutil

import pytest
from diffusers import WanPipeline

import dit_accel
from dit_accel import AccelPlan
from dit_accel.calibration import calibrate


@pytest.fixture(scope="module")
def asked(arguments):
    more = {"prompts": ["a red circle moves left", "a blue square"], "num_inference_steps": 14}
    return arguments | more | {"target_psnr": 21.0, "held_out_prompts": ["a green star"]}


@pytest.fixture(scope="module")
def joint(lively_wan_dir, asked, density_clock, tmp_path_factory):
    directory = tmp_path_factory.mktemp("joint")
    plan = calibrate(WanPipeline.from_pretrained(lively_wan_dir), **asked, cache=True, output_dir=directory)
    return plan, directory


def test_the_plan_has_a_schedule_that_runs(lively_wan_dir, asked, joint):
    plan, directory = joint
    assert AccelPlan.from_pretrained(directory).cache == plan.cache
    schedule = plan.cache.schedule
    skipped = sum(len(steps) for steps in schedule.forecasts.values())
    assert schedule.steps == 14
    assert skipped > 0
    pipe = WanPipeline.from_pretrained(lively_wan_dir)
    pipe.set_progress_bar_config(disable=True)
    dit_accel.enable(pipe, plan)
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    pipe("a green star", output_type="latent", **{name: asked[name] for name in names})
    report = dit_accel.stats(pipe)
    assert report["skipped_forwards"] == skipped
    assert report["computed_forwards"] == 28 - skipped


def test_trials_say_what_was_skipped(joint):
    plan, _ = joint
    chosen = [trial for trial in plan.validated["trials"] if trial["chosen"]]
    forecasts = plan.cache.schedule.forecasts
    assert {trial["skipped_forwards"] for trial in chosen} == {sum(map(len, forecasts.values()))}
    assert plan.validated["target_met"]
    assert plan.validated["psnr_calibration"] >= 21.0
    assert 10 < plan.validated["psnr_held_out"] < 100
    assert plan.validated["speedup"] > 0
    skipped = [point["skipped_forwards"] for point in plan.validated["frontier"]]
    assert skipped[0] == max(skipped) > 0


def test_attention_alone_is_chosen_from_the_same_measurements(lively_wan_dir, asked, joint):
    _, directory = joint
    dense = directory / "calibration" / "dense_0.safetensors"
    before = dense.stat().st_mtime_ns
    alone = calibrate(WanPipeline.from_pretrained(lively_wan_dir), **asked, output_dir=directory)
    assert alone.cache is None
    assert dense.stat().st_mtime_ns == before
    assert all(point["skipped_forwards"] == 0 for point in alone.validated["frontier"])


def test_stages_that_are_there_give_the_same_schedule(lively_wan_dir, asked, joint, tmp_path):
    """As after a kill between the dense generations and the first with a plan."""
    plan, directory = joint
    kept = tmp_path / "calibration"
    kept.mkdir()
    for name in ("fingerprint.json", "latency.safetensors", "dense_0.safetensors", "dense_1.safetensors"):
        shutil.copy(directory / "calibration" / name, kept)
    again = calibrate(WanPipeline.from_pretrained(lively_wan_dir), **asked, cache=True, output_dir=tmp_path)
    assert again.cache == plan.cache
    assert (again.choice == plan.choice).all()


def test_a_density_is_no_goal_for_it(lively_wan_dir, arguments):
    with pytest.raises(ValueError, match="cache: expected a quality or a speed-up as the goal"):
        calibrate(WanPipeline.from_pretrained(lively_wan_dir), **arguments, density=0.5, cache=True)


def test_a_repeated_search_begins_with_what_it_knew_then(lively_wan_dir, asked, joint):
    """Searches learn from those finished before, and still end with the same plan when repeated after others."""
    plan, directory = joint
    calibrate(WanPipeline.from_pretrained(lively_wan_dir), **asked, output_dir=directory)
    again = calibrate(WanPipeline.from_pretrained(lively_wan_dir), **asked, cache=True, output_dir=directory)
    assert again.cache == plan.cache
    assert (again.choice == plan.choice).all()
    names = {path.stem for path in (directory / "calibration").glob("*.safetensors")}
    assert {"known_target_psnr_21_steps", "search_target_psnr_21_attention"} <= names
