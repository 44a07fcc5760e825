"""Attention tile: each query reads its own frame, and all queries read the same few reference frames.

Efficient-vDiT (https://arxiv.org/abs/2502.06155): the attention map of a video repeats a tile of frame × frame; those
on the diagonal are strong, the others nearly equal to each other, so that some can stand for all. The cost grows
linearly with the frames. Reference frames are spread evenly: each next one is the furthest from all before it.
"""

import torch
from torch import Tensor

from dit_accel.patterns.base import BlockSpace, Family


def _choose(space: BlockSpace, kept: int) -> Tensor:
    places = space.grid.coordinates(space.order.cpu())[: space.chosen_tokens].float()
    frame = space.means(places[:, :1], 0, space.block)[:, 0].round().long()
    rank = _spread_out(space.grid.frames)[frame].float()
    blocks = torch.arange(len(frame), dtype=torch.float32)
    # Frames one by one; within a frame, and in a frame of which only a part fits, the nearest blocks in it first.
    inside = blocks - torch.searchsorted(frame, frame).float()
    order = 1.0 + rank[None] + 0.5 * (inside[:, None] - inside).abs() / len(blocks)
    order = torch.where(frame[:, None] == frame, (blocks[:, None] - blocks).abs() / len(blocks), order)
    first = order.argsort(dim=-1, stable=True)[:, :kept]
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, first, True).to(space.device)


def _spread_out(frames: int) -> Tensor:
    """Rank of each frame when the one furthest from all earlier ones always comes next."""
    rank = torch.zeros(frames, dtype=torch.int64)
    gap = torch.arange(frames)
    for number in range(1, frames):
        chosen = int(gap.argmax())
        rank[chosen] = number
        gap = torch.minimum(gap, (torch.arange(frames) - chosen).abs())
    return rank


ATTENTION_TILE = Family("attention_tile", _choose, static=True)
