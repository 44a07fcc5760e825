"""The state knows where a generation is and forgets it when the next one begins."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_accel.candidate import Candidate
from dit_accel.clock import Clock
from dit_accel.grid import TokenGrid
from dit_accel.pipelines import family_of
from dit_accel.plan import AccelPlan
from dit_accel.state import AccelState
from dit_accel.switch import disable, enable, states, stats

GRID = TokenGrid(1, 5, 7)
WINDOW = AccelPlan.preset("window", density=0.5, block=16)


@pytest.fixture
def state(tiny):
    return AccelState(WINDOW, family_of(tiny("wan").transformer))


def step(state, progress, branch=""):
    state.begin(GRID, progress, branch)
    state.record(10, 0.5, sparse=True)
    state.end()
    return state.forwards


def test_branches_are_counted_apart(state):
    assert [step(state, p, b) for p in (0.0, 0.5) for b in ("cond", "uncond")] == [1, 1, 2, 2]
    assert state.stats.sparse_calls == 4


def test_a_batch_that_lost_a_branch_inside_a_forward_holds_one(state):
    state.begin(GRID, 0.0, paired=True, batch=4)
    assert [state.holds_both(torch.zeros(batch, 35, 2, 8)) for batch in (4, 2)] == [True, False]
    state.end()
    state.begin(GRID, 0.5, paired=False, batch=4)
    assert not state.holds_both(torch.zeros(4, 35, 2, 8))


def test_another_grid_than_the_plan_was_calibrated_on_is_said_once(tiny, caplog):
    calibrated = replace(WINDOW, grid=TokenGrid(1, 5, 8))
    elsewhere = AccelState(calibrated, family_of(tiny("wan").transformer))
    at_home = AccelState(replace(WINDOW, grid=GRID), family_of(tiny("wan").transformer))
    with caplog.at_level("WARNING", logger="dit_accel"):
        for state in (at_home, elsewhere):
            step(state, 0.1), step(state, 0.7)
    (said,) = caplog.messages
    assert "calibrated for 1 x 5 x 8 tokens (frames, height, width), runs on 1 x 5 x 7" in said


@pytest.mark.parametrize("first", [0.0, 0.1, 0.7])
def test_a_generation_starts_when_progress_goes_back(state, first):
    step(state, 0.1), step(state, 0.7)
    assert step(state, first) == (1 if first < 0.7 else 3)


def test_all_branches_are_forgotten_together(state):
    step(state, 0.1, "cond"), step(state, 0.1, "uncond"), step(state, 0.7, "cond")
    assert step(state, 0.1, "cond") == 1
    assert step(state, 0.1, "uncond") == 1
    assert state.stats.sparse_calls == 2


@pytest.mark.parametrize(
    ("forwards", "steps"),
    [
        ([(0.0, "cond"), (0.0, "uncond"), (0.4, "cond"), (0.4, "uncond")], [0, 0, 1, 1]),
        ([(0.2, "cond"), (0.2, "uncond"), (0.4, "uncond"), (0.4, "cond"), (0.5, "cond")], [0, 0, 1, 1, 2]),
        # A scheduler that visits a timestep twice, and a transformer whose branches nobody names.
        ([(0.2, "cond"), (0.2, "uncond"), (0.3, "cond"), (0.3, "cond"), (0.3, "uncond")], [0, 0, 1, 2, 2]),
        ([(0.2, ""), (0.3, ""), (0.3, ""), (0.5, "")], [0, 1, 2, 3]),
    ],
)
def test_branches_of_one_step_have_its_number(state, forwards, steps):
    def numbers():
        for progress, branch in forwards:
            step(state, progress, branch)
            yield state.step

    for _ in range(2):
        found = list(numbers())
        assert [number - found[0] for number in found] == steps
        state.finish()


def test_several_branches_are_known_from_the_second_step_on(state):
    calls = [(0.1, "cond"), (0.1, "uncond"), (0.3, "cond"), (0.5, "cond")]
    assert [(step(state, *call), state.several_branches)[1] for call in calls] == [False, False, True, True]
    state.finish()
    assert [(step(state, p), state.several_branches)[1] for p in (0.0, 0.3, 0.5)] == [False] * 3


def test_what_families_remember_is_forgotten_with_the_generation(state):
    step(state, 0.2)
    state.cache["seen"] = True
    step(state, 0.3)
    assert state.cache == {"seen": True}
    state.finish()
    assert state.cache == {}
    state.cache["seen"] = True
    step(state, 0.2)
    assert state.cache == {}


def test_a_generation_of_one_step_is_a_generation(state):
    assert [step(state, 0.0) for _ in range(3)] == [1, 1, 1]


def test_a_scheduler_may_visit_a_timestep_twice(state):
    assert [step(state, progress) for progress in (0.0, 0.3, 0.3, 0.6, 0.6)] == [1, 2, 3, 4, 5]


def test_a_finished_generation_keeps_its_stats_until_the_next(state):
    step(state, 0.2)
    state.finish()
    assert state.stats.sparse_calls == 1
    assert step(state, 0.3) == 1
    assert state.stats.sparse_calls == 1


def test_a_forward_that_failed_ends_the_generation(state):
    step(state, 0.2)
    state.begin(GRID, 0.3)
    assert step(state, 0.4) == 1


def test_rows_follow_range_and_layer(tiny):
    candidates = (Candidate("dense", 1.0), Candidate("window", 0.5))
    choice = torch.tensor([[[0, 0], [0, 1]], [[1, 1], [0, 0]]], dtype=torch.int16)
    plan = AccelPlan(candidates, choice, (0.0, 0.5), layers=("a", "b"))
    state = AccelState(plan, family_of(tiny("wan").transformer))
    rows = {}
    for progress in (0.2, 0.5):
        state.begin(GRID, progress)
        rows[progress] = [(row.tolist(), dense) for row, dense in map(state.row, range(2))]
        state.end()
    assert rows == {0.2: [([0, 0], True), ([0, 1], False)], 0.5: [([1, 1], False), ([0, 0], True)]}
    assert not state.all_dense


def test_interrupted_forward_of_a_real_model(tiny):
    model = tiny("wan")
    enable(model.transformer, WINDOW)
    (state,) = states(model.transformer)
    model.run(timestep=900.0)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.transformer.blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model.run(timestep=800.0)
    handle.remove()
    assert state.running
    expected = model.run(timestep=700.0)
    assert stats(model.transformer)["sparse_calls"] == 2
    assert torch.equal(model.run(timestep=700.0), expected)


def test_pipeline_reports_branches_and_position(wan_pipeline):
    pipe = enable(wan_pipeline(), WINDOW)
    (state,) = states(pipe)
    seen = []
    state.capture = lambda layer, *_: seen.append((state.branch, round(state.progress, 3), layer))
    pipe.latents(steps=2)
    positions = sorted({progress for _, progress, _ in seen})
    assert positions[0] == 0.0
    assert len(positions) == 2
    assert seen == [(b, p, layer) for p in positions for b in ("cond", "uncond") for layer in (0, 1)]


def test_a_plan_serves_the_same_positions_at_another_number_of_steps(wan_pipeline):
    pipe = wan_pipeline()
    plan = AccelPlan(
        (Candidate("dense", 1.0), Candidate("window", 0.5)),
        torch.tensor([0, 1], dtype=torch.int16).view(2, 1, 1),
        (0.0, 0.25),
        block=16,
    )
    enable(pipe, plan)
    for steps in (4, 8):
        pipe.latents(steps=steps)
        share = stats(pipe)["dense_calls"] / (steps * 2 * 2)
        timesteps = pipe.scheduler.timesteps
        assert share == (1 - timesteps / 1000 < 0.25).double().mean().item()
        assert 0 < share < 1


@pytest.mark.parametrize(
    ("share", "layers", "dense"), [(0.0, 2, 0), (0.03, 2, 1), (0.5, 2, 1), (0.03, 40, 2), (0.1, 30, 3)]
)
def test_the_first_layers_of_a_preset_may_stay_dense(tiny, share, layers, dense):
    plan = AccelPlan.preset("window", density=0.5, block=16, dense_layers=share)
    state = AccelState(plan, family_of(tiny("wan").transformer), layers=layers)
    assert [state.row(layer)[1] for layer in range(layers)] == [True] * dense + [False] * (layers - dense)


def test_dense_first_layers_run_on_the_model_s_attention(wan_pipeline):
    pipe = wan_pipeline()
    enable(pipe, AccelPlan.preset("window", density=0.2, block=16, dense_layers=0.03))
    pipe.latents(steps=2)
    found = stats(pipe)
    assert found["dense_calls"] == found["sparse_calls"] > 0
    disable(pipe)
    enable(pipe, AccelPlan.preset("window", density=0.2, block=16))
    pipe.latents(steps=2)
    assert stats(pipe)["dense_calls"] == 0
    assert found["density_mean"] == pytest.approx((1 + stats(pipe)["density_mean"]) / 2)


def test_the_timestep_of_a_pipeline_is_not_read(wan_pipeline, monkeypatch):
    """On a GPU the host would wait for it in every forward."""
    pipe, seen = wan_pipeline(), []
    enable(pipe, AccelPlan.preset("taylorseer"))
    state = states(pipe)[0]

    def progress(family, arguments, timestep=None):
        assert timestep == float(arguments["timestep"].max())
        seen.append(timestep)
        return 1 - timestep / 1000

    monkeypatch.setattr(type(state.family), "progress", progress)
    pipe.latents(steps=12)
    assert seen[::2] == pipe.scheduler.timesteps.tolist()


def test_rounded_timesteps_are_those_of_the_scheduler():
    """FLUX hands its timesteps on in bfloat16; at 2048² and 28 steps five of them round to their neighbour's."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist(), mu=3.2)
    clock = Clock(SimpleNamespace(scheduler=scheduler))
    exact = (1 - scheduler.timesteps.double() / 1000).tolist()
    rounded = [1 - float((t / 1000).to(torch.bfloat16)) for t in scheduler.timesteps]
    assert len(set(rounded)) < 28
    sample, found = torch.zeros(1, 2), []
    for timestep, progress in zip(scheduler.timesteps, rounded, strict=True):
        found.append(clock.unrounded(progress))
        sample = scheduler.step(torch.zeros(1, 2), timestep, sample, return_dict=False)[0]
    assert found == exact
    assert clock.unrounded(0.5) == 0.5  # no step of the scheduler
    assert Clock(SimpleNamespace()).unrounded(0.25) == 0.25


def test_timesteps_of_others_are_read():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    clock = Clock(SimpleNamespace(scheduler=scheduler))
    timesteps = scheduler.timesteps
    assert clock.value_of(timesteps[3].expand(2)) == timesteps[3].item()
    assert clock.value_of(timesteps[1]) == timesteps[1].item()
    assert clock.value_of(timesteps[2:3]) == timesteps[2].item()
    for other in (timesteps[3].expand(2).half(), timesteps[3].clone(), timesteps[1:3], 3.0, timesteps[:0]):
        assert clock.value_of(other) is None
    scheduler.set_timesteps(7)
    assert clock.value_of(timesteps[3]) is None
    assert clock.value_of(scheduler.timesteps[6]) == scheduler.timesteps[6].item()
    assert Clock(SimpleNamespace()).value_of(timesteps[0]) is None
