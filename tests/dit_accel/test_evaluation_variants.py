"""Variants by name, and that each leaves the pipeline as it was."""

import sys
from dataclasses import replace

import pytest
import torch
from diffusers.hooks import HookRegistry

from dit_accel import AccelPlan, PlanError
from dit_accel.caching import CacheConfig, Schedule, Term, cache_preset
from dit_accel.candidate import Candidate
from dit_accel.evaluation.variants import DENSE, parse_variant, parse_variants, plan_variant
from dit_accel.pipelines import family_of
from dit_accel.switch import states


def _hooks(pipe):
    registries = [
        module._diffusers_hook for module in pipe.transformer.modules() if hasattr(module, "_diffusers_hook")
    ]
    return [name for registry in registries if isinstance(registry, HookRegistry) for name in registry.hooks]


@pytest.mark.parametrize(
    ("name", "family", "density", "options"),
    [
        ("preset:window@0.3", "window", 0.3, {}),
        ("preset:window@0.3:precision=int8_fp8", "window", 0.3, {}),
        ("preset:pooled@0.25:order=space", "pooled", 0.25, {"order": "space"}),
        (
            "preset:pooled@0.25:order=tile:2x4x4:top_p=0.9",
            "pooled",
            0.25,
            {"order": "tile:2x4x4", "top_p": 0.9},
        ),
        ("preset:dense", "dense", 1.0, {}),
    ],
)
def test_presets_by_name(name, family, density, options):
    variant = parse_variant(name)
    candidate = variant.plan.candidates[0]
    assert variant.name == name
    assert (candidate.family, candidate.density, dict(candidate.options)) == (family, density, options)


@pytest.mark.parametrize(
    ("text", "remainder"), [("", 0), (":remainder=true", 1), (":remainder=False", 0), (":remainder=0.4", 0.4)]
)
def test_presets_with_a_remainder(text, remainder):
    (candidate,) = parse_variant(f"preset:skip{text}").plan.candidates
    assert candidate.remainder == remainder
    assert candidate.options == ()


def test_a_plan_by_directory(tmp_path):
    AccelPlan.preset("window", density=0.2).save_pretrained(tmp_path / "plan")
    variant = parse_variant(f"plan:{tmp_path / 'plan'}")
    assert variant.plan.candidates[0].label == "window@0.20"


def test_dense_is_always_among_them():
    assert [variant.name for variant in parse_variants("preset:window@0.3")] == ["dense", "preset:window@0.3"]
    assert [variant.name for variant in parse_variants("preset:skip, dense")] == ["preset:skip", "dense"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("fast", "variant 'fast': expected dense, plan:DIR, preset:"),
        ("preset:", "variant 'preset:': expected dense, plan:DIR"),
        ("preset:nonsense@0.3", "nonsense"),
        ("preset:window", "density"),
        ("preset:window@much", "expected a number after @, got 'much'"),
        ("preset:window@0.3:fast", "expected OPTION=VALUE after the colon, got 'fast'"),
        ("preset:window@0.3:colour=red", "colour"),
        ("preset:window@7", "density"),
        ("diffusers:magic", "with a name out of first_block, mag_cache, taylorseer"),
        ("diffusers:first_block:speed=2", "expected options out of threshold, got 'speed'"),
        ("diffusers:first_block:threshold=high", "expected a number from 0 for threshold, got 'high'"),
        ("diffusers:mag_cache:max_skip_steps=1.5", "expected a whole number from 0 for max_skip_steps"),
        ("diffusers:mag_cache:calibrate=true", "expected options out of threshold, max_skip_steps"),
        ("diffusers:taylorseer@0", "expected a whole number from 1 for cache_interval, got 0.0"),
        ("diffusers:taylorseer:use_lite_mode=1", "expected true or false for use_lite_mode, got 1"),
        (
            "cache-dit:magic",
            r"expected cache-dit:dbcache\[@THRESHOLD\]\[:OPTION=VALUE\], got the name 'magic'",
        ),
        ("cache-dit:dbcache:Fn_compute_blocks=-1", "expected a whole number from 0 for Fn_compute_blocks"),
        ("preset:taylorseer@0.1", "expected no number after taylorseer, .* give max_skips"),
        ("preset:cg-taylor@0.1:speed=2", "cache 'cg-taylor' has no field speed"),
        ("preset:magcache@0.1:speed=2", "cache 'magcache' has no field speed"),
        ("preset:window@0.3:cache=magic", "expected a cache out of cg-taylor, .* got 'magic'"),
        ("preset:window@0.3:cache.warm_up=3", "expected cache=NAME before cache.warm_up, got none"),
        ("dense,dense", "names one of them twice"),
    ],
)
def test_malformed_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        parse_variants(names)


