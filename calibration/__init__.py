"""Calibration: measure every attention head once, then choose what each may skip."""

from dit_accel.calibration.run import calibrate

__all__ = ["calibrate"]
