"""Attention tile: each query reads its own frame, and all queries read the same few reference frames.

Efficient-vDiT (https://arxiv.org/abs/2502.06155): the attention map of a video repeats a tile of frame × frame; those
on the diagonal are strong, the others nearly equal to each other, so that some can stand for all. The cost grows
linearly with the frames. Reference frames are spread evenly: each next one is the furthest from all before it. In
another axis order the slices along its slowest axis, rows or columns of the picture, take the place of frames.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.grid import axes_of
from dit_accel.patterns.base import BlockSpace, Family, first_of


def _choose(space: BlockSpace, kept: int) -> Tensor:
    axis = "fhw".index(axes_of(space.order_name)[0])
    places = space.grid.coordinates(space.order.cpu())[: space.chosen_tokens, axis]
    pieces = space.pieces(places)
    slices = pieces.means(places).round().long()
    rank = _spread_out(int(places.max()) + 1)[slices].float()
    blocks = pieces.block.float()
    same = slices[:, None] == slices
    inside = (same & (blocks[:, None] > blocks)).sum(1).float()
    # Frames one by one; within a frame, and in a frame of which only a part fits, the nearest blocks in it first.
    order = 1.0 + rank[None] + 0.5 * (inside[:, None] - inside).abs() / space.video_blocks
    order = torch.where(same, (blocks[:, None] - blocks).abs() / space.video_blocks, order)
    return first_of(pieces.nearest(order), kept).to(space.device)


def _spread_out(pieces: int) -> Tensor:
    """Rank of each frame when the one furthest from all earlier ones always comes next."""
    rank = torch.zeros(pieces, dtype=torch.int64)
    gap = torch.arange(pieces)
    for number in range(1, pieces):
        chosen = int(gap.argmax())
        rank[chosen] = number
        gap = torch.minimum(gap, (torch.arange(pieces) - chosen).abs())
    return rank


ATTENTION_TILE = Family("attention_tile", _choose, static=True, options=MappingProxyType({"order": "frame"}))
