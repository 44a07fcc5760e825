"""The guard finds the heads that err more than the plan says, makes them dense, and leaves the others alone."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F

from dit_accel import AccelPlan, disable, enable, stats
from dit_accel.candidate import Candidate
from dit_accel.evaluation.generate import generate_variant
from dit_accel.evaluation.metrics import psnr
from dit_accel.evaluation.models import GenerationSettings, load_model
from dit_accel.evaluation.variants import plan_variant
from dit_accel.guard import Guard
from dit_accel.pipelines import demo, family_of
from dit_accel.switch import states

SPARSE = Candidate("window", 0.2)
CANDIDATES = (Candidate("dense", 1.0), SPARSE)


def plan_of(transformer, rel_l2, choice=1, candidates=CANDIDATES, block=16):
    """A plan with one range whose calibration found the errors rel_l2 [layers, heads]."""
    layers = tuple(family_of(transformer).attention_modules(transformer))
    rel_l2 = torch.as_tensor(rel_l2, dtype=torch.float32)[None]
    return AccelPlan(
        candidates,
        torch.as_tensor(choice).expand(rel_l2.shape).to(torch.int16).contiguous(),
        layers=layers,
        rel_l2=rel_l2,
        block=block,
    )


def test_only_heads_out_of_range_go_dense(wan_pipeline, caplog):
    pipe = wan_pipeline()
    claimed = [[1e-3, 0.12], [0.12, 1e-3]]
    enable(pipe, plan_of(pipe.transformer, claimed))
    with caplog.at_level(logging.WARNING, "dit_accel"):
        pipe.latents(steps=6)
    state = states(pipe)[0]
    assert state.guarded.dense.tolist() == [[True, False], [False, True]]
    assert stats(pipe)["guarded_heads"] == 2
    assert [r.message for r in caplog.records] == [
        "guard: heads err more than the plan allows and run dense for the rest of this generation; "
        "dit_accel.stats(pipe) counts them"
    ]
    # One of two heads is dense in each layer, from the first forward on.
    sparse = AccelPlan.preset("window", density=0.2, block=16)
    disable(pipe)
    enable(pipe, sparse)
    pipe.latents(steps=6)
    kept = stats(pipe)["density_mean"]
    disable(pipe)
    enable(pipe, plan_of(pipe.transformer, claimed))
    pipe.latents(steps=6)
    assert stats(pipe)["density_mean"] == pytest.approx((kept + 1.0) / 2, rel=1e-6)


def test_verdicts_are_those_of_exact_attention(tiny):
    """Errors computed by hand for all rows decide like the guard, with limits just above and just below them."""
    model = tiny("wan")
    enable(model.transformer, plan_of(model.transformer, torch.full((2, 2), 10.0)))
    caught = {}

    def keep(layer, query, key, value, key_mask):
        caught[layer] = query, key, value

    state = states(model.transformer)[0]
    state.capture = keep
    model.run()
    disable(model.transformer)
    guard = Guard(plan_of(model.transformer, torch.ones(2, 2)), rows=1000)
    for layer, (query, key, value) in caught.items():
        output = torch.randn(query.shape, generator=torch.Generator().manual_seed(layer))
        exact = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (query, key, value)))
        exact = exact.transpose(1, 2)
        of_each = [x.square().sum((1, 3)).sqrt() for x in (output - exact, exact)]
        rel = (of_each[0] / of_each[1]).amax(0)
        for factor in (0.999, 1.001):
            guard._limits = (rel * factor).expand(1, 2, 2).float()
            memory = guard.memory()
            guard.check(query, key, value, output, 0, layer, memory, scale=None, key_mask=None)
            assert memory.pending[layer].tolist() == [factor < 1] * 2


def test_padded_keys_are_left_out(tiny):
    model = tiny("wan")
    guard = Guard(plan_of(model.transformer, torch.full((2, 2), 1e-6)), floor=1e-5)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 37, 2, 16, generator=generator)
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, 30:] = False
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask[:, None, None]
    ).transpose(1, 2)
    output[1, 30:] = 100  # what nobody reads
    for key_mask, wrong in ((mask, False), (None, True)):
        memory = guard.memory()
        guard.check(query, key, value, output, 0, 0, memory, scale=None, key_mask=key_mask)
        assert memory.pending[0].tolist() == [wrong] * 2


def test_one_video_of_a_batch_that_goes_off_is_enough(tiny):
    model = tiny("wan")
    guard = Guard(plan_of(model.transformer, torch.full((2, 2), 0.1)), floor=1e-5)
    query, key, value = torch.randn(3, 4, 37, 2, 16, generator=torch.Generator().manual_seed(0))
    output = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    off = output.clone()
    off[2, :, 1] *= 1.6  # over the limit of .5, of which a mean over the batch would hide all but .3
    for found, expected in ((output, [False, False]), (off, [False, True])):
        memory = guard.memory()
        guard.check(query, key, value, found, 0, 0, memory, scale=None, key_mask=None)
        assert memory.pending[0].tolist() == expected


def test_a_new_generation_starts_anew(wan_pipeline):
    pipe = wan_pipeline()
    enable(pipe, plan_of(pipe.transformer, torch.full((2, 2), 1e-3)))
    first = pipe.latents(steps=6)
    assert stats(pipe)["guarded_heads"] == 4
    assert torch.equal(pipe.latents(steps=6), first)


def test_heads_in_range_run_as_without_a_guard(wan_pipeline):
    pipe = wan_pipeline()
    plan = plan_of(pipe.transformer, torch.full((2, 2), 10.0))
    enable(pipe, plan, guard=False)
    assert "guarded_heads" not in (pipe.latents(steps=6), stats(pipe))[1]
    without = pipe.latents(steps=6)
    disable(pipe)
    enable(pipe, plan)
    assert torch.equal(pipe.latents(steps=6), without)
    assert stats(pipe)["guarded_heads"] == 0


def test_a_shuffled_plan_is_caught_on_the_demo_model():
    """Heads get each other's patterns: guarded, the video is about as good as with the wrong heads dense throughout."""
    pipe = demo.load_demo(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 4.0}

    def frames():
        generator = torch.Generator().manual_seed(0)
        video = pipe(demo.PROMPTS["held_out"][0], generator=generator, output_type="pt", **settings).frames[0]
        return video.movedim(1, -1)

    dense = frames()
    transformer = pipe.transformer
    candidates = (Candidate("dense", 1.0), Candidate("pooled", 0.5, remainder=True), Candidate("skip", 0.0))
    # Calibrated, every other head is pooled and errs little, the others are left out; shuffled, these change places.
    calibrated = torch.ones(6, 4, dtype=torch.int16)
    calibrated[:, 1::2] = 2
    claimed = torch.where(calibrated == 2, 1.0, 0.1)
    shuffled = calibrated.roll(1, 1)
    wrong = plan_of(transformer, claimed, shuffled, candidates, block=16)
    results = {}
    for name, plan, guard in (
        ("unguarded", wrong, False),
        ("guarded", wrong, True),
        (
            "fallback",
            dataclasses.replace(wrong, choice=torch.where(shuffled == 2, 0, shuffled)[None].to(torch.int16)),
            False,
        ),
    ):
        enable(pipe, plan, guard=guard)
        results[name] = psnr(frames(), dense)
        if guard:
            found = states(pipe)[0].guarded.dense
        disable(pipe)
    assert torch.equal(found, shuffled == 2)
    assert results["unguarded"] < results["fallback"] - 6  # the weights shipped: 9.9 dB
    assert results["guarded"] > results["fallback"] - 1


