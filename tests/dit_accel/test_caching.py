"""Feature caching: nothing changes at threshold 0, forecasts are exact where they can be, and skips are real."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FirstBlockCacheConfig,
    MagCacheConfig,
    WanTransformer3DModel,
)

from dit_accel import AccelPlan, TokenGrid, disable, enable, stats
from dit_accel.caching import CACHES, CacheConfig, Schedule, StepCache, Term, cache_bytes, cache_preset
from dit_accel.caching.config import GATES
from dit_accel.caching.forecast import History, polynomial_weights, weighted_sum
from dit_accel.caching.gates import ConfidenceGatedTaylor, FirstBlock, TeaCache, polynomial_fit
from dit_accel.pipelines import family_of
from dit_accel.switch import attn_processors, states

STEPS = 12
# Every gate, at a size that fits two blocks and few steps.
SMALL = {
    "cg-taylor": {"warm_up": 2},
    "dbcache": {"warm_up": 2, "first_blocks": 1},
    "easycache": {"warm_up": 2},
    "first-block": {},
    "magcache": {"warm_up": 2, "curve": tuple(1.0 - 0.01 * i for i in range(STEPS))},
    "taylorseer": {"warm_up": 2, "max_skips": 2},
    "teacache": {},
}


def cached(name, **fields):
    config = cache_preset(name, **{**SMALL[name], **fields})
    return dataclasses.replace(AccelPlan.preset("dense"), cache=config)


def count_blocks(transformer):
    """Counts blocks that really ran: a list with one number per block, kept up to date."""
    # Caches of diffusers skip inside a block's forward, so what a block calls is counted.
    blocks = family_of(transformer).attention_modules(transformer).values()
    calls = [0] * len(blocks)

    def hook(number):
        def count(*_):
            calls[number] += 1

        return count

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(hook(number))
    return calls


def drive(tiny, config, *, steps=STEPS, vary=True):
    """Runs a bare transformer step by step under a cache; returns outputs, counts and the most bytes held."""
    cache = StepCache(tiny.transformer, family_of(tiny.transformer), config)
    memory, outputs = {}, []
    remove = cache.install()
    try:
        for step in range(steps):
            inputs = tiny.inputs(timestep=1000.0 - 50.0 * step if vary else 500.0)
            cache.begin(inputs["hidden_states"], step, steps, "", memory)
            with torch.no_grad():
                output = tiny.transformer(**inputs, return_dict=False)
            replaced = cache.end(output)
            outputs.append((output if replaced is None else replaced)[0])
    finally:
        remove()
    return outputs, cache.counts(memory), cache.bytes(memory)


class TestForecast:
    @pytest.mark.parametrize("order", range(4))
    def test_polynomials_of_the_order_are_continued_exactly(self, order):
        generator = torch.Generator().manual_seed(order)
        coefficients = torch.randn(order + 1, 3, 5, generator=generator, dtype=torch.float64)

        def value(step):
            return sum(c * (step / 10) ** power for power, c in enumerate(coefficients))

        history = History(order + 1)
        for step in (0, 1, 4, 5, 9):  # uneven on purpose
            history.push(step, (value(step), 2 * value(step)))
        one, two = history.forecast(12)
        torch.testing.assert_close(one, value(12), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(two, 2 * value(12), rtol=1e-9, atol=1e-9)
        assert len(history.steps) == order + 1
        assert history.bytes == (order + 1) * 2 * 15 * 8

    def test_weights_are_lagranges(self):
        steps = [2, 5, 6]
        expected = np.polyval(np.polyfit(steps, [1.0, -2.0, 4.0], 2), 9)
        weights = polynomial_weights(steps, 9)
        assert np.isclose(np.dot(weights, [1.0, -2.0, 4.0]), expected)
        assert np.isclose(sum(weights), 1.0)

    def test_sums_are_made_in_float32(self):
        values = [torch.full((3,), 256.0, dtype=torch.bfloat16), torch.full((3,), 1.0, dtype=torch.bfloat16)]
        # 256 + 1 - 256 is 0 in bfloat16
        total = weighted_sum([*values, values[0]], [1.0, 1.0, -1.0])
        assert total.dtype == torch.bfloat16
        assert total.tolist() == [1.0] * 3

    def test_one_value_is_returned_as_it_is(self):
        value = torch.randn(4)
        history = History(1)
        history.push(3, (value,))
        assert history.forecast(7)[0] is value

    def test_polynomial_fit_finds_a_polynomial(self):
        changes = [0.1 * i for i in range(12)]
        outcomes = [0.5 * c**3 - c + 0.25 for c in changes]
        assert np.allclose(polynomial_fit(changes, outcomes, degree=3), (0.5, 0.0, -1.0, 0.25), atol=1e-9)


class TestExactness:
    @pytest.mark.parametrize("name", [name for name in CACHES if name != "taylorseer"])
    def test_threshold_zero_is_bit_identical(self, wan_pipeline, name):
        pipe = wan_pipeline()
        expected = pipe.latents(steps=STEPS)
        enable(pipe, cached(name, threshold=0.0))
        assert torch.equal(pipe.latents(steps=STEPS), expected)
        report = stats(pipe)
        assert report["skipped_forwards"] == report["skipped_blocks"] == 0
        assert report["computed_forwards"] == 2 * STEPS
        disable(pipe)
        assert torch.equal(pipe.latents(steps=STEPS), expected)

    def test_all_compute_schedule_is_bit_identical(self, wan_pipeline):
        pipe = wan_pipeline()
        expected = pipe.latents(steps=STEPS)
        config = CacheConfig("schedule", target="output", schedule=Schedule(STEPS, {}))
        enable(pipe, dataclasses.replace(AccelPlan.preset("dense"), cache=config))
        assert torch.equal(pipe.latents(steps=STEPS), expected)

    @pytest.mark.parametrize("name", CACHES)
    def test_few_steps_are_left_alone(self, wan_pipeline, name):
        pipe = wan_pipeline()
        expected = pipe.latents(steps=8)
        enable(pipe, cached(name, threshold=1e6))
        assert torch.equal(pipe.latents(steps=8), expected)
        disable(pipe)
        enable(pipe, cached(name, threshold=1e6, min_steps=5))
        assert not torch.equal(pipe.latents(steps=8), expected)

    @pytest.mark.parametrize(
        "config",
        [
            CacheConfig("always"),
            CacheConfig("always", order=2, residual=True),
            CacheConfig("always", first_blocks=1, residual=True),
            CacheConfig("always", last_blocks=1, order=1),
            CacheConfig("always", target="output", residual=True),
            CacheConfig("always", target="output", order=1, first_blocks=1),
            CacheConfig("cg-taylor", threshold=9.0, first_blocks=1, order=1, warm_up=3),
            CacheConfig("first-block", threshold=9.0, first_blocks=1, residual=True),
            CacheConfig("teacache", threshold=9.0, residual=True, polynomial=(1.0, 0.0)),
            CacheConfig("easycache", threshold=9.0, residual=True, target="output", warm_up=3),
        ],
        ids=lambda config: (
            f"{config.gate}-{config.target}-{config.first_blocks}{config.last_blocks}{config.residual}"
        ),
    )
    def test_equal_steps_are_forecast_exactly(self, any_tiny, config):
        """Where nothing changes from step to step, every forecast is right, whatever it is made of."""
        plain = any_tiny.run(timestep=500.0)
        outputs, counts, _ = drive(any_tiny, config, vary=False)
        assert counts.skipped_forwards >= 6
        band = 64 * torch.finfo(torch.float32).eps * plain.abs().max()
        for output in outputs:
            assert (output - plain).abs().max() <= band

    def test_a_residual_is_added_once(self, tiny):
        """One block left out: the output is that of the head, plus what the block added at the last computed step."""
        model = tiny("wan")
        config = CacheConfig("always", first_blocks=1, residual=True, max_skips=1, min_steps=2)
        seen = []
        handle = model.transformer.norm_out.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].clone())
        )
        drive(model, config, steps=4)
        handle.remove()
        blocks = model.transformer.blocks
        ins, outs = [], []
        blocks[1].register_forward_pre_hook(lambda _, args: ins.append(args[0].clone()))
        blocks[1].register_forward_hook(lambda *a: outs.append(a[2].clone()))
        for step in range(4):
            model.run(timestep=1000.0 - 50.0 * step)
        # steps 0, 2 and 3 are computed (3 is the last), 1 is not
        torch.testing.assert_close(seen[1], ins[1] + (outs[0] - ins[0]))
        torch.testing.assert_close(seen[2], outs[2])
        torch.testing.assert_close(seen[3], outs[3])


class TestSkips:
    @pytest.mark.parametrize(("max_skips", "warm_up"), [(1, 3), (2, 3), (3, 0.3)])
    def test_counts_are_those_of_the_blocks(self, any_tiny, max_skips, warm_up):
        calls = count_blocks(any_tiny.transformer)
        config = CacheConfig("always", max_skips=max_skips, warm_up=warm_up, cool_down=2)
        _, counts, _ = drive(any_tiny, config)
        expected = [
            step < 3 or step >= STEPS - 2 or (step - 3) % (max_skips + 1) == max_skips
            for step in range(STEPS)
        ]
        assert calls == [sum(expected)] * len(calls)
        assert counts.computed_forwards == sum(expected)
        assert counts.computed_blocks == sum(calls)
        assert counts.computed_blocks + counts.skipped_blocks == STEPS * len(calls)

    def test_head_and_tail_always_run(self, tiny):
        for name in ("wan", "flux", "hunyuan_video"):
            model = tiny(name, layers=4)
            calls = count_blocks(model.transformer)
            drive(model, CacheConfig("always", first_blocks=1, last_blocks=1, residual=True))
            assert calls[0] == calls[-1] == STEPS
            assert set(calls[1:-1]) == {4}

    def test_both_branches_follow_one_decision(self, wan_pipeline):
        pipe = wan_pipeline()
        calls = count_blocks(pipe.transformer)
        enable(pipe, cached("cg-taylor", threshold=0.5))
        pipe.latents(steps=STEPS)
        report = stats(pipe)
        assert report["skipped_forwards"] > 0
        assert report["skipped_forwards"] % 2 == 0
        assert sum(calls) == report["computed_blocks"]
        # the head runs for the branch that decides, and nowhere else in a skipped step
        assert calls[0] - calls[1] == report["skipped_forwards"] // 2

    def test_order_of_the_branches_changes_nothing(self, wan_pipeline):
        """A schedule keeps the branches apart: swap the prompts and the forecasts, and the latents are the same."""
        forecasts = {
            "cond": {4: (Term("cond", 3, 1.5), Term("cond", 2, -0.5)), 6: (Term("cond", 5, 1.0),)},
            "uncond": {6: (Term("uncond", 5, 0.9), Term("latents", 6, 0.1))},
        }
        swapped = {
            "cond": {6: (Term("cond", 5, 0.9), Term("latents", 6, 0.1))},
            "uncond": {4: (Term("uncond", 3, 1.5), Term("uncond", 2, -0.5)), 6: (Term("uncond", 5, 1.0),)},
        }
        latents = []
        for scale, table in ((4.0, forecasts), (-3.0, swapped)):
            pipe = wan_pipeline()
            enable(pipe, scheduled(table))
            generator = torch.Generator().manual_seed(1)
            prompt, negative = torch.randn(2, 1, 5, 12, generator=generator)
            prompts = (prompt, negative) if scale > 0 else (negative, prompt)
            latents.append(raw(pipe, *prompts, scale))
            assert stats(pipe)["skipped_forwards"] == 3
        # uncond + 4 (cond - uncond) = cond - 3 (uncond - cond)
        torch.testing.assert_close(latents[0], latents[1], rtol=1e-4, atol=1e-4)

    def test_forecasts_of_a_schedule_are_the_sums_it_says(self, wan_pipeline):
        pipe = wan_pipeline()
        terms = (Term("cond", 4, 1.25), Term("cond", 2, -0.5), Term("latents", 5, 0.125))
        enable(
            pipe,
            scheduled({"cond": {5: terms}, "uncond": {5: (Term("cond", 4, 0.5), Term("uncond", 4, 0.5))}}),
        )
        seen = []
        pipe.transformer.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((kwargs["hidden_states"].clone(), out[0].clone())),
            with_kwargs=True,
        )
        pipe.latents(steps=STEPS)
        cond, uncond = seen[0::2], seen[1::2]
        expected = 1.25 * cond[4][1] - 0.5 * cond[2][1] + 0.125 * cond[5][0]
        torch.testing.assert_close(cond[5][1], expected)
        torch.testing.assert_close(uncond[5][1], 0.5 * cond[4][1] + 0.5 * uncond[4][1])
        # three outputs are kept: cond 2, cond 4 and uncond 4
        assert stats(pipe)["cache_bytes"] == 3 * cond[4][1].numel() * 4

    @pytest.mark.parametrize("branches", [("cond", "uncond"), ("turn 1",)])
    def test_a_schedule_that_skips_nothing_says_so_once(self, wan_pipeline, branches):
        pipe = wan_pipeline()
        # What nobody computes cannot be waited for; and branches that this pipeline does not have.
        table = {b: {5: (Term("image", 4, 1.0),)} for b in branches}
        enable(pipe, scheduled(table))
        with pytest.warns(
            UserWarning, match=f"left out no step: it was made for .*'{branches[0]}'.*ends with"
        ):
            pipe.latents(steps=STEPS)
        pipe.latents(steps=STEPS)  # a warning would be an error here
        assert stats(pipe)["skipped_forwards"] == 0

    def test_uncond_may_read_cond_of_the_same_step(self, wan_pipeline):
        pipe = wan_pipeline()
        enable(pipe, scheduled({"uncond": {s: (Term("cond", s, 1.0),) for s in range(3, 9)}}))
        pipe.latents(steps=STEPS)
        assert stats(pipe)["skipped_forwards"] == 6

    @pytest.mark.parametrize("steps", [18, 36, 40])
    def test_a_schedule_serves_other_step_counts(self, wan_pipeline, steps):
        schedule = Schedule(
            18, {b: {s: (Term(b, s - 1, 1.0),) for s in (6, 9, 12)} for b in ("cond", "uncond")}
        )
        assert [s for s in range(18) if schedule.skips("cond", s, 18)] == [6, 9, 12]
        pipe = wan_pipeline()
        enable(pipe, dataclasses.replace(AccelPlan.preset("dense"), cache=CacheConfig(
            "schedule", target="output", schedule=schedule)))  # fmt: skip
        assert bool(pipe.latents(steps=steps).isfinite().all())
        share = stats(pipe)["skipped_forwards"] / (2 * steps)
        assert abs(share - 3 / 18) < 0.03

    def test_at_fewer_steps_no_more_is_left_out_in_a_row(self, wan_pipeline):
        """Of 50 steps one in five is computed; 12 steps fall where the schedule leaves out all in a row."""
        computed = {*range(10), *range(14, 50, 5)}
        left_out = {s: max(c for c in computed if c < s) for s in range(50) if s not in computed}
        schedule = Schedule(
            50, {b: {s: (Term(b, c, 1.0),) for s, c in left_out.items()} for b in ("cond", "uncond")}
        )
        assert [schedule.reach("cond", step) for step in (9, 10, 12, 13, 14)] == [0, 4, 4, 4, 0]
        assert all(schedule.skips("cond", step, 12) for step in range(3, 11))
        pipe = wan_pipeline()
        enable(pipe, dataclasses.replace(AccelPlan.preset("dense"), cache=CacheConfig(
            "schedule", target="output", schedule=schedule)))  # fmt: skip
        calls, ran = count_blocks(pipe.transformer), []
        pipe.transformer.register_forward_hook(lambda *_: ran.append(calls[0]))
        pipe.latents(steps=12)
        skipped = [now == before for before, now in itertools.pairwise([0, *ran])][::2]
        assert skipped == [step in (3, 5, 7, 9) for step in range(12)]
        assert stats(pipe)["skipped_forwards"] == 2 * sum(skipped)

    def test_two_experts_have_a_cache_each(self, wan_pipeline):
        pipe = wan_pipeline(experts=2)
        calls = count_blocks(pipe.transformer), count_blocks(pipe.transformer_2)
        enable(pipe, cached("taylorseer", max_skips=1, warm_up=1))
        pipe.latents(steps=16)
        first, second = (found[0] // 2 for found in calls)
        experts = [count for count in (first, second) if count]
        assert len(experts) == 2
        report = stats(pipe)
        assert report["computed_forwards"] + report["skipped_forwards"] == 32
        assert report["computed_forwards"] == 2 * (first + second)
        # the second expert has no history when it takes over, so its first step is computed
        assert second >= 2

    def test_a_schedule_reads_what_the_first_expert_computed(self, wan_pipeline):
        pipe = wan_pipeline(experts=2)
        firsts = []
        enable(pipe, scheduled({}))
        handle = pipe.transformer_2.register_forward_pre_hook(
            lambda *_: firsts.append(states(pipe)[1].here.first_step)
        )
        pipe.latents(steps=STEPS)
        handle.remove()
        disable(pipe)
        (first,) = {step for step in firsts if step is not None}
        table = {
            b: {
                first: (Term(b, first - 1, 1.5), Term(b, first - 2, -0.5)),
                first + 2: (Term(b, first - 1, 1.0),),
            }
            for b in ("cond", "uncond")
        }
        enable(pipe, scheduled(table))
        assert bool(pipe.latents(steps=STEPS).isfinite().all())
        report = stats(pipe)
        assert report["skipped_forwards"] == 4
        assert report["computed_forwards"] == 2 * STEPS - 4
        assert report["cache_bytes"] == 4 * 4 * 3 * 10 * 14 * 4  # two steps of two branches

    def test_at_more_steps_the_points_of_a_line_stay_a_step_of_the_schedule_apart(self, wan_pipeline):
        schedule = Schedule(
            12, {b: {6: (Term(b, 5, 1.0),), 7: (Term(b, 5, 1.0),)} for b in ("cond", "uncond")}
        )
        pipe = wan_pipeline()
        config = CacheConfig("schedule", target="output", schedule=schedule)
        enable(pipe, dataclasses.replace(AccelPlan.preset("dense"), cache=config))
        seen = []

        def look(_pipe, step, _timestep, tensors):
            histories = states(pipe)[0].memory["cache"].histories
            seen.extend(history.steps for history in histories.values() if len(history.steps) == 2)
            return {}

        pipe.latents(steps=48, callback_on_step_end=look)
        apart = {schedule.nearest(b, 48) - schedule.nearest(a, 48) for a, b in seen}
        assert min(apart) == 1
        assert len(seen) > 60
        assert stats(pipe)["skipped_forwards"] == pytest.approx(2 * 48 * 2 / 12, abs=2)

    def test_at_fewer_steps_each_branch_keeps_to_its_own_runs(self, wan_pipeline):
        """The first branch leaves out every other step, the second many in a row; half the steps meet only those."""
        cond = {s: (Term("cond", s - 1, 1.0),) for s in range(6, 22, 2)}
        uncond = {s: (Term("uncond", 5, 1.0),) for s in range(6, 14)}
        schedule = Schedule(24, {"cond": cond, "uncond": uncond})
        assert all(schedule.skips("cond", step, 12) for step in range(3, 6))
        pipe = wan_pipeline()
        config = CacheConfig("schedule", target="output", schedule=schedule)
        enable(pipe, dataclasses.replace(AccelPlan.preset("dense"), cache=config))
        calls, ran = count_blocks(pipe.transformer), []
        pipe.transformer.register_forward_hook(lambda *_: ran.append(calls[0]))
        pipe.latents(steps=12)
        skipped = [now == before for before, now in itertools.pairwise([0, *ran])]
        assert not any(skipped[::2])
        assert sum(skipped[1::2]) >= 3

    def test_at_more_steps_a_line_ends_soon(self, wan_pipeline):
        table = {b: {s: (Term(b, 3, 1.0),) for s in range(4, 10)} for b in ("cond", "uncond")}
        schedule = Schedule(12, table)
        pipe = wan_pipeline()
        config = CacheConfig("schedule", target="output", schedule=schedule)
        enable(pipe, dataclasses.replace(AccelPlan.preset("dense"), cache=config))
        seen = []
        pipe.transformer.register_forward_hook(lambda _, __, out: seen.append(out[0].clone()))
        pipe.latents(steps=36)
        cond = seen[0::2]
        skipped = [step for step in range(36) if schedule.skips("cond", step, 36)]
        assert len(skipped) == 19
        last = skipped[0] - 1
        before = max(step for step in range(last) if schedule.nearest(step, 36) == 2)
        assert schedule.nearest(last, 36) == 3
        for step in skipped:
            share = min(step - last, 2 * (last - before)) / (last - before)
            torch.testing.assert_close(cond[step], cond[last] + share * (cond[last] - cond[before]))

    @pytest.mark.parametrize("name", ["controlnet_block_samples", "controlnet_single_block_samples"])
    def test_blocks_that_a_controlnet_counts_are_not_skipped(self, tiny, name):
        transformer = tiny("flux").transformer
        family = family_of(transformer)
        blocks = StepCache(transformer, family, cache_preset("taylorseer", target="blocks"))
        with pytest.raises(ValueError, match=f"cache: expected no {name} for the target 'blocks'"):
            blocks.check({name: [torch.zeros(1)]})
        blocks.check({name: None})
        StepCache(transformer, family, cache_preset("easycache")).check({name: [1]})


def scheduled(table, steps=STEPS):
    config = CacheConfig("schedule", target="output", schedule=Schedule(steps, table))
    return dataclasses.replace(AccelPlan.preset("dense"), cache=config)


def raw(pipe, prompt, negative, scale):
    """Latents of a guided generation with any guidance scale; pipelines switch guidance off at 1 and below."""
    pipe.scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 3, 10, 14, generator=torch.Generator().manual_seed(5))
    pipe.transformer._reset_stateful_cache()
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            outputs = {}
            for branch, text in (("cond", prompt), ("uncond", negative)):
                with pipe.transformer.cache_context(branch):
                    outputs[branch] = pipe.transformer(
                        latents, t.expand(1), text[None] if text.ndim == 2 else text, return_dict=False
                    )[0]
            guided = outputs["uncond"] + scale * (outputs["cond"] - outputs["uncond"])
            latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


FIRST_BLOCK = (0.4, 0.7, 1.0)


class TestPublished:
    """The same generation by diffusers' own caches, which know no warm-up, cool-down or limit."""

    def theirs(self, wan_pipeline, config):
        pipe = wan_pipeline(layers=3)
        calls = count_blocks(pipe.transformer)
        pipe.transformer.enable_cache(config)
        return pipe.latents(steps=STEPS, guidance_scale=1.0), calls

    def ours(self, wan_pipeline, config):
        pipe = wan_pipeline(layers=3)
        calls = count_blocks(pipe.transformer)
        enable(pipe, dataclasses.replace(AccelPlan.preset("dense"), cache=config))
        return pipe.latents(steps=STEPS, guidance_scale=1.0), calls

    @pytest.mark.parametrize("threshold", FIRST_BLOCK)
    def test_first_block(self, wan_pipeline, threshold):
        expected, their_calls = self.theirs(wan_pipeline, FirstBlockCacheConfig(threshold=threshold))
        latents, calls = self.ours(
            wan_pipeline,
            CacheConfig("first-block", threshold, residual=True, first_blocks=1, max_skips=99),
        )
        skipped_last = their_calls[-1] != calls[-1]  # we compute the last step whatever the gate says
        assert their_calls[0] == calls[0] == STEPS
        assert calls[-1] - their_calls[-1] in (0, 1)
        if not skipped_last:
            torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)

    def test_first_block_thresholds_cover_both_cases(self, wan_pipeline):
        counts = [self.theirs(wan_pipeline, FirstBlockCacheConfig(threshold=t))[1][-1] for t in FIRST_BLOCK]
        assert STEPS == counts[0] > counts[1] > counts[2]

    def test_magcache(self, wan_pipeline):
        curve = [1.0, 0.99, 0.98, 0.97, 0.99, 0.95, 0.97, 0.96, 0.95, 0.97, 0.9, 0.7]
        theirs = MagCacheConfig(
            threshold=0.1, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=curve
        )
        expected, their_calls = self.theirs(wan_pipeline, theirs)
        latents, calls = self.ours(
            wan_pipeline,
            CacheConfig("magcache", 0.1, residual=True, warm_up=2, max_skips=2, curve=tuple(curve)),
        )
        assert calls[-1] == their_calls[-1] < STEPS
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


