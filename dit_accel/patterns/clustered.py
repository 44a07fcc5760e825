"""Clustered: queries and keys are grouped by what they are, not by where they are, and groups attend to groups.

Sparse VideoGen2 (https://arxiv.org/abs/2505.18875): k-means on the queries and on the keys of every head gives blocks
of varying length whose tokens resemble each other, so that the score of two centroids says much about all pairs. From
step to step the centroids are kept, and two iterations bring them up to date.

A row keeps the clusters of keys with the highest scores as long as their tokens stay within the density asked for; one
is kept in any case. With `top_p` it ranks them by the estimated mass `|K_j| · exp(q̄_i·k̄_j·scale)` and stops earlier,
once they hold that share of it, but not before `least` of the clusters: the published rule. Text is not clustered.
"""

import math
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex
from dit_accel.kernels.kmeans import Clusters, kmeans
from dit_accel.kernels.select import select_blocks
from dit_accel.patterns.base import SERVES, Family, Memory, Selection, until_share

# Tokens per cluster at the published numbers, 300 and 1,000 for the 75,600 tokens of Wan at 720p.
_QUERIES_EACH, _KEYS_EACH = 252, 76


def _arrange(
    grid: TokenGrid,
    density: float,
    block: int,
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    memory: Memory,
    query_clusters: int,
    key_clusters: int,
    iterations: int,
    top_p: float,
    least: float,
) -> Selection:
    """`*_clusters`: their number, 0 for the published tokens per cluster; `iterations`: of the first step.

    `top_p`, `least`: shares of the mass and of the clusters of keys.
    """
    tokens = grid.video_tokens
    for name, value, low, high in (
        ("query_clusters", query_clusters, 0, tokens),
        ("key_clusters", key_clusters, 0, tokens),
        ("iterations", iterations, 1, 1000),
        ("top_p", top_p, 0.0, 1.0),
        ("least", least, 0.0, 1.0),
    ):
        if not low <= value <= high:
            raise ValueError(
                f"option {name!r} of family 'clustered': expected {low} to {high}, got {value!r}"
            )
    query_clusters, key_clusters = cluster_numbers(tokens, query_clusters, key_clusters)
    q = _clusters(query[:, grid.video_slice], query_clusters, iterations, memory, "queries")
    k = _clusters(key[:, grid.video_slice], key_clusters, iterations, memory, "keys")

    scores = q.centroids @ k.centroids.transpose(2, 3) * scale
    if top_p:
        scores += k.sizes.log()[:, :, None]
    best, ranked = scores.sort(dim=-1, descending=True, stable=True)
    sizes = k.sizes.long()[:, :, None].expand_as(scores).gather(-1, ranked)
    budget = density * grid.total_tokens - grid.text_tokens
    # The cluster that crosses the budget is kept where more than half of it fits.
    keep = (2 * sizes.cumsum(-1) - sizes <= math.floor(2 * budget)).sum(-1)
    if top_p:
        enough = until_share(best.softmax(-1), top_p).sum(-1).clamp(min=math.ceil(least * key_clusters))
        keep = torch.minimum(keep, enough)
    keep = keep.clamp(min=1)
    read = sizes.cumsum(-1).gather(-1, keep[..., None] - 1)[..., 0] + grid.text_tokens
    # Counting the lists' blocks, which vary in length, would take a mask of them.
    by_text = grid.text_tokens / grid.total_tokens
    share = (q.sizes * read).double().sum(-1).mean() / grid.total_tokens**2 + by_text

    text = -(-grid.text_tokens // block)
    rows, cols = query_clusters + text, key_clusters + text
    if text:
        scores = F.pad(scores, (0, text, 0, text), value=torch.inf)
        keep = F.pad(keep + text, (0, text), value=cols)
    lists = select_blocks(scores, block_q=1, block_k=1, seq_q=rows, seq_k=cols, keep=keep, max_keep=cols)
    query_order, query_starts = _with_text(grid, q, block)
    key_order, key_starts = _with_text(grid, k, block)
    seq = grid.total_tokens
    index = BlockIndex(
        lists.counts, lists.offsets, lists.indices, block, block, seq, seq, query_starts, key_starts
    )
    return Selection(index, query_order, key_order, grid, None, share)


def cluster_numbers(tokens: int, query_clusters: int, key_clusters: int) -> tuple[int, int]:
    """Return the numbers of clusters, the published tokens per cluster in place of a 0."""
    return (
        query_clusters or max(1, round(tokens / _QUERIES_EACH)),
        key_clusters or max(1, round(tokens / _KEYS_EACH)),
    )


def _clusters(tokens: Tensor, count: int, iterations: int, memory: Memory, name: str) -> Clusters:
    """k-means that goes on from the centroids of the step before."""
    before = memory.get(name)
    if tokens.dtype == torch.float64:
        tokens = tokens.float()
    found = kmeans(tokens, count, iterations=iterations if before is None else 2, centroids=before)
    memory[name] = found.centroids
    return found


def _with_text(grid: TokenGrid, clusters: Clusters, block: int) -> tuple[Tensor, Tensor]:
    """Order `[batch, heads, seq]` and starts `[batch, heads, blocks + 1]` with the text behind the clusters."""
    order, starts = clusters.order + grid.video_slice.start, clusters.starts
    if not grid.text_tokens:
        return order, starts
    shape, device = order.shape[:2], order.device
    text = torch.arange(grid.text_tokens, device=device) + grid.text_slice.start
    ends = torch.arange(block, grid.text_tokens + block, block, device=device).clamp(max=grid.text_tokens)
    ends = (ends + grid.video_tokens).to(torch.int32)
    return (
        torch.cat((order, text.expand(*shape, -1)), dim=-1),
        torch.cat((starts, ends.expand(*shape, -1)), dim=-1),
    )


CLUSTERED = Family(
    "clustered",
    static=False,
    arrange=_arrange,
    options=MappingProxyType(
        {
            "query_clusters": 0,
            "key_clusters": 0,
            "iterations": 10,
            "top_p": 0.0,
            "least": 0.0,
            **SERVES,
        }
    ),
)
