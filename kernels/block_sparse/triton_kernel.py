"""Block-sparse attention as one Triton launch over ragged block lists."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex

# Names: o_ offsets, m_ masks, p_ pointers, b_ values held in registers.


@triton.jit
def _attend_tile(
    b_q,
    b_acc,
    b_max,
    b_sum,
    p_k,
    p_v,
    p_key_mask,
    o_keys,
    end_k,
    m_d,
    stride_ks,
    stride_vs,
    stride_ms,
    scale_log2,
    MASKED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    PAD_D: tl.constexpr,
):
    """One online-softmax step over a tile of keys; m_d masks padded head dims, MASKED guards the keys."""
    o_k = o_keys.to(tl.int64)
    m_k = o_keys < end_k
    # [TILE_D, TILE_K]
    if MASKED:
        b_k = tl.load(p_k + o_k[None, :] * stride_ks, mask=m_k[None, :] & m_d[:, None], other=0.0)
    elif PAD_D:
        b_k = tl.load(p_k + o_k[None, :] * stride_ks, mask=m_d[:, None], other=0.0)
    else:
        b_k = tl.load(p_k + o_k[None, :] * stride_ks)
    # [TILE_Q, TILE_K]
    b_s = tl.dot(b_q, b_k, input_precision="ieee")
    if HAS_KEY_MASK:
        m_k = m_k & (tl.load(p_key_mask + o_k * stride_ms, mask=m_k, other=0) != 0)
    if MASKED:
        b_s = tl.where(m_k[None, :], b_s, -float("inf"))
    b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_shift = b_max_new
    if HAS_KEY_MASK:
        # All keys so far may be masked: exp2(-inf - 0) is 0 where exp2(-inf + inf) is NaN.
        b_shift = tl.where(b_max_new == -float("inf"), 0.0, b_max_new)
    b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
    b_rescale = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    # [TILE_K, TILE_D]
    if MASKED:
        b_v = tl.load(p_v + o_k[:, None] * stride_vs, mask=m_k[:, None] & m_d[None, :], other=0.0)
    elif PAD_D:
        b_v = tl.load(p_v + o_k[:, None] * stride_vs, mask=m_d[None, :], other=0.0)
    else:
        b_v = tl.load(p_v + o_k[:, None] * stride_vs)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision="ieee")
    return b_acc, b_max_new, b_sum


# Sequence lengths change with every resolution and must not compile anew.
@triton.jit(do_not_specialize=["seq_q", "seq_k", "rows", "stride_index"])
def block_sparse_forward(
    q,  # [batch, seq_q, heads, dim]
    k,  # [batch, seq_k, heads, dim]
    v,  # [batch, seq_k, heads, dim]
    out,  # [batch, seq_q, heads, dim]
    lse,  # float32 [batch, heads, seq_q]
    counts,  # int32 [batch or 1, heads, rows]
    offsets,  # int64 [batch or 1, heads, rows]
    indices,  # int32 [total]
    key_mask,  # bool [batch, seq_k], read with HAS_KEY_MASK
    scale_log2,
    seq_q,
    seq_k,
    heads,
    rows,
    stride_index,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    stride_ob,
    stride_os,
    stride_oh,
    stride_od,
    stride_mb,
    stride_ms,
    DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):
    """One program: TILE_Q queries of one row, one head, one batch element, over that row's list."""
    TILES_Q: tl.constexpr = (BLOCK_Q + TILE_Q - 1) // TILE_Q
    TILES_K: tl.constexpr = (BLOCK_K + TILE_K - 1) // TILE_K
    PAD_D: tl.constexpr = DIM != TILE_D
    # Without a key mask only the last block of a list can be short, so only its tiles need a mask.
    MASK_ALL: tl.constexpr = HAS_KEY_MASK or BLOCK_K % TILE_K != 0

    row = tl.program_id(0) // TILES_Q
    part = tl.program_id(0) % TILES_Q
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)

    o_list = batch * stride_index + head * rows + row
    count = tl.load(counts + o_list)
    p_list = indices + tl.load(offsets + o_list)

    o_q = row * BLOCK_Q + part * TILE_Q + tl.arange(0, TILE_Q)
    m_q = o_q < tl.minimum(seq_q, (row + 1) * BLOCK_Q)
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < DIM
    o_tile = tl.arange(0, TILE_K)

    p_q = q + batch * stride_qb + head * stride_qh
    p_k = k + batch * stride_kb + head * stride_kh + o_d[:, None] * stride_kd
    p_v = v + batch * stride_vb + head * stride_vh + o_d[None, :] * stride_vd
    p_key_mask = key_mask + batch * stride_mb

    # [TILE_Q, TILE_D]
    b_q = tl.load(
        p_q + o_q.to(tl.int64)[:, None] * stride_qs + o_d[None, :] * stride_qd,
        mask=m_q[:, None] & m_d[None, :],
        other=0.0,
    )
    b_max = tl.full([TILE_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([TILE_Q], tl.float32)
    b_acc = tl.zeros([TILE_Q, TILE_D], tl.float32)

    tiles = count * TILES_K
    unmasked = tl.maximum(tiles - TILES_K, 0)
    if MASK_ALL:
        unmasked = 0
    for i in range(0, unmasked):
        o_keys = tl.load(p_list + i // TILES_K) * BLOCK_K + i % TILES_K * TILE_K + o_tile
        b_acc, b_max, b_sum = _attend_tile(
            b_q, b_acc, b_max, b_sum, p_k, p_v, p_key_mask, o_keys, seq_k, m_d,
            stride_ks, stride_vs, stride_ms, scale_log2, False, False, PAD_D,
        )  # fmt: skip
    for i in range(unmasked, tiles):
        start = tl.load(p_list + i // TILES_K) * BLOCK_K
        o_keys = start + i % TILES_K * TILE_K + o_tile
        end_k = tl.minimum(seq_k, start + BLOCK_K)
        b_acc, b_max, b_sum = _attend_tile(
            b_q, b_acc, b_max, b_sum, p_k, p_v, p_key_mask, o_keys, end_k, m_d,
            stride_ks, stride_vs, stride_ms, scale_log2, True, HAS_KEY_MASK, PAD_D,
        )  # fmt: skip

    # A query without keys has b_max = -inf and b_sum = 0: output 0, lse -inf.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_acc / b_sum[:, None]
    p_out = out + batch * stride_ob + head * stride_oh
    tl.store(
        p_out + o_q.to(tl.int64)[:, None] * stride_os + o_d[None, :] * stride_od,
        b_out.to(out.dtype.element_ty),
        mask=m_q[:, None] & m_d[None, :],
    )
    LN2: tl.constexpr = 0.6931471805599453
    p_lse = lse + (batch * heads + head) * seq_q
    tl.store(p_lse + o_q, (b_max + tl.log2(b_sum)) * LN2, mask=m_q)


def launch_options(dim: int, block_q: int, block_k: int, itemsize: int) -> dict[str, int]:
    """Tile sizes, warps and stages: the largest that compile for sm_90 without spilling.

    16-bit dims above 128 take small tiles so that they also fit the shared memory of consumer GPUs. 32-bit
    inputs run on the plain FMA units, one thread's share of the tile must stay small.
    """
    tile_d = max(16, triton.next_power_of_2(dim))
    if itemsize == 4:
        tile_q, tile_k, warps, stages = 32, 32, 8, 2
    elif tile_d > 128:
        tile_q, tile_k, warps, stages = 64, 32, 8, 2
    elif block_q > 64:
        tile_q, tile_k, warps, stages = 128, 64, 8, 3
    else:
        tile_q, tile_k, warps, stages = 64, 64, 4, 3
    return {
        "TILE_D": tile_d,
        "TILE_Q": min(tile_q, max(16, triton.next_power_of_2(block_q))),
        "TILE_K": min(tile_k, max(16, triton.next_power_of_2(block_k))),
        "num_warps": warps,
        "num_stages": stages,
    }


def attention(
    query: Tensor, key: Tensor, value: Tensor, index: BlockIndex, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; any strides, head dims up to 256, float16, bfloat16 or float32."""
    batch, seq_q, heads, dim = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=query.device)
    options = launch_options(dim, index.block_q, index.block_k, query.element_size())
    counts, offsets = index.counts.contiguous(), index.offsets.contiguous()
    grid = (index.rows * triton.cdiv(index.block_q, options["TILE_Q"]), batch * heads)
    block_sparse_forward[grid](
        query,
        key,
        value,
        output,
        lse,
        counts,
        offsets,
        index.indices,
        index.counts if key_mask is None else key_mask,
        scale * math.log2(math.e),
        seq_q,
        index.seq_k,
        heads,
        index.rows,
        0 if index.batch == 1 else heads * index.rows,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *output.stride(),
        *((0, 0) if key_mask is None else key_mask.stride()),
        DIM=dim,
        BLOCK_Q=index.block_q,
        BLOCK_K=index.block_k,
        HAS_KEY_MASK=key_mask is not None,
        # Triton 3.10 turns this off by default; the softmax counts on fused multiply-adds for speed.
        enable_fp_fusion=True,
        **options,
    )
    return output, lse
