"""What can be bought: for each way to spend the steps, the tables of attention at the forwards it computes.

One multiplier is the dial for both. The best plan at a multiplier is the best choice of each offer, and of those the
best; so an error is spent where it saves most time, on attention or on steps.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_accel.caching import CacheConfig, Schedule
from dit_accel.calibration.caching import StepProducts, cheapest_schedules
from dit_accel.calibration.knapsack import bracket, choose, mean_density, total_cost, total_error
from dit_accel.calibration.schedule import carried_weights, step_weights
from dit_accel.calibration.tables import Tables

_FEWEST_STEPS = 4  # of a generation that a schedule can leave any out of
_LEAST_CARRIED = (
    0.2  # of its error a range keeps where nothing reads it: other numbers of steps compute other steps
)
_WARM_UP = 0.1  # share of the steps, at least two, that every schedule computes: prompts differ most there


@dataclass(frozen=True, eq=False)
class Offer:
    """One way to spend the steps.

    Attributes:
        cache: None computes every step.
        tables: of attention, with the cost of the computed forwards alone.
        error: what the cache leaves, in the unit of the tables' error.
        saved: milliseconds that it saves beside attention.
    """

    cache: CacheConfig | None
    tables: Tables
    error: float = 0.0
    saved: float = 0.0


@dataclass(frozen=True, eq=False)
class Pick:
    """An offer with a choice for every head."""

    offer: Offer
    choice: Tensor

    @functools.cached_property
    def error(self) -> float:
        """Expected error of attention and steps together; 0 is the dense generation."""
        return self.offer.error + total_error(self.offer.tables, self.choice)

    @functools.cached_property
    def attention_ms(self) -> float:
        """Expected milliseconds of attention over one generation."""
        return total_cost(self.offer.tables, self.choice)

    @property
    def cost(self) -> float:
        """`attention_ms` less what the steps left out save beside attention."""
        return self.attention_ms - self.offer.saved

    @property
    def density(self) -> float:
        """Mean density over the attention calls that are made."""
        return mean_density(self.offer.tables, self.choice)

    @functools.cached_property
    def name(self) -> str:
        """Equal for equal plans."""
        cache = None if self.offer.cache is None else self.offer.cache.to_dict()
        content = self.choice.numpy().tobytes() + (b"" if cache is None else json.dumps(cache).encode())
        return hashlib.sha256(content).hexdigest()[:16]


def pick(offers: Sequence[Offer], multiplier: float) -> Pick:
    """The exact minimiser of cost + multiplier * error over all offers and choices."""
    picks = [Pick(offer, choose(offer.tables, multiplier)) for offer in offers]
    return min(picks, key=lambda found: found.cost + multiplier * found.error)


def pick_for_error(offers: Sequence[Offer], error: float) -> Pick:
    """The cheapest plan of at most this error; among the choices of one offer those of a multiplier are compared.

    Offers are few and far apart, so one that no multiplier over all of them prefers may be the best that the error
    allows. If every plan errs more, the plan of the largest multiplier tried.
    """
    allowed = [found for offer in offers if (found := _within(offer, error)) is not None]
    if allowed:
        return min(allowed, key=lambda found: (found.cost, found.error))
    return pick(offers, _bracket(offers, lambda m: pick(offers, m).error <= error)[1])


def _within(offer: Offer, error: float) -> Pick | None:
    """The choice of the smallest multiplier with which an offer has at most this error."""
    if offer.error > error:
        return None
    if not offer.tables.error.any():
        return Pick(offer, choose(offer.tables, 0.0))

    def fits(multiplier: float) -> bool:
        return Pick(offer, choose(offer.tables, multiplier)).error <= error

    found = Pick(offer, choose(offer.tables, bracket(offer.tables, fits)[1]))
    return found if found.error <= error else None


def pick_for_cost(offers: Sequence[Offer], cost: float) -> Pick:
    """The plan of the largest multiplier that costs at most `cost` (of the smallest tried if none does)."""
    return pick(offers, _bracket(offers, lambda m: pick(offers, m).cost > cost)[0])


def most_faithful(offers: Sequence[Offer]) -> Pick:
    """The plan of the largest multiplier that has any error; that of the smallest tried if all are dense."""
    return pick(offers, _bracket(offers, lambda m: pick(offers, m).error == 0.0)[0])


def _bracket(offers: Sequence[Offer], enough: Callable[[float], bool]) -> tuple[float, float]:
    """`bracket` at the scale of the offers' errors: those of steps alone where attention can only be dense."""
    tables = offers[0].tables
    if not tables.error.any():
        error = max(offer.error for offer in offers) / tables.error.numel()
        tables = replace(tables, error=torch.full_like(tables.error, error))
    return bracket(tables, enough)


