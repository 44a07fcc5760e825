"""Block-sparse attention through compiled `flex_attention`, which on CPUs gives no log-sum-exp."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.prepare import Prepared


def attention(prepared: Prepared, index: BlockIndex, scale: float) -> Tensor:
    """Run one compiled graph, dynamic in lengths and block lists; native precision."""
    return run(operands(prepared, index), index, scale).to(prepared.query.dtype)


def operands(prepared: Prepared, index: BlockIndex) -> tuple[Tensor, ...]:
    """What the graph is called with: query, key and value in whole blocks, lists, and which keys may be read."""
    query, key, value = prepared.query, prepared.key, prepared.value
    batch, heads = query.shape[:2]
    dtype = query.dtype
    if query.device.type == "cpu" and dtype != torch.float64 and not torch.cpu._is_amx_tile_supported():
        # Without AMX the generated code is 2.5 times faster in float32 than in 16 bits.
        query, key, value = query.float(), key.float(), value.float()
    q, k, v = _pad(query, index.block_q), _pad(key, index.block_k), _pad(value, index.block_k)
    valid = torch.zeros(batch, heads, k.shape[2], dtype=torch.bool, device=q.device)
    valid[:, :, : index.seq_k] = True if prepared.valid is None else prepared.valid

    # Blocks with an invalid key are partial: only they pay for the mask.
    partial = ~valid.view(batch, heads, 1, index.cols, index.block_k).all(-1)
    blocks = index.to_mask()
    return q, k, v, *_padded_lists(blocks & partial), *_padded_lists(blocks & ~partial), valid


def run(prepared: tuple[Tensor, ...], index: BlockIndex, scale: float) -> Tensor:
    """The graph on its `operands`: `[batch, heads, seq_q, dim]`."""
    return _compiled()(*prepared, scale, index.block_q, index.block_k)[:, :, : index.seq_q]


def _run(q, k, v, partial_counts, partial, full_counts, full, valid, scale, block_q, block_k):
    mask = BlockMask.from_kv_blocks(
        partial_counts,
        partial,
        full_counts,
        full,
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=lambda b, h, q_idx, kv_idx: valid[b, h, kv_idx],
        compute_q_blocks=False,
    )
    # The compiler's own tiles need not divide our blocks.
    # Comparisons, since `min` of a symbolic size is no size that the compiler would take.
    tiles: Any = None
    if q.device.type == "cuda":
        tiles = {"BLOCK_M": block_q if block_q < 128 else 128, "BLOCK_N": block_k if block_k < 64 else 64}
    return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=tiles)


@lru_cache(maxsize=1)
def _compiled():
    return torch.compile(_run, dynamic=True, fullgraph=True)


def _padded_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and full-width lists, kept blocks first and ascending, as BlockMask wants them."""
    lists = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), lists.to(torch.int32)


def _pad(x: Tensor, block: int) -> Tensor:
    """[batch, heads, seq, dim] -> [batch, heads, whole blocks, dim], contiguous: strides are compiled in."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).contiguous()
