"""Reads shapes, colours, directions and the background off raw frames of the demo world, without any network.

Colours are hues of the palette; a shape's place is where its colour is densest, its direction the slope of that place
over time, its outline the average of the masks around that place, compared with every shape of the world. The
background is told by where the power of its spectrum lies. Rendered scenes are read correctly 98 times in 100 or more,
which a test holds.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.pipelines.demo.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, parse

_PATCH = 96  # side of the window around a shape, pixels
_SMALLEST_AREA = 500  # pixels; the smallest shape drawn on a large canvas covers about 1,000
_SMALLEST_TRAVEL = 12.0  # pixels over the clip


def score(frames: Tensor, prompt: str) -> dict[str, bool]:
    """See ``dit_accel.pipelines.demo.score``."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.is_floating_point():
        raise ValueError(
            f"frames: expected a float tensor [frames, height, width, 3] in [0, 1], got {frames.dtype} "
            f"{tuple(frames.shape)}"
        )
    scene = parse(prompt)
    video = frames.detach().float().cpu().permute(0, 3, 1, 2)
    video = F.avg_pool2d(F.pad(video, (2, 2, 2, 2), mode="replicate"), 5, 1)
    masks = _colour_masks(video)
    areas = {name: float(mask.sum((1, 2)).median()) for name, mask in masks.items()}
    wanted = {actor.colour for actor in scene.actors}
    found = [_read(masks[actor.colour]) for actor in scene.actors]
    covered = torch.stack([masks[a.colour] for a in scene.actors]).amax(0)
    return {
        "shape": all(shape == a.shape for (shape, _), a in zip(found, scene.actors, strict=True)),
        "colour": all((area >= _SMALLEST_AREA) == (name in wanted) for name, area in areas.items()),
        "direction": all(
            direction == a.direction for (_, direction), a in zip(found, scene.actors, strict=True)
        ),
        "background": _background(video, covered) == scene.background,
    }


def _colour_masks(video: Tensor) -> dict[str, Tensor]:
    """One float mask [frames, height, width] per colour of the palette."""
    high, low = video.amax(1), video.amin(1)
    saturation = (high - low) / high.clamp(min=1e-3)
    red, green, blue = video.unbind(1)
    hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    vivid = (saturation > 0.58) & (high > 0.42)
    palette = torch.tensor([rgb for name, rgb in COLOURS.items() if name != "white"])
    r, g, b = palette.unbind(1)
    palette_hue = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)
    difference = hue[..., None] - palette_hue
    nearest = torch.cos(difference).argmax(-1)
    names = [name for name in COLOURS if name != "white"]
    masks = {name: (vivid & (nearest == i)).float() for i, name in enumerate(names)}
    masks["white"] = ((saturation < 0.13) & (low > 0.60)).float()
    return masks


def _read(mask: Tensor) -> tuple[str | None, str | None]:
    """The shape and the direction of the one shape that a colour's mask [frames, height, width] shows."""
    frames, height, width = mask.shape
    half = _PATCH // 2
    padded = F.pad(mask, (half, half, half, half))
    density = F.avg_pool2d(mask[:, None], 41, 1, padding=20)[:, 0].flatten(1)
    peaks = density.argmax(1)
    offset = torch.arange(_PATCH) - half + 0.5
    centres, patches = [], []
    for frame, peak in enumerate(peaks.tolist()):
        y, x = divmod(peak, width)
        for _ in range(3):  # move the window onto the centre of what it shows
            patch = padded[frame, y : y + _PATCH, x : x + _PATCH]
            total = float(patch.sum())
            if total < _SMALLEST_AREA / 4:
                break
            move_y, move_x = (
                float((patch.sum(1) * offset).sum()) / total,
                float((patch.sum(0) * offset).sum()) / total,
            )
            y = min(max(y + round(move_y), 0), height - 1)
            x = min(max(x + round(move_x), 0), width - 1)
        if total >= _SMALLEST_AREA / 4:
            centres.append((frame, y + move_y - round(move_y), x + move_x - round(move_x)))
            patches.append(padded[frame, y : y + _PATCH, x : x + _PATCH])
    if len(centres) < max(1, frames // 2):
        return None, None
    return _shape(torch.stack(patches).mean(0)), _direction(torch.tensor(centres), frames)


def _direction(centres: Tensor, frames: int) -> str | None:
    time = centres[:, 0] - centres[:, 0].mean()
    slope = (time[:, None] * centres[:, 1:]).sum(0) / time.square().sum().clamp(min=1e-6)
    if float(slope.norm()) * (frames - 1) < _SMALLEST_TRAVEL:
        return None
    return max(DIRECTIONS, key=lambda name: float(slope @ torch.tensor(DIRECTIONS[name])))


def _shape(outline: Tensor) -> str:
    """The shape whose drawing, over sizes and small turns, overlaps an average mask [96, 96] best."""
    names, drawings = _drawings()
    overlap = torch.minimum(drawings, outline).sum((1, 2)) / torch.maximum(drawings, outline).sum((1, 2))
    return names[int(overlap.argmax())]


@functools.cache
def _drawings() -> tuple[list[str], Tensor]:
    """Every shape at many sizes and turns: names, and masks [drawings, 96, 96] centred on their own mass."""
    offset = torch.arange(_PATCH) - _PATCH / 2 + 0.5
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    names, drawings = [], []
    for name, distance in SHAPES.items():
        for turn in (-0.1, 0.0, 0.1):
            unit_y, unit_x = y * math.cos(turn) - x * math.sin(turn), y * math.sin(turn) + x * math.cos(turn)
            for radius in range(14, 37, 2):
                drawn = torch.sigmoid(-(distance(unit_y / radius, unit_x / radius) * radius + 1.5))
                weight = drawn.sum().clamp(min=1)
                shift = (round(float((drawn * y).sum() / weight)), round(float((drawn * x).sum() / weight)))
                names.append(name)
                drawings.append(drawn.roll((-shift[0], -shift[1]), (0, 1)))
    return names, torch.stack(drawings)


def _background(video: Tensor, covered: Tensor) -> str:
    """The kind of background, from the spectrum of the picture that remains without the shapes."""
    grown = F.max_pool2d(covered[:, None], 17, 1, padding=8)[:, 0]
    free = 1 - grown
    grey = video.mean(1)
    seen = free.sum(0)
    picture = (grey * free).sum(0) / seen.clamp(min=1)
    picture = torch.where(
        seen > 0, picture, picture[seen > 0].mean() if bool((seen > 0).any()) else grey.mean()
    )
    picture = picture - picture.mean()
    height, width = picture.shape
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    power = torch.fft.fft2(picture * window, s=(512, 512)).abs().square()
    fy, fx = torch.meshgrid(torch.fft.fftfreq(512), torch.fft.fftfreq(512), indexing="ij")
    radius, angle = torch.hypot(fy, fx), torch.atan2(fy, fx) % math.pi
    band = (radius > 1 / 40) & (radius < 1 / 17)
    total = power[(radius > 1 / 160) & (radius < 1 / 14)].sum().clamp(min=1e-9)

    def sector(centre: float) -> float:
        away = (angle - centre + math.pi / 2) % math.pi - math.pi / 2
        return float(power[band & (away.abs() < math.radians(16))].sum() / total)

    flat, rising, upright, falling = (sector(i * math.pi / 4) for i in range(4))
    evidence = {
        "striped": max(abs(flat - upright), abs(rising - falling)),
        "checkered": 2 * min(rising, falling),
        "dotted": 2 * min(flat, upright),
        "marbled": 0.30,
    }
    return max(BACKGROUNDS, key=lambda kind: evidence[kind])
