"""Caches of diffusers and cache-dit: what they skip is counted, what they hold is measured, and they leave no trace."""

import dataclasses

import cache_dit
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry
from torch import nn

import dit_accel
from dit_accel import AccelPlan
from dit_accel.caching import cache_preset
from dit_accel.evaluation.curve import magnitude_curve
from dit_accel.evaluation.generate import generate, generate_variant
from dit_accel.evaluation.models import GenerationSettings, load_model
from dit_accel.evaluation.peers import Watch, cache_dit_cache, can_watch, diffusers_cache
from dit_accel.evaluation.run import evaluate
from dit_accel.evaluation.variants import parse_variant, parse_variants

STEPS = 12
SETTINGS = GenerationSettings(
    height=48, width=80, num_frames=5, num_inference_steps=STEPS, guidance_scale=3.0
)
PROMPT = "a red circle moves left"
TOKENS, CHANNELS, TEXT_TOKENS = 2 * 3 * 5, 32, 512
CURVE = (1.0, *(0.99 - 0.01 * step for step in range(STEPS - 1)))
DBCACHE = "cache-dit:dbcache@0.9:Fn_compute_blocks=1:max_warmup_steps=4"


@pytest.fixture(scope="module")
def pipe(tiny_wan_dir):
    pipe = load_model(str(tiny_wan_dir), dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def dense(pipe):
    return generate(pipe, PROMPT, SETTINGS, seed=0)


def ready(name):
    variant = parse_variant(name)
    return variant.with_curve(CURVE) if variant.with_curve else variant


def run(pipe, name, settings=SETTINGS):
    return generate_variant(pipe, ready(name), PROMPT, settings, seed=0)


class Counted:
    """Calls of each block's feed-forward, which no cache hooks and `Watch` does not look at."""

    def __init__(self, pipe):
        self.calls = [0] * len(pipe.transformer.blocks)
        self.handles = [
            block.ffn.register_forward_pre_hook(self.counter(number))
            for number, block in enumerate(pipe.transformer.blocks)
        ]

    def counter(self, number):
        def count(*_):
            self.calls[number] += 1

        return count

    def __enter__(self):
        return self.calls

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(
    "name",
    [
        "diffusers:first_block@1e9",
        "diffusers:mag_cache@0.2:max_skip_steps=2",
        "diffusers:taylorseer@3",
        "diffusers:taylorseer@4:disable_cache_before_step=5:max_order=2",
        DBCACHE,
        f"{DBCACHE}:taylorseer=true:max_continuous_cached_steps=2",
        "preset:taylorseer:max_skips=2",
        "preset:magcache@0.2",
    ],
)
def test_skipped_forwards_are_those_whose_last_block_did_not_run(pipe, dense, name):
    with Counted(pipe) as calls:
        made = run(pipe, name)
    forwards = 2 * STEPS
    assert 0 < calls[-1] < forwards
    assert made.skipped_share == pytest.approx(1 - calls[-1] / forwards)
    assert made.cache_bytes > 0
    assert not torch.equal(made.latents, dense.latents)


def test_taylorseer_computes_the_steps_it_says(pipe):
    # diffusers: steps 0..2, then those s with (s - 4) % 3 == 0: 4, 7, 10
    assert run(pipe, "diffusers:taylorseer@3").skipped_share == pytest.approx(1 - 6 / STEPS)


def test_bytes_of_foreign_caches(pipe):
    state = TOKENS * CHANNELS * 4  # float32, per branch
    text = TEXT_TOKENS * CHANNELS * 4
    # residual of the first block, its output, and the residual of the others
    assert run(pipe, "diffusers:first_block@1e9").cache_bytes == 2 * 3 * state
    # order 0 and 1 of the last projection's output, in bfloat16; blocks that are skipped keep nothing
    patches = TOKENS * 4 * 4
    assert run(pipe, "diffusers:taylorseer@3").cache_bytes == 2 * 2 * patches * 2
    # residuals of head and middle, and that of the text, which Wan's blocks only pass on
    assert run(pipe, DBCACHE).cache_bytes == 2 * (2 * state + text)
    # ours keeps the output of the last block of the last two computed steps
    assert run(pipe, "preset:taylorseer:max_skips=2").cache_bytes == 2 * 2 * state
    # ... and of the gate, which the first branch decides with
    assert run(pipe, "preset:cg-taylor@1e9:max_skips=2").cache_bytes == 2 * 2 * state + 2 * state


def test_dense_and_sparse_runs_skip_nothing(pipe):
    for name in ("dense", "preset:window@0.5:block=8"):
        made = run(pipe, name, SETTINGS.with_steps(2))
        assert (made.skipped_share, made.cache_bytes) == (0.0, 0)


@pytest.mark.parametrize("name", ["diffusers:mag_cache@0.2", "diffusers:taylorseer", DBCACHE])
def test_a_foreign_cache_leaves_no_trace(pipe, dense, name):
    before = dict(vars(pipe.transformer)), type(pipe).__call__

    def fail(*_):
        raise ZeroDivisionError

    def stop():
        with ready(name).apply(pipe):
            handle = pipe.transformer.blocks[1].ffn.register_forward_pre_hook(fail)
            try:
                generate(pipe, PROMPT, SETTINGS, seed=0)
            finally:
                handle.remove()

    with pytest.raises(ZeroDivisionError):
        stop()
    run(pipe, name)
    assert type(pipe).__call__ is before[1]
    assert vars(pipe.transformer).get("forward") == before[0].get("forward")
    assert not getattr(pipe.transformer, "_is_cached", False)
    assert not pipe.transformer.is_cache_enabled
    left = [
        hook
        for module in pipe.transformer.modules()
        if isinstance(registry := getattr(module, "_diffusers_hook", None), HookRegistry)
        for hook in registry.hooks
    ]
    assert not left
    assert torch.equal(generate(pipe, PROMPT, SETTINGS, seed=0).latents, dense.latents)


def test_magcache_s_curve_is_that_of_the_residuals(pipe):
    residuals = {}

    def begin(_module, args, kwargs):
        residuals["input"] = (args[0] if args else kwargs["hidden_states"]).double()

    def end(_module, _args, output):
        residuals.setdefault("all", []).append(output.double() - residuals["input"])

    blocks = pipe.transformer.blocks
    handles = [
        blocks[0].register_forward_pre_hook(begin, with_kwargs=True),
        blocks[-1].register_forward_hook(end),
    ]
    steps = []
    curve = magnitude_curve(
        pipe, PROMPT, SETTINGS.with_steps(5), seed=3, on_step=lambda: steps.append(len(steps))
    )
    for handle in handles:
        handle.remove()
    norms = torch.stack([residual.norm(dim=-1) for residual in residuals["all"]])
    norms = norms.unflatten(0, (5, 2))  # [steps, branches, batch, tokens]
    expected = [1.0, *(norms[1:] / norms[:-1]).mean(dim=(1, 2, 3)).tolist()]
    assert len(steps) == 5
    assert curve == pytest.approx(expected, rel=1e-4)


def test_magcache_s_calibration_prints_nothing(pipe, capsys):
    magnitude_curve(pipe, PROMPT, SETTINGS.with_steps(2), seed=0)
    assert capsys.readouterr().out == ""


def test_a_technique_that_changes_nothing_is_flagged(pipe, tmp_path):
    """diffusers' patterns for TaylorSeer match no attention of Wan, and say nothing about it."""
    from dit_accel.evaluation.report import console_table

    idle, works = "diffusers:taylorseer:use_lite_mode=false", "diffusers:taylorseer@3"
    result = evaluate(
        pipe,
        parse_variants(f"{idle},{works},preset:magcache@0.2"),
        [PROMPT],
        SETTINGS,
        model="tiny",
        warmup_steps=1,
        attention_steps=0,
        output_dir=tmp_path,
        progress=False,
    )
    rows = {row["name"]: row for row in result.to_dict()["variants"]}
    assert {name: row["identical_to_dense"] for name, row in rows.items()} == {
        "dense": False,
        idle: True,
        works: False,
        "preset:magcache@0.2": False,
    }
    assert (rows[idle]["skipped_share"], rows[works]["skipped_share"]) == (0.0, 0.5)
    assert rows["dense"]["cache_bytes"] == 0 < rows[works]["cache_bytes"]
    assert rows["preset:magcache@0.2"]["skipped_share"] > 0
    table = console_table(result.to_dict())
    assert f"identical to dense in every generation, so no speed-up: {idle}" in table
    line = next(line for line in table.splitlines() if line.startswith(idle))
    assert line.split()[2] == "–"
    assert next(line for line in table.splitlines() if line.startswith(works)).split()[-2] == "50%"

    # The curve is measured once, with a seed of its own, and an evaluation that goes on takes it over.
    curve = result.to_dict()["magnitude_curve"]
    assert len(curve) == STEPS
    assert curve[0] == 1.0
    forwards = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    again = evaluate(
        pipe,
        parse_variants(f"{idle},{works},preset:magcache@0.2"),
        [PROMPT],
        SETTINGS,
        model="tiny",
        warmup_steps=1,
        attention_steps=0,
        output_dir=tmp_path,
        progress=False,
    )
    handle.remove()
    assert not forwards
    assert list(again.to_dict()["magnitude_curve"]) == list(curve)
    assert again.runs == result.runs


def test_models_that_are_not_known_are_not_watched(pipe):
    class Unknown(nn.Module):
        pass

    class Pipe:
        transformer = Unknown()

    assert can_watch(pipe)
    assert not can_watch(Pipe())
    with (
        pytest.raises(ValueError, match="expected a transformer with enable_cache, got Unknown"),
        diffusers_cache(Pipe(), FirstBlockCacheConfig()),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"below the 2 blocks of WanTransformer3DModel.blocks, got 8 \+ 0"),
        (
            {"Fn_compute_blocks": 1, "Bn_compute_blocks": 1},
            r"got 1 \+ 1; give for instance Fn_compute_blocks=1",
        ),
    ],
)
def test_cache_dit_needs_something_to_skip(pipe, options, message):
    with pytest.raises(ValueError, match=message), cache_dit_cache(pipe, options):
        pass


