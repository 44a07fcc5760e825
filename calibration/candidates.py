"""The candidates a head may be given."""

from __future__ import annotations

from dit_accel.plan import Candidate

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65)

_FAMILIES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("window", ()),
    ("bands", (("order", "frame"),)),
    ("bands", (("order", "space"),)),
    ("stripes", ()),
    ("pooled", ()),
)


def default_candidates() -> tuple[Candidate, ...]:
    """Dense first, skip second, then every other family at every density."""
    sparse = (Candidate(name, density, options) for name, options in _FAMILIES for density in DENSITIES)
    return (Candidate("dense", 1.0), Candidate("skip", 0.0), *sparse)
