"""Put a plan on a pipeline, take it off again, and report what it did."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, cast

import torch
from diffusers.hooks import HookRegistry
from torch import nn

from dit_accel.caching.runtime import StepCache
from dit_accel.clock import Clock
from dit_accel.guard import Guard
from dit_accel.kernels.block_sparse.api import BACKENDS
from dit_accel.pipelines import family_of, transformers_of
from dit_accel.plan import AccelPlan, config_hash_of
from dit_accel.processor import LayerCursor, check_processor, swapped_class, swapped_processor
from dit_accel.state import HOOK_NAME, AccelHook, AccelState, Stats, hook_of, other_cache


def enable(pipe: Any, plan: AccelPlan, *, backend: str = "auto", guard: bool | None = None) -> Any:
    """Run a pipeline by a plan: its attention, and where the plan has a cache also which steps are computed.

    Only self-attention and joint attention over the video tokens changes; where the plan is dense, the
    model's own attention runs with its own backend. A pipeline with two experts (Wan 2.2) gets the plan on
    both, each with a cache of its own; only a schedule of steps reads what either computed.

    Args:
        pipe: a diffusers pipeline or one of its transformers; a plan with a cache needs the pipeline. Compile it
            afterwards, not before, and block by block (`compile_repeated_blocks`) if there is a cache.
        plan: a calibrated plan or a preset.
        backend: what runs the sparse attention, see `dit_accel.kernels.block_sparse_attention`.
        guard: check the heads while they run, and make those dense that err far more than at calibration; see
            `dit_accel.guard.Guard`. None does so for every calibrated plan that has sparse heads.

    Returns:
        The same `pipe`.

    Raises:
        PlanError: the plan belongs to another model.
        ValueError: a model that is not supported, is compiled already, or has a plan or another cache already.

    Example:
        >>> pipe = dit_accel.enable(pipe, dit_accel.AccelPlan.preset("window", density=0.3))
    """
    transformers = transformers_of(pipe)
    for transformer in transformers:
        _check(transformer, plan, backend)
    if guard:
        Guard(plan)
    caches = [_step_cache(pipe, transformer, plan) for transformer in transformers]
    clock = None if isinstance(pipe, nn.Module) else Clock(pipe)
    for transformer, steps in zip(transformers, caches, strict=True):
        processors = _install(transformer, plan, backend, steps, clock, guard)
        cast(Any, transformer).set_attn_processor(processors)
        cast(AccelHook, hook_of(transformer)).in_place = True
    return pipe


def attn_processors(transformer: nn.Module, plan: AccelPlan, *, backend: str = "auto") -> dict[str, Any]:
    """Return processors that run attention by a plan, for `transformer.set_attn_processor(...)`.

    Processors cannot know the denoising position, so this also puts a hook on the transformer, which stays
    there until `disable(transformer)`. The dict has every processor of the model, those not swapped as they
    are; note that `set_attn_processor` empties the dict it is given.

    Raises:
        PlanError: the plan belongs to another model.
        ValueError: a model that is not supported, is compiled already or has a plan already.
    """
    _check(transformer, plan, backend)
    _step_cache(transformer, transformer, plan)
    return _install(transformer, plan, backend)


def disable(pipe: Any) -> Any:
    """Take the plan off a pipeline or transformer: its own processor objects return, the hooks go.

    Raises:
        ValueError: there is no plan on it.
    """
    for hook in _hooks(pipe):
        hook.restore()
    return pipe


def stats(pipe: Any) -> dict[str, float]:
    """Report the attention calls of the last generation.

    Returns:
        `density_mean` (query-key pairs kept ÷ all pairs of the calls made, dense ones included), and the numbers of
        calls `sparse_calls` and `dense_calls`. With a guard also `guarded_heads`, which it made dense; with a cache
        `computed_forwards`, `skipped_forwards`, `computed_blocks`, `skipped_blocks` and `cache_bytes`.

    Raises:
        ValueError: there is no plan on the pipeline, or nothing was generated yet.
    """
    hooks = _hooks(pipe)
    # Experts may count on two GPUs.
    counted = [hook.state.stats for hook in hooks]
    total = sum((dataclasses.replace(one, kept_pairs=float(one.kept_pairs)) for one in counted), Stats())
    if not total.total_pairs:
        raise ValueError("stats: expected a generation since enable(), got none; run the pipeline first")
    return {
        "density_mean": float(total.kept_pairs) / total.total_pairs,
        "sparse_calls": total.sparse_calls,
        "dense_calls": total.dense_calls,
        **_extra_stats(hooks),
    }


def _extra_stats(hooks: list[AccelHook]) -> dict[str, float]:
    found: Counter[str] = Counter()
    for hook in hooks:
        if hook.state.guard is not None:
            found["guarded_heads"] += hook.state.guarded_heads
        if hook.steps is not None:
            found.update(dataclasses.asdict(hook.steps.counts(hook.state.memory)))
            # One expert lets go before the next one keeps anything.
            found["cache_bytes"] = max(found["cache_bytes"], hook.steps.bytes(hook.state.memory))
    return dict(found)


def states(pipe: Any) -> list[AccelState]:
    """Return the state of each transformer of a pipeline, for instance to set its `capture`.

    Raises:
        ValueError: there is no plan on the pipeline.
    """
    return [hook.state for hook in _hooks(pipe)]


def _hooks(pipe: Any) -> list[AccelHook]:
    hooks = [hook for transformer in transformers_of(pipe) if (hook := hook_of(transformer))]
    if not hooks:
        raise ValueError("dit-accel is not enabled here; call dit_accel.enable(pipe, plan) first")
    return hooks


def _check(transformer: nn.Module, plan: AccelPlan, backend: str) -> None:
    if not isinstance(plan, AccelPlan):
        raise TypeError(
            f"plan: expected an AccelPlan, got {type(plan).__name__}; AccelPlan.from_pretrained reads one"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if _is_compiled(transformer):
        raise ValueError("the transformer is compiled already; call enable() first and compile after it")
    family = family_of(transformer)
    devices = {str(place) for place in getattr(transformer, "hf_device_map", {}).values()} - {"cpu", "disk"}
    if len(devices) > 1:
        raise ValueError(
            f"transformer: expected it on one device, got its layers on {', '.join(sorted(devices))}; load it without "
            "device_map, or with enable_model_cpu_offload()"
        )
    if hook_of(transformer):
        raise ValueError(
            "dit-accel is enabled here already; call dit_accel.disable(pipe) before enabling another plan"
        )
    modules = family.attention_modules(transformer)
    for module in modules.values():
        check_processor(type(module.processor), family.attention_function)
    heads = cast(Any, next(iter(modules.values()))).heads
    plan.check(family.transformer_class, config_hash_of(transformer), tuple(modules), heads)


def _is_compiled(transformer: nn.Module) -> bool:
    if isinstance(transformer, torch._dynamo.OptimizedModule):
        return True
    return any(module._compiled_call_impl is not None for module in transformer.modules())


def _step_cache(pipe: Any, transformer: nn.Module, plan: AccelPlan) -> StepCache | None:
    """The cache that a plan asks for, for one transformer of a pipeline."""
    if plan.cache is None:
        return None
    if isinstance(pipe, nn.Module):
        raise ValueError(
            f"pipe: expected a pipeline, since the plan's cache needs its step schedule, got {type(pipe).__name__}; "
            "call enable(pipe, plan), or use dataclasses.replace(plan, cache=None)"
        )
    other = other_cache(transformer)
    if other is not None:
        raise ValueError(
            f"transformer: expected no cache beside the plan's own, got {other}; disable it, or use "
            "dataclasses.replace(plan, cache=None)"
        )
    return StepCache(transformer, family_of(transformer), plan.cache)


def _install(
    transformer: nn.Module,
    plan: AccelPlan,
    backend: str,
    steps: StepCache | None = None,
    clock: Clock | None = None,
    guard: bool | None = None,
) -> dict[str, Any]:
    """Hook a transformer that passed `_check`; return all its processors, those of the plan swapped."""
    family = family_of(transformer)
    modules = family.attention_modules(transformer)
    state = AccelState(plan, family, backend, layers=len(modules))
    if guard or (guard is None and plan.rel_l2 is not None and not state.all_dense):
        state.guard = Guard(plan)
    processors = dict(cast(Any, transformer).attn_processors)
    originals = dict(processors)
    cursor = LayerCursor()
    classes: dict[type, type] = {}
    for name in modules:
        processor = processors[f"{name}.processor"]
        cls = type(processor)
        if cls not in classes:
            classes[cls] = swapped_class(cls, family.attention_function, state, cursor)
        processors[f"{name}.processor"] = swapped_processor(processor, classes[cls])
    unwatch = cursor.watch(list(modules.values()))
    uninstall = None if steps is None else steps.install()
    registry = HookRegistry.check_if_exists_or_initialize(transformer)

    def restore() -> None:
        unwatch()
        if uninstall is not None:
            uninstall()
        # Removing a diffusers hook puts `forward` back to what it was before, without what came on top since.
        forward = transformer.forward
        _remove_hook(registry)
        if forward is not hooked_forward:
            transformer.forward = forward
        state.reset()
        for name, module in modules.items():
            if type(module.processor) in classes.values():
                cast(Any, module).set_processor(originals[f"{name}.processor"])

    if clock is not None:  # also what an expert that has not run yet knows of the generation before
        clock.on_new.append(state.reset)
    swapped = {
        name: (module, classes[type(originals[f"{name}.processor"])]) for name, module in modules.items()
    }
    registry.register_hook(AccelHook(state, restore, swapped, steps, clock), HOOK_NAME)
    hooked_forward = transformer.forward
    return processors


def _remove_hook(registry: HookRegistry) -> None:
    """Take the hook off a transformer and leave those behind it as they are.

    Diffusers gives the hook behind a removed one the plain forward, even if it has one of its own (FasterCache).
    """
    place = registry._hook_order.index(HOOK_NAME)
    behind = [r for r in registry._fn_refs[place + 1 : place + 2] if r.original_forward is not None]
    own = [reference.forward for reference in behind]
    registry.remove_hook(HOOK_NAME, recurse=False)
    for reference, forward in zip(behind, own, strict=True):
        reference.original_forward, reference.forward = reference.forward, forward
