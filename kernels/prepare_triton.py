"""`prepare` on the GPU: one kernel pools keys and values, one each permutes, smooths and quantises q, k and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.prepare import (
    E4M3_MAX,
    INT8_MAX,
    LOG2E,
    TINY,
    Means,
    Prepared,
    e4m3_values,
    key_group,
    ordered,
    ordered_mask,
    padded_tokens,
    quantise,
    with_remainder,
)

# Names: o_ offsets, m_ masks, p_ pointers, b_ values held in registers.
_TILE = 64
# Keys and values side by side. With these no kernel here spills at 128 channels, by Triton 3.6 or 3.9.
_POOL_TILE, _WARPS = 16, 8


@triton.jit
def _token_rows(order, p_order, o_t, m_t, ORDERED: tl.constexpr):
    """Places in the model's order of the ordered tokens o_t, int64."""
    if ORDERED:
        o_row = tl.load(order + p_order + o_t, mask=m_t, other=0)
    else:
        o_row = o_t.to(tl.int64)
    return o_row


@triton.jit(do_not_specialize=["seq", "heads", "cols", "order_b", "order_h", "starts_b", "starts_h"])
def _pool(
    k,  # [batch, seq, heads, dim]
    v,  # [batch, seq, heads, dim]
    order,  # int64 [batch or 1, heads or 1, seq], read with ORDERED
    mask,  # bool [batch, seq], read with MASKED
    starts,  # int32 [batch or 1, heads or 1, cols + 1], read with VARYING
    mean_k,  # float32 [batch, heads, cols, dim]
    mean_v,  # float32 [batch, heads, cols, dim]
    largest_v,  # float32 [batch, heads, cols, dim], absmax
    counts,  # float32 [batch, heads, cols], valid tokens
    heads,
    seq,
    cols,
    order_b,
    order_h,
    starts_b,  # starts of a batch element and of a head, 0 where shared
    starts_h,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ORDERED: tl.constexpr,
    MASKED: tl.constexpr,
    VARYING: tl.constexpr,
):
    """One program: one block of one head of one batch element."""
    col = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < DIM
    b_k_sum = tl.zeros([TILE_D], tl.float32)
    b_v_sum = tl.zeros([TILE_D], tl.float32)
    b_largest = tl.zeros([TILE_D], tl.float32)
    count = 0.0
    if VARYING:
        p_start = starts + (batch * starts_b + head * starts_h) * (cols + 1) + col
        begin = tl.load(p_start)
        end = tl.load(p_start + 1)
    else:
        begin = col * BLOCK
        end = tl.minimum(seq, begin + BLOCK)
    for first in range(begin, end, TILE):
        o_t = first + tl.arange(0, TILE)
        m_t = o_t < end
        o_row = _token_rows(order, batch * order_b + head * order_h, o_t, m_t, ORDERED)
        m_tile = m_t[:, None] & m_d[None, :]
        p_k = k + batch * stride_kb + head * stride_kh + o_row[:, None] * stride_ks + o_d[None, :] * stride_kd
        p_v = v + batch * stride_vb + head * stride_vh + o_row[:, None] * stride_vs + o_d[None, :] * stride_vd
        b_k = tl.load(p_k, mask=m_tile, other=0.0).to(tl.float32)
        b_v = tl.load(p_v, mask=m_tile, other=0.0).to(tl.float32)
        if MASKED:
            m_t = m_t & (tl.load(mask + batch * seq + o_row, mask=m_t, other=0) != 0)
            b_k = tl.where(m_t[:, None], b_k, 0.0)
            b_v = tl.where(m_t[:, None], b_v, 0.0)
        b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_v), 0))
        b_k_sum += tl.sum(b_k, 0)
        b_v_sum += tl.sum(b_v, 0)
        count += tl.sum(m_t.to(tl.float32), 0)
    p_out = (batch * heads + head) * cols + col
    share = 1.0 / tl.maximum(count, 1.0)
    tl.store(mean_k + p_out * DIM + o_d, b_k_sum * share, mask=m_d)
    tl.store(mean_v + p_out * DIM + o_d, b_v_sum * share, mask=m_d)
    tl.store(largest_v + p_out * DIM + o_d, b_largest, mask=m_d)
    tl.store(counts + p_out, count)


@triton.jit
def _to_format(b_x, b_scale, INT8: tl.constexpr):
    b_scaled = b_x / b_scale
    if INT8:
        b_8 = tl.floor(b_scaled + 0.5).to(tl.int8)
    else:
        b_8 = b_scaled.to(tl.float8e4nv)
    return b_8


