"""The scoring kernels under Triton's interpreter; test_scores.py runs this with TRITON_INTERPRET=1.

The torch backend in float64 is the expectation; test_scores.py holds it against explicit softmaxes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_accel.kernels import scores, scores_triton

EPS = torch.finfo(torch.float32).eps


def build(dtype: torch.dtype, seq_q: int, seq_k: int, dim: int, batch: int = 1, heads: int = 1, masked=False):
    """Queries, keys, and orders per head with a key mask if `masked`; batch element 0 has few keys."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, heads, n, dim, dtype=dtype).transpose(1, 2) for n in (seq_q, seq_k))
    if not masked:
        return q, k, {}
    orders = {
        name: torch.stack([torch.randperm(n) for _ in range(heads)])
        for name, n in (("query_order", seq_q), ("key_order", seq_k))
    }
    key_mask = torch.rand(batch, seq_k) < 0.5
    key_mask[0, : seq_k // 2] = False
    k = k.masked_fill(~key_mask[:, :, None, None], torch.nan)  # nobody may look at these
    return q, k, orders | {"key_mask": key_mask}


def check(got: Tensor, expected: Tensor, q: Tensor, k: Tensor, terms: int, rounded: float = 0.0) -> None:
    """Products are exact in float32 and `terms` of them are added up: by that much a logit errs, a mass by its exp.

    A logit and its maximum are rounded a few times more, as exp2 and the sums over the keys are. Before, both factors
    may have been `rounded` by half of that.
    """
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    norms = (x.nan_to_num().double().norm(dim=-1).amax() for x in (q, k))
    largest = q.shape[-1] ** -0.5 * math.prod(norms)
    error = EPS * ((terms + 8) * largest + k.shape[1]) + rounded * largest
    assert ((got - expected).abs() <= expected * math.expm1(2 * error)).all()


CASES = [
    pytest.param(torch.float16, (333, 517, 32), {"batch": 2}, (64, 64), id="B2-Q333-K517-D32-fp16"),
    pytest.param(torch.float16, (65, 127, 72), {"heads": 2, "masked": True}, (24, 40), id="D72-24x40-orders"),
    pytest.param(torch.float16, (150, 333, 96), {}, (256, 160), id="D96-256x160-fp16"),
    pytest.param(torch.float16, (70, 127, 256), {"masked": True}, (16, 128), id="D256-16x128-orders"),
    pytest.param(torch.float32, (65, 127, 80), {}, (64, 64), id="Q65-K127-D80-fp32"),
    pytest.param(torch.float32, (3, 5, 32), {"batch": 2, "masked": True}, (2, 2), id="B2-Q3-K5-2x2-fp32"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "shape", "more", "blocks"), CASES)
def test_block_mass(dtype, shape, more, blocks):
    q, k, options = build(dtype, *shape, **more)
    options = options | {"block_q": blocks[0], "block_k": blocks[1]}
    expected, expected_lse = scores.block_mass(q.double(), k.double(), backend="torch", **options)
    mass, lse = scores.block_mass(q, k, backend="triton", **options)
    check(mass, expected, q, k, shape[2])
    check(lse.exp(), expected_lse.exp(), q, k, shape[2])
    stale = expected_lse + torch.randn(expected_lse.shape)
    stale[0, 0, 0] = -torch.inf
    expected, _ = scores.block_mass(q.double(), k.double(), backend="torch", lse=stale, **options)
    mass, lse = scores.block_mass(q, k, backend="triton", lse=stale, **options)
    check(mass, expected, q, k, shape[2])
    assert lse is stale


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("dtype", "shape", "more", "block", "stride"),
    [
        pytest.param(
            torch.float16, (333, 517, 32), {"batch": 2, "masked": True}, 24, 8, id="B2-Q333-K517-fp16"
        ),
        pytest.param(torch.float16, (65, 127, 72), {"heads": 2}, 64, 16, id="Q65-K127-D72-fp16"),
        pytest.param(torch.float16, (150, 333, 128), {}, 768, 2, id="D128-768-fp16"),
        pytest.param(torch.float32, (3, 5, 64), {"masked": True}, 4, 4, id="Q3-K5-D64-fp32"),
    ],
)
def test_antidiagonal_scores(dtype, shape, more, block, stride):
    q, k, options = build(dtype, *shape, **more)
    options = options | {"block": block, "stride": stride}
    expected = scores.antidiagonal_scores(q.double(), k.double(), backend="torch", **options)
    got = scores.antidiagonal_scores(q, k, backend="triton", **options)
    check(got, expected, q, k, stride * shape[2])


SCORED = {
    "block_mass": (scores.block_mass, {"block_q": 16, "block_k": 16}),
    "pooled_scores": (scores.pooled_scores, {"block_q": 16, "block_k": 16, "parts": 2}),
    "antidiagonal_scores": (scores.antidiagonal_scores, {"block": 16, "stride": 4}),
    "lowbit_scores": (scores.lowbit_scores, {"block_q": 16, "block_k": 16, "bits": 4}),
}


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", SCORED)
def test_tensors_of_more_than_2_to_the_31_elements(far_apart, name, dim):
    function, options = SCORED[name]
    q, k, more = build(torch.float16, 40, 70, 32, batch=3, heads=3, masked=True)
    near = function(q, k, backend="triton", **options, **more)
    far = function(far_apart(q, dim), far_apart(k, dim), backend="triton", **options, **more)
    pairs = zip(far, near, strict=True) if isinstance(near, tuple) else [(far, near)]
    assert all(torch.equal(*pair) for pair in pairs)


