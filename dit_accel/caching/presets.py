"""Published caches as configurations, with the settings of their authors."""

from __future__ import annotations

import dataclasses
from typing import Any

from dit_accel.caching.config import CacheConfig

__all__ = ["CACHES", "cache_preset"]

# The fields of each; what is not named has the default of `CacheConfig`, which adds a limit of three skips in a row
# where authors have none.
CACHES: dict[str, dict[str, Any]] = {
    # Head forecast of order 1 gates a forecast of order 1 of the last block's output; active after five steps.
    "cg-taylor": {"gate": "cg-taylor", "threshold": 0.1, "order": 1, "first_blocks": 1, "warm_up": 5},
    # Head of 8 blocks. https://github.com/vipshop/cache-dit
    "dbcache": {"gate": "first-block", "threshold": 0.08, "residual": True, "first_blocks": 8, "warm_up": 8},
    # Velocity minus latents, reused. https://arxiv.org/abs/2507.02860
    "easycache": {"gate": "easycache", "threshold": 0.05, "residual": True, "target": "output", "warm_up": 5},
    # https://github.com/chengzeyi/ParaAttention, and diffusers, where neither warm-up nor limit exists
    "first-block": {"gate": "first-block", "threshold": 0.05, "residual": True, "first_blocks": 1},
    # Needs a curve measured on the model; the first fifth is computed. https://arxiv.org/abs/2506.09045
    "magcache": {"gate": "magcache", "threshold": 0.12, "residual": True, "warm_up": 0.2, "max_skips": 4},
    # Every fifth step is computed. https://arxiv.org/abs/2503.06923
    "taylorseer": {"gate": "always", "order": 1, "warm_up": 3, "max_skips": 4},
    # The identity until a polynomial is fitted to the model. https://arxiv.org/abs/2411.19108
    "teacache": {"gate": "teacache", "threshold": 0.1, "residual": True, "polynomial": (1.0, 0.0)},
}


def cache_preset(name: str, **fields: Any) -> CacheConfig:
    """Return a published cache by name, with fields of `CacheConfig` changed.

    Raises:
        ValueError: an unknown name or field, or a value that makes no sense.
    """
    if name not in CACHES:
        raise ValueError(f"unknown cache {name!r}; caches: {', '.join(CACHES)}")
    known = {field.name for field in dataclasses.fields(CacheConfig)} - {"gate", "schedule"}
    if not set(fields) <= known:
        unknown = ", ".join(sorted(set(fields) - known))
        raise ValueError(f"cache {name!r} has no field {unknown}; its fields are: {', '.join(sorted(known))}")
    return CacheConfig(**{**CACHES[name], **fields})
