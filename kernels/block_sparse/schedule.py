"""What each program of the attention kernel does: its queries, and the tiles of keys that its list comes to.

All of it is computed on the device from the lists, and its size from shapes alone, so that the host never waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex, starts_steps

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
        *starts_steps(starts),
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


def programs(index: BlockIndex, work: Tensor, tile: int) -> Tensor:
    """Which queries each program serves, in each head rows with most work first, equal ones as they stand.

    Args:
        work: int32 `[batch or 1, heads, rows]`, key blocks or tiles of each row, contiguous.
        tile: queries per program.

    Returns:
        int32 `[batch or 1, heads, programs, 3]`: row, its first query for this program, and the query behind the row's
        last. Where blocks vary in length some programs have nothing to do, and three zeros.
    """
    rows, starts = index.rows, index.query_starts
    if starts is None:
        parts = -(-index.block_q // tile)
        last = index.seq_q - (rows - 1) * index.block_q
        places = torch.empty(
            *work.shape[:2], (rows - 1) * parts - (-last // tile), 3, dtype=torch.int32, device=work.device
        )
    else:
        starts = starts.contiguous()
        places = torch.zeros(
            *work.shape[:2], index.seq_q // tile + rows, 3, dtype=torch.int32, device=work.device
        )
    _place_rows[(triton.cdiv(rows, _CHUNK), work.shape[0] * work.shape[1])](
        work,
        work if starts is None else starts,
        places,
        index.heads,
        rows,
        index.seq_q,
        index.block_q,
        places.shape[2],
        *starts_steps(starts),
        TILE=tile,
        CHUNK=_CHUNK,
        VARYING=starts is not None,
    )
    return places


@triton.jit
def _queries(starts, o_row, rows, seq_q, block_q, VARYING: tl.constexpr):
    """First query of each row, and the query behind its last."""
    m_row = o_row < rows
    if VARYING:
        start = tl.load(starts + o_row, mask=m_row, other=0)
        stop = tl.load(starts + o_row + 1, mask=m_row, other=0)
    else:
        start = tl.where(m_row, o_row * block_q, 0)
        stop = tl.where(m_row, tl.minimum(start + block_q, seq_q), 0)
    return start, stop


@triton.jit(
    do_not_specialize=["heads", "rows", "seq_q", "block_q", "programs_of_head", "batch_step", "head_step"]
)
def _place_rows(
    work,  # int32 [batch or 1, heads, rows]
    starts,  # int32 [batch or 1, heads or 1, rows + 1], read with VARYING
    places,  # int32 [batch or 1, heads, programs_of_head, 3]
    heads,
    rows,
    seq_q,
    block_q,
    programs_of_head,
    batch_step,  # 0 or the heads of starts
    head_step,  # 0 or 1
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    VARYING: tl.constexpr,
):
    """One program: CHUNK rows of one head, placed behind the programs of all rows that have more work."""
    number = tl.program_id(1).to(tl.int64)
    p_work = work + number * rows
    p_starts = starts + (number // heads * batch_step + number % heads * head_step) * (rows + 1)
    o_row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    b_work = tl.load(p_work + o_row, mask=o_row < rows, other=-1)
    start, stop = _queries(p_starts, o_row, rows, seq_q, block_q, VARYING)
    place = tl.zeros([CHUNK], tl.int32)
    for first in range(0, rows, CHUNK):
        o_other = first + tl.arange(0, CHUNK)
        b_other = tl.load(p_work + o_other, mask=o_other < rows, other=-1)
        begin, end = _queries(p_starts, o_other, rows, seq_q, block_q, VARYING)
        tiles = (end - begin + (TILE - 1)) // TILE
        m_before = b_other[None, :] > b_work[:, None]
        m_before |= (b_other[None, :] == b_work[:, None]) & (o_other[None, :] < o_row[:, None])
        place += tl.sum(tl.where(m_before, tiles[None, :], 0), 1)
    own = (stop - start + (TILE - 1)) // TILE
    p_place = places + (number * programs_of_head + place) * 3
    for i in range(0, tl.max(own, 0)):
        m_own = i < own
        tl.store(p_place + i * 3, o_row, mask=m_own)
        tl.store(p_place + i * 3 + 1, start + i * TILE, mask=m_own)
        tl.store(p_place + i * 3 + 2, stop, mask=m_own)


def kept_pairs(index: BlockIndex) -> Tensor:
    """Query-key pairs that each head keeps, int64 `[batch or 1, heads]`, of lists of equal key blocks."""
    counts, starts = index.counts.contiguous(), index.query_starts
    pairs = torch.empty(counts.shape[:2], dtype=torch.int64, device=counts.device)
    with torch.cuda.device_of(counts):
        _kept_pairs[(pairs.numel(),)](
            counts,
            index.offsets.contiguous(),
            index.indices,
            counts if starts is None else starts.contiguous(),
            pairs,
            index.heads,
            index.rows,
            index.cols,
            index.seq_q,
            index.seq_k,
            index.block_q,
            index.block_k,
            *starts_steps(starts),
            CHUNK=_CHUNK,
            VARYING=starts is not None,
        )
    return pairs


@triton.jit(
    do_not_specialize=[
        *("heads", "rows", "cols", "seq_q", "seq_k", "block_q", "block_k", "batch_step", "head_step"),
    ]
)
def _kept_pairs(
    counts,  # int32 [batch or 1, heads, rows]
    offsets,  # int64 like counts
    indices,  # int32 [total]
    starts,  # int32 [batch or 1, heads or 1, rows + 1], read with VARYING
    pairs,  # int64 [batch or 1, heads]
    heads,
    rows,
    cols,
    seq_q,
    seq_k,
    block_q,
    block_k,
    batch_step,  # 0 or the heads of starts
    head_step,  # 0 or 1
    CHUNK: tl.constexpr,
    VARYING: tl.constexpr,
):
    """One program: one head. Lists ascend, so only their last entry can be the short block."""
    number = tl.program_id(0).to(tl.int64)
    p_starts = starts + (number // heads * batch_step + number % heads * head_step) * (rows + 1)
    b_pairs = tl.zeros([CHUNK], tl.int64)
    for first in range(0, rows, CHUNK):
        o_row = first + tl.arange(0, CHUNK)
        m_row = o_row < rows
        count = tl.load(counts + number * rows + o_row, mask=m_row, other=0)
        last = tl.load(offsets + number * rows + o_row, mask=m_row, other=0) + count - 1
        block = tl.load(indices + last, mask=count > 0, other=0)
        missing = tl.where((count > 0) & (block == cols - 1), cols * block_k - seq_k, 0)
        start, stop = _queries(p_starts, o_row, rows, seq_q, block_q, VARYING)
        b_pairs += (stop - start).to(tl.int64) * (count * block_k - missing)
    tl.store(pairs + number, tl.sum(b_pairs, 0))


def heads_by_work(work: Tensor, batch: int) -> Tensor:
    """Numbers of all heads of all batch elements, int32 `[batch · heads]`, those with most work first.

    Programs start in this order, so that the last ones are short: with the mixed heads of a plan and few tokens (FLUX
    at 1024 squared) that leaves 1-2 % of a GPU's places empty, where heads in the model's order leave 20-30 %
    (`dit_accel.kernels.balance`). Sorting the rows of all heads together gains no more, and would spread the heads over
    time: programs that run together should share keys and values in the L2 cache.

    Args:
        work: int32 `[batch or 1, heads, rows]`, key blocks or tiles of each row.
    """
    totals = work.sum(-1)
    launched = batch * work.shape[1]
    order = torch.empty(launched, dtype=torch.int32, device=work.device)
    _order_heads[(triton.cdiv(launched, _CHUNK),)](totals, order, totals.numel(), launched, CHUNK=_CHUNK)
    return order


@triton.jit(do_not_specialize=["lists", "launched"])
def _order_heads(
    totals,  # int64 [lists], repeated for every batch element if that is fewer than launched
    order,  # int32 [launched]
    lists,
    launched,
    CHUNK: tl.constexpr,
):
    """One program: CHUNK heads, placed behind all that have more work."""
    o_head = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    b_total = tl.load(totals + o_head % lists, mask=o_head < launched, other=-1)
    place = tl.zeros([CHUNK], tl.int32)
    for first in range(0, launched, CHUNK):
        o_other = first + tl.arange(0, CHUNK)
        b_other = tl.load(totals + o_other % lists, mask=o_other < launched, other=-1)
        m_before = b_other[None, :] > b_total[:, None]
        m_before |= (b_other[None, :] == b_total[:, None]) & (o_other[None, :] < o_head[:, None])
        place += tl.sum(m_before.to(tl.int32), 1)
    tl.store(order + place, o_head, mask=o_head < launched)