def test_an_evaluation_counts_them(tiny_wan_dir):
    pipe = load_model(str(tiny_wan_dir), dtype=torch.float32, device="cpu")
    settings = GenerationSettings(
        height=48, width=80, num_frames=5, num_inference_steps=2, guidance_scale=3.0
    )
    claimed = plan_of(
        pipe.transformer, [[1e-3, 1.0], [1.0, 1.0]], candidates=(CANDIDATES[0], Candidate("skip", 0.0))
    )
    for plan, expected in ((claimed, 1), (AccelPlan.preset("window", density=0.3, block=16), None)):
        made = generate_variant(pipe, plan_variant(plan, "plan"), "a red circle", settings, seed=0)
        assert made.guarded_heads == expected


def test_heads_that_err_where_a_range_begins_never_run_there(wan_pipeline):
    pipe = wan_pipeline()
    first = plan_of(pipe.transformer, torch.full((2, 2), 10.0))
    plan = dataclasses.replace(
        first,
        range_starts=(0.0, 0.5),
        choice=first.choice.expand(2, -1, -1).contiguous(),
        rel_l2=torch.stack([torch.full((2, 2), 10.0), torch.tensor([[1e-3, 0.12], [0.12, 1e-3]])]),
    )
    enable(pipe, plan)
    found = []

    def look(_pipe, _step, _timestep, _tensors):
        found.append(int(states(pipe)[0].guarded.dense.sum()))
        return {}

    latents = pipe.latents(steps=10, callback_on_step_end=look)
    # Checked at steps 1, 5 and 8, where the range begins.
    assert found == [0] * 7 + [2, 2, 2]
    assert stats(pipe)["guarded_heads"] == 2
    disable(pipe)
    right = plan.choice.clone()
    right[1, [0, 1], [0, 1]] = 0
    enable(pipe, dataclasses.replace(plan, choice=right), guard=False)
    assert torch.equal(pipe.latents(steps=10), latents)


