"""What each program of the attention kernel does: its queries, and the tiles of keys that its list comes to.

All of it is computed on the device from the lists, and its size from shapes alone, so that the host never waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex

_CHUNK = 64


@dataclass(frozen=True, eq=False)
class KeyTiles:
    """The keys of every list of blocks of varying length, cut into tiles.

    Neighbouring blocks are one run, which is cut as a whole: only its edges leave tiles that are not full.

    Attributes:
        full_counts: int32 `[batch or 1, heads, rows]`, full tiles of each list.
        full: int32 `[batch or 1, heads, rows, seq_k // tile]`, first key of each.
        part_counts: int32 `[batch or 1, heads, rows]`, tiles of which some keys are read.
        parts: int32 `[batch or 1, heads, rows, most, 2]`, first key of the tile; and from which place in it keys are
            read, plus 2¹⁶ times up to which place.
    """

    full_counts: Tensor
    full: Tensor
    part_counts: Tensor
    parts: Tensor


def key_tiles(index: BlockIndex, tile: int, align: int) -> KeyTiles:
    """Cut the runs of every list into tiles of `tile` keys that begin at multiples of `align`, a divisor of it."""
    counts = index.counts.contiguous()
    starts = index.key_starts
    if starts is None:
        raise ValueError("index has equal blocks of keys, which need no tile lists")
    shape, device = counts.shape, counts.device
    runs = (index.cols + 1) // 2  # blocks that are not neighbours
    full = torch.empty(*shape, max(1, index.seq_k // tile), dtype=torch.int32, device=device)
    parts = torch.empty(*shape, runs * (1 if align == 1 else 2), 2, dtype=torch.int32, device=device)
    full_counts, part_counts = torch.empty_like(counts), torch.empty_like(counts)
    starts = starts.contiguous()
    _cut[(counts.numel(),)](
        counts,
        index.offsets.contiguous(),
        index.indices,
        starts,
        full_counts,
        full,
        part_counts,
        parts,
        index.heads,
        index.rows,
        index.cols,
        full.shape[-1],
        parts.shape[-2],
        int(starts.shape[0] > 1) * starts.shape[1],
        int(starts.shape[1] > 1),
        TILE=tile,
        ALIGN=align,
        CHUNK=_CHUNK,
    )
    return KeyTiles(full_counts, full, part_counts, parts)


@triton.jit(do_not_specialize=["heads", "rows", "cols", "most_full", "most_parts", "batch_step", "head_step"])
def _cut(
    counts,  # int32 [batch or 1, heads, rows]
    offsets,  # int64 like counts
    indices,  # int32 [total]
    starts,  # int32 [batch or 1, heads or 1, cols + 1]
    full_counts,  # int32 like counts
    full,  # int32 [batch or 1, heads, rows, most_full]
    part_counts,  # int32 like counts
    parts,  # int32 [batch or 1, heads, rows, most_parts, 2]
    heads,
    rows,
    cols,
    most_full,
    most_parts,
    batch_step,  # 0 or the heads of starts
    head_step,  # 0 or 1
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one list. A tile belongs to the block in which it ends, or the run of which it is the rest."""
    number = tl.program_id(0).to(tl.int64)
    head = number // rows % heads
    p_starts = starts + (number // rows // heads * batch_step + head * head_step) * (cols + 1)
    count = tl.load(counts + number)
    p_list = indices + tl.load(offsets + number)
    p_full = full + number * most_full
    p_parts = parts + number * most_parts * 2
    o_chunk = tl.arange(0, CHUNK)
    run = 0
    fulls = 0
    rests = 0
    for first in range(0, count, CHUNK):
        o_list = first + o_chunk
        m_list = o_list < count
        block = tl.load(p_list + o_list, mask=m_list, other=0)
        start = tl.load(p_starts + block, mask=m_list, other=0)
        stop = tl.load(p_starts + block + 1, mask=m_list, other=0)
        m_before = m_list & (o_list > 0)
        before = tl.load(p_list + o_list - 1, mask=m_before, other=0)
        m_begins = m_list & (tl.load(p_starts + before + 1, mask=m_before, other=-1) != start)
        m_after = o_list + 1 < count
        after = tl.load(p_list + o_list + 1, mask=m_after, other=0)
        m_ends = m_list & (tl.load(p_starts + after, mask=m_after, other=-1) != stop)
        # Where the run of each block began: runs begin later and later, so the latest is the largest.
        began = tl.where(m_begins, start, 0)
        m_until = o_chunk[None, :] <= o_chunk[:, None]
        began = tl.maximum(tl.max(tl.where(m_until, began[None, :], 0), 1), run)
        run = tl.max(tl.where(m_list, began, 0), 0)
        origin = began // ALIGN * ALIGN

        tile = (start - origin) // TILE
        rest = (stop - origin) // TILE
        m_cut = (
            m_list & (tile == 0) & (rest > 0) & (began > origin)
        )  # a first tile that begins before its run
        own = tl.where(m_list, rest - tile, 0) - m_cut.to(tl.int32)
        place = fulls + tl.cumsum(own, 0) - own
        for i in range(0, tl.max(own, 0)):
            tl.store(p_full + place + i, origin + (tile + m_cut.to(tl.int32) + i) * TILE, mask=i < own)
        fulls += tl.sum(own, 0)

        low = tl.where(rest == 0, began - origin, 0)
        high = stop - origin - rest * TILE
        m_rest = m_ends & (high > low)
        left = m_cut.to(tl.int32) + m_rest.to(tl.int32)
        place = (rests + tl.cumsum(left, 0) - left) * 2
        tl.store(p_parts + place, origin, mask=m_cut)
        tl.store(p_parts + place + 1, began - origin + TILE * 65536, mask=m_cut)
        place += m_cut.to(tl.int32) * 2
        tl.store(p_parts + place, origin + rest * TILE, mask=m_rest)
        tl.store(p_parts + place + 1, low + high * 65536, mask=m_rest)
        rests += tl.sum(left, 0)
    tl.store(full_counts + number, fulls)
    tl.store(part_counts + number, rests)


def heads_by_work(work: Tensor, batch: int) -> Tensor:
    """Numbers of all heads of all batch elements, int32 `[batch · heads]`, those with most work first.

    Programs start in this order, so that the last ones are short: with the mixed heads of a plan and few tokens (FLUX
    at 1024 squared) that leaves 1-2 % of a GPU's places empty, where heads in the model's order leave 20-30 %
    (`dit_accel.kernels.balance`). Sorting the rows of all heads together gains no more, and would spread the heads over
    time: programs that run together should share keys and values in the L2 cache.

    Args:
        work: int32 `[batch or 1, heads, rows]`, key blocks or tiles of each row.
    """
    return work.sum(-1).expand(batch, -1).flatten().argsort(descending=True, stable=True).to(torch.int32)


def programs(index: BlockIndex, work: Tensor, tile: int) -> Tensor:
    """Which queries each program serves, in each head rows with most work first.

    Args:
        work: int32 `[batch or 1, heads, rows]`, key blocks or tiles of each row.
        tile: queries per program.

    Returns:
        int32 `[batch or 1, heads, programs, 3]`: row, its first query for this program, and the query behind the row's
        last. A program with nothing to do has three zeros.
    """
    rows, device = index.rows, work.device
    order = work.argsort(dim=-1, descending=True, stable=True)
    if index.query_starts is None:
        parts = torch.arange(0, index.block_q, tile, dtype=torch.int32, device=device)
        row = order.to(torch.int32)[..., None].expand(*order.shape, len(parts)).flatten(2)
        first = row * index.block_q
        start, stop = first + parts.repeat(rows), (first + index.block_q).clamp_(max=index.seq_q)
        # The last block may be shorter than its parts.
        return torch.stack((row, start, stop), dim=-1).masked_fill_((start >= stop)[..., None], 0)
    most = index.seq_q // tile + rows
    edges = index.query_starts.expand(*work.shape[:2], rows + 1)
    starts, stops = (part.gather(-1, order) for part in (edges[..., :-1], edges[..., 1:]))
    tiles = (stops - starts + (tile - 1)) // tile
    ends = tiles.cumsum(-1, dtype=torch.int32)
    number = torch.arange(most, dtype=torch.int32, device=device).expand(*work.shape[:2], most).contiguous()
    place = torch.searchsorted(ends, number, right=True)
    idle = place == rows
    place.clamp_(max=rows - 1)
    start = starts.gather(-1, place) + (number - (ends - tiles).gather(-1, place)) * tile
    found = torch.stack((order.gather(-1, place).to(torch.int32), start, stops.gather(-1, place)), dim=-1)
    return found.masked_fill_(idle[..., None], 0)
