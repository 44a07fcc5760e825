"""Block-sparse attention: every backend against SDPA with a dense mask, inside a float64 error budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_accel.kernels import BlockIndex, block_sparse_attention, resolve_backend
from dit_accel.kernels.block_sparse import gather, reference
from dit_accel.kernels.prepare import prepare

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = ("reference", "torch")
DTYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
]
SHAPES = [
    pytest.param({"dim": 32}, id="B2-Q333-K517-H2-D32"),
    pytest.param({"dim": 64, "index_batch": 2, "dead_rows": True}, id="B2-Q333-K517-H2-D64-dead"),
    pytest.param({"dim": 72, "heads": 1, "masked": True}, id="B2-Q333-K517-H1-D72-masked"),
    pytest.param({"dim": 128, "block_q": 24, "block_k": 40, "strided": True}, id="B2-Q333-K517-H2-D128-odd"),
    pytest.param({"batch": 1, "seq_q": 5, "seq_k": 3, "density": 1.0}, id="B1-Q5-K3-H2-D64"),
    pytest.param({"seq_q": 128, "seq_k": 256, "masked": True, "dead_rows": True}, id="B2-Q128-K256-H2-D64"),
    pytest.param({"dim": 32, "orders": 1, "masked": True}, id="one-order-masked"),
    pytest.param({"dim": 32, "orders": 2, "masked": True, "index_batch": 2}, id="order-per-head-masked"),
    pytest.param({"dim": 32, "orders": 4, "masked": True, "remainder": True}, id="order-per-sample"),
    pytest.param({"dim": 32, "remainder": True, "dead_rows": True}, id="remainder-dead"),
    pytest.param(
        {"dim": 32, "heads": 3, "remainder": [True, False, True], "dead_rows": True, "masked": True},
        id="remainder-of-some",
    ),
    pytest.param({"dim": 32, "remainder": 0.3, "dead_rows": True, "masked": True}, id="remainder-weighs"),
    pytest.param(
        {"dim": 32, "heads": 3, "remainder": [2.5, 0.0, 0.4], "dead_rows": True},
        id="remainder-weighs-by-head",
    ),
    pytest.param(
        {"dim": 72, "remainder": True, "masked": True, "orders": 2, "block_k": 40}, id="remainder-all"
    ),
    pytest.param({"dim": 32, "cuts": (7, 12), "index_batch": 2, "dead_rows": True}, id="varying"),
    pytest.param(
        {"dim": 32, "cuts": (3, 19), "masked": True, "orders": 2, "remainder": [True, False]},
        id="varying-all",
    ),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_masked_sdpa(problem, backend, dtype, shape):
    case = problem(dtype, **shape)
    output, lse = block_sparse_attention(*case.arguments, backend=backend, return_lse=True, **case.options)
    case.check(output)
    case.check_lse(lse)
    assert torch.equal(block_sparse_attention(*case.arguments, backend=backend, **case.options), output)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_gather_serves_any_ragged_lists(problem, data):
    heads, batch, block_q, block_k = (data.draw(st.integers(1, n)) for n in (3, 2, 20, 20))
    seq_q, seq_k = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    rows, cols = -(-seq_q // block_q), -(-seq_k // block_k)
    density, seed = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), data.draw(st.integers(0, 2**32))
    bits = torch.rand(heads, rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    case = problem(
        batch=batch,
        seq_q=seq_q,
        seq_k=seq_k,
        heads=heads,
        dim=8,
        block_q=block_q,
        block_k=block_k,
        masked=data.draw(st.booleans()),
        blocks=bits[None],
    )
    output, lse = block_sparse_attention(
        *case.arguments, backend="torch", return_lse=True, key_mask=case.key_mask
    )
    case.check(output)
    reference, reference_lse = block_sparse_attention(
        *case.arguments, backend="reference", return_lse=True, key_mask=case.key_mask
    )
    case.check(reference)
    torch.testing.assert_close(lse, reference_lse, rtol=1e-6, atol=1e-6)


def test_chunks_do_not_change_the_result(problem, monkeypatch):
    case = problem(torch.float64, index_batch=2)
    whole = block_sparse_attention(*case.arguments, backend="torch")
    monkeypatch.setattr(gather, "CHUNK_SCORES", 1)
    case.check(block_sparse_attention(*case.arguments, backend="torch"))
    torch.testing.assert_close(
        block_sparse_attention(*case.arguments, backend="torch"), whole, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_full_lists_are_dense_attention(problem, backend, dtype):
    case = problem(dtype, density=2.0)
    assert case.mask.all()
    case.check(block_sparse_attention(*case.arguments, backend=backend))
    dense = BlockIndex.dense(1, 2, 64, 64, 333, 517)
    case.check(block_sparse_attention(*case.arguments[:3], dense, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_one_give_one(problem, backend):
    case = problem(torch.bfloat16, dead_rows=True)
    case.value = torch.ones_like(case.value)
    output = block_sparse_attention(*case.arguments, backend=backend)
    alive = case.mask.any(-1).transpose(1, 2)
    assert alive.any()
    assert (output[alive] - 1).abs().max() <= torch.finfo(torch.bfloat16).eps
    assert (output[~alive] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_at_all(problem, backend):
    case = problem(density=-1.0)
    output, lse = block_sparse_attention(*case.arguments, backend=backend, return_lse=True)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_multiplies_the_scores(problem, backend):
    case = problem(torch.float64)
    scaled = block_sparse_attention(*case.arguments, scale=0.5, backend=backend)
    case.query = case.query * 0.5 * 64**0.5
    case.check(scaled)


def test_blocks_off_the_lists_are_never_read(problem):
    blocks = torch.rand(1, 2, 6, 9) < 0.5
    blocks[..., 4] = False
    case = problem(blocks=blocks)
    expected = block_sparse_attention(*case.arguments, backend="torch")
    case.key[:, 4 * 64 : 5 * 64] = torch.nan
    case.value[:, 4 * 64 : 5 * 64] = torch.nan
    assert torch.equal(block_sparse_attention(*case.arguments, backend="torch"), expected)


def test_gradients_flow_through_the_gather_backend(problem):
    case = problem(torch.float64, seq_q=20, seq_k=30, block_q=8, block_k=8, dim=4)
    inputs = [x.requires_grad_() for x in case.arguments[:3]]
    output = block_sparse_attention(*inputs, case.index, backend="torch")
    grads = torch.autograd.grad(output.square().sum(), inputs)
    expected = torch.autograd.grad(case.expected().square().sum(), inputs)
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-10)


def test_resolve_backend():
    assert resolve_backend("cpu", torch.float64) == "reference"
    assert resolve_backend("cpu", torch.bfloat16) == "torch"
    assert resolve_backend(torch.device("cpu"), torch.float32) == "torch"
    assert resolve_backend("cuda:1", torch.bfloat16) == "triton"
    assert resolve_backend("cuda", torch.float64) == "reference"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"backend": "fast"}, r"backend must be one of auto.*got 'fast'", id="backend"),
        pytest.param({"precision": "int4"}, "precision must be one of native.*got 'int4'", id="precision"),
        pytest.param(
            {"precision": "int8", "backend": "torch"},
            "precision 'int8': backend 'torch' computes in the inputs' dtype only; use another",
            id="precision-backend",
        ),
        pytest.param(
            {
                "backend": "flex",
                "index": BlockIndex(
                    **vars(BlockIndex.dense(1, 2, 64, 64, 333, 517))
                    | {"key_starts": torch.tensor([[[0, 1, 517]]], dtype=torch.int32)}
                ),
            },
            "'flex' has equal blocks only",
            id="varying",
        ),
        pytest.param({"backend": "flex", "remainder": True}, "'flex' has no remainder", id="remainder"),
        pytest.param(
            {"remainder": torch.ones(3, dtype=torch.bool)},
            r"remainder must be True, False, a number from 0, or bool or floating \[2\].* got torch.bool \(3,\)",
            id="remainder-heads",
        ),
        pytest.param(
            {"remainder": torch.ones(2, dtype=torch.int64)},
            r"remainder must be .* got torch.int64 \(2,\)",
            id="remainder-int",
        ),
        pytest.param({"remainder": -0.5}, r"remainder must be .* got -0.5", id="remainder-negative"),
        pytest.param({"remainder": "all"}, r"remainder must be .* got 'all'", id="remainder-text"),
        pytest.param({"remainder": float("inf")}, r"remainder must be .* got inf", id="remainder-infinite"),
        pytest.param(
            {"remainder": torch.ones(2, dtype=torch.bool, device="meta")},
            "remainder must be on cpu",
            id="remainder-on",
        ),
        pytest.param(
            {"query_order": torch.zeros(3, 333, dtype=torch.int64)},
            r"query_order must be int64 \[1 or 2, 333\] or \[1 or 2, 1 or 2, 333\].*got torch.int64 \(3, 333\)",
            id="order-shape",
        ),
        pytest.param(
            {"key_order": torch.zeros(1, 517)}, "key_order must be int64.*float32", id="order-dtype"
        ),
        pytest.param({"scale": 0.0}, "scale must be positive, got 0.0", id="scale"),
        pytest.param({"backend": "triton"}, "'triton' needs tensors on a GPU, got cpu", id="gpu"),
        pytest.param({"backend": "flex", "return_lse": True}, "'flex' cannot return the log-sum", id="lse"),
        pytest.param({"key_mask": torch.ones(2, 517)}, r"key_mask must be bool \(2, 517\)", id="mask-dtype"),
        pytest.param(
            {"key_mask": torch.ones(2, 3, dtype=torch.bool)},
            r"key_mask must be bool.*\(2, 3\)",
            id="mask-shape",
        ),
        pytest.param({"key_mask": torch.ones(2, 517, device="meta").bool()}, "on cpu", id="mask-on"),
    ],
)
def test_options_are_checked(problem, options, message):
    case = problem()
    index = options.get("index", case.index)
    given = {name: value for name, value in options.items() if name != "index"}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*case.arguments[:3], index, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"query": torch.ones(3, 4)}, r"query must be \[batch, seq_q, heads, dim\]", id="rank"),
        pytest.param({"query": torch.ones(2, 334, 2, 64)}, r"query is \(2, 334, 2, 64\)", id="seq"),
        pytest.param({"query": torch.ones(2, 333, 3, 64)}, "build the index for this query", id="heads"),
        pytest.param({"key": torch.ones(2, 516, 2, 64)}, r"key must be \(2, 517, 2, 64\)", id="keys"),
        pytest.param({"value": torch.ones(2, 517, 2, 64).half()}, "value must be torch.float32", id="dtype"),
        pytest.param({"index": BlockIndex.dense(3, 2, 64, 64, 333, 517)}, r"\[batch 3", id="index-batch"),
        pytest.param(
            {"index": BlockIndex.dense(1, 2, 64, 64, 333, 517, "meta")}, r"use index.to", id="index-device"
        ),
    ],
)
def test_tensors_are_checked(problem, change, message):
    case = problem()
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(
            change.get("query", case.query),
            change.get("key", case.key),
            change.get("value", case.value),
            change.get("index", case.index),
        )


@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_compiled_backends_refuse_float64(problem, backend):
    with pytest.raises(ValueError, match=f"'{backend}' has no float64; use 'reference'"):
        block_sparse_attention(*problem(torch.float64).arguments, backend=backend)


def test_integers_are_refused(problem):
    case = problem()
    q, k, v = (x.long() for x in case.arguments[:3])
    with pytest.raises(ValueError, match=r"query must be a floating point tensor, got torch.int64"):
        block_sparse_attention(q, k, v, case.index)


@pytest.mark.parametrize("spread", [0.0, 4.0], ids=["gaussian", "outlier-channels"])
@pytest.mark.parametrize(("precision", "published"), [("int8", 0.9995), ("int8_fp8", 0.999)])
def test_eight_bits_keep_the_published_cosines(problem, precision, published, spread):
    """SageAttention and SageAttention2: INT8 products of smoothed keys, E4M3 products of weights and values."""
    case = problem(torch.float32, dim=128, density=0.6, batch=1)
    shared = torch.randn(1, 1, 2, 128) * (torch.rand(1, 1, 2, 128) < 0.1)  # a mean that few channels carry
    case.key = case.key + spread * shared
    exact = case.expected().flatten()

    def cosine(output):
        return float(torch.cosine_similarity(output.double().flatten(), exact, dim=0))

    given = {"precision": precision, "scale": 128**-0.5, "block_k": 64}
    outputs = {}
    for smooth in (True, False):
        prepared = prepare(*case.arguments[:3], **given, smooth=smooth)
        outputs[smooth] = reference.attention(prepared, case.index, 128**-0.5)[0].transpose(1, 2)
    assert torch.equal(
        outputs[True],
        block_sparse_attention(*case.arguments, precision=precision, backend="reference"),
    )
    assert cosine(outputs[True]) >= published
    if spread:
        assert cosine(outputs[False]) < cosine(outputs[True])


@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "fp8"])
def test_what_may_not_be_read_does_not_coarsen_eight_bits(problem, precision, remainder):
    case = problem(torch.float32, batch=2, masked=True, remainder=remainder)
    given = case.options | {"precision": precision, "backend": "reference"}
    assert not case.key_mask.all()
    for x in (case.key, case.value):
        x[~case.key_mask] = 0
    expected = block_sparse_attention(*case.arguments, **given)
    for x in (case.key, case.value):
        x[~case.key_mask] = 1e4
    assert torch.equal(block_sparse_attention(*case.arguments, **given), expected)
