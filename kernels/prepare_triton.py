"""`prepare` on the GPU: one kernel orders and pools keys and values, one each smooths and quantises q, k and v.

Queries stay in the model's order, whatever their precision: attention gathers its rows as it reads them, and writes its
output back the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_index import starts_steps
from dit_accel.kernels.prepare import (
    E4M3_MAX,
    INT8_MAX,
    LOG2E,
    TINY,
    Means,
    Prepared,
    key_group,
    ordered_mask,
    padded_tokens,
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


# Lengths, heads and strides of orders change with every plan and must not compile anew.
@triton.jit(do_not_specialize=["seq", "heads", "cols", "order_b", "order_h", "starts_b", "starts_h"])
def _order_and_pool(
    k,  # [batch, seq, heads, dim]
    v,  # [batch, seq, heads, dim]
    order,  # int64 [batch or 1, heads or 1, seq], read with ORDERED
    mask,  # bool [batch, seq], read with MASKED
    starts,  # int32 [batch or 1, heads or 1, cols + 1], read with VARYING
    weight,  # float32 [heads], read with WEIGHED
    ordered_k,  # [batch, heads, seq, dim], written with COPY_K
    ordered_v,  # [batch, heads, seq, dim], written with COPY_V
    mean_k,  # [batch, heads, cols, dim], this and the next three written with POOL
    mean_v,  # [batch, heads, cols, dim]
    counts,  # float32 [batch, heads, cols], valid tokens
    bias,  # float32 [batch, heads, cols], log2(counts · weight)
    largest_v,  # float32 [batch, heads, cols, dim], absmax, written with LARGEST
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
    WEIGHED: tl.constexpr,
    COPY_K: tl.constexpr,
    COPY_V: tl.constexpr,
    POOL: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One program: one block of one head of one batch element, read once."""
    col = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    o_head = batch * heads + head
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
        o_copy = (o_head * seq + o_t)[:, None] * DIM + o_d[None, :]
        if COPY_K or POOL:
            b_k = tl.load(p_k, mask=m_tile, other=0.0)
        if COPY_V or POOL:
            b_v = tl.load(p_v, mask=m_tile, other=0.0)
        if COPY_K:
            tl.store(ordered_k + o_copy, b_k, mask=m_tile)
        if COPY_V:
            tl.store(ordered_v + o_copy, b_v, mask=m_tile)
        if POOL:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
            if MASKED:
                m_t = m_t & (tl.load(mask + batch * seq + o_row, mask=m_t, other=0) != 0)
                b_k = tl.where(m_t[:, None], b_k, 0.0)
                b_v = tl.where(m_t[:, None], b_v, 0.0)
            b_k_sum += tl.sum(b_k, 0)
            b_v_sum += tl.sum(b_v, 0)
            count += tl.sum(m_t.to(tl.float32), 0)
            if LARGEST:
                b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_v), 0))
    if POOL:
        p_out = o_head * cols + col
        share = 1.0 / tl.maximum(count, 1.0)
        tl.store(mean_k + p_out * DIM + o_d, (b_k_sum * share).to(mean_k.dtype.element_ty), mask=m_d)
        tl.store(mean_v + p_out * DIM + o_d, (b_v_sum * share).to(mean_v.dtype.element_ty), mask=m_d)
        tl.store(counts + p_out, count)
        if WEIGHED:
            count = count * tl.load(weight + head)
        tl.store(
            bias + p_out, tl.where(count > 0.0, tl.log2(tl.where(count > 0.0, count, 1.0)), -float("inf"))
        )
        if LARGEST:
            tl.store(largest_v + p_out * DIM + o_d, b_largest, mask=m_d)


@triton.jit
def _to_format(b_x, b_scale, INT8: tl.constexpr):
    b_scaled = b_x / b_scale
    if INT8:
        b_8 = tl.floor(b_scaled + 0.5).to(tl.int8)
    else:
        b_8 = b_scaled.to(tl.float8e4nv)
    return b_8


