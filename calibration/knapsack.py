"""Chooses one candidate per (step range, layer, head) from measured tables. Pure functions on CPU tensors.

The whole generation costs the sum of the heads' latencies and suffers the sum of their weighted squared
errors, so the best plan at a given error is the minimiser of `cost + multiplier * error` (Lagrange), which
splits into one small minimum per layer call; `multiplier` is the single dial between speed and fidelity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.calibration.tables import Tables

_LOG_MULTIPLIERS = (-30.0, 30.0)  # natural log, around the table's own scale
_BISECTIONS = 28


def choose(tables: Tables, multiplier: float) -> Tensor:
    """The exact minimiser of cost + multiplier * error, int16 `[ranges, layers, heads]`.

    A layer whose heads are all dense costs `plain_cost`; one dense head among others is one more list in the
    sparse launch and costs `cost[:, dense]`.
    """
    ranges, _, heads, _ = tables.error.shape
    objective = tables.cost.view(ranges, 1, 1, -1) + multiplier * tables.error
    sparse = objective.clone()
    sparse[..., tables.dense] = math.inf
    best_sparse, sparse_choice = sparse.min(-1)
    choice = objective.argmin(-1)
    value = objective.amin(-1)

    # The launch exists only if some head is not dense: where all of them prefer dense, the cheapest convert
    # is made.
    all_dense = (choice == tables.dense).all(-1)
    if heads and bool(all_dense.any()):
        convert = (best_sparse - value).argmin(-1, keepdim=True)
        forced = choice.scatter(-1, convert, sparse_choice.gather(-1, convert))
        forced_value = value.scatter(-1, convert, best_sparse.gather(-1, convert))
        choice = torch.where(all_dense[..., None], forced, choice)
        value = torch.where(all_dense[..., None], forced_value, value)

    plain = heads * tables.plain_cost.view(ranges, 1) + multiplier * tables.error[..., tables.dense].sum(-1)
    take_plain = plain <= value.sum(-1)
    choice[take_plain] = tables.dense
    return choice.to(torch.int16)


def total_error(tables: Tables, choice: Tensor) -> float:
    """Weighted squared error of a plan."""
    return tables.error.gather(-1, choice.long()[..., None]).sum().item()


def total_cost(tables: Tables, choice: Tensor) -> float:
    """Milliseconds of attention a plan takes over one generation."""
    return sum(range_cost(tables, choice))


def range_error(tables: Tables, choice: Tensor) -> list[float]:
    """`total_error` range by range."""
    return tables.error.gather(-1, choice.long()[..., None]).sum((1, 2, 3)).tolist()


def range_cost(tables: Tables, choice: Tensor) -> list[float]:
    """`total_cost` range by range."""
    ranges, layers, heads = choice.shape
    per_head = tables.cost.view(ranges, 1, 1, -1).expand(ranges, layers, heads, -1)
    mixed = per_head.gather(-1, choice.long()[..., None])[..., 0].sum(-1)
    plain = heads * tables.plain_cost.view(ranges, 1).expand(ranges, layers)
    return torch.where((choice == tables.dense).all(-1), plain, mixed).sum(-1).tolist()


def dense_cost(tables: Tables) -> float:
    """Milliseconds of attention without a plan."""
    _, layers, heads, _ = tables.error.shape
    return layers * heads * tables.plain_cost.sum().item()


def mean_density(tables: Tables, choice: Tensor) -> float:
    """Mean density of a plan over all calls of one generation."""
    per_range = tables.density[choice.long()].mean((1, 2))
    return ((per_range * tables.calls).sum() / tables.calls.sum()).item()


def choose_density(tables: Tables, density: float) -> Tensor:
    """The plan of least error whose mean density is nearest to `density`, whatever the candidates' latency.

    Plans change in jumps, so the two sides of the jump across `density` are compared.
    """
    cost = tables.calls[:, None] * tables.density
    by_density = replace(tables, cost=cost, plain_cost=cost[:, tables.dense])
    sides = bracket(by_density, lambda m: mean_density(tables, choose(by_density, m)) >= density)
    plans = [choose(by_density, multiplier) for multiplier in sides]
    return min(plans, key=lambda choice: abs(mean_density(tables, choice) - density))


def bracket(tables: Tables, enough: Callable[[float], bool]) -> tuple[float, float]:
    """Multipliers just below and just above the one from which on `enough` holds."""
    scale = math.log(tables.cost.mean().clamp(min=1e-30).item() / max(tables.error.mean().item(), 1e-30))
    low, high = (scale + bound for bound in _LOG_MULTIPLIERS)
    if enough(math.exp(low)):
        return math.exp(low), math.exp(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(math.exp(middle)) else (middle, high)
    return math.exp(low), math.exp(high)
