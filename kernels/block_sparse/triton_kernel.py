"""Block-sparse attention as one Triton launch over ragged block lists, in native precision, INT8 and FP8.

The softmax runs online in base 2. With E4M3 values the weights of a tile are `exp2(logit − max + log2 448)`, with the
exact maximum so far: the largest weight is then the largest E4M3 number and nothing is clipped, and weights down to
2⁻¹⁷ of it survive. Numerator and denominator use the same rounded weights, so values of 1 give 1.

Blocks of varying length (clusters) arrive as lists of tiles, see `schedule.py`: full ones, then those at the edges.

With a remainder, a row that has read its list goes on over the mean keys of all blocks, tile by tile, and masks those
whose block it has read: the same softmax step, with log2(tokens) added to the logits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.block_sparse.schedule import heads_by_work, key_tiles, programs
from dit_accel.kernels.prepare import LOG2E, Prepared

LOG2_448 = tl.constexpr(math.log2(448.0))

# Names: o_ offsets, m_ masks, p_ pointers, b_ values held in registers.


@triton.jit
def _scores(b_q, b_k, INT8: tl.constexpr):
    if INT8:
        b_s = tl.dot(b_q, b_k, out_dtype=tl.int32).to(tl.float32)
    else:
        b_s = tl.dot(b_q, b_k, input_precision="ieee")
    return b_s


@triton.jit
def _accumulate(
    b_s, b_factor, b_v, b_acc, b_max, b_sum, GUARD: tl.constexpr, FP8_V: tl.constexpr, TILE_K: tl.constexpr
):
    """One online-softmax step: b_s [TILE_Q, TILE_K] times b_factor [TILE_Q] > 0 are base-2 logits."""
    b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * b_factor)
    b_shift = b_max_new
    if GUARD:
        # All keys so far may be masked: exp2(-inf - 0) is 0 where exp2(-inf + inf) is NaN.
        b_shift = tl.where(b_max_new == -float("inf"), 0.0, b_max_new)
    b_rescale = tl.exp2(b_max - b_shift)
    b_acc = b_acc * b_rescale[:, None]
    if FP8_V:
        b_p = tl.exp2(b_s * b_factor[:, None] - (b_shift - LOG2_448)[:, None]).to(tl.float8e4nv)
        b_sum = b_sum * b_rescale + tl.sum(b_p.to(tl.float32), 1)
        # Hopper adds up FP8 products in fewer bits than float32: not further than through one tile.
        b_acc = tl.dot(b_p, b_v, b_acc, max_num_imprecise_acc=TILE_K)
    else:
        b_p = tl.exp2(b_s * b_factor[:, None] - b_shift[:, None])
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_acc, b_max_new, b_sum


@triton.jit
def _load_tile(
    p_k, p_v, o_k, o_v, m_k, m_v, m_d, MASKED: tl.constexpr, FP8_V: tl.constexpr, PAD_D: tl.constexpr
):
    """Keys [TILE_D, TILE_K] and values [TILE_K, TILE_D] of the tile at p_k, p_v; m_d masks padded head dims.

    m_k tells which keys are there, m_v also which may be read: logits are masked, but not what 0 is multiplied by.

    The offsets inside a tile, o_k and o_v, are small and the same for all tiles; only the two pointers are 64 bits.
    E4M3 values need no mask of keys: what may not be read is 0 (`prepare`), up to a tile past the end. Since their
    tokens are contiguous, such a mask would have single bytes loaded, which no copy in the background does.
    """
    if MASKED:
        b_k = tl.load(p_k + o_k, mask=m_k[None, :] & m_d[:, None], other=0.0)
    elif PAD_D:
        b_k = tl.load(p_k + o_k, mask=m_d[:, None], other=0.0)
    else:
        b_k = tl.load(p_k + o_k)
    if MASKED and not FP8_V:
        b_v = tl.load(p_v + o_v, mask=m_v[:, None] & m_d[None, :], other=0.0)
    elif PAD_D:
        b_v = tl.load(p_v + o_v, mask=m_d[None, :], other=0.0)
    else:
        b_v = tl.load(p_v + o_v)
    return b_k, b_v


@triton.jit
def _masked_tile(
    p_list,
    p_parts,
    i,
    count,
    tiles,
    HAS_VALID: tl.constexpr,
    VARYING: tl.constexpr,
    TILES_K: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Tile i of those with a mask: its block, or with VARYING its first key and the keys of it that count."""
    if VARYING:
        p_part = p_parts + (i - count) * 2
        is_part = (i >= count) & (i < tiles)
        entry = tl.load(p_part, mask=is_part, other=0)
        bounds = tl.load(p_part + 1, mask=is_part, other=TILE_K * 65536)
        if HAS_VALID:  # full tiles come here too
            entry += tl.load(p_list + i, mask=i < count, other=0)
    else:
        entry = tl.load(p_list + i // TILES_K, mask=i < tiles, other=0)
        bounds = entry  # not used
    return entry, bounds


# Lengths change with every resolution, heads of a launch with every layer of a plan: neither must compile anew.
@triton.jit(
    do_not_specialize=[
        *("seq_q", "seq_k", "heads", "rows", "cols", "groups", "words", "programs_of_head"),
        *("most_full", "most_parts", "stride_index", "stride_programs", "order_b", "order_h"),
        *("stride_bias_b", "stride_bias_h", "stride_validb", "stride_validh"),
    ]
)
def block_sparse_forward(
    q,  # [batch, heads, seq_q, dim], in the model's order
    k,  # [batch, heads, seq_k, dim]
    v,  # [batch, heads, seq_k, dim]
    out,  # [batch, seq_q, heads, dim], in the model's order
    lse,  # float32 [batch, heads, seq_q], in the model's order
    q_scale,  # float32 [batch, heads, seq_q], in the model's order, read with QUANTISED
    k_scale,  # float32 [batch, heads, groups], read with QUANTISED
    v_scale,  # float32 [batch, heads, dim], read with FP8_V
    lse_shift,  # float32 [batch, heads, seq_q], in the model's order, read with SHIFTED
    valid,  # bool [batch, heads or 1, seq_k], read with HAS_VALID
    mean_k,  # [batch, heads, cols, dim], contiguous, this and the next three read with REMAINDER
    mean_v,  # [batch, heads, cols, dim], heads and batches back to back
    mean_scale,  # float32 [batch, heads, cols], read with QUANTISED
    mean_bias,  # float32 [batch or 1, heads or 1, cols]
    read,  # int32 [batch or 1, heads, rows, words], bit c % 32 of word c // 32: block c is in the row's list
    query_order,  # int64 [batch or 1, heads or 1, seq_q], read with ORDERED
    head_order,  # int32 [batch * heads]: batch element * heads + head, in the order of launch
    programs,  # int32 [batch or 1, heads, programs_of_head, 3]: row, first query, query behind the row
    counts,  # int32 [batch or 1, heads, rows], of full tiles with VARYING
    offsets,  # int64 [batch or 1, heads, rows]
    indices,  # int32 [total]
    full,  # int32 [batch or 1, heads, rows, most_full], this and the next two read with VARYING
    part_counts,  # int32 [batch or 1, heads, rows]
    parts,  # int32 [batch or 1, heads, rows, most_parts, 2]
    scale_log2,
    seq_q,
    seq_k,
    heads,
    rows,
    cols,
    groups,
    words,
    programs_of_head,
    most_full,
    most_parts,
    stride_index,
    stride_programs,
    order_b,
    order_h,
    stride_bias_b,
    stride_bias_h,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_ob,
    stride_os,
    stride_oh,
    stride_od,
    stride_validb,
    stride_validh,
    stride_meanh,
    stride_means,
    stride_meand,
    DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_MEANS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    QUANTISED: tl.constexpr,
    INT8: tl.constexpr,
    FP8_V: tl.constexpr,
    SHIFTED: tl.constexpr,
    ORDERED: tl.constexpr,
    REMAINDER: tl.constexpr,
    VARYING: tl.constexpr,
):
    """One program: TILE_Q queries of one row, one head, one batch element, over that row's list."""
    TILES_K: tl.constexpr = (BLOCK_K + TILE_K - 1) // TILE_K
    PAD_D: tl.constexpr = DIM != TILE_D
    # Without a key mask only the last block of a list can be short, so only its tiles need a mask.
    MASK_ALL: tl.constexpr = HAS_VALID or (BLOCK_K % TILE_K != 0 and not VARYING)

    number = tl.load(head_order + tl.program_id(1))
    batch = (number // heads).to(tl.int64)
    head = (number % heads).to(tl.int64)
    o_head = batch * heads + head
    p_lists = batch * stride_index + head * rows
    p_program = programs + (batch * stride_programs + head * programs_of_head + tl.program_id(0)) * 3
    row = tl.load(p_program)
    first_q = tl.load(p_program + 1)
    stop_q = tl.load(p_program + 2)
    count = tl.where(first_q < stop_q, tl.load(counts + p_lists + row), 0)

    o_q = (first_q + tl.arange(0, TILE_Q)).to(tl.int64)
    m_q = o_q < stop_q
    o_in = o_q
    if ORDERED:
        o_in = tl.load(query_order + batch * order_b + head * order_h + o_q, mask=m_q, other=0)
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < DIM
    o_tile = tl.arange(0, TILE_K)

    p_k = k + batch * stride_kb + head * stride_kh
    p_v = v + batch * stride_vb + head * stride_vh
    o_k = o_tile[None, :] * stride_ks + o_d[:, None] * stride_kd
    o_v = o_tile[:, None] * stride_vs + o_d[None, :] * stride_vd
    p_valid = valid + batch * stride_validb + head * stride_validh

    # [TILE_Q, TILE_D]
    b_q = tl.load(
        q + batch * stride_qb + head * stride_qh + o_in[:, None] * stride_qs + o_d[None, :] * stride_qd,
        mask=m_q[:, None] & m_d[None, :],
        other=0.0,
    )
    b_scale = tl.full([TILE_Q], scale_log2, tl.float32)
    if QUANTISED:
        b_scale = tl.load(q_scale + o_head * seq_q + o_in, mask=m_q, other=1.0)
    b_max = tl.full([TILE_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([TILE_Q], tl.float32)
    b_acc = tl.zeros([TILE_Q, TILE_D], tl.float32)

    if VARYING:
        p_list = full + (p_lists + row) * most_full
        p_parts = parts + (p_lists + row) * most_parts * 2
        unmasked = count
        tiles = count + tl.where(first_q < stop_q, tl.load(part_counts + p_lists + row), 0)
    else:
        p_list, p_parts = indices + tl.load(offsets + p_lists + row), parts
        tiles = count * TILES_K
        unmasked = tl.maximum(tiles - TILES_K, 0)
    if MASK_ALL:
        unmasked = 0
    # The list is read a turn ahead: keys whose address is loaded in the same turn would not be copied turns ahead.
    entry = tl.load(p_list, mask=unmasked > 0, other=0)
    for i in range(0, unmasked):
        if VARYING:
            start = entry
            if FP8_V:  # as it is; a hint does not reach what a loop carries
                start = entry // 16 * 16
            entry = tl.load(p_list + i + 1, mask=i + 1 < unmasked, other=0)
        else:
            start = entry * BLOCK_K + i % TILES_K * TILE_K
            entry = tl.load(p_list + (i + 1) // TILES_K)  # one more block follows these
        p_tile_k, p_tile_v = p_k + start.to(tl.int64) * stride_ks, p_v + start.to(tl.int64) * stride_vs
        b_k, b_v = _load_tile(p_tile_k, p_tile_v, o_k, o_v, m_d, m_d, m_d, False, FP8_V, PAD_D)
        b_s = _scores(b_q, b_k, INT8)
        b_factor = b_scale
        if QUANTISED:
            if VARYING:
                b_s = b_s * tl.load(k_scale + o_head * groups + start + o_tile)[None, :]
            else:
                b_factor = b_scale * tl.load(k_scale + o_head * groups + start // GROUP)
        b_acc, b_max, b_sum = _accumulate(b_s, b_factor, b_v, b_acc, b_max, b_sum, False, FP8_V, TILE_K)
    entry, bounds = _masked_tile(p_list, p_parts, unmasked, count, tiles, HAS_VALID, VARYING, TILES_K, TILE_K)
    for i in range(unmasked, tiles):
        if VARYING:
            start = entry
            if FP8_V:
                start = entry // 16 * 16
            m_k = (o_tile >= bounds % 65536) & (o_tile < bounds // 65536)
        else:
            start = entry * BLOCK_K + i % TILES_K * TILE_K
            m_k = start + o_tile < tl.minimum(seq_k, entry * BLOCK_K + BLOCK_K)
        entry, bounds = _masked_tile(
            p_list, p_parts, i + 1, count, tiles, HAS_VALID, VARYING, TILES_K, TILE_K
        )
        m_there = m_k
        if HAS_VALID:
            m_k = m_k & (tl.load(p_valid + start + o_tile, mask=m_k, other=0) != 0)
        p_tile_k, p_tile_v = p_k + start.to(tl.int64) * stride_ks, p_v + start.to(tl.int64) * stride_vs
        b_k, b_v = _load_tile(p_tile_k, p_tile_v, o_k, o_v, m_there, m_k, m_d, True, FP8_V, PAD_D)
        b_s = _scores(b_q, b_k, INT8)
        b_factor = b_scale
        if QUANTISED and VARYING:
            b_s = b_s * tl.load(k_scale + o_head * groups + start + o_tile, mask=m_there, other=1.0)[None, :]
        b_s = tl.where(m_k[None, :], b_s, -float("inf"))
        if QUANTISED and not VARYING:
            # A tile past the last group holds no key.
            group = tl.minimum(start // GROUP, groups - 1)
            b_factor = b_scale * tl.load(k_scale + o_head * groups + group)
        b_acc, b_max, b_sum = _accumulate(b_s, b_factor, b_v, b_acc, b_max, b_sum, HAS_VALID, FP8_V, TILE_K)
    if REMAINDER:
        p_read = read + (p_lists + row) * words
        p_bias = mean_bias + batch * stride_bias_b + head * stride_bias_h
        p_mean_k = mean_k + o_head * cols * DIM
        p_mean_v = mean_v + o_head * stride_meanh
        o_mean = tl.arange(0, TILE_MEANS)
        o_mean_k = o_mean[None, :] * DIM + o_d[:, None]
        o_mean_v = o_mean[:, None] * stride_means + o_d[None, :] * stride_meand
        b_one = tl.full([TILE_Q], 1.0, tl.float32)
        means = tl.where(first_q < stop_q, cols, 0)
        if not VARYING:  # a list of all blocks leaves none out
            means = tl.where(count < cols, means, 0)
        for first in range(0, means, TILE_MEANS):
            o_c = first + o_mean
            m_c = o_c < cols
            p_tile_k, p_tile_v = p_mean_k + first * DIM, p_mean_v + first * stride_means
            b_k, b_v = _load_tile(p_tile_k, p_tile_v, o_mean_k, o_mean_v, m_c, m_c, m_d, True, FP8_V, PAD_D)
            b_s = _scores(b_q, b_k, INT8) * b_scale[:, None]
            if QUANTISED:
                b_s = b_s * tl.load(mean_scale + o_head * cols + o_c, mask=m_c, other=0.0)[None, :]
            # Only logits are told which blocks were read: a load that waits for another one is not made turns ahead.
            bits = tl.load(p_read + o_c // 32, mask=m_c, other=0)
            b_bias = tl.load(p_bias + o_c, mask=m_c, other=-float("inf"))
            b_s = b_s + tl.where((bits >> (o_c % 32)) & 1 == 0, b_bias, -float("inf"))[None, :]
            b_acc, b_max, b_sum = _accumulate(b_s, b_one, b_v, b_acc, b_max, b_sum, True, FP8_V, TILE_MEANS)

    # A query without keys has b_max = -inf and b_sum = 0: output 0, lse -inf.
    b_total = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_acc / b_total[:, None]
    b_lse = b_max + tl.log2(b_total)
    if FP8_V:
        b_out = b_out * tl.load(v_scale + o_head * DIM + o_d, mask=m_d, other=0.0)[None, :]
        b_lse = b_lse - LOG2_448
    o_out = o_q
    if ORDERED:
        # Once more, rather than kept in registers all the way; volatile, so that it is not taken for the same.
        o_out = (tl.load(p_program + 1, volatile=True) + tl.arange(0, TILE_Q)).to(tl.int64)
        m_q = o_out < stop_q
        o_out = tl.load(query_order + batch * order_b + head * order_h + o_out, mask=m_q, other=0)
    LN2: tl.constexpr = 0.6931471805599453
    b_lse = b_lse * LN2
    if SHIFTED:
        b_lse = b_lse + tl.load(lse_shift + o_head * seq_q + o_out, mask=m_q, other=0.0)
    p_out = out + batch * stride_ob + head * stride_oh
    tl.store(
        p_out + o_out[:, None] * stride_os + o_d[None, :] * stride_od,
        b_out.to(out.dtype.element_ty),
        mask=m_q[:, None] & m_d[None, :],
    )
    tl.store(lse + o_head * seq_q + o_out, b_lse, mask=m_q)


@triton.jit(do_not_specialize=["words"])
def _mark_read(read, counts, offsets, indices, words, TILE: tl.constexpr):
    """Set the bit of every block in one row's list; read [lists, words] starts as 0."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    p_list = indices + tl.load(offsets + row)
    for first in range(0, count, TILE):
        o_list = first + tl.arange(0, TILE)
        m_list = o_list < count
        block = tl.load(p_list + o_list, mask=m_list, other=0)
        tl.atomic_or(read + row * words + block // 32, 1 << (block % 32), mask=m_list)


@dataclass(frozen=True)
class Chip:
    """What tile sizes depend on.

    Attributes:
        shared: bytes of shared memory that a program may use.
        lanes: threads of a warp.
        from_shared: whether matrix products read their operands from shared memory, as on Hopper and on Blackwell's
            data center chips; elsewhere these take registers too.
    """

    shared: int
    lanes: int = 32
    from_shared: bool = True


HOPPER = Chip(227 << 10)


def launch_options(
    dim: int,
    block_q: int,
    block_k: int,
    key_bytes: int,
    value_bytes: int,
    chip: Chip,
    *,
    varying: bool = False,
    remainder: bool = False,
    masked: bool = False,
) -> dict[str, int]:
    """Tile sizes, warps and stages: the largest that compile without spilling and fit the shared memory.

    32-bit inputs run on the plain FMA units, one thread's share of the tile must stay small. 8-bit products need 32
    head dims and, where values are 8-bit too, 32 keys.

    Args:
        key_bytes, value_bytes: per element.
        varying: whether blocks of keys vary in length.
        remainder: whether means stand for the blocks that are left out.
        masked: whether some keys may not be read.
    """
    least = 32 if key_bytes == 1 else 16
    tile_d = max(least, triton.next_power_of_2(dim))
    if max(key_bytes, value_bytes) == 4:
        tile_q, tile_k, warps, stages = 32, 32, 8, 2
    elif tile_d > 128:
        tile_q, tile_k, warps, stages = 64, 32, 8, 2
    elif block_q > 64:
        tile_q, tile_k, warps, stages = 128, 64, 8, 3
    else:
        tile_q, tile_k, warps, stages = 64, 64, 4, 3
    if value_bytes == 1 and tile_d == 128:
        # Tiles of half the bytes leave room for more of them in flight. Beside partial sums of FP8 products a scale per
        # key finds no registers. With masks and means 3 and 4 stages spill a few bytes, 5 do not.
        tile_k, stages = (32, 3) if varying else (tile_k, 5 if masked and remainder else 4)
    if tile_d == 128 and not chip.from_shared and (varying or (remainder and key_bytes > 1)):
        # Nor does what these loops hold beside both operands and a long row of output.
        tile_k = 32
    tile_q = min(tile_q, max(16, triton.next_power_of_2(block_q)))
    tile_k = min(tile_k, max(least, triton.next_power_of_2(block_k)))
    # Long rows of output, or partial sums beside it, leave registers for half a tile of scores of means, or less.
    tile_means = min(tile_k, 32) if value_bytes == 1 or (tile_d > 64 and key_bytes > 1) else tile_k
    if tile_d == 128 and not chip.from_shared and key_bytes < value_bytes and not varying:
        tile_means = 16
    if chip.lanes == 64 and tile_d == 128 and varying:
        tile_means = 16
    if chip.lanes == 64 and key_bytes == 1:
        # What is on its way there waits in registers.
        stages = min(stages, 2)
    stage = tile_k * tile_d * (key_bytes + value_bytes)
    while stages > 1 and tile_q * tile_d * key_bytes + stages * stage > chip.shared:
        stages -= 1
    return {
        "TILE_D": tile_d,
        "TILE_Q": tile_q,
        "TILE_K": tile_k,
        "TILE_MEANS": tile_means,
        # As many threads, or half as many where they fill a warp of twice the size: these have more registers each.
        "num_warps": max(4, warps * 32 // chip.lanes),
        "num_stages": stages,
    }


@functools.lru_cache(maxsize=64)
def chip_of(device: torch.device) -> Chip:
    """The chip of a device; Hopper where there is no GPU to ask."""
    if device.type != "cuda":
        return HOPPER
    number = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(number)["max_shared_mem"]
    properties = torch.cuda.get_device_properties(number)
    from_shared = torch.version.hip is None and properties.major in (9, 10)
    return Chip(shared, properties.warp_size, from_shared)


def attention(
    prepared: Prepared, index: BlockIndex, scale: float, query_order: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        prepared: by `prepare_triton.prepare`, queries in the model's order; head dims up to 256, any strides.
        query_order: int64 `[1 or batch, 1 or heads, seq_q]`, the order that the lists speak of; queries are read and
            rows are written through it.
        dtype: of the output.

    Returns:
        `[batch, seq_q, heads, dim]` and float32 `[batch, heads, seq_q]`, in the model's order.
    """
    p, means = prepared, prepared.means
    batch, heads, seq_q, dim = p.query.shape
    device = p.query.device
    output = torch.empty(batch, seq_q, heads, dim, dtype=dtype, device=device)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=device)
    sizes = p.key.element_size(), p.value.element_size()
    varying = index.key_starts is not None
    options = launch_options(
        dim,
        index.block_q,
        index.block_k,
        *sizes,
        chip_of(device),
        varying=varying,
        remainder=means is not None,
        masked=p.valid is not None,
    )
    counts, offsets = index.counts.contiguous(), index.offsets.contiguous()
    unused = counts
    tiles = None
    if varying:
        # 8-bit values are stored by channel and read 16 at a time.
        tiles = key_tiles(index, options["TILE_K"], 16 if p.value_scale is not None else 1)
    work = counts if tiles is None else tiles.full_counts + tiles.part_counts
    launched = programs(index, work, options["TILE_Q"])
    words = triton.cdiv(index.cols, 32)
    read = unused
    if means is not None:
        read = torch.zeros(*counts.shape, words, dtype=torch.int32, device=device)
        _mark_read[(counts.numel(),)](read, counts, offsets, index.indices, words, TILE=64)

    def given(tensor: Tensor | None) -> Tensor:
        return unused if tensor is None else tensor

    def steps(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
        """Strides along the leading dims, 0 where a tensor is shared."""
        if tensor is None:
            return (0,) * dims
        return tuple(tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in range(dims))

    order = None if query_order is None else query_order.contiguous()
    block_sparse_forward[(launched.shape[2], batch * heads)](
        p.query,
        p.key,
        p.value,
        output,
        lse,
        given(p.query_scale),
        given(p.key_scale),
        given(p.value_scale),
        given(p.lse_shift),
        given(p.valid),
        given(None if means is None else means.key),
        given(None if means is None else means.value),
        given(None if means is None else means.key_scale),
        given(None if means is None else means.bias),
        read,
        given(order),
        heads_by_work(work, batch),
        launched,
        counts if tiles is None else tiles.full_counts,
        offsets,
        index.indices,
        given(None if tiles is None else tiles.full),
        given(None if tiles is None else tiles.part_counts),
        given(None if tiles is None else tiles.parts),
        scale * LOG2E,
        seq_q,
        index.seq_k,
        heads,
        index.rows,
        index.cols,
        0 if p.key_scale is None else p.key_scale.shape[2],
        words,
        launched.shape[2],
        0 if tiles is None else tiles.full.shape[-1],
        0 if tiles is None else tiles.parts.shape[-2],
        0 if index.batch == 1 else heads * index.rows,
        0 if index.batch == 1 else heads * launched.shape[2],
        *steps(order, 2),
        *steps(None if means is None else means.bias, 2),
        *p.query.stride(),
        *p.key.stride(),
        *p.value.stride(),
        *output.stride(),
        *steps(p.valid, 2),
        *((0, 0, 0) if means is None else means.value.stride()[1:]),
        DIM=dim,
        BLOCK_K=index.block_k,
        GROUP=p.group,
        HAS_VALID=p.valid is not None,
        QUANTISED=p.query_scale is not None,
        INT8=p.query.dtype == torch.int8,
        FP8_V=p.value_scale is not None,
        SHIFTED=p.lse_shift is not None,
        ORDERED=order is not None,
        REMAINDER=means is not None,
        VARYING=tiles is not None,
        # Triton 3.10 turns this off by default; the softmax counts on fused multiply-adds for speed.
        enable_fp_fusion=True,
        **options,
    )
    return output, lse
