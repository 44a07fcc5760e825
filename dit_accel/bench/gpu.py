"""Correctness, then speed of the kernels on a GPU, beside the attention that others ship.

Nothing stops the suite half-way: what fails is written down as a row with its error, and the report is written anew
after every row.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from dit_accel.attention import attend
from dit_accel.bench.problem import SHAPES, Shape, block_mask, index_of, tensors
from dit_accel.bench.timing import Call, in_turns
from dit_accel.evaluation.files import write_json
from dit_accel.evaluation.timing import machine
from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex, available_precisions, block_sparse_attention, prepare_triton
from dit_accel.kernels.block_sparse import flex, triton_kernel
from dit_accel.kernels.kmeans import kmeans
from dit_accel.kernels.partition import partition
from dit_accel.kernels.prepare import PRECISIONS, ordered, prepare
from dit_accel.kernels.scores import antidiagonal_scores, block_mass, lowbit_scores, pooled_scores
from dit_accel.kernels.select import select_blocks
from dit_accel.plan import Candidate

DENSITIES = (1.0, 0.5, 0.25, 0.10, 0.05)
BLOCKS = (128, 64)
# Dense peaks of one H100 or H200 SXM by data sheet, TFLOP/s.
# "int8" multiplies half in INT8 and half in 16 bits.
PEAKS = {"native": 989.0, "int8": 1319.0, "int8_fp8": 1979.0, "fp8": 1979.0}
PEAKS["sageattention-triton"] = PEAKS["int8"]
SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Relative error of a head's output against float64 that a precision may make on Gaussian inputs (SageAttention and
# SageAttention2 report cosines of 0.9995 and 0.999, which are relative errors of 3 % and 4.5 %).
ALLOWED = {"native": 0.01, "int8": 0.032, "int8_fp8": 0.045, "fp8": 0.06}
# Logits of INT8 queries and keys are off by up to a hundredth of their size, of which there are some 10 here.
ALLOWED_LSE = {"native": 2e-3, "int8": 0.1, "int8_fp8": 0.1, "fp8": 0.1}
# What a call is checked with: nothing more, orders with a mask and a remainder, or that on blocks of varying length.
EXTRAS = ("plain", "all", "varying")


def run(
    output: Path,
    *,
    limit_seconds: float = 480.0,
    shapes: Mapping[str, Shape] = SHAPES,
    dims: Sequence[int] = (64, 128, 72),
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Run the suite and write its report.

    Timings that do not fit into `limit_seconds` any more are listed under `left_out`.

    Args:
        output: the report's file.
        shapes, dims: what to time, and the head dims to check.
        device: the current GPU if None; a CPU serves to try the suite out under Triton's interpreter.

    Raises:
        ValueError: there is no GPU.
    """
    if device is None:
        if not torch.cuda.is_available():
            raise ValueError(
                "suite 'gpu': needs a CUDA or ROCm device, found none; use --suite cpu or --compile-only"
            )
        device = torch.device("cuda", torch.cuda.current_device())
    start = time.perf_counter()
    report: dict[str, Any] = {
        "suite": "gpu",
        "machine": machine(device, torch.bfloat16),
        "correctness": [],
        "rows": [],
        "left_out": [],
    }

    def add(kind: str, row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        if "lost" in report:  # nothing runs on a device after an access to memory that is not there
            report["left_out"].append(f"{kind}: {row}")
            return
        try:
            report[kind].append(_as_json(row | measure()))
        except Exception as error:  # a kernel that fails is a result, too
            report[kind].append(row | {"error": f"{type(error).__name__}: {error}"[:500]})
            if not _answers(device):
                report["lost"] = f"{device} no longer answers after {kind}: {row}"
        write_json(output, report)

    cases = [(dim, precision, extra) for dim in dims for precision in PRECISIONS for extra in EXTRAS]
    for dim, precision, extra in tqdm(cases, desc="attention"):
        add(
            "correctness",
            {"kernel": "attention", "dim": dim, "precision": precision, "extra": extra},
            partial(check, dim, precision, extra, device),
        )
    for dim, name in tqdm([(dim, name) for dim in dims for name in CHOOSING], desc="choosing"):
        add("correctness", {"kernel": name, "dim": dim}, partial(check_choosing, name, dim, device))
    for dim, name in tqdm([(dim, name) for dim in dims for name in LAYERS], desc="layers"):
        add("correctness", {"kernel": f"layer:{name}", "dim": dim}, partial(check_layer, name, dim, device))
    longest = 0.0  # seconds per product so far: a row is not begun where it may not end in time
    for name, shape in sorted(shapes.items(), key=lambda item: item[1].flops):
        for density in tqdm(DENSITIES, desc=name):
            begun = time.perf_counter()
            if begun - start + longest * shape.flops > limit_seconds:
                report["left_out"].append(f"{name} at density {density:g}")
                continue
            sizes = {"tokens": shape.tokens, "heads": shape.heads, "dim": shape.dim}
            add("rows", {"shape": name, **sizes, "asked": density}, partial(_row, shape, density, device))
            longest = (time.perf_counter() - begun) / shape.flops
    report["seconds"] = time.perf_counter() - start
    write_json(output, report)
    return report


def check(
    dim: int,
    precision: str,
    extra: str,
    device: torch.device,
    seq_q: int = 1_333,
    seq_k: int = 2_117,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Errors of the compiled kernel against float64, on odd lengths; `ok` if they stay within ALLOWED."""
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
    with _new_memory_is_nan():
        got, lse = block_sparse_attention(
            q, k, v, index, precision=precision, backend="triton", return_lse=True, **options
        )
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
        "ok": finite and same_dead and error <= ALLOWED[precision] and lse_error <= ALLOWED_LSE[precision],
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


def _as_json(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _answers(device: torch.device) -> bool:
    """Whether a device still runs anything; also lets go of what a failed call held."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _mass(name: str, backend: str, q: Tensor, k: Tensor) -> Tensor:
    if name == "block_mass":
        return block_mass(q, k, block_q=128, block_k=64, backend=backend)[0]
    if name == "antidiagonal_scores":
        return antidiagonal_scores(q, k, block=128, backend=backend)
    return lowbit_scores(q, k, block_q=128, block_k=64, backend=backend)


def _kept(name: str, backend: str, q: Tensor, k: Tensor) -> Tensor:
    scores = pooled_scores(q, k, block_q=128, block_k=64)
    rule: dict[str, Any] = {"keep": 7} if name == "select_blocks:top-k" else {"top_p": 0.8}
    sizes: dict[str, Any] = {"block_q": 128, "block_k": 64, "seq_q": q.shape[1], "seq_k": k.shape[1]}
    return select_blocks(scores, **sizes, **rule, backend=backend).to_mask().float()


def _inertia(name: str, backend: str, q: Tensor, k: Tensor) -> Tensor:
    return kmeans(k, 20, iterations=2, backend=backend).inertia


# Kernels around attention, and how far they may be from their definition: float32 sums over 2,117 keys of weights that
# add up to 1, rounding edges of 4 bits, exact choices, and sums of squares.
CHOOSING: dict[str, tuple[Callable[[str, str, Tensor, Tensor], Tensor], float]] = {
    "block_mass": (_mass, 1e-3),
    "antidiagonal_scores": (_mass, 1e-3),
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
        Candidate("balanced", 0.3, precision="int8", remainder=True),
        Candidate("clustered", 0.4, remainder=True),
        Candidate("clustered", 0.5, precision="int8"),
        Candidate("antidiagonal", 0.3, precision="fp8"),
        Candidate("window", 0.3),
    ),
}


_LAYER_GRID = TokenGrid(9, 13, 17, text_tokens=77)


def check_layer(
    name: str,
    dim: int,
    device: torch.device,
    grid: TokenGrid = _LAYER_GRID,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Errors of a whole layer, head by head, against the reference in native precision on the same lists.

    `ok` if they stay within ALLOWED and the host waits for the device nowhere, once the layer has run before.
    """
    torch.manual_seed(0)
    candidates = LAYERS[name]
    here = PRECISIONS if device.type == "cpu" else available_precisions(device, dtype)
    candidates = tuple(c if c.precision in here else replace(c, precision="native") for c in candidates)
    size = (2, grid.total_tokens, len(candidates), dim)
    q, k, v = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    row = range(len(candidates))

    def layer(backend: str, ways: Sequence[Candidate], kept: Sequence[dict[Any, Any]]) -> Tensor:
        return attend(q, k, v, grid, ways, row, layer=0, cache=kept[0], launches=kept[1], backend=backend)[0]

    kept: Sequence[dict[Any, Any]] = {}, {}
    got = layer("triton", candidates, kept).double()
    native = [replace(c, precision="native") for c in candidates]
    expected = layer("reference", native, ({}, {})).double()
    of_heads = [x.movedim(2, 0).flatten(1).norm(dim=1) for x in (got - expected, expected)]
    errors = (of_heads[0] / of_heads[1]).tolist()
    waits = _waits(device, lambda: layer("triton", candidates, kept))
    right = all(error <= ALLOWED[c.precision] for error, c in zip(errors, candidates, strict=True))
    return {"rel_l2": max(errors), "waits": waits, "ok": right and waits is None}


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


def _sdpa(kind: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(query, key, value)


def _sage(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SageAttention with INT8 scores in Triton; its first release has that kernel alone, under another name."""
    package = import_module("sageattention")
    kernel = getattr(package, "sageattn_qk_int8_pv_fp16_triton", package.sageattn)
    return kernel(query, key, value, tensor_layout="NHD")


def _attend(prepare: Call, index: BlockIndex, scale: float, dtype: torch.dtype) -> Call:
    """The kernel alone, on operands that are prepared once."""
    prepared: Callable[[], Any] = cache(prepare)
    return lambda: triton_kernel.attention(prepared(), index, scale, None, dtype)


def _flex(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> Call:
    """Compiled flex_attention alone, on a block mask and operands that are made once."""
    scale = q.shape[-1] ** -0.5
    plain = partial(prepare, q, k, v, precision="native", scale=scale, block_k=index.block_k)
    operands = cache(lambda: flex.operands(plain(), index))
    return lambda: flex.run(operands(), index, scale)


def _calls(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, density: float) -> dict[str, Call]:
    """Ours in each precision and flex on one list, beside cuDNN; at density 1 also the other dense peers and the parts.

    A precision's time is that of the whole call; `prepare:`, `attend:` and `order` are parts of it, `score:`, `select`
    and `partition` come before.
    """
    dense = [x.transpose(1, 2) for x in (q, k, v)]
    calls: dict[str, Call] = {"sdpa-cudnn": partial(_sdpa, SDPA["sdpa-cudnn"], *dense)}
    for precision in PRECISIONS:
        calls[precision] = partial(
            block_sparse_attention, q, k, v, index, precision=precision, backend="triton"
        )
    if density < 1:
        calls["native+remainder"] = partial(
            block_sparse_attention, q, k, v, index, backend="triton", remainder=True
        )
    calls["flex"] = _flex(q, k, v, index)
    if density < 1:
        return calls
    for name in ("sdpa-flash", "sdpa-efficient"):
        calls[name] = partial(_sdpa, SDPA[name], *dense)
    if util.find_spec("sageattention") is not None:
        calls["sageattention-triton"] = partial(_sage, q, k, v)
    scale = q.shape[-1] ** -0.5
    order = torch.arange(index.seq_k, device=q.device).flip(0)[None, None]
    for precision in PRECISIONS[1:]:
        calls[f"prepare:{precision}"] = partial(
            prepare_triton.prepare,
            q,
            k,
            v,
            precision=precision,
            scale=scale,
            block_k=index.block_k,
            key_order=order,
        )
        plain = partial(
            prepare_triton.prepare, q, k, v, precision=precision, scale=scale, block_k=index.block_k
        )
        calls[f"attend:{precision}"] = _attend(plain, index, scale, q.dtype)
    calls["order"] = partial(ordered, k, order)
    blocks: dict[str, Any] = {"block_q": index.block_q, "block_k": index.block_k}
    calls["score:pooled"] = partial(pooled_scores, q, k, **blocks)
    calls["score:antidiagonal"] = partial(antidiagonal_scores, q, k, block=index.block_q)
    calls["score:4-bit"] = partial(lowbit_scores, q, k, **blocks)
    calls["partition"] = partial(partition, q, k, block=index.block_k)
    calls["score:exact"] = partial(block_mass, q, k, **blocks)
    scores = torch.rand(1, index.heads, index.rows, index.cols, device=q.device)
    calls["select"] = partial(
        select_blocks, scores, block_q=index.block_q, block_k=index.block_k, seq_q=index.seq_q, seq_k=index.seq_k,
        keep=max(1, index.cols // 4),
    )  # fmt: skip
    return calls


def _row(shape: Shape, density: float, device: torch.device) -> dict[str, Any]:
    q, k, v = tensors(shape, device, torch.bfloat16)
    index = index_of(shape, *BLOCKS, density, device)
    calls = _calls(q, k, v, index, density)
    errors = {}
    working = {}
    for name, call in calls.items():
        try:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            working[name] = call
        except Exception as error:  # a peer that cannot run this shape is left out and named
            errors[name] = f"{type(error).__name__}: {error}"[:300]
    times = in_turns(working, device, rounds=9, seconds=0.7)
    got = index.density
    base = times.get("sdpa-cudnn")
    results: dict[str, dict[str, Any]] = {}
    for name, taken in times.items():
        if name in ("order", "select", "partition") or name.startswith(("prepare:", "attend:", "score:")):
            results[name] = {**taken, "share_of_cudnn": taken["p50"] / base["p50"] if base else None}
            continue
        kept = got if name in (*PRECISIONS, "native+remainder", "flex") else 1.0
        rate = kept * shape.flops / (taken["p50"] * 1e9)
        results[name] = {
            **taken,
            "tflops": rate,
            "share_of_peak": rate / PEAKS.get(name, PEAKS["native"]),
            "speedup_over_cudnn": base["p50"] / taken["p50"] if base else None,
        }
    return {"density": got, "results": results, "failed": errors}
