"""Ways to run one pipeline, by name: each is applied to it, and undone again.

| name | what runs |
|---|---|
| `dense` | the pipeline as it is |
| `plan:DIR` | a calibrated plan |
| `preset:window@0.3` | one family for every head; further options follow: `preset:pooled@0.25:order=space` |
| `preset:xattention` | a published system, see `dit_accel.presets` |
| `diffusers:first_block` | diffusers' First Block Cache; `@0.08` sets its threshold |

A new kind of variant is a function from the text after the colon to a `Variant`, entered in `KINDS`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from dit_accel.plan import AccelPlan


@dataclass(frozen=True, eq=False)
class Variant:
    """A named way to run a pipeline.

    apply: `with variant.apply(pipe): ...` runs it, and leaves the pipeline as it was.
    plan: the attention plan behind it, None where attention is untouched.
    identity: text that changes whenever the variant's results could.
    """

    name: str
    apply: Callable[[Any], AbstractContextManager[None]]
    plan: AccelPlan | None
    identity: str


DENSE = Variant("dense", lambda pipe: nullcontext(), None, "dense")


def plan_variant(plan: AccelPlan, name: str) -> Variant:
    """The variant that runs a plan."""

    @contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        from dit_accel.switch import disable, enable

        enable(pipe, plan)
        try:
            yield
        finally:
            disable(pipe)

    content = json.dumps(
        [[candidate.to_dict() for candidate in plan.candidates], list(plan.range_starts), plan.block]
    )
    digest = hashlib.sha256(content.encode() + plan.choice.contiguous().numpy().tobytes()).hexdigest()
    return Variant(name, apply, plan, f"{name} {digest}")


def _from_plan(text: str, name: str) -> Variant:
    return plan_variant(AccelPlan.from_pretrained(text), name)


def _from_preset(text: str, name: str) -> Variant:
    family, density, options = _split(text, name)
    if density is not None:
        options["density"] = density
    return plan_variant(AccelPlan.preset(family, **options), name)


def _from_diffusers(text: str, name: str) -> Variant:
    technique, threshold, options = _split(text, name)
    if technique != "first_block" or options:
        raise ValueError(
            f"variant {name!r}: expected diffusers:first_block or diffusers:first_block@THRESHOLD"
        )

    @contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        from diffusers import FirstBlockCacheConfig

        config = FirstBlockCacheConfig() if threshold is None else FirstBlockCacheConfig(threshold=threshold)
        pipe.transformer.enable_cache(config)
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    return Variant(name, apply, None, name)


KINDS: dict[str, Callable[[str, str], Variant]] = {
    "plan": _from_plan,
    "preset": _from_preset,
    "diffusers": _from_diffusers,
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
            f"variant {name!r}: expected dense, plan:DIR, preset:FAMILY@DENSITY[:OPTION=VALUE] "
            "or diffusers:first_block[@THRESHOLD]"
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
