"""What the gates of MagCache and TeaCache need to know of a model, from one dense generation."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from dit_accel.caching.calls import block_inputs, block_outputs, named_arguments
from dit_accel.caching.gates import polynomial_fit, relative_l1
from dit_accel.clock import Clock
from dit_accel.evaluation.generate import generate, quiet
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.pipelines import family_of, transformers_of
from dit_accel.state import check_plain

__all__ = ["Curves", "measure_cache"]

_DEGREE = 4  # as TeaCache's authors fit


class Curves(TypedDict):
    """Fields of `CacheConfig`: `curve` of the gate "magcache", `polynomial` of the gate "teacache"."""

    curve: tuple[float, ...]
    polynomial: tuple[float, ...]


def measure_cache(
    pipe: Any,
    prompt: str,
    *,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int = 0,
) -> Curves:
    """Generate one prompt densely and measure how the transformer's residual and output change from step to step.

    The first forward of each step counts, which is the conditional branch where there are two.

    Args:
        pipe: a diffusers pipeline with a supported transformer, without a plan or another cache on it.
        num_inference_steps: more than the polynomial's 5 coefficients.

    Returns:
        `curve`, the mean over tokens of `|R_t| / |R_(t-1)|` at each step, the first 1 (MagCache, arXiv 2506.09045); and
        `polynomial`, of degree 4, from the relative L1 change of the first block's modulated input to that of the last
        block's output (TeaCache, arXiv 2411.19108).

    Raises:
        ValueError: an unsupported transformer, two of them, one with a plan or a cache, or too few steps.

    Example:
        >>> fields = measure_cache(pipe, "a red circle moves left", height=160, width=192, num_frames=33,
        ...                        num_inference_steps=20, guidance_scale=4.0)
        >>> plan = AccelPlan.preset("magcache", curve=fields["curve"])
    """
    if num_inference_steps <= _DEGREE + 1:
        raise ValueError(
            f"num_inference_steps: expected more than {_DEGREE + 1} for a polynomial of degree {_DEGREE}, got "
            f"{num_inference_steps}"
        )
    check_plain(pipe)
    if len(transformers_of(pipe)) > 1:
        raise ValueError(
            f"pipe: expected one transformer, got {type(pipe).__name__} with two experts, each of which has a curve of "
            "its own; use a cache that needs none"
        )
    watch = _Watch(pipe.transformer, Clock(pipe))
    settings = GenerationSettings(height, width, num_frames, num_inference_steps, guidance_scale)
    try:
        with quiet(pipe):
            generate(pipe, prompt, settings, seed=seed)
    finally:
        watch.remove()
    polynomial = polynomial_fit(watch.changes, watch.outcomes, _DEGREE)
    return {"curve": (1.0, *watch.ratios), "polynomial": polynomial}


class _Watch:
    """Sees the first block's input and the last block's output of the first forward of every step."""

    def __init__(self, transformer: nn.Module, clock: Clock) -> None:
        self._clock = clock
        self._family = family_of(transformer)
        blocks = [block for name, _ in self._family.blocks for block in getattr(transformer, name)]
        self._handles = [
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            blocks[-1].register_forward_hook(self._leave),
        ]
        self._here: tuple[int | None, float] | None = None
        self._new = False
        self._input: Tensor | None = None
        self._signals: list[Tensor] = []
        self._last: tuple[Tensor, Tensor] | None = None
        self.changes: list[float] = []
        self.outcomes: list[float] = []
        self.ratios: list[float] = []

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        progress = self._family.progress(self._family.bind(module, args, kwargs))
        # Steps whose timesteps a pipeline rounds to the same number are steps of their own.
        here = self._clock.step_index(), self._clock.unrounded(progress)
        self._new, self._here = here != self._here, here

    @torch.no_grad()
    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._new:
            return
        self._input = block_inputs(self._family, args, kwargs)[0]
        self._signals = [*self._signals, self._family.modulated(block, named_arguments(block, args, kwargs))][
            -2:
        ]

    @torch.no_grad()
    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._new or self._input is None:
            return
        after = block_outputs(self._family, output)[0]
        residual = after - self._input
        if self._last is not None:
            before, last = self._last
            self.changes.append(relative_l1(self._signals[1], self._signals[0]))
            self.outcomes.append(relative_l1(after, before))
            norms = residual.float().norm(dim=-1) / last.float().norm(dim=-1).clamp(min=1e-12)
            self.ratios.append(float(norms.mean()))
        self._last = after, residual
