"""The whole calibration on a tiny Wan pipeline."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchHeunDiscreteScheduler, WanPipeline

import dit_accel
from dit_accel import AccelPlan
from dit_accel.calibration import calibrate, default_candidates, published_candidates, stages
from dit_accel.calibration.cost import Latency
from dit_accel.calibration.goals import the_goal
from dit_accel.calibration.run import _PROFILE_STEPS
from dit_accel.calibration.stages import LATENCY_STEPS
from dit_accel.calibration.validate import generations_needed, lower_bound, most_trials
from dit_accel.candidate import Candidate
from dit_accel.evaluation.generate import generate
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.guard import Guard
from dit_accel.switch import states

# Calibrates in a process of its own; the clock is replaced as in `density_clock`.
SCRIPT = """
import json, sys
import torch
from diffusers import WanPipeline
from dit_accel.calibration import calibrate, stages
from dit_accel.calibration.cost import Latency

def density_clock(query, key, value, grid, candidates, original, **options):
    return Latency(torch.tensor([0.01 + c.density for c in candidates], dtype=torch.float64), 1.0)

model, output_dir, threads, arguments = sys.argv[1:]
torch.set_num_threads(int(threads))
stages.measure_latency = density_clock
calibrate(WanPipeline.from_pretrained(model), output_dir=output_dir, **json.loads(arguments))
"""


@pytest.fixture(scope="module")
def uninterrupted(lively_wan_dir, arguments, density_clock):
    """Arguments of a calibration with two prompts to a target, and its plan."""
    asked = arguments | {
        "prompts": ["a red circle moves left", "a blue square"],
        "target_psnr": 25.0,
        "downstream": True,
    }
    return asked, calibrate(WanPipeline.from_pretrained(lively_wan_dir), **asked)


@pytest.fixture
def measured(measured_once, tmp_path):
    """A directory in which all but the choice is done."""
    return shutil.copytree(measured_once, tmp_path / "measured")


@pytest.fixture(scope="module")
def measured_once(lively_wan_dir, arguments, density_clock, tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibrated") / "plan"
    calibrate(WanPipeline.from_pretrained(lively_wan_dir), **arguments, density=0.5, output_dir=directory)
    return directory


@pytest.mark.parametrize("system", ["minference", "sparge", "sparse-vdit", "svoo"])
@pytest.mark.usefixtures("density_clock")
def test_a_published_system_is_calibrated_by_its_name(pipe, arguments, system):
    plan = calibrate(pipe, **arguments, density=0.6, candidates=system)
    assert plan.candidates == published_candidates(system)
    assert 0.3 < plan.density_mean < 0.8
    dit_accel.enable(pipe, plan)
    generate(pipe, "a blue square", GenerationSettings(144, 176, 5, 3, 4.0), seed=1)
    assert dit_accel.stats(pipe)["sparse_calls"] > 0
    dit_accel.disable(pipe)
    with pytest.raises(ValueError, match="or a system that its authors calibrate .*, got 'nonsense'"):
        calibrate(pipe, **arguments, density=0.6, candidates="nonsense")


def test_density_plan_runs_at_its_density(pipe, arguments, tmp_path):
    plan = calibrate(pipe, **arguments, density=0.5, output_dir=tmp_path / "plan")
    assert plan.choice.shape == (len(plan.range_starts), 2, 2)
    assert plan.layers == ("blocks.0.attn1", "blocks.1.attn1")
    assert plan.grid == dit_accel.TokenGrid(2, 9, 11)
    assert plan.validated["density_mean"] == pytest.approx(0.5, abs=0.1)
    assert plan.validated["calibration_dense_generations"] > 1
    costs = plan.validated["head_ms"]
    assert len(costs["candidates"]) == len(plan.candidates)
    chosen = torch.tensor(costs["candidates"])[plan.choice.long()]
    dense_layers = (plan.choice == [c.is_dense for c in plan.candidates].index(True)).all(-1)
    chosen[dense_layers] = costs["dense"]
    torch.testing.assert_close(plan.latency_ms, chosen)
    assert ((plan.recall >= 0) & (plan.recall <= 1.0001)).all()
    assert (plan.latency_ms > 0).all()
    dense = plan.choice == [c.family for c in plan.candidates].index("dense")
    assert (plan.rel_l2[dense] == 0).all()
    assert (plan.rel_l2[~dense] > 0).all()

    dit_accel.enable(pipe, AccelPlan.from_pretrained(tmp_path / "plan"))
    settings = {name: value for name, value in arguments.items() if name not in ("prompts", "progress")}
    pipe(prompt="a red circle", output_type="latent", **settings)
    assert dit_accel.stats(pipe)["density_mean"] == pytest.approx(plan.validated["density_mean"], abs=0.02)


def test_pipeline_is_left_as_it_was(pipe, arguments):
    processors = dict(pipe.transformer.attn_processors)
    calibrate(pipe, **arguments, density=0.5)
    after = pipe.transformer.attn_processors
    assert all(after[name] is processor for name, processor in processors.items())
    with pytest.raises(ValueError, match="not enabled"):
        dit_accel.disable(pipe)


def test_target_is_met(uninterrupted):
    _, plan = uninterrupted
    assert plan.validated["target_met"]
    assert plan.validated["psnr_calibration"] >= 25.0
    assert plan.validated["density_mean"] < 1.0
    assert plan.objective["target_psnr"] == 25.0
    assert plan.objective["num_inference_steps"] == 3


@pytest.mark.usefixtures("density_clock")
@pytest.mark.parametrize(
    ("target", "better"),
    [
        pytest.param({"target_ssim": 0.9}, lambda found: found >= 0.9 - 1e-3, id="ssim"),
        pytest.param({"target_latent_rel_l2": 0.1}, lambda found: found <= 0.1 + 1e-3, id="latents"),
    ],
)
def test_other_qualities_are_met(pipe, arguments, measured, target, better):
    plan = calibrate(pipe, **arguments, **target, output_dir=measured)
    (name,) = target
    metric = name.removeprefix("target_")
    chosen = [trial for trial in plan.validated["trials"] if trial["chosen"]]
    assert plan.validated["target_met"]
    assert better(plan.validated[f"{metric}_calibration"])
    assert [trial[metric] for trial in chosen] == pytest.approx([plan.validated[f"{metric}_calibration"]])
    assert 0 < plan.validated["density_mean"] < 1
    assert plan.objective[name] == target[name]
    assert plan.objective["target_psnr"] is None


@pytest.mark.usefixtures("density_clock")
def test_a_speedup_that_no_plan_has_gives_the_fastest_and_says_so(pipe, arguments, measured, capsys):
    plan = calibrate(pipe, **arguments, speedup=50.0, output_dir=measured)
    assert not plan.validated["target_met"]
    assert len(plan.validated["trials"]) == 1  # the fastest plan of the tables, and no other is faster
    assert plan.validated["density_mean"] < 0.1
    assert plan.validated["speedup"] == pytest.approx(
        plan.validated["trials"][0]["seconds_dense"] / plan.validated["trials"][0]["seconds"]
    )
    assert "speedup 50 was not reached; the plan is the fastest that was tried" in capsys.readouterr().err


def test_a_speedup_where_nothing_is_faster_than_dense_says_so(pipe, arguments, tmp_path, monkeypatch, capsys):
    def slow(query, key, value, grid, candidates, *_, **__):
        return Latency(torch.tensor([3.0 + c.density for c in candidates], dtype=torch.float64), 1.0)

    monkeypatch.setattr(stages, "measure_latency", slow)
    plan = calibrate(pipe, **arguments, speedup=1.5, output_dir=tmp_path)
    assert not plan.validated["target_met"]
    assert plan.validated["density_mean"] == 1.0
    assert AccelPlan.from_pretrained(tmp_path).density_mean == 1.0
    assert "speedup 1.5 was not reached" in capsys.readouterr().err


@pytest.mark.usefixtures("density_clock")
def test_no_speedup_is_dense_without_a_trial(pipe, arguments, measured):
    plan = calibrate(pipe, **arguments, speedup=1.0, output_dir=measured)
    assert plan.validated["target_met"]
    assert plan.validated["trials"] == []
    assert plan.validated["density_mean"] == 1.0


@pytest.mark.usefixtures("density_clock")
def test_what_the_calibration_saw_is_recorded(uninterrupted, arguments):
    _, plan = uninterrupted
    ranges, layers, heads = plan.choice.shape
    sensitivity = torch.tensor(plan.validated["sensitivity"])
    assert sensitivity.shape == (ranges, layers, heads)
    assert (sensitivity > 0).all()
    assert sum(trial["chosen"] for trial in plan.validated["trials"]) == 2  # one for each prompt
    parts = plan.validated["ranges"]
    assert [part["start"] for part in parts] == list(plan.range_starts)
    total, chosen = sum(part["error"] for part in parts), plan.validated["trials"][-1]
    assert total == pytest.approx(chosen["error_expected"])
    expected = sum(part["attention_ms"] for part in parts)
    # Expected at the speed that the machine had then.
    taken = [t["attention_ms"] / t["attention_ms_expected"] for t in plan.validated["trials"] if t["chosen"]]
    assert expected > 0
    assert plan.validated["attention_error"] == pytest.approx(sum(taken) / 2 - 1)
    assert all(0 < trial["attention_ms"] < 1000 * trial["seconds"] for trial in plan.validated["trials"])
    assert plan.validated["layer_error"] > -1
    expected = [p["quality_expected"] for p in plan.validated["frontier"] if "quality_expected" in p]
    assert expected == sorted(expected)
    assert len(expected) > 5


def test_layers_count_alike_without_gradients(pipe, arguments):
    plan = calibrate(pipe, **arguments, density=0.5)
    assert "sensitivity" not in plan.validated
    assert plan.objective["downstream"] is False
    assert plan.validated["density_mean"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.usefixtures("density_clock")
def test_held_out_prompts_are_reported(pipe, arguments):
    held_out = ["a red square moves up", "a blue circle"]
    report = calibrate(pipe, **arguments, density=0.6, held_out_prompts=held_out).validated
    assert 10 < report["psnr_held_out_min"] <= report["psnr_held_out"] < 100
    assert report["psnr_held_out_low"] < report["psnr_held_out_min"]  # two prompts tell little
    assert report["speedup"] > 0
    assert "psnr_calibration" not in report  # no calibration prompt was generated with this plan


def test_confidence_grows_with_the_prompts():
    """By hand: mean 32, deviation 2, t = 2.920 for two degrees of freedom."""
    assert lower_bound([30.0, 32.0, 34.0]) == pytest.approx(32 - 2.920 * 2 / 3**0.5)
    assert lower_bound([30.0, 32.0, 34.0] * 20) == pytest.approx(32, abs=0.4)
    assert lower_bound([30.0]) is None


def test_prompts_that_were_calibrated_on_are_not_held_out(pipe, arguments):
    (prompt,) = arguments["prompts"]
    with pytest.raises(
        ValueError, match=f"held_out_prompts: expected others than prompts, got '{prompt}' in both"
    ):
        calibrate(pipe, **arguments, density=0.6, held_out_prompts=["a red square", prompt])


@pytest.mark.usefixtures("density_clock")
def test_what_a_calibration_will_take_is_said_before_it_begins(pipe, arguments, capsys):
    steps = arguments["num_inference_steps"]
    calibrate(pipe, **arguments | {"progress": True}, density=0.5, held_out_prompts=["a red square"])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        f"calibration: 2 dense and at most 1 accelerated generations of {steps} steps, "
        f"{len(default_candidates(torch.device('cpu'), torch.float32))} candidates to time; with profiling about the "
        f"time of {3 + (5 + 8) / steps:.1f} dense generations, less what an earlier run has finished\n"
    )
    assert "latency:" in err
    assert "dense 0:" in err[err.rindex("latency:") :]  # the bar says again what is being generated


@pytest.mark.usefixtures("density_clock")
def test_a_target_that_is_exceeded_says_so_in_one_line(pipe, arguments, capsys):
    plan = calibrate(pipe, **arguments, target_psnr=15.0, max_trials=1)
    found = plan.validated["psnr_calibration"]
    assert found > 15.5
    assert capsys.readouterr().err.splitlines() == [
        f"target_psnr 15 dB was exceeded: {found:.4g} dB, since no faster plan that reaches it was found in 1 "
        "generations (at most 1 steer the choice)"
    ]


@pytest.mark.usefixtures("density_clock")
@pytest.mark.parametrize("broken", ["plan", "dense"])
def test_what_is_not_finite_is_as_far_away_as_can_be(pipe, arguments, monkeypatch, caplog, tmp_path, broken):
    """It is known after a restart too; a dense generation that fails is no measure of anything."""
    original = stages.generate

    def failing(pipe, *given, **options):
        made = original(pipe, *given, **options)
        sparse = any(not state.all_dense for state in states(pipe))
        return (
            dataclasses.replace(made, frames=made.frames * torch.nan)
            if sparse == (broken == "plan")
            else made
        )

    monkeypatch.setattr(stages, "generate", failing)
    given = arguments | {"target_psnr": 25.0, "max_trials": 2, "output_dir": tmp_path / "plan"}
    if broken == "dense":
        with pytest.raises(
            ValueError, match="expected finite frames of its dense generation of 'a red circle"
        ):
            calibrate(pipe, **given)
        return
    for _ in range(2):
        plan = calibrate(pipe, **given)
        assert not plan.validated["target_met"]
        assert all(trial["psnr"] < 25 for trial in plan.validated["trials"])
    assert "what the plan generated is not finite, NaN counts as 0" in caplog.text


@pytest.mark.usefixtures("density_clock")
def test_target_that_only_dense_attention_reaches_says_so_in_one_line(pipe, arguments, capsys):
    plan = calibrate(pipe, **arguments, target_psnr=99.9)
    assert plan.validated["density_mean"] == 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["target_psnr 99.9 dB: only the dense generation reaches it, nothing will be faster"]


@pytest.mark.parametrize("stage", ["dense_0", "plan_*"])
def test_killed_calibration_continues_to_the_same_plan(pipe, lively_wan_dir, uninterrupted, tmp_path, stage):
    arguments, fresh = uninterrupted
    killed = tmp_path / "killed"
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", SCRIPT, str(lively_wan_dir), str(killed), threads, json.dumps(arguments)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, stderr=subprocess.DEVNULL)
    try:
        _wait_for(killed / "calibration", f"{stage}.safetensors", process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (killed / "accel_config.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (killed / "calibration").glob("*.safetensors")}

    continued = calibrate(pipe, **arguments, output_dir=killed)
    assert continued.choice.numpy().tobytes() == fresh.choice.numpy().tobytes()
    assert (continued.choice != 0).any()
    assert continued.range_starts == fresh.range_starts
    assert torch.equal(continued.rel_l2, fresh.rel_l2)
    assert continued.validated["psnr_calibration"] == fresh.validated["psnr_calibration"]
    for name, written in finished.items():
        assert (killed / "calibration" / name).stat().st_mtime_ns == written  # loaded, not done again
    assert torch.equal(AccelPlan.from_pretrained(killed).choice, fresh.choice)


def _wait_for(directory: Path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not any(directory.glob(pattern)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the calibration ended with {process.poll()} before {pattern} was there")
        time.sleep(0.005)


@pytest.mark.usefixtures("density_clock")
def test_another_goal_in_the_same_directory_keeps_what_was_measured(pipe, arguments, tmp_path):
    half = calibrate(pipe, **arguments, density=0.5, output_dir=tmp_path)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "calibration").glob("*.safetensors")}
    assert {path.stem for path in finished} == {"dense_0", "latency"}
    quarter = calibrate(pipe, **arguments, density=0.25, output_dir=tmp_path)
    assert quarter.density_mean < half.density_mean
    searched = calibrate(pipe, **arguments, target_psnr=25.0, output_dir=tmp_path)
    assert searched.validated["target_met"]
    assert torch.equal(AccelPlan.from_pretrained(tmp_path).choice, searched.choice)
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written


def test_other_arguments_in_the_same_directory_are_refused(pipe, arguments, tmp_path):
    calibrate(pipe, **arguments, density=0.5, output_dir=tmp_path)
    with pytest.raises(ValueError, match="guidance_scale = 4.0, got 3.0"):
        calibrate(pipe, **arguments | {"guidance_scale": 3.0}, density=0.5, output_dir=tmp_path)
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_q.weight[0, 0] += 1
    with pytest.raises(ValueError, match="weights = "):
        calibrate(pipe, **arguments, density=0.5, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({}, "exactly one of target_psnr, .*, density, speedup, got none", id="neither"),
        pytest.param({"target_psnr": 30.0, "density": 0.5}, "got target_psnr=30.0, density=0.5", id="both"),
        pytest.param({"density": 1.5}, "density: expected a number above 0 .*, got 1.5", id="density"),
        pytest.param({"speedup": 0.9}, "speedup: expected a number of at least 1, got 0.9", id="speedup"),
        pytest.param({"target_ssim": 1.0}, "target_ssim: expected a number above 0 and below 1", id="ssim"),
        pytest.param(
            {"target_latent_rel_l2": 0.0}, "target_latent_rel_l2: expected a number above 0", id="latent"
        ),
        pytest.param({"density": "half"}, "density: expected a number, got 'half'", id="type"),
        pytest.param({"target_psnr": 120.0}, "target_psnr: expected dB above 0 and below 100", id="psnr"),
        pytest.param({"density": 0.5, "prompts": []}, "prompts: expected at least one", id="none"),
        pytest.param({"density": 0.5, "prompts": "a"}, "prompts: expected a list of strings", id="string"),
        pytest.param({"density": 0.5, "num_inference_steps": 0}, "num_inference_steps.*positive", id="steps"),
    ],
)
def test_wrong_arguments_are_refused(pipe, arguments, change, message):
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, **arguments | change)


@pytest.mark.usefixtures("density_clock")
def test_a_target_that_is_missed_says_so_in_one_line(pipe, arguments, capsys):
    plan = calibrate(pipe, **arguments, target_psnr=90.0, max_trials=1)
    found = plan.validated["psnr_calibration"]
    assert not plan.validated["target_met"]
    assert found < 89.9
    assert capsys.readouterr().err.splitlines() == [
        "target_psnr 90 dB was not reached in 1 generations; the plan is the one that came nearest, "
        f"{found:.4g} dB on the calibration prompts"
    ]


def test_a_scheduler_that_evaluates_a_step_twice_is_refused(pipe, arguments, tmp_path):
    before = pipe.scheduler
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(before.config)
    try:
        with pytest.raises(
            ValueError, match="once in a step, got FlowMatchHeunDiscreteScheduler, which does so 2"
        ):
            calibrate(pipe, **arguments, density=0.5, output_dir=tmp_path / "plan")
    finally:
        pipe.scheduler = before
    assert not (tmp_path / "plan").exists()


@pytest.mark.usefixtures("density_clock")
def test_where_first_use_is_slow_a_process_warms_up_once_of_each_kind(pipe, arguments, monkeypatch, tmp_path):
    options = arguments | {"target_psnr": 25.0, "output_dir": tmp_path, "max_trials": 2}
    forwards, made = [], []
    monkeypatch.setattr(stages, "_is_slow_at_first", lambda device: True)
    generate = stages.generate
    monkeypatch.setattr(
        stages,
        "generate",
        lambda *a, **k: made.append((a[2].num_inference_steps, len(forwards))) or generate(*a, **k),
    )
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        calibrate(pipe, **options)
        steps = [number for number, _ in made]
        assert steps[0] == 2  # before the first dense one
        assert steps.count(2) == 2  # and before the first with a plan
        made.clear()
        calibrate(pipe, **options)
        assert not made  # nothing is left to time
    finally:
        hook.remove()


def test_latencies_that_were_deleted_are_measured_again(pipe, arguments, tmp_path):
    calibrate(pipe, **arguments, density=0.5, output_dir=tmp_path / "plan")
    kept = tmp_path / "plan" / "calibration" / "latency.safetensors"
    kept.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"latency\.safetensors is not a readable .* delete it to redo it"):
        calibrate(pipe, **arguments, density=0.5, output_dir=tmp_path / "plan")
    kept.unlink()
    plan = calibrate(pipe, **arguments, density=0.5, output_dir=tmp_path / "plan")
    assert kept.is_file()
    assert plan.validated["density_mean"] == pytest.approx(0.5, abs=0.1)


def test_calibrating_on_one_prompt_takes_less_than_six_dense_generations():
    made = generations_needed(1, 0, the_goal(target_psnr=30.0), most_trials(1))
    assert made + (LATENCY_STEPS + _PROFILE_STEPS) / 20 <= 6


@pytest.mark.parametrize("trials", [1, 2])
def test_trials_are_limited(lively_wan_dir, arguments, density_clock, trials):
    pipe = WanPipeline.from_pretrained(lively_wan_dir)
    plan = calibrate(pipe, **arguments, target_psnr=25.0, max_trials=trials)
    assert 1 <= len(plan.validated["trials"]) <= trials
    with pytest.raises(ValueError, match="max_trials: expected an integer from 1, got 0"):
        calibrate(pipe, **arguments, target_psnr=25.0, max_trials=0)


def test_candidates_are_those_that_were_given(pipe, arguments, density_clock):
    few = [Candidate("dense", 1.0), Candidate("window", 0.301), Candidate("window", 0.304)]
    plan = calibrate(pipe, **arguments, density=0.4, candidates=few)
    assert plan.candidates == tuple(few)
    assert [candidate.label for candidate in few[1:]] == ["window@0.301", "window@0.304"]
    assert plan.choice.unique().numel() > 1


@pytest.mark.parametrize(
    ("candidates", "got"),
    [
        ([], "got none"),
        ([Candidate("window", 0.3)], "got window@0.30"),
        ([Candidate("dense", 1.0), *[Candidate("skip", 0.0)] * 2], "got dense@1.00, skip@0.00, skip"),
    ],
    ids=["none", "no dense", "twice"],
)
def test_candidates_without_dense_or_twice_are_refused(pipe, arguments, candidates, got):
    with pytest.raises(ValueError, match=f"candidates: expected different ones, with .* among them, {got}"):
        calibrate(pipe, **arguments, density=0.4, candidates=candidates)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have the precision")
def test_candidates_of_a_precision_that_is_not_here_are_refused(pipe, arguments):
    candidates = [Candidate("dense", 1.0), Candidate("window", 0.3, precision="int8")]
    with pytest.raises(
        ValueError, match=r"expected precisions of this device \(native\), got window@0.30 int8"
    ):
        calibrate(pipe, **arguments, density=0.4, candidates=candidates)


def test_an_enabled_pipeline_is_refused_and_keeps_its_plan(pipe, arguments):
    dit_accel.enable(pipe, AccelPlan.preset("dense"))
    with pytest.raises(
        ValueError, match="expected it without plan and cache, to measure it .* a plan of dit-accel"
    ):
        calibrate(pipe, **arguments, density=0.5)
    dit_accel.disable(pipe)


def test_a_cached_pipeline_is_refused(pipe, arguments):
    """Its dense generations would not be dense, and layers that the cache skips would seem to lose nothing."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(
        ValueError, match="without plan and cache, .* got diffusers' FirstBlockCacheConfig; disable"
    ):
        calibrate(pipe, **arguments, density=0.5)
    pipe.transformer.disable_cache()


