"""Attention with a pattern per head equals SDPA with the masks of those patterns."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.attention import attend
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.patterns import balanced, select

BLOCK = 16
CANDIDATES = (
    Candidate("dense", 1.0),
    Candidate("skip", 0.0),
    Candidate("window", 0.3),
    Candidate("bands", 0.2),
    Candidate("bands", 0.2, (("order", "space"),)),
    Candidate("stripes", 0.25, (("sinks", 2),)),
    Candidate("pooled", 0.3),
    Candidate("pooled", 0.5, (("order", "frame"), ("top_p", 0.8))),
    Candidate("bands", 0.2, (("order", "space"),), remainder=True),
    Candidate("skip", 0.0, remainder=True),
    Candidate("clustered", 0.4, (("key_clusters", 9), ("query_clusters", 4))),
    Candidate("balanced", 0.4),
)
# Families that remember more of the step before than a choice.
KEEPS_MORE = ("searched", "clustered", "balanced")
GRIDS = [
    pytest.param(TokenGrid(5, 7, 9), id="5x7x9"),
    pytest.param(TokenGrid(1, 9, 14), id="one-frame"),
    pytest.param(TokenGrid(1, 1, 70), id="one-row"),
    pytest.param(TokenGrid(3, 5, 7, text_tokens=9), id="text-after"),
    pytest.param(TokenGrid(3, 5, 7, text_tokens=9, text_first=True), id="text-before"),
]
ROWS = [
    pytest.param([2, 2, 2], id="one-family"),
    pytest.param([6], id="broadcast"),
    pytest.param([3, 0, 3], id="model-order"),
    pytest.param([0, 1, 6], id="dense-skip-pooled"),
    pytest.param([4, 5, 2], id="three-orders"),
    pytest.param([7, 6, 1], id="dynamic-orders"),
    pytest.param([10, 10, 10], id="clusters"),
    pytest.param([10, 2, 0], id="clusters-window-dense"),
    pytest.param([11, 11, 11], id="balanced"),
    pytest.param([11, 4, 6], id="balanced-bands-pooled"),
]


def inputs(
    grid: TokenGrid, heads: int = 3, batch: int = 2, dim: int = 16, dtype=torch.float64, seed: int = 1
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, batch, grid.total_tokens, heads, dim, generator=generator).to(dtype))


def row_mask(query: Tensor, key: Tensor, grid: TokenGrid, row: list[int]) -> Tensor:
    """The pairs each head keeps, bool `[batch, heads, seq, seq]`, selected head by head."""
    masks = []
    for head in range(query.shape[2]):
        candidate = CANDIDATES[row[head % len(row)]]
        q, k = query[:, :, head : head + 1], key[:, :, head : head + 1]
        options = dict(candidate.options)
        chosen = select(candidate.family, q, k, grid, density=candidate.density, block=BLOCK, **options)
        masks.append(chosen.mask().expand(len(query), -1, -1, -1))
    return torch.cat(masks, dim=1)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Eager attention; rows without a key give zero."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output.masked_fill(~mask.any(-1, keepdim=True), 0.0).transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "key-mask"])
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_masked_sdpa_in_float64(grid: TokenGrid, row: list[int], masked: bool) -> None:
    query, key, value = inputs(grid)
    mask, key_mask = row_mask(query, key, grid, row), None
    if masked:
        key_mask = torch.rand(2, grid.total_tokens, generator=torch.Generator().manual_seed(2)) < 0.7
        mask = mask & key_mask[:, None, None]
    output, density = attend(query, key, value, grid, CANDIDATES, row, block=BLOCK, key_mask=key_mask)
    expected = sdpa(query, key, value, mask)
    assert output.shape == query.shape
    torch.testing.assert_close(output, expected, rtol=0, atol=64 * torch.finfo(torch.float64).eps)
    assert density == pytest.approx(float(row_mask(query, key, grid, row).double().mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [ROWS[1], ROWS[4], ROWS[5]])
def test_low_precision_errs_no_more_than_eager_does(row: list[int], dtype: torch.dtype) -> None:
    grid = TokenGrid(5, 7, 9)
    query, key, value = inputs(grid, dtype=dtype)
    mask = row_mask(query, key, grid, row)
    exact = sdpa(query.double(), key.double(), value.double(), mask)
    eager = (sdpa(query, key, value, mask).double() - exact).abs().max()
    output, _ = attend(query, key, value, grid, CANDIDATES, row, block=BLOCK)
    assert output.dtype == dtype
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (output.double() - exact).abs().max() <= 2 * eager + rounding


def test_one_head_one_sample() -> None:
    grid = TokenGrid(2, 3, 5)
    query, key, value = inputs(grid, heads=1, batch=1)
    for number in range(8):
        output, _ = attend(query, key, value, grid, CANDIDATES, [number], block=BLOCK)
        expected = sdpa(query, key, value, row_mask(query, key, grid, [number]))
        torch.testing.assert_close(output, expected, rtol=0, atol=64 * torch.finfo(torch.float64).eps)


def test_scale_reaches_the_scores_and_the_selection() -> None:
    grid = TokenGrid(5, 7, 9)
    query, key, value = inputs(grid, heads=1)
    candidates = (Candidate("pooled", 1.0, (("top_p", 0.5),)),)
    output, density = attend(query, key, value, grid, candidates, [0], block=BLOCK, scale=3.0)
    chosen = select("pooled", query, key, grid, density=1.0, block=BLOCK, scale=3.0, top_p=0.5)
    assert density == chosen.density
    assert density < attend(query, key, value, grid, candidates, [0], block=BLOCK)[1]
    expected = sdpa(query, key, value, chosen.mask(), scale=3.0)
    torch.testing.assert_close(output, expected, rtol=0, atol=256 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("row", [[8, 9, 0], [2, 9, 8], [9, 9, 9], [6, 8, 10]], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_head_has_its_own_remainder(grid: TokenGrid, row: list[int]) -> None:
    query, key, value = inputs(grid)
    output, _ = attend(query, key, value, grid, CANDIDATES, row, block=BLOCK)
    for head, number in enumerate(row):
        one = [x[:, :, head : head + 1] for x in (query, key, value)]
        alone, _ = attend(*one, grid, CANDIDATES, [number], block=BLOCK)
        torch.testing.assert_close(
            output[:, :, head : head + 1], alone, rtol=0, atol=64 * torch.finfo(torch.float64).eps
        )
        masked = sdpa(*one, row_mask(*one[:2], grid, [number]))
        differs = bool((alone - masked).abs().max() > 1e-3)
        # A single block that a row reads whole leaves nothing out.
        assert differs == CANDIDATES[number].remainder


@pytest.mark.parametrize("weights", [(0.4, 2.5, 1.0), (0.4, 0.4, 0.4), (0.0, 0.0, 3.0), (1, 0, 1)], ids=str)
def test_means_weigh_as_much_in_each_head_as_its_candidate_says(weights) -> None:
    """Against SDPA over the keys and all mean keys, with the weight as a bias."""
    grid, block = TokenGrid(4, 8, 8), 16  # 16 blocks, all of them full
    query, key, value = inputs(grid)
    ways = [Candidate("bands", 0.3, (("order", "frame"),), remainder=weight) for weight in weights]
    output, _ = attend(query, key, value, grid, ways, [0, 1, 2], block=block)
    chosen = select("bands", query, key, grid, density=0.3, block=block, order="frame")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    means = [x.unflatten(2, (-1, block)).mean(3) for x in (k, v)]
    left_out = ~chosen.mask()[..., ::block].expand(2, 3, -1, -1)
    bias = (block * torch.tensor(weights, dtype=torch.float64)).log()[:, None, None]
    bias = torch.where(left_out, bias, -torch.inf)
    kept = torch.where(chosen.mask().expand(2, 3, -1, -1), 0.0, -torch.inf).double()
    k, v = (torch.cat([x, m], dim=2) for x, m in zip((k, v), means, strict=True))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat([kept, bias], dim=3))
    torch.testing.assert_close(
        output, expected.transpose(1, 2), rtol=0, atol=64 * torch.finfo(torch.float64).eps
    )


@pytest.mark.parametrize(
    ("row", "precisions"),
    [
        pytest.param([2, 2, 2], ["int8", "native", "int8"], id="window"),
        pytest.param([6, 4, 8], ["fp8", "int8_fp8", "fp8"], id="orders-and-remainder"),
        pytest.param([10, 0, 6], ["native", "int8", "native"], id="clusters-and-dense"),
        pytest.param([6], ["int8_fp8"], id="broadcast"),
    ],
)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_head_has_its_own_precision(grid: TokenGrid, row: list[int], precisions: list[str]) -> None:
    query, key, value = inputs(grid, dtype=torch.float32)
    candidates = tuple(
        replace(CANDIDATES[number], precision=precision)
        for number, precision in zip(row, precisions, strict=True)
    )
    launches: dict = {}
    for _ in range(2):  # chosen anew, then from the launches kept
        output, density = attend(
            query,
            key,
            value,
            grid,
            candidates,
            range(len(row)),
            block=BLOCK,
            backend="reference",
            launches=launches,
        )
        kept = []
        for head in range(3):
            one = [x[:, :, head : head + 1] for x in (query, key, value)]
            number = head % len(row)
            alone, of_head = attend(*one, grid, candidates, [number], block=BLOCK, backend="reference")
            kept.append(of_head)
            # Sums over other shapes may move a number over the edge between two 8-bit numbers, none of them by much.
            error = (output[:, :, head : head + 1] - alone).norm() / alone.norm()
            assert error < (1e-5 if precisions[number] == "native" else 5e-3)
            native, _ = attend(*one, grid, [CANDIDATES[row[number]]], [0], block=BLOCK, backend="reference")
            differs = (output[:, :, head : head + 1] - native).norm() / native.norm()
            assert (differs > 1e-4) == (precisions[number] != "native")
        assert density == pytest.approx(sum(kept) / 3)


def test_a_precision_that_the_backend_lacks_is_replaced_and_said() -> None:
    grid = TokenGrid(3, 5, 7)
    query, key, value = inputs(grid, dtype=torch.float32)
    candidates = (Candidate("window", 0.3, precision="fp8"), Candidate("window", 0.3))
    with pytest.warns(UserWarning, match="precision 'fp8': backend 'torch' computes .* using 'native'"):
        output, _ = attend(query, key, value, grid, candidates, [0, 1, 0], block=BLOCK)
    assert torch.equal(output, attend(query, key, value, grid, candidates, [1], block=BLOCK)[0])
    with pytest.raises(ValueError, match="precision 'fp8': backend 'torch' computes in the inputs' dtype"):
        attend(query, key, value, grid, candidates, [0], block=BLOCK, backend="torch")


def test_head_layout_of_the_inputs_does_not_matter() -> None:
    grid = TokenGrid(3, 5, 7, text_tokens=9, text_first=True)
    query, key, value = inputs(grid)
    row = torch.tensor([2, 6, 4], dtype=torch.int16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    first, _ = attend(query, key, value, grid, CANDIDATES, row, block=BLOCK)
    second, _ = attend(*strided, grid, CANDIDATES, row, block=BLOCK)
    torch.testing.assert_close(first, second, rtol=0, atol=64 * torch.finfo(torch.float64).eps)


def test_launches_of_static_rows_are_kept_layer_by_layer_until_the_row_changes() -> None:
    launches: dict = {}
    for grid in (TokenGrid(3, 4, 10), TokenGrid(10, 4, 3)):
        query, key, value = inputs(grid)
        for row in ([2, 3, 4], [4, 3, 2]):
            plain, _ = attend(query, key, value, grid, CANDIDATES, row, block=BLOCK)
            for _ in range(2):
                again, density = attend(
                    query, key, value, grid, CANDIDATES, row, block=BLOCK, layer=3, launches=launches
                )
                assert torch.equal(again, plain)
                assert 0.1 < density < 0.4
            assert len(launches) == 1
    kept = dict(launches)
    attend(query, key, value, grid, CANDIDATES, [2, 2, 4], block=BLOCK, layer=4, launches=launches)
    assert len(launches) == 2
    attend(query, key, value, grid, CANDIDATES, [4, 3, 2], block=BLOCK, layer=3, launches=launches)
    assert launches[3] is kept[3]
    attend(query, key, value, grid, CANDIDATES, [6, 3, 2], block=BLOCK, layer=3, launches=launches)
    assert launches[3][1] == {}  # a row with a dynamic family keeps nothing


def test_a_layer_s_choice_is_reused_as_asked_and_kept_apart_from_other_layers() -> None:
    grid, cache = TokenGrid(5, 7, 9), {}
    query, key, value = inputs(grid)
    candidates = (Candidate("pooled", 0.3, (("reuse", 2),)), Candidate("window", 0.3))
    other = -query
    masks = {
        name: torch.cat(
            [
                select("pooled", q[:, :, :2], key[:, :, :2], grid, density=0.3, block=BLOCK).mask(),
                select("window", q, key, grid, density=0.3, block=BLOCK).mask()[:, :1].expand(2, -1, -1, -1),
            ],
            dim=1,
        )
        for name, q in (("first", query), ("other", other))
    }
    for layer, q, chosen in (
        (0, query, "first"),
        (1, other, "other"),
        (0, other, "first"),
        (0, other, "other"),
    ):
        output, _ = attend(q, key, value, grid, candidates, [0, 0, 1], block=BLOCK, layer=layer, cache=cache)
        expected = sdpa(q, key, value, masks[chosen])
        torch.testing.assert_close(output, expected, rtol=0, atol=64 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize(
    "family", ["pooled", "hashed", "balanced", "stripes", "searched", "clustered", "profiled"]
)
def test_the_first_branch_of_a_step_chooses_for_all_where_it_is_asked_to(family) -> None:
    grid = TokenGrid(5, 7, 9)
    query, key, value = inputs(grid)
    other = inputs(grid, seed=8)[0] * 2

    def outputs(branches: str, calls: list[tuple[str, int | None, Tensor]]) -> list[Tensor]:
        cache: dict = {}
        ways = (Candidate(family, 0.3, (("branches", branches),)),)
        return [
            attend(q, key, value, grid, ways, [0], block=BLOCK, layer=2, branch=b, step=s, cache=cache)[0]
            for b, s, q in calls
        ]

    calls = [("cond", 4, query), ("uncond", 4, other), ("uncond", 5, other), ("cond", 5, query)]
    shared, own = outputs("shared", calls), outputs("own", calls)
    fresh = {name: outputs("own", [("cond", 4, q)])[0] for name, q in (("query", query), ("other", other))}
    assert torch.equal(shared[0], fresh["query"])
    assert torch.equal(own[1], fresh["other"])
    assert not torch.equal(shared[1], own[1])
    # The branch that comes second in the next step is served too, whichever it is.
    if family not in KEEPS_MORE:
        assert torch.equal(shared[2], fresh["other"])
    assert not torch.equal(shared[3], own[3])
    # Where nobody knows the step, every branch chooses for itself.
    unknown = outputs("shared", [("cond", None, query), ("uncond", None, other)])
    assert torch.equal(unknown[0], fresh["query"])
    if family not in KEEPS_MORE:
        assert torch.equal(unknown[1], fresh["other"])


def test_shared_branches_go_on_with_what_the_first_one_remembers() -> None:
    """In the first step nobody knows that there is another branch; what the others left then is let go."""
    grid, cache, own = TokenGrid(5, 7, 9), {}, {}
    query, key, value = inputs(grid)
    other = inputs(grid, seed=8)[0] * 2
    ways = (Candidate("balanced", 0.3, (("branches", "shared"), ("rebuild", 3))),)
    given = {"block": BLOCK, "layer": 2}
    for branch, q in (("cond", query), ("uncond", other)):
        attend(q, key, value, grid, ways, [0], branch=branch, step=None, cache=cache, **given)
    attend(query, key, value, grid, ways, [0], branch="cond", step=None, cache=own, **given)
    # Blocks are those of the first step, which other queries would not be given.
    found, _ = attend(other, key, value, grid, ways, [0], branch="cond", step=1, cache=cache, **given)
    expected, _ = attend(other, key, value, grid, ways, [0], branch="cond", step=None, cache=own, **given)
    fresh, _ = attend(other, key, value, grid, ways, [0], branch="cond", step=1, cache={}, **given)
    assert torch.equal(found, expected)
    assert not torch.equal(found, fresh)
    assert [key[-1] for key, kept in cache.items() if kept] == [None]


@pytest.mark.parametrize("branches", ["own", "shared"])
def test_blocks_outlive_a_row_of_the_plan(monkeypatch, branches) -> None:
    """They depend on no density: only a head that had none before has them built."""
    built = []
    original = balanced.partition
    monkeypatch.setattr(
        balanced, "partition", lambda q, k, **given: built.append(q.shape[2]) or original(q, k, **given)
    )
    grid, cache, launches = TokenGrid(5, 7, 9), {}, {}
    query, key, value = inputs(grid)
    options = (("branches", branches), ("rebuild", 3))
    ways = tuple(Candidate("balanced", density, options, remainder=True) for density in (0.2, 0.3, 0.5))
    ways = (*ways, Candidate("window", 0.3))
    rows = {0: [0, 0, 1], 1: [1, 2, 0], 2: [2, 3, 2], 3: [1, 1, 3], 4: [1, 1, 0]}
    given = {"block": BLOCK, "layer": 1, "cache": cache, "launches": launches}
    found = {}
    for step, row in rows.items():
        for branch in ("cond", "uncond"):
            known = step if step else None
            q = query if branch == "cond" else -query
            found[step, branch], _ = attend(
                q, key, value, grid, ways, row, branch=branch, step=known, **given
            )
    each = 2 if branches == "own" else 1
    # In the first step each branch has blocks of its own; a head that was in no block comes in the last two.
    assert built == [3] * 2 + [2] * each + [3] * each
    kept = [name for memories in cache.values() for name in memories]
    assert {name[-1] for name in kept} == {(0, 1, 2)}
    # As if the row had been the same all along.
    alone, _ = attend(query, key, value, grid, ways, rows[1], branch="cond", step=None, block=BLOCK)
    assert torch.equal(found[1, "cond"], alone)


def test_static_lists_of_two_texts_are_both_kept() -> None:
    """Prompt and negative prompt may differ in length."""
    ways = (Candidate("window", 0.3), Candidate("bands", 0.3))
    launches: dict = {}
    made = []
    for length in (9, 16, 9, 16):
        grid = TokenGrid(3, 5, 7, text_tokens=length)
        query, key, value = inputs(grid)
        output, _ = attend(query, key, value, grid, ways, [0, 1, 0], block=BLOCK, layer=1, launches=launches)
        expected, _ = attend(query, key, value, grid, ways, [0, 1, 0], block=BLOCK)
        assert torch.equal(output, expected)
        made.append(set(map(id, launches[1][1].values())))
    assert len(made[1]) == 2
    assert made[0] < made[1] == made[2] == made[3]


def test_a_shared_choice_is_used_as_it_was_made() -> None:
    grid, cache = TokenGrid(5, 7, 9), {}
    query, key, value = inputs(grid)
    ways = (Candidate("pooled", 0.3, (("branches", "shared"),)), Candidate("window", 0.3))
    arguments = {"block": BLOCK, "layer": 0, "step": 3, "cache": cache}
    attend(query, key, value, grid, ways, [0, 1, 0], branch="cond", **arguments)
    output, density = attend(-query, key, value, grid, ways, [0, 1, 0], branch="uncond", **arguments)
    chosen = select("pooled", query[:, :, ::2], key[:, :, ::2], grid, density=0.3, block=BLOCK)
    window = select("window", query, key, grid, density=0.3, block=BLOCK)
    batch = query.shape[0]
    mask = torch.stack(
        [
            chosen.mask().expand(batch, -1, -1, -1)[:, 0],
            window.mask().expand(batch, -1, -1, -1)[:, 1],
            chosen.mask().expand(batch, -1, -1, -1)[:, 1],
        ],
        dim=1,
    )
    torch.testing.assert_close(
        output, sdpa(-query, key, value, mask), rtol=0, atol=64 * torch.finfo(torch.float64).eps
    )
    assert density == pytest.approx(mask.double().mean().item())
    # Another batch cannot be served by it.
    alone, _ = attend(query[:1], key[:1], value[:1], grid, ways, [0, 1, 0], branch="third", **arguments)
    expected = sdpa(query[:1], key[:1], value[:1], mask[:1])
    torch.testing.assert_close(alone, expected, rtol=0, atol=64 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("family", ["pooled", "balanced", "clustered", "profiled"])
def test_both_branches_of_one_batch_read_what_the_conditional_one_chose(family, samples) -> None:
    grid = TokenGrid(5, 7, 9, text_tokens=6)
    tensors = inputs(grid, batch=2 * samples)
    mask = torch.arange(grid.total_tokens) < grid.total_tokens - torch.arange(2 * samples)[:, None]
    unconditional, conditional = (
        [x[part] for x in tensors] for part in (slice(samples), slice(samples, None))
    )
    ways = (
        Candidate(family, 0.3, (("branches", "shared"),)),
        Candidate("window", 0.3),
        Candidate(family, 0.3),
    )
    row = [0, 1, 2]
    output, density = attend(
        *tensors, grid, ways, row, block=BLOCK, layer=0, cache={}, paired=True, key_mask=mask
    )
    shared = {"block": BLOCK, "layer": 0, "step": 3, "cache": {}}
    second, second_density = attend(
        *conditional, grid, ways, row, branch="cond", key_mask=mask[samples:], **shared
    )
    first, first_density = attend(
        *unconditional, grid, ways, row, branch="uncond", key_mask=mask[:samples], **shared
    )
    atol = 64 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(output, torch.cat((first, second)), rtol=0, atol=atol)
    assert density == pytest.approx((first_density + second_density) / 2)
    # What each chooses for itself does not know of the other.
    alone, _ = attend(*tensors, grid, ways, [2, 1, 2], block=BLOCK, key_mask=mask)
    paired, _ = attend(*tensors, grid, ways, [2, 1, 2], block=BLOCK, key_mask=mask, paired=True)
    assert torch.equal(alone, paired)
    assert not torch.equal(alone[:samples, :, 0], output[:samples, :, 0])


def test_launches_never_hold_a_dynamic_choice() -> None:
    grid, launches = TokenGrid(5, 7, 9), {}
    query, key, value = inputs(grid)
    for q in (query, -query):
        output, _ = attend(q, key, value, grid, CANDIDATES, [6, 2, 5], block=BLOCK, launches=launches)
        expected = sdpa(q, key, value, row_mask(q, key, grid, [6, 2, 5]))
        torch.testing.assert_close(output, expected, rtol=0, atol=64 * torch.finfo(torch.float64).eps)
    assert [kept for _, kept in launches.values()] == [{}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 1], "row: expected 1 or 3 candidate numbers, one for each head, got 2"),
        ([0, 1, 12], r"row: expected candidate numbers from 0 to 11, got \[0, 1, 12\]"),
        ([-1], r"row: expected candidate numbers from 0 to 11, got \[-1\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: list[int], message: str) -> None:
    grid = TokenGrid(3, 5, 7)
    with pytest.raises(ValueError, match=message):
        attend(*inputs(grid), grid, CANDIDATES, row, block=BLOCK)


def test_sequences_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"query: expected \[batch, 30, heads, dim\]"):
        attend(*inputs(TokenGrid(3, 5, 7)), TokenGrid(2, 3, 5), CANDIDATES, [2], block=BLOCK)


TOGETHER = {
    "pooled": {"top_p": 0.8},
    "antidiagonal": {},
    "lowbit": {},
    "channels": {},
    "searched": {},
    "balanced": {"branches": "shared", "top_p": 0.8},
}


@pytest.mark.parametrize("text", [0, 9], ids=["video", "text-last"])
@pytest.mark.parametrize("family", TOGETHER)
def test_heads_of_different_densities_choose_as_they_would_alone(family: str, text: int) -> None:
    grid = TokenGrid(3, 7, 5, text_tokens=text)
    query, key, value = inputs(grid, 3, 2, 32, torch.float32, seed=5)
    densities = (0.5, 0.2, 0.35)
    ways = [Candidate(family, d, tuple(TOGETHER[family].items()), remainder=True) for d in densities]
    cache, alone = {}, [{} for _ in ways]
    for step in (1, 2):
        found, density = attend(
            query, key, value, grid, ways, [0, 1, 2], block=16, layer=0, step=step, cache=cache
        )
        for head, way in enumerate(ways):
            q, k, v = (x[:, :, head : head + 1] for x in (query, key, value))
            expected, share = attend(
                q, k, v, grid, [way], [0], block=16, layer=0, step=step, cache=alone[head]
            )
            torch.testing.assert_close(found[:, :, head : head + 1], expected)
            density -= share / 3
        assert density == pytest.approx(0, abs=1e-6)
        query = query + 0.1 * query.roll(1, 1)


def test_blocks_grow_old_by_steps_though_some_are_left_out() -> None:
    grid, way, cache = TokenGrid(3, 7, 5), [Candidate("balanced", 0.4)], {}
    built = []
    for now in (0, 1, 2, 6, 8, 9):
        query, key, value = inputs(grid, 1, 1, 32, torch.float32, seed=now)
        attend(query, key, value, grid, way, [0], block=16, layer=0, now=now, cache=cache)
        ((memory,),) = (kept.values() for kept in cache.values())
        built.append(memory["built"])
    assert built == [0, 0, 0, 6, 6, 9]  # every third step


@pytest.mark.parametrize(
    ("family", "options"), [("pooled", {"coarse": 2}), ("searched", {"easy": 0.5}), ("clustered", {})]
)
def test_families_that_need_one_density_say_so(family: str, options: dict[str, float]) -> None:
    grid = TokenGrid(3, 7, 5)
    query, *_ = inputs(grid, 2, 1, 32, torch.float32, seed=6)
    with pytest.raises(
        ValueError, match=r"density: expected one number for all heads .* select for each on its own"
    ):
        select(family, query, query, grid, density=(0.5, 0.3), block=16, **options)
    with pytest.raises(ValueError, match=r"density: expected a number or 2, one for each head, got 3"):
        select(family, query, query, grid, density=(0.5, 0.3, 0.3), block=16, **options)
    way = [Candidate(family, d, tuple(options.items())) for d in (0.5, 0.3)]
    output, density = attend(query, query, query, grid, way, [0, 1], block=16)
    assert output.isfinite().all()
    assert 0.3 < density <= 1


def test_a_choice_of_its_own_goes_on_when_the_step_becomes_known() -> None:
    """In the first step nobody knows whether another branch will come."""
    grid = TokenGrid(3, 7, 5)
    way, cache = Candidate("balanced", 0.4, (("rebuild", 2),)), {}
    outputs = []
    for step in (None, 2, 3, 4):
        for branch in ("cond", "uncond"):
            query, key, value = inputs(
                grid, 2, 1, 32, torch.float32, seed=(step or 1) * 2 + (branch == "cond")
            )
            output, _ = attend(
                query, key, value, grid, [way], [0], block=16, layer=0, branch=branch, step=step, cache=cache
            )
            outputs.append((output, attend(query, key, value, grid, [way], [0], block=16)[0]))
    # Built in the first and third choice of each branch.
    new = [torch.equal(kept, fresh) for kept, fresh in outputs]
    assert new == [True, True, False, False, True, True, False, False]


def test_another_row_forgets_what_the_one_before_remembered() -> None:
    grid = TokenGrid(3, 7, 5)
    query, key, value = inputs(grid, 3, 1, 16, torch.float32)
    options = (("branches", "shared"), ("reuse", 4))
    ways = [Candidate("pooled", d, options) for d in (0.3, 0.5)]
    cache, launches = {}, {}

    def step(row: list[int], number: int) -> list[tuple[int, tuple[float, ...]]]:
        for layer in (0, 1):
            for branch in ("cond", "uncond"):
                attend(
                    *(query, key, value, grid, ways, row if layer else [0, 0, 1]),
                    block=16, layer=layer, branch=branch, step=number, cache=cache, launches=launches,
                )  # fmt: skip
        return sorted((owner[0], name[2]) for (_, _, owner, _), held in cache.items() for name in held)

    first = (0, (0.3, 0.3, 0.5))
    assert step([0, 1, 1], 2) == [first, (1, (0.3, 0.5, 0.5))]
    assert step([1, 1, 1], 3) == [first, (1, (0.5, 0.5, 0.5))]
    assert step([1, 1, 1], 4) == [first, (1, (0.5, 0.5, 0.5))]
