"""Each family finds the structure it is made for, planted in queries and keys of an odd grid."""

import pytest
import torch
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.patterns import select

GRID = TokenGrid(7, 13, 11)
BLOCK = 16


def near(features: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key with scaled q·k = -|x - y|² up to what is equal along a row, for features `[seq, n]`."""
    ones = torch.ones(len(features), 1)
    length = features.square().sum(-1, keepdim=True)
    query, key = torch.cat((2 * features, ones), -1), torch.cat((features, -length), -1)
    return query[None, :, None] * query.shape[-1] ** 0.5, key[None, :, None]


def local(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Near in time and space."""
    return near(GRID.coordinates().float() * torch.tensor([1.0, 0.5, 0.5]))


def same_frame(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Same frame, same rows of the picture."""
    return near(torch.arange(GRID.video_tokens)[:, None].float() / 40)


def same_place(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Same place, whatever the frame."""
    _, h, w = GRID.coordinates().float().unbind(-1)
    return near((h * GRID.width + w)[:, None] / 6)


def moving(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A picture that drifts by most of a token per frame."""
    t, h, w = GRID.coordinates().float().unbind(-1)
    return near(torch.stack((h - 0.8 * t, w + 0.6 * t), dim=-1))


def columns(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A few stretches of keys that every query reads."""
    key = torch.randn(1, GRID.video_tokens, 1, 8, generator=generator)
    query = 0.3 * torch.randn(1, GRID.video_tokens, 1, 8, generator=generator)
    query[..., 0] += 2.0
    for start in (203, 519, 800):
        key[:, start : start + 21, :, 0] += 6.0
    return query * 8**0.5, key


def pairs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every small box reads one other box, at random: no place, no column tells which."""
    boxes = -(-GRID.video_tokens // 32)
    box = GRID.inverse(GRID.order("tile:4x4x4")) // 32
    codes = torch.nn.functional.normalize(torch.randn(boxes, 16, generator=generator), dim=-1) * 6
    partner = torch.randperm(boxes, generator=generator)
    query, key = codes[partner[box]], codes[box]
    noise = torch.randn(2, *key.shape, generator=generator) * 0.5
    return (query + noise[0])[None, :, None], (key + noise[1])[None, :, None]


def recall(structure, name: str, density: float, **options: str | int | float) -> float:
    """Softmax mass on the kept pairs, mean over rows."""
    query, key = structure(torch.Generator().manual_seed(0))
    mass = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(query.shape[-1] ** -0.5).softmax(-1)
    mask = select(name, query, key, GRID, density=density, block=BLOCK, **options).mask()
    return float((mass * mask).sum(-1).mean())


FINDERS = {
    "window": ("window", {"aspect": 0.5}),
    "frame bands": ("bands", {"order": "frame"}),
    "space bands": ("bands", {"order": "space"}),
    "stripes": ("stripes", {}),
    "pooled": ("pooled", {}),
}


@pytest.mark.parametrize(
    ("structure", "finder", "least"),
    [
        pytest.param(local, "window", 0.9, id="window"),
        pytest.param(same_frame, "frame bands", 0.9, id="frame-bands"),
        pytest.param(same_place, "space bands", 0.9, id="space-bands"),
        pytest.param(columns, "stripes", 0.9, id="stripes"),
        pytest.param(pairs, "pooled", 0.9, id="pooled"),
    ],
)
def test_family_finds_what_the_static_others_miss(structure, finder: str, least: float) -> None:
    found = {name: recall(structure, family, 0.2, **options) for name, (family, options) in FINDERS.items()}
    assert found[finder] >= least
    others = [found[name] for name in ("window", "frame bands", "space bands") if name != finder]
    assert found[finder] > max(others) + 0.03


@pytest.mark.parametrize("order", ["frame", "space", "tile:4x4x4"])
def test_pooled_finds_neighbours_in_any_order(order: str) -> None:
    assert recall(local, "pooled", 0.3, order=order) > 0.75


def test_pooling_in_parts_follows_a_moving_picture_better_than_whole_block_means() -> None:
    whole, parts = (recall(moving, "pooled", 0.15, parts=parts) for parts in (1, 4))
    assert parts > whole + 0.02


@pytest.mark.parametrize("name", ["stripes", "pooled"])
def test_dynamic_families_follow_the_keys(name: str) -> None:
    """The same structure elsewhere is found as well: nothing is remembered between calls."""
    structure = columns if name == "stripes" else pairs
    first, second = (structure(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    masks = [select(name, *qk, GRID, density=0.2, block=BLOCK).mask() for qk in (first, second, first)]
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_window_recall_is_the_same_at_the_border_as_in_the_middle() -> None:
    query, key = local(torch.Generator())
    mass = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(query.shape[-1] ** -0.5).softmax(-1)
    kept = (mass * select("window", query, key, GRID, density=0.2, block=BLOCK).mask()).sum(-1)[0, 0]
    places = GRID.coordinates()
    edge = ((places == 0) | (places == torch.tensor([6, 12, 10]))).any(-1)
    assert kept[edge].mean() > 0.95 * kept[~edge].mean()
