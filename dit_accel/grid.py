"""The token grid of a video or image transformer, and the orders its tokens can be put in."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

_SIZES = r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)"
_TILE = re.compile(rf"tile:{_SIZES}(?:/{_SIZES})?")
# The axes f(rames), h(eight) and w(idth) from the slowest to the fastest.
AXIS_ORDERS = ("fhw", "fwh", "hfw", "hwf", "wfh", "whf")
_ALIASES = {"frame": "fhw", "space": "hwf"}


@dataclass(frozen=True)
class TokenGrid:
    """Counts of tokens (after patching) along each axis of a sequence, and where its text tokens stand.

    The model's own sequence is frame-major, `[text] + video` with `text_first`, else `video + [text]`.
    An order is an int64 tensor `[total_tokens]`: `order[i]` is the model position of the token at place `i`.
    Text tokens come last in every order, in their own sequence.

    Example:
        >>> grid = TokenGrid(frames=2, height=2, width=2)
        >>> grid.order("space").tolist()
        [0, 4, 1, 5, 2, 6, 3, 7]

    Raises:
        ValueError: a count that is no positive integer (`text_tokens` may be 0).
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"TokenGrid {name}: expected an integer of at least {least}, got {value!r}")
        if not isinstance(self.text_first, bool):
            raise ValueError(f"TokenGrid text_first: expected True or False, got {self.text_first!r}")

    @property
    def video_tokens(self) -> int:
        """Tokens of the picture: frames × height × width."""
        return self.frames * self.height * self.width

    @property
    def total_tokens(self) -> int:
        """Length of the model's sequence, text included."""
        return self.video_tokens + self.text_tokens

    @property
    def video_slice(self) -> slice:
        """Where the video tokens stand in the model's sequence."""
        start = self.text_tokens if self.text_first else 0
        return slice(start, start + self.video_tokens)

    @property
    def text_slice(self) -> slice:
        """Where the text tokens stand in the model's sequence."""
        start = 0 if self.text_first else self.video_tokens
        return slice(start, start + self.text_tokens)

    def order(self, name: str, device: torch.device | str | None = None) -> Tensor:
        """Return a token order, int64 `[total_tokens]`. The tensor is cached: do not write to it.

        Names: `"fhw"` and the five others of `AXIS_ORDERS` walk along the axes, the last letter fastest: frame,
        row (h), column (w), see PAROAttention (https://arxiv.org/abs/2506.16054). `"frame"` is `"fhw"`, as the
        model has it; `"space"` is `"hwf"` and keeps all frames of one place together. `"tile:TxHxW"` walks through
        tiles of T frames × H × W tokens, see `_tile_places`; `"tile:TxHxW/FxRxC"` does so with every F-th frame, R-th
        row and C-th column, then with those beside them, and so on, so that dilated neighbourhoods stay together.

        Raises:
            ValueError: an unknown name.
        """
        return _order(self, name, torch.device(device or "cpu"))

    def is_model_order(self, name: str) -> bool:
        """Whether `order(name)` leaves every token where the model has it."""
        return _ALIASES.get(name, name) == "fhw" and not (self.text_first and self.text_tokens)

    def inverse(self, order: Tensor) -> Tensor:
        """Return the exact inverse of an order `[..., total_tokens]`: the place of each model position."""
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(-1, order, places)

    def coordinates(self, order: Tensor | None = None) -> Tensor:
        """Return int64 `[video_tokens, 3]`: frame, row and column of each video token, in `order`."""
        if order is None:
            video = torch.arange(self.video_tokens, device="cpu")
        else:
            video = order[: self.video_tokens] - self.video_slice.start
        place = video % (self.height * self.width)
        frame = video // (self.height * self.width)
        return torch.stack((frame, place // self.width, place % self.width), dim=-1)


def axes_of(name: str) -> str:
    """Return the axes of an order from the slowest to the fastest, `"fhw"` for tiles.

    Raises:
        ValueError: an unknown name.
    """
    if _TILE.fullmatch(name):
        return "fhw"
    axes = _ALIASES.get(name, name)
    if axes not in AXIS_ORDERS:
        known = ", ".join(repr(order) for order in AXIS_ORDERS)
        raise ValueError(f"token order: expected 'frame', 'space', {known} or 'tile:TxHxW', got {name!r}")
    return axes


def dilation_of(name: str) -> tuple[int, int, int]:
    """Return the steps between frames, rows and columns of an order of dilated tiles, 1 of all others."""
    match = _TILE.fullmatch(name)
    if match is None or match[4] is None:
        return 1, 1, 1
    return int(match[4]), int(match[5]), int(match[6])


def residues(grid: TokenGrid, name: str) -> Tensor:
    """Return the number of the dilated grid that each video token is in, int64 `[video_tokens]`; 0 if there is one."""
    frames, rows, columns = dilation_of(name)
    t, h, w = grid.coordinates().unbind(-1)
    return (t % frames * rows + h % rows) * columns + w % columns


def _in_tiles(grid: TokenGrid, tokens: Tensor, tile: list[int]) -> Tensor:
    """Put the tokens of a dilated grid, int64 ascending, in the order of tiles."""
    sizes = [axis.unique().numel() for axis in grid.coordinates()[tokens].unbind(-1)]
    return tokens[torch.argsort(_tile_places(TokenGrid(*sizes), *tile))]


# Orders are data of a grid, so the grid is part of the key: two grids in one process never share an entry.
@functools.lru_cache(maxsize=64)
def _order(grid: TokenGrid, name: str, device: torch.device) -> Tensor:
    # A tensor born in inference mode could not be used under autograd by a later caller.
    with torch.inference_mode(False), torch.device("cpu"):
        axes = axes_of(name)
        if match := _TILE.fullmatch(name):
            tile = [int(size) for size in match.groups()[:3]]
            number = residues(grid, name)
            video = torch.cat(
                [_in_tiles(grid, (number == own).nonzero()[:, 0], tile) for own in number.unique()]
            )
        else:
            video = torch.arange(grid.video_tokens).view(grid.frames, grid.height, grid.width)
            video = video.permute(*("fhw".index(axis) for axis in axes)).flatten()
        text = torch.arange(grid.text_tokens) + grid.text_slice.start
        return torch.cat((video + grid.video_slice.start, text)).to(device)


def _tile_places(grid: TokenGrid, frames: int, height: int, width: int) -> Tensor:
    """Return the sort key of each video token for a walk through tiles, int64 `[video_tokens]`.

    Attention blocks are runs of consecutive tokens, and on most grids they start anywhere in a tile. So every
    run has to be compact, which three choices see to. Tiles form pencils of T × H tokens along the width,
    walked column by column: a run of T·H·W tokens is a T × H × W box wherever it starts. The walk turns back
    at each end, so a run over the end stays in one corner. An axis is cut into nearly equal parts, not full
    tiles and a thin rest; one shorter than its tile leaves its share to the others: "tile:4x4x4" cuts an
    image into 8 × 8 squares.
    """
    volume = frames * height * width
    frames = min(frames, grid.frames)
    height = min(grid.height, max(1, round(math.sqrt(volume / frames * height / width))))
    t, h, w = grid.coordinates().unbind(-1)
    slabs, pencils = math.ceil(grid.frames / frames), math.ceil(grid.height / height)
    slab = t * slabs // grid.frames
    h = torch.where(slab % 2 == 1, grid.height - 1 - h, h)
    pencil = h * pencils // grid.height
    back = (slab * pencils + pencil) % 2 == 1
    column = torch.where(back, grid.width - 1 - w, w)
    key = (slab * pencils + pencil) * grid.width + column
    return (key * grid.frames + t) * grid.height + h
