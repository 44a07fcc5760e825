"""Calibration: measure every attention head once, then choose what each may skip."""

from dit_accel.calibration.candidates import default_candidates, published_candidates
from dit_accel.calibration.curves import measure_cache
from dit_accel.calibration.heads import HeadScore, choose, profile_heads
from dit_accel.calibration.run import calibrate

__all__ = [
    "HeadScore",
    "calibrate",
    "choose",
    "default_candidates",
    "measure_cache",
    "profile_heads",
    "published_candidates",
]
