"""Correctness, then speed of the kernels on a GPU, beside the attention that others ship.

What has to be compiled is compiled first, in several processes at once; Triton and Inductor keep it on disk. Nothing
stops the suite half-way: everything runs in a process of its own, what fails there, dies or hangs is written down as a
row with its error, and the report is written anew after every row.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from importlib import import_module, util
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from dit_accel.attention import attend
from dit_accel.bench.gpu_checks import CHOOSING, EXTRAS, LAYERS, check, check_choosing, check_layer
from dit_accel.bench.problem import SHAPES, Shape, index_of, tensors
from dit_accel.bench.timing import Call, in_turns
from dit_accel.bench.workers import TaskError, Worker, compile_ahead
from dit_accel.candidate import Candidate
from dit_accel.evaluation.files import write_json
from dit_accel.evaluation.timing import machine
from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex, block_sparse_attention, prepare_triton
from dit_accel.kernels.block_sparse import flex, triton_kernel
from dit_accel.kernels.partition import partition
from dit_accel.kernels.prepare import PRECISIONS, prepare
from dit_accel.kernels.scores import antidiagonal_scores, block_mass, lowbit_scores, pooled_scores
from dit_accel.kernels.select import select_blocks

DENSITIES = (1.0, 0.5, 0.25, 0.10, 0.05)
BLOCKS = (128, 64)
# What a plan runs, selection included, at these densities: family, tokens per block and precision of all heads.
WHOLE = (
    ("pooled", 64, "native"),
    ("pooled", 64, "int8_fp8"),
    ("pooled", 128, "native"),
    ("pooled", 128, "int8_fp8"),
    ("balanced", 64, "native"),
    ("balanced", 64, "int8_fp8"),
)
WHOLE_DENSITIES = (0.25, 0.10)
STEPS = 3  # of a layer that are timed as one: in so many `balanced` builds its blocks once
LAYER_BLOCKS = (64, 128)
# Of the suite's time: what compiling ahead may take, and a single check or row.
COMPILING, CHECKING, ONE_CHECK, ONE_ROW = 0.3, 0.55, 0.2, 0.3
# Dense peaks of one H100 or H200 SXM by data sheet, TFLOP/s.
# "int8" multiplies half in INT8 and half in 16 bits.
PEAKS = {"native": 989.0, "int8": 1319.0, "int8_fp8": 1979.0, "fp8": 1979.0}
PEAKS["sageattention-triton"] = PEAKS["int8"]
SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


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

    worker = Worker(device) if device.type == "cuda" else None

    def add(kind: str, row: dict[str, Any], measure: Callable[[], dict[str, Any]], seconds: float) -> None:
        try:
            found = measure() if worker is None else worker.run(measure, seconds)
            report[kind].append(_as_json(row | found))
        except TaskError as error:
            report[kind].append(row | {"error": str(error)})
        except Exception as error:  # a kernel that fails is a result, too
            report[kind].append(row | {"error": f"{type(error).__name__}: {error}"[:500]})
        write_json(output, report)

    checks: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = []
    for dim in dims:
        for precision in PRECISIONS:
            for extra in EXTRAS:
                case = {"kernel": "attention", "dim": dim, "precision": precision, "extra": extra}
                checks.append((case, partial(check, dim, precision, extra, device)))
        for name in CHOOSING:
            checks.append(({"kernel": name, "dim": dim}, partial(check_choosing, name, dim, device)))
        for name, block in product(LAYERS, LAYER_BLOCKS):
            case = {"kernel": f"layer:{name}", "dim": dim, "block": block}
            checks.append((case, partial(check_layer, name, dim, device, block=block)))
    by_size = sorted(shapes.items(), key=lambda item: item[1].flops)
    if worker is not None:
        # Inductor would move Triton's cache when it first compiles something.
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
        # One shape of each head dim compiles nearly all that the others need.
        smallest = {shape.dim: shape for _, shape in reversed(by_size)}.values()
        tasks: list[Callable[[], object]] = [
            partial(call_once, shape, density, name, device)
            for shape, density in product(smallest, (1.0, WHOLE_DENSITIES[0]))
            for name in names_of_calls(shape, density)
        ]
        tasks += [measure for _, measure in checks]
        with suppress(Exception):
            compile_ahead(tasks, device, limit_seconds * COMPILING)
        report["compile_seconds"] = time.perf_counter() - start
    for case, measure in tqdm(checks, desc="correctness"):
        left = limit_seconds * CHECKING - (time.perf_counter() - start)
        if left <= 0:
            report["left_out"].append(" ".join(map(str, case.values())))
            continue
        add("correctness", case, measure, min(limit_seconds * ONE_CHECK, left))
    rates: dict[
        float, float
    ] = {}  # seconds per product, by density: a row is not begun where it may not end in time
    for name, shape in by_size:
        for density in tqdm(DENSITIES, desc=name):
            begun = time.perf_counter()
            expected = rates.get(density, max(rates.values(), default=0.0)) * shape.flops
            if begun - start + expected > limit_seconds:
                report["left_out"].append(f"{name} at density {density:g}")
                continue
            sizes = {"tokens": shape.tokens, "heads": shape.heads, "dim": shape.dim}
            row = {"shape": name, **sizes, "asked": density}
            add("rows", row, partial(_row, shape, density, device), limit_seconds * ONE_ROW)
            rates[density] = (time.perf_counter() - begun) / shape.flops
    if worker is not None:
        worker.stop()
    report["seconds"] = time.perf_counter() - start
    write_json(output, report)
    return report


def _as_json(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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

    A precision's time is that of the whole call; `prepare:` (with everything, an order and means too), `attend:` and
    `order` are parts of it, `score:`, `select` and `partition` come before.
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
    for precision in PRECISIONS:
        plain = partial(
            prepare_triton.prepare, q, k, v, precision=precision, scale=scale, block_k=index.block_k
        )
        calls[f"prepare:{precision}"] = partial(plain, key_order=order, remainder=True)
        calls[f"attend:{precision}"] = _attend(plain, index, scale, q.dtype)
    calls["order"] = partial(
        prepare_triton.prepare,
        q,
        k,
        v,
        precision="native",
        scale=scale,
        block_k=index.block_k,
        key_order=order,
    )
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


def _calls_of_row(
    shape: Shape, index: BlockIndex, operands: tuple[Tensor, Tensor, Tensor], density: float
) -> dict[str, Call]:
    return _calls(*operands, index, density) | _layers(*operands, shape.grid, density)


def names_of_calls(shape: Shape, density: float) -> list[str]:
    """What a row times."""
    short = replace(shape, tokens=256)
    here = torch.device("cpu")
    operands = tensors(short, here, torch.bfloat16)
    return list(_calls_of_row(short, index_of(short, *BLOCKS, density, here), operands, density))


def call_once(shape: Shape, density: float, name: str, device: torch.device) -> None:
    """One call of a row."""
    operands = tensors(shape, device, torch.bfloat16)
    _calls_of_row(shape, index_of(shape, *BLOCKS, density, device), operands, density)[name]()


def _thrice(call: Call) -> Any:
    """What a layer does in three steps, of which one may prepare for the others; the last one's result."""
    for _ in range(STEPS - 1):
        call()
    return call()


