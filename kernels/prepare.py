"""Lays queries, keys and values out for the attention kernel: ordered, smoothed, quantised, pooled.

Smoothing (SageAttention, https://arxiv.org/abs/2410.02367): keys of a head share a large mean that wastes the
range of 8-bit numbers. Attention does not see a vector `m` subtracted from every key, since `q·(k − m)` differs
from `q·k` by the same number for all keys; the log-sum-exp does, and gets `scale·q·m` back (`lse_shift`).

Scales: queries have one per token (`absmax / 127` or `/ 448`), with the softmax scale and log2(e) folded in, so that
base-2 logits are `scores · query_scale · key_scale`; keys one per group, of which the kernel reads a part at once;
values one per channel over all keys, because it has to leave the sum over keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PRECISIONS = ("native", "int8", "int8_fp8", "fp8")
INT8_MAX = 127.0
E4M3_MAX = 448.0
LOG2E = math.log2(math.e)
# Tokens: what rows of E4M3 values are a multiple of, and the longest tile of keys that attention reads.
_ALIGNED, _LONGEST_TILE = 128, 128
# Keeps the scales of all-zero groups positive without moving any other.
TINY = 1e-20


@dataclass(frozen=True, eq=False)
class Means:
    """One pseudo key per key block, which stands for the whole block wherever a list leaves it out.

    Attributes:
        key: `[batch, heads, cols, dim]`, mean of the block's valid keys, in the format of the keys.
        value: `[batch, heads, cols, dim]`, mean of their values, in the format of the values.
        key_scale: float32 `[batch, heads, cols]`, None in native precision.
        bias: float32 (float64 for float64) `[batch or 1, heads or 1, cols]`, log2 of the number of valid keys times
            their weight, −inf where there is none or the head has no remainder.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """Operands of one attention call, heads before tokens, tokens in their order.

    Attributes:
        query: `[batch, heads, seq_q, dim]`, in the precision's number format.
        key: `[batch, heads, seq_k, dim]`.
        value: `[batch, heads, seq_k, dim]`; E4M3 with contiguous tokens, 0 where nobody may read and in the room that
            `padded_tokens` adds behind each channel.
        query_scale: float32 `[batch, heads, seq_q]`, base-2 logit per unit of score (× key_scale); None in native
            precision, where it is `softmax scale · log2(e)` for all.
        key_scale: float32 `[batch, heads, ceil(seq_k / group)]`, None in native precision.
        value_scale: float32 `[batch, heads, dim]`, None unless values are E4M3.
        lse_shift: float32 `[batch, heads, seq_q]`, what smoothing took from the log-sum-exp; None if nothing.
        valid: bool `[batch, heads or 1, seq_k]`, keys that may be read; None if all may.
        means: the blocks' stand-ins, None without a remainder.
        group: keys that share a scale.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_scale: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
    lse_shift: Tensor | None
    valid: Tensor | None
    means: Means | None
    group: int


def key_group(block_k: int) -> int:
    """Keys that share a scale: a whole block, or a part of a long one that no tile of 64 or 128 crosses."""
    if block_k <= 128:
        return block_k
    return next((size for size in (128, 64) if block_k % size == 0), block_k)


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
    smooth: bool = True,
) -> Prepared:
    """Order, smooth, quantise and pool, in plain torch.

    Args:
        query, key, value: `[batch, seq, heads, dim]`.
        precision: "native", "int8" (queries and keys INT8), "int8_fp8" (and values E4M3) or "fp8" (all E4M3).
        scale: softmax scale.
        block_k: keys per block.
        key_starts: int32 `[batch or 1, heads or 1, cols + 1]`, where blocks of varying length begin, in the order of
            the keys. Every key then has a scale of its own, since the kernel's tiles begin anywhere.
        query_order, key_order: int64 `[1 or batch, 1 or heads, seq]`, place in the model's order of each ordered token.
        key_mask: bool `[batch, seq_k]` in the model's order, True = may be read.
        remainder: pool every key block into a stand-in; bool or floating `[heads]` is its weight in each head.
        smooth: subtract the mean key before keys are quantised.
    """
    group = key_group(block_k) if key_starts is None else 1
    q, k, v = ordered(query, query_order), ordered(key, key_order), ordered(value, key_order)
    valid = None
    if key_mask is not None:
        valid = ordered_mask(key_mask, key_order)
    if precision == "native":
        means = None if remainder is False else _means(k, v, valid, block_k, key_starts, remainder)
        return Prepared(q, k, v, None, None, None, None, valid, means, group)

    k = k.float()
    lse_shift = None
    if smooth:
        mean = k.mean(2, keepdim=True) if valid is None else _masked_mean(k, valid)
        lse_shift = (scale * (q.float() @ mean.transpose(2, 3))[..., 0]).contiguous()
        k = k - mean
    if valid is not None:
        # What nobody may read must not coarsen the scales.
        k = k.masked_fill(~valid[..., None], 0)
        v = v if precision == "int8" else v.masked_fill(~valid[..., None], 0)
    means = None if remainder is False else _means(k, v.float(), valid, block_k, key_starts, remainder)
    dtype = torch.float8_e4m3fn if precision == "fp8" else torch.int8
    q8, query_scale = quantise(q[..., None, :], dtype)
    k8, key_scale = quantise(F.pad(k, (0, 0, 0, -k.shape[2] % group)).unflatten(2, (-1, group)), dtype)
    value_scale = None
    if precision != "int8":
        value_scale = (v.float().abs().amax(2) / E4M3_MAX).clamp(min=TINY).contiguous()
        v = e4m3_values(v, value_scale, block_k if key_starts is None else 1)
    if means is not None:
        m8, mean_scale = quantise(means.key[..., None, :], dtype)
        mean_v = means.value.to(value.dtype)
        if value_scale is not None:
            mean_v = e4m3_values(means.value, value_scale, 1)
        means = Means(m8[..., 0, :], mean_v, mean_scale, means.bias)
    return Prepared(
        query=q8[..., 0, :],
        key=k8.flatten(2, 3)[:, :, : k.shape[2]],
        value=v,
        query_scale=query_scale * (scale * LOG2E),
        key_scale=key_scale,
        value_scale=value_scale,
        lse_shift=lse_shift,
        valid=valid,
        means=means,
        group=group,
    )


def checked_order(
    name: str, order: Tensor | None, batch: int, heads: int, seq: int, device: torch.device
) -> Tensor | None:
    """An order as callers give it, `[1 or heads, seq]` or `[1 or batch, 1 or heads, seq]`, in the latter form.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if order is None:
        return None
    three = order[None] if order.ndim == 2 else order
    fits = three.ndim == 3 and three.shape[0] in (1, batch) and three.shape[1] in (1, heads)
    if order.dtype != torch.int64 or not fits or three.shape[2] != seq:
        raise ValueError(
            f"{name} must be int64 [1 or {heads}, {seq}] or [1 or {batch}, 1 or {heads}, {seq}], a token for each "
            f"place, got {order.dtype} {tuple(order.shape)}"
        )
    if order.device != device:
        raise ValueError(f"{name} must be on {device} like query, got {order.device}; move it with .to()")
    return three


