"""Skip: video queries read nothing, so the head gives zero there.

Sparse-vDiT (https://arxiv.org/abs/2506.03065) skips 3-6 % of heads this way. Text rows stay dense: they are
few.
"""

import torch
from torch import Tensor

from dit_accel.patterns.base import BlockSpace, Family


def _choose(space: BlockSpace, kept: int) -> Tensor:
    return torch.zeros(space.video_blocks, space.video_blocks, dtype=torch.bool, device=space.device)


SKIP = Family("skip", _choose, static=True, density=0.0, reads_text=False)