class TestMemory:
    @pytest.mark.parametrize(
        ("name", "last_blocks"), [(n, b) for n in CACHES for b in ((0,) if n == "easycache" else (0, 1))]
    )
    def test_told_before_a_run(self, any_tiny, tiny, name, last_blocks):
        fields = SMALL[name] | {"first_blocks": min(cached(name).cache.first_blocks, 1)}
        config = dataclasses.replace(cache_preset(name, **fields), last_blocks=last_blocks)
        # A threshold that any signal stays below: one step in three is computed.
        config = dataclasses.replace(config, threshold=1e9, warm_up=4, max_skips=2)
        model = tiny(any_tiny.name, layers=4)
        family = family_of(model.transformer)
        grid = family.read_grid(model.transformer, family.bind(model.transformer, (), model.inputs()))
        _, counts, held = drive(model, config)
        assert counts.skipped_forwards > 0
        told = cache_bytes(model.transformer, config, grid, batch=2, branches=1)
        if (name, model.name) == ("teacache", "wan"):
            assert 0 < held <= told
        else:
            assert held == told

    @pytest.mark.parametrize("name", ["easycache", "cg-taylor"])
    @pytest.mark.parametrize("model", ["image-to-video", "frames-in-patches"])
    def test_told_where_input_and_output_differ_in_size(self, name, model):
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "out_channels": 4}
        if model == "image-to-video":
            transformer = WanTransformer3DModel(
                **sizes, in_channels=9, text_dim=12, freq_dim=16, ffn_dim=32, rope_max_seq_len=32
            )
            latents = torch.randn(1, 9, 3, 10, 14)
        else:
            transformer = CogVideoXTransformer3DModel(
                **sizes, in_channels=6, text_embed_dim=12, time_embed_dim=8, patch_size_t=2, sample_frames=4,
                sample_height=10, sample_width=14, temporal_compression_ratio=1,
                use_rotary_positional_embeddings=True, max_text_seq_length=5,
            )  # fmt: skip
            latents = torch.randn(1, 4, 6, 10, 14)
        inputs = {
            "hidden_states": latents,
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 5, 12),
        }
        if model == "frames-in-patches":
            angles = torch.randn(2 * 5 * 7, 16)
            inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
        config = cache_preset(name, threshold=1e9, warm_up=4)
        family = family_of(transformer)
        cache, memory = StepCache(transformer, family, config), {}
        remove = cache.install()
        for step in range(STEPS):
            cache.begin(latents if step < 6 else latents + 0.01 * step, step, STEPS, "", memory)
            with torch.no_grad():
                cache.end(transformer(**inputs, return_dict=False))
        remove()
        assert cache.counts(memory).skipped_forwards > 0
        grid = family.read_grid(transformer, family.bind(transformer, (), inputs))
        assert cache.bytes(memory) == cache_bytes(transformer, config, grid, branches=1)

    def test_of_an_unsupported_transformer(self):
        with pytest.raises(ValueError, match="expected one of the supported classes .*, got Linear"):
            cache_bytes(torch.nn.Linear(2, 2), cache_preset("cg-taylor"), TokenGrid(3, 5, 7))

    def test_both_branches_count(self, wan_pipeline):
        pipe = wan_pipeline()
        plan = cached("cg-taylor", threshold=1e9)
        enable(pipe, plan)
        pipe.latents(steps=STEPS)
        assert stats(pipe)["cache_bytes"] == cache_bytes(pipe.transformer, plan.cache, TokenGrid(3, 5, 7))

    def test_a_schedule_keeps_outputs_until_their_last_reader(self, wan_pipeline):
        pipe = wan_pipeline()
        plan = scheduled(
            {
                "cond": {3: (Term("cond", 1, 1.0), Term("cond", 2, 0.5)), 9: (Term("cond", 8, 1.0),)},
                "uncond": {3: (Term("cond", 2, 1.0),), 6: (Term("cond", 6, 1.0), Term("uncond", 5, 0.1))},
            }
        )
        assert plan.cache.schedule.most_held == 2  # cond 1 and 2, then uncond 5 and cond 6, then cond 8
        enable(pipe, plan)
        pipe.latents(steps=STEPS)
        assert stats(pipe)["skipped_forwards"] == 4
        told = cache_bytes(pipe.transformer, plan.cache, TokenGrid(3, 5, 7))
        two_outputs = 2 * (3 * 5 * 7) * 16 * 4  # 16 float32 a token
        assert stats(pipe)["cache_bytes"] == told == two_outputs


