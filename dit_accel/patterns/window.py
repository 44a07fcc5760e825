"""Window: each query reads a box of the grid around itself.

Sliding Tile Attention (https://arxiv.org/abs/2502.04507) and neighbourhood attention
(https://arxiv.org/abs/2504.16922), for any grid: the box is the set of the nearest blocks by the largest of the three
axis distances. Their number is the same for every row, so at a border the box grows inwards and no query sees less than
a central one. The shape "clamped" is that of the papers to the letter: at a border the box keeps its sides and is moved
inwards, where the shape "box" takes the nearest blocks in whatever direction there are some. "ball" takes the straight
distance (CLEAR, https://arxiv.org/abs/2412.16112).

All queries of a block share its box: the stride of neighbourhood attention is the tile. Its dilation is that of the
order, `tile:4x4x4/1x2x2` for every second row and column: a query then reads keys of its own dilated grid first.
"""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.grid import dilation_of, residues
from dit_accel.patterns.base import BlockSpace, Family, first_of


def _choose(space: BlockSpace, kept: int, *, aspect: float, shape: str) -> Tensor:
    """`aspect`: how many frames the box reaches for each token up, down or sideways; `shape`: box, clamped, ball."""
    if shape not in ("box", "clamped", "ball"):
        raise ValueError(
            f"option 'shape' of family 'window': expected 'box', 'clamped' or 'ball', got {shape!r}"
        )
    if aspect <= 0:
        raise ValueError(f"option 'aspect' of family 'window': expected a number above 0, got {aspect!r}")
    order = space.order.cpu()
    places = space.grid.coordinates(order)[: space.chosen_tokens] / torch.tensor(
        dilation_of(space.order_name)
    )
    centres = space.means(places, 0, space.block)
    centres[:, 0] /= aspect
    ahead = centres[None] - centres[:, None]
    apart = ahead.abs()
    if shape == "clamped":
        # Half the side of the first box that holds a key: it cannot reach further back than to the border.
        behind = torch.where(
            ahead > 0, (centres - centres.amin(0))[:, None], (centres.amax(0) - centres)[:, None]
        )
        apart = (apart + torch.minimum(apart, behind)) / 2
    straight = apart.square().sum(-1).sqrt()
    # Many blocks are equally far by the largest axis: the straight distance decides among them.
    distance = straight if shape == "ball" else apart.amax(-1) + 1e-3 * straight
    number = residues(space.grid, space.order_name)[
        order[: space.chosen_tokens] - space.grid.video_slice.start
    ]
    if number.any():
        within = space.means(F.one_hot(number).float(), 0, space.block) > 0
        distance += 1e6 * ~(within[:, None] & within).any(-1)
    return first_of(distance, kept).to(space.device)


WINDOW = Family(
    "window",
    _choose,
    static=True,
    options=MappingProxyType({"order": "tile:4x4x4", "aspect": 2.0, "shape": "box"}),
)
