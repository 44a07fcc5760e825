"""Planted attention that is known exactly: each family holds it at the density that the construction needs.

A structure is a bool matrix of token pairs; every query reads its keys evenly. Densities are counted here: the blocks
that a row of blocks must keep, given what its family can say, divided by all blocks.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.patterns import FAMILIES, select

BLOCK = 16
GRID = TokenGrid(7, 13, 11)  # frames of 143 tokens, 63 blocks, the last of 9 tokens
TEXT = TokenGrid(7, 13, 11, text_tokens=21, text_first=True)
WHOLE = TokenGrid(7, 12, 12)  # frames of nine whole blocks


def same(of_query: Tensor, of_key: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key `[1, seq, 1, groups]`: keys of the query's group have logit 30, others 0."""
    groups = int(max(of_query.max(), of_key.max())) + 1
    query, key = (F.one_hot(x, groups).float()[None, :, None] for x in (of_query, of_key))
    return query * 30 * groups**0.5, key


def spatial(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    frame = grid.coordinates()[:, 0]
    return frame, frame


def temporal(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    place = grid.coordinates()[:, 1] * grid.width + grid.coordinates()[:, 2]
    return place, place


def stripes(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    key = torch.ones(grid.video_tokens, dtype=torch.int64)
    for start in (203, 519, 800):
        key[start : start + 21] = 0
    return torch.zeros_like(key), key


def sinks(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    key = (torch.arange(grid.video_tokens) >= 13).long()
    return torch.zeros_like(key), key


def clusters(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    member = torch.randint(6, (grid.video_tokens,), generator=torch.Generator().manual_seed(3))
    return member, member


def support_of(structure, grid: TokenGrid = GRID) -> Tensor:
    query, key = structure(grid)
    return query[:, None] == key


def in_blocks(support: Tensor, grid: TokenGrid, order: str) -> Tensor:
    """Pairs of blocks of an order that hold a pair of tokens."""
    support = support[grid.order(order)][:, grid.order(order)]
    rows = torch.stack([part.any(0) for part in support.split(BLOCK)])
    return torch.stack([part.any(1) for part in rows.split(BLOCK, 1)], dim=1)


def recall(support: Tensor, mask: Tensor) -> float:
    """Share of the kept pairs, mean over rows and then the worst head."""
    return float(((support & mask).sum(-1) / support.sum(-1)).mean(-1).min())


def blocks_needed(pairs: Tensor) -> float:
    """A family that scores blocks keeps those that hold a pair, and its own."""
    return int((pairs | torch.eye(len(pairs), dtype=torch.bool)).sum(1).max()) / len(pairs)


def band_needed(pairs: Tensor) -> float:
    """A band reaches as far to either side as the furthest pair of blocks lies apart."""
    row, col = pairs.nonzero().unbind(1)
    return min(1.0, (2 * int((row - col).abs().max()) + 1) / len(pairs))


def nearest_needed(pairs: Tensor, distance: Tensor) -> float:
    """A family that goes by a distance keeps all that is no further than the furthest pair it needs."""
    furthest = distance.masked_fill(~pairs, -1.0).amax(1, keepdim=True)
    return int((distance <= furthest + 1e-6).sum(1).max()) / len(pairs)


SCORED = ["pooled", "antidiagonal", "lowbit", "searched"]
DYNAMIC_CASES = [
    *(pytest.param(name, spatial, {"order": "frame"}, id=f"{name}-spatial") for name in SCORED),
    *(pytest.param(name, temporal, {"order": "space"}, id=f"{name}-temporal") for name in SCORED),
    *(pytest.param(name, stripes, {"order": "frame"}, id=f"{name}-stripes") for name in SCORED),
    *(pytest.param(name, sinks, {"order": "frame"}, id=f"{name}-sinks") for name in SCORED),
    pytest.param("pooled", spatial, {"order": "frame", "coarse": 3}, id="squares-spatial"),
    pytest.param("pooled", stripes, {"order": "frame", "coarse": 2}, id="squares-stripes"),
    pytest.param("stripes", stripes, {"sinks": 0, "local": 0}, id="stripes-stripes"),
    pytest.param("stripes", stripes, {"sinks": 0, "local": 0, "slashes": 1}, id="slashes-stripes"),
    pytest.param("stripes", sinks, {"sinks": 1, "local": 0}, id="stripes-sinks"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "structure", "options"), DYNAMIC_CASES)
def test_scored_families_hold_a_structure_in_as_many_blocks_as_it_touches(
    name: str, structure, options: dict, dtype: torch.dtype
) -> None:
    support = support_of(structure)
    density = blocks_needed(in_blocks(support, GRID, options.get("order", "frame")))
    query, key = (x.to(dtype) for x in same(*structure(GRID)))
    assert density < 0.5
    mask = select(name, query, key, GRID, density=density, block=BLOCK, **options).mask()[0]
    assert recall(support, mask) >= 0.97


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("structure", "channels"), [(spatial, 7), (stripes, 1), (sinks, 1)])
def test_the_few_channels_that_tell_are_found_among_many(
    structure, channels: int, dtype: torch.dtype
) -> None:
    """Seven frames are told apart by seven channels, what all queries read by one; 48 others hold noise."""
    support = support_of(structure)
    density = blocks_needed(in_blocks(support, GRID, "frame"))
    query, key = same(*structure(GRID))
    generator, groups = torch.Generator().manual_seed(1), query.shape[3]
    noise = torch.randn(2, 1, GRID.video_tokens, 1, 48, generator=generator)
    query = torch.cat((noise[0], query * ((groups + 48) / groups) ** 0.5), dim=3).to(dtype)
    key = torch.cat((0.3 * noise[1], key), dim=3).to(dtype)
    options = {"density": density, "block": BLOCK, "order": "frame"}
    mask = select("channels", query, key, GRID, channels=channels, **options).mask()[0]
    assert recall(support, mask) >= 0.97
    alike = select("channels", query[..., :48], key[..., :48], GRID, channels=channels, **options).mask()[0]
    assert recall(support, alike) < 0.6  # the noise alone


@pytest.mark.parametrize("structure", [spatial, temporal])
def test_a_profiled_head_holds_either_band_at_the_density_of_its_band(structure) -> None:
    support = support_of(structure)
    order = "frame" if structure is spatial else "space"
    density = band_needed(in_blocks(support, GRID, order))
    query, key = same(*structure(GRID))
    value = torch.randn(1, GRID.video_tokens, 1, 8, generator=torch.Generator().manual_seed(0))
    options = {"density": density, "block": BLOCK}
    mask = select("profiled", query, key, GRID, value=value, **options).mask()[0]
    assert recall(support, mask) >= 0.97
    assert recall(support, select("bands", query, key, GRID, order=order, **options).mask()[0]) == 1.0
    other = "space" if order == "frame" else "frame"
    assert recall(support, select("bands", query, key, GRID, order=other, **options).mask()[0]) < 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_clusters_and_hashes_hold_groups_that_lie_anywhere(dtype: torch.dtype) -> None:
    member, _ = clusters(GRID)
    support = support_of(clusters)
    query, key = (x.to(dtype) for x in same(member, member))
    largest = int(member.bincount().max())
    mask = select(
        "clustered",
        query,
        key,
        GRID,
        density=largest / GRID.video_tokens,
        block=BLOCK,
        query_clusters=6,
        key_clusters=6,
    ).mask()[0]
    assert recall(support, mask) >= 0.97
    # Sorted, a group is a run of tokens: a band has to reach from its one end to the other.
    reach = -(-largest // BLOCK)
    density = (2 * reach + 1) / -(-GRID.video_tokens // BLOCK)
    assert density < 0.4
    assert recall(support, select("hashed", query, key, GRID, density=density, block=BLOCK).mask()[0]) >= 0.97
    # Equal blocks cut groups: the blocks of the largest one and the two at its ends that it shares.
    density = (reach + 2) / -(-GRID.video_tokens // BLOCK)
    assert (
        recall(support, select("balanced", query, key, GRID, density=density, block=BLOCK).mask()[0]) >= 0.97
    )


def box(grid: TokenGrid) -> Tensor:
    """One frame, three rows and three columns to each side."""
    apart = (grid.coordinates()[:, None] - grid.coordinates()).abs()
    return (apart <= torch.tensor([1, 3, 3])).all(-1)


def ball(grid: TokenGrid) -> Tensor:
    apart = (grid.coordinates()[:, None] - grid.coordinates()).double()
    return apart.square().sum(-1) <= 12


@pytest.mark.parametrize("shape", ["box", "clamped", "ball"])
@pytest.mark.parametrize("order", ["tile:4x4x4", "tile:2x3x4", "wfh"])
def test_windows_hold_a_neighbourhood_at_the_density_of_its_furthest_block(shape: str, order: str) -> None:
    support = ball(GRID) if shape == "ball" else box(GRID)
    places = GRID.coordinates(GRID.order(order)).double()
    centres = torch.stack([part.mean(0) for part in places.split(BLOCK)])
    aspect = 1.0 if shape == "ball" else 0.5
    ahead = (centres - centres[:, None]) / torch.tensor([aspect, 1.0, 1.0])
    distance = ahead.abs()
    if shape == "clamped":
        border = torch.where(
            ahead > 0, (centres - centres.amin(0))[:, None], (centres.amax(0) - centres)[:, None]
        )
        distance = (distance + torch.minimum(distance, border / torch.tensor([aspect, 1.0, 1.0]))) / 2
    straight = distance.square().sum(-1).sqrt()
    ranked = straight if shape == "ball" else distance.amax(-1) + 1e-3 * straight
    density = nearest_needed(in_blocks(support, GRID, order), ranked)
    query = key = torch.zeros(1, GRID.video_tokens, 1, 2)
    options = {"order": order, "aspect": aspect, "shape": shape, "block": BLOCK}
    assert recall(support, select("window", query, key, GRID, density=density, **options).mask()[0]) >= 0.97


def test_radial_holds_a_neighbourhood_that_halves_with_the_distance_of_frames() -> None:
    """Frames 0 and 1 apart whole, 2 and 3 apart a quarter of 256 · .3, 4 to 6 apart an eighth, at least a block."""
    t, h, w = WHOLE.coordinates().unbind(-1)
    place = h * WHOLE.width + w
    frames, apart = (t[:, None] - t).abs(), (place[:, None] - place).abs()
    reach = torch.tensor([256, 256, 19, 19, 16, 16, 16])[frames]
    support = apart <= reach
    centres = WHOLE.coordinates().double().split(BLOCK)
    frame = torch.stack([part[:, 0].mean() for part in centres])
    centre = torch.stack([(part[:, 1] * WHOLE.width + part[:, 2]).mean() for part in centres])
    between = (frame[:, None] - frame).abs().round()
    bits = torch.tensor([int(x).bit_length() for x in between.flatten()]).view_as(between)
    gap = (centre[:, None] - centre).abs()
    distance = gap * 2.0**bits + 1e6 * ((gap > BLOCK) & (between > 1))
    density = nearest_needed(in_blocks(support, WHOLE, "frame"), distance)
    query = key = torch.zeros(1, WHOLE.video_tokens, 1, 2)
    assert density < 0.75
    assert (
        recall(support, select("radial", query, key, WHOLE, density=density, block=BLOCK).mask()[0]) >= 0.97
    )


@pytest.mark.parametrize(("order", "axis"), [("frame", 0), ("hwf", 1), ("wfh", 2)])
def test_attention_tiles_hold_their_own_slice_and_the_outermost_ones(order: str, axis: int) -> None:
    grid = WHOLE if axis == 0 else TokenGrid(8, 12, 12)  # slices of whole blocks
    piece = grid.coordinates()[:, axis]
    support = (piece[:, None] == piece) | (piece == 0) | (piece == piece.max())
    density = blocks_needed(in_blocks(support, grid, order))
    assert density == pytest.approx(3 / (int(piece.max()) + 1))
    query = key = torch.zeros(1, grid.video_tokens, 1, 2)
    found = select("attention_tile", query, key, grid, density=density, block=BLOCK, order=order).mask()[0]
    assert recall(support, found) == 1.0


@pytest.mark.parametrize("order", ["frame", "whf"])
def test_shards_hold_a_stretch_and_every_eighth_block(order: str) -> None:
    number = GRID.inverse(GRID.order(order)) // BLOCK
    apart, cols = (number[:, None] - number).abs(), 63
    support = torch.stack([(apart <= 2) | ((number + head) % 8 == 0) for head in range(3)])
    # Five neighbours and the eight columns of a shard, one of which the neighbours may hold already.
    density, share = 13 / cols, 5 / 13
    query = key = torch.zeros(1, GRID.video_tokens, 3, 2)
    options = {"density": density, "block": BLOCK, "order": order, "local": share}
    assert recall(support, select("sharded", query, key, GRID, **options).mask()[0]) == 1.0


@pytest.mark.parametrize(("name", "options"), [("bands", {"sinks": 1}), ("radial", {"sink": 1})])
def test_static_sinks_are_held(name: str, options: dict) -> None:
    """The first tokens: one block for bands, a frame of nine blocks for radial, and the row's own."""
    support, query = support_of(sinks), torch.zeros(1, GRID.video_tokens, 1, 2)
    density = (2 if name == "bands" else 10) / 63
    kept = select(name, query, query, GRID, density=density, block=BLOCK, **options).mask()[0]
    assert recall(support, kept) == 1.0


EVEN = [name for name in FAMILIES if name not in ("dense", "skip")]


@pytest.mark.parametrize("grid", [GRID, TEXT], ids=["video", "text"])
@pytest.mark.parametrize("name", EVEN)
def test_even_attention_is_held_as_far_as_the_density_goes(name: str, grid: TokenGrid) -> None:
    """Queries of zero read all alike, so recall is density: .97 needs .97 of the blocks."""
    key = torch.randn(1, grid.total_tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    query = torch.zeros_like(key)
    cols = -(-grid.total_tokens // BLOCK)
    # Clusters are kept whole, so that they have to be small.
    options = {"key_clusters": 300, "iterations": 2} if name == "clustered" else {}
    for density in (0.25, min(1.0, (-(-0.97 * cols // 1) + 1) / cols)):  # the last block is a short one
        found = select(name, query, key, grid, density=density, block=BLOCK, value=key, **options)
        shares = found.mask()[:, :, grid.video_slice].float().mean(-1)
        assert shares.mean() == pytest.approx(density, abs=1.0 / cols)
        if density > 0.9:
            assert shares.mean() >= 0.97