# Threshold at which every gate skips on the tiny model.
SKIPPING = 2.0
GATE_CLASSES = {"teacache": TeaCache, "first-block": FirstBlock, "cg-taylor": ConfidenceGatedTaylor}


class TestState:
    @pytest.mark.parametrize("name", CACHES)
    def test_a_second_generation_equals_a_fresh_one(self, wan_pipeline, name):
        pipe, fresh = wan_pipeline(), wan_pipeline()
        for one in (pipe, fresh):
            enable(one, cached(name, threshold=SKIPPING))
        pipe.latents(steps=STEPS + 5)
        again = pipe.latents(steps=STEPS)
        assert stats(pipe)["skipped_forwards"] > 0
        assert torch.equal(again, fresh.latents(steps=STEPS))
        assert stats(pipe) == stats(fresh)

    def test_after_an_interruption(self, wan_pipeline):
        pipe, fresh = wan_pipeline(), wan_pipeline()
        for one in (pipe, fresh):
            enable(one, cached("cg-taylor", threshold=SKIPPING))

        class Stop(Exception):
            pass

        def stop(_pipe, step, _timestep, tensors):
            if step == 6:
                raise Stop
            return {}

        with pytest.raises(Stop):
            pipe.latents(steps=STEPS, callback_on_step_end=stop)
        assert torch.equal(pipe.latents(steps=STEPS), fresh.latents(steps=STEPS))
        assert stats(pipe)["skipped_forwards"] > 0

    @pytest.mark.parametrize("name", ["teacache", "first-block", "cg-taylor"])
    def test_after_an_interruption_while_a_gate_waits_for_the_device(self, wan_pipeline, monkeypatch, name):
        pipe, fresh = wan_pipeline(), wan_pipeline()
        for one in (pipe, fresh):
            enable(one, cached(name, threshold=SKIPPING))

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(GATE_CLASSES[name], "skip", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pipe.latents(steps=STEPS)
        assert list(pipe.transformer.blocks) == [pipe.transformer.blocks[0], pipe.transformer.blocks[1]]
        assert torch.equal(pipe.latents(steps=STEPS), fresh.latents(steps=STEPS))

    def test_after_an_error_inside_a_block(self, wan_pipeline):
        pipe, fresh = wan_pipeline(), wan_pipeline()
        for one in (pipe, fresh):
            enable(one, cached("taylorseer"))
        calls = itertools.count()

        def fail(*_):
            if next(calls) == 5:
                raise RuntimeError("out of luck")

        handle = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            pipe.latents(steps=STEPS)
        handle.remove()
        # Whoever looks through the blocks now finds the blocks.
        assert list(pipe.transformer.blocks) == [pipe.transformer.blocks[0], pipe.transformer.blocks[1]]
        assert torch.equal(pipe.latents(steps=STEPS), fresh.latents(steps=STEPS))

    @pytest.mark.parametrize("experts", [1, 2])
    @pytest.mark.parametrize("name", CACHES)
    def test_nothing_is_held_after_the_last_step(self, wan_pipeline, name, experts):
        pipe = wan_pipeline(experts=experts)
        enable(pipe, cached(name, threshold=SKIPPING))
        held = []

        def look(_pipe, _step, _timestep, _tensors):
            caches = [state.memory["cache"] for state in states(pipe) if "cache" in state.memory]
            held.append([sum(history.bytes for history in one.histories.values()) for one in caches])
            return {}

        pipe.latents(steps=STEPS, callback_on_step_end=look)
        assert max(held[2]) > 0
        assert sum(held[-1]) == 0  # the VAE decodes without them
        assert all(sum(size > 0 for size in sizes) <= 1 for sizes in held)  # one expert holds them at a time
        assert stats(pipe)["cache_bytes"] > 0

    def test_branches_that_a_pipeline_does_not_name_are_told_apart(self, wan_pipeline):
        """As image-to-video pipelines and FLUX with a true guidance scale run them."""
        found = []
        for named in (True, False):
            pipe = wan_pipeline()
            enable(pipe, cached("taylorseer"))
            latents = torch.randn(1, 4, 3, 10, 14, generator=torch.Generator().manual_seed(5))
            texts = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(6))
            for _ in range(2):
                pipe.scheduler.set_timesteps(STEPS)
                now = latents
                with torch.no_grad():
                    for timestep in pipe.scheduler.timesteps:
                        outputs = []
                        for branch, text in zip(("cond", "uncond"), texts, strict=True):
                            context = pipe.transformer.cache_context(branch) if named else nullcontext()
                            with context:
                                outputs.append(
                                    pipe.transformer(now, timestep.expand(1), text, return_dict=False)[0]
                                )
                        guided = outputs[1] + 4.0 * (outputs[0] - outputs[1])
                        now = pipe.scheduler.step(guided, timestep, now, return_dict=False)[0]
            assert states(pipe)[0].forwards == STEPS
            found.append((now, stats(pipe)))
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]
        assert found[0][1]["skipped_forwards"] > 0

    def test_an_interrupted_second_expert_is_forgotten(self, wan_pipeline):
        """The next generation's second expert comes in at another step, which looks like a later one."""
        pipe, fresh = wan_pipeline(experts=2), wan_pipeline(experts=2)
        for one in (pipe, fresh):
            enable(one, cached("taylorseer", max_skips=1, warm_up=1))

        class Stop(Exception):
            pass

        def stop(_pipe, step, timestep, tensors):
            if timestep < 500:
                raise Stop
            return {}

        with pytest.raises(Stop):
            pipe.latents(steps=11, callback_on_step_end=stop)
        assert torch.equal(pipe.latents(steps=STEPS), fresh.latents(steps=STEPS))
        assert stats(pipe) == stats(fresh)

    def test_of_an_interrupted_generation_only_its_own_forwards_are_counted(self, wan_pipeline):
        """The second expert has not run yet: what it did in the generation before is over, tensors too."""
        pipe = wan_pipeline(experts=2)
        enable(pipe, cached("taylorseer", max_skips=1, warm_up=1))
        pipe.latents(steps=STEPS)

        class Stop(Exception):
            pass

        def stop(_pipe, step, timestep, tensors):
            assert timestep > 500
            if step == 1:
                raise Stop
            return {}

        with pytest.raises(Stop):
            pipe.latents(steps=STEPS, callback_on_step_end=stop)
        report = stats(pipe)
        assert report["computed_forwards"] + report["skipped_forwards"] == 4
        assert states(pipe)[1].memory == {}

    def test_steps_that_round_to_the_first_one_are_no_new_generations(self, wan_pipeline):
        pipe = wan_pipeline()
        enable(pipe, cached("taylorseer"))
        hidden = torch.randn(1, 4, 3, 10, 14, generator=torch.Generator().manual_seed(5))
        text = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(6))
        for _ in range(2):
            pipe.scheduler.set_timesteps(STEPS)
            pipe.scheduler.set_begin_index(0)
            pipe.scheduler.timesteps[1:3] = pipe.scheduler.timesteps[0]
            with torch.no_grad():
                for timestep in pipe.scheduler.timesteps:
                    output = pipe.transformer(hidden, timestep.expand(1), text, return_dict=False)[0]
                    pipe.scheduler.step(output, timestep, hidden, return_dict=False)
            report = stats(pipe)
            assert states(pipe)[0].forwards == STEPS
            assert report["computed_forwards"] + report["skipped_forwards"] == STEPS
            assert report["skipped_forwards"] > 0

    @pytest.mark.parametrize("left_out", [0, 4])
    def test_steps_count_from_the_first_that_is_run(self, wan_pipeline, left_out):
        """As image to image begins later, in a pipeline that shares the transformer with the one enabled."""
        pipe = wan_pipeline()
        enable(pipe, cached("taylorseer", warm_up=3, max_skips=1, min_steps=2))
        pipe.latents(steps=6)  # of another length
        pipe.scheduler.set_timesteps(STEPS)
        pipe.scheduler.set_begin_index(left_out)
        latents = torch.randn(1, 4, 3, 10, 14, generator=torch.Generator().manual_seed(5))
        text = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(6))
        skipped = []
        with torch.no_grad():
            for timestep in pipe.scheduler.timesteps[left_out:]:
                velocity = pipe.transformer(latents, timestep.expand(1), text, return_dict=False)[0]
                latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                skipped.append(stats(pipe)["skipped_forwards"])
        steps = STEPS - left_out
        expected = [step >= 3 and step % 2 == 1 and step < steps - 1 for step in range(steps)]
        assert np.diff([0, *skipped]).astype(bool).tolist() == expected

    @pytest.mark.parametrize("made", ["named", "in turns"])
    def test_a_schedule_serves_pipelines_that_name_their_branches_and_others(self, wan_pipeline, made):
        names = ("cond", "uncond") if made == "named" else ("", "turn 1")
        table = {name: {4: (Term(names[0], 3, 1.5), Term(name, 2, -0.5))} for name in names}
        found = []
        for named in (True, False):
            pipe = wan_pipeline()
            enable(pipe, scheduled(table))
            texts = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(6))
            now = torch.randn(1, 4, 3, 10, 14, generator=torch.Generator().manual_seed(5))
            pipe.scheduler.set_timesteps(STEPS)
            with torch.no_grad():
                for timestep in pipe.scheduler.timesteps:
                    outputs = []
                    for branch, text in zip(("cond", "uncond"), texts, strict=True):
                        with pipe.transformer.cache_context(branch) if named else nullcontext():
                            outputs.append(
                                pipe.transformer(now, timestep.expand(1), text, return_dict=False)[0]
                            )
                    guided = outputs[1] + 4.0 * (outputs[0] - outputs[1])
                    now = pipe.scheduler.step(guided, timestep, now, return_dict=False)[0]
            assert stats(pipe)["skipped_forwards"] == 2
            found.append(now)
        assert torch.equal(*found)

    def test_disable_gives_the_lists_back(self, wan_pipeline):
        pipe = wan_pipeline()
        before = type(pipe.transformer.blocks)
        enable(pipe, cached("taylorseer"))
        assert isinstance(pipe.transformer.blocks, before)
        assert list(pipe.transformer.blocks) == [pipe.transformer.blocks[0], pipe.transformer.blocks[1]]
        disable(pipe)
        assert type(pipe.transformer.blocks) is before

    def test_with_sparse_attention(self, wan_pipeline):
        pipe = wan_pipeline()
        enable(
            pipe,
            AccelPlan.preset("window", density=0.3, cache=cache_preset("taylorseer", **SMALL["taylorseer"])),
        )
        assert bool(pipe.latents(steps=STEPS).isfinite().all())
        report = stats(pipe)
        assert report["sparse_calls"] == 2 * report["computed_forwards"]
        assert report["skipped_forwards"] > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_blocks_give_the_same(wan_pipeline):
    torch._dynamo.reset()
    pipe = wan_pipeline()
    enable(pipe, cached("cg-taylor", threshold=SKIPPING))
    expected = pipe.latents(steps=STEPS)
    report = stats(pipe)
    assert report["skipped_forwards"] > 0
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        latents = pipe.latents(steps=STEPS)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert stats(pipe) == report
    torch._dynamo.reset()


