"""Which calls of a generation are profiled, and which of them with a gradient."""

from contextlib import contextmanager

import pytest
import torch

import dit_accel
from dit_accel import AccelPlan
from dit_accel.calibration import capture
from dit_accel.calibration.capture import Recorder
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.guard import Guard
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


def test_halves_of_a_batch_are_profiled_as_the_branches_that_they_are(tiny):
    way = Candidate("pooled", 0.4, (("branches", "shared"),))
    ways = (Candidate("dense", 1.0), way, Candidate("balanced", 0.4))
    grid = TokenGrid(3, 8, 9)
    query, key, value = torch.randn(
        3, 2, grid.total_tokens, 2, 16, generator=torch.Generator().manual_seed(0)
    )
    halves = {"cond": slice(1, None), "uncond": slice(1)}
    found = {}
    for paired in (True, False):
        model = tiny("wan", layers=1)
        recorder = Recorder(ways, {1: 0}, 1, 3, downstream=False)
        with listening(model.transformer, recorder):
            (state,) = states(model.transformer)
            for progress in (0.1, 0.2):
                for name, part in {"cond_uncond": slice(None)}.items() if paired else halves.items():
                    state.begin(grid, progress, name, paired=paired)
                    state.capture(0, query[part], key[part], value[part], None)
                    state.end()
        assert recorder.forwards == (1 if paired else 2)
        assert list(recorder.sums) == ["cond", "uncond"]
        found[paired] = recorder.sums
    for branch in halves:
        for name, expected in found[False][branch].tensors().items():
            assert torch.equal(found[True][branch].tensors()[name], expected), name
    assert found[True]["uncond"].alike.item() != 0


@pytest.mark.parametrize("options", [(), (("branches", "shared"),)], ids=["own", "shared"])
@pytest.mark.parametrize("branches", [("",), ("cond", "uncond")])
def test_blocks_are_those_of_the_step_before_as_in_a_run(tiny, branches, options):
    """`balanced` keeps its blocks for a few steps, whether guidance has another branch or not, and shares or not."""
    way = Candidate("balanced", 0.4, options, remainder=True)
    grid = TokenGrid(3, 8, 9)
    generator = torch.Generator().manual_seed(0)
    before, now = torch.randn(2, 3, 1, grid.total_tokens, 2, 16, generator=generator)
    errors = {}
    for first in (before, now):
        model = tiny("wan", layers=1)
        recorder = Recorder((Candidate("dense", 1.0), way), {1: 0}, 1, 3, downstream=False)
        with listening(model.transformer, recorder):
            (state,) = states(model.transformer)
            for progress, tensors in ((0.1, first), (0.2, now)):
                for branch in branches:
                    state.begin(grid, progress, branch)
                    state.capture(0, *tensors, None)
                    state.end()
        errors[first is now] = [recorder.sums[branch].error[..., 1].clone() for branch in branches]
    # Blocks that were built for other tokens fit these less well.
    for stale, fresh in zip(errors[False], errors[True], strict=True):
        assert (stale > 1.05 * fresh).all()


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


@pytest.mark.parametrize("options", [(("branches", "shared"),), ()], ids=["shared", "own"])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_errors_are_those_of_a_run_in_the_same_step(tiny, monkeypatch, step, options):
    """With blocks of the step before, and in the second branch the first one's choice, as soon as a run has them."""
    monkeypatch.setattr(capture, "_QUERY_BLOCKS", 1000)
    way = Candidate("balanced", 0.3, tuple(sorted((*options, ("rebuild", 2), ("axes", 3)))))
    ways = (Candidate("dense", 1.0), way)
    model = tiny("wan", layers=1)
    errors = []

    def generate():
        with torch.no_grad():
            for number, timestep in enumerate((900.0, 700.0, 500.0, 300.0)):
                for turn, branch in enumerate(("cond", "uncond")):
                    inputs = model.inputs(timestep=timestep, frames=3, height=5, width=7)
                    generator = torch.Generator().manual_seed(2 * number + turn)
                    inputs["hidden_states"] = torch.randn(inputs["hidden_states"].shape, generator=generator)
                    with model.transformer.cache_context(branch):
                        model.transformer(**inputs)

    class Looking(Guard):
        def due(self, *_, **__):
            return "later"

        def check(self, query, key, value, output, *_, **__):
            exact = torch.nn.functional.scaled_dot_product_attention(
                *(x.double().transpose(1, 2) for x in (query, key, value))
            ).transpose(1, 2)
            errors.append((output - exact).square().sum((0, 1, 3)))
            return torch.zeros(query.shape[2], dtype=torch.bool)

    plan = AccelPlan(
        ways,
        torch.ones(1, 1, 2, dtype=torch.int16),
        layers=("blocks.0.attn1",),
        rel_l2=torch.ones(1, 1, 2),
        block=16,
    )
    dit_accel.enable(model.transformer, plan)
    states(model.transformer)[0].guard = Looking(plan, every=1)
    generate()
    dit_accel.disable(model.transformer)
    assert len(errors) == 8

    recorder = Recorder(ways, {step: 0}, 1, 4, downstream=False)
    dense = AccelPlan.preset("dense", block=16)
    dit_accel.enable(model.transformer, dense)
    with recorder.attached(states(model.transformer)[0], model.transformer):
        generate()
    dit_accel.disable(model.transformer)
    for turn, branch in enumerate(("cond", "uncond")):
        ran, found = errors[2 * step + turn], recorder.sums[branch].error[0, 0, :, 1]
        # Blocks serve two steps. In the second of them the profile has those of the run, else newer or older ones.
        if (step, options) in EXACT:
            torch.testing.assert_close(found, ran, rtol=1e-4, atol=0)
        else:
            torch.testing.assert_close(found, ran, rtol=0.7, atol=0)
            assert not torch.allclose(found, ran, rtol=1e-3)


SHARED, OWN = (("branches", "shared"),), ()
# A run builds blocks in every other step.
EXACT = {(step, options) for step in (0, 1, 3) for options in (SHARED, OWN)}
