"""Selection of blocks by score: against a loop over rows, without host synchronisation, and its Triton kernel."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.kernels import BlockIndex
from dit_accel.kernels.select import select_blocks

HERE = Path(__file__).parent
INF = math.inf


def choose(scores: Tensor, **rule) -> BlockIndex:
    rows, cols = scores.shape[-2:]
    sizes = {"block_q": 64, "block_k": 32, "seq_q": rows * 64 - 5, "seq_k": cols * 32 - 31}
    return select_blocks(scores, **sizes | rule)


def lists(index: BlockIndex) -> list[list[int]]:
    """The lists, row by row."""
    pairs = zip(index.offsets.flatten().tolist(), index.counts.flatten().tolist(), strict=True)
    return [index.indices[start : start + count].tolist() for start, count in pairs]


def loop(
    scores: Tensor,
    keep: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_keep: int = 1,
    max_keep: int | None = None,
    forced: Tensor | None = None,
) -> list[list[int]]:
    """The documented rules, one row after the other, in exact arithmetic."""
    if max_keep is None:
        max_keep = max(keep, min_keep, 1) if isinstance(keep, int) else scores.shape[-1]
    masks = torch.zeros(()).bool() if forced is None else forced
    masks = masks.expand(scores.shape).flatten(0, 2).tolist()
    budgets = torch.as_tensor(top_p if keep is None else keep, dtype=torch.float64)
    budgets = budgets.expand(scores.shape[:3]).flatten().tolist()
    result = []
    for row, mask, budget in zip(scores.double().flatten(0, 2).tolist(), masks, budgets, strict=True):
        row = [-INF if math.isnan(x) else x for x in row]
        if top_p is not None:
            row = [max(x, 0.0) if x > -INF else x for x in row]
        able = [i for i, x in enumerate(row) if mask[i] or x > -INF]
        ranking = sorted(able, key=lambda i: (not mask[i], -row[i], i))
        needed = int(budget)
        if top_p is not None:
            masses = [Fraction(max(x, 0.0)) for x in row]
            needed, held = 0, Fraction(0)
            while held < Fraction(budget) * sum(masses):
                held += masses[ranking[needed]]
                needed += 1
        needed = max(needed, min_keep, sum(mask))
        result.append(sorted(ranking[: min(needed, len(able), max_keep)]))
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, dict]:
    """Few distinct scores, so many ties; budgets are eighths, so that the float product is exact."""
    batch, heads, rows = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)))
    cols = draw(st.integers(1, 13))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    levels = torch.tensor(
        draw(st.sampled_from([[1.0], [0.0, -0.0, 0.5, 2.0], [-2.0, -1.5, 0.25, 0.75, 3.0]]))
    )
    shape = (batch, heads, rows, cols)
    scores = levels[torch.randint(len(levels), shape, generator=seed)]
    for dead in (-INF, math.nan):
        share = draw(st.sampled_from([0.0, 0.0, 0.2, 0.9]))
        scores.masked_fill_(torch.rand(shape, generator=seed) < share, dead)
    rule: dict = {"min_keep": draw(st.integers(0, 3))}
    budget_shape = draw(st.sampled_from([(), (rows,), (heads, 1), (1, heads, rows), shape[:3]]))
    kind = draw(st.sampled_from(["keep", "keeps", "top_p", "top_ps"]))
    if kind == "keep":
        rule["keep"] = draw(st.integers(0, 15))
    elif kind == "keeps":
        rule["keep"] = torch.randint(-2, 16, budget_shape, generator=seed)
    elif kind == "top_p":
        rule["top_p"] = draw(st.integers(1, 8)) / 8
    else:
        rule["top_p"] = torch.randint(0, 9, budget_shape, generator=seed) / 8
    if draw(st.booleans()):
        rule["max_keep"] = draw(st.integers(max(1, rule["min_keep"]), 15))
    mask_shape = draw(st.sampled_from([None, shape, (cols,), (1, heads, 1, cols)]))
    if mask_shape is not None:
        share = draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
        rule["forced"] = torch.rand(mask_shape, generator=seed) < share
    return scores, rule


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases())
def test_equals_the_loop(case):
    scores, rule = case
    index = choose(scores, backend="torch", **rule)
    assert lists(index) == loop(scores, **rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 7, 1), (2, 1, 7, 13), (1, 3, 1, 77), (2, 2, 9, 130)])
@pytest.mark.parametrize("rule", [{"keep": 5}, {"top_p": 0.5}], ids=["keep", "top-p"])
def test_equals_the_loop_at_odd_sizes(shape, rule, dtype):
    torch.manual_seed(0)
    scores = torch.randn(shape).to(dtype)
    if "top_p" in rule:
        scores = (scores.abs() + 0.001).to(dtype)
    assert lists(choose(scores, **rule)) == loop(scores, **rule)


def test_top_k_properties():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 7, 40)
    forced = torch.rand(2, 3, 7, 40) < 0.1
    index = choose(scores, keep=17, forced=forced)
    assert (index.counts == 17).all()
    assert index.indices.dtype == index.counts.dtype == torch.int32
    assert index.indices.numel() == 2 * 3 * 7 * 17
    blocks = index.indices.view(2, 3, 7, 17)
    assert (blocks.diff(dim=-1) > 0).all()
    mask = index.to_mask()
    assert (mask | ~forced).all()
    lowest = scores.masked_fill(~mask | forced, INF).amin(-1)
    assert (lowest > scores.masked_fill(mask, -INF).amax(-1)).all()


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.99, 1.0])
def test_top_p_holds_the_share_with_the_fewest_blocks(top_p):
    torch.manual_seed(0)
    scores = (torch.randn(2, 3, 7, 300) * 2).softmax(-1)
    index = choose(scores, top_p=top_p)
    mask = index.to_mask()
    total = scores.double().sum(-1)
    held = (scores.double() * mask).sum(-1)
    last = scores.double().masked_fill(~mask, INF).amin(-1)
    assert (held >= top_p * total * (1 - 1e-9)).all()
    assert (held - last < top_p * total).all()
    assert (index.counts == 300).all() == (top_p == 1.0)


def test_long_sums_are_exact():
    """In float32, adding up 20 000 times 0.1 is off by whole blocks."""
    assert choose(torch.full((1, 1, 1, 20000), 0.1), top_p=0.75).counts.item() == 15000


def test_masses_far_below_the_largest_count_as_nothing():
    assert lists(choose(torch.tensor([[[[2.0**-38, 1.0, 2.0**-41, 0.0]]]]), top_p=1.0)) == [[0, 1]]
    assert lists(choose(torch.tensor([[[[1e-45, 3e-45, 0.0]]]]), top_p=1.0)) == [[0, 1]]


def test_infinite_scores():
    scores = torch.tensor([[[[1.0, INF, 3e38, -INF, INF]]]])
    assert lists(choose(scores, keep=2)) == [[1, 4]]
    assert lists(choose(scores, keep=9)) == [[0, 1, 2, 4]]
    assert lists(choose(scores, top_p=0.3)) == [[1]]  # of 2 + 0.88 largest floats
    assert lists(choose(scores, top_p=1.0)) == [[1, 2, 4]]


def test_rows_without_mass_keep_the_minimum():
    scores = torch.tensor([[[[0.0, -1.0, 0.0], [-INF, -INF, -1.0], [math.nan, -INF, -INF]]]])
    assert lists(choose(scores, top_p=0.5)) == [[0], [2], []]
    assert lists(choose(scores, top_p=0.5, min_keep=2)) == [[0, 1], [2], []]
    assert lists(choose(scores, top_p=0.5, min_keep=0)) == [[], [], []]


def test_negative_scores_rank_for_top_k():
    scores = torch.tensor([[[[-3.0, -1.0, -2.0, -0.0, 0.0, -1e-45]]]])
    assert [lists(choose(scores, keep=k))[0] for k in range(1, 6)] == [
        [3],
        [3, 4],
        [3, 4, 5],
        [1, 3, 4, 5],
        [1, 2, 3, 4, 5],
    ]


def test_budgets_per_head_and_row():
    torch.manual_seed(0)
    scores = torch.rand(2, 3, 4, 9)
    per_head = torch.tensor([[2], [0], [9]])
    index = choose(scores, keep=per_head, min_keep=0)
    assert torch.equal(index.counts, per_head.int().expand(2, 3, 4))
    per_row = torch.randint(1, 10, (2, 3, 4), dtype=torch.int32)
    assert torch.equal(choose(scores, keep=per_row).counts, per_row)
    shares = torch.tensor([0.1, 0.5, 0.9])[:, None]
    for head, share in enumerate(shares.flatten().double().tolist()):
        expected = choose(scores[:, head : head + 1], top_p=share)
        assert torch.equal(choose(scores, top_p=shares).counts[:, head], expected.counts[:, 0])


def test_shares_out_of_range_in_a_tensor():
    scores = torch.rand(1, 1, 4, 5) + 0.5
    shares = torch.tensor([-1.0, 0.0, 2.0, math.nan])
    assert choose(scores, top_p=shares, min_keep=0).counts.flatten().tolist() == [0, 0, 5, 5]


def test_forced_blocks():
    scores = torch.tensor([[[[0.1, -INF, 0.4, math.nan, 0.3, 0.2]]]])
    forced = torch.tensor([True, True, False, True, True, False])
    assert lists(choose(scores, keep=2, forced=forced)) == [[0, 4]]
    assert lists(choose(scores, keep=2, max_keep=3, forced=forced)) == [[0, 1, 4]]
    assert lists(choose(scores, keep=2, max_keep=6, forced=forced)) == [[0, 1, 3, 4]]
    assert lists(choose(scores, keep=5, forced=forced)) == [[0, 1, 2, 3, 4]]
    # 0.4 of the mass of 1 is forced.
    assert lists(choose(scores, top_p=0.3, forced=forced)) == [[0, 1, 3, 4]]
    assert lists(choose(scores, top_p=0.7, forced=forced)) == [[0, 1, 2, 3, 4]]
    assert lists(choose(scores, top_p=0.9, forced=forced)) == [[0, 1, 2, 3, 4, 5]]


def test_room_of_the_lists():
    scores = torch.rand(2, 3, 4, 9)
    rooms = {3: {"keep": 3}, 5: {"keep": 3, "min_keep": 5}, 9: {"keep": 50}, 6: {"top_p": 0.2, "max_keep": 6}}
    for room, rule in rooms.items():
        index = choose(scores, **rule)
        assert index.indices.numel() == 24 * room
        assert torch.equal(index.offsets, torch.arange(0, 24 * room, room).view(2, 3, 4))
        behind = torch.arange(room) >= index.counts[..., None]
        assert (index.indices.view(2, 3, 4, room)[behind] == 0).all()
    assert choose(scores, top_p=0.2).indices.numel() == choose(scores, keep=torch.tensor(1)).indices.numel()
    assert choose(scores, top_p=0.2).indices.numel() == scores.numel()


def test_the_index_reads_as_one_made_from_a_mask():
    torch.manual_seed(0)
    index = choose(torch.rand(1, 2, 5, 9), top_p=0.6, max_keep=4)
    packed = BlockIndex.from_mask(index.to_mask(), 64, 32, index.seq_q, index.seq_k)
    assert lists(index) == lists(packed)
    assert index.density == packed.density
    assert (index.counts < 4).any()  # or there were no gaps to read over


def test_strided_and_repeated_inputs():
    torch.manual_seed(0)
    scores, forced = torch.rand(2, 9, 3, 5).permute(0, 2, 3, 1), torch.rand(1, 5, 1, 9) < 0.3
    forced = forced.transpose(1, 2)
    plain = {"keep": 4, "max_keep": 9, "forced": forced.expand(scores.shape).contiguous()}
    expected = choose(scores.contiguous(), **plain)
    assert lists(choose(scores, keep=4, max_keep=9, forced=forced)) == lists(expected)


def test_scores_stay_as_they_are():
    scores = torch.tensor([[[[1.0, math.nan, -1.0, -0.0]]]], requires_grad=True)
    choose(scores, top_p=0.5)
    assert repr(scores.tolist()) == "[[[[1.0, nan, -1.0, -0.0]]]]"


@pytest.mark.parametrize("top_p", [None, 0.5])
def test_serves_pooled_attention(top_p):
    """The own block first, then by mass, as the family pooled chooses by masks."""
    torch.manual_seed(0)
    mass = (torch.randn(2, 2, 9, 9) * 3).softmax(-1)
    best, blocks = (mass + 2 * torch.eye(9)).topk(4, dim=-1)
    best[..., 0] -= 2
    kept = torch.ones_like(best, dtype=torch.bool)
    if top_p:
        kept = best.cumsum(-1) - best < top_p
        kept[..., 0] = True
    expected = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, blocks, kept)
    rule = {"keep": 4} if top_p is None else {"top_p": top_p}
    index = choose(mass, **rule, max_keep=4, forced=torch.eye(9).bool())
    assert torch.equal(index.to_mask(), expected)


class OneDevice(TorchDispatchMode):
    """Fails where a tensor of another device takes part."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        leaves = tree_leaves((args, kwargs, result))
        assert {x.device.type for x in leaves if isinstance(x, Tensor)} <= {"meta"}, func
        return result


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param({"keep": 4}, id="keep"),
        pytest.param({"keep": torch.empty(3, 1, dtype=torch.int64, device="meta")}, id="keeps"),
        pytest.param({"top_p": 0.5}, id="top-p"),
        pytest.param({"top_p": torch.empty(2, 3, 5, device="meta"), "max_keep": 7}, id="top-ps"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_never_waits_for_the_device(rule, masked):
    """A meta tensor holds nothing to wait for: reading it, and shapes that depend on it, raise."""
    scores = torch.empty(2, 3, 5, 9, device="meta")
    forced = torch.empty(5, 9, dtype=torch.bool, device="meta") if masked else None
    with OneDevice():
        index = choose(scores, forced=forced, **rule)
    assert index.counts.device.type == index.offsets.device.type == index.indices.device.type == "meta"


@pytest.mark.parametrize(
    "wait",
    [
        pytest.param(lambda x: bool((x > 0).any()), id="bool"),
        pytest.param(lambda x: x.sum().item(), id="item"),
        pytest.param(lambda x: x[x > 0], id="mask"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: x.repeat_interleave(x.int()), id="repeats"),
        pytest.param(lambda x: x.cpu(), id="cpu"),
        pytest.param(lambda x: torch.tensor([1.0, 2.0]).to(x.device), id="upload"),
    ],
)
def test_waiting_for_the_device_would_show(wait):
    with OneDevice(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        wait(torch.empty(4, device="meta"))


SCORES = torch.zeros(2, 3, 4, 5)
ERRORS = [
    ({"keep": None}, r"exactly one of keep and top_p must be given, got neither"),
    ({"top_p": 0.5}, r"exactly one of keep and top_p must be given, got both; pass the other as None"),
    ({"keep": -1}, r"keep must be an integer of at least 0, got -1"),
    ({"keep": 2.5}, r"keep must be an integer of at least 0, got 2\.5"),
    ({"keep": True}, r"keep must be an integer of at least 0, got True"),
    ({"keep": torch.zeros(4)}, r"keep must be a number or a tensor of torch.int32 or torch.int64, got .*float32"),
    ({"keep": torch.ones(3).int()}, r"keep must broadcast to \[batch or 1, heads, rows\] = \(2, 3, 4\), got \(3,\)"),
    ({"keep": torch.ones(1, 2, 3, 4).int()}, r"keep must broadcast to .*got \(1, 2, 3, 4\)"),
    ({"keep": torch.ones(4, device="meta").int()}, r"keep must be on cpu like scores, got meta; move it"),
    ({"keep": None, "top_p": 0.0}, r"top_p must be a number over 0 and up to 1, got 0\.0"),
    ({"keep": None, "top_p": 1.5}, r"top_p must be a number over 0 and up to 1, got 1\.5"),
    ({"keep": None, "top_p": math.nan}, r"top_p must be a number over 0 and up to 1, got nan"),
    ({"keep": None, "top_p": True}, r"top_p must be a number over 0 and up to 1, got True"),
    ({"keep": None, "top_p": torch.ones(4).half()}, r"top_p must be a number or .* got torch.float16; convert it"),
    ({"keep": None, "top_p": torch.ones(5)}, r"top_p must broadcast to .*got \(5,\); the last axes must match"),
    ({"min_keep": -1}, r"min_keep must be an integer of at least 0, got -1"),
    ({"max_keep": 0}, r"max_keep must be an integer of at least 1, got 0"),
    ({"min_keep": 3, "max_keep": 2}, r"min_keep must be at most max_keep = 2, got 3; lower it"),
    ({"forced": torch.zeros(4, 5)}, r"forced must be bool, got torch.float32; compare with a threshold first"),
    ({"forced": torch.ones(4, 4).bool()}, r"forced must broadcast to .* = \(2, 3, 4, 5\), got \(4, 4\)"),
    ({"forced": torch.ones(5, device="meta").bool()}, r"forced must be on cpu like scores, got meta"),
    ({"block_q": 0}, r"block_q must be an integer of at least 1, got 0"),
    ({"seq_k": 12.0}, r"seq_k must be an integer of at least 1, got 12\.0"),
    ({"scores": SCORES.double()}, r"scores must be float16, bfloat16 or float32, got torch.float64; convert them"),
    ({"scores": SCORES[0]}, r"scores must be \[batch or 1, heads, 4, 5\] .*, got \(3, 4, 5\)"),
    ({"scores": SCORES[:, :0]}, r"scores must be \[batch or 1, heads, 4, 5\] .*, got \(2, 0, 4, 5\)"),
    ({"seq_k": 200}, r"heads, 4, 7\] for 251 x 200 tokens in 64 x 32 blocks, got \(2, 3, 4, 5\); score blocks"),
    ({"backend": "cuda"}, r"backend must be one of auto, torch, triton, got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors_say_what_to_do(change, message):
    with pytest.raises(ValueError, match=message):
        choose(**{"scores": SCORES, "keep": 2} | change)


def test_triton_refuses_the_cpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match="needs tensors on a GPU, got cpu; use 'torch' or 'auto', or set TRITON_"
    ):
        choose(SCORES, keep=2, backend="triton")
    assert lists(choose(SCORES, keep=2, backend="auto")) == [[0, 1]] * 24


def test_interpreted():
    """The interpreter is chosen when Triton is first imported, so it needs a process of its own."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_select.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^16 passed", result.stdout, re.MULTILINE), result.stdout


@pytest.mark.parametrize("top_p", [False, True])
@pytest.mark.parametrize("cols", [256, 2048, 8192])
def test_compiles_for_hopper(cols, top_p, tmp_path, monkeypatch):
    """Rows stay in registers: nothing on the stack, nothing spilled."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dit_accel.kernels.select import launch_options, select_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options = launch_options(cols - 3)
    constants = {"TOP_P": top_p, "FORCED": True, "PADDED": options.pop("PADDED")}
    assert constants["PADDED"] == cols
    types = {"scores": "*fp32", "forced": "*i1", "budget": "*fp64" if top_p else "*i32"}
    types |= {"counts": "*i32", "indices": "*i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in select_rows.arg_names}
    aligned = [[["tt.divisibility", 16]]] * len(signature)
    attributes = {
        (i,): a for i, (t, a) in enumerate(zip(signature.values(), aligned, strict=True)) if t[0] == "*"
    }
    source = ASTSource(select_rows, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [binary, "-res-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:(\d+)", usage).group(1) == "0", usage
    assert re.search(r"LOCAL:(\d+)", usage).group(1) == "0", usage


def test_sizes_do_not_compile_anew():
    pytest.importorskip("triton")
    from dit_accel.kernels.select import launch_options, select_rows

    pointers = {"scores", "forced", "budget", "counts", "indices"}
    numbers = {p.name for p in select_rows.params if not p.is_constexpr} - pointers
    assert {"rows", "cols", "min_keep", "max_keep"} < numbers
    assert {p.name for p in select_rows.params if p.do_not_specialize} == numbers
    assert launch_options(1025) == launch_options(2047) == launch_options(2048)
