"""Feature caching across denoising steps: what to skip, when, and what to put in its place."""

from importlib import import_module
from typing import Any

from dit_accel.caching.config import CacheConfig, Schedule, Term
from dit_accel.caching.presets import CACHES, cache_preset

_HOME = {"StepCache": "runtime", "cache_bytes": "memory"}

__all__ = ["CACHES", "CacheConfig", "Schedule", "StepCache", "Term", "cache_bytes", "cache_preset"]


def __getattr__(name: str) -> Any:
    """Looked up on first use: a plan describes its cache without diffusers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
