"""How much memory a cache takes, told before anything runs."""

from __future__ import annotations

from typing import Any

from dit_accel.caching.config import CacheConfig
from dit_accel.grid import TokenGrid
from dit_accel.pipelines import family_of

__all__ = ["cache_bytes"]


def cache_bytes(
    transformer: Any, config: CacheConfig, grid: TokenGrid, *, batch: int = 1, branches: int = 2
) -> int:
    """Most bytes that a cache holds at a time in one generation, in the transformer's dtype.

    Args:
        transformer: of a supported class.
        config: of the cache.
        grid: of one forward's tokens.
        batch: of one forward.
        branches: of guidance that run one after the other: 2 with guidance as Wan's pipeline has it, 1 without, where
            guidance is embedded, and where both branches are one forward (with twice the batch). A schedule knows
            its own.

    Returns:
        What `dit_accel.stats` reports as `cache_bytes` where generations fill it: the forecasts' values and the gate's.
        TeaCache on Wan takes less, since its signal has no tokens there. A schedule at another number of steps than its
        own keeps two outputs for each branch instead.

    Raises:
        ValueError: a transformer of an unsupported class.

    Example:
        >>> cache_bytes(pipe.transformer, plan.cache, plan.grid)  # a calibrated plan knows its grid
    """
    family_of(transformer)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    item, tokens = transformer.dtype.itemsize * batch, grid.video_tokens
    hidden, text = item * tokens * width, item * grid.text_tokens * width
    per_token = transformer.proj_out.out_features
    channels = transformer.config.in_channels
    patch = per_token // (getattr(transformer.config, "out_channels", None) or channels)
    output, latents = item * tokens * per_token, item * tokens * channels * patch
    if config.schedule is not None:
        return output * config.schedule.most_held
    forecast = output if config.target == "output" else hidden + (text if config.last_blocks else 0)
    gate = {
        "always": 0,
        "magcache": 0,
        "easycache": 2 * latents + output,
        "teacache": hidden,
        "first-block": hidden,
        "cg-taylor": hidden * (config.gate_order + 1),
    }
    return branches * (config.order + 1) * forecast + gate[config.gate]
