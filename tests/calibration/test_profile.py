"""Recall and rel_l2 of the profile against brute force in float64 on full masks."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dit_accel.attention import attend
from dit_accel.calibration.candidates import default_candidates
from dit_accel.calibration.profile import Earlier, profile_call
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.kernels import PRECISIONS, low_rank
from dit_accel.patterns import select

CLUSTERS = (("iterations", 3), ("key_clusters", 7), ("query_clusters", 4))
CANDIDATES = (
    Candidate("dense", 1.0),
    Candidate("skip", 0.0),
    Candidate("window", 0.3),
    Candidate("bands", 0.4, (("order", "space"),)),
    Candidate("bands", 0.4, (("order", "frame"),)),
    Candidate("stripes", 0.3),
    Candidate("pooled", 0.25),
    Candidate("pooled", 0.6),
    Candidate("skip", 0.0, remainder=True),
    Candidate("window", 0.3, remainder=True),
    Candidate("window", 0.3, remainder=0.4),
    Candidate("searched", 0.3, remainder=2.5),
    Candidate("bands", 0.4, (("order", "space"),), remainder=True),
    Candidate("antidiagonal", 0.3),
    Candidate("searched", 0.3, remainder=True),
    Candidate("hashed", 0.3, (("planes", 5),), remainder=True),
    Candidate("hashed", 0.3, (("features", 7), ("planes", 5), ("seed", 3))),
    Candidate("balanced", 0.3, remainder=True),
    Candidate("clustered", 0.3, CLUSTERS),
    Candidate("clustered", 0.5, CLUSTERS, remainder=True),
    Candidate("clustered", 0.3, (*CLUSTERS, ("reuse", 3))),
)
EVERYTHING = 1000

GRIDS = [
    pytest.param(TokenGrid(3, 5, 7), 1, 2, 16, id="B1-S105-H2-block16"),
    pytest.param(TokenGrid(1, 9, 7), 2, 1, 16, id="B2-one-frame-one-head"),
    pytest.param(TokenGrid(3, 5, 7, text_tokens=11), 2, 3, 32, id="B2-text-last"),
    pytest.param(TokenGrid(2, 4, 4, text_tokens=5, text_first=True), 1, 2, 64, id="single-block"),
]


def tensors(grid, batch, heads, dim=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, grid.total_tokens, heads, dim)
    return (1.5 * torch.randn(shape, generator=generator)).to(dtype).unbind(0)


def brute_force(query, key, value, grid, candidate, block, key_mask):
    """Per head: mass, squared error, squared norm over all real rows."""
    q, k, v = (t.double().transpose(1, 2) for t in (query, key, value))
    scores = q @ k.transpose(-1, -2) * query.shape[-1] ** -0.5
    real = torch.ones(query.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
    scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    weights = scores.softmax(-1) * real[:, None, :, None]
    options = dict(candidate.options)
    choose = functools.partial(
        select, candidate.family, query, key, grid, density=candidate.density, block=block, **options
    )
    selected = choose()
    if candidate.family == "clustered":
        memory = {}
        choose(state=memory)
        selected = choose(state={name: memory[name] for name in ("queries", "keys")})
    kept = weights * selected.mask()
    mass = kept.sum(-1)
    dense = weights @ v
    output, total = kept @ v, mass
    if candidate.remainder:
        left_out, sizes, means = stand_ins(selected, k, v, real)
        shift = scores.amax(-1, keepdim=True)  # softmax weights are relative to the dense sum
        scale = query.shape[-1] ** -0.5
        dense_sum = (scores - shift).exp().sum(-1, keepdim=True)
        rest = (q @ means[0].mT * scale - shift).exp() * sizes[:, :, None] / dense_sum
        rest = candidate.remainder * rest * left_out * real[:, None, :, None]
        output, total = output + rest @ means[1], total + rest.sum(-1)
    if candidate.features:
        # By pairs of tokens; keys without their mean, which all weights of a query share.
        rank, seed = candidate.features
        counted = real[:, None, :, None] / real.sum(1).view(-1, 1, 1, 1)
        mean, scale = (k * counted).sum(2, keepdim=True), query.shape[-1] ** -0.5
        left, right = (
            (scale**0.5 * x @ low_rank._normals(q.shape[-1], rank, seed, q.device).double()
             - scale / 2 * x.square().sum(-1, keepdim=True)).exp()
            for x in (q, k - mean)
        )  # fmt: skip
        shared = (q @ mean.mT * scale - scores.logsumexp(-1, keepdim=True)).exp()
        rest = (
            left @ right.mT / rank * shared * ~selected.mask() * real[:, None, None] * real[:, None, :, None]
        )
        output, total = output + rest @ v, total + rest.sum(-1)
    output = torch.where(total[..., None] > 0, output / total[..., None].clamp(min=1e-300), 0.0)
    rows = int(real.sum())
    return mass.sum((0, 2)), (output - dense).square().sum((0, 2, 3)), dense.square().sum((0, 2, 3)), rows


def stand_ins(selected, k, v, real):
    """Per token row the key blocks left out, their sizes, and their mean keys and values, by loops."""
    batch, heads, seq, dim = k.shape
    cols = selected.index.cols
    sizes = torch.zeros(batch, heads, cols, dtype=torch.float64)
    means = torch.zeros(2, batch, heads, cols, dim, dtype=torch.float64)
    left_out = torch.zeros(batch, heads, seq, cols, dtype=torch.float64)
    mask = selected.mask().expand(batch, heads, -1, -1)
    order, number = selected.key_order, selected.index.key_blocks()
    order = order.expand(batch, heads, seq) if order.ndim == 3 else order.expand(heads, seq)[None]
    order, number = order.expand(batch, heads, seq), number.expand(batch, heads, seq)
    for b, h, col in itertools.product(range(batch), range(heads), range(cols)):
        tokens = order[b, h][number[b, h] == col]
        if not len(tokens):
            continue
        left_out[b, h, :, col] = ~mask[b, h][:, tokens].any(-1)
        alive = tokens[real[b, tokens]]
        sizes[b, h, col] = len(alive)
        if len(alive):
            means[0, b, h, col], means[1, b, h, col] = k[b, h, alive].mean(0), v[b, h, alive].mean(0)
    return left_out, sizes, means


@pytest.mark.parametrize("masked", [False, True], ids=["all-real", "key-mask"])
@pytest.mark.parametrize(("grid", "batch", "heads", "block"), GRIDS)
def test_profile_of_all_rows_is_the_brute_force(grid, batch, heads, block, masked):
    query, key, value = tensors(grid, batch, heads)
    key_mask = None
    if masked:
        key_mask = torch.ones(batch, grid.total_tokens, dtype=torch.bool)
        key_mask[-1, grid.total_tokens - 3 :] = False
    found = profile_call(
        query, key, value, grid, CANDIDATES, block=block, query_blocks=EVERYTHING, key_mask=key_mask
    )
    for number, candidate in enumerate(CANDIDATES):
        mass, error, norm, rows = brute_force(query, key, value, grid, candidate, block, key_mask)
        # Float32 sums over some hundred keys: a few hundred roundings of 2^-24.
        budget = grid.total_tokens * 2.0**-24
        torch.testing.assert_close(found.mass[:, number] / rows, mass / rows, rtol=budget, atol=budget)
        torch.testing.assert_close(found.norm[:, number], norm, rtol=2 * budget, atol=0.0)
        rel_l2 = (found.error[:, number] / norm).sqrt()
        torch.testing.assert_close(rel_l2, (error / norm).sqrt(), rtol=0.0, atol=2 * budget)
        assert (found.rows[:, number] == rows).all()


@pytest.mark.parametrize("masked", [False, True], ids=["all-real", "key-mask"])
def test_errors_are_kept_at_places_that_the_grid_decides(masked):
    """Every eighth row of the sampled stretches of each order, of output less dense output."""
    grid, block = TokenGrid(3, 5, 7), 16
    query, key, value = (x.double() for x in tensors(grid, 2, 2))
    key_mask = torch.ones(2, grid.total_tokens, dtype=torch.bool)
    key_mask[-1, grid.total_tokens - 3 :] = not masked
    ways = [
        Candidate("dense", 1.0),
        Candidate("window", 0.3, (("order", "space"),)),
        Candidate("pooled", 0.4),
        Candidate("hashed", 0.4),
    ]
    found = profile_call(
        query, key, value, grid, ways, block=block, query_blocks=3, phase=0.5, key_mask=key_mask
    )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[:, None, None])
    stretches = [range(pick * block, min((pick + 1) * block, grid.total_tokens)) for pick in (1, 3, 5)]
    assert stretches[-1].stop <= grid.total_tokens
    for number, way in enumerate(ways[:3]):
        chosen = select(way.family, query, key, grid, density=way.density, block=block, **dict(way.options))
        mask = chosen.mask() & key_mask[:, None, None]
        error = F.scaled_dot_product_attention(q, k, v, attn_mask=mask) - dense
        for head in range(2):
            order = chosen.query_order.expand(2, -1)[head]
            places = torch.cat([order[run.start : run.stop : 8] for run in stretches])
            expected = torch.cat([error[b, head, places] * key_mask[b, places, None] for b in range(2)])
            # bfloat16 has 8 bits.
            torch.testing.assert_close(
                found.errors[head, number].double(),
                expected,
                rtol=2.0**-8,
                atol=1e-5 * float(dense.abs().max()),
            )
    assert found.errors[:, 3].eq(0).all()  # sorts tokens by what they hold


def test_dense_loses_nothing_and_skip_everything():
    grid = TokenGrid(3, 5, 7)
    found = profile_call(*tensors(grid, 2, 2), grid, CANDIDATES, block=16, query_blocks=3, phase=0.7)
    torch.testing.assert_close(found.mass[:, 0], found.rows[:, 0])
    assert (found.error[:, 0] <= grid.total_tokens * 2.0**-24 * found.norm[:, 0]).all()
    assert (found.mass[:, 1] == 0).all()
    torch.testing.assert_close(found.error[:, 1], found.norm[:, 1])


def test_sampled_blocks_estimate_the_whole():
    grid = TokenGrid(5, 9, 11)
    query, key, value = tensors(grid, 1, 2)
    whole = profile_call(query, key, value, grid, CANDIDATES, block=16, query_blocks=EVERYTHING)
    part = profile_call(query, key, value, grid, CANDIDATES, block=16, query_blocks=8, phase=0.4)
    assert (part.rows == 8 * 16).all()
    recall = (whole.mass / whole.rows, part.mass / part.rows)
    torch.testing.assert_close(recall[1], recall[0], rtol=0.0, atol=0.1)


@pytest.mark.parametrize("phase", [0.0, 0.5, 0.999])
def test_phase_moves_the_sampled_blocks_within_the_sequence(phase):
    grid = TokenGrid(3, 5, 7)
    found = profile_call(*tensors(grid, 1, 1), grid, CANDIDATES[:1], block=16, query_blocks=4, phase=phase)
    # 105 tokens are six full blocks and one of 9; without a phase the short one is not reached.
    assert found.rows.item() == (4 * 16 if phase == 0.0 else 3 * 16 + 9)


def test_bfloat16_is_profiled_in_float32():
    grid = TokenGrid(3, 5, 7)
    half = tensors(grid, 1, 2, dtype=torch.bfloat16)
    full = tuple(t.float() for t in half)
    low = profile_call(*half, grid, CANDIDATES[:5], block=16, query_blocks=EVERYTHING)
    high = profile_call(*full, grid, CANDIDATES[:5], block=16, query_blocks=EVERYTHING)
    torch.testing.assert_close(low.mass, high.mass)
    torch.testing.assert_close(low.error, high.error)


def test_density_is_that_of_the_selection():
    grid = TokenGrid(3, 5, 7)
    query, key, value = tensors(grid, 1, 2)
    found = profile_call(query, key, value, grid, CANDIDATES, block=16)
    assert found.density[0] == 1.0
    assert found.density[1] == 0.0
    assert found.density[7] == pytest.approx(
        select("pooled", query, key, grid, density=0.6, block=16).density
    )


def test_default_candidates_have_dense_and_skip_once_and_no_duplicates():
    candidates = default_candidates()
    assert [c.family for c in candidates].count("dense") == 1
    assert [c.remainder for c in candidates if c.family == "skip"] == [False, True]
    assert len(set(candidates)) == len(candidates)


def test_families_are_tried_alike_on_all_devices():
    on_gpu, on_cpu = default_candidates("cuda"), default_candidates("cpu")
    assert tuple(c for c in on_gpu if c.precision == "native") == on_cpu
    assert len(on_cpu) <= 45  # each is measured on every head and timed


def test_precisions_are_tried_where_the_device_has_them():
    on_gpu, on_cpu = default_candidates("cuda"), default_candidates("cpu")
    assert {c.precision for c in on_cpu} == {"native"}
    assert {c.precision for c in on_gpu} == set(PRECISIONS)
    for precision in PRECISIONS[1:]:
        lower = {replace(c, precision="native") for c in on_gpu if c.precision == precision}
        assert lower == {c for c in on_gpu if c.precision == "native" and c.family != "skip"}
    assert [c.is_dense for c in on_gpu].count(True) == 1
    assert len(set(on_gpu)) == len(on_gpu) == len({c.label for c in on_gpu})


@pytest.mark.parametrize("flatness", [1.0, 0.15], ids=["peaked", "flat"])
@pytest.mark.parametrize("masked", [False, True], ids=["all-real", "key-mask"])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize(("grid", "batch", "heads", "block"), GRIDS)
def test_the_error_of_a_precision_is_that_of_the_kernel_s_definition(
    grid, batch, heads, block, precision, masked, flatness
):
    query, key, value = tensors(grid, batch, heads)
    query, key = flatness * query, key + 3.0  # a large mean, which the kernel takes out
    key_mask, real = None, torch.ones(batch, grid.total_tokens, dtype=torch.bool)
    if masked:
        real[-1, grid.total_tokens - 3 :] = False
        key_mask = real
    candidates = tuple(
        replace(c, precision=own)
        for c in (CANDIDATES[0], CANDIDATES[3], CANDIDATES[10], CANDIDATES[9])
        for own in ("native", precision)
    )
    found = profile_call(
        query, key, value, grid, candidates, block=block, query_blocks=EVERYTHING, key_mask=key_mask
    )
    exact, _ = attend(
        *(x.double() for x in (query, key, value)), grid, candidates, [0], block=block, key_mask=key_mask
    )
    for number, candidate in enumerate(candidates):
        output, _ = attend(
            query,
            key,
            value,
            grid,
            candidates,
            [number],
            block=block,
            key_mask=key_mask,
            backend="reference",
        )
        error = ((output.double() - exact) * real[..., None, None]).square().sum((0, 1, 3)).sqrt()
        norm = found.norm[:, number].sqrt()
        # Weights are rounded to E4M3 relative to another maximum, by at most 2^-4 of themselves each: as much error of
        # another sign. Numbers on the edge between two INT8 numbers may go either way.
        slack = 0.02 if candidate.precision in ("int8_fp8", "fp8") else 1e-3
        torch.testing.assert_close(
            found.error[:, number].sqrt() / norm, error / norm, rtol=0.05, atol=slack, msg=candidate.label
        )
        # The mass is of exact weights.
        torch.testing.assert_close(found.mass[:, number], found.mass[:, number - number % 2])
    lost = (found.error / found.norm).sqrt()
    assert (lost[:, 1] > 1e-4).all()  # dense in 8 bits errs, by less than E4M3's step, an eighth
    assert (lost[:, 1] < 0.125).all()


@pytest.mark.parametrize("name", ["B2-text-last", "B1-S105-H2-block16"])
def test_effect_is_the_squared_product_with_the_gradient_row_by_row(name):
    (parameters,) = [p.values for p in GRIDS if p.id == name]
    grid, batch, heads, block = parameters
    query, key, value = tensors(grid, batch, heads)
    gradient = torch.randn(query.shape, generator=torch.Generator().manual_seed(9))
    candidates = (Candidate("dense", 1.0), Candidate("window", 0.3), Candidate("skip", 0.0))
    found = profile_call(
        query, key, value, grid, candidates, block=block, query_blocks=EVERYTHING, gradient=gradient
    )
    q, k, v = (t.double().transpose(1, 2) for t in (query, key, value))
    scores = q @ k.mT * query.shape[-1] ** -0.5
    dense = scores.softmax(-1) @ v
    for number, candidate in enumerate(candidates[1:], start=1):
        mask = select(candidate.family, query, key, grid, density=candidate.density, block=block).mask()
        # A row that keeps nothing gives 0.
        output = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0) @ v
        products = ((output - dense) * gradient.double().transpose(1, 2)).sum(-1)
        torch.testing.assert_close(
            found.effect[:, number], products.square().sum((0, 2)), rtol=1e-4, atol=0.0
        )
    assert (found.effect[:, 0] < 1e-9 * found.effect[:, 2]).all()
    without = profile_call(query, key, value, grid, candidates, block=block, query_blocks=EVERYTHING)
    assert (without.effect == 0).all()
    torch.testing.assert_close(without.error, found.error)


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate("window", 0.3, remainder=True),
        Candidate("pooled", 0.3, (("branches", "shared"),), remainder=True),
        Candidate("pooled", 0.3, remainder=True),
        Candidate("balanced", 0.3, (("branches", "shared"),), remainder=True),
        Candidate("balanced", 0.3, (("branches", "shared"), ("rebuild", 1))),
        Candidate("balanced", 0.5),
        Candidate("clustered", 0.4, (("branches", "shared"), *CLUSTERS)),
        Candidate("clustered", 0.4, CLUSTERS),
    ],
    ids=lambda c: (
        f"{c.family}-{'-'.join(str(v) for n, v in c.options if n in ('branches', 'rebuild')) or 'own'}"
    ),
)
def test_a_step_is_profiled_as_it_would_run(candidate):
    """Blocks of the step before, and in the second branch what the first one chose."""
    grid, block, heads = TokenGrid(3, 5, 7), 16, 2
    before, now = tensors(grid, 1, 2 * heads), tensors(grid, 1, 2 * heads, dim=24)
    now = [x + 0.5 * x.roll(1, 1) for x in now]
    earlier, remembered = Earlier(), {}
    calls = {
        (step, branch): [x[:, :, number * heads : (number + 1) * heads] for x in of_step]
        for step, of_step in ((1, before), (2, now))
        for number, branch in enumerate(("cond", "uncond"))
    }
    for (step, branch), (q, k, v) in calls.items():
        output, _ = attend(
            q, k, v, grid, [candidate], [0], block=block, layer=0, branch=branch, step=step, cache=remembered
        )
        if step == 1:
            earlier.observe(q, k, v, grid, [candidate], branch=branch, first=branch == "cond", block=block)
            continue
        found = profile_call(
            *(q, k, v, grid, [candidate]),
            block=block,
            query_blocks=EVERYTHING,
            earlier=earlier,
            branch=branch,
        )
        dense = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(
            1, 2
        )
        error = (output.double() - dense).square().sum((0, 1, 3))
        assert (error > 1e-3 * dense.square().sum((0, 1, 3))).all()
        torch.testing.assert_close(found.error[:, 0], error, rtol=grid.total_tokens * 2.0**-22, atol=0.0)


def test_branches_that_share_a_choice_are_compared_where_their_tokens_stand():
    grid, block = TokenGrid(3, 5, 7), 16
    q, k, v = tensors(grid, 1, 2)
    ways = [Candidate("balanced", 0.3, (("branches", "shared"),)), Candidate("balanced", 0.3)]
    earlier = Earlier()
    first, second = (
        profile_call(*(q, k, x, grid, ways), block=block, query_blocks=3, earlier=earlier, branch=branch)
        for branch, x in (("cond", v), ("uncond", -v))
    )
    assert first.errors[:, 0].abs().amax((1, 2)).gt(0).all()
    torch.testing.assert_close(first.errors[:, 0], -second.errors[:, 0])
    assert first.errors[:, 1].eq(0).all()
    assert second.errors[:, 1].eq(0).all()
