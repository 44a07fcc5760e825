"""Every preset against the published formula, written anew in float64; deviations are said where they are."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from dit_accel.attention import attend
from dit_accel.calibration import published_candidates
from dit_accel.grid import AXIS_ORDERS, TokenGrid
from dit_accel.kernels import low_rank
from dit_accel.patterns import FAMILIES, Selection, select
from dit_accel.plan import AccelPlan
from dit_accel.presets import PRESETS

VIDEO = TokenGrid(5, 8, 9)  # 360 tokens: 22 blocks of 16 and one of 8
SMALL = TokenGrid(3, 4, 5)  # no more tokens than rows are sampled


def tensors(grid: TokenGrid, heads: int = 3, batch: int = 2, dim: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(
        torch.randn(3, batch, grid.total_tokens, heads, dim, generator=generator, dtype=torch.float64)
    )


def chosen(name: str, query: Tensor, key: Tensor, grid: TokenGrid, **changes) -> Selection:
    """The preset's choice, in blocks of 16 unless told otherwise."""
    sparse = AccelPlan.preset(name).candidates[-1]
    arguments = {"density": sparse.density, "block": 16, **dict(sparse.options), **changes}
    return select(sparse.family, query, key, grid, **arguments)


def blocks(selection: Selection) -> Tensor:
    return selection.index.to_mask()


def kept_at(density: float, cols: int) -> int:
    return max(round(density * cols), 1)


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Softmax `[batch, heads, seq, seq]` of `[batch, seq, heads, dim]`."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return scores.softmax(-1)


def block_sums(weights: Tensor, size: int = 16) -> Tensor:
    """Mean over the rows and sum over the columns of each pair of blocks."""
    rows = [part.mean(-2) for part in weights.split(size, -2)]
    return torch.stack([torch.stack([part.sum(-1) for part in row.split(size, -1)], -1) for row in rows], -2)


def best(mass: Tensor, kept: int) -> Tensor:
    """The own block of every row and the `kept - 1` best others."""
    ranked = (mass + 9 * torch.eye(mass.shape[-1])).argsort(-1, descending=True)[..., :kept]
    return torch.zeros(mass.shape, dtype=torch.bool).scatter_(-1, ranked, True)


def until(mass: Tensor, share: float) -> Tensor:
    """The own block of every row, then the best others until they hold a share of the mass."""
    mask = torch.zeros(mass.shape, dtype=torch.bool)
    for place in itertools.product(*(range(n) for n in mass.shape[:-1])):
        row = mass[place]
        others = [j for j in row.argsort(descending=True).tolist() if j != place[-1]]
        held = 0.0
        for block in (place[-1], *others):
            if held >= share:
                break
            mask[(*place, block)] = True
            held += float(row[block])
    return mask


def pooled(tokens: Tensor, size: int) -> Tensor:
    """Means of runs, `[batch, heads, runs, dim]`."""
    return torch.stack([part.mean(1) for part in tokens.split(size, 1)], dim=2)


def sizes(tokens: int, size: int) -> Tensor:
    return torch.tensor([min(size, tokens - start) for start in range(0, tokens, size)]).double()


