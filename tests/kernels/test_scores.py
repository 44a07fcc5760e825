"""Scores of key blocks: against explicit softmaxes and loops in float64, and the Triton kernels."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.kernels import scores
from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.scores import antidiagonal_scores, block_mass, lowbit_scores, pooled_scores
from dit_accel.kernels.select import select_blocks

HERE = Path(__file__).parent
EPS = torch.finfo(torch.float32).eps
# Every score with arguments for small blocks.
ALL = [
    pytest.param(lambda q, k, **o: block_mass(q, k, block_q=24, block_k=16, **o)[0], id="mass"),
    pytest.param(lambda q, k, **o: antidiagonal_scores(q, k, block=24, stride=8, **o), id="antidiagonal"),
    pytest.param(lambda q, k, **o: pooled_scores(q, k, block_q=24, block_k=16, parts=2, **o), id="pooled"),
    pytest.param(lambda q, k, **o: lowbit_scores(q, k, block_q=24, block_k=16, **o), id="lowbit"),
]


@dataclass
class Case:
    """Queries and keys in the model's order, and the options that belong to them."""

    query: Tensor
    key: Tensor
    options: dict[str, Tensor] = field(default_factory=dict)

    def head(self, batch: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """One head in float64 and in its order: queries and keys `[seq, dim]`, valid `[seq_k]`."""
        sides = []
        for name, x in (("query_order", self.query), ("key_order", self.key)):
            order = self.options.get(name, torch.arange(x.shape[1])[None])
            sides.append((x[batch, :, head].double(), order[head % len(order)]))
        (q, rows), (k, cols) = sides
        mask = self.options.get("key_mask", torch.ones(self.key.shape[:2]).bool())
        return q[rows], k[cols], mask[batch, cols]

    def expected(self, weights_of, block_q: int, block_k: int) -> Tensor:
        """Sum `weights_of(q, k, valid)`, token by token `[seq_q, seq_k]`, over pairs of blocks, one after the other."""
        batch, seq_q, heads, _ = self.query.shape
        rows, cols = range(0, seq_q, block_q), range(0, self.key.shape[1], block_k)
        result = torch.zeros(batch, heads, len(rows), len(cols), dtype=torch.float64)
        for b in range(batch):
            for h in range(heads):
                weights = weights_of(*self.head(b, h))
                for i, r in enumerate(rows):
                    for j, c in enumerate(cols):
                        block = weights[r : r + block_q, c : c + block_k]
                        result[b, h, i, j] = block.sum() / len(block)
        return result

    def logit_error(self, terms: int, scale: float) -> float:
        """What a logit of `terms` products may err in the inputs' dtype: float32 sums, and one rounding to bfloat16."""
        norms = [x.double().norm(dim=-1).amax() for x in (self.query, self.key)]
        u = {torch.float64: 2.0**-53, torch.bfloat16: 2.0**-9}.get(self.query.dtype, 0.0)
        sums = 2.0**-53 if self.query.dtype == torch.float64 else EPS
        return (u + sums * (terms + 8)) * scale * math.prod(norms)

    def check(self, got: Tensor, expected: Tensor, terms: int, scale: float | None = None) -> None:
        """A mass errs by the exp of what its logit and the row's log-sum-exp err, by the sum, and by one rounding."""
        assert got.dtype == torch.float32
        assert got.shape == expected.shape
        error = self.logit_error(terms, scale or self.query.shape[-1] ** -0.5)
        sums = 2.0**-53 if self.query.dtype == torch.float64 else EPS
        error = math.expm1(2 * error + (self.key.shape[1] + self.query.shape[1]) * sums)
        budget = expected * (error + EPS / 2) + torch.finfo(torch.float32).tiny
        assert ((got - expected).abs() <= budget).all(), (got - expected).abs().max()


def build(
    dtype: torch.dtype = torch.float64,
    seq_q: int = 65,
    seq_k: int = 127,
    *,
    batch: int = 2,
    heads: int = 2,
    dim: int = 40,
    orders: int = 0,
    masked: bool = False,
) -> Case:
    """`orders`: none, 1 for all heads, or one per head; batch element 0 has no key in its first half if `masked`."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, n, heads, dim, dtype=dtype) * 1.5 for n in (seq_q, seq_k))
    options = {}
    if orders:
        options["query_order"], options["key_order"] = (
            torch.stack([torch.randperm(n) for _ in range(orders)]) for n in (seq_q, seq_k)
        )
    if masked:
        options["key_mask"] = torch.rand(batch, seq_k) < 0.5
        options["key_mask"][0, : seq_k // 2] = False
    return Case(q, k, options)


def softmax(logits: Tensor, valid: Tensor) -> Tensor:
    weights = logits.masked_fill(~valid, -torch.inf).softmax(-1)
    return weights.nan_to_num(0.0)  # no key at all


def attention(scale: float):
    return lambda q, k, valid: softmax(q @ k.T * scale, valid)


SHAPES = [
    pytest.param({"seq_q": 333, "seq_k": 517}, (64, 64), id="Q333-K517-64x64"),
    pytest.param({"orders": 2, "masked": True}, (24, 40), id="Q65-K127-24x40-orders-masked"),
    pytest.param({"orders": 1, "heads": 1}, (128, 256), id="Q65-K127-H1-128x256-order"),
    pytest.param({"seq_q": 3, "seq_k": 5, "masked": True}, (2, 2), id="Q3-K5-2x2-masked"),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "blocks"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_mass_is_the_softmax_summed_over_blocks(dtype, shape, blocks):
    case = build(dtype, **shape)
    for scale in (None, 0.3):
        mass, lse = block_mass(
            case.query, case.key, block_q=blocks[0], block_k=blocks[1], scale=scale, **case.options
        )
        scale = scale or 40**-0.5
        case.check(mass, case.expected(attention(scale), *blocks), 40, scale)
        expected = torch.einsum("bqhd,bkhd->bhqk", case.query.double(), case.key.double()) * scale
        if "key_mask" in case.options:
            expected.masked_fill_(~case.options["key_mask"][:, None, None], -torch.inf)
        expected = expected.logsumexp(-1)
        assert lse.dtype == torch.float32
        assert torch.equal(lse == -torch.inf, expected == -torch.inf)
        alive = expected.isfinite()
        error = case.logit_error(40, scale) + EPS * (expected[alive].abs().max() + case.key.shape[1])
        assert ((lse - expected)[alive].abs() <= error).all()


@pytest.mark.parametrize("shape", [shape for shape, *_ in (case.values for case in SHAPES)])
def test_stale_lse_scales_each_query(shape):
    """One pass over the keys: exp(logit − lse) is summed as it comes."""
    case = build(**shape)
    batch, seq_q, heads, _ = case.query.shape
    blocks = {"block_q": 16, "block_k": 24}
    stale = torch.randn(batch, heads, seq_q) + 4
    stale[:, :, 1] = -torch.inf
    mass, lse = block_mass(case.query, case.key, lse=stale, **blocks, **case.options)
    assert lse is stale
    order = case.options.get("query_order", torch.arange(seq_q)[None]).expand(heads, -1)
    heads_seen = iter([stale[b, h, order[h], None] for b in range(batch) for h in range(heads)])

    def weights(q, k, valid):
        given = next(heads_seen).double()
        logits = (q @ k.T * 40**-0.5).masked_fill(~valid, -torch.inf)
        return torch.where(given == -torch.inf, 0.0, (logits - given).exp())

    case.check(mass, case.expected(weights, 16, 24), 40)
    assert (mass.sum(-1) - 1).abs().max() > 0.01
    # The lse that belongs to these tokens gives what two passes give, but for its rounding.
    mass, own = block_mass(case.query, case.key, **blocks, **case.options)
    again, _ = block_mass(case.query, case.key, lse=own, **blocks, **case.options)
    error = math.expm1(EPS * (own[own.isfinite()].abs().max() + 2))
    assert ((again - mass).abs() <= mass * error).all()


def test_takes_the_lse_of_attention():
    case = build(torch.float32, orders=2, masked=True)
    index = BlockIndex.dense(1, 2, 64, 64, 65, 127)
    _, lse = block_sparse_attention(case.query, case.key, case.key, index, return_lse=True, **case.options)
    mass, _ = block_mass(case.query, case.key, block_q=64, block_k=64, lse=lse, **case.options)
    case.check(mass, case.expected(attention(40**-0.5), 64, 64), 40)


def runs(seq: int, stride: int) -> list[range]:
    return [range(first, min(first + stride, seq)) for first in range(0, seq, stride)]


def antidiagonals(stride: int, scale: float):
    """The documented definition, one product after the other; each token has the weight of its run."""

    def weights(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        rows, cols = runs(len(q), stride), runs(len(k), stride)
        products = (q @ k.T).tolist()
        logits = torch.full((len(rows), len(cols)), -torch.inf, dtype=torch.float64)
        for i, row in enumerate(rows):
            for j, col in enumerate(cols):
                diagonal = [
                    products[min(row.start + stride - 1 - place, len(q) - 1)][key]
                    for place, key in enumerate(col)
                    if valid[key]
                ]
                if diagonal:
                    mean = math.fsum(diagonal) / len(diagonal)
                    logits[i, j] = scale * mean + math.log(len(diagonal) / stride)
        mass = logits.softmax(-1).nan_to_num(0.0)
        spread = torch.zeros(len(q), len(k), dtype=torch.float64)
        for i, row in enumerate(rows):
            for j, col in enumerate(cols):
                spread[row.start : row.stop, col.start] = mass[i, j]
        return spread

    return weights


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "block", "stride"),
    [
        pytest.param({"seq_q": 128, "seq_k": 64, "heads": 1}, 32, 16, id="whole-blocks"),
        pytest.param({"seq_q": 333, "seq_k": 517, "heads": 1, "batch": 1}, 64, 16, id="Q333-K517-64-16"),
        pytest.param({"orders": 2, "masked": True}, 24, 8, id="Q65-K127-24-8-orders-masked"),
        pytest.param({"orders": 1, "masked": True}, 12, 1, id="stride-1"),
        pytest.param({"seq_q": 3, "seq_k": 5}, 4, 4, id="Q3-K5-4-4"),
        pytest.param({"seq_q": 3, "seq_k": 5, "masked": True}, 64, 16, id="Q3-K5-64-16-masked"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_antidiagonal_scores_are_what_a_loop_finds(dtype, shape, block, stride):
    case = build(dtype, **shape)
    got = antidiagonal_scores(case.query, case.key, block=block, stride=stride, **case.options)
    expected = case.expected(antidiagonals(stride, 40**-0.5), block, block)
    case.check(got, expected, 40 * stride)


def test_antidiagonal_scores_of_whole_blocks_are_those_of_the_paper():
    """Its formula: strided slices next to each other, one side backwards, softmax of qk / (√d · stride)."""
    case = build(seq_q=128, seq_k=192, heads=1, batch=1)
    q, k = case.query[0, :, 0], case.key[0, :, 0]
    q_runs = torch.cat([q[15 - i :: 16] for i in range(16)], dim=1)
    k_runs = torch.cat([k[i::16] for i in range(16)], dim=1)
    weights = (q_runs @ k_runs.T / 40**0.5 / 16).softmax(-1)
    expected = weights.view(2, 4, 3, 4).mean(1).sum(-1)[None, None]
    case.check(antidiagonal_scores(case.query, case.key, block=64), expected, 40 * 16)


def means(parts: int, block_q: int, block_k: int, scale: float):
    """Runs' means and sizes by a loop; each query has the weights of its run, each key an equal share of its run's."""

    def weights(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        rows, cols = runs(len(q), block_q // parts), runs(len(k), block_k // parts)
        sizes = torch.tensor([float(valid[list(col)].sum()) for col in cols]).double()
        q_mean = torch.stack([q[list(row)].mean(0) for row in rows])
        k_mean = torch.stack([(k[list(col)] * valid[list(col), None]).sum(0) for col in cols])
        k_mean /= sizes.clamp(min=1)[:, None]
        mass = softmax(q_mean @ k_mean.T * scale + sizes.log(), sizes > 0)
        spread = torch.zeros(len(q), len(k), dtype=torch.float64)
        for i, row in enumerate(rows):
            for j, col in enumerate(cols):
                spread[row.start : row.stop, col.start : col.stop] = mass[i, j] / len(col)
        return spread

    return weights


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "blocks"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2])
def test_pooled_scores_are_the_mass_of_means(dtype, parts, shape, blocks):
    case = build(dtype, **shape)
    got = pooled_scores(
        case.query, case.key, block_q=blocks[0], block_k=blocks[1], parts=parts, **case.options
    )
    expected = case.expected(means(parts, *blocks, 40**-0.5), *blocks)
    if dtype == torch.bfloat16:  # read as such, but from there on float32
        case.query, case.key = case.query.float(), case.key.float()
    case.check(got, expected, 40 + max(blocks))


def test_pooled_scores_of_single_tokens_are_exact():
    case = build(orders=2, masked=True)
    got = pooled_scores(case.query, case.key, block_q=16, block_k=16, parts=16, **case.options)
    case.check(got, case.expected(attention(40**-0.5), 16, 16), 40)


def integers(bits: int, block_k: int, scale: float):
    """Rounding and products in whole numbers, block by block."""
    levels = 2 ** (bits - 1) - 1
    group = block_k if block_k <= 128 else 128

    def rounded(x: Tensor) -> tuple[Tensor, float]:
        step = x.abs().max().item() / levels or 1.0
        return torch.tensor([[math.floor(n / step + 0.5) for n in row] for row in x.tolist()]), step

    def weights(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        k = torch.where(valid[:, None], k - k[valid].sum(0) / max(1, int(valid.sum())), 0.0)
        keys = [rounded(k[first : first + group]) for first in range(0, len(k), group)]
        logits = torch.empty(len(q), len(k), dtype=torch.float64)
        for i, row in enumerate(q):
            numbers, step = rounded(row[None])
            logits[i] = torch.cat([(x @ numbers[0]).double() * (step * size * scale) for x, size in keys])
            assert numbers.abs().max() == levels
        return softmax(logits, valid)

    return weights


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "blocks", "bits"),
    [
        pytest.param({"seq_q": 65, "seq_k": 517, "batch": 1}, (64, 64), 4, id="Q65-K517-64x64"),
        pytest.param({"orders": 2, "masked": True}, (24, 40), 4, id="Q65-K127-24x40-orders-masked"),
        pytest.param({"seq_k": 333, "heads": 1, "orders": 1}, (16, 256), 3, id="K333-16x256-order-3bits"),
        pytest.param({"seq_q": 3, "seq_k": 5, "masked": True}, (2, 2), 2, id="Q3-K5-2x2-masked-2bits"),
    ],
)
def test_lowbit_scores_are_exact_integer_products(shape, blocks, bits):
    case = build(**shape)
    got = lowbit_scores(case.query, case.key, block_q=blocks[0], block_k=blocks[1], bits=bits, **case.options)
    case.check(got, case.expected(integers(bits, blocks[1], 40**-0.5), *blocks), 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowbit_scores_choose_well_beside_outlier_channels(dtype, monkeypatch):
    """Keys share a large offset in few channels, which would take all the range of 4 bits; smoothing takes it off.

    Of Gaussian numbers the largest is about 3σ among a query's 64 and 4σ among a block's 4096. In 7 steps a number
    then errs by σ/8 and σ/6 rms, so a logit by √(1/64 + 1/36) of its standard deviation, 4 % of its variance, and
    less where a block's tokens average it. So little may be lost of what the best choice of a quarter of the blocks
    has over any quarter.
    """
    torch.manual_seed(0)
    centres = 0.3 * torch.randn(16, 1, 64).repeat_interleave(64, 0)
    q, k = (2 * (centres + torch.randn(1024, 2, 64))[None] for _ in range(2))
    offset = torch.zeros(64)
    offset[::16] = 40.0
    q, k = q.to(dtype), (k + offset).to(dtype)
    exact, _ = block_mass(q, k, block_q=64, block_k=64)

    def held(by: Tensor) -> float:
        return float(exact.gather(-1, by.topk(4, dim=-1).indices).sum(-1).mean())

    def lost(by: Tensor) -> float:
        return (held(exact) - held(by)) / (held(exact) - 0.25)

    assert lost(lowbit_scores(q, k, block_q=64, block_k=64)) < 0.04
    # Harder than it looks: means of blocks and numbers that are not smoothed lose more.
    assert lost(pooled_scores(q, k, block_q=64, block_k=64)) > 0.08
    wide = torch.promote_types(dtype, torch.float32)
    monkeypatch.setattr(scores, "_mean_key", lambda key, key_mask: torch.zeros_like(key[:, 0], dtype=wide))
    assert lost(lowbit_scores(q, k, block_q=64, block_k=64)) > 0.08


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_sum_to_one_or_have_no_key(function, dtype):
    case = build(dtype, seq_q=333, seq_k=517, orders=2, masked=True)
    case.options["key_mask"][1] = False
    case.key[1] = torch.nan  # nobody may look at these
    rows = function(case.query, case.key, **case.options).sum(-1)
    assert (rows[1] == 0).all()
    assert (rows[0] - 1).abs().max() <= (517 + 333) * EPS


@pytest.mark.parametrize("function", ALL)
def test_strides_do_not_matter(function):
    case = build(torch.float32, orders=2, masked=True)
    strided = [
        torch.stack([x.transpose(1, 2), x.transpose(1, 2)], -1)[..., 0].transpose(1, 2)
        for x in (case.query, case.key)
    ]
    expected, got = function(case.query, case.key, **case.options), function(*strided, **case.options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", ALL)
def test_serve_selection_and_leave_no_gradient(function):
    case = build(torch.float32)
    case.query.requires_grad_()
    mass = function(case.query, case.key)
    assert not mass.requires_grad
    block_k = -(-127 // mass.shape[3] // 8) * 8
    sizes = {"block_q": 24, "block_k": block_k, "seq_q": 65, "seq_k": 127}
    assert select_blocks(mass, top_p=0.5, **sizes).density < 1


class Watch(TorchDispatchMode):
    """Keeps the largest number of elements of any result; on `device` only, if given."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device, self.largest = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, Tensor):
                assert self.device in (None, x.device.type), func
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("function", ALL)
def test_no_memory_for_all_pairs(function, monkeypatch):
    monkeypatch.setattr(scores, "STEP_LOGITS", 1)
    case = build(seq_q=1024, seq_k=1024, batch=1, heads=1, dim=8)
    with Watch() as watch:
        got = function(case.query, case.key)
    assert watch.largest <= 24 * 1024
    monkeypatch.undo()
    torch.testing.assert_close(function(case.query, case.key), got, rtol=1e-6, atol=0)


def on_meta() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    case = build(torch.float16, orders=2, masked=True)
    options = {name: x.to("meta") for name, x in case.options.items()}
    return case.query.to("meta"), case.key.to("meta"), options


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("masked", [False, True])
def test_never_waits_for_the_device(function, masked):
    """A meta tensor holds nothing to wait for: reading it, and shapes that depend on it, raise."""
    q, k, options = on_meta()
    with Watch("meta"):
        result = function(q, k, **options if masked else {})
    assert result.shape[:2] == (2, 2)


@pytest.mark.parametrize("function", [case for case in ALL if case.id != "pooled"])
@pytest.mark.parametrize("masked", [False, True])
def test_launches_never_wait_for_the_device(function, masked, monkeypatch):
    pytest.importorskip("triton")
    from dit_accel.kernels import scores_triton

    launched = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(grid)

    monkeypatch.setattr(scores_triton, "block_mass_forward", Launch())
    monkeypatch.setattr(scores_triton, "pack_tokens", Launch())
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # or the backend asks for a GPU
    q, k, options = on_meta()
    with Watch("meta"):
        result = function(q, k, backend="triton", **options if masked else {})
    assert result.shape[:2] == (2, 2)
    assert launched


Q, K = torch.zeros(2, 6, 3, 8), torch.zeros(2, 9, 3, 8)
ERRORS = [
    ({"query": Q[0]}, r"query must be \[batch, seq_q, heads, dim\] and not empty, got \(6, 3, 8\)"),
    ({"query": Q[:, :0]}, r"query must be .* not empty, got \(2, 0, 3, 8\)"),
    ({"query": Q.int()}, r"query must be float16, bfloat16, float32 or float64, got torch.int32; convert it"),
    ({"key": K[:, :0]}, r"key must be \[2, seq_k, 3, 8\] to match query and not empty, got \(2, 0, 3, 8\)"),
    ({"key": K[:, :, :2]}, r"key must be \[2, seq_k, 3, 8\] to match query .*, got \(2, 9, 2, 8\)"),
    ({"key": K.double()}, r"key must be torch.float32 on cpu like query, got torch.float64 on cpu; convert it"),
    ({"block_q": 0}, r"block_q must be an integer of at least 1, got 0"),
    ({"block_k": 2.0}, r"block_k must be an integer of at least 1, got 2\.0"),
    ({"block_k": True}, r"block_k must be an integer of at least 1, got True"),
    ({"scale": 0.0}, r"scale must be positive, got 0\.0; None is dim"),
    ({"query_order": torch.arange(9)[None]}, r"query_order must be int64 \[1 or 3, 6\] or .* got .*int64 \(1, 9\)"),
    ({"key_order": torch.arange(9)}, r"key_order must be int64 \[1 or 3, 9\] or .*, a token for each place, got"),
    ({"key_order": torch.arange(9).int()[None]}, r"key_order must be int64 .* got torch.int32 \(1, 9\)"),
    ({"key_order": torch.arange(9, device="meta")[None]}, r"key_order must be on cpu like query, got meta; move"),
    ({"key_mask": torch.ones(2, 9)}, r"key_mask must be bool \(2, 9\), True = may be attended, got .*float32"),
    ({"key_mask": torch.ones(1, 9).bool()}, r"key_mask must be bool \(2, 9\), .* got torch.bool \(1, 9\)"),
    ({"lse": torch.zeros(2, 6, 3)}, r"lse must be float32 \(2, 3, 6\), .* \(2, 6, 3\); pass what block_mass"),
    ({"lse": torch.zeros(2, 3, 6).double()}, r"lse must be float32 \(2, 3, 6\), .* got torch.float64"),
    ({"lse": torch.zeros(2, 3, 6, device="meta")}, r"lse must be on cpu like query, got meta; move it"),
    ({"backend": "cuda"}, r"backend must be one of auto, torch, triton, got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors_say_what_to_do(change, message):
    with pytest.raises(ValueError, match=message):
        block_mass(**{"query": Q, "key": K, "block_q": 2, "block_k": 2} | change)


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (antidiagonal_scores, {"block": 24}, r"block must be a multiple of stride = 16, got 24; use a stride that"),
        (antidiagonal_scores, {"block": 64, "stride": 0}, r"stride must be an integer of at least 1, got 0"),
        (pooled_scores, {"block_q": 64, "block_k": 6, "parts": 4}, r"parts must divide block_k = 6, got 4; use a"),
        (pooled_scores, {"block_q": 64, "block_k": 64, "parts": 0}, r"parts must be an integer of at least 1"),
        (lowbit_scores, {"block_q": 64, "block_k": 64, "bits": 8}, r"bits must be 2, 3 or 4, got 8; for more use"),
    ],
)  # fmt: skip
def test_errors_of_single_scores_say_what_to_do(function, change, message):
    with pytest.raises(ValueError, match=message):
        function(Q, K, **change)


def test_triton_refuses_what_it_cannot(monkeypatch):
    pytest.importorskip("triton")
    options = {"block_q": 4, "block_k": 4, "backend": "triton"}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match="needs tensors on a GPU, got cpu; use 'torch' or 'auto', or set TRITON_"
    ):
        block_mass(Q, K, **options)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        ValueError, match="backend 'triton' serves float16, .* got float64; use 'torch' or 'auto'"
    ):
        lowbit_scores(Q.double(), K.double(), **options)
    with pytest.raises(ValueError, match="serves head dims up to 256, got 264; use 'torch' or 'auto'"):
        block_mass(Q.repeat(1, 1, 1, 33), K.repeat(1, 1, 1, 33), **options)


