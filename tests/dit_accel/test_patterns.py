"""What every pattern family promises on any grid: density, no starved row, text kept, caches apart."""

import itertools

import pytest
import torch
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.patterns import FAMILIES, Selection, clustered, searched, select
from dit_accel.patterns.base import BlockSpace, until_share
from dit_accel.patterns.samples import sampled_rows

BLOCK = 16
SCORED = ["pooled", "antidiagonal", "lowbit", "channels", "searched"]
CHOOSING = ["window", "bands", "radial", "attention_tile", "sharded", "stripes", *SCORED]
GRIDS = [
    pytest.param(TokenGrid(7, 13, 11), id="7x13x11"),
    pytest.param(TokenGrid(1, 9, 14), id="one-frame"),
    pytest.param(TokenGrid(1, 1, 70), id="one-row"),
    pytest.param(TokenGrid(3, 5, 7), id="3x5x7"),
]
TEXT_GRIDS = [
    pytest.param(TokenGrid(3, 5, 7, text_tokens=9), id="text-after"),
    pytest.param(TokenGrid(3, 5, 7, text_tokens=9, text_first=True), id="text-before"),
    pytest.param(TokenGrid(2, 4, 8, text_tokens=16, text_first=True), id="text-block"),
    pytest.param(TokenGrid(1, 1, 5, text_tokens=30), id="text-almost-all"),
]


def tokens(grid: TokenGrid, heads: int = 2, batch: int = 2, dim: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, batch, grid.total_tokens, heads, dim, generator=generator)
    return query, key


def chosen(name: str, grid: TokenGrid, density: float, **options: str | int | float) -> Selection:
    query, key = tokens(grid)
    return select(name, query, key, grid, density=density, block=BLOCK, value=key.flip(1), **options)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.62, 1.0])
@pytest.mark.parametrize("name", [*CHOOSING, "profiled"])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_row_keeps_the_density_asked_within_a_block(grid: TokenGrid, name: str, density: float) -> None:
    selection = chosen(name, grid, density)
    counts, cols = selection.index.counts, selection.index.cols
    assert (counts - density * cols).abs().max() <= 1
    assert counts.min() >= 1
    assert abs(selection.density - density) <= 1 / cols


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("grid", [*GRIDS, *TEXT_GRIDS])
def test_more_density_keeps_all_that_less_kept(grid: TokenGrid, name: str) -> None:
    masks = [chosen(name, grid, density).mask() for density in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0)]
    for less, more in itertools.pairwise(masks):
        assert not (less & ~more).any()
    assert masks[-1].all()


@pytest.mark.parametrize("name", [*CHOOSING, "profiled"])
@pytest.mark.parametrize("grid", [*GRIDS, *TEXT_GRIDS])
def test_tokens_always_see_themselves(grid: TokenGrid, name: str) -> None:
    assert chosen(name, grid, 0.05).mask().diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grid", TEXT_GRIDS)
def test_text_is_read_by_all_and_reads_all(grid: TokenGrid, name: str) -> None:
    mask = chosen(name, grid, FAMILIES[name].density or (0.0 if name == "skip" else 0.2)).mask()
    assert mask[:, :, grid.text_slice].all()
    if name != "skip":
        assert mask[..., grid.text_slice].all()


def test_skip_rows_of_video_blocks_read_nothing_at_all() -> None:
    assert not chosen("skip", TokenGrid(3, 5, 7), 0.0).mask().any()
    grid = TokenGrid(2, 4, 8, text_tokens=16, text_first=True)
    mask = chosen("skip", grid, 0.0).mask()
    assert not mask[:, :, grid.video_slice].any()


def test_dense_keeps_every_pair() -> None:
    selection = chosen("dense", TokenGrid(7, 13, 11), 1.0)
    assert selection.mask().all()
    assert selection.density == 1.0
    assert selection.in_model_order