def ordered(tokens: Tensor, order: Tensor | None) -> Tensor:
    """`[batch, seq, heads, dim]` in the model's order to `[batch, heads, seq, dim]` in another."""
    if order is None:
        return tokens.transpose(1, 2)
    batch, seq, heads, _ = tokens.shape
    b, h = (
        torch.arange(n, device=tokens.device).view(shape)
        for n, shape in ((batch, (-1, 1, 1)), (heads, (-1, 1)))
    )
    source = ((b * seq + order) * heads + h).flatten()
    return tokens.reshape(-1, tokens.shape[3]).index_select(0, source).unflatten(0, (batch, heads, -1))


def restored(tokens: Tensor, order: Tensor | None) -> Tensor:
    """What `ordered` is undone by, contiguous."""
    if order is None:
        return tokens.transpose(1, 2).contiguous()
    batch, heads, seq, _ = tokens.shape
    places = torch.arange(seq, device=order.device).expand_as(order)
    inverse = torch.empty_like(order).scatter_(2, order, places).transpose(1, 2)
    b, h = (
        torch.arange(n, device=order.device).view(shape)
        for n, shape in ((batch, (-1, 1, 1)), (heads, (1, 1, -1)))
    )
    source = ((b * heads + h) * seq + inverse).flatten()
    return tokens.reshape(-1, tokens.shape[3]).index_select(0, source).unflatten(0, (batch, seq, heads))