def test_signatures_agree():
    """What all scores share is called alike, so that one caller serves them."""
    shared = {"scale", "query_order", "key_order", "key_mask"}
    for function in (block_mass, antidiagonal_scores, pooled_scores, lowbit_scores):
        assert shared <= set(inspect.signature(function).parameters)


def test_interpreted():
    """The interpreter is chosen when Triton is first imported, so it needs a process of its own."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_scores.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^40 passed", result.stdout, re.MULTILINE), result.stdout


# Head dim, blocks, inputs, runs, and the matrix instruction by architecture.
COMPILED = [
    pytest.param("sm_90", {"DIM": 128, "BLOCK_Q": 64, "BLOCK_K": 64, "ORDERED": True}, "bf16", "HGMMA", id="sm_90"),
    pytest.param(
        "sm_90", {"DIM": 72, "BLOCK_Q": 128, "BLOCK_K": 128, "GIVEN": True, "BIASED": True}, "fp16", "HGMMA",
        id="sm_90-D72-given-masked",
    ),
    pytest.param("sm_90", {"DIM": 256, "BLOCK_Q": 40, "BLOCK_K": 40}, "bf16", "HGMMA", id="sm_90-D256-40x40"),
    pytest.param("sm_90", {"DIM": 128, "BLOCK_Q": 64, "BLOCK_K": 64}, "fp32", None, id="sm_90-fp32"),
    pytest.param(
        "sm_90", {"DIM": 64, "BLOCK_Q": 8, "BLOCK_K": 8, "MEMBERS": 8, "BIASED": True}, "bf16", "HGMMA",
        id="sm_90-D64-runs",
    ),
    pytest.param(
        "sm_90", {"DIM": 128, "BLOCK_Q": 8, "BLOCK_K": 8, "MEMBERS": 16, "BIASED": True}, "bf16", "HGMMA",
        id="sm_90-runs",
    ),
    pytest.param("sm_90", {"DIM": 64, "BLOCK_Q": 64, "BLOCK_K": 64, "GROUP": 64}, "i8", "IGMMA", id="sm_90-packed"),
    pytest.param(
        "sm_90", {"DIM": 128, "BLOCK_Q": 128, "BLOCK_K": 128, "GROUP": 128, "BIASED": True}, "i8", "IGMMA",
        id="sm_90-D256-packed-masked",
    ),
    pytest.param("sm_80", {"DIM": 128, "BLOCK_Q": 64, "BLOCK_K": 64, "ORDERED": True}, "bf16", "HMMA", id="sm_80"),
    pytest.param(
        "sm_80", {"DIM": 128, "BLOCK_Q": 8, "BLOCK_K": 8, "MEMBERS": 16, "BIASED": True}, "fp16", "HMMA",
        id="sm_80-runs",
    ),
    pytest.param("sm_80", {"DIM": 64, "BLOCK_Q": 64, "BLOCK_K": 64, "GROUP": 64}, "i8", "IMMA", id="sm_80-packed"),
    pytest.param(
        "sm_90", {"DIM": 128, "BLOCK_Q": 4, "BLOCK_K": 4, "RUN": 16, "BIASED": True}, "bf16", "HGMMA",
        id="sm_90-means",
    ),
    pytest.param(
        "sm_90", {"DIM": 64, "BLOCK_Q": 1, "BLOCK_K": 1, "RUN": 64, "BIASED": True}, "bf16", "HGMMA",
        id="sm_90-means-of-blocks",
    ),
]  # fmt: skip


def compile_for(kernel, architecture: str, constants: dict, pointers: dict[str, str], options: dict):
    """Compile as the launcher would for contiguous inputs; the compiled kernel, its SASS and its resource usage."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dit_accel.kernels.ahead import _tool

    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name not in constants and (name in pointers or re.fullmatch(r"stride_[qk]?[bsh]", name)):
            attributes[(place,)] = [["tt.divisibility", 16]]
    attributes = {
        place: a for place, a in attributes.items() if signature[kernel.arg_names[place[0]]] != "fp32"
    }
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(architecture[3:]), 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return compiled, _tool("nvdisasm", "-c", file.name), _tool("cuobjdump", "-res-usage", file.name)


