"""What pattern families keep of one head's attention, as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dit_accel.evaluation.figures import FAMILY_COLOURS, INK, MUTED, PAPER, SPARE_COLOURS
from dit_accel.grid import TokenGrid
from dit_accel.patterns import Selection

ATTENTION = "attention"
FRAMES_SHOWN = 7
_PIXELS = 350  # of the longer side of a mask


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a sequence's pairs of tokens, values from 0 to 1.

    name, note: over the picture, left and right.
    pairs: float `[seq, seq]` or smaller, queries down and keys across.
    keys: float `[seq]`, the keys of the query in the middle of the video.
    """

    name: str
    note: str
    pairs: Tensor
    keys: Tensor


def family_panel(name: str, selection: Selection, head: int, recall: float) -> Panel:
    """A family's choice for one head of the first sample."""
    mask = head_mask(selection, head).float().cpu()
    note = f"{mask.mean():.0%} of pairs, {recall:.0%} of mass"
    return Panel(name, note, averaged(mask), mask[middle_token(selection.grid)])


def attention_panel(query: Tensor, key: Tensor, grid: TokenGrid) -> Panel:
    """The softmax weights of one head, on a log scale that begins at a tenth of the even share.

    query, key: `[seq, dim]` in the model's order. Memory grows with seq, not with its square.
    """
    q, k = query.float() * query.shape[-1] ** -0.5, key.float()
    pixel = _pixel(len(q))
    rows = torch.stack([(some @ k.T).softmax(-1).mean(0) for some in q.split(pixel)])
    weights = F.avg_pool1d(rows, pixel, ceil_mode=True)
    keys = (q[middle_token(grid)] @ k.T).softmax(-1)
    pairs, keys = (_log_scaled(x, 0.1 / len(k)).cpu() for x in (weights, keys))
    return Panel(ATTENTION, "log scale", pairs, keys)


def save_masks(panels: Sequence[Panel], grid: TokenGrid, title: str, path: Path, *, columns: int = 5) -> None:
    """Draw the panels in lines: each the pairs in the model's order, over some frames of the middle query's keys.

    Raises:
        ValueError: There is no panel.
    """
    if not panels:
        raise ValueError("panels: expected at least one to draw, got none")
    lines = -(-len(panels) // columns)
    # Inches: a head over lines of panels, each a title, a square and the frames below it.
    side, gap, head, above = 2.9, 0.3, 0.95, 0.3
    shown = frames_shown(grid.frames)
    each = (side - 0.04 * (len(shown) - 1)) / len(shown)
    tall = min(each * grid.height / grid.width, side)
    line = above + side + 0.07 + tall + gap
    width, height = columns * (side + gap) + gap, head + lines * line
    maps = _colours([panel.name for panel in panels])
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    how = (
        "Squares: queries down, keys across, frame after frame, the darker the more pairs are kept. "
        "Frames: the keys that the query marked + reads, in its own frame and in others before and after."
    )
    for down, text, size, colour in ((0.25, title, 14, INK), (0.57, how, 10.5, MUTED)):
        weight = "bold" if colour == INK else "normal"
        figure.text(gap / width, 1 - down / height, text, size=size, color=colour, weight=weight, va="top")
    for number, panel in enumerate(panels):
        x = gap + number % columns * (side + gap)
        y = height - head - number // columns * line - above - side
        colours = maps[number]
        axes = figure.add_axes((x / width, y / height, side / width, side / height))
        # A quarter of the pairs spread evenly should not look like nothing.
        shade = Normalize(0, 1) if panel.name == ATTENTION else PowerNorm(0.7, 0, 1)
        axes.imshow(panel.pairs.numpy(), cmap=colours, norm=shade, aspect="auto")
        axes.set_title(panel.name, loc="left", fontsize=11.5, weight="bold", color=INK)
        axes.set_title(panel.note, loc="right", fontsize=8.5, color=MUTED)
        pictures = [axes]
        video = panel.keys[grid.video_slice].view(grid.frames, grid.height, grid.width)
        for place, frame in enumerate(shown):
            left = x + place * (each + 0.04)
            axes = figure.add_axes((left / width, (y - 0.07 - tall) / height, each / width, tall / height))
            axes.imshow(video[frame].numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto")
            if frame == grid.frames // 2 and panel.name != ATTENTION:
                axes.plot(grid.width // 2, grid.height // 2, marker="+", color=INK, markersize=5)
            pictures.append(axes)
        for axes in pictures:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("#c9ced6")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=120, facecolor=PAPER, format="png")
    with Image.open(drawn) as picture:
        # Averaged masks are like noise: a palette makes the file five times as small.
        palette = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(path, optimize=True)


def head_mask(selection: Selection, head: int) -> Tensor:
    """Kept pairs of one head of the first sample in the model's order, bool `[seq, seq]`."""
    index, inverse = selection.index, selection.grid.inverse
    rows = _of(index.query_blocks(), head)[inverse(_of(selection.query_order, head))]
    cols = _of(index.key_blocks(), head)[inverse(_of(selection.key_order, head))]
    return index.to_mask()[0, head % index.heads][rows][:, cols]


def frames_shown(frames: int) -> list[int]:
    """Up to `FRAMES_SHOWN` frame numbers, evenly around the middle one."""
    around = min(frames, FRAMES_SHOWN) // 2
    middle = frames // 2
    step = max(1, middle // max(around, 1))
    found = [middle + step * n for n in range(-around, around + 1)]
    return [frame for frame in found if 0 <= frame < frames][:FRAMES_SHOWN]


def middle_token(grid: TokenGrid) -> int:
    """Model position of the token in the middle of the video."""
    place = ((grid.frames // 2) * grid.height + grid.height // 2) * grid.width + grid.width // 2
    return grid.video_slice.start + place


def averaged(pairs: Tensor) -> Tensor:
    """Pairs `[seq, seq]` averaged over squares, so that at most `_PIXELS` rows remain."""
    return F.avg_pool2d(pairs[None], _pixel(len(pairs)), ceil_mode=True)[0]


def _pixel(tokens: int) -> int:
    return -(-tokens // _PIXELS)


def _of(x: Tensor, head: int) -> Tensor:
    """One head of `[1 or heads, seq]`, or of the first sample of `[1 or batch, 1 or heads, seq]`."""
    x = x[0] if x.ndim == 3 else x
    return x[head % len(x)]


def _log_scaled(x: Tensor, floor: float) -> Tensor:
    return ((x / floor).log() / (x.max() / floor).log()).clamp(min=0)


def _colours(names: Sequence[str]) -> list[Colormap | str]:
    """White to the colour of each family, a spare one where it has none; the attention itself is drawn as heat."""
    spare = iter([colour for colour in SPARE_COLOURS if colour not in FAMILY_COLOURS.values()] * len(names))
    return [
        "magma"
        if name == ATTENTION
        else LinearSegmentedColormap.from_list(name, [PAPER, FAMILY_COLOURS.get(name) or next(spare)])
        for name in names
    ]
