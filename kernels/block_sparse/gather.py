"""Block-sparse attention from plain torch operations: gather the listed blocks, then batched matmuls."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.prepare import Prepared

# Scores per chunk: few enough to stay in the cache between the two matmuls.
CHUNK_SCORES = 1 << 19


def attention(prepared: Prepared, index: BlockIndex, scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Rows with lists of one length run together, so that no list is padded; native precision.

    With a remainder the mean keys and values of a head follow its blocks as further blocks, which every row reads that
    leaves anything out.

    Memory beyond copies of the inputs: CHUNK_SCORES scores (at least one row) and the keys and values they
    belong to. Without `return_lse` the second result is left unset. Both are in the order of the prepared
    queries, `[batch, heads, seq_q, dim]` and `[batch, heads, seq_q]`.
    """
    batch, heads, seq_q, dim = prepared.query.shape
    block_q, block_k, rows, cols = index.block_q, index.block_k, index.rows, index.cols
    keys, values = _blocks(prepared.key, block_k), _blocks(prepared.value, block_k)
    valid = prepared.valid
    if valid is not None:
        valid = F.pad(valid, (0, -index.seq_k % block_k)).expand(batch, heads, -1).reshape(-1, cols, block_k)
    mean_bias, mean_blocks = None, 0
    if (means := prepared.means) is not None:
        mean_blocks = -(-cols // block_k)
        keys = torch.cat([keys, _blocks(means.key, block_k)])
        values = torch.cat([values, _blocks(means.value, block_k)])
        bias = F.pad(means.bias, (0, -cols % block_k), value=-torch.inf) * math.log(2)
        mean_bias = bias.to(keys.dtype).expand(batch, heads, -1).reshape(batch * heads, -1)

    counts = index.counts.expand(batch, -1, -1).flatten().long()
    offsets = index.offsets.expand(batch, -1, -1).flatten()
    # Lists ascend, so the short last block of the sequence can only be their last entry.
    short = cols * block_k - index.seq_k
    last = index.indices[(offsets + counts - 1).clamp(min=0)] if index.indices.numel() else counts - 1
    lengths = counts * block_k - short * ((last == cols - 1) & (counts > 0))
    lengths, order = lengths.sort()
    offsets = offsets[order]
    queries = _blocks(prepared.query, block_q).index_select(0, order)
    output = torch.empty_like(queries)
    lse = queries.new_empty(queries.shape[:2], dtype=torch.float32)

    stop = 0
    groups = torch.stack(lengths.unique_consecutive(return_counts=True), dim=1)
    for length, size in groups.tolist():
        start, stop = stop, stop + size
        listed = -(-length // block_k)
        rest_blocks = 0 if listed == cols else mean_blocks
        width = (listed + rest_blocks) * block_k
        steps = torch.arange(listed, device=queries.device)
        step = max(1, CHUNK_SCORES // max(1, width * block_q))
        for begin in range(start, stop, step):
            chunk = slice(begin, min(begin + step, stop))
            owner = order[chunk] // rows
            kept = index.indices[offsets[chunk, None] + steps].long()
            picked = owner[:, None] * cols + kept
            if rest_blocks:
                first = batch * heads * cols + owner * mean_blocks
                picked = torch.cat(
                    [picked, first[:, None] + torch.arange(mean_blocks, device=owner.device)], 1
                )
            k, v = (x.index_select(0, picked.flatten()).view(len(owner), width, dim) for x in (keys, values))
            scores = _scores(queries[chunk], k, scale)
            # Masked, not cut off: an odd number of columns would slow the matmuls down by half.
            scores[..., length : listed * block_k] = -torch.inf
            dead = torch.tensor(length == 0, device=owner.device)
            if valid is not None:
                closed = ~valid[owner[:, None], kept].flatten(1)
                scores[..., : listed * block_k].masked_fill_(closed[:, None], -torch.inf)
                dead = closed.all(-1)
            if mean_bias is not None and rest_blocks:
                rest = mean_bias[owner].scatter_(1, kept, -torch.inf)
                scores[..., listed * block_k :] += rest[:, None]
                dead = dead & (rest == -torch.inf).all(-1)
            if return_lse:
                lse[chunk] = scores.float().logsumexp(-1)
            weights = scores.softmax(-1)
            if dead.any():
                # Without any key a row is NaN here; all queries of a block share their keys.
                weights = weights.masked_fill(dead.expand(len(owner))[:, None, None], 0)
            output[chunk] = weights @ v

    inverse = order.argsort()
    output = output.index_select(0, inverse).view(batch, heads, rows * block_q, dim)
    lse = lse.index_select(0, inverse).view(batch, heads, rows * block_q)
    return output[:, :, :seq_q], lse[:, :, :seq_q]


def _blocks(x: Tensor, block: int) -> Tensor:
    """[batch, heads, seq, dim] -> [batch * heads * blocks, block, dim], zeros after the last token."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % block))
    return x.reshape(-1, block, x.shape[-1])


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q k^T [n, queries, keys]; the scale costs no pass of its own."""
    return torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
