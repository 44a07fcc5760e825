"""Block-sparse attention over blocks of varying length from plain torch operations: one row of blocks at a time."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.prepare import Prepared


def attention(prepared: Prepared, index: BlockIndex, scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Output `[batch, heads, seq_q, dim]` and log-sum-exp `[batch, heads, seq_q]` in the order of the queries.
    Without `return_lse` the second result is left unset.

    Clusters hold hundreds of queries, so a matmul per row is large enough. Memory beyond the inputs: the keys, values
    and scores of one row. Native precision.
    """
    p = prepared
    batch, heads, seq_q, _ = p.query.shape
    output = torch.empty_like(p.query, memory_format=torch.contiguous_format)
    lse = p.query.new_empty(batch, heads, seq_q, dtype=torch.float32)
    blocks, of_key = index.to_mask(), index.key_blocks()
    for b in range(batch):
        for h in range(heads):
            kept_of = blocks[b % index.batch, h]
            key_block = of_key[b % of_key.shape[0], h % of_key.shape[1]]
            for row, (start, stop) in enumerate(_row_bounds(index, b, h)):
                if start == stop:
                    continue
                read = kept_of[row][key_block]
                if p.valid is not None:
                    read = read & p.valid[b, h % p.valid.shape[1]]
                tokens = read.nonzero()[:, 0]
                key, value = p.key[b, h].index_select(0, tokens), p.value[b, h].index_select(0, tokens)
                bias = None
                if (means := p.means) is not None:
                    of_head = means.bias[b % means.bias.shape[0], h % means.bias.shape[1]] * math.log(2)
                    bias = of_head.masked_fill(kept_of[row], -torch.inf).to(key.dtype)
                    key, value = torch.cat([key, means.key[b, h]]), torch.cat([value, means.value[b, h]])
                scores = p.query[b, h, start:stop] @ key.T * scale
                if bias is not None:
                    scores[:, len(tokens) :] += bias
                if return_lse:
                    lse[b, h, start:stop] = scores.float().logsumexp(-1)
                nothing = not len(tokens) and (bias is None or bool((bias == -torch.inf).all()))
                output[b, h, start:stop] = 0 if nothing else scores.softmax(-1) @ value
    return output, lse


def _row_bounds(index: BlockIndex, b: int, h: int) -> list[tuple[int, int]]:
    """First query and the one behind the last of every row."""
    if index.query_starts is None:
        edges = [min(row * index.block_q, index.seq_q) for row in range(index.rows + 1)]
    else:
        starts = index.query_starts
        edges = starts[b % starts.shape[0], h % starts.shape[1]].tolist()
    return list(itertools.pairwise(edges))
