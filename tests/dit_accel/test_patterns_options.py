"""Options of the families: heads that differ, orders chosen at run time, sorted keys, guards, two steps, layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from dit_accel.attention import attend
from dit_accel.candidate import Candidate
from dit_accel.grid import AXIS_ORDERS, TokenGrid
from dit_accel.patterns import FAMILIES, select
from dit_accel.patterns.base import SERVES, BlockSpace
from dit_accel.patterns.sorted_keys import sorted_keys

BLOCK = 16
GRID = TokenGrid(5, 7, 9)  # 315 tokens: 19 blocks and one of 11
DYNAMIC = [name for name, family in FAMILIES.items() if not family.static]


def tensors(
    grid: TokenGrid = GRID, heads: int = 3, batch: int = 2, dim: int = 8, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, batch, grid.total_tokens, heads, dim, generator=generator).to(dtype))


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention over the kept pairs, in float64."""
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------- heads by number


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 7, 9, text_tokens=20)], ids=["video", "text"])
def test_heads_keep_their_masks_when_some_heads_only_use_the_family(grid: TokenGrid) -> None:
    query, key, _ = tensors(grid, heads=6)
    whole = select("sharded", query, key, grid, density=0.4, block=BLOCK).index.to_mask()
    assert whole.shape[:2] == (1, 6)
    assert not torch.equal(whole[0, 0], whole[0, 1])
    some = [4, 1, 5]
    part = select("sharded", query[:, :, :3], key[:, :, :3], grid, density=0.4, block=BLOCK, heads=some)
    assert torch.equal(part.index.to_mask(), whole[:, some])


def test_heads_together_read_every_column() -> None:
    query, key, _ = tensors(TokenGrid(4, 8, 16), heads=8)
    # 32 blocks: an eighth of the columns and the own block
    mask = select("sharded", query, key, TokenGrid(4, 8, 16), density=5 / 32, block=BLOCK, local=0.0)
    read = mask.index.to_mask()[0]
    assert read.any(0).all()
    assert read.sum(-1).unique().tolist() == [5]