POOLED = [
    pytest.param(torch.float16, (333, 517, 32), {"batch": 2}, (64, 64), 4, id="B2-Q333-K517-D32-fp16"),
    pytest.param(
        torch.float16, (65, 127, 72), {"heads": 2, "masked": True}, (24, 40), 1, id="D72-24x40-orders"
    ),
    pytest.param(
        torch.float32, (150, 333, 96), {"masked": True}, (256, 192), 1, id="D96-256x192-orders-fp32"
    ),
    pytest.param(torch.float32, (65, 127, 80), {"heads": 2}, (60, 20), 5, id="D80-60x20-5-parts-fp32"),
    pytest.param(
        torch.float16, (150, 270, 128), {"batch": 2, "masked": True}, (64, 128), 16, id="D128-16-parts"
    ),
    pytest.param(torch.float32, (3, 5, 32), {"batch": 2, "masked": True}, (2, 2), 2, id="B2-Q3-K5-2x2-fp32"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "shape", "more", "blocks", "parts"), POOLED)
def test_pooled_scores(dtype, shape, more, blocks, parts):
    q, k, options = build(dtype, *shape, **more)
    options = options | {"block_q": blocks[0], "block_k": blocks[1], "parts": parts}
    expected = scores.pooled_scores(q.double(), k.double(), backend="torch", **options)
    got = scores.pooled_scores(q, k, backend="triton", **options)
    # Means of equal tokens are rounded as tokens are.
    check(got, expected, q, k, shape[2] + max(blocks), torch.finfo(dtype).eps)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "shape", "more", "blocks", "parts"), POOLED)
def test_means_of_runs(dtype, shape, more, blocks, parts):
    _, k, options = build(dtype, *shape, **more)
    run, order, mask = blocks[1] // parts, options.get("key_order"), options.get("key_mask")
    order = None if order is None else order[None]
    means, bias = scores_triton.pool(k, run, order, mask, biased=True)
    valid = scores._valid(mask, order)
    tokens = scores._without(scores.ordered(k, order), valid).double()
    counts = scores._counts(valid, k.shape[1], run, k.device).expand_as(bias)
    expected = scores._block_sums(tokens, 2, run) / counts.clamp(min=1)[..., None]
    assert means.dtype == dtype
    largest = tokens.abs().max()
    assert (
        (means - expected).abs() <= torch.finfo(dtype).eps / 2 * expected.abs() + run * EPS * largest
    ).all()
    torch.testing.assert_close(bias, counts.log2(), rtol=2 * EPS, atol=0)
    alone, nothing = scores_triton.pool(k, run, order, mask, biased=False)
    assert torch.equal(alone, means)
    assert nothing is None


LOWBIT = [
    pytest.param(
        torch.float16, (150, 333, 64), {"batch": 2, "masked": True}, (64, 64), 4, id="B2-D64-orders"
    ),
    pytest.param(
        torch.float16, (65, 127, 72), {"heads": 2, "masked": True}, (24, 40), 4, id="D72-24x40-orders"
    ),
    pytest.param(torch.float32, (3, 270, 33), {"batch": 2}, (64, 256), 3, id="D33-64x256-3bits-fp32"),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "shape", "more", "blocks", "bits"), LOWBIT)
def test_lowbit_scores(dtype, shape, more, blocks, bits):
    """The numbers are those of the torch backend bit by bit; what follows errs as a product of one term does."""
    q, k, options = build(dtype, *shape, **more)
    options = options | {"block_q": blocks[0], "block_k": blocks[1], "bits": bits}
    expected = scores.lowbit_scores(q, k, backend="torch", **options)
    got = scores.lowbit_scores(q, k, backend="triton", **options)
    check(got, expected, q, k, 1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "shape", "more", "blocks", "bits"), LOWBIT)
def test_pack(dtype, shape, more, blocks, bits):
    _, k, options = build(dtype, *shape, **more)
    order, key_mask = options.get("key_order"), options.get("key_mask")
    order = None if order is None else order[None]
    mean, valid = scores._mean_key(k, key_mask), scores._valid(key_mask, order)
    tokens = scores._without(scores.ordered(k, order) - mean[:, :, None], valid)
    levels = 2 ** (bits - 1) - 1
    for group in (0, min(blocks[1], 128)):
        packed, scales = scores_triton.pack(k, group, levels, order, mean, valid)
        expected, expected_scales = scores.quantise(tokens, max(1, group), levels)
        both = torch.cat([packed << 4 >> 4, packed >> 4], dim=3)[..., : shape[2]]
        assert torch.equal(both.float(), expected)
        assert torch.equal(scales, expected_scales)
        assert packed.shape[3] == -(-shape[2] // 2)
        assert expected.abs().max() == levels
