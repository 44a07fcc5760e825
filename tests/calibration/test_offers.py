"""Plans over attention and steps: the best of all there are, on tables small enough to try every one."""

import dataclasses
import itertools
import math

import pytest
import torch

from dit_accel.caching import CacheConfig, Schedule, Term
from dit_accel.calibration.caching import StepProducts
from dit_accel.calibration.knapsack import choose, dense_cost, total_cost
from dit_accel.calibration.offers import (
    Offer,
    Pick,
    frontier,
    most_faithful,
    offers_of,
    pick,
    pick_for_cost,
    pick_for_error,
)
from dit_accel.calibration.schedule import step_weights
from dit_accel.calibration.tables import Tables

NAMES = ("cond", "uncond", "latents")


def tables(ranges=2, layers=1, heads=3, candidates=3, seed=0, plain=0.8) -> Tables:
    """Random tables in which dense (candidate 0) has no error and the dearest list."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(ranges, layers, heads, candidates, generator=generator, dtype=torch.float64)
    error[..., 0] = 0.0
    density = torch.linspace(1.0, 0.1, candidates, dtype=torch.float64)
    calls = torch.arange(1, ranges + 1, dtype=torch.float64)
    noise = torch.rand(ranges, candidates, generator=generator, dtype=torch.float64)
    cost = calls[:, None] * density * (0.8 + 0.4 * noise)
    return Tables(error, cost, plain * calls, density, calls, dense=0)


def alone(**sizes):
    return [Offer(None, tables(**sizes))]


def several(**sizes):
    """Three ways to spend the steps, the cheaper the more they err."""
    every = tables(**sizes)
    made = [Offer(None, every)]
    for share, error in ((0.7, 0.2), (0.4, 0.9)):
        fewer = dataclasses.replace(
            every, cost=every.cost * share, plain_cost=every.plain_cost * share, calls=every.calls * share
        )
        schedule = Schedule(12, {"": {4: (Term("", 3, share),)}})
        config = CacheConfig("schedule", target="output", schedule=schedule)
        made.append(Offer(config, fewer, error, saved=2 * (1 - share)))
    return made


def all_picks(offers):
    for offer in offers:
        ranges, layers, heads, candidates = offer.tables.error.shape
        for plan in itertools.product(range(candidates), repeat=ranges * layers * heads):
            yield Pick(offer, torch.tensor(plan, dtype=torch.int16).view(ranges, layers, heads))


@pytest.mark.parametrize("make", [alone, several])
@pytest.mark.parametrize("seed", range(2))
def test_the_pick_is_the_minimum_over_all_plans(make, seed):
    offers = make(seed=seed)
    for multiplier in (0.0, 0.5, 2.0, 100.0):
        best = min(one.cost + multiplier * one.error for one in all_picks(offers))
        found = pick(offers, multiplier)
        assert found.cost + multiplier * found.error == pytest.approx(best, rel=1e-12)


def test_steps_are_left_out_where_that_is_cheaper():
    offers = several()
    used = {pick(offers, multiplier).offer.cache is None for multiplier in (0.01, 0.1, 1.0, 10.0, 1000.0)}
    assert used == {True, False}
    assert pick(offers, 1e6).error == 0.0


@pytest.mark.parametrize("make", [alone, several])
@pytest.mark.parametrize("error", [0.05, 0.5, 2.0])
def test_no_plan_as_cheap_has_less_error(make, error):
    """Against brute force: what a multiplier gives for an error lies on the front of all plans."""
    offers = make(ranges=1, heads=4, candidates=4, seed=2)
    found = pick_for_error(offers, error)
    assert found.error <= error
    rivals = [one for one in all_picks(offers) if one.cost <= found.cost + 1e-12]
    assert found.error == pytest.approx(min(one.error for one in rivals))


def test_an_error_of_nothing_is_dense():
    assert pick_for_error(several(), 0.0).error == 0.0
    assert pick_for_error(several(), 0.0).offer.cache is None


def test_the_most_faithful_errs_least_of_all_that_err():
    offers = several(layers=2, heads=4, candidates=5, plain=5.0)
    found = most_faithful(offers)
    assert found.error > 0
    assert all(
        one.error == 0 or one.error >= found.error for one in (pick(offers, 2.0**n) for n in range(-9, 30))
    )


@pytest.mark.parametrize("make", [alone, several])
def test_tighter_errors_are_never_faster_and_never_worse(make):
    offers = make(layers=3, heads=5, candidates=6, plain=1.5)
    picks = [pick_for_error(offers, error) for error in (8.0, 3.0, 1.0, 0.3, 0.1, 0.0)]
    errors, costs = [one.error for one in picks], [one.cost for one in picks]
    assert errors == sorted(errors, reverse=True)
    assert costs == sorted(costs)
    assert errors[0] > errors[-1] == 0.0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_cost_is_kept_and_used(share):
    offers = several(layers=2, heads=4, candidates=5, plain=1.5)
    fastest, dense = pick(offers, 0.0).cost, dense_cost(offers[0].tables)
    cost = fastest + share * (dense - fastest)
    found = pick_for_cost(offers, cost)
    assert found.cost <= cost
    better = [pick(offers, 1.01**n) for n in range(-800, 800)]
    assert not any(one.cost <= cost and one.error < found.error - 1e-12 for one in better)


def test_a_cost_that_no_plan_has_gives_the_fastest():
    offers = several()
    assert pick_for_cost(offers, -100.0).cost == pytest.approx(pick(offers, 0.0).cost)


def test_multipliers_follow_the_scale_of_the_tables():
    t = tables(layers=2, heads=4, candidates=5)
    scaled = Tables(t.error * 1e-9, t.cost * 1e3, t.plain_cost * 1e3, t.density, t.calls, t.dense)
    found = pick_for_error([Offer(None, scaled)], 0.5e-9)
    assert torch.equal(found.choice, pick_for_error([Offer(None, t)], 0.5).choice)


def test_names_tell_plans_apart():
    offers = several()
    choice = choose(offers[0].tables, 1.0)
    names = {Pick(offer, choice).name for offer in offers}
    assert len(names) == 3
    assert Pick(offers[1], choice).name == Pick(several()[1], choice.clone()).name


@pytest.mark.parametrize(("error", "chosen"), [(1.0, 2), (0.5, 1), (0.1, 0)])
def test_steps_alone_can_be_left_out(error, chosen):
    """Where attention can only be dense, no error of its own says at what scale to look for a multiplier."""
    offers = several(candidates=1)
    assert pick_for_error(offers, error).offer is offers[chosen]
    assert most_faithful(offers).offer is offers[1]
    assert [found.offer for found in frontier(offers)] == [offers[2], offers[1], offers[0]]


def test_an_offer_that_no_multiplier_prefers_is_taken_where_the_error_allows_it():
    every, _, most = several(candidates=1)
    saved = pick([every], 0.0).cost - pick([most], 0.0).cost  # by leaving out the most
    between = Offer(most.cache, every.tables, error=0.5 * most.error, saved=0.2 * saved)
    offers = [every, between, most]
    assert all(pick(offers, 1.1**n).offer is not between for n in range(-300, 300))
    assert pick_for_error(offers, 0.6 * most.error).offer is between
    assert pick_for_error(offers, 0.4 * most.error).offer is every


def test_the_frontier_goes_from_the_fastest_plan_towards_dense():
    offers = several(ranges=3, layers=4, heads=5, candidates=7, plain=1.5)
    points = frontier(offers)
    costs, errors = [one.cost for one in points], [one.error for one in points]
    assert costs == sorted(costs)
    assert errors == sorted(errors, reverse=True)
    assert costs[0] == pytest.approx(pick(offers, 0.0).cost)
    assert len(points) > 8
    assert errors[-1] < 1e-2 * errors[0]


def test_a_frontier_without_error_is_one_plan():
    t = tables()
    t.error.zero_()
    assert [one.error for one in frontier([Offer(None, t)])] == [0.0]


class TestOffers:
    STEPS, BOUNDS, SCALE = 12, (0, 4, 12), 4.0
    PROGRESS = tuple((step / 12) ** 2 for step in range(12))
    ALIKE = torch.tensor([0.7, 0.9, 0.95], dtype=torch.float64)

    def products(self) -> tuple[StepProducts, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        time = torch.linspace(0, 1, self.STEPS, dtype=torch.float64)[:, None]
        shapes = torch.randn(3, 3, 300, generator=generator, dtype=torch.float64)
        rows = torch.cat([time**0, time, (4 * time).sin()], dim=1) @ shapes
        rows += 0.03 * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        flat = rows.flatten(0, 1)
        return StepProducts(("cond", "uncond"), self.STEPS, flat @ flat.T / 300), rows

    def offers(self, forward_ms=10.0, bounds=BOUNDS):
        t = tables(ranges=len(bounds) - 1, layers=2, heads=2)
        calls = [2.0 * (stop - start) for start, stop in itertools.pairwise(bounds)]
        t = dataclasses.replace(t, calls=torch.tensor(calls, dtype=torch.float64))
        made = offers_of(
            t,
            self.products()[0],
            bounds=bounds,
            progress=self.PROGRESS,
            guidance_scale=self.SCALE,
            alike=self.ALIKE[: len(bounds) - 1],
            forward_ms=forward_ms,
        )
        return t, made

    def test_costs_are_those_of_the_computed_forwards(self):
        t, offers = self.offers()
        assert offers[0].cache is None
        assert len(offers) > 5
        for offer in offers[1:]:
            forecasts = offer.cache.schedule.forecasts
            early = sum(step < 4 for steps in forecasts.values() for step in steps)
            late = sum(step >= 4 for steps in forecasts.values() for step in steps)
            shares = torch.tensor([1 - early / 8, 1 - late / 16], dtype=torch.float64)
            torch.testing.assert_close(offer.tables.cost, t.cost * shares[:, None])
            torch.testing.assert_close(offer.tables.plain_cost, t.plain_cost * shares)
            dense = torch.zeros(2, 2, 2, dtype=torch.int16)
            assert total_cost(offer.tables, dense) == pytest.approx(float((4 * t.plain_cost * shares).sum()))
            besides = 10.0 - 4 * t.plain_cost / t.calls
            assert offer.saved == pytest.approx(float(early * besides[0] + late * besides[1]))

    def test_attention_errs_where_forecasts_read_it(self):
        """Against running every schedule on the error of one forward at a time, and the covariance of the errors."""
        t, offers = self.offers()
        ratios = [math.log(max(p, 0.002) / (1 - max(p, 0.002))) for p in self.PROGRESS]
        alike = [float(self.ALIKE[0] if step < 4 else self.ALIKE[1]) for step in range(self.STEPS)]
        covariance = torch.zeros(2, self.STEPS, 2, self.STEPS, dtype=torch.float64)
        for (a, s), (b, u) in itertools.product(itertools.product(range(2), range(self.STEPS)), repeat=2):
            of_branches = 1.0 if a == b else (alike[s] * alike[u]) ** 0.5
            covariance[a, s, b, u] = of_branches * math.exp(-abs(ratios[s] - ratios[u]) / 1.9)

        def squared(cache) -> torch.Tensor:
            """Part of each forward in the expected square of the guided errors' weighted sum, by step."""
            moved = torch.zeros(2, self.STEPS, dtype=torch.float64)
            for branch, step in itertools.product(range(2), range(self.STEPS)):
                outputs = torch.zeros(2, self.STEPS, dtype=torch.float64)
                forecasts = {} if cache is None else cache.schedule.forecasts
                if step not in forecasts.get(NAMES[branch], {}):
                    outputs[branch, step] = 1.0
                for number, name in enumerate(NAMES[:2]):
                    for at, terms in forecasts.get(name, {}).items():
                        read = [term for term in terms if (term.branch, term.step) == (NAMES[branch], step)]
                        outputs[number, at] = sum(term.weight for term in read)
                guided = self.SCALE * outputs[0] + (1 - self.SCALE) * outputs[1]
                moved[branch, step] = sum(
                    w**0.5 * e for w, e in zip(step_weights(self.PROGRESS), guided.tolist(), strict=True)
                )
            spread = torch.einsum("as,bu,asbu->abs", moved, moved, covariance).sum((0, 1))
            alone = torch.einsum("as,bs,asbs->s", moved, moved, covariance)
            return torch.maximum(spread, alone)

        plain = squared(None)
        factors = []
        for offer in offers[1:]:
            by_step = squared(offer.cache)
            parts = slice(0, 4), slice(4, None)
            raw = [float(by_step[part].sum() / plain[part].sum()) for part in parts]
            factor = [max(one, 0.2) for one in raw]
            factors.append(raw)
            expected = t.error * torch.tensor(factor, dtype=torch.float64).view(-1, 1, 1, 1)
            torch.testing.assert_close(offer.tables.weighted, expected, rtol=1e-9, atol=0.0)
            dearest = torch.full((2, 2, 2), 2)
            assert Pick(offer, dearest).error - offer.error == pytest.approx(float(expected[..., 2].sum()))
        assert min(min(f) for f in factors) < 0.9 < 1.1 < max(max(f) for f in factors)

    def test_a_range_that_computes_nothing_stays_dense(self):
        offers = [offer for offer in self.offers(bounds=(0, 4, 7, 12))[1] if not offer.tables.calls.all()]
        assert offers
        for offer in offers:
            choice = choose(offer.tables, 1e-3)
            assert (choice[offer.tables.calls == 0] == offer.tables.dense).all()
            assert (choice != offer.tables.dense).any()

    def test_errors_are_relative_to_the_prediction(self):
        """From the outputs themselves: guided error over what guidance makes of the branches' size, by step weight."""
        _, offers = self.offers()
        rows = self.products()[1]
        weights = step_weights(self.PROGRESS)
        for offer in offers[1:]:
            previous, expected, run = 0.0, 0.0, torch.zeros(300, dtype=torch.float64)
            for step in range(self.STEPS):
                wrong = []
                for branch in range(2):
                    terms = offer.cache.schedule.forecasts[NAMES[branch]].get(step)
                    guess = (
                        0
                        if terms is None
                        else sum(t.weight * rows[NAMES.index(t.branch), t.step] for t in terms)
                    )
                    wrong.append(torch.zeros(300) if terms is None else rows[branch, step] - guess)
                guided = self.SCALE * wrong[0] + (1 - self.SCALE) * wrong[1]
                size = (self.SCALE**2 + (1 - self.SCALE) ** 2) * rows[0, step].square().mean()
                # Errors of steps in a row add up; the last step, which is computed, ends the last run.
                run = run + (weights[step] / size) ** 0.5 * guided if guided.any() else torch.zeros_like(run)
                expected += float(run.square().mean() - previous) if guided.any() else 0.0
                previous = run.square().mean()
            assert offer.error == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(("steps", "first"), [(8, 2), (24, 2), (36, 4)])
    def test_the_first_steps_are_computed(self, steps, first):
        generator = torch.Generator().manual_seed(0)
        rows = torch.linspace(1, 2, steps, dtype=torch.float64)[:, None] * torch.randn(
            300, generator=generator, dtype=torch.float64
        )
        rows = torch.cat([rows, rows])  # latents alike
        t = dataclasses.replace(tables(), calls=torch.tensor([4.0, steps - 4.0], dtype=torch.float64))
        made = offers_of(
            t,
            StepProducts(("",), steps, rows @ rows.T / 300),
            bounds=(0, 4, steps),
            progress=tuple(step / steps for step in range(steps)),
            guidance_scale=1.0,
            alike=torch.zeros(2, dtype=torch.float64),
            forward_ms=10.0,
        )
        skipped = [
            s for o in made[1:] for of_branch in o.cache.schedule.forecasts.values() for s in of_branch
        ]
        assert min(skipped) == first
        assert max(skipped) == steps - 2

    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_few_steps_have_no_schedules(self, steps):
        rows = torch.eye(3 * steps, dtype=torch.float64)
        progress = tuple(step / steps for step in range(steps))
        made = offers_of(
            tables(ranges=1),
            StepProducts(("cond", "uncond"), steps, rows),
            bounds=(0, steps),
            progress=progress,
            guidance_scale=4.0,
            alike=torch.zeros(1, dtype=torch.float64),
            forward_ms=1.0,
        )
        assert [offer.cache for offer in made] == [None]

    def test_no_products_no_schedules(self):
        t = tables()
        made = offers_of(
            t,
            None,
            bounds=(0, 1),
            progress=(0.0,),
            guidance_scale=4.0,
            alike=torch.zeros(1, dtype=torch.float64),
            forward_ms=1.0,
        )
        assert [(offer.cache, offer.error, offer.saved) for offer in made] == [(None, 0.0, 0.0)]
