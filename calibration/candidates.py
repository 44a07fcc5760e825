"""The candidates a head may be given."""

from __future__ import annotations

from dataclasses import replace

import torch

from dit_accel.kernels import available_precisions
from dit_accel.patterns.base import SHARED
from dit_accel.plan import Candidate

# Families that look at shapes alone serve heads that need little; what needs more is worth a selection.
_FIXED = (0.03, 0.06, 0.12, 0.2)
_CHOSEN = (0.06, 0.12, 0.2, 0.3, 0.45)
_HASHED = (0.03, *_CHOSEN)

# Of the means that stand for the blocks left out, relative to that of their tokens.
_WEIGHTS = (0.4, 1.0, 2.5)

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
    ("hashed", (_SHARED,), _HASHED),
)


def default_candidates(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Candidate, ...]:
    """Dense first, then skip without and with a remainder, then every other family at every density with three.

    All but skip are offered in every precision that the device has, dense too. What is chosen from queries and keys is
    chosen by the first guidance branch of a step for all.

    A remainder costs 1/block of dense attention, with any weight. The softmax mass it gives a block is a lower bound of
    the true one (Jensen), which some heads make up for with a larger weight; in others a few strong keys make a mean
    that nothing in its block is like, and a smaller one is better. The weights are .4, 1 and 2.5: on captured heads of
    the demo model (density .06 and .2, two orders) the best of them takes 4 to 24 % off the rel L2 of weight 1 on the
    prompt it was found on, 4 to 16 % on another; eleven weights take no more off there.

    Args:
        device: what attention runs on. Clusters err least of all at a density, but blocks of varying length have a
            kernel on GPUs only; on a CPU, row by row, they take longer than what they save.
        dtype: of the model.
    """
    families = (
        _FAMILIES if torch.device(device).type == "cpu" else (*_FAMILIES, ("clustered", (_SHARED,), _FIXED))
    )
    dense = Candidate("dense", 1.0)
    sparse = [
        Candidate(name, density, options, remainder=weight)
        for name, options, densities in families
        for density in densities
        for weight in _WEIGHTS
    ]
    lower = [
        replace(candidate, precision=precision)
        for precision in available_precisions(device, dtype)[1:]
        for candidate in (dense, *sparse)
    ]
    return (dense, Candidate("skip", 0.0), Candidate("skip", 0.0, remainder=True), *sparse, *lower)
