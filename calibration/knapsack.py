"""Chooses one candidate per (step range, layer, head) from measured tables. Pure functions on CPU tensors.

The whole generation costs the sum of the heads' latencies and suffers the sum of their weighted squared
errors, so the best plan at a given error is the minimiser of `cost + multiplier * error` (Lagrange), which
splits into one small minimum per layer call; `multiplier` is the single dial between speed and fidelity.
"""

from __future__ import annotations

import itertools
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
    sparse launch and costs `cost[:, dense]`. Each launch beyond the first, one per precision, costs `split_ms` a call.
    """
    ranges, _, heads, _ = tables.error.shape
    objective = tables.cost.view(ranges, 1, 1, -1) + multiplier * tables.weighted
    launches = [
        [n for n, own in enumerate(tables.launch) if own == launch] for launch in sorted(set(tables.launch))
    ]
    # The best of each launch's candidates, with and without dense: every set of launches chooses among these.
    best = [_best(objective, members) for members in launches]
    sparse = [_best(objective, [n for n in members if n != tables.dense]) for members in launches]
    value = torch.full_like(objective[..., 0, 0], math.inf)
    choice = torch.zeros_like(objective[..., 0], dtype=torch.int64)
    for count in range(1, len(launches) + 1):
        extra = (count - 1) * tables.split_ms * tables.calls.view(ranges, 1)
        for chosen in itertools.combinations(range(len(launches)), count):
            values, picks = _with_a_sparse_head(
                _merged([best[n] for n in chosen]), _merged([sparse[n] for n in chosen]), tables.dense
            )
            values = values.sum(-1) + extra
            better = values < value
            value = torch.where(better, values, value)
            choice = torch.where(better[..., None], picks, choice)
    plain = heads * tables.plain_cost.view(ranges, 1) + multiplier * tables.weighted[..., tables.dense].sum(
        -1
    )
    choice = torch.where((plain <= value)[..., None], tables.dense, choice)
    return choice.to(torch.int16)


# Value and number of a candidate, for each range, layer and head.
_Best = tuple[Tensor, Tensor]


def _best(objective: Tensor, members: list[int]) -> _Best:
    if not members:
        return torch.full_like(objective[..., 0], math.inf), torch.zeros_like(
            objective[..., 0], dtype=torch.int64
        )
    value, place = objective[..., members].min(-1)
    return value, torch.tensor(members)[place]


def _merged(parts: list[_Best]) -> _Best:
    value, place = torch.stack([value for value, _ in parts], dim=-1).min(-1)
    return value, torch.stack([number for _, number in parts], dim=-1).gather(-1, place[..., None])[..., 0]


def _with_a_sparse_head(best: _Best, sparse: _Best, dense: int) -> _Best:
    """The launch exists only if some head is not dense: where all prefer dense, the cheapest convert is made."""
    value, choice = best
    all_dense = (choice == dense).all(-1)
    if not choice.shape[-1] or not all_dense.any():
        return best
    convert = (sparse[0] - value).argmin(-1, keepdim=True)
    forced = choice.scatter(-1, convert, sparse[1].gather(-1, convert))
    forced_value = value.scatter(-1, convert, sparse[0].gather(-1, convert))
    return torch.where(all_dense[..., None], forced_value, value), torch.where(
        all_dense[..., None], forced, choice
    )


def total_error(tables: Tables, choice: Tensor) -> float:
    """Weighted squared error of a plan."""
    return sum(range_error(tables, choice))


def total_cost(tables: Tables, choice: Tensor) -> float:
    """Milliseconds of attention a plan takes over one generation."""
    return sum(range_cost(tables, choice))


def range_error(tables: Tables, choice: Tensor) -> list[float]:
    """`total_error` range by range."""
    found = tables.error.gather(-1, choice.long()[..., None]).sum((1, 2, 3))
    return (found if tables.carried is None else found * tables.carried).tolist()


def range_cost(tables: Tables, choice: Tensor) -> list[float]:
    """`total_cost` range by range."""
    ranges, layers, heads = choice.shape
    per_head = tables.cost.view(ranges, 1, 1, -1).expand(ranges, layers, heads, -1)
    mixed = per_head.gather(-1, choice.long()[..., None])[..., 0].sum(-1)
    launch = torch.tensor(tables.launch)[choice.long()]
    launches = torch.stack([(launch == own).any(-1) for own in set(tables.launch)]).sum(0)
    mixed = mixed + (launches - 1) * tables.split_ms * tables.calls.view(ranges, 1)
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
    by_density = replace(tables, cost=cost, plain_cost=cost[:, tables.dense], split_ms=0.0)
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