def test_cache_dit_must_know_the_pipeline(wan_pipeline):
    with (
        pytest.raises(ValueError, match="expected a pipeline that cache-dit knows, got TinyWanPipeline"),
        cache_dit_cache(wan_pipeline(), {"Fn_compute_blocks": 1}),
    ):
        pass


def test_two_experts_have_no_curve(wan_pipeline):
    with pytest.raises(ValueError, match="expected one transformer for the curve of MagCache, got 2"):
        magnitude_curve(wan_pipeline(experts=2), PROMPT, SETTINGS, seed=0)


def test_two_experts_are_both_watched(wan_pipeline):
    pipe = wan_pipeline(experts=2)
    with diffusers_cache(pipe, FirstBlockCacheConfig(threshold=1e9)), Watch(pipe) as watch:
        assert pipe.transformer.is_cache_enabled
        assert pipe.transformer_2.is_cache_enabled
        pipe.latents(steps=STEPS)
    assert watch.forwards == 2 * STEPS
    # each expert computes its first step of each branch
    assert watch.skipped == 2 * STEPS - 4
    assert not pipe.transformer_2.is_cache_enabled


class TestStacking:
    """Our cache beside another one is refused, our attention processors alone work with both."""

    def cached(self):
        config = cache_preset("taylorseer", warm_up=2, max_skips=2)
        return dataclasses.replace(AccelPlan.preset("dense"), cache=config)

    def enable_theirs(self, pipe, threshold=0.9, warm_up=4):
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=warm_up, residual_diff_threshold=threshold
        )
        cache_dit.enable_cache(pipe, cache_config=config)

    def test_our_cache_refuses_cache_dit(self, pipe):
        self.enable_theirs(pipe)
        try:
            with pytest.raises(
                ValueError, match="expected no cache beside the plan's own, got cache-dit; disable it, or use"
            ):
                dit_accel.enable(pipe, self.cached())
        finally:
            cache_dit.disable_cache(pipe)
        dit_accel.enable(pipe, self.cached())
        dit_accel.disable(pipe)

    def test_cache_dit_after_our_cache_is_refused_at_the_first_forward(self, pipe):
        with parse_variant("preset:taylorseer").apply(pipe):
            transformer = pipe.transformer
            forward = transformer.__dict__.get("forward")
            with (
                cache_dit_cache(pipe, {"Fn_compute_blocks": 1}),
                pytest.raises(RuntimeError, match="expected no cache beside the plan's own, got cache-dit"),
            ):
                generate(pipe, PROMPT, SETTINGS, seed=0)
            assert transformer.__dict__.get("forward") is forward

    @pytest.mark.parametrize("name", [DBCACHE, "diffusers:first_block@0.9", "diffusers:taylorseer@3"])
    @pytest.mark.parametrize("ours_first", [True, False])
    def test_sparse_attention_composes(self, pipe, dense, name, ours_first):
        sparse, theirs = parse_variant("preset:window@0.3:block=8"), parse_variant(name)
        outer, inner = (sparse, theirs) if ours_first else (theirs, sparse)
        with outer.apply(pipe), inner.apply(pipe), Counted(pipe) as calls, Watch(pipe) as watch:
            both = generate(pipe, PROMPT, SETTINGS, seed=0)
            found = dit_accel.stats(pipe)
        assert found["sparse_calls"] == sum(calls)
        assert found["dense_calls"] == 0
        assert 0 < watch.skipped < watch.forwards == 2 * STEPS
        assert bool(both.latents.isfinite().all())
        for alone in (run(pipe, "preset:window@0.3:block=8"), run(pipe, name), dense):
            assert not torch.equal(both.latents, alone.latents)
        assert torch.equal(generate(pipe, PROMPT, SETTINGS, seed=0).latents, dense.latents)

    def test_dense_plans_change_nothing_under_cache_dit(self, pipe):
        expected = run(pipe, DBCACHE).latents
        with parse_variant("preset:dense").apply(pipe):
            assert torch.equal(run(pipe, DBCACHE).latents, expected)
