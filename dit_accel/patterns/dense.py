"""Dense: every query reads every key."""

import torch
from torch import Tensor

from dit_accel.patterns.base import BlockSpace, Family


def _choose(space: BlockSpace, kept: int) -> Tensor:
    return torch.ones(space.video_blocks, space.video_blocks, dtype=torch.bool, device=space.device)


DENSE = Family("dense", _choose, static=True, density=1.0)
