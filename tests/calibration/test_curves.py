"""Curves for the published gates: those of the real blocks, and usable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig

from dit_accel import AccelPlan, disable, enable, stats
from dit_accel.calibration import measure_cache
from dit_accel.pipelines import demo

SETTINGS = {"height": 48, "width": 64, "num_frames": 5, "num_inference_steps": 12, "guidance_scale": 4.0}
PROMPT = demo.PROMPTS["held_out"][0]


@pytest.fixture(scope="module")
def pipe():
    pipe = demo.load_demo(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_curves_of_the_demo_model(pipe):
    blocks, seen = pipe.transformer.blocks, {"in": [], "temb": [], "out": []}

    def enter(_, args):
        seen["in"].append(args[0])
        seen["temb"].append(args[2])

    handles = [
        blocks[0].register_forward_pre_hook(enter),
        blocks[-1].register_forward_hook(lambda *a: seen["out"].append(a[2].clone())),
    ]
    found = measure_cache(pipe, PROMPT, **SETTINGS)
    for handle in handles:
        handle.remove()
    first = {
        name: [value.double() for value in values[0::2]] for name, values in seen.items()
    }  # cond comes first
    residuals = [o - i for o, i in zip(first["out"], first["in"], strict=True)]
    ratios = [(b.norm(dim=-1) / a.norm(dim=-1)).mean().item() for a, b in itertools.pairwise(residuals)]
    assert found["curve"][0] == 1.0
    assert np.allclose(found["curve"][1:], ratios, rtol=1e-4)

    def changes(values):
        return [((b - a).abs().mean() / a.abs().mean()).item() for a, b in itertools.pairwise(values)]

    expected = np.polyfit(changes(first["temb"]), changes(first["out"]), 4)
    at = changes(first["temb"])
    assert np.allclose(np.polyval(found["polynomial"], at), np.polyval(expected, at), rtol=1e-2, atol=1e-3)


def test_gates_run_with_them(pipe):
    fields = measure_cache(pipe, PROMPT, **SETTINGS)
    for plan in (
        AccelPlan.preset("magcache", curve=fields["curve"], threshold=0.3),
        AccelPlan.preset("teacache", polynomial=fields["polynomial"], threshold=0.3),
    ):
        enable(pipe, plan)
        latents = pipe(
            PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **SETTINGS
        ).frames
        report = stats(pipe)
        disable(pipe)
        assert bool(latents.isfinite().all())
        assert 0 < report["skipped_forwards"] < 20


def test_too_few_steps(pipe):
    with pytest.raises(ValueError, match="expected more than 5 for a polynomial of degree 4, got 5"):
        measure_cache(pipe, PROMPT, **{**SETTINGS, "num_inference_steps": 5})


def test_a_cached_pipeline_is_refused(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    try:
        with pytest.raises(
            ValueError, match="expected it without plan and cache, .* got diffusers' FirstBlock"
        ):
            measure_cache(
                pipe, "x", height=48, width=80, num_frames=5, num_inference_steps=8, guidance_scale=1.0
            )
    finally:
        pipe.transformer.disable_cache()


def test_two_experts_are_refused(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "transformer_2", pipe.transformer, raising=False)
    with pytest.raises(ValueError, match="pipe: expected one transformer, got WanPipeline with two experts"):
        measure_cache(pipe, PROMPT, **SETTINGS)


def test_steps_with_timesteps_that_round_alike_are_steps_of_their_own(whole_pipeline):
    pipe = whole_pipeline("flux").to(torch.bfloat16)
    settings = {"height": 8, "width": 8, "num_frames": 1, "num_inference_steps": 300, "guidance_scale": 3.5}
    found = measure_cache(pipe, PROMPT, **settings)
    timesteps = pipe.scheduler.timesteps.to(torch.bfloat16)
    assert len(timesteps.unique()) < 300
    assert len(found["curve"]) == 300
