"""Block-sparse attention from plain torch operations: gather the listed blocks, then batched matmuls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dit_accel.kernels.block_index import BlockIndex
from torch import Tensor

# Scores per chunk: few enough to stay in the cache between the two matmuls.
CHUNK_SCORES = 1 << 19


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: BlockIndex,
    scale: float,
    key_mask: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rows with lists of one length run together, so nothing is padded and no score needs a mask.

    Memory beyond a copy of the inputs: CHUNK_SCORES scores and the keys and values they belong to.
    """
    batch, seq_q, heads, dim = query.shape
    block_q, block_k, rows, cols = index.block_q, index.block_k, index.rows, index.cols
    keys, values = _blocks(key, block_k), _blocks(value, block_k)
    valid = (
        None if key_mask is None else F.pad(key_mask, (0, -index.seq_k % block_k)).view(batch, cols, block_k)
    )

    counts = index.counts.expand(batch, -1, -1).flatten().long()
    offsets = index.offsets.expand(batch, -1, -1).flatten()
    # Lists ascend, so the short last block of the sequence can only be their last entry.
    short = cols * block_k - index.seq_k
    last = index.indices[(offsets + counts - 1).clamp(min=0)] if index.indices.numel() else counts - 1
    lengths = counts * block_k - short * ((last == cols - 1) & (counts > 0))
    lengths, order = lengths.sort()
    counts, offsets = counts[order], offsets[order]
    queries = _blocks(query, block_q).index_select(0, order)
    output = torch.empty_like(queries)
    lse = queries.new_empty(queries.shape[:2], dtype=torch.float32) if return_lse else None

    stop = 0
    for length, size in zip(
        *(x.tolist() for x in lengths.unique_consecutive(return_counts=True)), strict=True
    ):
        start, stop = stop, stop + size
        count = -(-length // block_k)
        steps = torch.arange(count, device=query.device)
        step = max(1, CHUNK_SCORES // max(1, length * block_q))
        for begin in range(start, stop, step):
            chunk = slice(begin, min(begin + step, stop))
            owner = order[chunk, None] // rows
            kept = index.indices[offsets[chunk, None] + steps]
            picked = (owner * cols + kept).flatten()
            shape = (len(owner), count * block_k, dim)
            k = keys.index_select(0, picked).view(shape)[:, :length]
            v = values.index_select(0, picked).view(shape)[:, :length]
            mask = None if valid is None else valid[owner // heads, kept].view(shape[:2])[:, :length]
            output[chunk], lse_chunk = _attend(queries[chunk], k, v, scale, mask, return_lse)
            if lse is not None:
                lse[chunk] = lse_chunk

    inverse = order.argsort()
    output = output.index_select(0, inverse).view(batch, heads, rows * block_q, dim)
    if lse is not None:
        lse = lse.index_select(0, inverse).view(batch, heads, rows * block_q)[:, :, :seq_q]
    return output[:, :, :seq_q].transpose(1, 2), lse


def _blocks(x: Tensor, block: int) -> Tensor:
    """[batch, seq, heads, dim] -> [batch * heads * blocks, block, dim], zeros after the last token."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % block))
    return x.reshape(-1, block, x.shape[-1])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Dense attention of a batch of rows, q [n, block_q, dim], k and v [n, keys, dim], mask [n, keys]."""
    bias = q.new_zeros(1, 1, 1)
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)[:, None]
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=mask is not None, alpha=scale)
    weights = scores.softmax(-1)
    if mask is not None:
        # Rows whose keys are all masked are NaN here; every query of a block shares the mask.
        weights = weights.masked_fill(~mask.any(-1)[:, None, None], 0)
    return weights @ v, scores.float().logsumexp(-1) if return_lse else None
