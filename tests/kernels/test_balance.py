"""The scheduler's simulator on cases that can be worked out by hand, and the balance of plans like real ones."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels import BlockIndex
from dit_accel.kernels.balance import POLICIES, simulate, synthetic_index


def lists(*heads: tuple[int, ...]) -> BlockIndex:
    """The list lengths of every head's rows."""
    counts = torch.tensor([heads], dtype=torch.int32)
    cols = max(int(counts.max()), 1)
    indices = torch.arange(cols, dtype=torch.int32)
    offsets = torch.zeros(counts.shape, dtype=torch.int64)
    return BlockIndex(counts, offsets, indices, 64, 64, 64 * counts.shape[2], 64 * cols)


def test_worked_examples():
    """Two slots: 1 2 3 in this order end at 4 (1 + 3 beside 2); longest first ends at 3."""
    index = lists((1, 2, 3))
    natural = simulate(index, slots=2, start_cost=0, policy="natural")
    assert (natural.ideal, natural.makespan, natural.efficiency) == (3.0, 4.0, 0.75)
    sorted_rows = simulate(index, slots=2, start_cost=0, policy="longest_first_per_head")
    assert (sorted_rows.makespan, sorted_rows.efficiency) == (3.0, 1.0)
    assert simulate(index, slots=1, start_cost=2, policy="natural").makespan == 12.0


def test_sorting_within_heads_leaves_the_heads_where_they_are():
    """Three slots: 1 1 2 2 ends at 3 as the last 2 starts at 1; 2 2 1 1 ends at 2."""
    index = lists((1, 1), (2, 2))
    assert simulate(index, slots=3, start_cost=0, policy="longest_heads_first").makespan == 2.0
    assert simulate(index, slots=3, start_cost=0, policy="longest_first_per_head").makespan == 3.0
    assert simulate(index, slots=3, start_cost=0, policy="longest_first").makespan == 2.0


@pytest.mark.parametrize("seed", range(5))
def test_no_order_is_worse_than_graham_s_bound(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 40, (50,), generator=generator).tolist()
    index = lists(tuple(lengths))
    for policy in POLICIES:
        found = simulate(index, slots=7, start_cost=0, policy=policy)
        assert found.ideal <= found.makespan <= found.ideal + max(lengths)


@pytest.mark.parametrize("density", [0.5, 0.25, 0.10, 0.05])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_large_plans_are_balanced(density, spread):
    """Wan2.1-14B at 720p, 81 frames: 75,600 tokens, 40 heads, in blocks of 128 x 64 on 132 x 2 slots."""
    index = synthetic_index(40, 75_600, block_q=128, block_k=64, density=density, spread=spread)
    assert index.density == pytest.approx(density, rel=0.2)
    assert simulate(index, slots=264).efficiency >= 0.95


def heads_of(densities: list[float], rows: int) -> BlockIndex:
    """Heads of equal rows, which keep a share of the columns, as many as rows."""
    return lists(*(tuple([max(1, round(density * rows))] * rows) for density in densities))


@pytest.mark.parametrize("seed", range(4))
def test_small_mixed_plans_are_balanced_by_starting_with_the_heads_that_take_longest(seed):
    """FLUX at 1024 squared, 4,608 tokens, 24 heads, in blocks of 64 on 132 x 2 slots, with the densities of a plan."""
    generator = torch.Generator().manual_seed(seed)
    offered = torch.tensor([0.03, 0.06, 0.12, 0.2, 0.3, 0.45, 1.0])
    densities = offered[torch.randint(len(offered), (24,), generator=generator)].tolist()
    index = heads_of(densities, 72)
    found = simulate(index, slots=264).efficiency
    assert found >= 0.95
    assert simulate(index, slots=264, policy="longest_first_per_head").efficiency < found - 0.02


def test_a_layer_of_the_demo_is_balanced():
    """8,160 tokens, 4 heads, in blocks of 64 on 132 multiprocessors: four waves, and the densities of its plans."""
    assert simulate(heads_of([0.03, 0.06, 0.2, 0.12], 128)).efficiency >= 0.95


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="policy must be one of natural, .*, got 'random'"):
        simulate(lists((1,)), policy="random")
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        simulate(lists((1,)), slots=0, policy="natural")
