"""Forecasts from values computed at earlier steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["History", "polynomial_weights", "weighted_sum"]


def polynomial_weights(steps: Sequence[float], at: float) -> list[float]:
    """Weights of the values at `steps` in the value at `at` of the polynomial through all of them.

    With n + 1 steps, which need not be evenly spaced, a polynomial of degree n is continued exactly; one step repeats,
    two evenly spaced ones give the first-order Taylor forecast of TaylorSeer (arXiv 2503.06923).
    """
    weights = []
    for i, here in enumerate(steps):
        weight = 1.0
        for j, other in enumerate(steps):
            if i != j:
                weight *= (at - other) / (here - other)
        weights.append(weight)
    return weights


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of `weights[i] · values[i]` in float32 (float64 for float64), in the dtype of the values."""
    if len(values) == 1 and weights[0] == 1.0:
        return values[0]
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(dtype) * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.add_(value, alpha=weight)
    return total.to(values[0].dtype)


class History:
    """The last computed values of one thing, a tuple of tensors each, with the steps they belong to."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.steps: list[int] = []
        self.values: list[tuple[Tensor, ...]] = []

    def push(self, step: int, value: tuple[Tensor, ...], *, instead: bool = False) -> None:
        """Add the value of a step, or put it in the place of the newest; the oldest goes when there are too many."""
        kept = len(self.steps) - 1 if instead else len(self.steps)
        self.steps = [*self.steps[:kept], step][-self.length :]
        self.values = [*self.values[:kept], value][-self.length :]

    def forecast(self, step: float) -> tuple[Tensor, ...]:
        """The values at a later step; the degree is what the history allows, at most `length` - 1."""
        weights = polynomial_weights(self.steps, step)
        return tuple(weighted_sum(parts, weights) for parts in zip(*self.values, strict=True))

    @property
    def bytes(self) -> int:
        """Memory of all values."""
        return sum(part.numel() * part.element_size() for value in self.values for part in value)