def _layers(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid | None, density: float) -> dict[str, Call]:
    """Whole layers of a plan, from the model's queries to its output; none without a grid."""
    if grid is None or density not in WHOLE_DENSITIES:
        return {}
    calls: dict[str, Call] = {}
    for family, block, precision in WHOLE:
        way = Candidate(family, density, precision=precision)
        once = partial(
            attend, q, k, v, grid, (way,), [0] * q.shape[2],
            block=block, layer=0, cache={}, launches={}, backend="triton",
        )  # fmt: skip
        calls[f"layer:{family}:{block}:{precision}"] = partial(_thrice, once)
    return calls


def _distances(calls: Mapping[str, Call]) -> dict[str, float]:
    """How far our outputs are from cuDNN's, where both attend to everything: some things go wrong at full size only."""
    if "sdpa-cudnn" not in calls:
        return {}
    exact = calls["sdpa-cudnn"]().transpose(1, 2)
    found = {}
    for name in PRECISIONS:
        if name in calls:
            off = calls[name]() - exact
            found[name] = float(off.float().norm() / exact.float().norm())
    return found


def _row(shape: Shape, density: float, device: torch.device) -> dict[str, Any]:
    operands = tensors(shape, device, torch.bfloat16)
    index = index_of(shape, *BLOCKS, density, device)
    calls = _calls_of_row(shape, index, operands, density)
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
    for name in times:
        if name.startswith("layer:"):
            times[name] = {key: ms / STEPS for key, ms in times[name].items()}
    far = _distances(working) if density == 1.0 else {}
    got = index.density
    base = times.get("sdpa-cudnn")
    results: dict[str, dict[str, Any]] = {}
    for name, taken in times.items():
        if name in ("order", "select", "partition") or name.startswith(("prepare:", "attend:", "score:")):
            results[name] = {**taken, "share_of_cudnn": taken["p50"] / base["p50"] if base else None}
            continue
        ours = name.startswith("layer:") or name in (*PRECISIONS, "native+remainder", "flex")
        rate = (got if ours else 1.0) * shape.flops / (taken["p50"] * 1e9)
        results[name] = {
            **taken,
            "tflops": rate,
            "share_of_peak": rate / PEAKS.get(name.rpartition(":")[2], PEAKS["native"]),
            "speedup_over_cudnn": base["p50"] / taken["p50"] if base else None,
        }
        if name in far:
            results[name]["rel_l2_to_cudnn"] = far[name]
    return {"density": got, "results": results, "failed": errors}
