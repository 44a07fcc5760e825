"""Attention processors that are the model's own, with the one attention function they call redirected.

A processor of diffusers is a small class whose `__call__` projects, normalises, rotates and then calls one
global, `dispatch_attention_fn` or `F.scaled_dot_product_attention`. `swapped_class` makes a subclass whose
`__call__` is the same code object with that global bound to a function of ours. Behind it stands one opaque
torch.library op, so that looking up the plan never breaks a graph and never recompiles, whatever the step,
the range or the layer.
"""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.attention import attend
from dit_accel.state import AccelState, ForwardError

_LAYER_ATTRIBUTE = "_dit_accel_layer"


class LayerCursor:
    """The number of the attention module that runs, noted by a forward pre-hook on each of them.

    Unlike a counter it stays right when a cache skips blocks. The number is a tensor because compiled blocks
    take tensors as inputs, while an integer would be a constant of the graph, recompiled for every layer.
    """

    def __init__(self) -> None:
        self.layer = torch.tensor(-1, device="cpu")

    def watch(self, modules: list[nn.Module]) -> Callable[[], None]:
        """Number the attention modules and hook them; return a function that undoes both."""

        def mark(module: nn.Module, args: Any) -> None:
            self.layer = getattr(module, _LAYER_ATTRIBUTE)

        handles = []
        for number, module in enumerate(modules):
            setattr(module, _LAYER_ATTRIBUTE, torch.tensor(number, device="cpu"))
            handles.append(module.register_forward_pre_hook(mark))

        def unwatch() -> None:
            for module, handle in zip(modules, handles, strict=True):
                handle.remove()
                delattr(module, _LAYER_ATTRIBUTE)

        return unwatch


class Redirect:
    """Where the attention calls of one swapped processor class go: to the plan of `state`, or to `original`.

    `heads_first` says that `original` takes `[batch, heads, seq, dim]` and knows no backends.
    """

    def __init__(self, state: AccelState, original: Callable[..., Tensor], heads_first: bool) -> None:
        self.state = state
        self.original = original
        self.heads_first = heads_first
        self.handle = next(_handles)
        _redirects[self.handle] = self


# Ops take numbers, not objects. A redirect lives as long as the processor class that calls it.
_handles = itertools.count(1)
_redirects: weakref.WeakValueDictionary[int, Redirect] = weakref.WeakValueDictionary()


def check_processor(processor_class: type, attention_function: str) -> None:
    """Refuse a processor class that cannot be swapped.

    Raises:
        ValueError: it does not call `attention_function`, see `ModelFamily.attention_function`.
    """
    function = processor_class.__call__
    names = set(attention_function.split("."))
    if not isinstance(function, types.FunctionType) or not names <= set(function.__code__.co_names):
        raise ValueError(
            f"attention processor: expected one that calls {attention_function}, "
            f"got {processor_class.__name__}; restore the model's own processors before enabling dit-accel"
        )


def swapped_class(
    processor_class: Any, attention_function: str, state: AccelState, cursor: LayerCursor
) -> type:
    """Subclass a processor class so that its attention follows the plan of `state`; see `check_processor`.

    Args:
        processor_class: the class of the processor a model has.
        attention_function: the global it calls, see `ModelFamily.attention_function`.
        state: plan and position; it must be told of every forward of the transformer.
        cursor: knows the layer that runs.
    """
    function = processor_class.__call__
    name, _, attribute = attention_function.partition(".")
    scope = dict(function.__globals__)
    # Dynamo looks the globals of a function with a __name__ up in the module of that name, not in this dict.
    module_name = scope.pop("__name__")
    if attribute:
        original = getattr(scope[name], attribute)
        module = types.ModuleType(name)
        module.__dict__.update(vars(function.__globals__[name]))
        setattr(module, attribute, _attention_function(Redirect(state, original, True), cursor))
        scope[name] = module
    else:
        scope[name] = _attention_function(Redirect(state, scope[name], False), cursor)
    call = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    call.__kwdefaults__ = function.__kwdefaults__
    call.__annotations__ = function.__annotations__
    call.__qualname__ = function.__qualname__
    call.__module__ = module_name
    return type(processor_class.__name__, (processor_class,), {"__call__": call, "__module__": module_name})


def swapped_processor(processor: Any, swapped: type) -> Any:
    """Return a `swapped` twin of a processor.

    The two share their attributes, so a backend or a parallel config set on one is set on both.
    """
    twin: Any = object.__new__(swapped)
    twin.__dict__ = processor.__dict__
    return twin