@triton.jit(do_not_specialize=["cols", "padded"])
def _summarise(
    mean_k,  # float32 [batch, heads, cols, dim], of the blocks' valid tokens
    mean_v,  # float32 [batch, heads, cols, dim]
    counts,  # float32 [batch, heads, cols]
    largest_v,  # float32 [batch, heads, cols, dim], read with FP8_V
    mean,  # float32 [batch, heads, dim], written: of all valid keys
    v_scale,  # float32 [batch, heads, dim], written with FP8_V
    key,  # [batch, heads, cols, dim], this and the next two written with REMAINDER: 8-bit mean keys, smoothed
    key_scale,  # float32 [batch, heads, cols]
    value,  # mean values, [batch, heads, cols, dim], with FP8_V E4M3 [batch, heads, dim, padded]
    cols,
    padded,
    DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE: tl.constexpr,
    FP8_V: tl.constexpr,
    REMAINDER: tl.constexpr,
    INT8: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_V: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """One program: one head of one batch element."""
    head = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, TILE_D)
    m_d = o_d < DIM
    o_tile = tl.arange(0, TILE)
    p_k = mean_k + head * cols * DIM
    p_v = mean_v + head * cols * DIM
    b_sum = tl.zeros([TILE_D], tl.float32)
    b_largest = tl.zeros([TILE_D], tl.float32)
    total = 0.0
    for first in range(0, cols, TILE):
        o_c = first + o_tile
        m_c = o_c < cols
        m_tile = m_c[:, None] & m_d[None, :]
        b_count = tl.load(counts + head * cols + o_c, mask=m_c, other=0.0)
        b_k = tl.load(p_k + o_c[:, None] * DIM + o_d[None, :], mask=m_tile, other=0.0)
        b_sum += tl.sum(b_k * b_count[:, None], 0)
        total += tl.sum(b_count, 0)
        if FP8_V:
            p_largest = largest_v + head * cols * DIM
            b_v = tl.load(p_largest + o_c[:, None] * DIM + o_d[None, :], mask=m_tile, other=0.0)
            b_largest = tl.maximum(b_largest, tl.max(b_v, 0))
    b_mean = b_sum / tl.maximum(total, 1.0)
    tl.store(mean + head * DIM + o_d, b_mean, mask=m_d)
    b_v_scale = tl.maximum(b_largest / LARGEST_V, SMALLEST)
    if FP8_V:
        tl.store(v_scale + head * DIM + o_d, b_v_scale, mask=m_d)
    if REMAINDER:
        # E4M3 values are followed by zeros up to the end of their room.
        for first in range(0, padded if FP8_V else cols, TILE):
            o_c = first + o_tile
            m_c = o_c < cols
            m_tile = m_c[:, None] & m_d[None, :]
            b_k = tl.load(p_k + o_c[:, None] * DIM + o_d[None, :], mask=m_tile, other=0.0)
            b_k = tl.where(m_tile, b_k - b_mean[None, :], 0.0)
            b_scale = tl.maximum(tl.max(tl.abs(b_k), 1) / LARGEST, SMALLEST)
            p_key = key + (head * cols + o_c)[:, None] * DIM + o_d[None, :]
            tl.store(p_key, _to_format(b_k, b_scale[:, None], INT8), mask=m_tile)
            tl.store(key_scale + head * cols + o_c, b_scale, mask=m_c)
            b_v = tl.load(p_v + o_c[:, None] * DIM + o_d[None, :], mask=m_tile, other=0.0)
            if FP8_V:
                b_8 = _to_format(b_v, b_v_scale[None, :], False)
                p_value = value + (head * DIM + o_d)[:, None] * padded + o_c[None, :]
                tl.store(p_value, tl.trans(b_8), mask=m_d[:, None] & (o_c < padded)[None, :])
            else:
                p_value = value + (head * cols + o_c)[:, None] * DIM + o_d[None, :]
                tl.store(p_value, b_v.to(value.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["seq", "heads", "groups", "order_b", "order_h"])
def _quantise_keys(
    k,  # [batch, seq, heads, dim]
    order,
    mask,  # bool [batch, seq], read with MASKED
    mean,  # float32 [batch, heads, dim]
    out,  # [batch, heads, seq, pitch]
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
    PITCH: tl.constexpr,
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
    p_out = out + (o_head * seq + o_t.to(tl.int64))[:, None] * PITCH + o_d[None, :]
    if PER_TOKEN:
        b_scale = tl.maximum(tl.max(tl.abs(b_k), 1) / LARGEST, SMALLEST)
        tl.store(p_out, _to_format(b_k, b_scale[:, None], INT8), mask=m_tile)
        tl.store(scales + o_head * seq + o_t, b_scale, mask=m_t)
    else:
        scale = tl.maximum(tl.max(tl.abs(b_k)) / LARGEST, SMALLEST)
        tl.store(p_out, _to_format(b_k, scale, INT8), mask=m_tile)
        tl.store(scales + o_head * groups + group, scale)


@triton.jit(do_not_specialize=["seq", "heads"])
def _quantise_queries(
    q,  # [batch, seq, heads, dim]
    mean,  # float32 [batch, heads, dim], of the keys
    out,  # [batch, heads, seq, pitch]
    scales,  # float32 [batch, heads, seq], times the softmax scale and log2(e)
    shift,  # float32 [batch, heads, seq], scale · q·mean
    scale,
    heads,
    seq,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    DIM: tl.constexpr,
    PITCH: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE: tl.constexpr,
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
    o_row = o_t.to(tl.int64)
    m_tile = m_t[:, None] & m_d[None, :]
    p_q = q + batch * stride_b + head * stride_h + o_row[:, None] * stride_s + o_d[None, :] * stride_d
    b_q = tl.load(p_q, mask=m_tile, other=0.0).to(tl.float32)
    b_mean = tl.load(mean + o_head * DIM + o_d, mask=m_d, other=0.0)
    b_scale = tl.maximum(tl.max(tl.abs(b_q), 1) / LARGEST, SMALLEST)
    o_out = o_head * seq + o_row
    p_out = out + o_out[:, None] * PITCH + o_d[None, :]
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
    key_order: Tensor | None = None,
    key_mask: Tensor | None = None,
    remainder: bool | Tensor = False,
) -> Prepared:
    """As `dit_accel.kernels.prepare.prepare`, with smoothing, and with queries in the model's order.

    Of what is native nothing is copied that no order moves.
    """
    quantised, fp8_v = precision != "native", precision in ("int8_fp8", "fp8")
    group, cols = key_group(block_k), triton.cdiv(key.shape[1], block_k)
    if key_starts is not None:
        key_starts = key_starts.contiguous()
        group, cols = 1, key_starts.shape[2] - 1
    order, mask = (None if x is None else x.contiguous() for x in (key_order, key_mask))
    keys = _Keys(key, value, order, mask, key_starts, block_k, cols, group)
    valid = None if key_mask is None else ordered_mask(key_mask, key_order)
    pools = None
    if quantised or remainder is not False:
        pools = _Pools.empty(keys, torch.float32 if quantised else key.dtype, largest=fp8_v)
    # What is quantised later is ordered then.
    k, v = _order(keys, not quantised, not fp8_v, pools, remainder)
    if not quantised:
        means = None if pools is None else Means(pools.key, pools.value, None, pools.bias)
        return Prepared(query.transpose(1, 2), k, v, None, None, None, None, valid, means, group)
    if pools is None:
        raise RuntimeError("keys are smoothed by the means of their blocks")
    int8 = precision != "fp8"
    formats = {"INT8": int8, "LARGEST": INT8_MAX if int8 else E4M3_MAX, "SMALLEST": TINY}
    mean, value_scale, means = _summaries(keys, pools, formats, fp8_v, remainder is not False)
    q, query_scale, lse_shift = _eight_bit_queries(query, mean, scale, formats)
    k, key_scale = _eight_bit_keys(keys, mean, formats)
    v = v if value_scale is None else _eight_bit_values(keys, value_scale)
    return Prepared(q, k, v, query_scale, key_scale, value_scale, lse_shift, valid, means, group)


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys and values of a call `[batch, seq, heads, dim]`, and the blocks of their order.

    Attributes:
        order: int64 `[batch or 1, heads or 1, seq]`, contiguous, as all that follow.
        mask: bool `[batch, seq]`.
        starts: int32 `[batch or 1, heads or 1, cols + 1]` of blocks that vary in length.
        block, cols, group: tokens per block, blocks, keys that share a scale.
    """

    key: Tensor
    value: Tensor
    order: Tensor | None
    mask: Tensor | None
    starts: Tensor | None
    block: int
    cols: int
    group: int

    def floats(self, *shape: int) -> Tensor:
        """float32 `[batch, heads, *shape]`, to be written."""
        return _new(self.key, *shape, dtype=torch.float32)

    @property
    def order_steps(self) -> tuple[int, ...]:
        """Strides of a batch element and of a head."""
        if self.order is None:
            return 0, 0
        return tuple(self.order.stride(i) if self.order.shape[i] > 1 else 0 for i in range(2))


@dataclass(frozen=True, eq=False)
class _Pools:
    """Of every block, see `_order_and_pool`."""

    key: Tensor
    value: Tensor
    counts: Tensor
    bias: Tensor
    largest: Tensor | None

    @classmethod
    def empty(cls, keys: _Keys, dtype: torch.dtype, *, largest: bool) -> _Pools:
        """To be written."""
        dim = keys.key.shape[3]
        key, value = (_new(keys.key, keys.cols, dim, dtype=dtype) for _ in range(2))
        counts, bias = keys.floats(keys.cols), keys.floats(keys.cols)
        return cls(key, value, counts, bias, keys.floats(keys.cols, dim) if largest else None)


def _new(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """`[batch, heads, *shape]`, to be written."""
    return torch.empty(like.shape[0], like.shape[2], *shape, dtype=dtype, device=like.device)


def _constants(like: Tensor) -> dict[str, Any]:
    dim = like.shape[3]
    tile_d = max(16, triton.next_power_of_2(dim))
    return {"DIM": dim, "TILE_D": tile_d, "enable_fp_fusion": True, "num_warps": _WARPS}


def _pitch(dim: int) -> int:
    """Bytes from one row of 8-bit numbers to the next: they are read 16 at a time."""
    return triton.cdiv(dim, 16) * 16


def _order(
    keys: _Keys, move_k: bool, move_v: bool, pools: _Pools | None, remainder: bool | Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values `[batch, heads, seq, dim]`, in their order as far as they are to be moved; writes the pools."""
    key, value = keys.key, keys.value
    batch, seq, heads, dim = key.shape
    ordered = keys.order is not None
    k = _new(key, seq, dim, dtype=key.dtype) if ordered and move_k else key.transpose(1, 2)
    v = _new(value, seq, dim, dtype=value.dtype) if ordered and move_v else value.transpose(1, 2)
    if pools is None and not (ordered and (move_k or move_v)):
        return k, v
    weight = remainder.float() if isinstance(remainder, Tensor) else None

    def given(tensor: Tensor | None) -> Tensor:
        return key if tensor is None else tensor

    _order_and_pool[(keys.cols, batch * heads)](
        key,
        value,
        given(keys.order),
        given(keys.mask),
        given(keys.starts),
        given(weight),
        k,
        v,
        *(given(None if pools is None else x) for x in _parts(pools)),
        heads,
        seq,
        keys.cols,
        *keys.order_steps,
        *starts_steps(keys.starts),
        *key.stride(),
        *value.stride(),
        BLOCK=keys.block,
        TILE=min(_POOL_TILE, max(16, triton.next_power_of_2(keys.block))),
        ORDERED=ordered,
        MASKED=keys.mask is not None,
        VARYING=keys.starts is not None,
        WEIGHED=weight is not None,
        COPY_K=ordered and move_k,
        COPY_V=ordered and move_v,
        POOL=pools is not None,
        LARGEST=pools is not None and pools.largest is not None,
        **_constants(key),
    )
    return k, v


def _parts(pools: _Pools | None) -> tuple[Tensor | None, ...]:
    if pools is None:
        return (None,) * 5
    return pools.key, pools.value, pools.counts, pools.bias, pools.largest


def _summaries(
    keys: _Keys, pools: _Pools, formats: dict[str, Any], fp8_v: bool, remainder: bool
) -> tuple[Tensor, Tensor | None, Means | None]:
    """Mean key `[batch, heads, dim]`, scale of the values where they are E4M3, and the stand-ins of the blocks."""
    key, cols, dim = keys.key, keys.cols, keys.key.shape[3]
    mean, value_scale = keys.floats(dim), keys.floats(dim) if fp8_v else None
    room = padded_tokens(cols, 1)
    eight = torch.int8 if formats["INT8"] else torch.float8_e4m3fn
    mean_key, mean_scale, mean_value = mean, mean, mean
    if remainder:
        mean_key, mean_scale = _new(key, cols, dim, dtype=eight), keys.floats(cols)
        mean_value = _new(key, cols, dim, dtype=keys.value.dtype)
        if fp8_v:
            mean_value = _new(key, dim, room, dtype=torch.float8_e4m3fn)
    _summarise[(mean.shape[0] * mean.shape[1],)](
        pools.key,
        pools.value,
        pools.counts,
        mean if pools.largest is None else pools.largest,
        mean,
        mean if value_scale is None else value_scale,
        mean_key,
        mean_scale,
        mean_value,
        cols,
        room,
        TILE=2 * _POOL_TILE,
        FP8_V=fp8_v,
        REMAINDER=remainder,
        LARGEST_V=E4M3_MAX,
        **formats,
        **_constants(key),
    )
    if not remainder:
        return mean, value_scale, None
    if fp8_v:
        mean_value = mean_value.transpose(2, 3)[:, :, :cols]
    return mean, value_scale, Means(mean_key, mean_value, mean_scale, pools.bias)


def _eight_bit_queries(
    query: Tensor, mean: Tensor, scale: float, formats: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, their scales, and what smoothing takes from the log-sum-exp; in the model's order."""
    batch, seq, heads, dim = query.shape
    eight = torch.int8 if formats["INT8"] else torch.float8_e4m3fn
    numbers = _new(query, seq, _pitch(dim), dtype=eight)
    scales, shift = (_new(query, seq, dtype=torch.float32) for _ in range(2))
    _quantise_queries[(triton.cdiv(seq, _TILE), batch * heads)](
        query,
        mean,
        numbers,
        scales,
        shift,
        scale,
        heads,
        seq,
        *query.stride(),
        PITCH=_pitch(dim),
        TILE=_TILE,
        LOG2E_=LOG2E,
        **formats,
        **_constants(query),
    )
    return numbers[..., :dim], scales, shift


def _eight_bit_keys(keys: _Keys, mean: Tensor, formats: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Numbers and their scales, one for each group."""
    batch, seq, heads, dim = keys.key.shape
    together = keys.group if keys.starts is None else _TILE  # keys that a program quantises
    groups = triton.cdiv(seq, keys.group)
    eight = torch.int8 if formats["INT8"] else torch.float8_e4m3fn
    numbers, scales = _new(keys.key, seq, _pitch(dim), dtype=eight), keys.floats(groups)
    _quantise_keys[(triton.cdiv(seq, together), batch * heads)](
        keys.key,
        scales if keys.order is None else keys.order,
        scales if keys.mask is None else keys.mask,
        mean,
        numbers,
        scales,
        heads,
        seq,
        groups,
        *keys.order_steps,
        *keys.key.stride(),
        PITCH=_pitch(dim),
        GROUP=together,
        TILE=max(16, triton.next_power_of_2(together)),
        ORDERED=keys.order is not None,
        MASKED=keys.mask is not None,
        PER_TOKEN=keys.starts is not None,
        **formats,
        **_constants(keys.key),
    )
    return numbers[..., :dim], scales


def _eight_bit_values(keys: _Keys, scales: Tensor) -> Tensor:
    """E4M3, with contiguous tokens."""
    batch, seq, heads, dim = keys.value.shape
    padded = padded_tokens(seq, keys.block if keys.starts is None else 1)
    numbers = _new(keys.value, dim, padded, dtype=torch.float8_e4m3fn)
    constants = _constants(keys.value)
    # 256 channels spill on their way through shared memory.
    tile = _TILE if constants["TILE_D"] <= 128 else _TILE // 2
    _quantise_values[(padded // tile, batch * heads)](
        keys.value,
        scales if keys.order is None else keys.order,
        scales if keys.mask is None else keys.mask,
        scales,
        numbers,
        heads,
        seq,
        padded,
        *keys.order_steps,
        *keys.value.stride(),
        TILE=tile,
        ORDERED=keys.order is not None,
        MASKED=keys.mask is not None,
        **constants,
    )
    return numbers.transpose(2, 3)[:, :, :seq]
