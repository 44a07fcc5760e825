"""The choice is the exact minimum, on tables small enough to try every plan."""

import itertools
import math

import pytest
import torch

from dit_accel.calibration.knapsack import (
    choose,
    choose_density,
    dense_cost,
    frontier,
    mean_density,
    most_faithful_multiplier,
    multiplier_for_cost,
    multiplier_for_error,
    range_cost,
    range_error,
    total_cost,
    total_error,
)
from dit_accel.calibration.tables import Tables


def tables(ranges=2, layers=1, heads=3, candidates=3, seed=0, plain=0.8) -> Tables:
    """Random tables in which dense (candidate 0) has no error and the dearest list."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(ranges, layers, heads, candidates, generator=generator, dtype=torch.float64)
    error[..., 0] = 0.0
    density = torch.linspace(1.0, 0.1, candidates, dtype=torch.float64)
    calls = torch.arange(1, ranges + 1, dtype=torch.float64)
    noise = torch.rand(ranges, candidates, generator=generator, dtype=torch.float64)
    return Tables(
        error, calls[:, None] * density * (0.8 + 0.4 * noise), plain * calls, density, calls, dense=0
    )


def all_plans(t: Tables):
    ranges, layers, heads, candidates = t.error.shape
    for plan in itertools.product(range(candidates), repeat=ranges * layers * heads):
        yield torch.tensor(plan, dtype=torch.int16).view(ranges, layers, heads)


@pytest.mark.parametrize("plain", [0.3, 0.8, 5.0], ids=["cheap-dense", "near", "dear-dense"])
@pytest.mark.parametrize("seed", range(3))
def test_choice_is_the_minimum_over_all_plans(seed, plain):
    t = tables(seed=seed, plain=plain)
    for multiplier in (0.0, 0.5, 2.0, 100.0):
        best = min(total_cost(t, plan) + multiplier * total_error(t, plan) for plan in all_plans(t))
        found = choose(t, multiplier)
        assert found.dtype == torch.int16
        assert total_cost(t, found) + multiplier * total_error(t, found) == pytest.approx(best, rel=1e-12)


def test_all_dense_layers_cost_the_plain_path():
    t = tables()
    dense = torch.zeros(2, 1, 3, dtype=torch.int16)
    assert total_cost(t, dense) == pytest.approx(dense_cost(t)) == pytest.approx(0.8 * 3 * (1 + 2))
    mixed = dense.clone()
    mixed[1, 0, 2] = 1
    assert total_cost(t, mixed) == pytest.approx((0.8 * 3 + 2 * t.cost[1, 0] + t.cost[1, 1]).item())


@pytest.mark.parametrize("seed", range(3))
def test_error_falls_and_cost_rises_with_the_multiplier(seed):
    t = tables(layers=3, heads=5, candidates=6, seed=seed)
    plans = [choose(t, 10.0**power) for power in range(-4, 5)]
    errors = [total_error(t, plan) for plan in plans]
    costs = [total_cost(t, plan) for plan in plans]
    assert errors == sorted(errors, reverse=True)
    assert costs == sorted(costs)
    assert errors[0] > errors[-1]


@pytest.mark.parametrize("error", [0.05, 0.5, 2.0])
def test_multiplier_for_error_keeps_the_error_and_is_the_smallest(error):
    t = tables(layers=2, heads=4, candidates=5)
    multiplier = multiplier_for_error(t, error)
    assert total_error(t, choose(t, multiplier)) <= error
    assert total_error(t, choose(t, multiplier * 0.999)) > error


def test_multiplier_for_error_of_nothing_is_dense():
    t = tables()
    assert total_error(t, choose(t, multiplier_for_error(t, 0.0))) == 0.0


def test_most_faithful_multiplier_is_the_last_before_dense():
    t = tables(layers=2, heads=4, candidates=5, plain=5.0)
    multiplier = most_faithful_multiplier(t)
    assert total_error(t, choose(t, multiplier)) > 0
    assert total_error(t, choose(t, multiplier * (1 + 1e-6))) == 0.0


@pytest.mark.parametrize("density", [0.2, 0.45, 0.9])
def test_choose_density_hits_the_density(density):
    t = tables(ranges=3, layers=4, heads=5, candidates=7)
    choice = choose_density(t, density)
    largest_jump = (t.density.max() - t.density.min()) * t.calls.max() / (t.calls.sum() * 20)
    assert abs(mean_density(t, choice) - density) <= largest_jump


def test_choose_density_has_the_least_error_of_its_density():
    t = tables(ranges=1, heads=4, candidates=4, seed=5)
    choice = choose_density(t, 0.5)
    rivals = [plan for plan in all_plans(t) if mean_density(t, plan) <= mean_density(t, choice) + 1e-12]
    assert total_error(t, choice) == pytest.approx(min(total_error(t, plan) for plan in rivals))


def test_mean_density_weighs_ranges_by_their_calls():
    t = tables()
    choice = torch.zeros(2, 1, 3, dtype=torch.int16)
    choice[1] = 2
    assert mean_density(t, choice) == pytest.approx((1 * 1.0 + 2 * 0.1) / 3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("cost", torch.ones(2, 2), r"cost must be \[2, 3\], got \(2, 2\)", id="cost"),
        pytest.param(
            "error", torch.ones(2, 3), r"error must be \[ranges, layers, heads, candidates\]", id="error"
        ),
        pytest.param("dense", 3, r"dense must be in 0..2, got 3", id="dense"),
    ],
)
def test_tables_refuse_shapes_that_do_not_fit(name, value, message):
    parts = vars(tables()) | {name: value}
    with pytest.raises(ValueError, match=message):
        Tables(**parts)


def test_multipliers_follow_the_scale_of_the_tables():
    t = tables(layers=2, heads=4, candidates=5)
    scaled = Tables(t.error * 1e-9, t.cost * 1e3, t.plain_cost * 1e3, t.density, t.calls, t.dense)
    multiplier = multiplier_for_error(scaled, 0.5e-9)
    assert math.isfinite(multiplier)
    assert torch.equal(choose(scaled, multiplier), choose(t, multiplier_for_error(t, 0.5)))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_multiplier_for_cost_keeps_the_cost_and_is_the_largest(share):
    t = tables(layers=2, heads=4, candidates=5, plain=1.5)
    fastest, dense = total_cost(t, choose(t, 0.0)), dense_cost(t)
    cost = fastest + share * (dense - fastest)
    multiplier = multiplier_for_cost(t, cost)
    assert total_cost(t, choose(t, multiplier)) <= cost
    if share < 1.0:
        assert total_cost(t, choose(t, multiplier * 1.001)) > cost


def test_a_cost_that_no_plan_has_gives_the_fastest():
    t = tables(layers=2, heads=4, candidates=5)
    assert total_cost(t, choose(t, multiplier_for_cost(t, 0.0))) == pytest.approx(
        total_cost(t, choose(t, 0.0))
    )


@pytest.mark.parametrize("seed", range(2))
def test_tighter_errors_are_never_faster_and_never_worse(seed):
    t = tables(layers=3, heads=5, candidates=6, seed=seed, plain=1.5)
    plans = [choose(t, multiplier_for_error(t, error)) for error in (8.0, 3.0, 1.0, 0.3, 0.1, 0.0)]
    errors = [total_error(t, plan) for plan in plans]
    costs = [total_cost(t, plan) for plan in plans]
    assert errors == sorted(errors, reverse=True)
    assert costs == sorted(costs)


def test_no_plan_as_cheap_has_less_error():
    """Against brute force: what the multiplier gives for an error lies on the front of all plans."""
    t = tables(ranges=1, heads=4, candidates=4, seed=2)
    for error in (0.1, 0.6, 1.5):
        found = choose(t, multiplier_for_error(t, error))
        rivals = [plan for plan in all_plans(t) if total_cost(t, plan) <= total_cost(t, found) + 1e-12]
        assert total_error(t, found) == pytest.approx(min(total_error(t, plan) for plan in rivals))


def test_ranges_sum_to_the_whole():
    t = tables(ranges=3, layers=2, heads=4, candidates=5)
    choice = choose(t, 1.0)
    assert sum(range_cost(t, choice)) == pytest.approx(total_cost(t, choice))
    assert sum(range_error(t, choice)) == pytest.approx(total_error(t, choice))
    first = choice.clone()
    first[1:] = t.dense
    assert range_error(t, first) == pytest.approx([range_error(t, choice)[0], 0.0, 0.0])
    assert range_cost(t, first)[0] == pytest.approx(range_cost(t, choice)[0])


def test_frontier_goes_from_the_fastest_plan_towards_dense():
    t = tables(ranges=3, layers=4, heads=5, candidates=7, plain=1.5)
    points = frontier(t)
    costs, errors = ([point[name] for point in points] for name in ("attention_ms", "error"))
    assert costs == sorted(costs)
    assert errors == sorted(errors, reverse=True)
    assert costs[0] == pytest.approx(total_cost(t, choose(t, 0.0)))
    assert len(points) > 8
    assert errors[-1] < 1e-2 * errors[0]


def test_frontier_of_tables_without_error_is_one_plan():
    t = tables()
    t.error.zero_()
    assert [point["error"] for point in frontier(t)] == [0.0]
