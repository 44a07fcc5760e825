"""Calibrate once, then every generation is faster at the quality you asked for.

Importing this package imports nothing heavy: the public names below are looked up on first use.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

_HOME = {
    "AccelPlan": "dit_accel.plan",
    "PlanError": "dit_accel.plan",
    "TokenGrid": "dit_accel.grid",
    "attn_processors": "dit_accel.switch",
    "calibrate": "dit_accel.calibration",
    "choose": "dit_accel.calibration",
    "disable": "dit_accel.switch",
    "enable": "dit_accel.switch",
    "profile_heads": "dit_accel.calibration",
    "stats": "dit_accel.switch",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("dit-accel")
    if name not in _HOME:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