@triton.jit(do_not_specialize=["seq", "heads", "groups", "order_b", "order_h"])
def _quantise_keys(
    k,  # [batch, seq, heads, dim]
    order,
    mask,  # bool [batch, seq], read with MASKED
    mean,  # float32 [batch, heads, dim]
    out,  # [batch, heads, seq, dim]
    scales,  # float32 [batch, heads, groups], or [batch, heads, seq] with PER_TOKEN
    heads,
    seq,
    groups,
    order_b,
    order_h,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    ORDERED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    INT8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """One program: the keys of one group, less the mean, on one scale, or on one each; masked ones are 0."""
    group = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    o_head = batch * heads + head
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < DIM
    o_t = group * GROUP + tl.arange(0, TILE)
    m_t = o_t < tl.minimum(seq, (group + 1) * GROUP)
    o_row = _token_rows(order, batch * order_b + head * order_h, o_t, m_t, ORDERED)
    m_tile = m_t[:, None] & m_d[None, :]
    p_k = k + batch * stride_b + head * stride_h + o_row[:, None] * stride_s + o_d[None, :] * stride_d
    b_k = tl.load(p_k, mask=m_tile, other=0.0).to(tl.float32)
    b_mean = tl.load(mean + o_head * DIM + o_d, mask=m_d, other=0.0)
    m_read = m_t
    if MASKED:
        m_read = m_t & (tl.load(mask + batch * seq + o_row, mask=m_t, other=0) != 0)
    b_k = tl.where(m_read[:, None] & m_d[None, :], b_k - b_mean[None, :], 0.0)
    p_out = out + (o_head * seq + o_t.to(tl.int64))[:, None] * DIM + o_d[None, :]
    if PER_TOKEN:
        b_scale = tl.maximum(tl.max(tl.abs(b_k), 1) / LARGEST, SMALLEST)
        tl.store(p_out, _to_format(b_k, b_scale[:, None], INT8), mask=m_tile)
        tl.store(scales + o_head * seq + o_t, b_scale, mask=m_t)
    else:
        scale = tl.maximum(tl.max(tl.abs(b_k)) / LARGEST, SMALLEST)
        tl.store(p_out, _to_format(b_k, scale, INT8), mask=m_tile)
        tl.store(scales + o_head * groups + group, scale)


@triton.jit(do_not_specialize=["seq", "heads", "order_b", "order_h"])
def _quantise_queries(
    q,  # [batch, seq, heads, dim]
    order,
    mean,  # float32 [batch, heads, dim], of the keys
    out,  # [batch, heads, seq, dim]
    scales,  # float32 [batch, heads, seq], times the softmax scale and log2(e)
    shift,  # float32 [batch, heads, seq], scale · q·mean
    scale,
    heads,
    seq,
    order_b,
    order_h,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE: tl.constexpr,
    ORDERED: tl.constexpr,
    INT8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    LOG2E_: tl.constexpr,
):
    """One program: TILE queries of one head, a scale each."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    o_head = batch * heads + head
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < DIM
    o_t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m_t = o_t < seq
    o_row = _token_rows(order, batch * order_b + head * order_h, o_t, m_t, ORDERED)
    m_tile = m_t[:, None] & m_d[None, :]
    p_q = q + batch * stride_b + head * stride_h + o_row[:, None] * stride_s + o_d[None, :] * stride_d
    b_q = tl.load(p_q, mask=m_tile, other=0.0).to(tl.float32)
    b_mean = tl.load(mean + o_head * DIM + o_d, mask=m_d, other=0.0)
    b_scale = tl.maximum(tl.max(tl.abs(b_q), 1) / LARGEST, SMALLEST)
    o_out = o_head * seq + o_t.to(tl.int64)
    p_out = out + o_out[:, None] * DIM + o_d[None, :]
    tl.store(p_out, _to_format(b_q, b_scale[:, None], INT8), mask=m_tile)
    tl.store(scales + o_out, b_scale * (scale * LOG2E_), mask=m_t)
    tl.store(shift + o_out, tl.sum(b_q * b_mean[None, :], 1) * scale, mask=m_t)


@triton.jit(do_not_specialize=["seq", "heads", "padded", "order_b", "order_h"])
def _quantise_values(
    v,  # [batch, seq, heads, dim]
    order,
    mask,  # bool [batch, seq], read with MASKED
    scales,  # float32 [batch, heads, dim]
    out,  # E4M3 [batch, heads, dim, padded]
    heads,
    seq,
    padded,
    order_b,
    order_h,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE: tl.constexpr,
    ORDERED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One program: TILE values of one head, written with contiguous tokens; masked ones are 0."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    o_head = batch * heads + head
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < DIM
    o_t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m_t = o_t < seq
    o_row = _token_rows(order, batch * order_b + head * order_h, o_t, m_t, ORDERED)
    p_v = v + batch * stride_b + head * stride_h + o_row[:, None] * stride_s + o_d[None, :] * stride_d
    if MASKED:
        m_t = m_t & (tl.load(mask + batch * seq + o_row, mask=m_t, other=0) != 0)
    b_v = tl.load(p_v, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_scale = tl.load(scales + o_head * DIM + o_d, mask=m_d, other=1.0)
    b_8 = _to_format(b_v, b_scale[None, :], False)
    p_out = out + (o_head * DIM + o_d)[:, None] * padded + o_t[None, :]
    tl.store(p_out, tl.trans(b_8), mask=m_d[:, None] & (o_t < padded)[None, :])


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    precision: str,
    scale: float,
    block_k: int,
    key_starts: Tensor | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    key_mask: Tensor | None = None,
    remainder: bool | Tensor = False,
) -> Prepared:
    """As `dit_accel.kernels.prepare.prepare` for the 8-bit precisions, with smoothing."""
    batch, seq_q, heads, dim = query.shape
    seq_k = key.shape[1]
    device = query.device
    int8 = precision != "fp8"
    eight = torch.int8 if int8 else torch.float8_e4m3fn
    largest = INT8_MAX if int8 else E4M3_MAX
    group, cols = key_group(block_k), triton.cdiv(seq_k, block_k)
    if key_starts is not None:
        key_starts = key_starts.contiguous()
        group, cols = 1, key_starts.shape[2] - 1
    groups = triton.cdiv(seq_k, group)
    together = group if key_starts is None else _TILE  # keys that a program quantises
    tile_d = max(16, triton.next_power_of_2(dim))
    constants = {"DIM": dim, "TILE_D": tile_d, "enable_fp_fusion": True, "num_warps": _WARPS}
    formats = {"INT8": int8, "LARGEST": largest, "SMALLEST": TINY}

    def floats(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=torch.float32, device=device)

    def steps(order: Tensor | None) -> tuple[int, ...]:
        if order is None:
            return 0, 0
        return tuple(order.stride(i) if order.shape[i] > 1 else 0 for i in range(2))

    key_order = None if key_order is None else key_order.contiguous()
    query_order = None if query_order is None else query_order.contiguous()
    mask = None if key_mask is None else key_mask.contiguous()
    mean_k, mean_v, largest_v, counts = floats(cols, dim), floats(cols, dim), floats(cols, dim), floats(cols)
    _pool[(cols, batch * heads)](
        key,
        value,
        counts if key_order is None else key_order,
        counts if mask is None else mask,
        counts if key_starts is None else key_starts,
        mean_k,
        mean_v,
        largest_v,
        counts,
        heads,
        seq_k,
        cols,
        *steps(key_order),
        0 if key_starts is None or key_starts.shape[0] == 1 else key_starts.shape[1],
        int(key_starts is not None and key_starts.shape[1] > 1),
        *key.stride(),
        *value.stride(),
        BLOCK=block_k,
        TILE=min(_POOL_TILE, max(16, triton.next_power_of_2(block_k))),
        ORDERED=key_order is not None,
        MASKED=mask is not None,
        VARYING=key_starts is not None,
        **constants,
    )
    mean = (mean_k * counts[..., None]).sum(2) / counts.sum(2).clamp(min=1)[..., None]

    q8 = torch.empty(batch, heads, seq_q, dim, dtype=eight, device=device)
    query_scale, lse_shift = floats(seq_q), floats(seq_q)
    _quantise_queries[(triton.cdiv(seq_q, _TILE), batch * heads)](
        query,
        counts if query_order is None else query_order,
        mean,
        q8,
        query_scale,
        lse_shift,
        scale,
        heads,
        seq_q,
        *steps(query_order),
        *query.stride(),
        TILE=_TILE,
        ORDERED=query_order is not None,
        LOG2E_=LOG2E,
        **formats,
        **constants,
    )
    k8 = torch.empty(batch, heads, seq_k, dim, dtype=eight, device=device)
    key_scale = floats(groups)
    _quantise_keys[(triton.cdiv(seq_k, together), batch * heads)](
        key,
        counts if key_order is None else key_order,
        counts if mask is None else mask,
        mean,
        k8,
        key_scale,
        heads,
        seq_k,
        groups,
        *steps(key_order),
        *key.stride(),
        GROUP=together,
        TILE=max(16, triton.next_power_of_2(together)),
        ORDERED=key_order is not None,
        MASKED=mask is not None,
        PER_TOKEN=key_starts is not None,
        **formats,
        **constants,
    )
    value_scale = None
    if precision == "int8":
        v = ordered(value, key_order)
    else:
        value_scale = (largest_v.amax(2) / E4M3_MAX).clamp(min=TINY)
        padded = padded_tokens(seq_k, block_k if key_starts is None else 1)
        v8 = torch.empty(batch, heads, dim, padded, dtype=torch.float8_e4m3fn, device=device)
        tile = _TILE if tile_d <= 128 else _TILE // 2  # 256 channels spill on their way through shared memory
        _quantise_values[(padded // tile, batch * heads)](
            value,
            counts if key_order is None else key_order,
            counts if mask is None else mask,
            value_scale,
            v8,
            heads,
            seq_k,
            padded,
            *steps(key_order),
            *value.stride(),
            TILE=tile,
            ORDERED=key_order is not None,
            MASKED=mask is not None,
            **constants,
        )
        v = v8.transpose(2, 3)[:, :, :seq_k]

    means = None
    if remainder is not False:
        m8, mean_scale = quantise((mean_k - mean[:, :, None])[..., None, :], eight)
        m_v = mean_v.to(value.dtype) if value_scale is None else e4m3_values(mean_v, value_scale, 1)
        means = Means(m8[..., 0, :], m_v, mean_scale, with_remainder(counts.log2(), remainder))
    valid = None if key_mask is None else ordered_mask(key_mask, key_order)
    return Prepared(q8, k8, v, query_scale, key_scale, value_scale, lse_shift, valid, means, group)