def band(cols: int, kept: int) -> Tensor:
    """Row by row the run of blocks around it, moved inwards at the ends."""
    mask = torch.zeros(cols, cols, dtype=torch.bool)
    for row in range(cols):
        first = min(max(row - kept // 2, 0), cols - kept)
        mask[row, first : first + kept] = True
    return mask


# ------------------------------------------------------------------------------------------------- scored by the call


def test_adaspa_keeps_the_blocks_of_most_softmax_mass_equally_many_per_row() -> None:
    query, key, _ = tensors(VIDEO)
    mass = block_sums(probabilities(query, key))
    assert torch.equal(blocks(chosen("adaspa", query, key, VIDEO)), best(mass, kept_at(0.2, 23)))


@pytest.mark.parametrize(("sharp", "budgets"), [([1, 2], [2, 1, 1, 3, 3]), ([0, 2, 4], [1, 3, 2, 3, 1])])
def test_adaspa_gives_blocks_of_easy_heads_to_as_many_hard_ones(sharp: list[int], budgets: list[int]) -> None:
    """Sparsity s, recall > .8 in n heads: the n best get (1 + s) / 2, the n worst (3 s - 1) / 2."""
    grid = TokenGrid(5, 4, 8)  # 10 blocks of 16
    query, key, _ = tensors(grid, heads=5, batch=1)
    # Sharp heads look at their own block alone; of the others each is more diffuse than the one before.
    direction = F.one_hot(torch.arange(grid.total_tokens) // 16, 32).double()
    for head in range(5):
        scale = 12.0 if head in sharp else 2.0 - 0.3 * head
        query[:, :, head] = key[:, :, head] = scale * direction + 0.1 * query[:, :, head]
    if len(sharp) > 2:
        # No more than half of the heads give: of the sharp ones those that hold most.
        query[:, :, 2] *= 0.35
    mass = block_sums(probabilities(query, key))
    recall = mass.sort(-1, descending=True).values[..., :2].sum(-1).mean(-1)[0]
    assert sorted(sharp) == (recall > 0.8).nonzero()[:, 0].tolist()
    order = recall.argsort().tolist()
    n = min(len(sharp), 2)
    assert [1 if h in order[-n:] else 3 if h in order[:n] else 2 for h in range(5)] == budgets
    expected = torch.cat([best(mass[:, h : h + 1], budgets[h]) for h in range(5)], dim=1)
    assert torch.equal(blocks(chosen("adaspa", query, key, grid)), expected)
    # The log-sum-exp of an earlier search is another's; which heads are easy is not told by it.
    for earlier in (0.3 * query, 1.5 * query):
        memory: dict = {}
        for q in (earlier, query):
            later = chosen("adaspa", q, key, grid, reuse=1, state=memory)
        found = blocks(later).sum(-1)[0, :, 0].tolist()
        assert sorted(found) == sorted(budgets)
        assert [h for h in range(5) if found[h] == 3] == [h for h in range(5) if budgets[h] == 3]


def test_doublesparsity_scores_with_the_channels_that_weigh_most() -> None:
    query, key, _ = tensors(VIDEO)
    query, key = (x * torch.linspace(0.2, 2.0, 32)[torch.randperm(32)] for x in (query, key))
    weight = query.abs().mean(1) * (key - key.mean(1, keepdim=True)).abs().mean(1)
    picked = weight.argsort(-1, descending=True)[:, None, :, :16].expand(-1, VIDEO.total_tokens, -1, -1)
    # The softmax scale stays that of the whole dimension.
    q, k = query.gather(3, picked) * 0.5**0.5, key.gather(3, picked)
    expected = best(block_sums(probabilities(q, k)), kept_at(0.25, 23))
    assert torch.equal(blocks(chosen("doublesparsity", query, key, VIDEO)), expected)


def test_sale_scores_in_four_bits() -> None:
    query, key, _ = tensors(VIDEO)

    def rounded(tokens: Tensor, size: int) -> Tensor:
        parts = []
        for part in tokens.split(size, 1):
            scale = part.abs().amax((1, 3), keepdim=True) / 7
            parts.append((part / scale + 0.5).floor() * scale)
        return torch.cat(parts, dim=1)

    q, k = rounded(query, 1), rounded(key - key.mean(1, keepdim=True), 16)
    expected = best(block_sums(probabilities(q, k)), kept_at(0.3, 23))
    assert torch.equal(blocks(chosen("sale", query, key, VIDEO)), expected)
    assert not torch.equal(expected, best(block_sums(probabilities(query, key)), kept_at(0.3, 23)))


def test_draft_attention_on_average_pools_of_8_by_16_patches() -> None:
    grid = TokenGrid(3, 16, 32)  # twelve patches of 128 tokens
    query, key, _ = tensors(grid, heads=2)

    def draft(tokens: Tensor) -> Tensor:
        planes = tokens.permute(0, 2, 3, 1).reshape(2 * 2 * 32, 3, 16, 32)
        return F.avg_pool2d(planes, (8, 16)).reshape(2, 2, 32, 12).transpose(2, 3)

    scores = draft(query) @ draft(key).transpose(2, 3) * 32**-0.5
    # A quarter of the whole map, and a row's own patch in any case: with the authors rows may starve.
    own = torch.eye(12, dtype=torch.bool)
    mass = scores.softmax(-1).masked_fill(own, 9.0)
    threshold = mass.flatten(2).kthvalue(12 * 12 - 3 * 12 + 1, dim=-1).values
    kept = mass >= threshold[..., None, None]
    assert kept.sum(-1).unique().numel() > 1
    t, h, w = grid.coordinates().unbind(-1)
    patch = t * 4 + h // 8 * 2 + w // 16
    selection = chosen("draft", query, key, grid, block=PRESETS["draft"].block)
    assert torch.equal(selection.mask(), kept[:, :, patch][:, :, :, patch])


def test_xattention_sums_antidiagonals_until_the_share_is_held() -> None:
    grid = TokenGrid(5, 8, 8)  # 40 runs of 8
    query, key, _ = tensors(grid)
    sums = torch.zeros(2, 3, 40, 40, dtype=torch.float64)
    for i in range(8):  # query 8r + 7 - i meets key 8c + i
        sums += torch.einsum("brhd,bchd->bhrc", query[:, 7 - i :: 8], key[:, i::8])
    mass = block_sums((sums * 32**-0.5 / 8).softmax(-1), 2)
    assert torch.equal(blocks(chosen("xattention", query, key, grid)), until(mass, 0.95))


def test_sparge_keeps_by_cdf_with_unlike_blocks_forced_and_left_out_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(4)
    query, key = (
        torch.randn(2, 1, 2, 32, generator=generator, dtype=torch.float64)
        + 2.0 * torch.randn(2, VIDEO.total_tokens, 2, 32, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    query[:, :150] *= 0.4
    query[:, 150:] += 2.0
    order = VIDEO.order("tile:4x4x4")
    query, key = query[:, VIDEO.inverse(order)], key[:, VIDEO.inverse(order)]
    q, k = query[:, order], key[:, order]

    def trusted(tokens: Tensor) -> Tensor:
        units = F.normalize(tokens, dim=-1)
        return torch.stack(
            [torch.einsum("bihd,bjhd->bhij", x, x).mean((2, 3)) for x in units.split(16, 1)], 2
        )

    alike_q, alike_k = trusted(q), trusted(k)
    level = 0.5 * float(alike_k.median() + alike_k.max())  # some blocks on either side
    scores = pooled(q, 16) @ pooled(k, 16).transpose(2, 3) * 32**-0.5 + sizes(VIDEO.total_tokens, 16).log()
    mass = scores.masked_fill((alike_k < level)[:, :, None], -torch.inf).softmax(-1)
    expected = until(mass, 0.9) | (alike_k < level)[:, :, None] | (alike_q < level)[..., None]
    assert 0 < (alike_k < level).double().mean() < 1
    assert 0 < (alike_q < level).double().mean() < 1
    assert torch.equal(blocks(chosen("sparge", query, key, VIDEO, guard=level)), expected)
    assert 0 < PRESETS["sparge"].options["guard"] < 1


def test_pbs_sorts_keys_in_segments_by_their_mean_weight_and_pools() -> None:
    query, key, _ = tensors(SMALL)
    segment, size = 16, 4
    weight = probabilities(query, key).mean(2)
    order = torch.cat(
        [
            part.argsort(-1, descending=True) + start * segment
            for start, part in enumerate(weight.split(segment, -1))
        ],
        dim=-1,
    )
    selection = chosen("pbs", query, key, SMALL, block=size, segment=segment)
    assert torch.equal(selection.key_order, order)
    moved = key.gather(1, order.transpose(1, 2)[..., None].expand_as(key))
    scores = pooled(query, size) @ pooled(moved, size).transpose(2, 3) * 32**-0.5
    assert torch.equal(blocks(selection), until(scores.softmax(-1), 0.9))


def test_minference_keeps_sinks_neighbours_and_the_best_columns_and_diagonals() -> None:
    query, key, _ = tensors(SMALL)
    size, cols, kept = 4, 15, 9
    weights = probabilities(query * 4, key)
    columns = torch.stack([part.sum(-1).mean(-1) for part in weights.split(size, -1)], dim=-1)
    found = blocks(chosen("minference", query * 4, key, SMALL, block=size, density=kept / cols))
    for b, h in itertools.product(range(2), range(3)):
        diagonals = {}
        for offset in range(-cols + 1, cols):
            rows = [row for row in range(60) if 0 <= row // size + offset < cols]
            met = [float(weights[b, h, row, (row // size + offset) * size :][:size].sum()) for row in rows]
            diagonals[offset] = math.fsum(met) / len(met)
        for row in range(cols):
            # Sinks and neighbours before all others, the own block first of all.
            worth = [
                (abs(j - row) <= 1 or j < 1) * 2.0
                + (j == row) * 2.0
                + max(float(columns[b, h, j]), diagonals[j - row])
                for j in range(cols)
            ]
            expected = sorted(sorted(range(cols), key=lambda j: -worth[j])[:kept])
            assert found[b, h, row].nonzero()[:, 0].tolist() == expected


# ---------------------------------------------------------------------------------------------- orders and bands


def banded_error(
    query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid, order: str, size: int, read: Tensor
) -> Tensor:
    """Squared error of the output, mean over all rows, of a mask of blocks in an axis order, `[batch, heads]`."""
    places = torch.empty(grid.video_tokens, dtype=torch.int64)
    walk = sorted(
        itertools.product(range(grid.frames), range(grid.height), range(grid.width)),
        key=lambda place: [place["fhw".index(axis)] for axis in order],
    )
    for number, (t, h, w) in enumerate(walk):
        places[(t * grid.height + h) * grid.width + w] = number // size
    mask = read[places][:, places]
    weights = probabilities(query, key)
    values = value.transpose(1, 2)
    some = weights * mask
    return ((some / some.sum(-1, keepdim=True) - weights) @ values).square().mean((2, 3))


@pytest.mark.parametrize("name", ["svg", "paro"])
def test_svg_and_paro_take_the_order_of_least_output_error(name: str) -> None:
    orders = {"svg": ("fhw", "hwf"), "paro": AXIS_ORDERS}[name]
    grid = TokenGrid(10, 2, 3)
    query, key, value = tensors(grid, heads=6)
    query = query * 3
    size, kept = 4, kept_at(PRESETS[name].density, 15)
    read = band(15, kept)
    if name == "svg":
        # Each row's own block, the keys of one frame, and those nearest as far as the budget goes.
        sink = -(-grid.height * grid.width // size)
        read = torch.zeros(15, 15, dtype=torch.bool)
        for row in range(15):
            nearest = sorted(range(15), key=lambda col: (abs(col - row), col > row))
            wanted = dict.fromkeys([row, *range(sink), *nearest])
            read[row, list(wanted)[:kept]] = True
        assert 0 < sink < kept
    errors = torch.stack(
        [banded_error(query, key, value, grid, order, size, read) for order in orders], dim=-1
    )
    selection = chosen(name, query, key, grid, block=size, value=value)
    choice = errors.argmin(-1)
    assert choice.unique().numel() > 1
    for b, h in itertools.product(range(2), range(6)):
        assert torch.equal(selection.query_order[b, h], grid.order(orders[choice[b, h]]))
    assert torch.equal(blocks(selection)[0, 0], read)


def test_sparse_vdit_reads_diagonals_or_after_reordering_several_of_them() -> None:
    query, key, _ = tensors(VIDEO)
    expected = band(23, kept_at(0.4, 23))
    assert torch.equal(blocks(chosen("sparse-vdit", query, key, VIDEO))[0, 0], expected)
    # In the order of places a band is a set of diagonals a frame apart.
    mask = chosen("sparse-vdit", query, key, VIDEO, order="space", density=0.13).mask()[0, 0]
    apart = (torch.arange(360)[:, None] - torch.arange(360)).abs() % 72
    assert mask[apart == 0].all()


def test_moa_reads_a_sink_and_a_span_that_grows_with_the_length() -> None:
    for grid in (VIDEO, TokenGrid(10, 8, 9)):
        query, key, _ = tensors(grid, heads=1, batch=1, dim=2)
        cols = -(-grid.total_tokens // 16)
        mask, kept = blocks(chosen("moa", query, key, grid))[0, 0], kept_at(0.3, cols)
        assert mask[:, 0].all()
        span = mask[:, 1:]
        for row in range(cols):
            inside = span[row].nonzero()[:, 0] + 1
            assert inside.tolist() == list(range(int(inside[0]), int(inside[-1]) + 1))
            assert len(inside) == kept - 1
            if kept < row < cols - kept:
                assert abs(int(inside[0] + inside[-1]) - 2 * row) <= 1


def test_s2_gives_every_head_its_neighbours_and_its_strided_columns() -> None:
    grid = TokenGrid(4, 16, 16)  # 64 blocks
    query, key, _ = tensors(grid, heads=10, batch=1, dim=2)
    found = blocks(chosen("s2", query, key, grid, density=16 / 64))[0]
    for head, row in itertools.product(range(10), range(64)):
        near = sorted(range(64), key=lambda j: (abs(j - row), j > row))[:8]
        published = set(near) | {j for j in range(64) if (j + head) % 8 == 0}
        kept = set(found[head, row].nonzero()[:, 0].tolist())
        assert published <= kept
        assert len(kept) == 16  # where shard and neighbours overlap, columns of half the stride fill the row
        assert all((j + head) % 4 == 0 for j in kept - published)


# ------------------------------------------------------------------------------------------------------ from the grid


def test_natten_reads_a_box_that_is_moved_inwards_at_borders() -> None:
    grid = TokenGrid(8, 16, 20)  # tiles of 4 x 4 x 4 in 2 x 4 x 5
    query, key, _ = tensors(grid, heads=1, batch=1, dim=2)
    mask = chosen("natten", query, key, grid, block=64, density=18 / 40).mask()[0, 0]
    tile = grid.coordinates() // 4

    def inside(axis: int, side: int, length: int) -> Tensor:
        first = (tile[:, axis] - side // 2).clamp(0, length - side)[:, None]
        return (tile[:, axis] >= first) & (tile[:, axis] < first + side)

    assert torch.equal(mask, inside(0, 2, 2) & inside(1, 3, 4) & inside(2, 3, 5))


@pytest.mark.parametrize("dilation", [(1, 1, 3), (1, 2, 2), (2, 1, 3)])
def test_natten_s_dilated_neighbourhoods(dilation: tuple[int, int, int]) -> None:
    """Blocks of one token: on every axis the nearest keys of the query's own residue, moved inwards at borders."""
    grid, size = TokenGrid(4, 6, 12), 3
    query, key, _ = tensors(grid, heads=1, batch=1, dim=2)
    sides = [min(size, length // step) for length, step in zip((4, 6, 12), dilation, strict=True)]
    order = "tile:1x1x1/" + "x".join(map(str, dilation))
    kept = math.prod(sides)
    options = {"order": order, "aspect": 1.0, "block": 1}
    mask = chosen("natten", query, key, grid, density=kept / grid.video_tokens, **options).mask()[0, 0]
    expected = torch.ones_like(mask)
    for axis, (step, side) in enumerate(zip(dilation, sides, strict=True)):
        place = grid.coordinates()[:, axis]
        length = (place.max() + 1) // step  # every residue has equally many here
        first = (place // step - side // 2).clamp(0, length - side)[:, None]
        inside = (place // step >= first) & (place // step < first + side)
        expected &= inside & (place % step == place[:, None] % step)
    assert expected.sum(-1).unique().tolist() == [kept]
    assert torch.equal(mask, expected)


def test_sta_reads_the_window_of_tiles_centred_on_its_own_and_clamped() -> None:
    grid = TokenGrid(18, 24, 32)  # tiles of 6 x 8 x 8 in 3 x 3 x 4
    query, key, _ = tensors(grid, heads=1, batch=1, dim=1)
    # One block a tile; the preset's blocks of 128 are thirds of one.
    index = chosen("sta", query, key, grid, block=384, density=27 / 36).index
    tiles = (grid.coordinates(grid.order("tile:6x8x8")) // torch.tensor([6, 8, 8])).view(36, 384, 3)
    assert (tiles == tiles[:, :1]).all()
    tiles = tiles[:, 0]
    ahead = torch.stack(
        [
            (tiles[:, a] - (tiles[:, a] - 1).clamp(0, length - 3)[:, None])
            for a, length in enumerate((3, 3, 4))
        ]
    )
    assert torch.equal(index.to_mask()[0, 0], ((ahead >= 0) & (ahead < 3)).all(0))


def test_clear_reads_a_circle() -> None:
    grid = TokenGrid(1, 48, 40)
    query, key, _ = tensors(grid, heads=1, batch=1, dim=2)
    selection = chosen("clear", query, key, grid, block=64)
    places = grid.coordinates(selection.query_order[0]).double().split(64)
    centres = torch.stack([place.mean(0) for place in places])
    distance = (centres[:, None] - centres).square().sum(-1)
    mask = blocks(selection)[0, 0]
    assert mask.sum(-1).unique().tolist() == [kept_at(0.2, 30)]
    outside = distance.masked_fill(mask, torch.inf).amin(-1)
    assert ((distance * mask).amax(-1) <= outside + 1e-6).all()


def test_efficient_vdit_reads_its_own_frame_and_the_reference_frames() -> None:
    grid = TokenGrid(10, 4, 8)  # two blocks a frame
    query, key, _ = tensors(grid, heads=1, batch=1, dim=2)
    mask = chosen("efficient-vdit", query, key, grid, density=0.3).mask()[0, 0].view(10, 32, 10, 32)
    frames = mask.all(3).all(1)
    assert torch.equal(frames, mask.any(3).any(1))
    references = [0, 9, 4]  # each furthest from those before
    for frame in range(10):
        others = [f for f in references if f != frame][:2]
        assert sorted(frames[frame].nonzero()[:, 0].tolist()) == sorted([frame, *others])


@pytest.mark.parametrize("decay", [0.2, 0.6, 0.95])
def test_radial_keeps_what_the_formula_keeps_at_some_decay(decay: float) -> None:
    grid, block = TokenGrid(17, 8, 16), 16  # 8 blocks a frame
    query, key, _ = tensors(grid, heads=1, batch=1, dim=2)
    per_frame, cols = 128, 17 * 8
    published = torch.zeros(cols, cols, dtype=torch.bool)
    for q, k in itertools.product(range(cols), range(cols)):
        apart, places = abs(q // 8 - k // 8), abs(q % 8 - k % 8) * block
        span = 2 ** per_frame.bit_length() / 2 ** apart.bit_length()
        if apart <= 1:
            published[q, k] = True
        elif places <= max(decay * span, block):
            published[q, k] = span >= block or apart % (block // span) == 0
    published[:, :8] = True  # the first frame is a sink
    for row in range(0, cols, 5):
        kept = int(published[row].sum())
        mask = blocks(chosen("radial", query, key, grid, density=kept / cols))[0, 0]
        assert torch.equal(mask[row], published[row])


def test_radial_reads_the_nearest_of_a_sink_that_is_larger_than_its_budget() -> None:
    grid = TokenGrid(1, 16, 16)
    query, key, _ = tensors(grid, heads=1, batch=1, dim=2)
    mask = blocks(chosen("radial", query, key, grid, density=3 / 16))[0, 0]
    for row in range(16):
        first = min(max(row - 1, 0), 13)
        assert mask[row].nonzero()[:, 0].tolist() == list(range(first, first + 3))


@pytest.mark.parametrize("decay", [0.2, 0.6, 0.95])
def test_radial_takes_a_block_at_the_border_of_two_frames_for_a_piece_of_each(decay: float) -> None:
    grid, block, per_frame = TokenGrid(17, 4, 6), 16, 24  # one and a half blocks a frame
    query, key, _ = tensors(grid, heads=1, batch=1, dim=2)
    cols = -(-grid.video_tokens // block)
    tokens_of: dict[tuple[int, int], list[int]] = {}
    for token in range(grid.video_tokens):
        tokens_of.setdefault((token // block, token // per_frame), []).append(token % per_frame)
    pieces = {where: sum(places) / len(places) for where, places in tokens_of.items()}
    published = torch.eye(cols, dtype=torch.bool)
    for (q, q_frame), (k, k_frame) in itertools.product(pieces, pieces):
        apart, places = abs(q_frame - k_frame), abs(pieces[q, q_frame] - pieces[k, k_frame])
        span = 2 ** per_frame.bit_length() / 2 ** apart.bit_length()
        near = places <= max(decay * span, block) and (span >= block or apart % (block // span) == 0)
        published[q, k] |= apart <= 1 or near or k_frame == 0
    for row in range(cols):
        kept = int(published[row].sum())
        mask = blocks(chosen("radial", query, key, grid, density=kept / cols))[0, 0]
        assert torch.equal(mask[row], published[row])


def test_efficient_vdit_reads_both_frames_of_a_block_at_their_border() -> None:
    grid = TokenGrid(6, 4, 6)  # blocks of 16 tokens, frames of 24
    query, key, _ = tensors(grid, heads=1, batch=1, dim=2)
    mask = blocks(chosen("efficient-vdit", query, key, grid, density=3 / 9))[0, 0]
    frames = [{token // 24 for token in range(16 * block, 16 * block + 16)} for block in range(9)]
    for row, col in itertools.product(range(9), range(9)):
        if frames[row] & frames[col]:
            assert mask[row, col], (row, col)


# ------------------------------------------------------------------------------------------------- tokens rearranged


def gray_sorted(tokens: Tensor) -> Tensor:
    """Order by the Gray code of the signs against 12 random planes, `[batch, heads, seq]`."""
    normals = torch.randn(tokens.shape[3], 12, generator=torch.Generator().manual_seed(0)).double()
    signs = torch.einsum("bshd,dp->bhsp", tokens - tokens.mean(1, keepdim=True), normals) > 0
    batch, heads, seq, _ = signs.shape
    order = torch.empty(batch, heads, seq, dtype=torch.int64)
    for b, h in itertools.product(range(batch), range(heads)):
        places = []
        for row in signs[b, h].tolist():
            word = int("".join("01"[bit] for bit in row), 2)
            place = 0
            while word:
                place ^= word
                word >>= 1
            places.append(place)
        order[b, h] = torch.tensor(sorted(range(seq), key=lambda i, p=places: p[i]))
    return order


@pytest.mark.parametrize("name", ["hyperattention", "scatterbrain"])
def test_hyperattention_and_scatterbrain_sort_by_an_angular_hash(name: str) -> None:
    query, key, _ = tensors(VIDEO, heads=2)
    selection = chosen(name, query, key, VIDEO)
    assert torch.equal(selection.query_order, gray_sorted(query))
    assert torch.equal(selection.key_order, gray_sorted(key))
    expected = band(23, kept_at(0.25, 23))
    assert all(torch.equal(mask, expected) for mask in blocks(selection).flatten(0, 1))
    sparse = AccelPlan.preset(name).candidates[-1]
    assert (sparse.features, sparse.remainder) == ((64, 0) if name == "scatterbrain" else None, 0.0)


def test_scatterbrain_adds_random_features_of_the_pairs_outside_the_band() -> None:
    query, key, value = tensors(VIDEO, heads=2)
    plan, scale = AccelPlan.preset("scatterbrain"), 32**-0.5
    output, _ = attend(query, key, value, VIDEO, plan.candidates, [len(plan.candidates) - 1], block=16)
    support = chosen("scatterbrain", query, key, VIDEO).mask()
    directions = low_rank._normals(32, 64, 0, query.device).double()
    for b, h in itertools.product(range(2), range(2)):
        q, k = query[b, :, h], key[b, :, h]
        mean = k.mean(0)  # softmax does not see it: all weights of a query shrink alike
        left, right = (
            (scale**0.5 * x @ directions - scale / 2 * x.square().sum(1, keepdim=True)).exp() / 8
            for x in (q, k - mean)
        )
        weights = torch.where(support[b, h], (scale * q @ (k - mean).T).exp(), left @ right.T)
        expected = weights @ value[b, :, h] / weights.sum(1, keepdim=True)
        # Both parts are weighed by float32 log-sum-exps of up to 8.
        torch.testing.assert_close(
            output[b, :, h], expected, rtol=0, atol=2.0**-21 * float(value.abs().max())
        )


def centroids(tokens: Tensor, order: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Means and sizes of the clusters of one head, from its tokens `[seq, dim]`."""
    parts = [tokens[order[a:b]] for a, b in itertools.pairwise(starts.tolist())]
    return torch.stack([part.mean(0) for part in parts]), torch.tensor([len(part) for part in parts])


@pytest.mark.parametrize("name", ["svg2", "svoo"])
def test_svg2_and_svoo_rank_clusters_of_keys_by_their_centroids(name: str) -> None:
    grid = TokenGrid(5, 7, 9)
    query, key, _ = tensors(grid, heads=2)
    query = query * 4
    numbers = {"query_clusters": 7, "key_clusters": 20}
    selection = chosen(name, query, key, grid, **numbers)
    found, index = blocks(selection), selection.index
    for b, h in itertools.product(range(2), range(2)):
        q, _ = centroids(query[b, :, h], selection.query_order[b, h], index.query_starts[b, h])
        k, count = centroids(key[b, :, h], selection.key_order[b, h], index.key_starts[b, h])
        scores = q @ k.T * 32**-0.5
        mass = (count * scores.exp()) / (count * scores.exp()).sum(-1, keepdim=True)
        for row in range(7):
            if name == "svg2":  # descending mass until .9, at least a tenth of the clusters
                ranked, kept, held = mass[row].argsort(descending=True).tolist(), [], 0.0
                while held < 0.9 or len(kept) < 2:
                    kept.append(ranked[len(kept)])
                    held += float(mass[row, kept[-1]])
            else:  # descending score, as near to the density in tokens as that gets
                ranked = scores[row].argsort(descending=True).tolist()
                misses = [abs(int(count[ranked[:n]].sum()) - 0.3 * 315) for n in range(1, 21)]
                kept = ranked[: misses.index(min(misses)) + 1]
            assert found[b, h, row].nonzero()[:, 0].tolist() == sorted(kept)


def test_every_preset_has_a_formula_here() -> None:
    tested = " ".join(name for name in globals() if name.startswith("test_"))
    for name in PRESETS:
        assert name.replace("-", "_") in tested


def test_all_published_systems_of_the_field_are_there() -> None:
    asked = (
        "svg svg2 sparse-vdit adaspa draft efficient-vdit xattention minference pbs sale clear natten moa s2 radial "
        "sta sparge svoo paro doublesparsity hyperattention scatterbrain"
    )
    assert set(asked.split()) == set(PRESETS)


# Of publications and their code, where it is a number: block, options, progress and share of layers that stay dense.
PUBLISHED = {
    # search at steps 10 and 30 of 50, sparsity .8, heads over .8 of the mass give
    "adaspa": (64, {"reuse": 20, "easy": 0.8}, 0.045, 0.0),
    "doublesparsity": (64, {"channels": 16}, 0.0, 0.0),
    "draft": (128, {"order": "tile:1x8x16", "parts": 1, "budget": "map"}, 0.0, 0.0),
    "hyperattention": (64, {}, 0.0, 0.0),
    # sorted in segments of 256 tokens, .9 of the mass, blocks of 128
    "pbs": (128, {"segment": 256, "top_p": 0.9, "parts": 1}, 0.0, 0.0),
    "radial": (128, {"sink": 1}, 0.05, 0.0),
    "sale": (64, {"bits": 4}, 0.0, 0.0),
    # the default thresholds of its functions
    "sparge": (64, {"guard": 0.1, "top_p": 0.9, "parts": 1}, 0.0, 0.0),
    # tiles of 6 x 8 x 8, 12 dense steps of 50
    "sta": (128, {"order": "tile:6x8x8", "shape": "clamped"}, 0.06, 0.0),
    # 64 sampled rows, the first frame as a sink, the first of 40 layers
    "svg": (128, {"samples": 64, "sink": 1, "orders": "fhw+hwf"}, 0.045, 0.03),
    # 50 rounds of k-means, .9 of the mass, at least a tenth of the clusters
    "svg2": (128, {"iterations": 50, "top_p": 0.9, "least": 0.1}, 0.077, 0.0),
    "svoo": (128, {"iterations": 50}, 0.0, 0.0),
    # stride 8, .95 of the mass, blocks of 128
    "xattention": (128, {"stride": 8, "top_p": 0.95}, 0.02, 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_numbers_that_were_published(name: str) -> None:
    block, options, warm_up, layers = PUBLISHED[name]
    plan = AccelPlan.preset(name)
    assert plan.block == block
    sparse = plan.candidates[-1]
    chosen = FAMILIES[sparse.family].with_defaults(dict(sparse.options))
    assert {option: chosen[option] for option in options} == options
    assert plan.range_starts == ((0.0, warm_up) if warm_up else (0.0,))
    assert plan.candidates[0].is_dense == bool(warm_up)
    assert plan.dense_layers == layers


def test_what_authors_calibrate_is_said():
    named = {"doublesparsity", "minference", "moa", "paro", "sale", "sparge", "sparse-vdit", "sta", "svoo"}
    assert {name for name, preset in PRESETS.items() if preset.calibrated} == named
    for name in PRESETS:
        said = AccelPlan.preset(name).objective.get("uncalibrated", "")
        assert bool(said) == (name in named)
        if name in named:
            chosen = PRESETS[name].chosen
            assert said.endswith(f"dit_accel.calibrate(..., candidates={name!r}) gives each head {chosen}")
            assert chosen
            dense, *others = published_candidates(name)
            assert dense.is_dense
            assert PRESETS[name].family in {c.family for c in others} | {"profiled"}
            assert len(set(others)) == len(others) > 3
            assert all((c.precision, c.remainder) == ("native", 0.0) for c in others)
    assert (
        "calibrate the window of each head" in AccelPlan.preset("sta", density=0.2).objective["uncalibrated"]
    )
    assert AccelPlan.preset("window", density=0.3).objective == {"preset": "window"}


@pytest.mark.parametrize(("name", "steps"), [("svg", 10), ("adaspa", 10), ("svg2", 15)])
@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_dense_steps_are_as_many_as_the_authors_count(name: str, steps: int, scheduler: type) -> None:
    """Of 50 at a flow shift of 5, as Wan is sampled at 720p."""
    if scheduler is UniPCMultistepScheduler:
        made = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    else:
        made = scheduler(shift=5.0)
    made.set_timesteps(50)
    progress = [1 - float(t) / made.config.num_train_timesteps for t in made.timesteps]
    plan = AccelPlan.preset(name)
    dense = [plan.candidates[int(plan.row(max(0.0, p), 0)[0])].family == "dense" for p in progress]
    assert sum(dense) == steps
    assert all(dense[:steps])
