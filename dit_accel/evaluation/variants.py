"""Ways to run one pipeline, by name: each is applied to it, and undone again.

| name | what runs |
|---|---|
| `dense` | the pipeline as it is |
| `plan:DIR` | a calibrated plan; `plan:DIR:guard=false` leaves its heads unchecked |
| `preset:window@0.3` | one family for every head; further options follow: `preset:pooled@0.25:order=space` |
| `preset:xattention` | a published system, see `dit_accel.presets` |
| `preset:cg-taylor@0.1` | a cache, see `dit_accel.caching.CACHES`; the number is its threshold |
| `preset:window@0.3:cache=cg-taylor@0.1` | both; `cache.warm_up=4` sets a field of the cache |
| `diffusers:first_block` | diffusers' First Block Cache; `@0.08` sets its threshold |
| `diffusers:mag_cache` | diffusers' MagCache |
| `diffusers:taylorseer` | diffusers' TaylorSeer in its lite mode; `@4` sets the interval |
| `cache-dit:dbcache` | DBCache of cache-dit; with its TaylorSeer: `cache-dit:dbcache@0.1:taylorseer=true` |

MagCache, diffusers' and ours, needs a curve measured on the model: see `Variant.with_curve`. cache-dit counts two
forwards to a step of Wan; without guidance, tell it `enable_separate_cfg=false`.

A new kind of variant is a function from the text after the colon to a `Variant`, entered in `KINDS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from dit_accel.caching import CACHES, CacheConfig, cache_preset
from dit_accel.evaluation.peers import (
    CACHE_DIT,
    DIFFUSERS,
    cache_dit_cache,
    cache_dit_version,
    checked,
    config_of,
    diffusers_cache,
)
from dit_accel.plan import AccelPlan

Curve = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Variant:
    """A named way to run a pipeline.

    apply: `with variant.apply(pipe): ...` runs it, and leaves the pipeline as it was.
    plan: the attention plan behind it, None where attention is untouched.
    identity: text that changes whenever the variant's results could.
    with_curve: what makes the variant that can be applied from the curve of MagCache, see
        `dit_accel.evaluation.curve`; None where none is needed.
    """

    name: str
    apply: Callable[[Any], AbstractContextManager[None]]
    plan: AccelPlan | None
    identity: str
    with_curve: Callable[[Curve], Variant] | None = None


DENSE = Variant("dense", lambda pipe: nullcontext(), None, "dense")


def plan_variant(plan: AccelPlan, name: str, *, guard: bool | None = None) -> Variant:
    """The variant that runs a plan; for `guard` see `dit_accel.enable`."""

    @contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        from dit_accel.switch import disable, enable

        enable(pipe, plan, guard=guard)
        try:
            yield
        finally:
            disable(pipe)

    content: list[Any] = [
        [candidate.to_dict() for candidate in plan.candidates],
        list(plan.range_starts),
        plan.block,
    ]
    if plan.dense_layers:
        content.append({"dense_layers": plan.dense_layers})
    if plan.cache is not None:
        content.append(plan.cache.to_dict())
    if guard is not None:
        content.append({"guard": guard})
    # The guard compares with what the calibration measured.
    tensors = [
        tensor.contiguous().numpy().tobytes() for tensor in (plan.choice, plan.rel_l2) if tensor is not None
    ]
    digest = hashlib.sha256(b"".join([json.dumps(content).encode(), *tensors])).hexdigest()
    return Variant(name, apply, plan, f"{name} {digest}")


def _awaiting_curve(name: str, with_curve: Callable[[Curve], Variant]) -> Variant:
    def apply(pipe: Any) -> AbstractContextManager[None]:
        raise ValueError(
            f"variant {name!r}: expected the curve of MagCache, got none; measure it with "
            "dit_accel.evaluation.curve.magnitude_curve and call with_curve"
        )

    return Variant(name, apply, None, name, with_curve)


def _from_plan(text: str, name: str) -> Variant:
    directory, _, option = text.rpartition(":guard=")
    if not directory:
        return plan_variant(AccelPlan.from_pretrained(text), name)
    guard = _value(option)
    if not isinstance(guard, bool):
        raise ValueError(f"variant {name!r}: expected guard=true or guard=false, got guard={option}")
    return plan_variant(AccelPlan.from_pretrained(directory), name, guard=guard)


def _from_preset(text: str, name: str) -> Variant:
    family, number, options = _split(text, name)
    # Parameters of the preset itself, the first of which stands before the colon, and what is no number or word.
    for taken in ("name", "cls", "curve", "polynomial"):
        if taken in options or f"cache.{taken}" in options:
            raise ValueError(
                f"variant {name!r}: preset {family!r} has no option {taken!r} that text can give"
            )
    if family in CACHES:
        return _cached(family, number, options, name)
    fields = {key: options.pop(key) for key in list(options) if key.startswith("cache.")}
    cache = options.pop("cache", None)
    if number is not None:
        options["density"] = number
    if cache is None:
        if fields:
            raise ValueError(f"variant {name!r}: expected cache=NAME before {', '.join(fields)}, got none")
        return plan_variant(AccelPlan.preset(family, **options), name)
    label, threshold, _ = _split(str(cache), name)
    if label not in CACHES:
        raise ValueError(f"variant {name!r}: expected a cache out of {', '.join(CACHES)}, got {label!r}")
    fields = {key.removeprefix("cache."): value for key, value in fields.items()}
    return _cached(label, threshold, fields, name, family, options)


def _cached(
    cache: str,
    threshold: float | None,
    fields: dict[str, Any],
    name: str,
    attention: str = "dense",
    options: dict[str, Any] | None = None,
) -> Variant:
    """A cache beside an attention preset and its options."""
    if threshold is not None:
        if CACHES[cache]["gate"] == "always":
            raise ValueError(
                f"variant {name!r}: expected no number after {cache}, which has no threshold; "
                "give max_skips, for instance max_skips=3"
            )
        fields = fields | {"threshold": threshold}

    def made(config: CacheConfig) -> Variant:
        return plan_variant(AccelPlan.preset(attention, cache=config, **(options or {})), name)

    if CACHES[cache]["gate"] != "magcache":
        return made(cache_preset(cache, **fields))
    made(cache_preset(cache, **fields, curve=(1.0,)))  # refuses what is wrong before anything is measured
    return _awaiting_curve(name, lambda curve: made(cache_preset(cache, **fields, curve=curve)))


def _from_diffusers(text: str, name: str) -> Variant:
    label, number, options = _split(text, name)
    if label not in DIFFUSERS:
        raise ValueError(
            f"variant {name!r}: expected diffusers:NAME[@NUMBER][:OPTION=VALUE] with a name out of "
            f"{', '.join(DIFFUSERS)}"
        )
    technique = DIFFUSERS[label]
    options = checked(technique, options if number is None else options | {technique.dial: number}, name)
    if label != "mag_cache":
        config = config_of(technique, options)
        return Variant(name, lambda pipe: diffusers_cache(pipe, config), None, name)

    def with_curve(curve: Curve) -> Variant:
        # diffusers changes the configuration that it is given
        measured = {"mag_ratios": list(curve), "num_inference_steps": len(curve)}
        return Variant(
            name,
            lambda pipe: diffusers_cache(pipe, config_of(technique, options, **measured)),
            None,
            f"{name} {hashlib.sha256(json.dumps(curve).encode()).hexdigest()}",
        )

    return _awaiting_curve(name, with_curve)


def _from_cache_dit(text: str, name: str) -> Variant:
    label, number, options = _split(text, name)
    if label not in CACHE_DIT:
        raise ValueError(
            f"variant {name!r}: expected cache-dit:dbcache[@THRESHOLD][:OPTION=VALUE], got the name {label!r}"
        )
    technique = CACHE_DIT[label]
    options = checked(technique, options if number is None else options | {technique.dial: number}, name)
    version = cache_dit_version()
    return Variant(name, lambda pipe: cache_dit_cache(pipe, options), None, f"{name} {version}")


KINDS: dict[str, Callable[[str, str], Variant]] = {
    "plan": _from_plan,
    "preset": _from_preset,
    "diffusers": _from_diffusers,
    "cache-dit": _from_cache_dit,
}


def parse_variant(name: str) -> Variant:
    """The variant a name stands for.

    Raises:
        ValueError: The name is malformed (`dit_accel.PlanError` where a plan cannot be read).
    """
    if name == "dense":
        return DENSE
    kind, colon, text = name.partition(":")
    if not colon or kind not in KINDS or not text:
        raise ValueError(
            f"variant {name!r}: expected dense, plan:DIR, preset:FAMILY@DENSITY[:OPTION=VALUE], "
            "preset:CACHE[@THRESHOLD], diffusers:CACHE[@NUMBER] or cache-dit:dbcache[@THRESHOLD]"
        )
    return KINDS[kind](text, name)


def parse_variants(names: str) -> list[Variant]:
    """The variants of a comma-separated list; dense always runs, since all others are compared with it.

    Raises:
        ValueError: A name is malformed or occurs twice.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if len(set(listed)) != len(listed):
        raise ValueError(f"variants: {names!r} names one of them twice")
    if "dense" not in listed:
        listed.insert(0, "dense")
    return [parse_variant(name) for name in listed]


def _split(text: str, name: str) -> tuple[str, float | None, dict[str, Any]]:
    """`family@0.3:order=space` → ("family", 0.3, {"order": "space"})."""
    head, *rest = text.split(":")
    # Option values may hold colons (`order=tile:4x4x4`): a part without "=" belongs to the one before.
    pairs: list[str] = []
    for part in rest:
        if "=" in part:
            pairs.append(part)
        elif pairs:
            pairs[-1] += f":{part}"
        else:
            raise ValueError(f"variant {name!r}: expected OPTION=VALUE after the colon, got {part!r}")
    label, at, number = head.partition("@")
    options = {key: _value(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    if not at:
        return label, None, options
    try:
        return label, float(number), options
    except ValueError:
        raise ValueError(f"variant {name!r}: expected a number after @, got {number!r}") from None


def _value(text: str) -> str | int | float | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
