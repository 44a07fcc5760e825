"""The candidates a head may be given."""

from __future__ import annotations

from dit_accel.plan import Candidate

DENSITIES = (0.06, 0.12, 0.2, 0.3, 0.42, 0.6)

# Blocks of few places over many frames, for heads that follow a place or a motion through the clip.
_TUBES = "tile:16x2x2"

_FAMILIES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("window", ()),
    ("window", (("order", _TUBES),)),
    ("bands", (("order", "frame"),)),
    ("bands", (("order", "space"),)),
    ("stripes", ()),
    ("pooled", ()),
    ("pooled", (("order", _TUBES),)),
)


def default_candidates() -> tuple[Candidate, ...]:
    """Dense first, skip second, then every other family at every density."""
    sparse = (Candidate(name, density, options) for name, options in _FAMILIES for density in DENSITIES)
    return (Candidate("dense", 1.0), Candidate("skip", 0.0), *sparse)
