"""How evenly ragged lists load a GPU: a simulator of its block scheduler.

A GPU starts thread blocks in launch order and gives the next one to the first multiprocessor that has room. With
`slots` places in all, a launch therefore takes as long as greedy list scheduling does (Graham 1969: at most
`ideal + longest` for any order, at most 4/3 of the optimum for longest-first).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from dit_accel.kernels.block_index import BlockIndex

POLICIES = ("natural", "longest_first_per_head", "longest_heads_first", "longest_first")


@dataclass(frozen=True)
class Balance:
    """Times in units of one key block: `ideal` is all work divided by the slots, `makespan` what the launch takes."""

    ideal: float
    makespan: float

    @property
    def efficiency(self) -> float:
        """Ideal ÷ makespan, at most 1."""
        return self.ideal / self.makespan


def simulate(
    index: BlockIndex, *, slots: int = 132, start_cost: float = 2.0, policy: str = "longest_heads_first"
) -> Balance:
    """Schedule one attention launch.

    Args:
        index: the block lists; every batch element and head is launched.
        slots: programs that run at once: multiprocessors × programs per multiprocessor (132 on H100 and H200).
        start_cost: what a program costs besides its list (loading queries, writing the output), in key blocks.
        policy: "natural" launches rows as they stand, "longest_first_per_head" sorts the rows of each head,
            "longest_heads_first" also the heads by all of their rows (what the attention kernel does), "longest_first"
            sorts all rows of all heads.

    Raises:
        ValueError: an unknown policy, or less than one slot.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    counts = index.counts
    if policy in ("longest_first_per_head", "longest_heads_first"):
        counts = counts.sort(dim=-1, descending=True).values.flatten(0, 1)
        if policy == "longest_heads_first":
            counts = counts[counts.sum(-1).argsort(descending=True, stable=True)]
    elif policy == "longest_first":
        counts = counts.flatten().sort(descending=True).values
    costs = (counts.flatten().double() + start_cost).tolist()
    free = [0.0] * min(slots, len(costs))
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return Balance(sum(costs) / slots, max(free))


def synthetic_index(
    heads: int, tokens: int, *, block_q: int, block_k: int, density: float, spread: float, seed: int = 0
) -> BlockIndex:
    """Lists as a mixed plan has them: heads of different density, and rows that differ within a head.

    Args:
        density: mean over all heads.
        spread: 0 gives every row the same length; 1 lets heads differ by up to the mean, and rows by half of it.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, cols = -(-tokens // block_q), -(-tokens // block_k)
    of_head = 1 + spread * (2 * torch.rand(heads, 1, generator=generator) - 1)
    of_row = 1 + 0.5 * spread * (2 * torch.rand(heads, rows, generator=generator) - 1)
    counts = (density * cols * of_head * of_row).round().clamp(1, cols).to(torch.int32)
    # Rows share one ascending list: only the lengths matter here.
    indices = torch.arange(cols, dtype=torch.int32)
    return BlockIndex(
        counts[None],
        torch.zeros(1, heads, rows, dtype=torch.int64),
        indices,
        block_q,
        block_k,
        tokens,
        tokens,
    )