def ordered_mask(mask: Tensor, order: Tensor | None) -> Tensor:
    """bool `[batch, seq]` to `[batch, heads or 1, seq]` in an order."""
    if order is None:
        return mask.contiguous()[:, None]
    shape = (len(mask), *order.shape[1:])
    return mask[:, None].expand(shape).gather(2, order.expand(shape))


def quantise(groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale groups `[..., tokens, dim]` to the range of a format; (numbers, float32 scales `[...]`).

    Halves round up, as adding 0.5 and rounding down does; E4M3 rounds to the nearest even number.
    """
    largest = INT8_MAX if dtype == torch.int8 else E4M3_MAX
    scales = (groups.float().abs().amax((-2, -1)) / largest).clamp(min=TINY).contiguous()
    scaled = groups.float() / scales[..., None, None]
    return ((scaled + 0.5).floor() if dtype == torch.int8 else scaled).to(dtype), scales


def padded_tokens(tokens: int, block: int) -> int:
    """Room that a channel of E4M3 values takes: its row starts aligned and ends in zeros, a tile behind the last block.

    Attention reads whole tiles of them, without a mask.
    """
    return -(-(-(-tokens // block) * block) // _ALIGNED) * _ALIGNED + _LONGEST_TILE


def e4m3_values(values: Tensor, scale: Tensor, block: int) -> Tensor:
    """Scaled, with contiguous tokens: Hopper's matrix units want 8-bit values that way; zeros behind them."""
    tokens = values.shape[2]
    room = padded_tokens(tokens, block) - tokens
    scaled = F.pad(values.float() / scale[:, :, None], (0, 0, 0, room)).to(torch.float8_e4m3fn)
    return scaled.transpose(2, 3).contiguous().transpose(2, 3)[:, :, :tokens]


def _masked_mean(tokens: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid tokens, `[batch, heads, 1, dim]`."""
    weight = valid[..., None].to(tokens.dtype)
    return (tokens * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)


def _means(
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    block: int,
    starts: Tensor | None,
    remainder: bool | Tensor,
) -> Means:
    """Unquantised stand-ins; sums run in float32, or in float64 for float64."""
    wide = torch.promote_types(key.dtype, torch.float32)
    dtype = key.dtype
    ones = torch.ones(1, 1, key.shape[2], 1, dtype=wide, device=key.device)
    sizes = _block_sums(ones, block, starts, wide)
    if valid is not None:
        weight = valid[..., None].to(wide)
        key, value = (tokens.to(wide) * weight for tokens in (key, value))
        sizes = _block_sums(weight, block, starts, wide)

    def pooled(tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return (_block_sums(tokens, block, starts, wide) / sizes.clamp(min=1)).to(dtype).contiguous()

    return Means(
        pooled(key, dtype), pooled(value, dtype), None, with_remainder(sizes[..., 0].log2(), remainder)
    )


def with_remainder(bias: Tensor, remainder: bool | Tensor) -> Tensor:
    """Binary logarithms `[batch or 1, heads or 1, cols]` of the stand-ins' weights, −inf for heads that have none."""
    if isinstance(remainder, bool):
        return bias
    return bias + remainder.to(bias.dtype).log2()[:, None]


def _block_sums(tokens: Tensor, block: int, starts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums over the blocks of `[batch, heads, seq, dim]`, `[batch, heads, cols, dim]`."""
    if starts is not None:
        batch, heads = (max(pair) for pair in zip(tokens.shape[:2], starts.shape[:2], strict=True))
        lengths = starts.diff().expand(batch, heads, -1).contiguous()
        tokens = tokens.to(dtype).expand(batch, heads, -1, -1).contiguous()
        # Checked lengths would have the host wait.
        return torch.segment_reduce(tokens, "sum", lengths=lengths, axis=2, unsafe=True)
    whole = tokens.shape[2] // block * block
    sums = tokens[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=dtype)
    if whole < tokens.shape[2]:
        sums = torch.cat([sums, tokens[:, :, whole:].sum(2, keepdim=True, dtype=dtype)], dim=2)
    return sums
