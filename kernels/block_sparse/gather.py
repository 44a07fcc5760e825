"""Block-sparse attention from plain torch operations: gather the listed blocks, then batched matmuls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex

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
) -> tuple[Tensor, Tensor]:
    """Rows with lists of one length run together, so that no list is padded.

    Memory beyond copies of the inputs: CHUNK_SCORES scores (at least one row) and the keys and values they
    belong to. Without `return_lse` the second result is left unset.
    """
    batch, seq_q, heads, dim = query.shape
    block_q, block_k, rows, cols = index.block_q, index.block_k, index.rows, index.cols
    keys, values = _blocks(key, block_k), _blocks(value, block_k)
    valid = key_mask
    if valid is not None:
        valid = F.pad(valid, (0, -index.seq_k % block_k)).view(batch, cols, block_k)

    counts = index.counts.expand(batch, -1, -1).flatten().long()
    offsets = index.offsets.expand(batch, -1, -1).flatten()
    # Lists ascend, so the short last block of the sequence can only be their last entry.
    short = cols * block_k - index.seq_k
    last = index.indices[(offsets + counts - 1).clamp(min=0)] if index.indices.numel() else counts - 1
    lengths = counts * block_k - short * ((last == cols - 1) & (counts > 0))
    lengths, order = lengths.sort()
    offsets = offsets[order]
    queries = _blocks(query, block_q).index_select(0, order)
    output = torch.empty_like(queries)
    lse = queries.new_empty(queries.shape[:2], dtype=torch.float32)

    stop = 0
    groups = torch.stack(lengths.unique_consecutive(return_counts=True), dim=1)
    for length, size in groups.tolist():
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
            k = keys.index_select(0, picked).view(shape)
            v = values.index_select(0, picked).view(shape)
            mask = None if valid is None else valid[owner // heads, kept].view(shape[:2])
            scores = _scores(queries[chunk], k, scale, mask)
            # Masked, not cut off: an odd number of columns would slow the matmuls down by half.
            scores[..., length:] = -torch.inf
            if return_lse:
                lse[chunk] = scores.float().logsumexp(-1)
            weights = scores.softmax(-1)
            if mask is not None:
                # Without any valid key a row is NaN here; all queries of a block share the mask.
                weights = weights.masked_fill(~mask.any(-1)[:, None, None], 0)
            output[chunk] = weights @ v

    inverse = order.argsort()
    output = output.index_select(0, inverse).view(batch, heads, rows * block_q, dim)
    lse = lse.index_select(0, inverse).view(batch, heads, rows * block_q)
    return output[:, :, :seq_q].transpose(1, 2), lse[:, :, :seq_q]


def _blocks(x: Tensor, block: int) -> Tensor:
    """[batch, seq, heads, dim] -> [batch * heads * blocks, block, dim], zeros after the last token."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % block))
    return x.reshape(-1, block, x.shape[-1])


def _scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """scale * q k^T, -inf where mask [n, keys] is False; scale and mask cost no pass of their own."""
    bias = q.new_zeros(1, 1, 1)
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)[:, None]
    return torch.baddbmm(bias, q, k.transpose(1, 2), beta=mask is not None, alpha=scale)