@pytest.mark.parametrize(
    ("name", "label", "cache"),
    [
        ("preset:cg-taylor@0.2", "dense@1.00", cache_preset("cg-taylor", threshold=0.2)),
        (
            "preset:cg-taylor:threshold=0.2:warm_up=4",
            "dense@1.00",
            cache_preset("cg-taylor", threshold=0.2, warm_up=4),
        ),
        ("preset:taylorseer:max_skips=2", "dense@1.00", cache_preset("taylorseer", max_skips=2)),
        ("preset:window@0.3:cache=easycache", "window@0.30", cache_preset("easycache")),
        (
            "preset:window@0.3:cache=first-block@0.1:cache.warm_up=4",
            "window@0.30",
            cache_preset("first-block", threshold=0.1, warm_up=4),
        ),
    ],
)
def test_caches_by_name(name, label, cache):
    plan = parse_variant(name).plan
    assert plan.candidates[0].label == label
    assert plan.cache == cache


@pytest.mark.parametrize("name", ["preset:magcache@0.3", "preset:pooled@0.5:cache=magcache@0.3"])
def test_our_magcache_takes_a_measured_curve(name):
    variant = parse_variant(name)
    with pytest.raises(ValueError, match="expected the curve of MagCache, got none; measure it"):
        variant.apply(None)
    ready = variant.with_curve((1.0, 0.5))
    assert ready.plan.cache == cache_preset("magcache", threshold=0.3, curve=(1.0, 0.5))
    assert (ready.name, ready.with_curve) == (name, None)
    assert ready.identity != variant.with_curve((1.0, 0.6)).identity


def test_identity_depends_on_the_dense_layers():
    plan = AccelPlan.preset("svg")
    other = replace(plan, dense_layers=0.5)
    assert plan_variant(plan, "plan").identity != plan_variant(other, "plan").identity


def test_identity_depends_on_the_cache():
    plans = [AccelPlan.preset("window", density=0.3)]
    plans += [
        AccelPlan.preset("window", density=0.3, cache=cache_preset("cg-taylor", threshold=t))
        for t in (0.1, 0.2)
    ]
    assert len({plan_variant(plan, "plan").identity for plan in plans}) == 3
    schedules = [Schedule(12, {"cond": {5: (Term("cond", 4, weight),)}}) for weight in (1.0, 1.5)]
    plans = [
        replace(AccelPlan.preset("dense"), cache=CacheConfig("schedule", target="output", schedule=schedule))
        for schedule in schedules
    ]
    assert len({plan_variant(plan, "plan").identity for plan in plans}) == 2


def test_cache_dit_has_to_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(
        ValueError,
        match=r"cache-dit: expected the package to be installed, got none; run pip install cache-dit",
    ):
        parse_variants("cache-dit:dbcache")


def test_a_missing_plan_is_a_plan_error(tmp_path):
    with pytest.raises(PlanError):
        parse_variant(f"plan:{tmp_path}")


def test_a_plan_runs_with_its_guard_or_without(tmp_path, wan_pipeline):
    pipe, found = wan_pipeline(), {}
    AccelPlan(
        (Candidate("dense", 1.0), Candidate("window", 0.4)),
        torch.ones(1, 2, 2, dtype=torch.int16),
        layers=tuple(family_of(pipe.transformer).attention_modules(pipe.transformer)),
        rel_l2=torch.full((1, 2, 2), 0.1),
    ).save_pretrained(tmp_path)
    variants = [parse_variant(f"plan:{tmp_path}{option}") for option in ("", ":guard=false", ":guard=true")]
    for variant in variants:
        with variant.apply(pipe):
            found[variant.name] = states(pipe)[0].guard is not None
    assert list(found.values()) == [True, False, True]
    assert len({variant.identity.split(" ")[-1] for variant in variants}) == 3
    with pytest.raises(ValueError, match="expected guard=true or guard=false, got guard=maybe"):
        parse_variant(f"plan:{tmp_path}:guard=maybe")


def test_identity_tells_plans_of_one_name_apart():
    one, other = (plan_variant(AccelPlan.preset("window", density=d), "plan") for d in (0.2, 0.3))
    assert one.name == other.name
    assert one.identity != other.identity


@pytest.mark.parametrize("name", ["preset:window@0.3", "diffusers:first_block@0.1"])
def test_a_variant_is_undone_also_after_an_error(name, wan_pipeline):
    pipe = wan_pipeline()
    dense = pipe.latents()
    processors = dict(pipe.transformer.attn_processors)
    variant = parse_variant(name)

    def fail():
        with variant.apply(pipe):
            raise ZeroDivisionError(_hooks(pipe))

    with pytest.raises(ZeroDivisionError, match=r"\['\w+'"):
        fail()
    restored = pipe.transformer.attn_processors
    assert all(restored[key] is processors[key] for key in processors)
    assert not _hooks(pipe)
    assert torch.equal(pipe.latents(), dense)


def test_a_variant_changes_the_result_and_dense_does_not(wan_pipeline):
    pipe = wan_pipeline()
    dense = pipe.latents()
    with DENSE.apply(pipe):
        assert torch.equal(pipe.latents(), dense)
    with parse_variant("preset:skip").apply(pipe):
        assert not torch.allclose(pipe.latents(), dense, atol=1e-3)
    with parse_variant("diffusers:first_block@1e9").apply(pipe):
        assert not torch.allclose(pipe.latents(), dense, atol=1e-3)
