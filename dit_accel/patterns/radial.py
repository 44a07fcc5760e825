"""Radial: the further away a frame, the narrower the neighbourhood read in it.

Radial Attention (https://arxiv.org/abs/2506.19852): at a distance of D frames a query reads the places within
`decay · tokens_per_frame / 2^bit_length(D)` of its own. Here density governs instead of the decay: each pair of blocks
has the decay at which it would come in, and every row keeps the pairs that come in first.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.patterns.base import BlockSpace, Family


def _choose(space: BlockSpace, kept: int, *, sink: int) -> Tensor:
    """`sink`: first frames that every row reads before all others (Wan needs one, by the authors' account)."""
    if sink < 0:
        raise ValueError(f"option 'sink' of family 'radial': expected at least 0, got {sink!r}")
    places = space.grid.coordinates(space.order.cpu())[: space.chosen_tokens].float()
    frame = space.means(places[:, :1], 0, space.block)[:, 0]
    inside = space.means(places[:, 1:] @ torch.tensor([[float(space.grid.width)], [1.0]]), 0, space.block)[
        :, 0
    ]
    frames_apart = (frame[:, None] - frame).abs().round()
    halvings = torch.where(frames_apart > 0, frames_apart.log2().floor() + 1, 0.0)  # the bit length
    decay = (inside[:, None] - inside).abs() * 2.0**halvings
    decay += 1e-3 * frames_apart  # nearer frames first among equals
    decay[:, frame < sink] = -1.0
    decay.fill_diagonal_(-2.0)
    first = decay.argsort(dim=-1, stable=True)[:, :kept]
    return torch.zeros(decay.shape, dtype=torch.bool).scatter_(-1, first, True).to(space.device)


RADIAL = Family("radial", _choose, static=True, options=MappingProxyType({"order": "frame", "sink": 0}))