def test_attention_gives_every_head_its_own_shard() -> None:
    query, key, value = tensors(heads=5, dtype=torch.float64)
    candidates = (Candidate("dense", 1.0), Candidate("sharded", 0.3), Candidate("bands", 0.3))
    row, cache = [1, 0, 2, 1, 1], {}
    shards = select("sharded", query, key, GRID, density=0.3, block=BLOCK).mask()
    bands = select("bands", query, key, GRID, density=0.3, block=BLOCK).mask()
    mask = torch.stack(
        [
            {0: torch.ones_like(shards[0, 0]), 1: shards[0, h], 2: bands[0, h]}[number]
            for h, number in enumerate(row)
        ]
    )
    for _ in range(2):  # the second call is served from the cache
        output, _ = attend(query, key, value, GRID, candidates, row, block=BLOCK, layer=0, cache=cache)
        torch.testing.assert_close(output, dense(query, key, value, mask[None]), atol=1e-12, rtol=0)
    other, _ = attend(query, key, value, GRID, candidates, [1] * 5, block=BLOCK, layer=0, cache=cache)
    torch.testing.assert_close(other, dense(query, key, value, shards), atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------------------ profiled


def local_along(order: str, grid: TokenGrid, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Query and key `[seq, 3]` of attention that falls off with the distance of places in an order."""
    place = grid.inverse(grid.order(order)).double() / 12
    query = torch.stack((2 * place, torch.ones_like(place), torch.zeros_like(place)), -1) * 3**0.5
    key = torch.stack((place, -(place**2), torch.zeros_like(place)), -1)
    return query, key


@pytest.mark.parametrize("batch", [1, 2])
def test_every_head_finds_the_order_in_which_it_is_local(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [local_along(order, GRID, generator) for order in AXIS_ORDERS]
    query, key = (torch.stack(x, dim=1)[None].expand(batch, -1, -1, -1) for x in zip(*pairs, strict=True))
    value = torch.randn(batch, GRID.total_tokens, 6, 4, dtype=torch.float64, generator=generator)
    found = select(
        "profiled", query, key, GRID, density=0.3, block=BLOCK, value=value, orders="+".join(AXIS_ORDERS)
    )
    for head, order in enumerate(AXIS_ORDERS):
        assert torch.equal(found.query_order[:, head], GRID.order(order).expand(batch, -1))
    assert found.key_order is found.query_order
    band = select("bands", query, key, GRID, density=0.3, block=BLOCK, order="wfh").mask()
    assert torch.equal(found.mask()[:, AXIS_ORDERS.index("wfh")], band[:, 0].expand(batch, -1, -1))


def test_batch_entries_choose_their_own_orders() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [local_along(order, GRID, generator) for order in ("frame", "space")]
    query, key = (torch.stack(x)[:, :, None] for x in zip(*pairs, strict=True))
    value = torch.randn(2, GRID.total_tokens, 1, 4, dtype=torch.float64, generator=generator)
    found = select("profiled", query, key, GRID, density=0.25, block=BLOCK, value=value)
    assert torch.equal(found.query_order[0, 0], GRID.order("frame"))
    assert torch.equal(found.query_order[1, 0], GRID.order("space"))


def test_padded_text_has_no_say_in_the_order() -> None:
    grid = TokenGrid(5, 7, 9, text_tokens=20)
    generator = torch.Generator().manual_seed(0)
    pairs = [local_along(order, grid, generator) for order in AXIS_ORDERS]
    query, key = (torch.stack(x, dim=1)[None] for x in zip(*pairs, strict=True))
    query, key = (F.pad(x, (0, 1), value=1.0) for x in (query, key))
    key_mask = torch.ones(1, grid.total_tokens, dtype=torch.bool)
    key_mask[:, -15:] = False
    key[:, -20:] = 0
    key[:, -15:, :, 3] = 1e3  # would draw all the mass
    value = torch.randn(1, grid.total_tokens, 6, 4, dtype=torch.float64, generator=generator)
    way = Candidate("profiled", 0.4, (("orders", "+".join(AXIS_ORDERS)),))
    arguments = {"density": 0.4, "block": BLOCK, "value": value, **dict(way.options)}
    found = select("profiled", query, key, grid, key_mask=key_mask, **arguments)
    for head, order in enumerate(AXIS_ORDERS):
        assert torch.equal(found.query_order[0, head], grid.order(order))
    unaware = select("profiled", query, key, grid, **arguments)
    assert not torch.equal(unaware.query_order, found.query_order)
    output, _ = attend(query, key, value, grid, [way], [0], block=BLOCK, key_mask=key_mask)
    expected = dense(query, key, value, found.mask() & key_mask[:, None, None])
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


def test_one_order_alone_is_a_band_of_it() -> None:
    query, key, value = tensors()
    found = select("profiled", query, key, GRID, density=0.3, block=BLOCK, value=value, orders="hfw")
    assert found.order_name == "hfw"
    band = select("bands", query, key, GRID, density=0.3, block=BLOCK, order="hfw")
    assert torch.equal(found.mask(), band.mask())


def test_attention_with_a_profiled_order_is_that_of_its_mask() -> None:
    grid = TokenGrid(3, 7, 9, text_tokens=13, text_first=True)
    query, key, value = tensors(grid, dtype=torch.float64)
    candidates = (Candidate("profiled", 0.4), Candidate("bands", 0.3))
    output, _ = attend(query, key, value, grid, candidates, [0, 1, 0], block=BLOCK)
    q, k, v = (x[:, :, ::2] for x in (query, key, value))
    chosen = select("profiled", q, k, grid, density=0.4, block=BLOCK, value=v).mask()
    torch.testing.assert_close(output[:, :, ::2], dense(q, k, v, chosen), atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------------------------- sorted keys


@pytest.mark.parametrize(
    "grid", [GRID, TokenGrid(3, 7, 9, text_tokens=20, text_first=True)], ids=["video", "text"]
)
@pytest.mark.parametrize("name", ["pooled", "searched"])
def test_keys_are_sorted_within_segments_by_the_attention_they_get(grid: TokenGrid, name: str) -> None:
    query, key, _ = tensors(grid, dtype=torch.float64)
    segment = 48
    found = select(name, query, key, grid, density=0.3, block=BLOCK, segment=segment, order="space")
    order = grid.order("space")
    assert torch.equal(found.query_order[0], order)
    assert found.key_order.shape == (2, 3, grid.total_tokens)
    blocks = grid.video_tokens // BLOCK if grid.text_tokens else -(-grid.video_tokens // BLOCK)
    chosen = min(blocks * BLOCK, grid.video_tokens)
    # 64 sampled rows are too few to give the order of the exact means; every row is asked here
    for start in range(0, chosen, segment):
        stop = min(start + segment, chosen)
        for b in range(2):
            for h in range(3):
                assert torch.equal(
                    found.key_order[b, h, start:stop].sort().values, order[start:stop].sort().values
                )
    assert torch.equal(found.key_order[..., chosen:], order[chosen:].expand(2, 3, -1))
    assert found.mask()[..., grid.text_slice].all()


def test_sorting_gathers_the_keys_that_all_queries_read() -> None:
    """One key of each block of 16 is read by all: sorted in segments of 4 blocks, one block of 4 holds them."""
    generator = torch.Generator().manual_seed(0)
    key = 0.1 * torch.randn(1, GRID.total_tokens, 1, 8, generator=generator)
    key[:, 5::BLOCK, :, 0] += 9.0
    query = 0.1 * torch.randn(1, GRID.total_tokens, 1, 8, generator=generator)
    query[..., 0] += 8**0.5
    weights = (query[0, :, 0] @ key[0, :, 0].T * 8**-0.5).softmax(-1)
    options = {"density": 0.3, "block": BLOCK, "order": "frame", "parts": 1}
    sums = {
        segment: float(
            (weights * select("pooled", query, key, GRID, segment=segment, **options).mask()).sum(-1).mean()
        )
        for segment in (0, 64)
    }
    assert sums[64] > 0.98
    assert sums[0] < 0.4


def test_attention_with_sorted_keys_is_that_of_its_mask() -> None:
    query, key, value = tensors(dtype=torch.float64)
    options = {"segment": 40, "top_p": 0.5}
    candidates = (Candidate("pooled", 1.0, tuple(options.items())), Candidate("window", 0.3))
    output, _ = attend(query, key, value, GRID, candidates, [0, 1, 0], block=BLOCK)
    q, k, v = (x[:, :, ::2] for x in (query, key, value))
    mask = select("pooled", q, k, GRID, density=1.0, block=BLOCK, **options).mask()
    torch.testing.assert_close(output[:, :, ::2], dense(q, k, v, mask), atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------------------------------- guard


def test_blocks_of_unlike_tokens_are_always_read_and_read_all() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(1, 1, 2, 8, generator=generator), dim=-1)
    query, key = (direction + 0.05 * torch.randn(2, 315, 2, 8, generator=generator) for _ in range(2))
    key[1, 64:80, 0] = torch.randn(16, 8, generator=generator)
    query[0, 160:176, 1] = torch.randn(16, 8, generator=generator)
    options = {"density": 0.2, "block": BLOCK, "order": "frame", "parts": 1}
    plain = select("pooled", query, key, GRID, **options).index.to_mask()
    mask = select("pooled", query, key, GRID, guard=0.6, **options).index.to_mask()
    expected = plain.clone()
    expected[1, 0] |= mask[1, 0]
    expected[0, 1, 10] = True
    assert torch.equal(mask, expected)  # nothing else changes
    assert mask[1, 0, :, 4].all()
    assert (mask[1, 0].sum(-1) <= 4 + 1).all()  # the forced block comes on top
    assert torch.equal(mask[1, 0, :, :4], plain[1, 0, :, :4] & mask[1, 0, :, :4])


def test_the_guard_measures_the_mean_cosine_over_pairs() -> None:
    query, key, _ = tensors(heads=1, batch=1)
    query += 0.7
    blocks = query[0, :, 0].double().split(BLOCK)
    cosines = torch.stack([F.cosine_similarity(x[:, None], x[None], dim=-1).mean() for x in blocks])
    key = torch.ones_like(key)  # alike throughout
    level = float(cosines.median()) + 1e-6
    mask = select("pooled", query, key, GRID, density=0.1, block=BLOCK, order="frame", guard=level)
    assert torch.equal(mask.index.to_mask()[0, 0].all(-1), cosines < level)


# ---------------------------------------------------------------------------------------------------- budget of a map


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 7, 9, text_tokens=20)], ids=["video", "text"])
def test_rows_of_a_map_compete(grid: TokenGrid) -> None:
    query, key, _ = tensors(grid)
    key[:, :40] *= 3.0  # some columns draw most
    options = {"density": 0.5, "block": BLOCK, "order": "frame", "parts": 1, "budget": "map"}
    index = select("pooled", query, key, grid, **options).index
    space = BlockSpace(grid, "frame", BLOCK, query.device)
    rows, kept = space.video_blocks, space.kept(0.5)
    mask = index.to_mask()
    assert mask[:, :, :, rows:].all()  # text
    assert mask[:, :, rows:].all()
    video = mask[:, :, :rows, :rows]
    assert (video.sum((2, 3)) == kept * rows).all()
    assert video.diagonal(dim1=2, dim2=3).all()  # no row starves
    assert video.sum(-1).unique().numel() > 1
    # Every other pair that is kept weighs at least as much as any that is not.
    starts = range(0, space.chosen_tokens, BLOCK)
    q, k = (torch.stack([x[:, at : at + BLOCK].mean(1) for at in starts], 2) for x in (query, key))
    sizes = torch.tensor([float(min(BLOCK, space.chosen_tokens - at)) for at in starts])
    mass = (q @ k.transpose(2, 3) * 8**-0.5 + sizes.log()).softmax(-1)
    others = video & ~torch.eye(rows, dtype=torch.bool)
    least = mass.masked_fill(~others, torch.inf).amin((2, 3))
    most = mass.masked_fill(video, -torch.inf).amax((2, 3))
    assert (least >= most * (1 - 1e-4)).all()


def test_maps_of_heads_with_densities_of_their_own() -> None:
    query, key, _ = tensors()
    options = {"block": BLOCK, "order": "frame", "budget": "map"}
    together = select("pooled", query, key, GRID, density=(0.1, 0.5, 0.3), **options).index.to_mask()
    for head, density in enumerate((0.1, 0.5, 0.3)):
        q, k = (x[:, :, head : head + 1] for x in (query, key))
        alone = select("pooled", q, k, GRID, density=density, **options).index.to_mask()
        assert torch.equal(together[:, head], alone[:, 0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "pooled",
            {"budget": "all"},
            "option 'budget' of family 'pooled': expected 'row' or 'map', got 'all'",
        ),
        ("pooled", {"budget": "map", "top_p": 0.9}, "expected 'row' beside 'top_p'"),
        ("searched", {"budget": "map", "easy": 0.8}, "expected 'row' beside 'easy'"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(name: str, options: dict, message: str) -> None:
    query, key, _ = tensors()
    with pytest.raises(ValueError, match=message):
        select(name, query, key, GRID, density=0.3, block=BLOCK, **options)


# -------------------------------------------------------------------------------------------------- bands until a share


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 7, 9, text_tokens=20)], ids=["video", "text"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("hashed", {"planes": 6}), ("profiled", {"samples": 20}), ("profiled", {"orders": "hwf"})],
)
def test_bands_stop_at_a_share_of_the_mass(name: str, options: dict, grid: TokenGrid) -> None:
    query, key, value = tensors(grid)
    query *= 8.0
    arguments = {"density": 0.6, "block": BLOCK, "value": value, **options}
    whole = select(name, query, key, grid, **arguments)
    part = select(name, query, key, grid, top_p=0.5, **arguments)
    assert torch.equal(part.query_order, whole.query_order)
    assert torch.equal(part.key_order, whole.key_order)
    rows = BlockSpace(grid, "frame", BLOCK, query.device).video_blocks
    band, kept = (found.index.to_mask().expand(2, 3, -1, -1) for found in (whole, part))
    assert not (kept & ~band).any()
    assert kept[:, :, :, rows:].all()
    assert kept[:, :, rows:].all()
    band, kept = band[:, :, :rows, :rows], kept[:, :, :rows, :rows]
    assert kept.sum() < band.sum()
    # By the definition, row by row: means of blocks, the best of the band until half of the row's mass.
    orders = [
        o.expand(2, 3, -1) if o.ndim == 3 else o.expand(2, -1, -1).expand(2, 3, -1)
        for o in (part.query_order, part.key_order)
    ]
    sizes = [min(BLOCK, grid.video_tokens - at) for at in range(0, rows * BLOCK, BLOCK)]
    for b in range(2):
        for h in range(3):
            q, k = (
                x[b, order[b, h], h].split(BLOCK)[:rows]
                for x, order in zip((query, key), orders, strict=True)
            )
            q, k = (
                torch.stack([x[:size].mean(0) for x, size in zip(parts, sizes, strict=True)])
                for parts in (q, k)
            )
            mass = (q @ k.T * 8**-0.5 + torch.tensor(sizes).log()).softmax(-1)
            for row in range(rows):
                wanted, held = [], 0.0
                for col in mass[row].masked_fill(~band[b, h, row], -1.0).argsort(descending=True).tolist():
                    if held >= 0.5 or not band[b, h, row, col]:
                        break
                    wanted.append(col)
                    held += float(mass[row, col])
                assert kept[b, h, row].nonzero()[:, 0].tolist() == sorted(wanted)


# --------------------------------------------------------------------------------------------------------- two steps


@pytest.mark.parametrize("coarse", [2, 3, 7])
@pytest.mark.parametrize("parts", [1, 4])
def test_squares_first_is_the_plain_choice_where_every_square_is_looked_into(coarse: int, parts: int) -> None:
    query, key, _ = tensors(heads=2)
    options = {"density": 0.5, "block": BLOCK, "parts": parts}  # twice half of the blocks is all
    plain = select("pooled", query, key, GRID, **options).index.to_mask()
    assert torch.equal(select("pooled", query, key, GRID, coarse=coarse, **options).index.to_mask(), plain)
    some = select("pooled", query, key, GRID, coarse=coarse, **{**options, "density": 0.15}).index
    assert some.counts.unique().tolist() == [3]


def test_squares_first_looks_into_the_best_squares_only() -> None:
    """Blocks read one other each; squares show where, and the fine step which."""
    grid, side = TokenGrid(8, 8, 16), 4  # 64 blocks, 16 squares a side
    generator = torch.Generator().manual_seed(0)
    codes = F.normalize(torch.randn(64, 16, generator=generator), dim=-1) * 5
    partner = torch.randperm(64, generator=generator)
    query, key = (x.repeat_interleave(BLOCK, 0)[None, :, None] for x in (codes[partner], codes))
    mask = select(
        "pooled", query, key, grid, density=0.1, block=BLOCK, order="frame", coarse=side
    ).index.to_mask()
    hits = mask[0, 0, torch.arange(64), partner].float().mean()
    exact = codes[partner].view(16, side, 16).mean(1) @ codes.view(16, side, 16).mean(1).T / 4
    exact.fill_diagonal_(torch.inf)
    best = exact.topk(-(-2 * 6 // side) + 1).indices  # 6 blocks a row: 4 squares of 16
    square = mask[0, 0].view(16, side, 16, side).any(3).any(1)
    looked_into = torch.zeros(16, 16, dtype=torch.bool).scatter_(1, best, True)
    assert not (square & ~looked_into).any()
    reachable = looked_into[torch.arange(64) // side, partner // side]
    assert (mask[0, 0, torch.arange(64), partner] | ~reachable).all()
    assert hits > 0.4


# ------------------------------------------------------------------------------------------------------------- slashes


def test_slashes_find_diagonals_that_columns_miss() -> None:
    """Every query reads the place 6 blocks on: a diagonal, which no column and no neighbourhood holds."""
    grid, ahead = TokenGrid(4, 8, 16), 6 * BLOCK
    generator = torch.Generator().manual_seed(0)
    codes = F.normalize(torch.randn(grid.total_tokens, 32, generator=generator), dim=-1) * 9
    query, key = codes.roll(-ahead, 0)[None, :, None], codes[None, :, None]
    weights = (query[0, :, 0] @ key[0, :, 0].T * 32**-0.5).softmax(-1)
    found = {}
    for slashes in (0, 1):
        kept = select("stripes", query, key, grid, density=0.2, block=BLOCK, slashes=slashes).mask()[0, 0]
        found[slashes] = (weights * kept).sum(-1)[:-ahead].mean()
    assert found[1] > 0.97
    assert found[0] < 0.6


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_choice_serves_the_next_layers(name: str) -> None:
    query, key, value = tensors(heads=2)
    options = {"order": "frame"} if "order" in FAMILIES[name].options else {}
    candidate = Candidate(name, 0.3, (*options.items(), ("layers", 3)))
    alone = Candidate(name, 0.3, tuple(options.items()))
    cache: dict = {}

    def run(layer: int, step: int, candidate: Candidate = candidate, cache: dict | None = cache) -> Tensor:
        q, k = (x.roll(31 * (layer + 7 * step), 1) for x in (query, key))
        return attend(q, k, value, GRID, (candidate,), [0], block=BLOCK, layer=layer, cache=cache)[0]

    differ = 0
    for step in range(2):
        for layer in range(5):
            shared, own = run(layer, step), run(layer, step, alone, {})
            if layer not in (0, 3):
                differ += not torch.equal(shared, own)
            elif name not in ("clustered", "searched", "balanced"):  # which remember more of the steps before
                assert torch.equal(shared, own)
    assert differ == 6 or (name == "profiled" and differ)  # of few orders one may be right by chance


def test_a_layer_that_comes_again_chooses_anew_though_the_first_one_is_gone() -> None:
    """A plan may stop using the family in the first layer of a group from some step on."""
    query, key, value = tensors(heads=2)
    candidate, cache = Candidate("pooled", 0.2, (("layers", 4),)), {}

    def run(layer: int, shift: int) -> Tensor:
        q = query.roll(shift, 1)
        return attend(q, key, value, GRID, (candidate,), [0], block=BLOCK, layer=layer, cache=cache)[0]

    run(0, 0)
    run(1, 0)
    again, later = run(1, 50), run(2, 50)
    expected = [
        attend(query.roll(50, 1), key, value, GRID, (Candidate("pooled", 0.2),), [0], block=BLOCK)[0]
    ] * 2
    assert torch.equal(again, expected[0])
    assert torch.equal(later, expected[1])


def test_layers_that_share_nothing_choose_for_themselves_from_one_memory() -> None:
    query, key, _ = tensors(heads=2)
    options = {"density": 0.2, "block": BLOCK, "state": {}}
    for layer in range(3):
        q = query.roll(31 * layer, 1)
        found = select("pooled", q, key, GRID, layer=layer, **options).index.to_mask()
        assert torch.equal(found, select("pooled", q, key, GRID, density=0.2, block=BLOCK).index.to_mask())


def test_layers_and_steps_share_one_choice() -> None:
    query, key, _ = tensors(heads=2)
    memory: dict = {}
    options = {"density": 0.2, "block": BLOCK, "state": memory, "reuse": 2, "layers": 2}
    masks = []
    for step in range(3):
        for layer in (4, 5):
            q = query.roll(31 * (2 * step + layer), 1)
            masks.append(select("pooled", q, key, GRID, layer=layer, **options).index.to_mask())
    assert all(torch.equal(masks[0], mask) for mask in masks[1:4])
    assert not torch.equal(masks[0], masks[4])
    assert torch.equal(masks[4], masks[5])


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", DYNAMIC)
def test_choices_hardly_depend_on_the_dtype(name: str, dtype: torch.dtype) -> None:
    query, key, value = tensors(heads=2, dtype=torch.float64)
    query, key, value = (
        x.to(torch.bfloat16).double() for x in (2 * query, key, value)
    )  # exact in all of them
    query = query.clamp(-200, 200)
    options = {"density": 0.3, "block": BLOCK}
    masks = []
    for kind in (dtype, torch.float64):
        q, k, v = (x.to(kind) for x in (query, key, value))
        masks.append(select(name, q, k, GRID, value=v, **options).mask())
    same = (masks[0] & masks[1]).sum() / masks[1].sum()
    assert same > 0.93
    assert masks[0].any(-1).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pooled", {"guard": 0.1}),
        ("pooled", {"coarse": 2}),
        ("pooled", {"segment": 40}),
        ("pooled", {"budget": "map"}),
        ("stripes", {"slashes": 1}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_options_take_every_dtype(name: str, options: dict, dtype: torch.dtype) -> None:
    query, key, _ = (x.to(dtype) for x in tensors(heads=2))
    found = select(name, query, key, GRID, density=0.3, block=BLOCK, **options)
    wide = select(name, query.double(), key.double(), GRID, density=0.3, block=BLOCK, **options)
    assert (found.mask() & wide.mask()).sum() / wide.mask().sum() > 0.9


# -------------------------------------------------------------------------------------------------------------- device


@pytest.mark.parametrize("grid", [GRID, TokenGrid(3, 7, 9, text_tokens=20)], ids=["video", "text"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("stripes", {"slashes": 1}),
        ("stripes", {"top_p": 0.9}),
        ("pooled", {"top_p": 0.9, "guard": 0.2}),
        ("pooled", {"coarse": 3}),
        ("pooled", {"segment": 48}),
        ("pooled", {"budget": "map"}),
        ("antidiagonal", {}),
        ("lowbit", {}),
        ("channels", {}),
        ("searched", {}),
        ("searched", {"easy": 0.3}),
        ("clustered", {"iterations": 1}),
        ("clustered", {"iterations": 1, "top_p": 0.9, "least": 0.1}),
        ("balanced", {}),
        ("balanced", {"top_p": 0.9}),
        ("hashed", {}),
        ("hashed", {"top_p": 0.9}),
        ("profiled", {}),
        ("profiled", {"top_p": 0.9}),
    ],
)
def test_nothing_waits_for_numbers_of_the_device(name: str, options: dict, grid: TokenGrid) -> None:
    """With tensors that have shapes but no numbers: to read one is an error, as is a shape that depends on one."""
    query, key, value = tensors(grid)
    real = select(name, query, key, grid, density=0.3, block=BLOCK, value=value, **options)
    family = FAMILIES[name]
    chosen: dict = {**family.with_defaults(options), "memory": {}}
    chosen.update({"value": value} if family.reads_values else {})
    for option in ("order", *SERVES):
        chosen.pop(option, None)
    segment = chosen.pop("segment", 0)
    space = BlockSpace(grid, "frame", BLOCK, query.device)
    # What depends on the grid alone was made by the call before and is there.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k = (mode.from_tensor(x) for x in (query, key))
        if family.reads_values:
            chosen |= {"value": mode.from_tensor(value), "key_mask": None}
        if segment:
            assert sorted_keys(space, q, k, 0.3, segment).shape == (2, 3, grid.total_tokens)
        if family.arrange is not None:
            found = family.arrange(grid, 0.3, BLOCK, q, k, 8**-0.5, **chosen)
            assert found.query_order.shape == real.query_order.shape
            return
        index = family.choose(space, space.kept(0.3), q, k, 8**-0.5, **chosen)
        assert index.counts.shape == (2, 3, space.blocks)
        with pytest.raises(DynamicOutputShapeException):
            index.counts.nonzero()