@pytest.mark.parametrize("order", ["frame", "space", "tile:3x2x4", "wfh"])
@pytest.mark.parametrize("name", CHOOSING)
def test_mask_is_the_block_mask_of_the_order_in_model_positions(name: str, order: str) -> None:
    grid = TokenGrid(3, 5, 7, text_tokens=4, text_first=True)
    selection = chosen(name, grid, 0.3, order=order)
    mask, blocks = selection.mask(), selection.index.to_mask()
    place = grid.inverse(grid.order(order))
    assert torch.equal(selection.query_order[0], grid.order(order))
    assert selection.key_order is selection.query_order
    for query, key in [(0, 5), (17, 80), (108, 40), (60, 61), (33, 33)]:
        expected = blocks[..., place[query] // BLOCK, place[key] // BLOCK]
        assert torch.equal(mask[..., query, key], expected)


@pytest.mark.parametrize("aspect", [0.5, 2.0])
def test_window_is_the_nearest_box_and_grows_inwards_at_borders(aspect: float) -> None:
    # 16-token tiles of one place: blocks are exactly 4 x 4 squares, so the box can be counted by hand
    grid = TokenGrid(1, 28, 28)
    index = chosen("window", grid, 9 / 49, order="tile:1x4x4", aspect=aspect).index
    places = grid.coordinates(grid.order("tile:1x4x4")).view(49, 16, 3)[:, :, 1:].float().mean(1)
    at = {tuple(((place - 1.5) / 4).int().tolist()): block for block, place in enumerate(places)}
    mask = index.to_mask()[0, 0]
    centre = {(h, w) for h in (2, 3, 4) for w in (2, 3, 4)}
    assert {key for key, block in at.items() if mask[at[3, 3], block]} == centre
    corner = {(h, w) for h in (0, 1, 2) for w in (0, 1, 2)}
    assert {key for key, block in at.items() if mask[at[0, 0], block]} == corner


def test_a_ball_is_rounder_than_a_box() -> None:
    grid = TokenGrid(1, 64, 64)
    places, centre = grid.coordinates().float(), 30 * 64 + 30
    apart = {}
    for shape in ("box", "ball"):
        mask = chosen("window", grid, 0.2, order="tile:1x4x4", shape=shape).mask()[0, 0, centre]
        apart[shape] = (places[mask] - places[centre]).abs()
    assert apart["ball"].square().sum(-1).max() < apart["box"].square().sum(-1).max()
    assert apart["ball"].max() >= apart["box"].max()


def test_aspect_of_a_window_trades_space_for_time() -> None:
    grid = TokenGrid(12, 12, 12)
    places = grid.coordinates().float()
    apart = (places[:, None] - places[None]).abs()
    reach = {}
    for aspect in (0.5, 2.0, 8.0):
        mask = chosen("window", grid, 0.15, order="tile:2x2x4", aspect=aspect).mask()[0, 0]
        reach[aspect] = apart[mask].mean(0)
    assert reach[0.5][0] < reach[2.0][0] < reach[8.0][0]
    assert reach[0.5][1] > reach[2.0][1] > reach[8.0][1]


def test_bands_are_runs_of_equal_length_around_the_row() -> None:
    mask = chosen("bands", TokenGrid(7, 13, 11), 0.2).index.to_mask()[0, 0]
    kept = mask.sum(-1)
    first, last = mask.int().argmax(-1), mask.shape[1] - 1 - mask.flip(-1).int().argmax(-1)
    assert kept.unique().numel() == 1
    assert torch.equal(last - first + 1, kept)
    row = torch.arange(len(mask))
    inside = (first > 0) & (last < mask.shape[1] - 1)
    assert ((first + last)[inside] - 2 * row[inside]).abs().max() <= 1


def test_stripes_keep_sinks_and_neighbours() -> None:
    mask = chosen("stripes", TokenGrid(7, 13, 11), 0.2, sinks=2, local=1).index.to_mask()
    blocks = torch.arange(mask.shape[-1])
    assert mask[..., :2].all()
    assert mask[..., (blocks[:, None] - blocks).abs() <= 1].all()
    # beyond that, all rows take the first columns of one ranking, as many as their share allows
    free = mask[:, :, 20:30, 2:18]
    one, other = free[:, :, :, None], free[:, :, None]
    assert not ((one & ~other).any(-1) & (other & ~one).any(-1)).any()


def test_top_p_keeps_the_fewest_blocks_that_hold_the_mass_and_density_is_a_cap() -> None:
    grid = TokenGrid(7, 13, 11)
    query, key = tokens(grid)
    query = query * 6
    whole = select("pooled", query, key, grid, density=1.0, block=BLOCK, top_p=1.0, parts=1).index.to_mask()
    some = select("pooled", query, key, grid, density=1.0, block=BLOCK, top_p=0.6, parts=1).index
    capped = select("pooled", query, key, grid, density=0.1, block=BLOCK, top_p=0.6, parts=1).index
    assert whole.float().mean() > 0.99
    assert some.counts.unique().numel() > 3
    assert torch.equal(capped.counts, some.counts.clamp(max=round(0.1 * some.cols)))
    order = grid.order("tile:4x4x4")
    q, k = (torch.stack([part.mean(1) for part in x[:, order].split(BLOCK, 1)], dim=2) for x in (query, key))
    sizes = torch.tensor([len(part) for part in order.split(BLOCK)])
    mass = torch.softmax(q @ k.transpose(2, 3) * 8**-0.5 + sizes.log(), dim=-1)
    mask = some.to_mask()
    kept = (mass * mask).sum(-1)
    least = (mass + (~mask) * 9).masked_fill(torch.eye(some.cols, dtype=torch.bool), 9).amin(-1)
    assert kept.min() >= 0.6 - 1e-5
    assert ((kept - least < 0.6 + 1e-5) | (mask.sum(-1) == 1)).all()


@pytest.mark.parametrize("text", [0, 20])
def test_balanced_rows_stop_once_they_hold_the_mass(text: int) -> None:
    grid = TokenGrid(7, 13, 11, text_tokens=text)
    query, key = tokens(grid)
    query = query * 6
    options: dict = {"density": 1.0, "block": BLOCK, "parts": 1}
    found = select("balanced", query, key, grid, top_p=0.6, **options)
    rows = grid.video_tokens // BLOCK if text else -(-grid.video_tokens // BLOCK)
    q, k = (
        torch.stack(
            [part.mean(2) for part in x.transpose(1, 2).take_along_dim(order[..., None], 2).split(BLOCK, 2)],
            2,
        )
        for x, order in ((query, found.query_order), (key, found.key_order))
    )
    sizes = torch.tensor([min(BLOCK, grid.total_tokens - n * BLOCK) for n in range(k.shape[2])])
    mass = torch.softmax((q @ k.transpose(2, 3) * 8**-0.5 + sizes.log())[:, :, :rows, :rows], dim=-1)
    mask = found.index.to_mask()[:, :, :rows, :rows]
    kept = (mass * mask).sum(-1)
    least = mass.masked_fill(~mask, 9).amin(-1)
    assert kept.min() >= 0.6 - 1e-5
    assert ((kept - least < 0.6 + 1e-5) | (mask.sum(-1) == 1)).all()
    assert mask.sum(-1).unique().numel() > 3
    capped = select("balanced", query, key, grid, top_p=0.6, **options | {"density": 0.4})
    cap = max(round(0.4 * found.index.cols) - (found.index.cols - rows), 1)
    texts = found.index.cols - rows
    assert torch.equal(
        capped.index.counts[:, :, :rows], (mask.sum(-1).clamp(max=cap) + texts).to(torch.int32)
    )
    assert (found.index.counts[:, :, rows:] == found.index.cols).all()


def test_stripes_stop_once_they_hold_the_mass() -> None:
    """Two blocks of keys that all queries read, and nothing else."""
    grid = TokenGrid(7, 13, 11)
    query, key = tokens(grid)
    query, key = torch.ones_like(query), key * 0.01
    for block in (4, 9):
        key[:, block * BLOCK : (block + 1) * BLOCK] += 5
    options: dict = {"density": 1.0, "block": BLOCK, "sinks": 1, "local": 1}
    index = select("stripes", query, key, grid, top_p=0.9, **options).index
    row = torch.arange(index.rows)[:, None]
    col = torch.arange(index.cols)
    first = ((row - col).abs() <= 1) | (col == 0)
    assert torch.equal(index.to_mask(), (first | (col == 4) | (col == 9)).expand_as(index.to_mask()))
    assert select("stripes", query, key, grid, top_p=0.0, **options).density == 1.0


@pytest.mark.parametrize("name", ["stripes", *SCORED])
def test_dynamic_families_choose_for_each_batch_entry_and_head(name: str) -> None:
    grid = TokenGrid(7, 13, 11)
    query, key = tokens(grid, heads=3)
    both = select(name, query, key, grid, density=0.2, block=BLOCK).index.to_mask()
    assert both.shape[:2] == (2, 3)
    for entry in range(2):
        for head in range(3):
            q, k = (x[entry : entry + 1, :, head : head + 1] for x in (query, key))
            alone = select(name, q, k, grid, density=0.2, block=BLOCK).index.to_mask()
            assert torch.equal(alone[0, 0], both[entry, head])
    assert not torch.equal(both[0, 0], both[1, 0])
    assert not torch.equal(both[0, 0], both[0, 1])


@pytest.mark.parametrize("name", ["stripes", *SCORED])
def test_a_choice_serves_as_many_steps_as_asked(name: str) -> None:
    grid, memory = TokenGrid(7, 13, 11), {}
    query, key = tokens(grid, heads=2)
    masks = []
    for step in range(5):
        moved = query.roll(step * grid.video_tokens // 5, dims=1)
        options = {"density": 0.2, "block": BLOCK, "state": memory, "reuse": 3}
        masks.append(select(name, moved, key, grid, **options).index.to_mask())
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])
    assert torch.equal(masks[3], masks[4])


