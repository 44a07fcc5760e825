"""The curve that MagCache needs, measured on the model with diffusers' own calibration."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import MagCacheConfig

from dit_accel.evaluation.generate import generate
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.peers import diffusers_cache, diffusers_states
from dit_accel.pipelines import transformers_of


def magnitude_curve(
    pipe: Any,
    prompt: str,
    settings: GenerationSettings,
    *,
    seed: int,
    on_step: Callable[[], object] | None = None,
) -> tuple[float, ...]:
    """Mean ratio of the norms of successive residuals at every step of one dense generation.

    MagCache, arXiv 2506.09045: at step t the mean over tokens of ‖R_t‖ ÷ ‖R_{t−1}‖, R the output of the last block
    minus the input of the first; 1 at the first step. Measured by the calibration mode of diffusers' MagCache;
    branches of guidance are averaged. diffusers' and our gate read it alike.

    Raises:
        ValueError: a pipeline of two experts, of which neither sees all steps.
    """
    if len(transformers_of(pipe)) != 1:
        raise ValueError(
            f"pipe: expected one transformer for the curve of MagCache, got {len(transformers_of(pipe))}; "
            "leave MagCache out"
        )
    ratios: list[list[float]] = []

    def look() -> None:
        ratios[:] = [list(state.calibration_ratios) for state in diffusers_states(pipe)]
        if on_step is not None:
            on_step()

    # One step more than there are: at the last one diffusers prints the ratios and forgets them.
    config = MagCacheConfig(calibrate=True, num_inference_steps=settings.num_inference_steps + 1)
    with diffusers_cache(pipe, config):
        generate(pipe, prompt, settings, seed=seed, on_step=look)
    return tuple(torch.tensor(ratios, dtype=torch.float64).mean(0).tolist())
