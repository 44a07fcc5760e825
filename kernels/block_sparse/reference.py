"""The definition of block-sparse attention. Slow, exact, and memory seq_q * seq_k for one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.prepare import E4M3_MAX, LOG2E, Prepared


def attention(prepared: Prepared, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v per head, in float64 for float64 inputs and in float32 otherwise.

    8-bit operands are multiplied exactly; with E4M3 values the weights are rounded to E4M3 too, relative to the
    row's largest, and their sum is that of the rounded ones. The result is in the order of the prepared queries:
    `[batch, heads, seq_q, dim]` and, in natural logarithms, float32 `[batch, heads, seq_q]`.
    """
    batch, heads, seq_q, dim = prepared.query.shape
    native = prepared.query_scale is None
    dtype = torch.promote_types(prepared.query.dtype, torch.float32) if native else torch.float32
    output = torch.empty(batch, heads, seq_q, dim, dtype=dtype, device=prepared.query.device)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=prepared.query.device)
    blocks, rows, cols = index.to_mask(), index.query_blocks(), index.key_blocks()
    for b in range(batch):
        for h in range(heads):
            kept = blocks[b % index.batch, h][_of(rows, b, h)]
            logits, values = _logits(prepared, scale, kept, _of(cols, b, h), b, h, dtype)
            largest = logits.amax(-1, keepdim=True)
            weights = torch.exp2(logits - largest.masked_fill(largest == -torch.inf, 0))
            if prepared.value_scale is not None:
                weights = (weights * E4M3_MAX).to(torch.float8_e4m3fn).to(dtype) / E4M3_MAX
                values = values * prepared.value_scale[b, h]
            total = weights.sum(-1, keepdim=True)
            # A row without keys sums to 0; its output is defined as 0, its log-sum-exp as -inf.
            output[b, h] = weights @ values / total.masked_fill(total == 0, 1)
            lse[b, h] = ((largest + total.log2()) / LOG2E)[:, 0]
    if prepared.lse_shift is not None:
        lse += prepared.lse_shift
    return output, lse


def _of(x: Tensor, b: int, h: int) -> Tensor:
    """One head of `[batch or 1, heads or 1, ...]`."""
    return x[b % x.shape[0], h % x.shape[1]]


def _logits(
    p: Prepared, scale: float, kept: Tensor, block: Tensor, b: int, h: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Base-2 logits of one head, `[seq_q, seq_k (+ cols)]`, -inf where nothing is read, and the values.

    kept: bool `[seq_q, cols]`; block: of every key, `[seq_k]`.
    """
    q, k, v = (x[b, h].to(dtype) for x in (p.query, p.key, p.value))
    scores = q @ k.T
    row_scale: float | Tensor = scale * LOG2E
    if p.query_scale is not None and p.key_scale is not None:
        row_scale = p.query_scale[b, h, :, None]
        scores = scores * p.key_scale[b, h].repeat_interleave(p.group)[: len(k)]
    mask = kept[:, block]
    if p.valid is not None:
        mask = mask & _of(p.valid, b, h)
    logits = (scores * row_scale).masked_fill_(~mask, -torch.inf)
    if p.means is None:
        return logits, v
    scores = q @ p.means.key[b, h].to(dtype).T
    if p.means.key_scale is not None:
        scores = scores * p.means.key_scale[b, h]
    rest = (scores * row_scale + _of(p.means.bias, b, h)).masked_fill_(kept, -torch.inf)
    return torch.cat([logits, rest], dim=1), torch.cat([v, p.means.value[b, h].to(dtype)])
