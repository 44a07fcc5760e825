"""The Triton kernel under Triton's interpreter; test_triton.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from dit_accel.attention import attend
from dit_accel.bench import gpu, gpu_checks
from dit_accel.bench.problem import Shape, tensors
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex, block_sparse_attention, prepare_triton
from dit_accel.kernels.block_sparse.schedule import heads_by_work, kept_pairs, key_tiles, programs
from dit_accel.kernels.prepare import prepare


@pytest.fixture(autouse=True)
def right_e4m3(monkeypatch):
    """The interpreter of Triton 3.9 loses the carry where a number rounds up to a power of two (7.9 becomes 4)."""
    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.float8e4nv):
            return original(data, source, target, rounding)
        numbers = torch.from_numpy(np.ascontiguousarray(data))
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


# bfloat16 is left out: tl.dot computes it wrongly in the interpreter (Triton 3.9).
CASES = [
    pytest.param(torch.float16, {"dim": 32, "index_batch": 2}, id="B2-Q333-K517-H2-D32-fp16"),
    pytest.param(torch.float16, {"dead_rows": True, "masked": True}, id="B2-Q333-K517-H2-D64-masked-fp16"),
    pytest.param(torch.float32, {"dim": 72, "heads": 1, "strided": True, "density": 0.1}, id="H1-D72-fp32"),
    pytest.param(torch.float16, {"dim": 80, "seq_q": 65, "seq_k": 127}, id="B2-Q65-K127-H2-D80-fp16"),
    pytest.param(torch.float32, {"dim": 96, "seq_q": 50, "block_q": 24, "block_k": 40}, id="D96-24x40-fp32"),
    pytest.param(torch.float16, {"dim": 112, "block_q": 128, "masked": True}, id="D112-128x64-masked-fp16"),
    pytest.param(torch.float16, {"dim": 128, "block_q": 128, "block_k": 128}, id="B2-Q333-K517-H2-D128-fp16"),
    pytest.param(torch.float16, {"dim": 256, "seq_q": 70, "block_k": 256, "heads": 1}, id="D256-64x256-fp16"),
    pytest.param(torch.float32, {"seq_q": 3, "seq_k": 5, "batch": 1, "density": 1.0}, id="B1-Q3-K5-fp32"),
    pytest.param(
        torch.float16,
        {"dim": 32, "orders": 4, "seq_q": 70, "seq_k": 90, "masked": True},
        id="orders-masked-fp16",
    ),
    pytest.param(torch.float32, {"dim": 32, "remainder": True, "dead_rows": True}, id="remainder-dead-fp32"),
    pytest.param(
        torch.float32, {"dim": 32, "remainder": [0.4, 2.5], "masked": True}, id="remainder-weighs-fp32"
    ),
    pytest.param(
        torch.float16,
        {"dim": 72, "remainder": True, "masked": True, "orders": 2, "block_k": 40, "heads": 2},
        id="remainder-orders-masked-fp16",
    ),
    pytest.param(
        torch.float32, {"dim": 32, "seq_q": 150, "cuts": (5, 12), "dead_rows": True}, id="varying-fp32"
    ),
    pytest.param(
        torch.float16,
        {"seq_q": 90, "cuts": (3, 19), "masked": True, "orders": 2, "remainder": True, "index_batch": 2},
        id="varying-all-fp16",
    ),
]
VARYING = [
    pytest.param({"dim": 32, "seq_q": 70, "seq_k": 300, "cuts": (4, 9), "index_batch": 2}, id="varying"),
    pytest.param(
        {"seq_q": 70, "seq_k": 256, "cuts": (2, 5), "masked": True, "orders": 2, "remainder": True},
        id="varying-all",
    ),
]
# Shapes of the 8-bit cases: odd lengths and dims, masks, orders, blocks that no tile divides.
EIGHT_BIT = [
    *VARYING,
    pytest.param({"seq_q": 130, "index_batch": 2}, id="B2-Q130-K517-H2-D64"),
    pytest.param({"dim": 72, "seq_q": 65, "seq_k": 127, "masked": True, "orders": 2}, id="D72-masked-orders"),
    pytest.param({"dim": 128, "block_q": 128, "block_k": 128, "batch": 1, "heads": 1}, id="D128-128x128"),
    pytest.param(
        {"dim": 32, "block_k": 40, "seq_k": 101, "dead_rows": True, "remainder": True}, id="remainder"
    ),
    pytest.param(
        {"seq_q": 70, "seq_k": 256, "masked": True, "remainder": [False, True]}, id="remainder-some"
    ),
    pytest.param({"seq_q": 70, "seq_k": 130, "dim": 32, "remainder": [0.4, 2.5]}, id="remainder-weighs"),
    # The last block's tiles begin behind the last key, up to 192 keys behind it.
    pytest.param(
        {"seq_q": 30, "seq_k": 257, "dim": 32, "block_k": 256, "heads": 1, "masked": True}, id="long-blocks"
    ),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "shape"), CASES)
def test_agrees_with_masked_sdpa(problem, dtype, shape):
    case = problem(dtype, **shape)
    output, lse = block_sparse_attention(*case.arguments, backend="triton", return_lse=True, **case.options)
    case.check(output)
    case.check_lse(lse)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_ragged_lists(problem, data):
    heads, batch = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    block_q, block_k = data.draw(st.integers(9, 40)), data.draw(st.integers(5, 40))
    seq_q, seq_k = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 130))
    density, seed = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), data.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    case = problem(
        batch=batch,
        seq_q=seq_q,
        seq_k=seq_k,
        heads=heads,
        dim=data.draw(st.sampled_from([8, 16, 24])),
        block_q=block_q,
        block_k=block_k,
        masked=data.draw(st.booleans()),
        remainder=data.draw(st.booleans()),
        blocks=torch.rand(1, heads, -(-seq_q // block_q), -(-seq_k // block_k), generator=generator)
        < density,
    )
    output, lse = block_sparse_attention(*case.arguments, backend="triton", return_lse=True, **case.options)
    case.check(output)
    case.check_lse(lse)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", EIGHT_BIT)
@pytest.mark.parametrize("precision", ["int8", "int8_fp8", "fp8"])
def test_eight_bit_agrees_with_its_definition(problem, precision, shape):
    """Weights are rounded relative to the largest logit so far, in the definition relative to the row's largest.

    So single outputs may differ by one rounding of every weight each way, half a step of E4M3 being 2**-4; against
    the exact answer the kernel may not err more than its definition does.
    """
    case = problem(torch.float16, **shape)
    case.key = case.key + 3 * torch.randn(1, 1, case.key.shape[2], case.key.shape[3], dtype=torch.float16)
    given = case.options | {"precision": precision, "return_lse": True}
    output, lse = block_sparse_attention(*case.arguments, backend="triton", **given)
    expected, expected_lse = block_sparse_attention(*case.arguments, backend="reference", **given)
    largest = case.value.abs().max().float()
    step = 2.0**-4 if precision != "int8" else torch.finfo(torch.float16).eps
    assert ((output - expected).float().abs() <= 2 * step * largest).all()
    exact = case.expected()
    error, budget = (float((x - exact).norm() / exact.norm()) for x in (output, expected))
    assert error <= 1.1 * budget + torch.finfo(torch.float16).eps
    dead = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, dead)
    assert (lse - expected_lse)[~dead].abs().max() <= (2 * step if precision != "int8" else 1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", EIGHT_BIT)
@pytest.mark.parametrize("precision", ["native", "int8", "int8_fp8", "fp8"])
def test_prepare_agrees_with_its_definition(problem, precision, shape):
    """Sums in another order move the mean key by a rounding of float32, and few numbers across a rounding edge."""
    case = problem(torch.float16, **shape)
    case.key = case.key + 3
    if case.key_mask is not None:
        # Larger than E4M3 holds on the scale of the others.
        case.key[~case.key_mask] *= 50
        case.value[~case.key_mask] *= 5000
    q, k, v, index = case.arguments
    given = case.options | {"precision": precision, "scale": 0.2, "block_k": index.block_k}
    given["key_starts"] = index.key_starts
    given["key_order"] = None if given["key_order"] is None else given["key_order"][None]
    # It is attention that brings queries into their order.
    del given["query_order"]
    got, expected = prepare_triton.prepare(q, k, v, **given), prepare(q, k, v, **given)

    def close(name, a, b):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")

    def codes(name, a, b):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        places = [x.contiguous().view(torch.int8).to(torch.int16) for x in (a, b)]
        moved = places[0] != places[1]
        assert ((places[0] - places[1]).abs() <= 1).all(), name
        assert moved.float().mean() <= 1e-3, name

    if precision == "native":
        assert torch.equal(got.query, expected.query)
        assert torch.equal(got.key, expected.key)
        # What no order moves is not copied.
        assert given["key_order"] is not None or got.key.data_ptr() == k.data_ptr()
        assert got.query_scale is got.key_scale is got.lse_shift is None
    else:
        codes("query", got.query, expected.query)
        codes("key", got.key, expected.key)
        assert got.query.stride(2) % 16 == got.key.stride(2) % 16 == 0
        for name in ("query_scale", "key_scale", "lse_shift"):
            close(name, getattr(got, name), getattr(expected, name))
    if precision in ("native", "int8"):
        assert torch.equal(got.value, expected.value)
        assert got.value_scale is expected.value_scale is None
    else:
        codes("value", got.value, expected.value)
        assert got.value.stride(2) == expected.value.stride(2) == 1
        close("value_scale", got.value_scale, expected.value_scale)
    assert (got.valid is None) == (case.key_mask is None)
    assert got.valid is None or torch.equal(got.valid, expected.valid)
    assert (got.means is None) == (case.remainder is False)
    if got.means is not None:
        alive = expected.means.bias > -torch.inf
        torch.testing.assert_close(
            got.means.bias, expected.means.bias.expand_as(got.means.bias), rtol=1e-6, atol=0
        )
        alive = alive.expand_as(got.means.bias)
        if precision == "native":
            step = torch.finfo(torch.float16).eps
            for name in ("key", "value"):
                pair = (getattr(means, name)[alive] for means in (got.means, expected.means))
                torch.testing.assert_close(
                    *pair, rtol=step, atol=0, msg=lambda text, name=name: f"{name}: {text}"
                )
        else:
            close("mean scale", got.means.key_scale[alive], expected.means.key_scale[alive])
            codes("mean key", got.means.key[alive], expected.means.key[alive])
        if precision == "int8":
            torch.testing.assert_close(got.means.value[alive], expected.means.value[alive], rtol=1e-3, atol=0)
        elif precision != "native":
            codes("mean value", got.means.value[alive], expected.means.value[alive])
            room = got.means.value.as_strided(
                (*got.means.value.shape[:2], q.shape[3], got.means.value.stride(3)),
                (*got.means.value.stride()[:2], got.means.value.stride(3), 1),
            )
            assert (room[..., index.cols :].float() == 0).all()


@pytest.mark.parametrize(("tile", "align"), [(16, 1), (32, 16), (64, 16)])
def test_tiles_cover_the_lists_once(random_starts, tile, align):
    """Full tiles are full, parts are not; together they hold the keys of the list, each once."""
    torch.manual_seed(0)
    for cols, density in ((1, 1.0), (9, 0.5), (70, 0.7), (150, 0.97)):
        starts = random_starts(1, 2, 517, cols)
        index = BlockIndex.from_mask(
            torch.rand(1, 2, 3, cols) < density, 64, 64, 100, 517, random_starts(1, 1, 100, 3), starts
        )
        tiles = key_tiles(index, tile, align)
        expected = index.to_mask().gather(3, index.key_blocks()[:, :, None].expand(1, 2, 3, -1))
        for head, row in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            seen = torch.zeros(517, dtype=torch.int64)
            at = (0, head, row)
            for first in tiles.full[at][: tiles.full_counts[at]].tolist():
                assert first % align == 0
                seen[first : first + tile] += 1
            for first, bounds in tiles.parts[at][: tiles.part_counts[at]].tolist():
                low, high = bounds % 65536, bounds // 65536
                assert first % align == 0
                assert 0 <= low < high <= tile
                assert high - low < tile
                seen[first + low : first + high] += 1
            assert torch.equal(seen, expected[at].long())
            keys = int(expected[at].sum())
            runs = int((expected[at].long().diff() == 1).sum() + expected[at][0])
            assert tiles.full_counts[at] + tiles.part_counts[at] <= -(-keys // tile) + 2 * runs


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("varying", [False, True])
def test_most_work_comes_first(random_starts, varying, shared):
    """Rows of a head, and heads: as a stable sort has them; every query has one program."""
    torch.manual_seed(0)
    batch, heads, seq_q, block_q, tile = 3, 29, 1_001, 13, 8
    rows = 71 if varying else -(-seq_q // block_q)
    lists = 1 if shared else batch
    mask = torch.rand(lists, heads, rows, 9) < torch.rand(lists, heads, rows, 1)
    starts = random_starts(1, heads, seq_q, rows) if varying else None
    index = BlockIndex.from_mask(mask, block_q, 64, seq_q, 517, starts)
    work = index.counts
    places = programs(index, work, tile)
    edges = (
        torch.arange(rows + 1).mul(block_q).clamp(max=seq_q).expand(heads, -1)
        if starts is None
        else starts[0]
    )
    for b, head in torch.cartesian_prod(torch.arange(lists), torch.arange(heads)).tolist():
        expected = []
        for row in work[b, head].argsort(descending=True, stable=True).tolist():
            first, stop = edges[head, row : row + 2].tolist()
            expected += [[row, start, stop] for start in range(first, stop, tile)]
        got = places[b, head].tolist()
        assert got[: len(expected)] == expected
        assert all(program == [0, 0, 0] for program in got[len(expected) :])
        assert varying or len(got) == len(expected)
    assert torch.equal(kept_pairs(index), index._pairs().sum(-1))
    totals = work.sum(-1).expand(batch, -1).flatten()
    assert heads_by_work(work, batch).tolist() == totals.argsort(descending=True, stable=True).tolist()


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("precision", ["native", "int8_fp8"])
def test_tensors_of_more_than_2_to_the_31_elements(problem, far_apart, precision, dim):
    """An offset of 32 bits would point elsewhere: the batch, the sequence or the heads lie far apart."""
    case = problem(torch.float16, batch=3, heads=3, seq_q=40, seq_k=70, dim=32, orders=3, remainder=True)
    given = case.options | {"precision": precision, "backend": "triton", "return_lse": True}
    near = block_sparse_attention(*case.arguments, **given)
    far = [far_apart(x, dim) for x in case.arguments[:3]]
    assert all(x.stride(dim) * (x.shape[dim] - 1) >= 2**31 for x in far)
    for got, expected in zip(block_sparse_attention(*far, case.index, **given), near, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("poisoned")
def test_no_keys_at_all(problem):
    case = problem(torch.float16, density=-1.0)
    output, lse = block_sparse_attention(*case.arguments, backend="triton", return_lse=True)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()


def test_full_lists_are_dense_attention(problem):
    case = problem(torch.float16, density=2.0, seq_q=130)
    case.index = BlockIndex.dense(1, 2, 64, 64, 130, 517)
    case.check(block_sparse_attention(*case.arguments, backend="triton"))


@pytest.mark.parametrize("precision", ["native", "int8", "int8_fp8", "fp8"])
def test_values_of_one_give_one(problem, precision):
    case = problem(torch.float16, seq_q=130)
    case.value = torch.ones_like(case.value)
    output = block_sparse_attention(*case.arguments, backend="triton", precision=precision)
    alive = case.mask.any(-1).transpose(1, 2)
    assert (output[alive] - 1).abs().max() <= torch.finfo(torch.float16).eps


def test_head_dims_over_256_are_refused(problem):
    with pytest.raises(ValueError, match="serves head dims up to 256, got 320; use 'torch'"):
        block_sparse_attention(*problem(dim=320).arguments, backend="triton")


@pytest.mark.parametrize("extra", gpu.EXTRAS)
@pytest.mark.parametrize("precision", ["native", "int8", "int8_fp8", "fp8"])
def test_suite_finds_the_kernel_right(precision, extra):
    found = gpu.check(72, precision, extra, torch.device("cpu"), 133, 217, torch.float16)
    assert found["ok"], found


@pytest.mark.parametrize("name", gpu.CHOOSING)
def test_suite_finds_the_choosing_kernels_right(name):
    found = gpu.check_choosing(name, 72, torch.device("cpu"), 133, 217, torch.float16)
    assert found["ok"], found


@pytest.mark.parametrize("name", gpu.LAYERS)
@pytest.mark.parametrize("block", gpu.LAYER_BLOCKS)
def test_suite_finds_layers_of_mixed_families_and_precisions_right(name, block):
    grid = TokenGrid(3, 7, 8, text_tokens=11)
    found = gpu.check_layer(name, 72, torch.device("cpu"), grid, torch.float16, block)
    assert found["ok"], found
    assert 0 < found["rel_l2"] < gpu_checks.ALLOWED["fp8"]


@pytest.mark.parametrize("density", gpu.WHOLE_DENSITIES)
def test_suite_times_whole_layers_that_are_right(density):
    grid = TokenGrid(3, 9, 11, text_tokens=13, text_first=True)
    q, k, v = (x.half() for x in tensors(Shape(grid.total_tokens, 2, 32), torch.device("cpu"), torch.float32))
    calls = gpu._layers(q, k, v, grid, density)
    assert len(calls) == len(gpu.WHOLE)
    for name, call in calls.items():
        _, family, block, precision = name.split(":")
        way = Candidate(family, density)
        expected, _ = attend(q, k, v, grid, (way,), [0, 0], block=int(block), layer=0, backend="reference")
        output, _ = call()  # of the third step
        error = (output.double() - expected.double()).norm() / expected.double().norm()
        assert error <= gpu_checks.ALLOWED[precision], name
    assert gpu._layers(q, k, v, None, density) == gpu._layers(q, k, v, grid, 0.5) == {}


def test_suite_writes_down_what_fails_and_goes_on(tmp_path, monkeypatch):
    """A peer that cannot run, a precision that raises, a shape out of time."""
    monkeypatch.setattr(gpu, "check", lambda *_: 1 / 0)
    monkeypatch.setattr(gpu, "CHOOSING", {})
    monkeypatch.setattr(gpu, "LAYERS", {})
    monkeypatch.setattr(gpu, "DENSITIES", (1.0, 0.3))
    calls, parts = gpu._calls, ("prepare:fp8", "attend:int8", "partition", "select")

    def with_a_broken_peer(*arguments):
        made = calls(*arguments) | {"broken": lambda: 1 / 0}
        return {name: call for name, call in made.items() if name in ("int8", "broken", *parts)}

    monkeypatch.setattr(gpu, "_calls", with_a_broken_peer)
    shapes = {"tiny": Shape(130, 1, 32)}
    report = gpu.run(tmp_path / "r.json", shapes=shapes, dims=(64,), device=torch.device("cpu"))
    assert len(report["correctness"]) == 12
    assert all(row["error"].startswith("ZeroDivisionError") for row in report["correctness"])
    assert [row["asked"] for row in report["rows"]] == [1.0, 0.3]
    assert all(row["failed"] == {"broken": "ZeroDivisionError: division by zero"} for row in report["rows"])
    assert [set(row["results"]) for row in report["rows"]] == [{"int8", *parts}, {"int8"}]
    assert all(result["p50"] > 0 for row in report["rows"] for result in row["results"].values())
    assert json.loads((tmp_path / "r.json").read_text()) == report
    monkeypatch.setattr(gpu, "check", lambda *_: {"rel_l2": float("nan"), "ok": False})
    wrong = gpu.run(tmp_path / "r.json", shapes={}, dims=(64,), device=torch.device("cpu"))
    assert [(row["rel_l2"], row["ok"]) for row in wrong["correctness"]] == [("nan", False)] * 12
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "DENSITIES", (1.0, 0.3))
    late = gpu.run(tmp_path / "r.json", shapes=shapes, dims=(), device=torch.device("cpu"), limit_seconds=-1)
    assert (late["rows"], late["left_out"]) == ([], ["tiny at density 1", "tiny at density 0.3"])

    def breaks(*_):
        raise AttributeError("no such kernel")

    for broken in ("_calls", "index_of", "tensors"):
        with monkeypatch.context() as patched:
            patched.setattr(gpu, broken, breaks)
            found = gpu.run(tmp_path / "r.json", shapes=shapes, dims=(), device=torch.device("cpu"))
        assert [row["error"] for row in found["rows"]] == ["AttributeError: no such kernel"] * 2