def test_quality_is_measured_on_every_prompt(lively_wan_dir, arguments, density_clock):
    """A search may end with a plan that it tried on one of two prompts; what is reported was generated."""
    asked = arguments | {"prompts": ["a red circle moves left", "a blue square"], "target_psnr": 25.0}
    plan = calibrate(WanPipeline.from_pretrained(lively_wan_dir), **asked, max_trials=1)
    chosen = [trial for trial in plan.validated["trials"] if trial["chosen"]]
    assert sorted(trial["prompt"] for trial in chosen) == [0, 1]
    mean = sum(trial["psnr"] for trial in chosen) / 2
    assert plan.validated["psnr_calibration"] == pytest.approx(mean)
    assert plan.validated["target_met"] == (mean >= 25.0)


def test_trials_run_as_users_will_with_the_guard(pipe, arguments, density_clock, monkeypatch):
    plan = calibrate(pipe, **arguments, target_psnr=25.0, max_trials=1)
    assert [trial["guarded_heads"] for trial in plan.validated["trials"]] == [0]
    strict = functools.partialmethod(Guard.__init__, factor=1e-3, usual=0.0, floor=1e-4)
    monkeypatch.setattr(Guard, "__init__", strict)
    plan = calibrate(pipe, **arguments, target_psnr=25.0, max_trials=1)
    assert plan.validated["trials"][0]["guarded_heads"] > 0
