"""Block-sparse attention over blocks of varying length from plain torch operations: rows of alike sizes together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.block_sparse.gather import CHUNK_SCORES, batched_scores
from dit_accel.kernels.prepare import Prepared

_LEAST_QUERIES, _MOST_QUERIES = 16, 64  # of a tile; its size is a power of two
_KEYS = 32  # gathered keys are filled up to a multiple of it


def attention(prepared: Prepared, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[batch, heads, seq_q, dim]` and log-sum-exp `[batch, heads, seq_q]` in the order of the queries.

    Rows of blocks are cut into tiles of queries; tiles of one size whose rows read about as many keys run as one batch
    of matmuls. Memory beyond the inputs: a bool for each pair of a row and a key of one head, CHUNK_SCORES scores (at
    least one tile) and the keys and values they belong to. Native precision.
    """
    p = prepared
    batch, heads, seq_q, dim = p.query.shape
    output = torch.zeros_like(p.query, memory_format=torch.contiguous_format)
    lse = p.query.new_full((batch, heads, seq_q), -torch.inf, dtype=torch.float32)
    blocks, of_key = index.to_mask(), index.key_blocks()
    for b, h in itertools.product(range(batch), range(heads)):
        kept = blocks[b % index.batch, h]
        read = kept[:, of_key[b % of_key.shape[0], h % of_key.shape[1]]]
        if p.valid is not None:
            read = read & p.valid[b, h % p.valid.shape[1]]
        counts, listed = read.sum(-1), read.nonzero()[:, 1]
        offsets = counts.cumsum(0) - counts
        key, value, bias = p.key[b, h], p.value[b, h], None
        if (means := p.means) is not None:
            bias = (means.bias[b % means.bias.shape[0], h % means.bias.shape[1]] * math.log(2)).to(key.dtype)
            key, value = torch.cat([key, means.key[b, h]]), torch.cat([value, means.value[b, h]])
        of_means = torch.arange(index.seq_k, len(key), device=key.device)
        for row, queries, real, width in _batches(_edges(index, b, h), counts):
            steps = torch.arange(width, device=key.device)
            inside = steps < counts[row, None]
            picked = steps.new_zeros(inside.shape)
            picked[inside] = listed[(offsets[row, None] + steps)[inside]]
            picked = torch.cat([picked, of_means.expand(len(row), -1)], dim=1)
            k, v = (x.index_select(0, picked.flatten()).view(*picked.shape, dim) for x in (key, value))
            q = p.query[b, h].index_select(0, queries.flatten()).view(*queries.shape, dim)
            scores = batched_scores(q, k, scale)
            scores[..., :width].masked_fill_(~inside[:, None], -torch.inf)
            if bias is not None:
                scores[..., width:] += bias.masked_fill(kept[row], -torch.inf)[:, None]
            sums = scores.float().logsumexp(-1)
            # Without any key a row of weights is NaN.
            weights = scores.softmax(-1).masked_fill_((sums == -torch.inf)[..., None], 0)
            output[b, h].index_copy_(0, queries[real], (weights @ v)[real])
            lse[b, h].index_copy_(0, queries[real], sums[real])
    return output, lse


def _batches(edges: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Tiles of one size, whose rows read about as many keys.

    edges: int64 `[rows + 1]`, the first query of each row and the end; counts: int64 `[rows]`, keys that a row reads.

    Yields the row of each tile `[tiles]`, its queries `[tiles, size]`, which of them are its own, the others being
    repetitions, and the number of keys of the longest row, filled up.
    """
    lengths = edges.diff()
    tiles = (lengths + _MOST_QUERIES - 1) // _MOST_QUERIES
    rows = torch.arange(len(lengths), device=edges.device).repeat_interleave(tiles)
    within = torch.arange(len(rows), device=edges.device) - (tiles.cumsum(0) - tiles)[rows]
    starts = edges[rows] + within * _MOST_QUERIES
    stops = (starts + _MOST_QUERIES).minimum(edges[rows + 1])
    sizes = (stops - starts).double().log2().ceil().exp2().long().clamp(min=_LEAST_QUERIES)
    for size in sizes.unique().tolist():
        members = (sizes == size).nonzero()[:, 0]
        members = members[counts[rows[members]].argsort(descending=True, stable=True)]
        widths = ((counts[rows[members]] + _KEYS - 1) // _KEYS * _KEYS).tolist()
        begin = 0
        while begin < len(members):
            step = max(1, CHUNK_SCORES // max(1, size * widths[begin]))
            some = members[begin : begin + step]
            queries = starts[some, None] + torch.arange(size, device=edges.device)
            stop = stops[some, None]
            yield rows[some], queries.minimum(stop - 1), queries < stop, widths[begin]
            begin += step


def _edges(index: BlockIndex, b: int, h: int) -> Tensor:
    """int64 `[rows + 1]`: the first query of every row, and the end."""
    if (starts := index.query_starts) is not None:
        return starts[b % starts.shape[0], h % starts.shape[1]].long()
    rows = torch.arange(index.rows + 1, device=index.counts.device)
    return (rows * index.block_q).clamp(max=index.seq_q)
