"""Step ranges found from the data: neighbouring spans of steps whose heads want the same, taken together."""

from __future__ import annotations

import itertools
from statistics import fmean

from dit_accel.calibration.knapsack import bracket, choose, mean_density, total_cost, total_error
from dit_accel.calibration.tables import Tables

__all__ = ["find_ranges"]

_TOLERANCE = 0.003  # of time and error that a plan may lose for fewer ranges
_DENSITIES = (0.15, 0.3, 0.5)  # of the plans that are compared


def find_ranges(tables: Tables) -> tuple[int, ...]:
    """Where the ranges of a plan begin: the fewest that lose next to nothing against a choice for every span.

    A loss is that of cost + multiplier * error, which a plan minimises, relative to what it comes to with a choice of
    its own for every span; mean over multipliers that give sparse and nearly dense plans. The split of least loss into
    each number of ranges is found by dynamic programming.

    Args:
        tables: whose ranges are the spans of `schedule`.

    Returns:
        Number of the span at which each range begins, ascending from 0, and of the spans there are.
    """
    spans = len(tables.calls)
    # By multiplier, what plans come to with a choice for every span.
    least = {m: _value(tables, m) for m in (_multiplier(tables, density) for density in _DENSITIES)}
    ratio = {
        (a, b): fmean(_value(tables.joined((a, b)), m) / max(value, 1e-30) for m, value in least.items())
        for a, b in itertools.combinations(range(spans + 1), 2)
    }
    best: dict[int, tuple[float, tuple[int, ...]]] = {b: (ratio[0, b], (0,)) for b in range(1, spans + 1)}
    for count in range(2, spans + 1):
        if best[spans][0] <= 1 + _TOLERANCE:
            break
        best = {
            b: min((best[a][0] + ratio[a, b], (*best[a][1], a)) for a in range(count - 1, b))
            for b in range(count, spans + 1)
        }
    return (*best[spans][1], spans)


def _multiplier(tables: Tables, density: float) -> float:
    return bracket(tables, lambda m: mean_density(tables, choose(tables, m)) >= density)[1]


def _value(tables: Tables, multiplier: float) -> float:
    choice = choose(tables, multiplier)
    return total_cost(tables, choice) + multiplier * total_error(tables, choice)