class TestPlans:
    @pytest.mark.parametrize("name", CACHES)
    def test_saved_and_read(self, tmp_path, name):
        plan = cached(name, threshold=0.25, warm_up=CACHES[name].get("warm_up", 1))
        plan.save_pretrained(tmp_path / "plan")
        assert AccelPlan.from_pretrained(tmp_path / "plan").cache == plan.cache

    def test_schedules_are_saved(self, tmp_path):
        plan = scheduled({"cond": {4: (Term("cond", 3, 1.5), Term("latents", 4, 0.1))}, "uncond": {}})
        plan.save_pretrained(tmp_path / "plan")
        assert AccelPlan.from_pretrained(tmp_path / "plan").cache == plan.cache

    def test_presets(self):
        plan = AccelPlan.preset("cg-taylor", threshold=0.3, warm_up=7)
        assert plan.cache.gate == "cg-taylor"
        assert (plan.cache.threshold, plan.cache.warm_up) == (0.3, 7)
        assert [c.family for c in plan.candidates] == ["dense"]
        assert {config["gate"] for config in CACHES.values()} == set(GATES) - {"schedule"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"gate": "luck"}, "gate: expected one of schedule, always, .* got 'luck'"),
            ({"gate": "always", "order": 4}, "order: expected an integer from 0 to 3, got 4"),
            (
                {"gate": "always", "warm_up": 0},
                "warm_up: expected an integer from 1, or a share of the steps between 0 and 1, got 0",
            ),
            ({"gate": "always", "threshold": -1.0}, "threshold: expected a number from 0, got -1.0"),
            ({"gate": "always", "target": "sky"}, "target: expected one of blocks, output, got 'sky'"),
            ({"gate": "cg-taylor"}, "first_blocks: expected at least 1 for gate 'cg-taylor'"),
            ({"gate": "magcache"}, r"curve: expected numbers for gate 'magcache', got \(\); .*measure_cache"),
            ({"gate": "always", "curve": (1.0,)}, "curve: expected none for gate 'always'"),
            ({"gate": "schedule"}, "schedule: expected a Schedule for gate 'schedule', got None"),
            (
                {"gate": "schedule", "schedule": Schedule(STEPS, {})},
                "target: expected 'output' for gate 'schedule', which forecasts outputs, got 'blocks'",
            ),
            (
                {"gate": "always", "target": "output", "last_blocks": 1},
                "last_blocks: expected 0 for the target",
            ),
            ({"gate": "always", "residual": 1}, "residual: expected true or false, got 1"),
        ],
    )
    def test_configurations(self, fields, message):
        with pytest.raises(ValueError, match=message):
            CacheConfig(**fields)

    @pytest.mark.parametrize(
        ("forecasts", "message"),
        [
            ({"cond": {12: (Term("cond", 3, 1.0),)}}, "expected a step from 0 to 11"),
            ({"cond": {4: ()}}, "expected at least one term"),
            (
                {"cond": {4: (Term("cond", 4, 1.0),)}},
                "terms of computed forwards up to that step, got 'cond' at step 4",
            ),
            ({"cond": {4: (Term("uncond", 5, 1.0),)}}, "got 'uncond' at step 5"),
        ],
    )
    def test_schedules(self, forecasts, message):
        with pytest.raises(ValueError, match=message):
            Schedule(STEPS, forecasts)

    def test_unknown_fields_and_names(self):
        with pytest.raises(ValueError, match="cache 'cg-taylor' has no field treshold"):
            AccelPlan.preset("cg-taylor", treshold=0.1)
        with pytest.raises(ValueError, match="unknown cache 'none'; caches: cg-taylor"):
            AccelPlan.preset("window", density=0.3, cache="none")
        with pytest.raises(ValueError, match="preset 'cg-taylor' is a cache"):
            AccelPlan.preset("cg-taylor", density=0.3)
        with pytest.raises(ValueError, match="caches: cg-taylor"):
            AccelPlan.preset("nothing")

    def test_nothing_left_to_skip(self, wan_pipeline):
        pipe = wan_pipeline()
        with pytest.raises(ValueError, match=r"below the 2 blocks of WanTransformer3DModel, got 8 \+ 0"):
            enable(pipe, AccelPlan.preset("dbcache"))
        assert torch.equal(pipe.latents(), pipe.latents())

    def test_bare_transformers(self, tiny):
        transformer = tiny("wan").transformer
        for call in (enable, attn_processors):
            with pytest.raises(
                ValueError, match="expected a pipeline, since the plan's cache needs its step schedule"
            ):
                call(transformer, cached("taylorseer"))

    @pytest.mark.parametrize("name", ["ltx", "wan"])
    def test_teacache_of_an_offloaded_block(self, tiny, name):
        """Its weights come for the block's own forward, and the gate looks at what they give before."""
        transformer = tiny(name).transformer
        cache = StepCache(transformer, family_of(transformer), cache_preset("teacache"))
        cache.check({})
        transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
        StepCache(transformer, family_of(transformer), cache_preset("easycache")).check({})
        if name == "wan":  # reads the timestep's embedding alone
            cache.check({})
            return
        with pytest.raises(
            ValueError, match="the gate 'teacache' reads those of the first block before it runs"
        ):
            cache.check({})

    def test_groups_that_are_offloaded_begin_with_the_last_blocks(self, tiny):
        """The first block of a group brings all of it, and a skipped step leaves it out."""
        transformer = tiny("wan", layers=4).transformer
        transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2
        )
        for last_blocks, refused in ((0, False), (1, True), (2, False)):
            cache = StepCache(
                transformer, family_of(transformer), CacheConfig("always", last_blocks=last_blocks)
            )
            expected = pytest.raises(ValueError, match="expected the last 1 blocks to begin a group")
            with expected if refused else nullcontext():
                cache.check({})

    def test_a_pipeline_with_a_scheduler_of_its_own(self, wan_pipeline):
        """It shares the transformer; the cache would read steps off a scheduler that nobody steps."""
        pipe, other = wan_pipeline(), wan_pipeline()
        other.transformer = pipe.transformer
        enable(pipe, cached("taylorseer"))
        before = pipe.latents(steps=STEPS)
        with pytest.raises(
            RuntimeError, match="got one that stood still over three steps; a pipeline that shares"
        ):
            other.latents(steps=STEPS)
        assert torch.equal(pipe.latents(steps=STEPS), before)

    def test_beside_a_cache_of_diffusers(self, wan_pipeline):
        pipe = wan_pipeline()
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(
            ValueError, match="no cache beside the plan's own, got diffusers' FirstBlockCacheConfig"
        ):
            enable(pipe, cached("taylorseer"))
        pipe.transformer.disable_cache()
        enable(pipe, cached("taylorseer"))
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(RuntimeError, match="got diffusers' FirstBlockCacheConfig; disable it"):
            pipe.latents()

    def test_sparse_attention_alone_composes_with_diffusers(self, wan_pipeline):
        pipe = wan_pipeline()
        enable(pipe, AccelPlan.preset("window", density=0.3))
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        assert bool(pipe.latents(steps=STEPS).isfinite().all())
        assert stats(pipe)["sparse_calls"] < 2 * 2 * STEPS
