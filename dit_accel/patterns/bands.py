"""Bands: each query reads the keys nearest to it in a token order.

Sparse VideoGen (https://arxiv.org/abs/2502.01776): in frame-major order a band holds the same frame and those
beside it ("spatial head"), in space-major order the same place over all frames ("temporal head"). Here every
row keeps equally many blocks: at both ends of the sequence the band is moved inwards instead of cut.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.patterns.base import BlockSpace, Family


def _choose(space: BlockSpace, kept: int) -> Tensor:
    blocks = torch.arange(space.video_blocks, device=space.device)
    first = (blocks - kept // 2).clamp(0, space.video_blocks - kept)[:, None]
    return (blocks >= first) & (blocks < first + kept)


BANDS = Family("bands", _choose, static=True, options=MappingProxyType({"order": "frame"}))
