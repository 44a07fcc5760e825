"""Feature caching across denoising steps: what to skip, when, and what to put in its place."""

from dit_accel.caching.config import CacheConfig, Schedule, Term
from dit_accel.caching.memory import cache_bytes
from dit_accel.caching.presets import CACHES, cache_preset
from dit_accel.caching.runtime import StepCache

__all__ = ["CACHES", "CacheConfig", "Schedule", "StepCache", "Term", "cache_bytes", "cache_preset"]
