"""How far an error in a head's output moves the model's prediction, measured by one backward pass.

For a random direction z of the prediction v with independent normal entries, `E (z·Δv)² = |Δv|²`. To first order an
error δ of an attention output gives `z·Δv = g·δ` with the gradient `g = ∂(z·v)/∂output` (Hutchinson's estimator). One
backward pass yields g for every token, head and layer, so the cost does not depend on how many heads or candidates
there are. Errors of different tokens are taken as independent: `|Δv|² ≈ Σ_tokens (g·δ)²`, the mean over many rows
of what one direction tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel import processor  # noqa: F401, defines the operator
from dit_accel.evaluation.timing import now
from dit_accel.state import AccelState

# receive(state, layer, query, key, value, key_mask, gradient) for each attention call of a probed forward, the last
# layer first; tensors `[batch, seq, heads, dim]`, the gradient that of z·v / |v|.
Receive = Callable[[AccelState, int, Tensor, Tensor, Tensor, Tensor | None, Tensor], None]

# Bytes that a backward pass may keep before blocks are computed a second time instead (gradient checkpointing).
_KEPT_BYTES = 8 * 2**30
# Activations of one block that autograd keeps, in units of its hidden states; measured on Wan blocks about 20.
_KEPT_PER_BLOCK = 24


class Downstream:
    """Sends a random direction backward through chosen forwards of one transformer.

    The forward stays the one whose prediction the pipeline uses. Weights get no gradients.

    Args:
        wanted: asked before each forward whether it is to be probed.
        receive: see `Receive`.
        seed: of the random directions; every probed forward has its own.

    Attributes:
        seconds: time spent on backward passes, what `receive` does included.
    """

    def __init__(
        self,
        state: AccelState,
        layers: int,
        wanted: Callable[[AccelState], bool],
        receive: Receive,
        seed: int,
    ) -> None:
        self._state = state
        self._layers = layers
        self._wanted = wanted
        self._receive = receive
        self._generator = torch.Generator().manual_seed(seed)
        self._input: Tensor | None = None
        self._grad_mode = False
        self.seconds = 0.0

    @contextmanager
    def watching(self, transformer: nn.Module) -> Iterator[None]:
        """Probes the forwards of a transformer that has a plan and is dense throughout."""
        trained = [p for p in transformer.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        handles = [
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            # Before the hook that tells the state of the forward's end: recomputed blocks belong to it too.
            transformer.register_forward_hook(self._after, prepend=True, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trained:
                parameter.requires_grad_(True)

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._wanted(self._state):
            return None
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "downstream: expected gradients to be allowed, got torch.inference_mode(); leave it"
            )
        given = args[0] if args else kwargs["hidden_states"]
        self._input = given.detach().requires_grad_()
        _use_checkpoints(module, self._layers * _KEPT_PER_BLOCK * _hidden_bytes(module, self._state, given))
        self._grad_mode = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        if args:
            return (self._input, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._input}

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        given, self._input = self._input, None
        if given is None:
            return None
        try:
            if output is None:  # the forward failed
                return None
            prediction = output[0]
            shape = prediction.shape
            direction = torch.randn(shape, generator=self._generator).to(prediction.device)
            start = now(prediction.device)
            norm = torch.linalg.vector_norm(prediction.detach().float()).clamp(min=1e-30)
            self._backward((prediction.float() * (direction / norm)).sum(), given)
            self.seconds += now(prediction.device) - start
            if isinstance(output, tuple):
                return (prediction.detach(), *output[1:])
            output.sample = prediction.detach()
            return output
        finally:
            _use_checkpoints(module, 0)
            torch.set_grad_enabled(self._grad_mode)

    def _backward(self, along: Tensor, given: Tensor) -> None:
        global _running
        _running = self
        try:
            torch.autograd.grad(along, given)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"downstream: expected a transformer that gradients can pass, got {error}; use downstream=False"
            ) from error
        finally:
            _running = None

    def gradient(
        self, layer: int, tensors: tuple[Tensor, ...], mask: Tensor | None, gradient: Tensor
    ) -> bool:
        """Hands on the gradient of one call; returns whether layers below this one need theirs."""
        query, key, value = tensors
        key_mask = None if mask is None else mask[:, 0, 0].expand(query.shape[:2])
        with torch.no_grad():
            self._receive(self._state, layer, query, key, value, key_mask, gradient)
        return layer > 0


# The backward pass under way. Autograd may run it on a thread of its own, which thread-local values do not reach.
_running: Downstream | None = None


def _hidden_bytes(transformer: nn.Module, state: AccelState, given: Tensor) -> int:
    """Bytes of the hidden states `[batch, seq, width]` inside a transformer."""
    config: Any = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    tokens = state.grid.total_tokens if state.grid is not None else 0
    return given.shape[0] * tokens * width * given.element_size()


def _use_checkpoints(transformer: Any, kept_bytes: int) -> None:
    """Computes blocks a second time in the backward pass where keeping them would take too much memory."""
    if kept_bytes > _KEPT_BYTES:
        if not transformer.is_gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
            transformer._dit_accel_checkpoints = True
    elif getattr(transformer, "_dit_accel_checkpoints", False):
        transformer.disable_gradient_checkpointing()
        del transformer._dit_accel_checkpoints


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, layer, _, _, _, scale, _ = inputs
    ctx.save_for_backward(query, key, value, mask)
    ctx.layer, ctx.scale = int(layer), scale


def _attention_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of dense attention, computed again from its inputs."""
    nothing = (None,) * 7
    if _running is None:
        raise RuntimeError("dit-accel: attention by a plan has no gradients; disable() it before training")
    *tensors, mask = ctx.saved_tensors
    if not _running.gradient(ctx.layer, tuple(tensors), mask, gradient):
        return (None, None, None, *nothing)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in tensors]
        q, k, v = (x.transpose(1, 2) for x in inputs)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=ctx.scale).transpose(1, 2)
    return (*torch.autograd.grad(output, inputs, gradient), *nothing)


torch.library.register_autograd("dit_accel::attention", _attention_gradients, setup_context=_save)
