"""Block-sparse attention from plain torch operations: gather the listed blocks, then batched matmuls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex

# Scores per chunk: small enough that a chunk stays in the cache between the two matmuls.
CHUNK_SCORES = 1 << 20


def attention(
    query: Tensor, key: Tensor, value: Tensor, index: BlockIndex, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows with lists of one length run together, so nothing is padded and no score needs a mask."""
    batch, seq_q, heads, dim = query.shape
    block_q, block_k, rows, cols = index.block_q, index.block_k, index.rows, index.cols
    device = query.device
    q, k, v = _blocks(query, block_q), _blocks(key, block_k), _blocks(value, block_k)
    output = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=device)
    valid = None if key_mask is None else _blocks(key_mask[:, :, None, None], block_k)[..., 0]

    counts = index.counts.expand(batch, -1, -1).reshape(-1).long()
    offsets = index.offsets.expand(batch, -1, -1).reshape(-1)
    short = cols * block_k - index.seq_k
    # Lists ascend, so the short last block of the sequence can only be their last entry.
    last = (offsets + counts - 1).clamp(min=0)
    ends_short = (
        index.indices[last] == cols - 1 if short and index.indices.numel() else torch.zeros_like(counts) > 0
    )
    order = (2 * counts + ends_short).argsort()
    lengths, sizes = (2 * counts + ends_short)[order].unique_consecutive(return_counts=True)
    start = 0
    for length, size in zip(lengths.tolist(), sizes.tolist(), strict=True):
        count, keys = length // 2, length // 2 * block_k - short * (length % 2)
        members = order[start : start + size]
        start += size
        if count == 0:
            continue
        steps = torch.arange(count, device=device)
        for r in members.split(max(1, CHUNK_SCORES // (count * block_k * block_q))):
            kept = index.indices[offsets[r, None] + steps]
            picked = (r // rows)[:, None] * cols + kept
            k_chunk = k[picked.flatten()].view(len(r), count * block_k, dim)[:, :keys]
            v_chunk = v[picked.flatten()].view(len(r), count * block_k, dim)[:, :keys]
            scores = (q[r] * scale) @ k_chunk.transpose(1, 2)
            if valid is not None:
                kept_valid = valid[(r // (rows * heads))[:, None] * cols + kept].flatten(1)[:, :keys]
                scores.masked_fill_(~kept_valid[:, None], -torch.inf)
            total = scores.float().logsumexp(-1)
            weights = scores.softmax(-1)
            if valid is not None:
                weights.masked_fill_(total[..., None] == -torch.inf, 0)
            output[r] = weights @ v_chunk
            lse[r] = total
    output = output.view(batch, heads, rows * block_q, dim)[:, :, :seq_q].transpose(1, 2)
    return output, lse.view(batch, heads, rows * block_q)[:, :, :seq_q]


def _blocks(x: Tensor, block: int) -> Tensor:
    """[batch, seq, heads, dim] -> [batch * heads * blocks, block, dim], zeros after the last token."""
    batch, seq, heads, dim = x.shape
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -seq % block))
    return x.reshape(-1, block, dim)