def frontier(offers: Sequence[Offer], points: int = 48) -> list[Pick]:
    """Plans from the fastest to one of a 100,000th of its error, at multipliers evenly spaced in logarithm."""
    fastest = pick(offers, 0.0)
    picks = [fastest]
    if fastest.error > 0:

        def needed(error: float) -> float:
            return _bracket(offers, lambda m: pick(offers, m).error <= error)[1]

        of_fastest, of_faithful = needed(0.9 * fastest.error), needed(1e-5 * fastest.error)
        spaced = torch.linspace(math.log(of_fastest), math.log(of_faithful), points, dtype=torch.float64)
        picks += [pick(offers, math.exp(multiplier)) for multiplier in spaced.tolist()]
    found: list[Pick] = []
    for one in sorted(picks, key=lambda one: (one.cost, one.error)):
        # Sums of equal latencies differ in their last digits.
        if not found or one.error < found[-1].error:
            found.append(one)
    return found


def offers_of(
    tables: Tables,
    products: StepProducts | None,
    *,
    bounds: Sequence[int],
    progress: Sequence[float],
    guidance_scale: float,
    alike: Tensor,
    forward_ms: float,
) -> list[Offer]:
    """The offer that computes every step, and one for each schedule worth having.

    A schedule's error becomes that of the tables, which is relative to the prediction; of its two branches guidance
    takes the squared errors times g^2 and (g - 1)^2. In turn attention errs the more in a range the more forecasts read
    what it computes: its error is scaled by `carried_weights` over those with every step computed.

    Args:
        tables: with every step computed.
        products: of the dense generations; none, or fewer than 4 steps, offer no schedules.
        bounds, progress: see `schedule`.
        alike: `[ranges]`, see `tables.Profile`.
        forward_ms: milliseconds of one dense forward.
    """
    offers = [Offer(None, tables)]
    if products is None or products.steps < _FEWEST_STEPS:
        return offers
    steps, combination = products.steps, np.array(products.combination(guidance_scale))
    weights = torch.tensor(step_weights(progress), dtype=torch.float64)
    schedules = cheapest_schedules(
        products,
        weights=(weights / products.unit(guidance_scale)).tolist(),
        guidance_scale=guidance_scale,
        warm_up=max(2, round(_WARM_UP * steps)),
    )
    _, layers, heads, _ = tables.error.shape
    attention_ms = layers * heads * tables.plain_cost / tables.calls  # of one forward, by range
    plain = np.outer(combination, weights.sqrt())
    of_plain = torch.tensor(carried_weights(bounds, progress, plain, alike.numpy()), dtype=torch.float64)
    for found in schedules:
        if not any(found.schedule.forecasts.values()):
            continue  # computes every step
        left_out = torch.zeros(len(bounds) - 1, dtype=torch.float64)
        for steps_of_branch in found.schedule.forecasts.values():
            for step in steps_of_branch:
                left_out[next(r for r, stop in enumerate(bounds[1:]) if step < stop)] += 1
        share = 1 - left_out / tables.calls
        leverage = _leverage(found.schedule, products.branches, plain)
        of_schedule = carried_weights(bounds, progress, leverage, alike.numpy())
        carried = torch.tensor(of_schedule, dtype=torch.float64) / of_plain
        # A range that computes nothing costs nothing: it may stay dense, and does if its error is not 0.
        carried = torch.where(share > 0, carried.clamp(min=_LEAST_CARRIED), 1.0)
        offered = replace(
            tables,
            carried=carried,
            cost=tables.cost * share[:, None],
            plain_cost=tables.plain_cost * share,
            calls=tables.calls * share,
        )
        saved = float((left_out * (forward_ms - attention_ms).clamp(min=0)).sum())
        offers.append(Offer(found.config, offered, found.error, saved))
    return offers


def _leverage(schedule: Schedule, branches: Sequence[str], plain: NDArray[Any]) -> NDArray[Any]:
    """Of each forward `[branches, steps]` what it counts by itself, and in the forecasts that read it.

    plain: the same with every step computed.
    """
    leverage = plain.copy()
    for branch, steps in schedule.forecasts.items():
        row = branches.index(branch)
        for step, terms in steps.items():
            leverage[row, step] = 0.0
            for term in terms:
                if term.branch in branches:
                    leverage[branches.index(term.branch), term.step] += term.weight * plain[row, step]
    return leverage
