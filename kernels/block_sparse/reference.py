"""The definition of block-sparse attention. Slow, exact, and memory seq_q * seq_k for one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex


def attention(
    query: Tensor, key: Tensor, value: Tensor, index: BlockIndex, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v per head, in float64 for float64 inputs and in float32 otherwise."""
    batch, seq_q, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=query.device)
    blocks = index.to_mask()
    for b in range(batch):
        for h in range(heads):
            q, k, v = (x[b, :, h].to(dtype) for x in (query, key, value))
            mask = blocks[b % index.batch, h]
            mask = mask.repeat_interleave(index.block_q, 0)[: index.seq_q]
            mask = mask.repeat_interleave(index.block_k, 1)[:, : index.seq_k]
            if key_mask is not None:
                mask = mask & key_mask[b]
            scores = (scale * (q @ k.T)).masked_fill_(~mask, -torch.inf)
            lse[b, h] = scores.logsumexp(-1)
            # The softmax of a row without keys is NaN; its output is defined as 0.
            weights = scores.softmax(-1).masked_fill_(~mask.any(-1, keepdim=True), 0)
            output[b, :, h] = (weights @ v).to(query.dtype)
    return output, lse
