"""Schedules from inner products: as good as trying them all, and as good on real outputs as they say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dit_accel import AccelPlan, disable, enable, stats
from dit_accel.calibration import caching
from dit_accel.calibration.caching import StepProducts, StepRecorder, cheapest_schedules
from dit_accel.calibration.schedule import step_weights

SCALE = 4.0


def trajectory(steps, branches=2, values=400, seed=0):
    """Smooth random outputs [branches, steps, values] and latents [steps, values]."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    shapes = torch.randn(branches + 1, 4, values, generator=generator, dtype=torch.float64)
    curves = torch.cat([time**0, time, (3 * time).sin(), (7 * time).cos()], dim=1)
    outputs = curves @ shapes
    outputs[1:branches] = 0.8 * outputs[0] + 0.3 * outputs[1:branches]
    noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    return (outputs + 0.05 * noise)[:branches], outputs[branches]


def products_of(outputs, latents):
    rows = torch.cat([outputs.flatten(0, 1), latents])
    names = ("cond", "uncond")[: len(outputs)]
    return StepProducts(names, len(latents), rows @ rows.T / rows.shape[1])


def weights_of(steps):
    return [(0.02 + 0.18 * step / steps) ** 2 for step in range(steps)]


def error_of(config, outputs, latents, weights):
    """What the schedule leaves, from the outputs themselves."""
    names = [*("cond", "uncond")[: len(outputs)], "latents"]
    rows = torch.cat([outputs, latents[None]])
    runs = [torch.zeros(latents.shape[1], dtype=torch.float64)]
    for step in range(len(latents)):
        wrong = [torch.zeros(latents.shape[1], dtype=torch.float64) for _ in outputs]
        for branch in range(len(outputs)):
            terms = config.schedule.forecasts[names[branch]].get(step)
            if terms is not None:
                guess = sum(term.weight * rows[names.index(term.branch), term.step] for term in terms)
                wrong[branch] = outputs[branch, step] - guess
        guided = wrong[0] if len(wrong) == 1 else wrong[1] + SCALE * (wrong[0] - wrong[1])
        if guided.any():
            runs[-1] = runs[-1] + weights[step] ** 0.5 * guided
        else:
            runs.append(torch.zeros_like(guided))
    return sum(float(run.square().mean()) for run in runs)


@pytest.mark.parametrize("branches", [1, 2])
def test_errors_are_those_of_the_outputs(branches):
    outputs, latents = trajectory(9, branches)
    products = products_of(outputs, latents)
    choices = cheapest_schedules(products, guidance_scale=SCALE, weights=weights_of(9))
    assert len(choices) >= 5
    for choice in choices:
        expected = error_of(choice.config, outputs, latents, weights_of(9))
        assert choice.error == pytest.approx(expected, rel=1e-6, abs=1e-12)
        skipped = sum(len(steps) for steps in choice.config.schedule.forecasts.values())
        assert choice.computed + skipped == 9 * branches


@pytest.mark.parametrize(
    ("branches", "steps", "gap", "single", "cool_down"), [(1, 7, 2, 1, 1), (1, 7, 8, 2, 2), (2, 6, 8, 2, 1),
                                                          (2, 8, 3, 1, 1), (2, 8, 4, 2, 2)]
)  # fmt: skip
def test_no_schedule_is_better(branches, steps, gap, single, cool_down, monkeypatch):
    """All sequences of actions, with the weights solved from the outputs by a general least-squares routine."""
    monkeypatch.setattr(caching, "LONGEST_GAP", gap)
    monkeypatch.setattr(caching, "_MOST_SINGLE", single)
    outputs, latents = trajectory(steps, branches, seed=3)
    products = products_of(outputs, latents)
    choices = {
        c.computed: c.error
        for c in cheapest_schedules(
            products, guidance_scale=SCALE, weights=weights_of(steps), cool_down=cool_down
        )
    }
    best = {}
    for free in itertools.product(range(branches + 1), repeat=steps - 2 - cool_down):
        actions = (branches, branches, *free, *[branches] * cool_down)
        skipping = [list(run) for full, run in itertools.groupby(free, lambda a: a == branches) if not full]
        if any(len(run) > gap or single < sum(run) < len(run) for run in skipping):
            continue
        runs, history = [0.0], [[] for _ in range(branches)]
        for step, action in enumerate(actions):
            if action < branches:
                wrong = least_error(outputs, latents, history, step, action)
                runs[-1] = runs[-1] + weights_of(steps)[step] ** 0.5 * wrong
            else:
                runs.append(0.0)
            for branch in range(action):
                history[branch] = [step, *history[branch]][:2]
        computed, error = sum(actions), sum(float(torch.as_tensor(run).square().mean()) for run in runs)
        best[computed] = min(best.get(computed, float("inf")), error)
    for computed, error in choices.items():
        assert error == pytest.approx(best[computed], rel=1e-5, abs=1e-12)
    frontier = [
        c for c in sorted(best) if best[c] < min((best[d] for d in best if d < c), default=float("inf"))
    ]
    assert list(choices) == frontier


