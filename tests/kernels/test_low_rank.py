"""Random features for what lists leave out: against all pairs of tokens in float64, and what they estimate."""

import math

import pytest
import torch
from torch import Tensor

from dit_accel.attention import attend
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex, block_sparse_attention, low_rank
from dit_accel.kernels.low_rank import _normals, add_low_rank
from dit_accel.patterns import select

SCALE = 0.2


def feature_map(tokens: Tensor, features: int, seed: int, scale: float) -> Tensor:
    normals = _normals(tokens.shape[-1], features, seed, tokens.device).double()
    exponents = math.sqrt(scale) * tokens @ normals - scale * tokens.square().sum(-1, keepdim=True) / 2
    return exponents.exp() / math.sqrt(features)


def by_pairs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, valid: Tensor, features: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one head from a weight for each pair of tokens; mask: bool `[seq_q, seq_k]`."""
    query, key, value = (x.double() for x in (query, key, value))
    mean = key[valid].mean(0) if valid.any() else torch.zeros_like(key[0])
    exact = (SCALE * query @ key.T).exp()
    estimated = feature_map(query, features, seed, SCALE) @ feature_map(key - mean, features, seed, SCALE).T
    weights = torch.where(mask, exact, estimated * (SCALE * query @ mean).exp()[:, None]) * valid
    total = weights.sum(1)
    return torch.where(total[:, None] > 0, weights @ value / total[:, None], 0.0), total.log()


def inputs(
    seq_q: int, seq_k: int, heads: int, dim: int, dtype: torch.dtype, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seq_q + dim)
    sizes = (seq_q, seq_k, seq_k)
    query, key, value = (torch.randn(batch, seq, heads, dim, generator=generator) for seq in sizes)
    return query.to(dtype), (key + 0.5).to(dtype), value.to(dtype)


CASES = [
    pytest.param(333, 517, 2, 32, 64, 64, id="333x517-dim32"),
    pytest.param(70, 130, 1, 72, 16, 32, id="70x130-dim72-one-head"),
    pytest.param(5, 3, 3, 64, 64, 128, id="one-short-block"),
]
# Of the largest value. The log-sum-exp that weighs the parts is a float32 number of up to 8 in any case; float32
# sums have hundreds of terms; bfloat16 rounds the exact weights, their output and that of both parts.
BUDGETS = {torch.float64: 2.0**-21, torch.float32: 2.0**-15, torch.bfloat16: 3 * 2.0**-9}


@pytest.mark.parametrize("dtype", BUDGETS)
@pytest.mark.parametrize("ordered", [False, True], ids=["model-order", "own-orders"])
@pytest.mark.parametrize(("seq_q", "seq_k", "heads", "dim", "block_q", "block_k"), CASES)
def test_it_is_the_sum_over_all_pairs_of_tokens(
    seq_q: int,
    seq_k: int,
    heads: int,
    dim: int,
    block_q: int,
    block_k: int,
    ordered: bool,
    dtype: torch.dtype,
) -> None:
    query, key, value = inputs(seq_q, seq_k, heads, dim, dtype)
    rows, cols = -(-seq_q // block_q), -(-seq_k // block_k)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, heads, rows, cols, generator=generator) < 0.4
    mask[0, 0, 0], mask[1, -1, -1] = False, True  # a row without any exact weight, and one with nothing else
    index = BlockIndex.from_mask(mask, block_q, block_k, seq_q, seq_k)
    valid = torch.rand(2, seq_k, generator=generator) < 0.9
    valid[1] = seq_k != 3  # no key at all
    orders = dict.fromkeys(("query_order", "key_order"))
    if ordered:
        orders = {
            name: torch.rand(2, heads, seq, generator=generator).argsort(-1)
            for name, seq in (("query_order", seq_q), ("key_order", seq_k))
        }
    given = {"scale": SCALE, "key_mask": valid, **orders}
    exact = block_sparse_attention(query, key, value, index, return_lse=True, **given)
    output, lse = add_low_rank(*exact, query, key, value, index, features=11, seed=4, **given)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    tokens = index.token_mask()
    for b in range(2):
        for h in range(heads):
            of_head = tokens[b, h]
            if ordered:
                places = [orders[name][b, h].argsort() for name in ("query_order", "key_order")]
                of_head = of_head[places[0]][:, places[1]]
            wanted, wanted_lse = by_pairs(
                query[b, :, h], key[b, :, h], value[b, :, h], of_head, valid[b], features=11, seed=4
            )
            budget = BUDGETS[dtype] * float(value.abs().max())
            torch.testing.assert_close(output[b, :, h].double(), wanted, rtol=0, atol=budget)
            # Scores are rounded to the dtype; the log-sum-exp is float32 in any case.
            rounding = max(torch.finfo(dtype).eps, 2.0**-17)  # sums of logarithms of up to 10
            torch.testing.assert_close(lse[b, h].double(), wanted_lse, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("ordered", [False, True], ids=["shared-order", "own-orders"])
def test_heads_some_at_a_time_are_as_all_together(ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs(100, 130, 5, 16, torch.float64)
    generator = torch.Generator().manual_seed(2)
    index = BlockIndex.from_mask(torch.rand(1, 5, 7, 9, generator=generator) < 0.4, 16, 16, 100, 130)
    orders = {
        name: torch.rand(*((2, 5) if ordered else (1, 1)), seq, generator=generator).argsort(-1)
        for name, seq in (("query_order", 100), ("key_order", 130))
    }
    exact = block_sparse_attention(query, key, value, index, return_lse=True, **orders)
    together = add_low_rank(*exact, query, key, value, index, features=8, **orders)
    monkeypatch.setattr(low_rank, "CHUNK_NUMBERS", 2 * (2 * 9 * 8 * 17))  # two heads
    found = add_low_rank(*exact, query, key, value, index, features=8, **orders)
    for x, y in zip(found, together, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_a_row_that_leaves_nothing_out_stays_as_it_was() -> None:
    query, key, value = inputs(100, 90, 2, 16, torch.float32)
    index = BlockIndex.dense(2, 2, 32, 32, 100, 90)
    exact = block_sparse_attention(query, key, value, index, return_lse=True)
    output, lse = add_low_rank(*exact, query, key, value, index, features=8)
    assert torch.equal(output, exact[0])
    assert torch.equal(lse, exact[1])


def test_features_estimate_the_weights_without_bias_and_better_the_more_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = 0.3 * torch.randn(2, 1, 16, generator=generator, dtype=torch.float64)
    wanted = (SCALE * query @ key.T).exp().item()
    spreads = []
    for features in (4, 64):
        drawn = torch.stack([
            (feature_map(query, features, seed, SCALE) @ feature_map(key, features, seed, SCALE).T)[0, 0]
            for seed in range(400)
        ])  # fmt: skip
        error = drawn.std() / math.sqrt(len(drawn))
        assert abs(drawn.mean() - wanted) < 4 * error
        spreads.append(drawn.std())
    assert spreads[1] < spreads[0] / 3  # a quarter, as of independent draws


def test_directions_are_orthogonal_within_as_many_as_there_are_channels() -> None:
    normals = _normals(8, 20, 0, torch.device("cpu"))
    assert normals.shape == (8, 20)
    for first in (0, 8, 16):
        group = normals[:, first : first + 8]
        products = group.T @ group
        off = products - products.diagonal().diag()
        assert off.abs().max() < 1e-5 * products.max()


def test_far_keys_do_not_overflow() -> None:
    query, key, value = inputs(64, 64, 1, 32, torch.float32)
    query, key = 40 * query, 40 * key
    index = BlockIndex.from_mask(torch.eye(4, dtype=torch.bool)[None, None], 16, 16, 64, 64)
    exact = block_sparse_attention(query, key, value, index, return_lse=True)
    output, lse = add_low_rank(*exact, query, key, value, index, features=16)
    assert lse.isfinite().all()
    assert (output.abs() <= value.abs().max() * (1 + 1e-5)).all()  # it is a mean of values


GRID = TokenGrid(3, 5, 7, text_tokens=9)
FEATURED = Candidate("hashed", 0.3, (("features", 12), ("seed", 2)))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Candidate("pooled", 0.3, remainder=True), id="means"),
        pytest.param(
            Candidate("clustered", 0.4, (("key_clusters", 9), ("query_clusters", 4))), id="clusters"
        ),
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_heads_with_features_share_a_layer_with_any_others(other: Candidate, paired: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, GRID.total_tokens, 3, 16, generator=generator, dtype=torch.float64)
    key_mask = torch.ones(2, GRID.total_tokens, dtype=torch.bool)
    key_mask[0, -4:] = False
    mine = Candidate("hashed", 0.3, (*FEATURED.options, ("branches", "shared"))) if paired else FEATURED
    output, _ = attend(
        query, key, value, GRID, [mine, other], [0, 1, 0], block=16, key_mask=key_mask, paired=paired
    )
    q, k, v = (x[:, :, 1:2] for x in (query, key, value))
    alone, _ = attend(q, k, v, GRID, [other], [0], block=16, key_mask=key_mask)
    torch.testing.assert_close(output[:, :, 1:2], alone)
    heads = torch.tensor([0, 2])
    q, k, v = (x[:, :, heads] for x in (query, key, value))
    seen = slice(1, None) if paired else slice(None)
    selection = select("hashed", q[seen], k[seen], GRID, density=0.3, block=16, seed=2)
    mask = selection.mask().expand(2, -1, -1, -1)
    for b in range(2):
        for place, head in enumerate(heads.tolist()):
            kept = mask[b, place]
            scale = 16**-0.5
            weights = (scale * q[b, :, place] @ k[b, :, place].T).exp()
            mean = k[b, key_mask[b], place].mean(0)
            left, right = (feature_map(x, 12, 2, scale) for x in (q[b, :, place], k[b, :, place] - mean))
            estimated = left @ right.T
            weights = torch.where(kept, weights, estimated * (scale * q[b, :, place] @ mean).exp()[:, None])
            weights = weights * key_mask[b]
            wanted = weights @ v[b, :, place] / weights.sum(1, keepdim=True)
            torch.testing.assert_close(
                output[b, :, head], wanted, rtol=0, atol=BUDGETS[torch.float64] * float(v.abs().max())
            )


def test_wrong_arguments_are_refused() -> None:
    query, key, value = inputs(64, 64, 1, 16, torch.float32)
    index = BlockIndex.dense(2, 1, 16, 16, 64, 64)
    exact = block_sparse_attention(query, key, value, index, return_lse=True)
    with pytest.raises(ValueError, match="features: expected at least 1, got 0"):
        add_low_rank(*exact, query, key, value, index, features=0)
    starts = torch.tensor([[[0, 10, 64]]], dtype=torch.int32)
    varying = BlockIndex.from_mask(
        torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, 16, 64, 64, query_starts=starts, key_starts=starts
    )
    with pytest.raises(ValueError, match="index: expected blocks of equal length, got blocks that vary"):
        add_low_rank(*exact, query, key, value, varying, features=4)
    with pytest.raises(ValueError, match="option 'features' of family 'hashed': expected at least 0, got -1"):
        select("hashed", query, key, TokenGrid(4, 4, 4), density=0.5, features=-1)
    with pytest.raises(
        ValueError, match="remainder: expected false beside option 'features' of family 'hashed'"
    ):
        Candidate("hashed", 0.3, (("features", 8),), remainder=True)
