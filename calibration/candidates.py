"""The candidates a head may be given."""

from __future__ import annotations

from dit_accel.plan import Candidate

DENSITIES = (0.03, 0.06, 0.12, 0.2, 0.3, 0.45)

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
    """Dense first, then skip without and with a remainder, then every other family at every density with one.

    A remainder costs 1/block of dense attention. The softmax mass it gives a block is a lower bound of the true one
    (Jensen), while leaving the block out gives none, so it is not offered as a choice.
    """
    sparse = (
        Candidate(name, density, options, remainder=True)
        for name, options in _FAMILIES
        for density in DENSITIES
    )
    return (Candidate("dense", 1.0), Candidate("skip", 0.0), Candidate("skip", 0.0, remainder=True), *sparse)
