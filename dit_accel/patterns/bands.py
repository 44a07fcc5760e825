"""Bands: each query reads the keys nearest to it in a token order.

Sparse VideoGen (https://arxiv.org/abs/2502.01776): in frame-major order a band holds the same frame and those
beside it ("spatial head"), in space-major order the same place over all frames ("temporal head", the multi-diagonal
one of Sparse-vDiT, https://arxiv.org/abs/2506.03065). Here every row keeps equally many blocks: at both ends of the
sequence the band is moved inwards instead of cut. With `sinks` all rows read the first blocks as well: the A-shape of
MInference (https://arxiv.org/abs/2407.02490) and the spans of MoA (https://arxiv.org/abs/2406.14909).
"""

from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.patterns.base import BlockSpace, Family, first_of


def _choose(space: BlockSpace, kept: int, *, sinks: int) -> Tensor:
    """`sinks`: first blocks kept by all."""
    if sinks < 0:
        raise ValueError(f"option 'sinks' of family 'bands': expected at least 0, got {sinks!r}")
    blocks = torch.arange(space.video_blocks)
    apart = blocks - blocks[:, None]
    rank = 2 * apart.abs() + (apart > 0)
    rank[:, :sinks] -= 4 * space.video_blocks
    rank.fill_diagonal_(-8 * space.video_blocks)
    return first_of(rank, kept).to(space.device)


BANDS = Family("bands", _choose, static=True, options=MappingProxyType({"order": "frame", "sinks": 0}))
