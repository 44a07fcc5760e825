"""Pipelines of every supported family but Wan, from prompt to frames: dense, sparse, calibrated, with skipped steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, LTXConditionPipeline

import dit_accel
from dit_accel import AccelPlan
from dit_accel.candidate import Candidate
from dit_accel.evaluation.generate import generate, generate_variant
from dit_accel.evaluation.metrics import latent_rel_l2, psnr
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.variants import plan_variant
from dit_accel.state import ForwardError
from dit_accel.switch import states

CANDIDATES = (Candidate("dense", 1.0), Candidate("window", 0.4), Candidate("pooled", 0.4, remainder=True))
SIZES = {
    "hunyuan_video": (128, 160, 9),
    "cogvideox": (128, 160, 9),
    "ltx": (64, 96, 9),
    "flux": (40, 56, 1),
}
PROMPT = "a red circle moves left"


def settings(name: str, steps: int = 4) -> GenerationSettings:
    height, width, frames = SIZES[name]
    return GenerationSettings(height, width, frames, steps, 4.0)


@pytest.fixture(params=SIZES)
def name(request) -> str:
    return request.param


def test_dense_plans_change_nothing(whole_pipeline, name):
    pipe = whole_pipeline(name)
    plain = generate(pipe, PROMPT, settings(name), seed=0)
    dit_accel.enable(pipe, AccelPlan.preset("dense"))
    planned = generate(pipe, PROMPT, settings(name), seed=0)
    dit_accel.disable(pipe)
    assert torch.equal(plain.frames, planned.frames)
    assert torch.equal(plain.latents, planned.latents)
    assert plain.frames.shape == (SIZES[name][2], *SIZES[name][:2], 3)


def test_a_pipeline_that_lacks_its_picture_says_so(whole_pipeline):
    """In its signature the image has a default, with which it does not run."""
    pipe = FluxImg2ImgPipeline.from_pipe(whole_pipeline("flux"))
    message = (
        "pipe: expected a pipeline that needs a prompt and sizes alone, got FluxImg2ImgPipeline, which also takes "
        "image and says: .+; if it needs them, dit_accel.enable takes it with a preset"
    )
    with pytest.raises(ValueError, match=message):
        generate(pipe, PROMPT, settings("flux"), seed=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' scheduler
def test_what_a_plan_refuses_is_not_put_down_to_a_missing_picture(whole_pipeline):
    pipe = LTXConditionPipeline.from_pipe(whole_pipeline("ltx"))
    dit_accel.enable(pipe, AccelPlan.preset("window", density=0.4))
    with pytest.raises(ForwardError, match="^LTX: expected .*video_coords cannot run a sparse plan$"):
        generate(pipe, PROMPT, settings("ltx"), seed=0)
    dit_accel.disable(pipe)
    assert generate(pipe, PROMPT, settings("ltx"), seed=0).is_finite


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_branches_in_one_batch_are_known(whole_pipeline, name, guidance):
    pipe = whole_pipeline(name)
    dit_accel.enable(pipe, AccelPlan.preset("dense"))
    (state,) = states(pipe)
    seen = []
    state.capture = lambda layer, query, *_: seen.append((state.paired, query.shape[0]))
    generate(pipe, PROMPT, replace(settings(name), guidance_scale=guidance), seed=0)
    pairs = name in ("cogvideox", "ltx") and guidance > 1
    assert set(seen) == {(pairs, 2 if pairs else 1)}


@pytest.mark.parametrize("name", ["cogvideox", "ltx"])
def test_two_prompts_with_one_noise_are_taken_for_branches_in_the_first_step_at_most(whole_pipeline, name):
    pipe = whole_pipeline(name)
    dit_accel.enable(pipe, AccelPlan.preset("dense"))
    (state,) = states(pipe)
    seen = []
    state.capture = lambda layer, *_: seen.append((state.forwards, state.paired))
    asked = replace(settings(name), guidance_scale=1.0).to_dict()
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    pipe(prompt=[PROMPT, "a blue star moves up"], generator=generators, output_type="latent", **asked)
    assert set(seen) == {(1, True), (2, False), (3, False), (4, False)}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", ["clustered", "searched", "balanced", "pooled"])
def test_what_was_chosen_for_supposed_branches_serves_no_prompts(whole_pipeline, family, count):
    pipe = whole_pipeline("ltx")
    plan = AccelPlan.preset(family, density=0.5, block=16, branches="shared", reuse=3)
    dit_accel.enable(pipe, plan)
    asked = replace(settings("ltx"), guidance_scale=1.0).to_dict()
    generators = [torch.Generator().manual_seed(0) for _ in range(count)]
    prompts = [PROMPT, "a blue star moves up", "a red star moves up", "a blue circle moves left"][:count]
    latents = pipe(prompt=prompts, generator=generators, output_type="latent", **asked).frames
    assert latents.shape[0] == count
    assert latents.isfinite().all()


@pytest.mark.parametrize("preset", ["window", "pooled", "balanced"])
def test_sparse_plans_run_and_say_what_they_kept(whole_pipeline, name, preset):
    pipe = whole_pipeline(name)
    dense = generate(pipe, PROMPT, settings(name), seed=0)
    plan = AccelPlan.preset(preset, density=0.5, block=16)
    made = generate_variant(pipe, plan_variant(plan, preset), PROMPT, settings(name), seed=0)
    assert 0.4 < made.density < 1.0
    assert made.frames.isfinite().all()
    assert not torch.equal(made.latents, dense.latents)
    assert psnr(made.frames, dense.frames) > 10


def test_calibrated_plans_give_what_was_asked_for(whole_pipeline, name, tmp_path):
    pipe = whole_pipeline(name)
    dense = generate(pipe, PROMPT, settings(name), seed=0)
    arguments = settings(name).to_dict() | {
        "candidates": CANDIDATES,
        "output_dir": tmp_path,
        "progress": False,
    }
    plan = dit_accel.calibrate(pipe, [PROMPT], density=0.95, **arguments)
    # Another goal takes what was measured, and no generation.
    sparser = dit_accel.calibrate(pipe, [PROMPT], density=0.05, **arguments)
    assert (sparser.rel_l2.mean() > plan.rel_l2.mean()).item()
    errors = []
    for one in (plan, sparser):
        made = generate_variant(pipe, plan_variant(one, "plan"), PROMPT, settings(name), seed=0)
        assert made.density == pytest.approx(one.validated["density_mean"], abs=0.05)
        errors.append(latent_rel_l2(made.latents, dense.latents))
    assert 0 <= errors[0] < errors[1]


def test_steps_are_left_out_as_far_as_the_goal_allows(whole_pipeline, name, tmp_path):
    pipe, goal = whole_pipeline(name), 0.25
    arguments = settings(name, 12).to_dict() | {"candidates": CANDIDATES[:1], "progress": False}
    plan = dit_accel.calibrate(
        pipe, [PROMPT], target_latent_rel_l2=goal, cache=True, output_dir=tmp_path, **arguments
    )
    dense = generate(pipe, PROMPT, settings(name, 12), seed=0)
    made = generate_variant(pipe, plan_variant(plan, "plan"), PROMPT, settings(name, 12), seed=0)
    assert made.skipped_share > 0
    assert 0 < latent_rel_l2(made.latents, dense.latents) <= goal
