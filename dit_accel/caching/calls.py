"""Reads the arguments and outputs of a block's call and of a transformer's, and replaces what they return."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dit_accel.pipelines import ModelFamily

__all__ = ["block_inputs", "block_outputs", "like", "named_arguments", "with_sample"]


def block_inputs(
    family: ModelFamily, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Hidden states and text of a block's arguments, which all families name alike and take first."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if "encoder_hidden_states" not in family.block_returns:
        return hidden, None
    return hidden, kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]


def block_outputs(family: ModelFamily, output: Any) -> tuple[Tensor, Tensor | None]:
    """Hidden states and text of what a block returned."""
    parts = output if isinstance(output, tuple) else (output,)
    by_name = dict(zip(family.block_returns, parts, strict=True))
    return by_name["hidden_states"], by_name.get("encoder_hidden_states")


def named_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a block by name."""
    return dict(zip(_parameter_names(type(block).forward), args, strict=False)) | kwargs


@functools.cache
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def like(latents: Tensor, sample: Tensor) -> Tensor:
    """The part of the transformer's input that its output speaks of: image-to-video appends channels to it."""
    part = latents[tuple(slice(size) for size in sample.shape)]
    if latents.ndim != sample.ndim or part.shape != sample.shape:
        raise ValueError(
            f"cache: expected latents of at least the output's shape {tuple(sample.shape)}, got "
            f"{tuple(latents.shape)}; this model cannot use a forecast that reads the latents"
        )
    return part


def with_sample(output: Any, sample: Tensor) -> Any:
    """A transformer's output, tuple or dataclass, with its first value replaced."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return dataclasses.replace(output, sample=sample)
