"""The demo model's world: one or two textured shapes move over a textured background, drawn procedurally.

Every scene has detail that only attention can carry. The background's random grain stays in place over all
frames, and each shape wears a random texture that moves with it, so a model that wants to draw them consistently
has to look at the same place in other frames, or along a motion. Lengths are pixels at every canvas size: a small
canvas is a smaller window on the same world, so a model can learn on small canvases and generate on large ones.
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.93, 0.16, 0.16),
    "yellow": (0.98, 0.84, 0.12),
    "green": (0.16, 0.80, 0.25),
    "blue": (0.20, 0.42, 0.98),
    "purple": (0.72, 0.22, 0.88),
    "white": (0.97, 0.97, 0.97),
}
_DIAGONAL = math.sqrt(0.5)
DIRECTIONS: dict[str, tuple[float, float]] = {  # (down, right)
    "left": (0.0, -1.0),
    "right": (0.0, 1.0),
    "up": (-1.0, 0.0),
    "down": (1.0, 0.0),
    "up left": (-_DIAGONAL, -_DIAGONAL),
    "up right": (-_DIAGONAL, _DIAGONAL),
    "down left": (_DIAGONAL, -_DIAGONAL),
    "down right": (_DIAGONAL, _DIAGONAL),
}
BACKGROUNDS = ("striped", "checkered", "dotted", "marbled")


def _polygon(y: Tensor, x: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Signed distance to a closed polygon, negative inside; corners are (x, y)."""
    distance = torch.full_like(x, torch.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        distance = torch.minimum(distance, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ey != 0:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (px < ex * py / ey)
    return torch.where(inside, -distance.sqrt(), distance.sqrt())


def _star_corners() -> list[tuple[float, float]]:
    radii = [1.22, 0.52] * 5
    return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]


# Signed distance in units of the shape's nominal radius; areas are similar, the ring's hole aside.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda y, x: torch.hypot(y, x) - 0.95,
    "square": lambda y, x: torch.maximum(y.abs(), x.abs()) - 0.84,
    "triangle": lambda y, x: _polygon(y, x, [(0.0, -1.15), (1.12, 0.80), (-1.12, 0.80)]),
    "star": lambda y, x: _polygon(y, x, _star_corners()),
    "ring": lambda y, x: (torch.hypot(y, x) - 0.78).abs() - 0.27,
}


@dataclass(frozen=True)
class Actor:
    """One moving shape, by the words that describe it."""

    colour: str
    shape: str
    direction: str


@dataclass(frozen=True)
class Scene:
    """What a prompt says: one or two actors and a background."""

    actors: tuple[Actor, ...]
    background: str

    @property
    def prompt(self) -> str:
        moves = " and ".join(f"a {a.colour} {a.shape} moves {a.direction}" for a in self.actors)
        return f"{moves} over a {self.background} background"


_ACTOR = re.compile(
    rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moves "
    rf"({'|'.join(sorted(DIRECTIONS, key=len, reverse=True))})\b"
)
_BACKGROUND = re.compile(rf"over an? ({'|'.join(BACKGROUNDS)}) background")


def parse(prompt: str) -> Scene:
    """Read a prompt of this world back into a Scene.

    Raises ValueError when the prompt is not one that ``Scene.prompt`` could have written.
    """
    actors = tuple(Actor(*found) for found in _ACTOR.findall(prompt))
    background = _BACKGROUND.search(prompt)
    if not 1 <= len(actors) <= 2 or background is None:
        example = Scene((Actor("red", "circle", "left"),), "striped").prompt
        raise ValueError(f"prompt: expected a sentence of the demo world such as {example!r}, got {prompt!r}")
    return Scene(actors, background[1])


def sample_scene(rng: random.Random, max_actors: int = 2) -> Scene:
    """Draw a random scene; two actors have different colours and shapes."""
    count = rng.randint(1, max_actors)
    colours, shapes = rng.sample(list(COLOURS), count), rng.sample(list(SHAPES), count)
    actors = tuple(Actor(c, s, rng.choice(list(DIRECTIONS))) for c, s in zip(colours, shapes, strict=True))
    return Scene(actors, rng.choice(BACKGROUNDS))


def _noise(generator: torch.Generator, height: int, width: int, wavelength: float) -> Tensor:
    """Smooth unit-variance noise [height, width] with about the given wavelength in pixels."""
    cell = wavelength / 2
    lattice = torch.randn(
        1, 1, math.ceil(height / cell) + 4, math.ceil(width / cell) + 4, generator=generator
    )
    size = (int(lattice.shape[2] * cell), int(lattice.shape[3] * cell))
    field = F.interpolate(lattice, size=size, mode="bicubic", align_corners=False)[0, 0]
    return field[int(cell) :, int(cell) :][:height, :width] / 0.75


def _muted(rng: random.Random, value: float) -> Tensor:
    hue, saturation = rng.random(), rng.uniform(0.15, 0.45)
    phases = torch.tensor([hue, hue + 1 / 3, hue + 2 / 3]) * 2 * math.pi
    return value * (1 - saturation * (0.5 - 0.5 * torch.cos(phases)))


