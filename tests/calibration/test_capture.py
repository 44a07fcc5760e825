"""Which calls of a generation are profiled, and which of them with a gradient."""

from contextlib import contextmanager

import pytest
import torch

import dit_accel
from dit_accel import AccelPlan
from dit_accel.calibration.capture import Recorder
from dit_accel.plan import Candidate
from dit_accel.switch import states

CANDIDATES = (Candidate("dense", 1.0), Candidate("window", 0.3), Candidate("skip", 0.0))


@contextmanager
def listening(transformer, recorder):
    dit_accel.enable(transformer, AccelPlan.preset("dense"))
    try:
        (state,) = states(transformer)
        with recorder.attached(state, transformer):
            yield
    finally:
        dit_accel.disable(transformer)


def recorded(tiny, sampled, **options) -> Recorder:
    """Three steps of two guided forwards each."""
    model = tiny("wan", layers=2)
    recorder = Recorder(CANDIDATES, sampled, 2, 3, **options)
    with torch.no_grad(), listening(model.transformer, recorder):
        for timestep in (900.0, 500.0, 100.0):
            for branch in ("cond", "uncond"):
                with model.transformer.cache_context(branch):
                    model.run(model.inputs(timestep=timestep))
    return recorder


@pytest.mark.parametrize(
    ("share", "branches"),
    [pytest.param(0, {"cond": [1, 1], "uncond": [0, 0]}, id="first-prompt"),
     pytest.param(1, {"cond": [1, 0], "uncond": [0, 1]}, id="second-prompt")],
)  # fmt: skip
def test_prompts_take_turns_in_the_branch_that_is_probed(tiny, share, branches):
    """At the very first step it is not known yet how many branches there are."""
    recorder = recorded(tiny, {0: 0, 2: 1}, share=share)
    assert recorder.progress == pytest.approx([0.1, 0.5, 0.9])
    for branch, probes in branches.items():
        found = recorder.sums[branch]
        assert found.calls.tolist() == [[1, 1], [1, 1]]
        assert found.probes.tolist() == [[n, n] for n in probes]
        assert ((found.effect[..., 1] > 0).all(-1) == (found.probes > 0)).all()
        assert (found.effect[..., 0] < 1e-6 * found.effect[..., 2].clamp(min=1e-30)).all()
    assert recorder.spent > 0


def test_profiles_are_the_same_with_and_without_gradients(tiny):
    plain, probed = (recorded(tiny, {1: 0}, downstream=downstream) for downstream in (False, True))
    for branch in ("cond", "uncond"):
        a, b = plain.sums[branch], probed.sums[branch]
        assert (a.probes == 0).all()
        for name in ("density", "rows", "mass", "error", "alike"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-6)


def test_errors_of_a_branch_are_compared_with_the_first_of_the_same_step(tiny):
    recorder = recorded(tiny, {0: 0, 2: 1}, downstream=False)
    assert recorder.sums["cond"].alike.eq(0).all()
    # Both branches get the same inputs here, so they err alike in every step; dense attention does not err.
    found = recorder.sums["uncond"].alike
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-6, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_latencies_are_measured_once_the_branches_are_known(tiny, steps):
    model, calls = tiny("wan", layers=2), []
    recorder = Recorder(CANDIDATES, {0: 0}, 2, steps, once=lambda *args: calls.append(args), downstream=False)
    with torch.no_grad(), listening(model.transformer, recorder):
        for timestep in (900.0, 500.0, 100.0)[:steps]:
            for branch in ("cond", "uncond"):
                with model.transformer.cache_context(branch):
                    model.run(model.inputs(timestep=timestep))
    ((state, branches, query, key, _, mask),) = calls
    assert branches == (1 if steps == 1 else 2)
    assert query.shape == key.shape
    assert mask is None
    assert state is not None


def test_equal_seeds_measure_equally(tiny):
    first, again, other = (recorded(tiny, {1: 0}, seed=seed).sums["cond"] for seed in (3, 3, 4))
    assert all(
        torch.equal(x, y) for x, y in zip(first.tensors().values(), again.tensors().values(), strict=True)
    )
    assert not torch.equal(first.gradient, other.gradient)
    assert torch.equal(first.mass, other.mass)
