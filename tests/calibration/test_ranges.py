"""Step ranges that are found from tables with planted changes."""

import itertools

import pytest
import torch

from dit_accel.calibration.knapsack import choose, total_cost, total_error
from dit_accel.calibration.ranges import find_ranges
from dit_accel.calibration.tables import Tables

LAYERS, HEADS = 3, 5
DENSITY = torch.tensor([1.0, 0.1, 0.2, 0.3, 0.5], dtype=torch.float64)
CALLS = torch.tensor([1.0, 1, 2, 2, 3, 4], dtype=torch.float64)


def tables_of(taste: list[int], noise: float = 0.0, seed: int = 0) -> Tables:
    """Spans of one taste have heads that want the same candidates; others want others."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.rand(max(taste) + 1, LAYERS, HEADS, len(DENSITY), generator=generator).exp().double() ** 4
    error = kinds[taste] * CALLS[: len(taste)].view(-1, 1, 1, 1)
    error = error * (1 + noise * torch.randn(error.shape, generator=generator, dtype=torch.float64)).clamp(
        min=0.1
    )
    error[..., 0] = 0.0
    return Tables(
        error, CALLS[: len(taste), None] * DENSITY, CALLS[: len(taste)], DENSITY, CALLS[: len(taste)], dense=0
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("taste", "bounds"),
    [
        ([0, 0, 0, 0, 0, 0], (0, 6)),
        ([0, 0, 1, 1, 1, 1], (0, 2, 6)),
        ([0, 1, 1, 1, 2, 2], (0, 1, 4, 6)),
        ([0, 1, 2, 3, 4, 5], (0, 1, 2, 3, 4, 5, 6)),
    ],
)
def test_ranges_begin_where_heads_change(taste, bounds, seed):
    assert find_ranges(tables_of(taste, seed=seed)) == bounds
    # What two samples of one and the same head differ by makes no range.
    if len(set(taste)) < 4:
        assert find_ranges(tables_of(taste, noise=0.02, seed=seed)) == bounds


def test_the_split_found_is_the_best_of_its_number():
    tables = tables_of([0, 1, 2, 1, 0, 2], seed=3)
    bounds = find_ranges(tables)

    def value(split):
        joined = tables.joined(split)
        choice = choose(joined, 0.05)
        return total_cost(joined, choice) + 0.05 * total_error(joined, choice)

    others = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), len(bounds) - 2)]
    assert value(bounds) <= 1.02 * min(map(value, others))


def test_joined_tables_are_sums():
    tables = tables_of([0, 1, 2, 3, 4, 5])
    joined = tables.joined((0, 1, 4, 6))
    assert joined.calls.tolist() == [1.0, 5.0, 7.0]
    torch.testing.assert_close(joined.error[1], tables.error[1:4].sum(0))
    assert torch.equal(joined.density, tables.density)
    # One choice for all spans of a range costs and errs as the same choice span by span.
    choice = choose(joined, 0.1)
    apart = choice[[0, 1, 1, 1, 2, 2]]
    assert total_error(joined, choice) == pytest.approx(total_error(tables, apart))
    assert total_cost(joined, choice) == pytest.approx(total_cost(tables, apart))


def test_a_single_step_and_dense_alone_make_one_range():
    tables = tables_of([0, 1])
    alone = Tables(tables.error[:1], tables.cost[:1], tables.plain_cost[:1], DENSITY, CALLS[:1], dense=0)
    assert find_ranges(alone) == (0, 1)
    nothing = torch.zeros(4, LAYERS, HEADS, 1, dtype=torch.float64)
    dense = Tables(nothing, CALLS[:4, None], CALLS[:4], DENSITY[:1], CALLS[:4], dense=0)
    assert find_ranges(dense) == (0, 4)