def test_a_check_waits_for_a_step_that_is_computed(tiny):
    guard = Guard(plan_of(tiny("wan").transformer, torch.ones(2, 2)), every=4)
    memory = guard.memory()
    computed = [1, 2, 3, 4, 6, 8, 10, 11, 12, 13, 14]
    assert [step for step in computed if guard.due(memory, "cond", 0, step, 0)] == [1, 6, 10, 14]
    assert guard.due(memory, "uncond", 0, 2, 0) == "now"
    assert guard.due(memory, "cond", 1, 14, 0) == "now"


def test_every_range_is_checked_where_it_begins(tiny):
    guard = Guard(plan_of(tiny("wan").transformer, torch.ones(2, 2)), every=4)
    memory = guard.memory()
    ranges = {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2, 8: 2, 9: 2, 10: 2}
    found = {step: guard.due(memory, "cond", 0, step, number) for step, number in ranges.items()}
    assert {step: when for step, when in found.items() if when} == {1: "now", 3: "now", 6: "now", 10: "later"}


@pytest.mark.parametrize("change", [{"rel_l2": None}, {"candidates": (SPARSE, SPARSE)}])
def test_uncalibrated_plans_are_refused(wan_pipeline, change):
    pipe = wan_pipeline()
    plan = dataclasses.replace(plan_of(pipe.transformer, torch.ones(2, 2)), **change)
    with pytest.raises(ValueError, match="guard: expected a calibrated plan"):
        enable(pipe, plan, guard=True)
    enable(pipe, AccelPlan.preset("window", density=0.3))
    pipe.latents(steps=2)
    assert "guarded_heads" not in stats(pipe)


def test_a_head_errs_little_where_it_errs_as_the_others_do(tiny):
    plan = plan_of(tiny("wan").transformer, torch.tensor([[0.01, 0.1], [0.3, 0.0]]))

    def limits(**options):
        return Guard(plan, **options)._limits[0].flatten().tolist()

    assert limits(factor=2.0, usual=1.5) == pytest.approx([0.05, 0.2, 0.6, 0.05])
    assert limits(factor=2.0, usual=9.0) == pytest.approx([0.09, 0.2, 0.6, 0.09])
    assert limits(factor=2.0, usual=0.0, floor=0.3) == pytest.approx([0.3, 0.3, 0.6, 0.3])


def test_a_head_of_no_number_is_caught(tiny):
    model = tiny("wan")
    guard = Guard(plan_of(model.transformer, torch.full((2, 2), 10.0)))
    memory = guard.memory()
    query, key, value = torch.randn(3, 1, 20, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    output = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    output = torch.stack((output[:, :, 0], output[:, :, 1] * torch.nan), dim=2)
    guard.check(query, key, value, output, 0, 1, memory, scale=None, key_mask=None)
    assert guard.settle(memory)
    assert memory.dense.tolist() == [[False, False], [False, True]]


def test_a_head_that_lost_its_output_is_always_caught(tiny):
    plan = plan_of(tiny("wan").transformer, torch.tensor([[0.6, 0.5], [0.4, 1.0]]))
    query, key, value = torch.randn(3, 1, 40, 2, 16, generator=torch.Generator().manual_seed(0))
    guard = Guard(plan)
    memory = guard.memory()
    for layer in (0, 1):
        guard.check(query, key, value, torch.zeros_like(value), 0, layer, memory, scale=None, key_mask=None)
    # The last one gave nothing at calibration either.
    assert [memory.pending[layer].tolist() for layer in (0, 1)] == [[True, True], [True, False]]


@pytest.mark.parametrize("options", [{"factor": 0.0}, {"usual": -1.0}, {"rows": 0}, {"every": 0}])
def test_options_out_of_range(tiny, options):
    with pytest.raises(ValueError, match="expected factor > 0, usual >= 0, rows and every at least 1"):
        Guard(plan_of(tiny("wan").transformer, torch.ones(2, 2)), **options)
