"""Block mass in Triton: one kernel for tokens, for runs of tokens and for tokens in 4 bits.

A program holds a tile of queries and goes over all keys, twice unless the log-sum-exp is given. Blocks and tiles have
sizes of their own: where a block is smaller than a tile, a tile holds several, each padded to a power of two; where it
is larger, several tiles share it, and their parts of its mass are added up afterwards, always in the same order.

Runs: the score of two runs is a product over stride · dim features. The kernel reads these piece by piece out of the
plain tensors, so nothing is copied. Means of runs are computed first, and go in as the tokens that stand for them.

4 bits: byte j of a token holds feature j in its low half and feature j + dim/2 in its high half. `byte << 4` and
`byte & 0xF0` are 16 times the two as INT8: no sign to extend, and the factor goes into the scale.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.triton_kernel import chip_of
from dit_accel.kernels.prepare import LOG2E, TINY

LOG2E_ = tl.constexpr(LOG2E)
LN2_ = tl.constexpr(1 / LOG2E)

# Names: o_ offsets, m_ masks, p_ pointers, b_ values held in registers.


@triton.jit
def _unpack(b_packed):
    """16 times the numbers in the low and in the high halves, both INT8."""
    return (b_packed << 4).to(tl.int8), (b_packed & -16).to(tl.int8)


@triton.jit
def _tile_logits(
    p_q,
    p_k,
    p_scale,
    p_bias,
    b_q,
    b_q_high,
    b_scale,
    o_q,
    o_tile,
    m_tile,
    start,
    seq_q,
    seq_k,
    stride_qs,
    stride_qd,
    stride_ks,
    stride_kd,
    DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    STREAMED: tl.constexpr,
    GROUP: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Base-2 logits [TILE_Q, TILE_K] of the keys at start + o_tile, -inf where there is none.

    Queries are b_q, with the high halves b_q_high if GROUP; if they are STREAMED, the tokens o_q behind p_q.
    """
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < DIM
    PIECES: tl.constexpr = (DIM + TILE_D - 1) // TILE_D
    m_k = m_tile & (start + o_tile < (seq_k + MEMBERS - 1) // MEMBERS)
    # Keys that are there but may not be read are loaded all the same: a load that waits for the bias comes late.
    b_bias = tl.where(m_k, 0.0, -float("inf"))
    if BIASED:
        b_bias = tl.load(p_bias + start + o_tile, mask=m_k, other=-float("inf"))
    m_read = b_bias > -float("inf")
    p_tile = p_k + start.to(tl.int64) * (MEMBERS * stride_ks)
    if STREAMED:
        b_s = tl.zeros([TILE_Q, TILE_K], tl.float32)
        for i in range(MEMBERS * PIECES):
            # Opposite directions; missing queries are the last one repeated, missing keys are zeros.
            member = i // PIECES
            o_query = tl.minimum(o_q + (MEMBERS - 1 - member), seq_q - 1)
            o_key = o_tile * MEMBERS + member
            m_key = m_k & (start * MEMBERS + o_key < seq_k)
            o_piece = i % PIECES * TILE_D + o_d
            m_piece = o_piece < DIM
            # [TILE_Q, TILE_D], [TILE_D, TILE_K]
            b_q_piece = tl.load(
                p_q + o_query[:, None] * stride_qs + o_piece[None, :] * stride_qd,
                mask=m_piece[None, :],
                other=0.0,
            )
            b_k = tl.load(
                p_tile + o_key[None, :] * stride_ks + o_piece[:, None] * stride_kd,
                mask=m_key[None, :] & m_piece[:, None],
                other=0.0,
            )
            b_s = tl.dot(b_q_piece, b_k, b_s, input_precision="ieee")
        if MEMBERS > 1:
            # The mean over the keys whose number the bias tells.
            b_s = b_s * tl.exp2(tl.where(m_read, -b_bias, 0.0))[None, :]
    else:
        # [TILE_D, TILE_K]
        b_k = tl.load(
            p_tile + o_tile[None, :] * stride_ks + o_d[:, None] * stride_kd,
            mask=m_k[None, :] & m_d[:, None],
            other=0,
        )
        if GROUP:
            b_k_low, b_k_high = _unpack(b_k)
            b_products = tl.dot(b_q, b_k_low, out_dtype=tl.int32)
            b_products = tl.dot(b_q_high, b_k_high, b_products, out_dtype=tl.int32)
            b_k_scale = tl.load(p_scale + (start + o_tile) // GROUP, mask=m_k, other=0.0)
            b_s = b_products.to(tl.float32) * b_k_scale[None, :]
        else:
            b_s = tl.dot(b_q, b_k, input_precision="ieee")
    return tl.where(m_read[None, :], b_s * b_scale[:, None] + b_bias[None, :], -float("inf"))


# Sequence lengths change with every resolution and must not compile anew.
@triton.jit(
    do_not_specialize=[
        *("seq_q", "seq_k", "queries", "heads", "rows", "cols", "groups"),
        *("order_b", "order_h", "stride_bias_b", "stride_bias_h"),
    ]
)
def block_mass_forward(
    q,  # [batch, heads, seq_q, dim], with GROUP int8 [batch, heads, seq_q, ceil(dim / 2)]
    k,  # as q
    mass,  # float32 [batch, heads, rows, tiles per row, cols, tiles per col]
    lse,  # float32 [batch, heads, seq_q], in the model's order, read with GIVEN, written with STORED
    q_scale,  # float32 [batch, heads, seq_q], read with GROUP
    k_scale,  # float32 [batch, heads, groups], read with GROUP
    bias,  # float32 [batch or 1, heads or 1, ceil(seq_k / MEMBERS)], log2(valid keys), read with BIASED
    query_order,  # int64 [batch or 1, heads or 1, seq_q], read with ORDERED
    scale_log2,
    seq_q,
    seq_k,
    queries,  # tokens that q holds or stands for
    heads,
    rows,
    cols,
    groups,
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
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # runs of RUN tokens per block
    BLOCK_K: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    ROWS: tl.constexpr,  # row blocks in a tile, whose share of it is PART_Q >= BLOCK_Q, or 1
    COLS: tl.constexpr,
    MEMBERS: tl.constexpr,  # tokens of q and k in a run
    RUN: tl.constexpr,  # tokens that a run of queries stands for
    GROUP: tl.constexpr,  # keys that share a scale, 0 unless quantised
    BIASED: tl.constexpr,
    GIVEN: tl.constexpr,
    STORED: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """One program: TILE_Q queries of one head of one batch element, all keys."""
    PART_Q: tl.constexpr = TILE_Q // ROWS
    PART_K: tl.constexpr = TILE_K // COLS
    TILES_Q: tl.constexpr = (BLOCK_Q + PART_Q - 1) // PART_Q
    TILES_K: tl.constexpr = (BLOCK_K + PART_K - 1) // PART_K
    # Queries that do not stay in registers are read again for every tile of keys.
    STREAMED: tl.constexpr = MEMBERS > 1 or DIM > TILE_D

    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    o_head = batch * heads + head
    row = tl.program_id(0) // TILES_Q * ROWS
    part_q = tl.program_id(0) % TILES_Q

    o_in_q = tl.arange(0, TILE_Q)
    o_in_row = part_q * PART_Q + o_in_q % PART_Q
    o_q = (row + o_in_q // PART_Q) * BLOCK_Q + o_in_row
    # Real queries that each run has.
    b_weight = tl.minimum(tl.maximum(queries - o_q * RUN, 0), RUN)
    b_weight = tl.where(o_in_row < BLOCK_Q, b_weight, 0).to(tl.float32)
    m_q = b_weight > 0.0

    o_in_k = tl.arange(0, TILE_K)
    o_tile = o_in_k // PART_K * BLOCK_K + o_in_k % PART_K
    p_q = q + batch * stride_qb + head * stride_qh
    p_k = k + batch * stride_kb + head * stride_kh
    p_scale = k_scale + o_head * groups
    p_bias = bias + batch * stride_bias_b + head * stride_bias_h
    b_q = 0
    b_q_high = 0
    b_scale = tl.full([TILE_Q], scale_log2, tl.float32)
    if not STREAMED:
        o_d = tl.arange(0, TILE_D)
        # [TILE_Q, TILE_D]
        b_q = tl.load(
            p_q + o_q.to(tl.int64)[:, None] * stride_qs + o_d[None, :] * stride_qd,
            mask=m_q[:, None] & (o_d < DIM)[None, :],
            other=0,
        )
        if GROUP:
            b_q, b_q_high = _unpack(b_q)
            b_scale = b_scale * tl.load(q_scale + o_head * seq_q + o_q, mask=m_q, other=0.0)
    # Far offsets in the pointer, so that those inside the tile stay small; the last query may lie before it.
    first = row * (BLOCK_Q * MEMBERS)
    p_q += first.to(tl.int64) * stride_qs
    o_members = o_q * MEMBERS - first

    p_lse = lse + o_head * seq_q
    o_out = o_q.to(tl.int64)
    if ORDERED:
        o_out = tl.load(query_order + batch * order_b + head * order_h + o_q, mask=m_q, other=0)
    tiles = (cols + COLS - 1) // COLS * TILES_K
    if GIVEN:
        b_lse = tl.load(p_lse + o_out, mask=m_q, other=0.0) * LOG2E_
    else:
        b_max = tl.full([TILE_Q], -float("inf"), tl.float32)
        b_sum = tl.zeros([TILE_Q], tl.float32)
        for i in range(0, tiles):
            in_col = i % TILES_K * PART_K
            b_s = _tile_logits(
                *(p_q, p_k, p_scale, p_bias, b_q, b_q_high, b_scale, o_members, o_tile),
                *(in_col + o_in_k % PART_K < BLOCK_K, i // TILES_K * (COLS * BLOCK_K) + in_col),
                *(seq_q - first, seq_k, stride_qs, stride_qd, stride_ks, stride_kd),
                *(DIM, TILE_D, TILE_Q, TILE_K, MEMBERS, STREAMED, GROUP, BIASED),
            )
            b_max_new = tl.maximum(b_max, tl.max(b_s, 1))
            # All keys so far may be masked: exp2(-inf - 0) is 0 where exp2(-inf + inf) is NaN.
            b_shift = tl.where(b_max_new == -float("inf"), 0.0, b_max_new)
            b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
            b_max = b_max_new
        # A query without keys has b_max = -inf and b_sum = 0.
        b_lse = b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum))
        if STORED:
            tl.store(p_lse + o_out, b_lse * LN2_, mask=m_q)
    b_shift = tl.where(m_q & (b_lse > -float("inf")), b_lse, float("inf"))

    o_row = row + tl.arange(0, ROWS)
    b_tokens = tl.minimum(queries - o_row * (BLOCK_Q * RUN), BLOCK_Q * RUN)
    b_share = 1.0 / tl.maximum(b_tokens, 1).to(tl.float32)
    o_col = tl.arange(0, COLS)
    p_rows = mass + ((o_head * rows + o_row) * TILES_Q + part_q) * (cols * TILES_K)
    for i in range(0, tiles):
        in_col = i % TILES_K * PART_K
        col = i // TILES_K * COLS
        b_s = _tile_logits(
            *(p_q, p_k, p_scale, p_bias, b_q, b_q_high, b_scale, o_members, o_tile),
            *(in_col + o_in_k % PART_K < BLOCK_K, col * BLOCK_K + in_col),
            *(seq_q - first, seq_k, stride_qs, stride_qd, stride_ks, stride_kd),
            *(DIM, TILE_D, TILE_Q, TILE_K, MEMBERS, STREAMED, GROUP, BIASED),
        )
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_p = tl.sum(tl.reshape(b_p, [TILE_Q, COLS, PART_K]), 2) * b_weight[:, None]
        b_mass = tl.sum(tl.reshape(b_p, [ROWS, PART_Q, COLS]), 1) * b_share[:, None]
        tl.store(
            p_rows[:, None] + ((col + o_col) * TILES_K + i % TILES_K)[None, :],
            b_mass,
            mask=(o_row < rows)[:, None] & (col + o_col < cols)[None, :],
        )


@triton.jit(do_not_specialize=["seq", "heads", "runs", "order_b", "order_h"])
def pool_runs(
    x,  # [batch, seq, heads, dim]
    order,  # int64 [batch or 1, heads or 1, seq], read with ORDERED
    mask,  # bool [batch, seq], read with MASKED
    means,  # [batch, heads, runs, dim]
    bias,  # float32 [batch, heads, runs], log2(valid tokens), written with BIASED
    heads,
    seq,
    runs,
    order_b,
    order_h,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    PART: tl.constexpr,  # tokens of each run that are read at once, a power of two
    ORDERED: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """One program: RUNS runs of RUN tokens of one head of one batch element."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    o_in = tl.arange(0, RUNS * PART)
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < DIM
    p_x = x + batch * stride_b + head * stride_h
    b_sum = tl.zeros([RUNS, TILE_D], tl.float32)
    b_count = tl.zeros([RUNS], tl.float32)
    for first in range(0, RUN, PART):
        o_member = first + o_in % PART
        o_t = (tl.program_id(0) * RUNS + o_in // PART) * RUN + o_member
        m_t = (o_member < RUN) & (o_t < seq)
        o_row = o_t.to(tl.int64)
        if ORDERED:
            o_row = tl.load(order + batch * order_b + head * order_h + o_t, mask=m_t, other=0)
        if MASKED:
            m_t = m_t & (tl.load(mask + batch * seq + o_row, mask=m_t, other=0) != 0)
        p_rows = p_x + o_row[:, None] * stride_s + o_d[None, :] * stride_d
        b_x = tl.load(p_rows, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_sum += tl.sum(tl.reshape(b_x, [RUNS, PART, TILE_D]), 1)
        b_count += tl.sum(tl.reshape(m_t.to(tl.float32), [RUNS, PART]), 1)
    o_run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    m_run = o_run < runs
    p_out = (batch * heads + head) * runs + o_run
    b_mean = (b_sum / tl.maximum(b_count, 1.0)[:, None]).to(means.dtype.element_ty)
    tl.store(means + p_out[:, None] * DIM + o_d[None, :], b_mean, mask=m_run[:, None] & m_d[None, :])
    if BIASED:
        b_bias = tl.where(b_count > 0.0, tl.log2(tl.maximum(b_count, 1.0)), -float("inf"))
        tl.store(bias + p_out, b_bias, mask=m_run)


@triton.jit(
    do_not_specialize=["seq", "heads", "groups", "order_b", "order_h", "stride_mask_b", "stride_mask_h"]
)
def pack_tokens(
    x,  # [batch, seq, heads, dim]
    order,  # int64 [batch or 1, heads or 1, seq], read with ORDERED
    mask,  # bool [batch, heads or 1, seq] in the order, read with MASKED
    mean,  # float32 [batch, heads, dim], read with CENTRED
    packed,  # int8 [batch, heads, seq, HALF]
    scales,  # float32 [batch, heads, groups], or [batch, heads, seq] with PER_TOKEN
    heads,
    seq,
    groups,
    order_b,
    order_h,
    stride_mask_b,
    stride_mask_h,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    TILE_H: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ORDERED: tl.constexpr,
    MASKED: tl.constexpr,
    CENTRED: tl.constexpr,
    LEVELS: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """One program: GROUP tokens of one head of one batch element, on one scale or one each."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    o_head = batch * heads + head
    o_in = tl.arange(0, TILE)
    o_t = tl.program_id(0) * GROUP + o_in
    m_t = (o_in < GROUP) & (o_t < seq)
    o_low = tl.arange(0, TILE_H)
    o_high = HALF + o_low
    m_low = o_low < HALF
    m_high = o_high < DIM
    o_row = o_t.to(tl.int64)
    if ORDERED:
        o_row = tl.load(order + batch * order_b + head * order_h + o_t, mask=m_t, other=0)
    m_x = m_t
    if MASKED:
        p_mask = mask + batch * stride_mask_b + head * stride_mask_h
        m_x = m_t & (tl.load(p_mask + o_t, mask=m_t, other=0) != 0)
    p_x = x + batch * stride_b + head * stride_h + o_row[:, None] * stride_s
    m_low_x = m_x[:, None] & m_low[None, :]
    m_high_x = m_x[:, None] & m_high[None, :]
    b_low = tl.load(p_x + o_low[None, :] * stride_d, mask=m_low_x, other=0.0).to(tl.float32)
    b_high = tl.load(p_x + o_high[None, :] * stride_d, mask=m_high_x, other=0.0).to(tl.float32)
    if CENTRED:
        p_mean = mean + o_head * DIM
        b_low = tl.where(m_low_x, b_low - tl.load(p_mean + o_low, mask=m_low, other=0.0)[None, :], 0.0)
        b_high = tl.where(m_high_x, b_high - tl.load(p_mean + o_high, mask=m_high, other=0.0)[None, :], 0.0)
    b_largest = tl.maximum(tl.max(tl.abs(b_low), 1), tl.max(tl.abs(b_high), 1))
    if PER_TOKEN:
        b_scale = tl.maximum(b_largest / LEVELS, SMALLEST)
        tl.store(scales + o_head * seq + o_t, b_scale, mask=m_t)
        b_low = b_low / b_scale[:, None]
        b_high = b_high / b_scale[:, None]
    else:
        scale = tl.maximum(tl.max(b_largest, 0) / LEVELS, SMALLEST)
        tl.store(scales + o_head * groups + tl.program_id(0), scale)
        b_low = b_low / scale
        b_high = b_high / scale
    b_low_4 = tl.floor(b_low + 0.5).to(tl.int32) & 15
    b_high_4 = tl.floor(b_high + 0.5).to(tl.int32) << 4
    p_out = packed + (o_head * seq + o_t)[:, None] * HALF + o_low[None, :]
    tl.store(p_out, (b_low_4 | b_high_4).to(tl.int8), mask=m_t[:, None] & m_low[None, :])


def launch_options(
    dim: int, block_q: int, block_k: int, members: int, key_bytes: int, shared_limit: int
) -> dict[str, int]:
    """Tile sizes, blocks per tile, warps and stages: the largest that compile for sm_90 without spilling.

    Args:
        dim: features that one product runs over: bytes per token if they hold two numbers each.
        block_q, block_k: runs of `members` tokens per block.
        key_bytes: per element, 1 for packed numbers.
        shared_limit: bytes of shared memory that a program may use.
    """
    tile_d = max(32 if key_bytes == 1 else 16, triton.next_power_of_2(dim))
    if key_bytes == 4:  # the plain FMA units: a thread's share of the tile must stay small
        tile_q, tile_k, tile_d, warps, stages = 32, 32, min(tile_d, 32), 8, 2
    else:  # two programs per multiprocessor: one multiplies while the other exponentiates
        tile_q, tile_k, warps, stages = 128, 64, 8, 3
        if members > 1:  # a matrix product over many features
            tile_d, stages = min(tile_d, 64), 4
    streamed = members > 1 or dim > tile_d
    kept, read = (0, tile_q + tile_k) if streamed else (tile_q, tile_k)
    while stages > 1 and (kept + stages * read) * tile_d * key_bytes > shared_limit:
        stages -= 1
    return {
        "TILE_D": tile_d,
        "TILE_Q": tile_q,
        "TILE_K": tile_k,
        "ROWS": max(1, tile_q // triton.next_power_of_2(block_q)),
        "COLS": max(1, tile_k // triton.next_power_of_2(block_k)),
        "num_warps": warps,
        "num_stages": stages,
    }


def pack_options(dim: int, group: int) -> dict[str, int]:
    """Tile sizes and warps of `pack_tokens`: 16 numbers of each half of a token per thread."""
    half, size = -(-dim // 2), group or 64
    tile, tile_h = triton.next_power_of_2(size), triton.next_power_of_2(half)
    warps = min(16, max(1, tile * tile_h // 512))
    return {
        "HALF": half,
        "TILE_H": tile_h,
        "GROUP": size,
        "TILE": tile,
        "PER_TOKEN": group == 0,
        "num_warps": warps,
        "enable_fp_fusion": False,  # rounded as torch rounds
    }


def block_mass(
    q: Tensor,
    k: Tensor,
    counts: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    lse: Tensor | None,
    query_order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mass between tokens `[batch, heads, seq, dim]`; the log-sum-exp is in the model's order, computed if None."""
    given = lse is not None
    if lse is None:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    mass = _launch(
        q,
        k,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
        bias=None if counts is None else counts.log2(),
        lse=lse.contiguous(),
        given=given,
        query_order=query_order,
    )
    return mass, lse


def run_mass(q: Tensor, k: Tensor, counts: Tensor, members: int, *, block: int, scale: float) -> Tensor:
    """Mass between runs of `members` tokens, `block` runs per block; keys that may not be read are zeros."""
    return _launch(q, k, block_q=block, block_k=block, scale=scale, bias=counts.log2(), members=members)


def mean_mass(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    parts: int,
    scale: float,
    query_order: Tensor | None,
    key_order: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Mass between the means of `parts` runs to a block of `[batch, seq, heads, dim]`, means in the same dtype."""
    runs_q, _ = pool(query, block_q // parts, query_order, None, biased=False)
    runs_k, bias = pool(key, block_k // parts, key_order, key_mask, biased=True)
    queries = query.shape[1], block_q // parts
    return _launch(runs_q, runs_k, block_q=parts, block_k=parts, scale=scale, bias=bias, stands_for=queries)


def pool(
    tokens: Tensor, run: int, order: Tensor | None, mask: Tensor | None, *, biased: bool
) -> tuple[Tensor, Tensor | None]:
    """Means of runs of `run` tokens of `[batch, seq, heads, dim]` in an order, `[batch, heads, runs, dim]`.

    Args:
        mask: bool `[batch, seq]` in the model's order, tokens that count; a run without any is 0.
        biased: whether to return log2 of how many tokens count too, float32 `[batch, heads, runs]`.
    """
    batch, seq, heads, dim = tokens.shape
    runs = triton.cdiv(seq, run)
    means = torch.empty(batch, heads, runs, dim, dtype=tokens.dtype, device=tokens.device)
    bias = torch.empty(batch, heads, runs, dtype=torch.float32, device=tokens.device) if biased else None
    order = None if order is None else order.contiguous()
    options = pool_options(dim, run)
    with torch.cuda.device_of(tokens):
        pool_runs[(triton.cdiv(runs, options["RUNS"]), batch * heads)](
            tokens,
            means if order is None else order,
            means if mask is None else mask.contiguous(),
            means,
            means if bias is None else bias,
            heads,
            seq,
            runs,
            *_steps(order, 2),
            *tokens.stride(),
            DIM=dim,
            RUN=run,
            ORDERED=order is not None,
            MASKED=mask is not None,
            BIASED=biased,
            enable_fp_fusion=True,
            **options,
        )
    return means, bias


def pool_options(dim: int, run: int) -> dict[str, int]:
    """Tile sizes and warps of `pool_runs`: up to 64 tokens at once, 32 numbers per thread."""
    tile_d = max(16, triton.next_power_of_2(dim))
    part = min(64, triton.next_power_of_2(run))
    return {"TILE_D": tile_d, "PART": part, "RUNS": 64 // part, "num_warps": max(1, tile_d // 16)}


def lowbit_mass(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    valid: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    group: int,
    levels: int,
    scale: float,
    query_order: Tensor | None,
    key_order: Tensor | None,
) -> Tensor:
    """Mass of `[batch, seq, heads, dim]` rounded to −levels..levels, keys less their mean `[batch, heads, dim]`."""
    q, q_scale = pack(query, 0, levels, query_order)
    k, k_scale = pack(key, group, levels, key_order, mean, valid)
    bias = None if valid is None else valid.float().log2()
    # Both numbers of a product come out of their bytes times 16.
    return _launch(
        q,
        k,
        block_q=block_q,
        block_k=block_k,
        scale=scale / 256,
        bias=bias,
        scales=(q_scale, k_scale),
        group=group,
    )


def pack(
    tokens: Tensor,
    group: int,
    levels: int,
    order: Tensor | None = None,
    mean: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scores.quantise` of `[batch, seq, heads, dim]` in an order, two numbers per byte.

    Args:
        group: tokens that share a scale, 0 for a scale each.
        mean: subtracted, `[batch, heads, dim]`.
        valid: bool `[batch, heads or 1, seq]` in the order; the others become zeros.

    Returns:
        int8 `[batch, heads, seq, ceil(dim / 2)]` and float32 `[batch, heads, ceil(seq / max(1, group))]`.
    """
    batch, seq, heads, dim = tokens.shape
    half = -(-dim // 2)
    groups = triton.cdiv(seq, max(1, group))
    packed = torch.empty(batch, heads, seq, half, dtype=torch.int8, device=tokens.device)
    scales = torch.empty(batch, heads, groups, dtype=torch.float32, device=tokens.device)
    options = pack_options(dim, group)
    with torch.cuda.device_of(tokens):
        pack_tokens[(triton.cdiv(seq, options["GROUP"]), batch * heads)](
            tokens,
            scales if order is None else order.contiguous(),
            scales if valid is None else valid,
            scales if mean is None else mean.contiguous(),
            packed,
            scales,
            heads,
            seq,
            groups,
            *_steps(order, 2),
            *_steps(valid, 2),
            *tokens.stride(),
            DIM=dim,
            ORDERED=order is not None,
            MASKED=valid is not None,
            CENTRED=mean is not None,
            LEVELS=float(levels),
            SMALLEST=TINY,
            **options,
        )
    return packed, scales


def _launch(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    bias: Tensor | None = None,
    members: int = 1,
    stands_for: tuple[int, int] | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    group: int = 0,
    lse: Tensor | None = None,
    given: bool = False,
    query_order: Tensor | None = None,
) -> Tensor:
    """Blocks are counted in runs of `members` tokens; `lse` is read if `given`, otherwise written.

    Args:
        bias: float32 `[batch or 1, heads or 1, keys or runs]`, log2 of the tokens that count.
        stands_for: how many queries there are, and how many a run stands for, if not those of `q`.
    """
    batch, heads, seq_q, dim = q.shape
    queries, run = (seq_q, members) if stands_for is None else stands_for
    seq_k, device = k.shape[2], q.device
    rows, cols = triton.cdiv(seq_q, block_q * members), triton.cdiv(seq_k, block_k * members)
    options = launch_options(dim, block_q, block_k, members, q.element_size(), chip_of(device).shared)
    tiles_q, tiles_k = (
        triton.cdiv(block, options[f"TILE_{axis}"] // options[blocks])
        for block, axis, blocks in ((block_q, "Q", "ROWS"), (block_k, "K", "COLS"))
    )
    mass = torch.empty(batch, heads, rows, tiles_q, cols, tiles_k, dtype=torch.float32, device=device)
    order = None if query_order is None else query_order.contiguous()

    def given_or_unused(tensor: Tensor | None) -> Tensor:
        return mass if tensor is None else tensor

    q_scale, k_scale = (None, None) if scales is None else scales
    with torch.cuda.device_of(q):
        block_mass_forward[(triton.cdiv(rows, options["ROWS"]) * tiles_q, batch * heads)](
            q,
            k,
            mass,
            given_or_unused(lse),
            given_or_unused(q_scale),
            given_or_unused(k_scale),
            given_or_unused(bias),
            given_or_unused(order),
            scale * LOG2E,
            seq_q,
            seq_k,
            queries,
            heads,
            rows,
            cols,
            0 if k_scale is None else k_scale.shape[2],
            *_steps(order, 2),
            *_steps(bias, 2),
            *q.stride(),
            *k.stride(),
            DIM=dim,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            MEMBERS=members,
            RUN=run,
            GROUP=group,
            BIASED=bias is not None,
            GIVEN=given,
            STORED=lse is not None and not given,
            ORDERED=order is not None,
            # Triton 3.10 turns this off by default; the softmax counts on fused multiply-adds for speed.
            enable_fp_fusion=True,
            **options,
        )
    return mass.sum((3, 5)) if tiles_q * tiles_k > 1 else mass[:, :, :, 0, :, 0]


def _steps(tensor: Tensor | None, dims: int) -> tuple[Any, ...]:
    """Strides along the leading dims, 0 where a tensor is shared."""
    if tensor is None:
        return (0,) * dims
    return tuple(tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in range(dims))