def assert_in_registers(usage: str) -> None:
    for name in ("STACK", "LOCAL"):
        assert re.search(rf"{name}:(\d+)", usage)[1] == "0", usage


@pytest.mark.parametrize(("architecture", "given", "dtype", "instruction"), COMPILED)
def test_compiles_without_spilling(architecture, given, dtype, instruction, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from dit_accel.kernels import scores_triton
    from dit_accel.kernels.ahead import SHARED_LIMITS

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    flags = dict.fromkeys(("BIASED", "GIVEN", "ORDERED"), False)
    constants = {"MEMBERS": 1, "GROUP": 0, **flags, **given, "stride_qd": 1, "stride_kd": 1}
    constants.setdefault("RUN", constants["MEMBERS"])
    constants["STORED"] = not (constants["GIVEN"] or constants["GROUP"] or constants["MEMBERS"] > 1)
    options = scores_triton.launch_options(
        *(constants[name] for name in ("DIM", "BLOCK_Q", "BLOCK_K", "MEMBERS")),
        {"i8": 1, "fp32": 4}.get(dtype, 2),
        SHARED_LIMITS[architecture],
    )
    build = {name: options.pop(name) for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    floats = ("mass", "lse", "q_scale", "k_scale", "bias")
    pointers = {"q": f"*{dtype}", "k": f"*{dtype}", "query_order": "*i64", "scale_log2": "fp32"}
    pointers |= dict.fromkeys(floats, "*fp32")
    compiled, code, usage = compile_for(
        scores_triton.block_mass_forward, architecture, constants | options, pointers, build
    )
    assert_in_registers(usage)
    assert compiled.metadata.shared <= SHARED_LIMITS[architecture]
    found = set(re.findall(r"\b(HGMMA|IGMMA|HMMA|IMMA)\b", code))
    assert found == (set() if instruction is None else {instruction})


@pytest.mark.parametrize("group", [0, 128])
def test_packing_compiles_without_spilling(group, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from dit_accel.kernels import scores_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options = scores_triton.pack_options(128, group)
    build = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    flags = dict.fromkeys(("ORDERED", "MASKED", "CENTRED"), group > 0)
    constants = {"DIM": 128, "LEVELS": 7.0, "SMALLEST": 1e-20, "stride_d": 1, **flags, **options}
    pointers = {
        "x": "*bf16",
        "order": "*i64",
        "mask": "*i1",
        "packed": "*i8",
        "mean": "*fp32",
        "scales": "*fp32",
    }
    _, _, usage = compile_for(scores_triton.pack_tokens, "sm_90", constants, pointers, build)
    assert_in_registers(usage)


@pytest.mark.parametrize("run", [16, 64, 192])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_pooling_compiles_without_spilling(run, architecture, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from dit_accel.kernels import scores_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options = scores_triton.pool_options(128, run)
    build = {"num_warps": options.pop("num_warps"), "enable_fp_fusion": True}
    flags = dict.fromkeys(("ORDERED", "MASKED", "BIASED"), True)
    constants = {"DIM": 128, "RUN": run, "stride_d": 1, **flags, **options}
    pointers = {"x": "*bf16", "order": "*i64", "mask": "*i1", "means": "*bf16", "bias": "*fp32"}
    _, _, usage = compile_for(scores_triton.pool_runs, architecture, constants, pointers, build)
    assert_in_registers(usage)


def test_sizes_do_not_compile_anew():
    pytest.importorskip("triton")
    from dit_accel.kernels import scores_triton

    for kernel in (scores_triton.block_mass_forward, scores_triton.pack_tokens, scores_triton.pool_runs):
        fixed = {p.name for p in kernel.params if p.do_not_specialize}
        numbers = {p.name for p in kernel.params if not p.is_constexpr}
        sizes = {"seq", "seq_q", "seq_k", "queries", "heads", "runs", "rows", "cols", "groups"}
        assert fixed >= numbers & (sizes | {"stride_order"})
