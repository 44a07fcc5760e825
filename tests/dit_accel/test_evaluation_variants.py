"""Variants by name, and that each leaves the pipeline as it was."""

import pytest
import torch
from diffusers.hooks import HookRegistry

from dit_accel import AccelPlan, PlanError
from dit_accel.evaluation.variants import DENSE, parse_variant, parse_variants, plan_variant


def _hooks(pipe):
    registries = [
        module._diffusers_hook for module in pipe.transformer.modules() if hasattr(module, "_diffusers_hook")
    ]
    return [name for registry in registries if isinstance(registry, HookRegistry) for name in registry.hooks]


@pytest.mark.parametrize(
    ("name", "family", "density", "options"),
    [
        ("preset:window@0.3", "window", 0.3, {}),
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
    ("text", "remainder"), [("", False), (":remainder=true", True), (":remainder=False", False)]
)
def test_presets_with_a_remainder(text, remainder):
    (candidate,) = parse_variant(f"preset:skip{text}").plan.candidates
    assert candidate.remainder is remainder
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
        ("diffusers:magic", "expected diffusers:first_block or diffusers:first_block@THRESHOLD"),
        ("dense,dense", "names one of them twice"),
    ],
)
def test_malformed_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        parse_variants(names)


def test_a_missing_plan_is_a_plan_error(tmp_path):
    with pytest.raises(PlanError):
        parse_variant(f"plan:{tmp_path}")


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
