"""What a call of attention costs on this device, fitted to measurements and checked on lists that the fit has not seen.

A call takes a fixed time, a time per token of every head (reading, ordering and quantising queries, keys and values,
writing outputs) and a time per query-key pair of the listed blocks, another one in rows that keep every block. All but
the first have a share per channel:

    ms = c0 + tokens · heads · (c1 + c2 · dim) + (listed · (c3 + c4 · dim) + whole · (c5 + c6 · dim)) / efficiency

`efficiency` is what uneven lists leave of a GPU's places, see `dit_accel.kernels.balance`; a CPU loses none. The
coefficients are those of least squared relative error that are not negative, for each precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dit_accel.bench.problem import Shape, block_mask, index_of, tensors
from dit_accel.bench.timing import Call, in_turns
from dit_accel.evaluation.models import resolve_device
from dit_accel.evaluation.timing import machine
from dit_accel.kernels import BlockIndex, available_precisions, block_sparse_attention
from dit_accel.kernels.balance import simulate

DIMS = (64, 128)
DENSITIES = (1.0, 0.5, 0.2, 0.05)
# Tokens and heads to fit on, and tokens to check on.
CPU_SIZES = ((2_048, 4_096, 8_192), 4, (3_333, 6_001))
GPU_SIZES = ((4_608, 16_896, 45_106), 24, (9_261, 32_760))
# Heads of a checked layer take these in turns: the mixture that a plan makes.
MIXED = (1.0, 0.3, 0.15, 0.05)
ALLOWED_ERROR = 0.15
_SEED = 7


@dataclass(frozen=True)
class CostModel:
    """Coefficients c0 to c6 by precision; slots: places of a GPU that run at once, None on a CPU."""

    coefficients: Mapping[str, tuple[float, ...]]
    slots: int | None = None

    def predict(self, index: BlockIndex, dim: int, precision: str = "native") -> float:
        """Milliseconds of a call over these lists.

        Raises:
            ValueError: a precision that was not measured, or blocks of varying length.
        """
        if index.varies:
            raise ValueError("index: expected blocks of one length, got starts; only these were measured")
        if precision not in self.coefficients:
            known = ", ".join(self.coefficients)
            raise ValueError(f"precision: expected one that was measured ({known}), got {precision!r}")
        return self._of(features(index, dim, self.slots), precision)

    def pays_below(self, shape: Shape, dense_ms: float, precision: str = "native", block: int = 64) -> float:
        """The density below which lists of a shape take less than `dense_ms`: 0 if none does, 1 if all do."""
        every = float(math.ceil(shape.tokens / block) ** 2 * block * block * shape.heads)
        if self.slots is not None:
            half = index_of(shape, block, block, 0.5, torch.device("cpu"))
            every /= simulate(half, slots=self.slots).efficiency
        tokens = 2 * shape.tokens * shape.heads
        none, listed = (self._of(_terms(tokens, pairs, 0.0, shape.dim), precision) for pairs in (0.0, every))
        if listed <= dense_ms:
            return 1.0
        return 0.0 if none >= dense_ms else (dense_ms - none) / (listed - none)

    def _of(self, terms: Sequence[float], precision: str) -> float:
        return sum(c * term for c, term in zip(self.coefficients[precision], terms, strict=True))


def features(index: BlockIndex, dim: int, slots: int | None) -> tuple[float, ...]:
    """What each coefficient is multiplied with."""
    batch, heads = index.counts.shape[:2]
    whole = index.counts == math.ceil(index.seq_k / index.block_k)
    size = float(index.block_q * index.block_k)
    if slots is not None and bool(index.counts.any()):
        size /= simulate(index, slots=slots).efficiency
    listed, kept = (size * float(index.counts[rows].sum()) for rows in (~whole, whole))
    return _terms(batch * heads * (index.seq_q + index.seq_k), listed, kept, dim)


def _terms(tokens: float, listed: float, whole: float, dim: int) -> tuple[float, ...]:
    return (1.0, tokens, tokens * dim, listed, listed * dim, whole, whole * dim)


def fitted(rows: Sequence[tuple[float, ...]], ms: Sequence[float]) -> tuple[float, ...]:
    """Coefficients of least squared relative error, none negative: the best of all sets that may differ from 0."""
    weighted = np.array(rows) / np.array(ms)[:, None]
    scale = np.linalg.norm(weighted, axis=0)
    columns = [n for n, size in enumerate(scale) if size > 0]
    best, found = math.inf, np.zeros(len(scale))
    for count in range(1, len(columns) + 1):
        for chosen in map(list, itertools.combinations(columns, count)):
            scaled = weighted[:, chosen] / scale[chosen]
            solution = np.linalg.lstsq(scaled, np.ones(len(ms)), rcond=None)[0]
            error = float(np.square(scaled @ solution - 1).sum())
            if (solution >= 0).all() and error < best:
                best, found = error, np.zeros(len(scale))
                found[chosen] = solution / scale[chosen]
    return tuple(found.tolist())


def run(
    device: str | None = None,
    *,
    sizes: tuple[Sequence[int], int, Sequence[int]] | None = None,
    dims: Sequence[int] = DIMS,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure lists of every length, density, precision and head dim, fit them, and check layers of mixed densities.

    Args:
        device: CUDA where there is one if None.
        sizes: tokens to fit on, heads, tokens to check on.

    Returns:
        `model` (coefficients by precision), `rows` (measured and predicted ms), `checks` (the same for layers that the
        fit has not seen, with `ok` where the error is at most `ALLOWED_ERROR`) and `pays` (the density below which
        lists take less than SDPA).
    """
    place = resolve_device(device)
    dtype = torch.bfloat16
    gpu = place.type == "cuda"
    tokens, heads, unseen = sizes or (GPU_SIZES if gpu else CPU_SIZES)
    slots = torch.cuda.get_device_properties(place).multi_processor_count if gpu else None
    precisions = available_precisions(place, dtype)
    shapes = [Shape(count, heads, dim) for count in tokens for dim in dims]
    checked = [Shape(count, heads, dim) for count in unseen for dim in dims]
    measured: list[tuple[Shape, float, BlockIndex, dict[str, float]]] = []
    bar = tqdm(total=len(shapes) * len(DENSITIES) + len(checked), desc="fit", disable=not progress)
    for shape in shapes:
        for density in DENSITIES:
            index = index_of(shape, 64, 64, density, place)
            times = _measure(shape, index, precisions, place, dtype)
            measured.append((shape, density, index, times))
            bar.update()
    terms = [features(index, shape.dim, slots) for shape, _, index, _ in measured]
    model = CostModel(
        {name: fitted(terms, [times[name] for *_, times in measured]) for name in precisions}, slots
    )
    checks = []
    for shape in checked:
        index = mixed_index(shape, place)
        times = _measure(shape, index, precisions, place, dtype)
        checks += [_row(model, shape, index, times, name) for name in precisions]
        bar.update()
    bar.close()
    return {
        "suite": "fit",
        "machine": machine(place, dtype),
        "baseline": "SDPA",
        "slots": slots,
        "model": {name: list(found) for name, found in model.coefficients.items()},
        "rows": [
            _row(model, shape, index, times, name)
            for shape, _, index, times in measured
            for name in precisions
        ],
        "checks": [check | {"ok": check["error"] <= ALLOWED_ERROR} for check in checks],
        "pays": [
            {
                "tokens": shape.tokens,
                "heads": heads,
                "dim": shape.dim,
                "precision": name,
                "sdpa_ms": times["sdpa"],
                "below_density": model.pays_below(shape, times["sdpa"], name),
            }
            for shape, density, _, times in measured
            if density == DENSITIES[0]
            for name in precisions
        ],
    }