def test_a_second_search_reads_the_keys_once_with_the_first_one_s_sums(monkeypatch) -> None:
    grid, memory, given = TokenGrid(5, 7, 9), {}, []
    query, key = tokens(grid)
    exact = searched.block_mass

    def spied(*arguments, lse, **options):
        given.append(lse)
        return exact(*arguments, lse=lse, **options)

    monkeypatch.setattr(searched, "block_mass", spied)
    masks = [
        select("searched", query, key, grid, density=0.3, block=BLOCK, state=memory).index.to_mask()
        for _ in range(2)
    ]
    assert given[0] is None
    assert given[1].shape == (len(query), query.shape[2], grid.video_tokens)
    assert torch.equal(*masks)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"easy": 0.2}], ids=str)
def test_a_second_search_of_other_tokens_compares_shares_of_a_row(options: dict) -> None:
    """The log-sum-exp is that of smaller scores, so that sums by it are above 1."""
    grid, memory = TokenGrid(5, 7, 9), {}
    query, key = tokens(grid)
    arguments = {"density": 0.3, "block": BLOCK, **options}
    select("searched", 0.2 * query, key, grid, state=memory, **arguments)
    later = select("searched", query, key, grid, state=memory, **arguments).index.to_mask()
    alone = select("searched", query, key, grid, **arguments).index.to_mask()
    assert later.diagonal(dim1=2, dim2=3).all()
    # Within a block of rows those that differ most from the step before weigh most, so the choice is not the same.
    assert float((later & alone).sum() / alone.sum()) > 0.4
    assert float(later.sum()) == pytest.approx(float(alone.sum()), rel=0.2)