def least_error(outputs, latents, history, step, action):
    """The guided output's error with the weights of the least-squares problem, [values]."""
    branches, values = len(outputs), latents.shape[1]
    known = [outputs[b, step] for b in range(action)] + [
        outputs[b, s] for b in range(branches) for s in history[b]
    ]
    basis = torch.stack([*known, latents[step]], dim=1) / values**0.5
    missing = range(action, branches)
    factors = [SCALE, 1 - SCALE][action:] if branches == 2 else [1.0]
    ridge = (caching._RIDGE * basis.square().sum() / basis.shape[1]) ** 0.5
    size = basis.shape[1]
    blocks = [torch.cat([f * basis for f in factors], dim=1)]
    rights = [sum(f * outputs[b, step] for f, b in zip(factors, missing, strict=True)) / values**0.5]
    for i, b in enumerate(missing):
        row = torch.zeros(values, size * len(factors), dtype=torch.float64)
        row[:, i * size : (i + 1) * size] = caching._FIDELITY**0.5 * basis
        blocks.append(row)
        rights.append(caching._FIDELITY**0.5 * outputs[b, step] / values**0.5)
    blocks.append(ridge * torch.eye(size * len(factors), dtype=torch.float64))
    rights.append(torch.zeros(size * len(factors), dtype=torch.float64))
    weights = torch.linalg.lstsq(torch.cat(blocks), torch.cat(rights)[:, None]).solution[:, 0]
    return (rights[0] - blocks[0] @ weights) * values**0.5


def test_constant_outputs_cost_nothing():
    outputs = torch.randn(2, 1, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    products = products_of(outputs.expand(2, 12, 200), torch.zeros(12, 200, dtype=torch.float64))
    cheapest = cheapest_schedules(products, guidance_scale=SCALE, weights=[1e-2] * 12)[0]
    # two at the start, one at the end, and one before the longest gap is over
    assert cheapest.computed == 2 * 4
    assert cheapest.error < 1e-6


def test_weights_move_the_skips():
    outputs, latents = trajectory(12, seed=5)
    products = products_of(outputs, latents)
    early = cheapest_schedules(products, guidance_scale=SCALE, weights=[1e-6] * 6 + [1.0] * 6)
    late = cheapest_schedules(products, guidance_scale=SCALE, weights=[1.0] * 6 + [1e-6] * 6)

    def skipped(choices):
        return next(c for c in choices if c.computed == 16).config.schedule.forecasts["cond"]

    assert max(skipped(early)) < 6 <= min(skipped(late))


def test_what_else_a_forward_was_used_for_does_not_count(wan_pipeline):
    pipe = wan_pipeline()
    recorder = StepRecorder({pipe.transformer: lambda: ""}, spent=itertools.count(0.0, 100.0).__next__)
    pipe.latents(steps=3)
    recorder.remove()
    assert -100_000 < recorder.forward_ms < -99_000  # 100 seconds in each


def test_of_a_batch_that_holds_both_branches_the_guided_output_counts(tiny):
    model, scale, seen = tiny("ltx"), 3.0, []
    recorder = StepRecorder(
        {model.transformer: lambda: "cond_uncond"}, paired=lambda: True, guidance_scale=scale
    )
    for timestep in (900.0, 500.0, 100.0):
        inputs = model.inputs(timestep=timestep)
        inputs["hidden_states"] = inputs["hidden_states"][:1].repeat(2, 1, 1)
        seen.append((inputs["hidden_states"][1], *model.run(inputs)))
    recorder.remove()
    products = recorder.products(3)
    guided = [uncond + scale * (cond - uncond) for _, uncond, cond in seen]
    rows = torch.stack([row.flatten() for row in (*guided, *(latents for latents, *_ in seen))]).double()
    torch.testing.assert_close(products.gram, rows @ rows.T / rows.shape[1], rtol=1e-5, atol=1e-6)
    assert products.combination(scale) == (1.0,)
    sizes = torch.stack([cond.double().square().mean() for *_, cond in seen])
    torch.testing.assert_close((products + products).unit(scale), 2 * 13 * sizes, rtol=1e-5, atol=0)
    # Where each branch has forwards of its own, the unit is the same.
    alone = StepProducts(
        ("cond", "uncond"), 1, torch.diag(torch.tensor([2.0, 7.0, 1.0], dtype=torch.float64))
    )
    assert alone.unit(scale).tolist() == [13 * 2.0]


def test_recorded_products_and_a_run(wan_pipeline):
    pipe = wan_pipeline()
    branch = itertools.cycle(("cond", "uncond"))
    recorder = StepRecorder({pipe.transformer: lambda: next(branch)})
    seen = []
    handle = pipe.transformer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs["hidden_states"].clone(), out[0].clone())),
        with_kwargs=True,
    )
    expected = pipe.latents(steps=14)
    for hook in (recorder, handle):
        hook.remove()
    assert recorder.products(13) is None
    assert recorder.forward_ms > 0
    products = recorder.products(14)
    rows = [o for _, o in seen[0::2]] + [o for _, o in seen[1::2]] + [x for x, _ in seen[0::2]]
    rows = torch.stack([row.flatten() for row in rows]).double()
    torch.testing.assert_close(products.gram, rows @ rows.T / rows.shape[1], rtol=1e-5, atol=1e-6)
    both = products + products
    torch.testing.assert_close(both.gram, 2 * products.gram)
    weights = step_weights((1 - pipe.scheduler.sigmas[:-1]).tolist())
    choices = cheapest_schedules(products, guidance_scale=4.0, weights=weights)
    errors = []
    for choice in choices[:: len(choices) // 4]:
        plan = dataclasses.replace(AccelPlan.preset("dense"), cache=choice.config)
        enable(pipe, plan)
        errors.append(float((pipe.latents(steps=14) - expected).square().mean()))
        assert stats(pipe)["computed_forwards"] == choice.computed
        disable(pipe)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_refusals():
    outputs, latents = trajectory(8)
    products = products_of(outputs, latents)
    for options, message in (
        ({"warm_up": 1}, "expected at least 2 and 1, 8 steps in all, got 1 and 1"),
        ({"cool_down": 7}, "got 2 and 7"),
        ({"weights": [1.0] * 3}, "weights: expected 8 numbers, one for each step, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            cheapest_schedules(products, **{"guidance_scale": SCALE, "weights": weights_of(8), **options})
    with pytest.raises(ValueError, match="expected generations alike"):
        products + products_of(*trajectory(9))
