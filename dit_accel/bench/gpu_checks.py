"""Whether the kernels compute on a GPU what they should: against float64, their definitions, and the reference."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.attention import attend
from dit_accel.bench.problem import block_mask
from dit_accel.bench.timing import Call
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.guard import Guard
from dit_accel.kernels import BlockIndex, available_precisions, block_sparse_attention
from dit_accel.kernels.kmeans import kmeans
from dit_accel.kernels.prepare import PRECISIONS
from dit_accel.kernels.scores import antidiagonal_scores, block_mass, lowbit_scores, pooled_scores
from dit_accel.kernels.select import select_blocks

# Relative error of a head's output against float64 that a precision may make on Gaussian inputs (SageAttention and
# SageAttention2 report cosines of 0.9995 and 0.999, which are relative errors of 3 % and 4.5 %).
ALLOWED = {"native": 0.01, "int8": 0.032, "int8_fp8": 0.045, "fp8": 0.06}
# Logits of INT8 queries and keys are off by up to a hundredth of their size, of which there are some 10 here. In native
# precision only mean keys are rounded: to bfloat16, by which their logits are off by .0033 on average, by four times
# that at most.
ALLOWED_LSE = {"native": 0.013, "int8": 0.1, "int8_fp8": 0.1, "fp8": 0.1}
# What a call is checked with: nothing more, orders with a mask and a remainder, or that on blocks of varying length.
EXTRAS = ("plain", "all", "varying")
_REPEATS = 4


def check(
    dim: int,
    precision: str,
    extra: str,
    device: torch.device,
    seq_q: int = 1_333,
    seq_k: int = 2_117,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Errors of the compiled kernel against float64, on odd lengths.

    `ok` if they stay within ALLOWED and, on a GPU, every further run gives the same numbers: nothing in the kernel adds
    up in an order of its own, so what differs was read too early or too late.
    """
    torch.manual_seed(0)
    batch, heads = 2, 3
    q, k, v = (torch.randn(batch, n, heads, dim, device=device).to(dtype) for n in (seq_q, seq_k, seq_k))
    k = k + 2 * torch.randn(1, 1, heads, dim, device=device).to(dtype)
    mask = block_mask(heads, -(-seq_q // 128), -(-seq_k // 64), 0.3, device)
    mask[:, 0, 1] = False
    starts: list[Tensor | None] = [None, None]
    if extra == "varying":
        for place, (seq, blocks) in enumerate(((seq_q, mask.shape[2]), (seq_k, mask.shape[3]))):
            cuts = torch.randint(seq + 1, (1, heads, blocks - 1), device=device).sort(-1).values
            starts[place] = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=seq).to(torch.int32)
    index = BlockIndex.from_mask(mask, 128, 64, seq_q, seq_k, *starts)
    options: dict[str, Any] = {}
    if extra != "plain":
        options["query_order"] = torch.stack([torch.randperm(seq_q, device=device) for _ in range(heads)])
        options["key_order"] = torch.stack([torch.randperm(seq_k, device=device) for _ in range(heads)])
        options["key_mask"] = torch.rand(batch, seq_k, device=device) < 0.8
        options["remainder"] = True

    def run() -> tuple[Tensor, Tensor]:
        return block_sparse_attention(
            q, k, v, index, precision=precision, backend="triton", return_lse=True, **options
        )

    with _new_memory_is_nan():
        got, lse = run()
    again = [run() for _ in range(_REPEATS if device.type == "cuda" else 0)]
    same = all(torch.equal(output, got) and torch.equal(sums, lse) for output, sums in again)
    expected, expected_lse = block_sparse_attention(
        q.double(), k.double(), v.double(), index, backend="reference", return_lse=True, **options
    )
    error = float((got - expected).norm() / expected.norm())
    alive = expected_lse > -torch.inf
    lse_error = float((lse - expected_lse)[alive].abs().max())
    same_dead = bool(torch.equal(alive, lse > -torch.inf))
    finite = bool(got.isfinite().all())
    return {
        "rel_l2": error,
        "lse_error": lse_error,
        "same_each_time": same,
        "ok": finite
        and same
        and same_dead
        and error <= ALLOWED[precision]
        and lse_error <= ALLOWED_LSE[precision],
    }


@contextmanager
def _new_memory_is_nan() -> Iterator[None]:
    """An output that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _mass(name: str, backend: str, q: Tensor, k: Tensor) -> Tensor:
    if name == "block_mass":
        return block_mass(q, k, block_q=128, block_k=64, backend=backend)[0]
    if name == "antidiagonal_scores":
        return antidiagonal_scores(q, k, block=128, backend=backend)
    if name == "pooled_scores":
        return pooled_scores(q, k, block_q=128, block_k=64, parts=4, backend=backend)
    return lowbit_scores(q, k, block_q=128, block_k=64, backend=backend)


def _kept(name: str, backend: str, q: Tensor, k: Tensor) -> Tensor:
    scores = pooled_scores(q, k, block_q=128, block_k=64, backend="torch")
    rule: dict[str, Any] = {"keep": 7} if name == "select_blocks:top-k" else {"top_p": 0.8}
    sizes: dict[str, Any] = {"block_q": 128, "block_k": 64, "seq_q": q.shape[1], "seq_k": k.shape[1]}
    return select_blocks(scores, **sizes, **rule, backend=backend).to_mask().float()


def _inertia(name: str, backend: str, q: Tensor, k: Tensor) -> Tensor:
    return kmeans(k, 20, iterations=2, backend=backend).inertia


# Kernels around attention, and how far they may be from their definition: float32 sums over 2,117 keys of weights that
# add up to 1, means rounded to 16 bits, rounding edges of 4 bits, exact choices, and sums of squares.
CHOOSING: dict[str, tuple[Callable[[str, str, Tensor, Tensor], Tensor], float]] = {
    "block_mass": (_mass, 1e-3),
    "antidiagonal_scores": (_mass, 1e-3),
    "pooled_scores": (_mass, 1e-2),
    "lowbit_scores": (_mass, 2e-2),
    "select_blocks:top-k": (_kept, 0.0),
    "select_blocks:top-p": (_kept, 0.0),
    "kmeans": (_inertia, 1e-2),
}


def check_choosing(
    name: str,
    dim: int,
    device: torch.device,
    seq_q: int = 1_333,
    seq_k: int = 2_117,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Error of a compiled kernel relative to its definition in torch, on odd lengths."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, n, 3, dim, device=device).to(dtype) for n in (seq_q, seq_k))
    result, allowed = CHOOSING[name]
    got, expected = (result(name, backend, q, k) for backend in ("triton", "torch"))
    error = float((got - expected).norm() / expected.norm())
    return {"rel_l2": error, "ok": bool(got.isfinite().all()) and error <= allowed}


# Layers whose heads differ in family and precision. Densities differ too, so that every head is chosen for by itself.
LAYERS: dict[str, tuple[Candidate, ...]] = {
    "static": (
        Candidate("dense", 1.0),
        Candidate("window", 0.3, precision="int8"),
        Candidate("window", 0.4, remainder=True),
        Candidate("bands", 0.3, (("order", "space"),), "int8_fp8", remainder=True),
        Candidate("skip", 0.0, remainder=True),
        Candidate("dense", 1.0, precision="fp8"),
    ),
    "dynamic": (
        Candidate("pooled", 0.3, remainder=True),
        Candidate("pooled", 0.4, precision="int8"),
        Candidate("hashed", 0.3, precision="int8_fp8", remainder=True),
        Candidate("balanced", 0.3, (("rebuild", 1),), "int8", remainder=True),
        Candidate("clustered", 0.4, remainder=True),
        Candidate("clustered", 0.5, precision="int8"),
        Candidate("antidiagonal", 0.3, precision="fp8"),
        Candidate("window", 0.3),
    ),
    "others": (
        Candidate("stripes", 0.3, (("slashes", 1),)),
        Candidate("profiled", 0.3),
        Candidate("searched", 0.3, remainder=True),
        Candidate("channels", 0.4),
        Candidate("lowbit", 0.35, precision="int8"),
        Candidate("pooled", 0.5, (("top_p", 0.9),)),
        Candidate("pooled", 0.3, (("coarse", 3),), "int8"),
        Candidate("pooled", 0.3, (("budget", "map"),), remainder=True),
        Candidate("pooled", 0.45, (("segment", 64),)),
        Candidate("pooled", 0.35, (("guard", 0.1),), "int8_fp8"),
        Candidate("attention_tile", 0.3),
        Candidate("radial", 0.3),
        Candidate("sharded", 0.3),
    ),
}


_LAYER_GRID = TokenGrid(9, 13, 17, text_tokens=77)


def check_layer(
    name: str,
    dim: int,
    device: torch.device,
    grid: TokenGrid = _LAYER_GRID,
    dtype: torch.dtype = torch.bfloat16,
    block: int = 64,
) -> dict[str, Any]:
    """Errors of a whole layer, head by head, against the reference in native precision on the same lists.

    Then of the layer as the guard leaves it that finds every other head wrong. `ok` if all stay within ALLOWED and the
    host waits for the device nowhere, once the layer has run before.
    """
    torch.manual_seed(0)
    candidates = LAYERS[name]
    here = PRECISIONS if device.type == "cpu" else available_precisions(device, dtype)
    candidates = tuple(c if c.precision in here else replace(c, precision="native") for c in candidates)
    size = (2, grid.total_tokens, len(candidates), dim)
    q, k, v = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    row = range(len(candidates))

    def layer(backend: str, ways: Sequence[Candidate], kept: Sequence[dict[Any, Any]]) -> Tensor:
        return attend(
            q, k, v, grid, ways, row, block=block, layer=0, cache=kept[0], launches=kept[1], backend=backend
        )[0]

    kept: Sequence[dict[Any, Any]] = {}, {}

    def repaired(output: Tensor) -> Tensor:
        given: dict[str, Any] = {"block": block, "scale": None, "key_mask": None, "backend": "triton"}
        return Guard.repaired(wrong, output, q, k, v, **given)

    def errors(output: Tensor, exact: Tensor) -> list[float]:
        of_heads = [x.double().movedim(2, 0).flatten(1).norm(dim=1) for x in (output.double() - exact, exact)]
        return (of_heads[0] / of_heads[1]).tolist()

    got = layer("triton", candidates, kept)
    native = [replace(c, precision="native") for c in candidates]
    expected = layer("reference", native, ({}, {}))
    wrong = torch.arange(len(candidates), device=device) % 2 == 0
    heads_first = [x.float().transpose(1, 2) for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2]).transpose(1, 2)
    found = errors(got, expected), errors(repaired(got)[:, :, ::2], dense[:, :, ::2])
    waits = _waits(device, lambda: repaired(layer("triton", candidates, kept)))
    right = all(error <= ALLOWED[c.precision] for error, c in zip(found[0], candidates, strict=True))
    right = right and all(error <= ALLOWED["native"] for error in found[1])
    right = right and torch.equal(repaired(got)[:, :, 1::2], got[:, :, 1::2])
    return {"rel_l2": max(*found[0], *found[1]), "waits": waits, "ok": right and waits is None}


def _waits(device: torch.device, call: Call) -> str | None:
    """Where the host waits for the device during a call, None if nowhere."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {error}"[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
