"""The candidates a head may be given."""

from __future__ import annotations

from dataclasses import replace

import torch

from dit_accel.candidate import Candidate
from dit_accel.grid import AXIS_ORDERS
from dit_accel.kernels import available_precisions
from dit_accel.patterns.base import SHARED

# Families that look at shapes alone serve heads that need little; what needs more is worth a selection.
_FIXED = (0.03, 0.06, 0.12, 0.2)
_CHOSEN = (0.06, 0.12, 0.2, 0.3, 0.45)
_BALANCED = (0.03, *_CHOSEN)

# Blocks of few places over many frames, for heads that follow a place or a motion through the clip.
_TUBES = "tile:16x2x2"

_SHARED = ("branches", SHARED)

_FAMILIES: tuple[tuple[str, tuple[tuple[str, str], ...], tuple[float, ...]], ...] = (
    ("window", (), _FIXED),
    ("window", (("order", _TUBES),), _FIXED),
    ("bands", (("order", "frame"),), _FIXED),
    ("bands", (("order", "space"),), _FIXED),
    ("pooled", (_SHARED,), _CHOSEN),
    ("pooled", (_SHARED, ("order", _TUBES)), _CHOSEN),
    ("balanced", (_SHARED,), _BALANCED),
)


_BUDGETS = (0.1, 0.2, 0.3, 0.5)

# What the authors of a published system choose among for each head, in our terms; dense comes on top.
_PUBLISHED: dict[str, tuple[Candidate, ...]] = {
    # How many of the channels are looked at; which they are is found in each call.
    "doublesparsity": tuple(
        Candidate("channels", density, (("channels", channels), ("order", "frame")))
        for channels in (8, 16, 32)
        for density in _BUDGETS
    ),
    # Columns and diagonals, an A shape, pooled blocks.
    "minference": tuple(
        Candidate(family, density, options)
        for family, options in (
            ("stripes", (("slashes", 1),)),
            ("bands", (("sinks", 1),)),
            ("pooled", (("order", "frame"), ("parts", 1))),
        )
        for density in _BUDGETS
    ),
    # Spans are shares of the sequence, so a plan serves other lengths; the authors' α, tokens that do not grow, is left
    # out.
    "moa": tuple(Candidate("bands", density, (("sinks", 1),)) for density in (0.05, *_BUDGETS, 0.75)),
    "paro": tuple(
        Candidate("bands", density, (("order", order),)) for order in AXIS_ORDERS for density in _BUDGETS
    ),
    "sale": tuple(Candidate("lowbit", density, (("order", "frame"),)) for density in _BUDGETS),
    "sparge": tuple(
        Candidate("pooled", 1.0, (("guard", guard), ("parts", 1), ("top_p", top_p)))
        for guard in (0.1, 0.5)
        for top_p in (0.5, 0.7, 0.9, 0.95)
    ),
    "sparse-vdit": (
        Candidate("skip", 0.0),
        *(
            Candidate("bands", density, (("order", order),))
            for order in ("frame", "space")
            for density in _BUDGETS
        ),
        *(Candidate("stripes", density) for density in _BUDGETS),
    ),
    # Windows of more frames or of more of the picture.
    "sta": tuple(
        Candidate("window", density, (("aspect", aspect), ("order", "tile:6x8x8"), ("shape", "clamped")))
        for aspect in (0.25, 0.75, 2.0)
        for density in _BUDGETS
    ),
    "svoo": tuple(Candidate("clustered", density, (("iterations", 50),)) for density in _BUDGETS),
}


def published_candidates(system: str) -> tuple[Candidate, ...]:
    """Dense, then what a published system chooses among for each head, in native precision and without a remainder.

    For those of `dit_accel.presets` whose authors calibrate more than one number for all heads.

    Raises:
        ValueError: another system.
    """
    if system not in _PUBLISHED:
        raise ValueError(
            f"candidates: expected Candidates or a system that its authors calibrate ({', '.join(_PUBLISHED)}), got "
            f"{system!r}"
        )
    return (Candidate("dense", 1.0), *_PUBLISHED[system])


def default_candidates(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Candidate, ...]:
    """Dense first, then skip without and with a remainder, then every other family at every density with one.

    All but skip are offered in every precision that the device has, dense too. What is chosen from queries and keys is
    chosen by the first guidance branch of a step for all.

    A remainder costs 1/block of dense attention. The softmax mass it gives a block is a lower bound of the true one
    (Jensen), while leaving the block out gives none, so it is not offered as a choice. Nor are other weights of the
    means: with .4 and 2.5 beside 1 the rel L2 of heads falls by up to 24 %, and by 4 to 16 % on another prompt (demo
    model, density .06 and .2), yet at equal density only the videos of the calibrated prompt and of one of three others
    came closer to dense (by 1.3 and .7 dB at .25, .6 and .3 at .4); the other two went off (1.2 and .9, .7 and .3).

    Args:
        device: what attention runs on.
        dtype: of the model.
    """
    dense = Candidate("dense", 1.0)
    sparse = [
        Candidate(name, density, options, remainder=True)
        for name, options, densities in _FAMILIES
        for density in densities
    ]
    lower = [
        replace(candidate, precision=precision)
        for precision in available_precisions(device, dtype)[1:]
        for candidate in (dense, *sparse)
    ]
    return (dense, Candidate("skip", 0.0), Candidate("skip", 0.0, remainder=True), *sparse, *lower)
