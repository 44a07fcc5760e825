"""Splits the denoising steps into spans, picks the step of each to profile and weighs each step's error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Where the spans begin, as fractions of the steps: finer early, where the picture is decided. One step of each is
# profiled; which of them make up a range of the plan is found from that (see `ranges`).
SPAN_FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)

# Standard deviation of the latents' dominant directions, in units of the noise. Layout and large shapes are
# common to many latent values, so along those directions the signal is several times stronger than the noise.
# Measured on the demo model (20 steps, one step at a time repeated): errors in the first half of the steps come out 85,
# 65, 39 and 34 times as large in square at the noise levels .99, .93, .90 and .85; 9 gives 82, 64, 48 and 31.
_SIGNAL_STD = 9.0

# That is the effect of a small error on how the picture comes out. Near pure noise an error also changes what is drawn,
# differently from prompt to prompt, which one calibration prompt cannot tell. At equal predicted cost (demo model, 33
# frames of 96x128, calibrated on one prompt) weights as they are gave 30.7 dB on that prompt and 29.0, 28.0 and 26.5 on
# three others; the first tenth of the steps times 16 and the next fifth times 4 gave 31.0, and 36.2, 29.8 and 28.5.
_LAYOUT, _LAYOUT_PROGRESS = 15.0, 0.03

# Errors that one choice of attention makes at two steps point the same way the more, the less the noise changed: their
# correlation is exp(-|difference of log(progress / noise)| / 1.9), on the demo model (24 heads, density .25, 20 steps)
# 1.2 to 2.9 over all pairs of steps, .2 to 4.8 apart, without a trend.
_COHERENCE = 1.9
_NEAREST_END = 0.002  # of progress; beyond it the logarithm says nothing


def span_bounds(steps: int, fractions: Sequence[float] = SPAN_FRACTIONS) -> tuple[int, ...]:
    """Step index at which each span begins, followed by `steps`; every span has at least one step.

    Raises:
        ValueError: if there is no step.
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    starts: list[int] = []
    for fraction in fractions:
        start = max(round(fraction * steps), starts[-1] + 1 if starts else 0)
        if start < steps:
            starts.append(start)
    return (*starts, steps)


def sampled_steps(bounds: Sequence[int], share: int, shares: int) -> dict[int, int]:
    """Steps to profile, one per span: {step: span}. The prompts, `shares` of them, take different steps."""
    return {
        start + (2 * share + 1) * (stop - start) // (2 * shares): number
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
    }


def range_starts(bounds: Sequence[int], progress: Sequence[float]) -> tuple[float, ...]:
    """Progress at which each range begins: midway between its first step and the one before."""
    return (0.0, *((progress[b - 1] + progress[b]) / 2 for b in bounds[1:-1]))


def step_weights(progress: Sequence[float]) -> tuple[float, ...]:
    """How much an equal squared error of the prediction at each step counts in the final latents.

    An error at noise level s = 1 - progress moves the latents by the step's length. Along a direction in
    which the data is Gaussian with standard deviation a, the flow from there to the end scales it by a /
    sqrt((1 - s)^2 a^2 + s^2), the ratio of the standard deviations of x_0 and x_s = (1 - s) x_0 + s * noise. Where the
    layout is decided, errors count `1 + _LAYOUT * exp(-progress / _LAYOUT_PROGRESS)` times as much.
    """
    ends = [*progress[1:], 1.0]
    effect = []
    for now, end in zip(progress, ends, strict=True):
        noise = 1.0 - now
        gain = _SIGNAL_STD / ((now * _SIGNAL_STD) ** 2 + noise**2) ** 0.5
        layout = 1 + _LAYOUT * math.exp(-now / _LAYOUT_PROGRESS)
        effect.append(layout * ((end - now) * gain) ** 2)
    return tuple(effect)


def span_weights(bounds: Sequence[int], progress: Sequence[float]) -> tuple[float, ...]:
    """How much an equal squared error of attention at every step of a span counts in the final latents.

    Errors of steps that are alike add before they are squared: every pair of steps counts with the product of the roots
    of their `step_weights`, times the correlation of their errors. A pair of two spans counts half for each.
    """
    alone = np.sqrt(step_weights(progress))[None]
    return carried_weights(bounds, progress, alone, np.ones(len(bounds) - 1))


def carried_weights(
    bounds: Sequence[int], progress: Sequence[float], leverage: NDArray[Any], alike: NDArray[Any]
) -> tuple[float, ...]:
    """`span_weights` where the error of a forward also reaches the steps whose forecasts read its output.

    What is carried further may cancel what other forwards err, but a step never counts less than by itself: that errors
    of different steps cancel is not relied on.

    Args:
        leverage: `[branches, steps]`, how far an error of a forward moves the final latents, with its sign; 0 where it
            is not computed. A step that all others compute themselves has the root of its `step_weights`, times its
            branch's share in the guided output.
        alike: `[spans]`, correlation of the errors of two branches.
    """
    places = np.clip(progress, _NEAREST_END, 1 - _NEAREST_END)
    ratios = np.log(places / (1 - places))
    coherent = np.exp(-np.abs(ratios[:, None] - ratios) / _COHERENCE)
    between = np.sqrt(np.repeat(alike, np.diff(bounds)))
    same = leverage.T @ leverage
    products = same + np.outer(between, between) * (np.outer(leverage.sum(0), leverage.sum(0)) - same)
    by_step = np.maximum((coherent * products).sum(1), products.diagonal())
    return tuple(float(by_step[start:stop].sum()) for start, stop in itertools.pairwise(bounds))