def mixed_index(shape: Shape, device: torch.device) -> BlockIndex:
    """Lists whose heads differ in density as `MIXED` does."""
    rows = -(-shape.tokens // 64)
    masks = [
        block_mask(1, rows, rows, MIXED[head % len(MIXED)], device, _SEED + head)
        for head in range(shape.heads)
    ]
    return BlockIndex.from_mask(torch.cat(masks, dim=1), 64, 64, shape.tokens, shape.tokens)


def _measure(
    shape: Shape, index: BlockIndex, precisions: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Median milliseconds of each precision, and of SDPA."""
    query, key, value = tensors(shape, device, dtype)
    dense = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    calls: dict[str, Call] = {
        name: partial(block_sparse_attention, query, key, value, index, precision=name) for name in precisions
    }
    calls["sdpa"] = partial(F.scaled_dot_product_attention, dense[0], dense[1], dense[2])
    with torch.no_grad():
        return {name: found["p50"] for name, found in in_turns(calls, device, rounds=7).items()}


def _row(
    model: CostModel, shape: Shape, index: BlockIndex, times: Mapping[str, float], precision: str
) -> dict[str, Any]:
    predicted = model.predict(index, shape.dim, precision)
    return {
        "tokens": shape.tokens,
        "heads": shape.heads,
        "dim": shape.dim,
        "density": index.density,
        "precision": precision,
        "ms": times[precision],
        "predicted_ms": predicted,
        "error": abs(predicted / times[precision] - 1),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """How well the fit holds, and what lists cost beside SDPA."""
    worst = max(row["error"] for row in report["rows"])
    lines = [f"fitted on {len(report['rows'])} measurements, largest error {worst:.0%}"]
    for check in report["checks"]:
        lines.append(
            f"check: {check['tokens']:6d} tokens  dim {check['dim']:3d}  {check['precision']:8s} mixed densities, mean "
            f"{check['density']:.2f}: measured {check['ms']:.2f} ms, predicted {check['predicted_ms']:.2f} ms, "
            f"error {check['error']:.0%}{'' if check['ok'] else f' (above {ALLOWED_ERROR:.0%})'}"
        )
    for row in report["pays"]:
        lines.append(
            f"pays: {row['tokens']:6d} tokens  dim {row['dim']:3d}  {row['precision']:8s} below density "
            f"{row['below_density']:.2f} (SDPA {row['sdpa_ms']:.2f} ms)"
        )
    return "\n".join(lines)