def test_radial_reads_narrower_neighbourhoods_of_frames_further_away() -> None:
    grid = TokenGrid(9, 8, 16)  # frames of eight blocks of 16: a block is one row of the picture
    mask = chosen("radial", grid, 0.35).index.to_mask()[0, 0]
    middle = mask[4 * 8 + 4].view(9, 8).sum(-1)
    assert middle[4] == middle.max()
    for apart in (1, 2, 3):
        assert middle[4 + apart] >= middle[5 + apart]
        assert middle[4 - apart] >= middle[3 - apart]
    assert middle[2] < middle[4]
    assert chosen("radial", grid, 0.35, sink=1).index.to_mask()[0, 0, :, :8].all()


def test_attention_tile_reads_its_own_frame_and_the_same_reference_frames() -> None:
    grid = TokenGrid(9, 8, 16)
    mask = chosen("attention_tile", grid, 3 / 9).index.to_mask()[0, 0].view(9, 8, 9, 8)
    frames = mask.all(-1).all(1)
    assert torch.equal(frames, mask.any(-1).any(1))
    own, references = torch.eye(9, dtype=torch.bool), [0, 8, 4]  # each furthest from those before
    for frame in range(9):
        expected = own[frame].clone()
        for reference in references:
            if expected.sum() < 3:
                expected[reference] = True
        assert torch.equal(frames[frame], expected)