def _attention_function(redirect: Redirect, cursor: LayerCursor) -> Callable[..., Tensor]:
    def dispatch_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        if parallel_config is not None:
            # Only plans that are dense throughout get here, the hook on the transformer refuses others.
            return redirect.original(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                backend=backend,
                parallel_config=parallel_config,
            )
        name = None if backend is None else str(getattr(backend, "value", backend))
        query, key, value = _as_autocast(query, key, value)
        return _attention_op(
            query, key, value, attn_mask, cursor.layer, redirect.handle, dropout_p, is_causal, scale, name
        )

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        query, key, value = _as_autocast(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        output = _attention_op(
            query, key, value, attn_mask, cursor.layer, redirect.handle, dropout_p, is_causal, scale, None
        )
        return output.transpose(1, 2)

    return scaled_dot_product_attention if redirect.heads_first else dispatch_attention


def _as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What torch's own attention would get under autocast: norms of queries and keys may leave them in float32.

    Outside the op, since a compiled graph has casts written down and runs with autocast off.
    """
    device = query.device.type
    if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


# A CUDA graph would replay the choice that was right when it was recorded.
@torch.library.custom_op("dit_accel::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    layer: Tensor,
    handle: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    redirect = _redirects[handle]
    state = redirect.state
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    with nullcontext() if state.watch is None else state.watch():
        if query.shape[1] == key.shape[1]:
            output = _planned(state, int(layer), query, key, value, attn_mask, **options)
            if output is not None:
                return output
        if redirect.heads_first:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            return redirect.original(query, key, value, attn_mask, **options).transpose(1, 2).contiguous()
        return redirect.original(query, key, value, attn_mask, **options, backend=backend).contiguous()


@_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _planned(
    state: AccelState,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor | None:
    """Run one attention call by the plan; None where the plan is dense: then the original function runs."""
    if not state.running:
        raise RuntimeError(
            "dit-accel: an attention processor ran outside a forward of the transformer it was made for; "
            "enable() that transformer, or restore its own processors."
        )
    row, dense = state.row(layer)
    if state.capture is not None:
        state.capture(layer, query, key, value, _key_mask(attn_mask, query))
    batch, tokens, heads, _ = query.shape
    pairs = batch * heads * tokens * tokens
    if dense:
        state.launches.pop(layer, None)
        state.record(pairs, 1.0, sparse=False)
        return None
    if is_causal or dropout_p:
        raise ForwardError("dit-accel: a sparse plan cannot run causal attention or attention with dropout")
    if state.grid is None or state.grid.total_tokens != tokens:
        raise ForwardError(
            f"dit-accel: layer {layer}: expected the tokens of {state.grid}, got a sequence of {tokens}"
        )
    key_mask = _key_mask(attn_mask, query)
    block, backend = state.plan.block, state.backend
    # Under autocast the model's tensors have its dtype; choices and low-rank weights keep the one they ask for.
    with torch.autocast(query.device.type, enabled=False):
        output, density = attend(
            query,
            key,
            value,
            state.grid,
            state.plan.candidates,
            row,
            block=block,
            scale=scale,
            key_mask=key_mask,
            backend=backend,
            layer=layer,
            branch=state.branch,
            # Without a second branch there is nobody to keep a choice for; in the first step nobody knows.
            step=state.step if state.several_branches else None,
            now=state.step,
            paired=state.holds_both(query),
            cache=state.cache,
            launches=state.launches,
        )
    guard, number = state.guard, state.plan.range_at(state.progress)
    if guard is not None and (when := guard.due(state.guarded, state.branch, layer, state.forwards, number)):
        masked: dict[str, Any] = {"scale": scale, "key_mask": key_mask}
        wrong = guard.check(query, key, value, output, number, layer, state.guarded, **masked)
        if when == "now":
            output = guard.repaired(wrong, output, query, key, value, block=block, backend=backend, **masked)
            repaired = wrong.float().mean()
            # Not in place: a launch that is kept has its density on the device.
            density = density + (1.0 - density) * (repaired if query.is_cuda else float(repaired))
    state.record(pairs, density, sparse=True)
    return output.contiguous()


def _key_mask(attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Turn a key-padding mask bool `[batch or 1, 1, 1, seq]` into bool `[batch, seq]`."""
    if attn_mask is None:
        return None
    batch, tokens = query.shape[:2]
    shape = tuple(attn_mask.shape)
    if attn_mask.dtype != torch.bool or shape not in {(batch, 1, 1, tokens), (1, 1, 1, tokens)}:
        raise ForwardError(
            f"attn_mask: expected a key-padding mask, bool [{batch}, 1, 1, {tokens}], got {attn_mask.dtype} "
            f"{list(shape)}; only a plan with every head dense can run with other masks"
        )
    return attn_mask[:, 0, 0].expand(batch, tokens)
