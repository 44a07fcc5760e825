"""What a calibration can be asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dit_accel.evaluation.metrics import PSNR_CEILING_DB


@dataclass(frozen=True)
class Quality:
    """A measure of likeness to the dense generation, and its place on a scale in dB.

    All of them fall by about 10 dB where the squared error grows tenfold. The shifts put a plan at about the same dB
    whatever the measure; they are those of the demo model, and only the search's first guess depends on them.

    Attributes:
        metric: as `AcceleratedRun` names it.
        decibel, value: from a value to dB and back.
        low, high: open bounds of a sensible target.
    """

    metric: str
    decibel: Callable[[float], float]
    value: Callable[[float], float]
    low: float
    high: float


_SSIM_SHIFT_DB, _LATENT_SHIFT_DB = 15.0, 17.0
# What is closer than this to perfect counts as perfect; neither JSON nor a mean can hold infinity.
_LEAST_SQUARE = 10 ** (-PSNR_CEILING_DB / 10)


def _level(square: float, shift: float) -> float:
    return min(shift - 10 * math.log10(max(square, _LEAST_SQUARE)), PSNR_CEILING_DB)


QUALITIES: dict[str, Quality] = {
    "target_psnr": Quality("psnr", lambda x: x, lambda db: db, 0.0, PSNR_CEILING_DB),
    "target_ssim": Quality(
        "ssim",
        lambda x: _level(1 - x, _SSIM_SHIFT_DB),
        lambda db: 1 - 10 ** ((_SSIM_SHIFT_DB - db) / 10),
        0.0,
        1.0,
    ),
    "target_latent_rel_l2": Quality(
        "latent_rel_l2",
        lambda x: _level(x**2, _LATENT_SHIFT_DB),
        lambda db: 10 ** ((_LATENT_SHIFT_DB - db) / 20),
        0.0,
        1.0,
    ),
}
_OTHERS = ("density", "speedup")


@dataclass(frozen=True)
class Goal:
    """The one thing asked for: `name` as `calibrate` calls it, and its value."""

    name: str
    value: float

    @property
    def quality(self) -> Quality | None:
        """How it is measured, None for a density or a speed-up."""
        return QUALITIES.get(self.name)

    @property
    def searched(self) -> bool:
        """Whether plans have to be tried."""
        return self.name != "density"


def the_goal(**given: float | None) -> Goal:
    """The one goal that is given.

    Raises:
        ValueError: none or several are given, or its value makes no sense.
    """
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        listed = ", ".join(given)
        got = ", ".join(f"{name}={given[name]!r}" for name in names) or "none"
        raise ValueError(f"expected exactly one of {listed}, got {got}")
    name, value = names[0], given[names[0]]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if name == "density" and not 0.0 < value <= 1.0:
        raise ValueError(f"density: expected a number above 0 and up to 1, got {value!r}")
    if name == "speedup" and not 1.0 <= value < math.inf:
        raise ValueError(f"speedup: expected a number of at least 1, got {value!r}")
    quality = QUALITIES.get(name)
    if quality is not None and not quality.low < value < quality.high:
        unit = "dB" if name == "target_psnr" else "a number"
        raise ValueError(
            f"{name}: expected {unit} above {quality.low:g} and below {quality.high:g}, got {value!r}"
        )
    return Goal(name, float(value))
