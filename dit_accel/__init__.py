"""Calibrate once, then every generation is faster at the quality you asked for.

Importing this package imports nothing heavy: the public names below are looked up on first use.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

_HOME = {
    "AccelPlan": "dit_accel.plan",
    "PlanError": "dit_accel.plan",
    "TokenGrid": "dit_accel.grid",
    "attn_processors": "dit_accel.enable",
    "calibrate": "dit_accel.calibration",
    "disable": "dit_accel.enable",
    "enable": "dit_accel.enable",
    "stats": "dit_accel.enable",
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


class _Package(ModuleType):
    """Keeps `dit_accel.enable` the function: importing the module of that name would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(
            name, value.enable if name == "enable" and isinstance(value, ModuleType) else value
        )


sys.modules[__name__].__class__ = _Package
