"""Density against speed-up on a CPU: the block-sparse backends beside SDPA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dit_accel.bench.problem import Shape, index_of, tensors
from dit_accel.bench.timing import Call, in_turns
from dit_accel.evaluation.timing import machine
from dit_accel.kernels import block_sparse_attention

TOKENS = (8_192, 16_384)
DENSITIES = (1.0, 0.5, 0.25, 0.10, 0.05)
BACKENDS = ("torch", "torch+remainder", "flex")


def run(
    *,
    tokens: Sequence[int] = TOKENS,
    heads: int = 4,
    dim: int = 64,
    backends: Sequence[str] = BACKENDS,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure all densities and backends in bf16; `rows` hold milliseconds and the speed-up over SDPA.

    The time of a call is that of `block_sparse_attention` as a whole. Lists are made before, as those of static
    families are.
    """
    device = torch.device("cpu")
    rows = []
    bar = tqdm(total=len(tokens) * len(DENSITIES), desc="CPU attention", disable=not progress)
    for count in tokens:
        shape = Shape(count, heads, dim)
        q, k, v = tensors(shape, device, torch.bfloat16)
        dense = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        for density in DENSITIES:
            index = index_of(shape, 64, 64, density, device)
            calls: dict[str, Call] = {
                "sdpa": partial(F.scaled_dot_product_attention, dense[0], dense[1], dense[2])
            }
            for backend in backends:
                name, _, extra = backend.partition("+")
                calls[backend] = partial(
                    block_sparse_attention, q, k, v, index, backend=name, remainder=extra == "remainder"
                )
            with torch.no_grad():
                times = in_turns(calls, device, rounds=5)
            for backend in backends:
                rows.append(
                    {
                        "tokens": count,
                        "heads": heads,
                        "dim": dim,
                        "density": index.density,
                        "backend": backend,
                        "ms": times[backend],
                        "sdpa_ms": times["sdpa"],
                        "speedup": times["sdpa"]["p50"] / times[backend]["p50"],
                    }
                )
            bar.update()
    bar.close()
    return {
        "suite": "cpu",
        "machine": machine(device, torch.bfloat16),
        "baseline": "SDPA (CPU flash)",
        "rows": rows,
    }
