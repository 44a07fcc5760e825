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
    means = prepared.means

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
        count = -(-length // block_k)
        steps = torch.arange(count, device=queries.device)
        step = max(1, CHUNK_SCORES // max(1, length * block_q))
        for begin in range(start, stop, step):
            chunk = slice(begin, min(begin + step, stop))
            owner = order[chunk, None] // rows
            kept = index.indices[offsets[chunk, None] + steps]
            picked = (owner * cols + kept).flatten()
            shape = (len(owner), count * block_k, dim)
            k = keys.index_select(0, picked).view(shape)
            v = values.index_select(0, picked).view(shape)
            bias = None
            if valid is not None:
                bias = _closed(valid[owner, kept].view(shape[:2]), k.dtype)
            if means is not None:
                k, v, bias = _with_means(prepared, owner[:, 0], kept, k, v, bias)
            scores = _scores(queries[chunk], k, scale, bias)
            # Masked, not cut off: an odd number of columns would slow the matmuls down by half.
            scores[..., length : count * block_k] = -torch.inf
            if return_lse:
                lse[chunk] = scores.float().logsumexp(-1)
            weights = scores.softmax(-1)
            if bias is not None:
                # Without any valid key a row is NaN here; all queries of a block share the bias.
                weights = weights.masked_fill((bias == -torch.inf).all(-1)[:, None, None], 0)
            output[chunk] = weights @ v

    inverse = order.argsort()
    output = output.index_select(0, inverse).view(batch, heads, rows * block_q, dim)
    lse = lse.index_select(0, inverse).view(batch, heads, rows * block_q)
    return output[:, :, :seq_q], lse[:, :, :seq_q]


def _blocks(x: Tensor, block: int) -> Tensor:
    """[batch, heads, seq, dim] -> [batch * heads * blocks, block, dim], zeros after the last token."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % block))
    return x.reshape(-1, block, x.shape[-1])


def _closed(open_keys: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True and -inf where False."""
    return torch.zeros_like(open_keys, dtype=dtype).masked_fill_(~open_keys, -torch.inf)


def _with_means(
    prepared: Prepared, owner: Tensor, kept: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Append the stand-ins of all blocks, closed for the blocks kept; owner numbers (batch, head) pairs."""
    means = prepared.means
    if means is None:
        raise ValueError("prepared has no means; prepare it with remainder=True")
    batch, heads, cols, dim = means.key.shape
    rest = means.bias.expand(batch, heads, cols).reshape(-1, cols)[owner].to(key.dtype) * math.log(2)
    rest = rest.scatter(1, kept.long(), -torch.inf)
    if bias is None:
        bias = key.new_zeros(key.shape[:2])
    mean_key, mean_value = (x.reshape(-1, cols, dim)[owner] for x in (means.key, means.value))
    return torch.cat([key, mean_key], 1), torch.cat([value, mean_value], 1), torch.cat([bias, rest], 1)


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """scale * q k^T + bias [n, keys]; scale and bias cost no pass of their own."""
    start = q.new_zeros(1, 1, 1) if bias is None else bias[:, None]
    return torch.baddbmm(start, q, k.transpose(1, 2), beta=bias is not None, alpha=scale)