@pytest.mark.parametrize(
    "grid", [TokenGrid(4, 7, 9), TokenGrid(4, 7, 9, text_tokens=20)], ids=["video", "text"]
)
def test_clusters_keep_what_was_asked_for_and_one_at_least(grid: TokenGrid) -> None:
    query, key = tokens(grid, heads=2)
    masks = {}
    for density in (0.0, 0.3, 0.6, 1.0):
        options = {"query_clusters": 5, "key_clusters": 20, "density": density, "block": BLOCK}
        found = select("clustered", query, key, grid, **options)
        video = found.mask()[:, :, grid.video_slice]
        masks[density] = video
        assert video.any(-1).all()
        if density:
            # The nearest that whole clusters give.
            largest = found.index.key_starts.diff().amax()
            missed = video.sum(-1) - density * grid.total_tokens
            missed = missed[video.sum(-1) > largest + grid.text_tokens]
            assert missed.numel()
            assert (missed.abs() <= largest / 2).all()
    assert masks[1.0].all()
    assert not (masks[0.3] & ~masks[0.6]).any()
    assert masks[0.3].double().mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_another_default_device_of_torch_changes_nothing(name: str) -> None:
    """Users set CUDA once for all; tensors without a place of their own would then be made there."""
    # Sizes of their own: what is kept from other calls was made without another default.
    grid = TokenGrid(2, 5, 9 + sorted(FAMILIES).index(name), text_tokens=7)
    query, key = tokens(grid, heads=2, dim=12 + sorted(FAMILIES).index(name))
    given = {"density": 0.4 if FAMILIES[name].density is None else FAMILIES[name].density, "block": BLOCK}
    with torch.device("meta"):
        found = select(name, query, key, grid, value=key, **given)
    assert found.index.counts.device.type == found.query_order.device.type == "cpu"
    assert torch.equal(found.mask(), select(name, query, key, grid, value=key, **given).mask())


def test_masses_until_a_share_do_not_depend_on_the_order_of_a_sum() -> None:
    masses = torch.rand(4, 2_000, generator=torch.Generator().manual_seed(0))
    masses /= masses.sum(-1, keepdim=True)
    kept = until_share(masses, 0.7)
    assert kept.dtype == torch.bool
    for row, own in zip(masses.double(), kept, strict=True):
        held = 0.0
        for mass, keep in zip(row.tolist(), own.tolist(), strict=True):
            assert keep == (held < 0.7) or abs(held - 0.7) < 2_000 * 2.0**-40
            held += mass
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(until_share(masses, 0.7), kept)
    finally:
        torch.use_deterministic_algorithms(False)


