"""Radial: the further away a frame, the narrower the neighbourhood read in it.

Radial Attention (https://arxiv.org/abs/2506.19852): frames at a distance D ≤ 1 are read whole. Further away a query
reads the places within `decay · l` of its own, l = 2^bit_length(tokens per frame) / 2^bit_length(D), and at least
those within a block of it; where l is less than a block, only frames with D mod ⌊block / l⌋ = 0. Here density governs
instead of the decay: each pair of blocks has the decay at which it would come in, and every row keeps the pairs that
come in first. Where not even those that every decay keeps fit, the ones with the least `apart · 2^bit_length(D)` stay.
Places are numbered along the two axes of the picture as the token order has them.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.grid import axes_of
from dit_accel.patterns.base import BlockSpace, Family, first_of


def _choose(space: BlockSpace, kept: int, *, sink: int) -> Tensor:
    """`sink`: first frames that every row reads before all others (Wan needs one, by the authors' account)."""
    if sink < 0:
        raise ValueError(f"option 'sink' of family 'radial': expected at least 0, got {sink!r}")
    grid = space.grid
    places = grid.coordinates(space.order.cpu())[: space.chosen_tokens]
    upright = axes_of(space.order_name).replace("f", "") == "wh"
    steps = (1, grid.height) if upright else (grid.width, 1)
    inside = places[:, 1] * steps[0] + places[:, 2] * steps[1]
    pieces = space.pieces(places[:, 0])
    frame, place = (pieces.means(x) for x in (places[:, 0], inside))
    distance = (frame[:, None] - frame).abs().round()
    halvings = torch.where(distance > 0, distance.clamp(min=1).log2().floor() + 1, 0.0)  # the bit length
    apart = (place[:, None] - place).abs()
    reach = 2.0 ** (grid.height * grid.width).bit_length() / 2.0**halvings
    read = distance % (space.block / reach).floor().clamp(min=1) == 0
    # 0: at any decay, 1: from some decay on, 2: at none; then by decay, the nearer frame first among equals.
    stage = torch.where(read, (apart > space.block).double(), 2.0).masked_fill(distance <= 1, 0.0)
    rank = stage * 8.0 * grid.video_tokens**2 + apart * 2.0**halvings + 1e-3 * distance
    rank[:, frame < sink] -= 64.0 * grid.video_tokens**2
    rank = pieces.nearest(rank)
    rank.fill_diagonal_(-torch.inf)
    return first_of(rank, kept).to(space.device)


RADIAL = Family("radial", _choose, static=True, options=MappingProxyType({"order": "frame", "sink": 0}))
