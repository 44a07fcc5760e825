"""The choice is the exact minimum, on tables small enough to try every plan."""

import itertools
from dataclasses import replace

import pytest
import torch

from dit_accel.calibration.knapsack import (
    choose,
    choose_density,
    dense_cost,
    mean_density,
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


@pytest.mark.parametrize("split", [0.0, 0.15, 0.6, 9.0])
@pytest.mark.parametrize("launch", [(0, 1, 1), (0, 0, 1), (0, 1, 2)], ids=str)
def test_a_second_launch_is_worth_its_price_or_not_made(launch, split):
    seen = set()
    for seed in range(2):
        t = replace(tables(seed=seed), launch=launch, split_ms=split)
        for multiplier in (0.3, 1.0, 3.0):
            best = min(total_cost(t, plan) + multiplier * total_error(t, plan) for plan in all_plans(t))
            found = choose(t, multiplier)
            assert total_cost(t, found) + multiplier * total_error(t, found) == pytest.approx(best, rel=1e-12)
            seen |= {len({launch[n] for n in row}) for row in found.flatten(0, 1).tolist()}
    if split in (0.0, 9.0):
        assert (max(seen) > 1) == (split == 0.0)


def test_launches_cost_what_they_are_said_to():
    t = replace(tables(), launch=(0, 0, 1), split_ms=0.25)
    plan = torch.tensor([[[0, 1, 2]], [[1, 1, 1]]], dtype=torch.int16)
    alone = replace(t, split_ms=0.0)
    assert total_cost(t, plan) == pytest.approx(total_cost(alone, plan) + 0.25)  # one call in the first range
    plan[1, 0, 0] = 2
    assert total_cost(t, plan) == pytest.approx(total_cost(alone, plan) + 0.25 * (1 + 2))


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


def test_ranges_sum_to_the_whole():
    t = tables(ranges=3, layers=2, heads=4, candidates=5)
    choice = choose(t, 1.0)
    assert sum(range_cost(t, choice)) == pytest.approx(total_cost(t, choice))
    assert sum(range_error(t, choice)) == pytest.approx(total_error(t, choice))
    first = choice.clone()
    first[1:] = t.dense
    assert range_error(t, first) == pytest.approx([range_error(t, choice)[0], 0.0, 0.0])
    assert range_cost(t, first)[0] == pytest.approx(range_cost(t, choice)[0])