def groups_anywhere() -> tuple[TokenGrid, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A grid with queries and keys of six groups that lie anywhere, and their softmax weights at scale 1."""
    grid, groups = TokenGrid(6, 8, 10), 6
    generator = torch.Generator().manual_seed(3)
    centres = 6 * torch.nn.functional.normalize(torch.randn(groups, 16, generator=generator), dim=-1)
    member = torch.randint(groups, (1, grid.video_tokens, 1), generator=generator)
    noise = 0.3 * torch.randn(2, 1, grid.video_tokens, 1, 16, generator=generator)
    query, key = centres[member] + noise[0], centres[member] + noise[1]
    return grid, query, key, torch.softmax(query[0, :, 0].double() @ key[0, :, 0].double().T, dim=-1)


def test_clusters_find_groups_that_lie_anywhere() -> None:
    grid, query, key, weights = groups_anywhere()
    options = {"density": 0.25, "block": BLOCK, "query_clusters": 12, "key_clusters": 12, "iterations": 20}
    kept = select("clustered", query, key, grid, **options).mask()[0, 0]
    assert (weights * kept).sum(-1).mean() > 0.95
    pooled = select("pooled", query, key, grid, density=0.25, block=BLOCK).mask()[0, 0]
    assert (weights * pooled).sum(-1).mean() < 0.5


@pytest.mark.parametrize(
    "grid", [TokenGrid(4, 7, 9), TokenGrid(4, 7, 9, text_tokens=20)], ids=["video", "text"]
)
def test_hashed_rows_are_bands_of_the_sorted_tokens(grid: TokenGrid) -> None:
    query, key = tokens(grid, heads=2)
    for density in (0.1, 0.4, 1.0):
        found = select("hashed", query, key, grid, density=density, block=BLOCK)
        for order in (found.query_order, found.key_order):
            assert torch.equal(order.sort(-1).values, torch.arange(grid.total_tokens).expand_as(order))
            assert torch.equal(
                order[..., grid.video_tokens :].unique(), torch.arange(*grid.text_slice.indices(999))
            )
        blocks = -(-grid.total_tokens // BLOCK)
        video = grid.video_tokens // BLOCK if grid.text_tokens else blocks
        counts = found.index.counts[..., :video]
        assert (counts == max(round(density * blocks), blocks - video + 1)).all()
        assert (found.index.to_mask()[..., :video, :video].long().diff(dim=-1).abs().sum(-1) <= 2).all()
    assert found.mask().all()


def test_hash_sorts_like_to_like() -> None:
    grid, query, key, weights = groups_anywhere()
    held = {}
    for name in ("hashed", "bands"):
        kept = select(name, query, key, grid, density=0.4, block=BLOCK).mask()[0, 0]
        held[name] = float((weights * kept).sum(-1).mean())
    assert held["bands"] < 0.5
    assert held["hashed"] > held["bands"] + 0.3


def test_channels_are_those_that_weigh_most() -> None:
    grid = TokenGrid(4, 7, 9)
    query, key = tokens(grid, heads=2)
    query[..., 3:] *= 0.01
    options = {"density": 0.3, "block": BLOCK}
    three = select("channels", query, key, grid, channels=3, **options).index.to_mask()
    exact = select("searched", query[..., :3], key[..., :3], grid, **options, scale=query.shape[3] ** -0.5)
    assert torch.equal(three, exact.index.to_mask())


def test_clusters_go_on_from_the_step_before(monkeypatch) -> None:
    grid, memory, calls = TokenGrid(4, 7, 9), {}, []
    original = clustered.kmeans

    def spied(*arguments, iterations, centroids):
        calls.append((iterations, centroids))
        return original(*arguments, iterations=iterations, centroids=centroids)

    monkeypatch.setattr(clustered, "kmeans", spied)
    query, key = tokens(grid)
    options = {"density": 0.3, "block": BLOCK, "state": memory, "iterations": 7}
    first = select("clustered", query, key, grid, **options)
    second = select("clustered", query, key, grid, **options)
    assert [(iterations, start is None) for iterations, start in calls] == [(7, True)] * 2 + [(2, False)] * 2
    assert first.index.varies
    assert second.index.varies
    assert not first.in_model_order


@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(4, 7, 9),
        TokenGrid(4, 7, 9, text_tokens=20),
        TokenGrid(4, 7, 9, text_tokens=20, text_first=True),
    ],
    ids=["video", "text", "text-first"],
)
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_balanced_rows_keep_the_blocks_between_whose_means_most_mass_is(
    grid: TokenGrid, density: float
) -> None:
    query, key = tokens(grid)
    found = select("balanced", query, key, grid, density=density, block=BLOCK, parts=1)
    for order in (found.query_order, found.key_order):
        assert torch.equal(order.sort(-1).values, torch.arange(grid.total_tokens).expand_as(order))
        assert torch.equal(
            order[..., grid.video_tokens :].unique(), torch.arange(*grid.text_slice.indices(999))
        )
    blocks = -(-grid.total_tokens // BLOCK)
    video = grid.video_tokens // BLOCK if grid.text_tokens else blocks
    kept = max(round(density * blocks), blocks - video + 1) - (blocks - video)
    mask = found.index.to_mask()
    assert mask[..., video:, :].all()
    assert mask[..., video:].all()
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            q, k = query[b, found.query_order[b, h], h], key[b, found.key_order[b, h], h]
            q, k = (torch.stack([part.mean(0) for part in x.split(BLOCK)]) for x in (q, k))
            sizes = torch.tensor([len(part) for part in torch.arange(grid.total_tokens).split(BLOCK)])
            logits = q @ k.T * query.shape[-1] ** -0.5 + sizes.log()
            best = logits[:video, :video].topk(kept, dim=-1).indices
            assert torch.equal(
                mask[b, h, :video, :video], torch.zeros(video, video).scatter(1, best, 1).bool()
            )
    if density == 1.0:
        assert found.mask().all()


def test_balanced_blocks_find_groups_that_lie_anywhere() -> None:
    grid, query, key, weights = groups_anywhere()
    held = {}
    for name in ("balanced", "pooled"):
        kept = select(name, query, key, grid, density=0.4, block=BLOCK, scale=1.0).mask()[0, 0]
        held[name] = float((weights * kept).sum(-1).mean())
    assert held["balanced"] > 0.97
    assert held["pooled"] < 0.7


def test_balanced_blocks_serve_as_many_steps_as_asked() -> None:
    grid, memory = TokenGrid(4, 7, 9), {}
    query, key = tokens(grid)
    options = {"density": 0.3, "block": BLOCK, "state": memory, "rebuild": 3}

    def orders(step: int | None) -> torch.Tensor:
        q, k = (x.roll(31 * (step or 0), 1) for x in (query, key))
        return select("balanced", q, k, grid, step=step, **options).query_order

    at = {step: orders(step) for step in (4, 5, 6, 7, 9, 12)}
    assert at[4] is at[5] is at[6]
    assert not torch.equal(at[6], at[7])
    assert at[7] is at[9]
    assert not torch.equal(at[9], at[12])
    # A generation that begins anew comes with an earlier step.
    assert not torch.equal(orders(0), at[12])
    memory.clear()
    unknown = [orders(None) for _ in range(4)]
    assert unknown[0] is unknown[1] is unknown[2]
    assert unknown[2] is not unknown[3]


@pytest.mark.parametrize("name", ["window", "bands"])
def test_static_families_are_made_once_per_grid_options_and_heads(name: str) -> None:
    one, other = TokenGrid(4, 6, 10), TokenGrid(6, 10, 4)
    first = chosen(name, one, 0.3, order="space")
    second = chosen(name, other, 0.3, order="space")
    again = chosen(name, one, 0.3, order="space")
    assert again.index.indices is first.index.indices
    one_head = select(name, *tokens(one, heads=1), one, density=0.3, block=BLOCK, order="space")
    assert one_head.index.indices is first.index.indices  # one head's lists serve all
    assert first.grid == one
    assert second.grid == other
    assert not torch.equal(first.mask(), second.mask())
    assert not torch.equal(chosen(name, one, 0.3, order="frame").mask(), first.mask())
    assert select(name, *tokens(one, heads=1), one, density=0.3, block=BLOCK, order="space").index.heads == 1
    assert chosen(name, one, 0.5, order="space").density > first.density


def test_sampled_rows_meet_every_column_of_the_picture() -> None:
    # stripes sample 64 rows: with a fixed stride they would all lie in one image column here
    grid = TokenGrid(4, 16, 64)
    rows = sampled_rows(BlockSpace(grid, "frame", 64, torch.device("cpu")), 64)
    assert rows.unique().numel() == 64
    assert rows.min() >= 0
    assert rows.max() < grid.video_tokens
    assert (rows % 64 // 8).unique().numel() == 8


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("windows", {}, "unknown family 'windows'; known: dense, skip, window, bands, radial"),
        (
            "window",
            {"width": 3},
            "family 'window' has no option 'width'; its options are: order, aspect, shape",
        ),
        ("dense", {"density": 1.0, "order": "frame"}, "'dense' has no option 'order'; its options are: none"),
        ("window", {"aspect": "2"}, "option 'aspect' of family 'window': expected float .*, got '2'"),
        ("stripes", {"sinks": 1.5}, "option 'sinks' of family 'stripes': expected int .*, got 1.5"),
        ("stripes", {"sinks": True}, "option 'sinks' of family 'stripes': expected int .*, got True"),
        ("stripes", {"local": -1}, "option 'local' of family 'stripes': expected at least 0, got -1"),
        ("stripes", {"samples": 0}, "option 'samples' of family 'stripes': expected at least 1, got 0"),
        (
            "pooled",
            {"top_p": 1.2},
            "option 'top_p' of family 'pooled': expected a number from 0 to 1, got 1.2",
        ),
        (
            "pooled",
            {"parts": 3},
            "option 'parts' of family 'pooled': expected a divisor of the block, 16, got 3",
        ),
        (
            "antidiagonal",
            {"stride": 3},
            "option 'stride' of family 'antidiagonal': expected a divisor of the block, 16, got 3",
        ),
        ("searched", {"reuse": 0}, "option 'reuse' of family 'searched': expected at least 1 step, got 0"),
        (
            "clustered",
            {"key_clusters": 10_000},
            "option 'key_clusters' of family 'clustered': expected 0 to .*, got 10000",
        ),
        (
            "clustered",
            {"least": -0.5},
            "option 'least' of family 'clustered': expected 0.0 to 1.0, got -0.5",
        ),
        ("pooled", {"layers": 0}, "option 'layers' of family 'pooled': expected at least 1 layer, got 0"),
        (
            "pooled",
            {"guard": 1.5},
            "option 'guard' of family 'pooled': expected a number from 0 to 1, got 1.5",
        ),
        ("pooled", {"coarse": -1}, "option 'coarse' of family 'pooled': expected at least 0, got -1"),
        ("lowbit", {"segment": -1}, "option 'segment' of family 'lowbit': expected at least 0, got -1"),
        ("lowbit", {"guard": 0.5}, "family 'lowbit' has no option 'guard'; its options are: order, top_p"),
        ("stripes", {"slashes": 2}, "option 'slashes' of family 'stripes': expected 0 or 1, got 2"),
        ("bands", {"sinks": -1}, "option 'sinks' of family 'bands': expected at least 0, got -1"),
        ("sharded", {"local": 1.1}, "option 'local' of family 'sharded': expected .* 0 to 1, got 1.1"),
        ("profiled", {"value": torch.zeros(2, 105, 2, 8), "samples": 0}, "'samples' .* at least 1, got 0"),
        ("profiled", {"value": torch.zeros(2, 105, 2, 8), "sink": -1}, "'sink' .* at least 0, got -1"),
        (
            "profiled",
            {"value": torch.zeros(2, 105, 2, 8), "orders": "fhw,hwf"},
            "option 'orders' of family 'profiled': expected names of fhw, .* with . between, got 'fhw,hwf'",
        ),
        ("profiled", {}, r"value: expected \[2, 105, 2, dim\] like key, since family 'profiled' compares"),
        (
            "profiled",
            {"value": torch.zeros(2, 104, 2, 8)},
            r"value: .* got \(2, 104, 2, 8\); pass the values",
        ),
        ("sharded", {"heads": [0]}, "heads: expected 2 numbers, one for each head, got 1"),
        ("balanced", {"axes": 0}, "option 'axes' of family 'balanced': expected at least 1, got 0"),
        ("balanced", {"rebuild": 0}, "option 'rebuild' of family 'balanced': expected at least 1, got 0"),
        ("balanced", {"parts": 3}, "option 'parts' of family 'balanced': .* divisor of the block, 16, got 3"),
        ("hashed", {"planes": 31}, "option 'planes' of family 'hashed': expected 1 to 30, got 31"),
        ("channels", {"channels": 0}, "option 'channels' of family 'channels': expected at least 1, got 0"),
        ("radial", {"sink": -1}, "option 'sink' of family 'radial': expected at least 0, got -1"),
        ("window", {"aspect": 0.0}, "option 'aspect' of family 'window': expected a number above 0, got 0.0"),
        (
            "window",
            {"shape": "cone"},
            "option 'shape' of family 'window': expected 'box', 'clamped' or 'ball', got 'cone'",
        ),
        ("window", {"order": "tiles"}, "expected 'frame', 'space', .* or 'tile:TxHxW', got 'tiles'"),
        ("window", {"density": 1.1}, "density: expected a number from 0 to 1, got 1.1"),
        ("window", {"density": float("nan")}, "density: expected a number from 0 to 1, got nan"),
        ("dense", {"density": 0.5}, "family 'dense' has density 1.0 only, got 0.5"),
        ("skip", {"density": 0.5}, "family 'skip' has density 0.0 only, got 0.5"),
        ("window", {"block": 0}, "block: expected at least 1 token, got 0"),
    ],
)
def test_what_a_family_cannot_do_is_refused(name: str, arguments: dict, message: str) -> None:
    grid = TokenGrid(3, 5, 7)
    with pytest.raises(ValueError, match=message):
        select(name, *tokens(grid), grid, **{"density": 0.3, "block": BLOCK, **arguments})


def test_tensors_of_another_grid_are_refused() -> None:
    query, key = tokens(TokenGrid(3, 5, 7))
    with pytest.raises(
        ValueError, match=r"query: expected \[batch, 30, heads, dim\] .* got \(2, 105, 2, 8\)"
    ):
        select("window", query, key, TokenGrid(2, 3, 5), density=0.3)
    with pytest.raises(ValueError, match=r"key: expected \[batch, 105, heads, dim\] .* got \(2, 104, 2, 8\)"):
        select("window", query, key[:, 1:], TokenGrid(3, 5, 7), density=0.3)