def _background(kind: str, rng: random.Random, generator: torch.Generator, height: int, width: int) -> Tensor:
    """A still picture [height, width, 3]: two muted colours in a pattern, gently bent, with fine grain."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    y = y + rng.uniform(0, 64) + 1.6 * _noise(generator, height, width, 48)
    x = x + rng.uniform(0, 64) + 1.6 * _noise(generator, height, width, 48)
    if kind == "striped":
        angle = rng.choice([0.0, 0.25, 0.5, 0.75]) * math.pi
        wave = torch.sin(2 * math.pi * (y * math.cos(angle) + x * math.sin(angle)) / 32)
    elif kind == "checkered":
        wave = 1.6 * torch.sin(2 * math.pi * y / 48) * torch.sin(2 * math.pi * x / 48)
    elif kind == "dotted":
        wave = 3.0 * (torch.cos(2 * math.pi * y / 32) + torch.cos(2 * math.pi * x / 32) - 1.1)
    else:
        field = _noise(generator, height, width, 88) + 0.4 * _noise(generator, height, width, 40)
        wave = torch.sin(2.4 * field)
    blend = torch.sigmoid(3.5 * wave)[..., None]
    low, high = _muted(rng, rng.uniform(0.16, 0.26)), _muted(rng, rng.uniform(0.40, 0.52))
    grain = 0.08 * _noise(generator, height, width, 18) + 0.07 * _noise(generator, height, width, 10)
    return (low + (high - low) * blend) * (1 + 1.2 * grain[..., None])


def _path(
    rng: random.Random, direction: str, radius: float, travel: float, height: int, width: int
) -> Tensor:
    """Start and end centres [2, 2] of a straight path that keeps the shape inside the canvas."""
    step = torch.tensor(DIRECTIONS[direction]) * travel
    start = []
    for size, move in zip((height, width), step.tolist(), strict=True):
        margin = 1.12 * radius + 1
        low, high = margin + max(0.0, -move), size - margin - max(0.0, move)
        start.append(rng.uniform(low, high) if low < high else (low + high) / 2)
    begin = torch.tensor(start)
    return torch.stack([begin, begin + step])


def _paths(
    rng: random.Random, scene: Scene, radii: list[float], travel: float, size: tuple[int, int]
) -> list[Tensor]:
    """Paths for all actors; of 40 draws the one that keeps two actors furthest apart at all times."""
    best: list[Tensor] = []
    best_gap = -math.inf
    for _ in range(1 if len(scene.actors) == 1 else 40):
        paths = [_path(rng, a.direction, r, travel, *size) for a, r in zip(scene.actors, radii, strict=True)]
        if len(paths) == 1:
            return paths
        times = torch.linspace(0, 1, 9)[:, None]
        first, second = (p[0] + times * (p[1] - p[0]) for p in paths)
        gap = float((first - second).norm(dim=1).min()) - 1.15 * sum(radii)
        if gap > best_gap:
            best, best_gap = paths, gap
        if gap > 0:
            break
    return best


def render(scene: Scene, *, frames: int, height: int, width: int, seed: int) -> Tensor:
    """Draw a scene as float32 video [frames, height, width, 3] in [0, 1]; the seed fixes what words leave open."""
    return render_owned(scene, frames=frames, height=height, width=width, seed=seed)[0]


def render_owned(scene: Scene, *, frames: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """The video of :func:`render` and whose pixel each is: int64 [frames, height, width], 0 is the background's,
    i the i-th actor's."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    video = _background(scene.background, rng, generator, height, width).expand(frames, -1, -1, -1).clone()
    largest = min(32.0, 0.23 * min(height, width))
    radii = [rng.uniform(0.8 * largest, largest) for _ in scene.actors]
    travel = rng.uniform(0.9, 1.1) * min(64.0, min(height, width) - 2.4 * largest)
    owner = torch.zeros(frames, height, width, dtype=torch.int64)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    progress = torch.linspace(0, 1, frames)[:, None] if frames > 1 else torch.full((1, 1), 0.5)
    paths = _paths(rng, scene, radii, travel, (height, width))
    for number, (actor, radius, path) in enumerate(zip(scene.actors, radii, paths, strict=True), 1):
        centres = path[0] + progress * (path[1] - path[0])
        local_y, local_x = y - centres[:, 0, None, None], x - centres[:, 1, None, None]
        turn = rng.uniform(-0.12, 0.12)
        unit_y = (local_y * math.cos(turn) - local_x * math.sin(turn)) / radius
        unit_x = (local_y * math.sin(turn) + local_x * math.cos(turn)) / radius
        distance = SHAPES[actor.shape](unit_y, unit_x) * radius
        size = 96
        fur = 0.6 * _noise(generator, size, size, 18) + 0.5 * _noise(generator, size, size, 10)
        where = torch.stack([local_x, local_y], dim=-1) * (2 / size)
        fur = F.grid_sample(fur.expand(frames, 1, size, size), where, align_corners=False)[:, 0]
        rim = 1 - 0.45 * torch.exp(-((distance + 2.0) ** 2) / 5)
        colour = torch.tensor(COLOURS[actor.colour]) * ((0.86 + 0.17 * fur).clamp(0.45, 1.1) * rim)[..., None]
        shadow = 1 - 0.5 * torch.sigmoid(-(distance - 1.5) / 2.0)[..., None]
        cover = torch.sigmoid(-distance / 0.6)[..., None]
        video = video * shadow * (1 - cover) + colour * cover
        owner = owner.masked_fill(distance < 0, number)
    return video.clamp(0, 1), owner
