"""The public entry point: validation, the choice of backend, dispatch."""

from __future__ import annotations

import os
from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.block_sparse import gather, reference

BACKENDS = ("auto", "reference", "torch", "flex", "triton")
PRECISIONS = ("native",)


def resolve_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that "auto" runs for tensors of this device and dtype.

    CUDA and ROCm run "triton". float64 runs "reference", the only purpose of float64 being exactness.
    Everything else runs "torch": measured on a CPU with AVX512-bf16 it takes half the time of "flex" at
    every density, and it has no compilation of many seconds to earn back. "flex" is there on request.
    """
    if dtype == torch.float64:
        return "reference"
    return "triton" if torch.device(device).type == "cuda" else "torch"


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: BlockIndex,
    *,
    scale: float | None = None,
    precision: str = "native",
    backend: str = "auto",
    return_lse: Literal[False] = False,
    key_mask: Tensor | None = None,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: BlockIndex,
    *,
    scale: float | None = None,
    precision: str = "native",
    backend: str = "auto",
    return_lse: Literal[True],
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: BlockIndex,
    *,
    scale: float | None = None,
    precision: str = "native",
    backend: str = "auto",
    return_lse: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query block reads only the key blocks its list names.

    Args:
        query: `[batch, seq_q, heads, dim]`, float16, bfloat16, float32 or float64, any strides.
        key, value: `[batch, seq_k, heads, dim]`, same dtype and device.
        index: the block lists; their batch may be 1 for lists shared by the whole batch.
        scale: factor on the scores, default `dim ** -0.5`.
        precision: "native" computes in the dtype of the inputs.
        backend: "auto" (see `resolve_backend`), "reference", "torch", "flex" or "triton".
        return_lse: also return the log-sum-exp of each query's scaled scores.
        key_mask: bool `[batch, seq_k]`, True = may be attended, on top of the lists.

    Returns:
        The output, shaped like `query`, and with `return_lse` also float32 `[batch, heads, seq_q]` in
        natural logarithms. A query without any key gives 0 and -inf.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or a name is unknown.
    """
    _check(query, key, value, index, precision, key_mask)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if backend == "auto":
        backend = resolve_backend(query.device, query.dtype)
    _check_backend(backend, query, return_lse)
    # Triton and the compiler stack behind flex are imported by those who use them.
    if backend == "reference":
        output, lse = reference.attention(query, key, value, index, scale, key_mask)
    elif backend == "torch":
        output, lse = gather.attention(query, key, value, index, scale, key_mask, return_lse)
    elif backend == "triton":
        from dit_accel.kernels.block_sparse import triton_kernel

        output, lse = triton_kernel.attention(query, key, value, index, scale, key_mask)
    else:
        from dit_accel.kernels.block_sparse import flex

        return flex.attention(query, key, value, index, scale, key_mask)
    return (output, lse) if return_lse else output


def _check_backend(backend: str, query: Tensor, return_lse: bool) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "flex" and return_lse:
        raise ValueError("backend 'flex' cannot return the log-sum-exp; use 'torch', 'triton' or 'auto'")
    if backend in ("flex", "triton") and query.dtype == torch.float64:
        raise ValueError(f"backend {backend!r} has no float64; use 'reference', 'torch' or 'auto'")
    if backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
        if query.device.type != "cuda" and not interpreted:
            raise ValueError(
                f"backend 'triton' needs tensors on a GPU, got {query.device}; use 'torch' or 'auto', "
                "or set TRITON_INTERPRET=1 before the first import to debug the kernel"
            )
        if query.shape[-1] > 256:
            raise ValueError(
                f"backend 'triton' serves head dims up to 256, got {query.shape[-1]}; use 'torch'"
            )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: BlockIndex,
    precision: str,
    key_mask: Tensor | None,
) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if query.ndim != 4:
        raise ValueError(f"query must be [batch, seq_q, heads, dim], got {tuple(query.shape)}")
    batch, _, heads, dim = query.shape
    if index.batch not in (1, batch) or index.heads != heads or index.seq_q != query.shape[1]:
        raise ValueError(
            f"index is for [batch {index.batch}, seq_q {index.seq_q}, heads {index.heads}], "
            f"query is {tuple(query.shape)}; build the index for this query"
        )
    for name, x in (("key", key), ("value", value)):
        if tuple(x.shape) != (batch, index.seq_k, heads, dim):
            raise ValueError(
                f"{name} must be {(batch, index.seq_k, heads, dim)} to match query and index, "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device} like query, got {x.dtype} on {x.device}"
            )
    if not query.is_floating_point():
        raise ValueError(f"query must be a floating point tensor, got {query.dtype}")
    if index.counts.device != query.device:
        raise ValueError(
            f"index is on {index.counts.device}, query on {query.device}; use index.to(query.device)"
        )
    if key_mask is not None:
        if key_mask.dtype != torch.bool or tuple(key_mask.shape) != (batch, index.seq_k):
            raise ValueError(
                f"key_mask must be bool {(batch, index.seq_k)}, got {key_mask.dtype} {tuple(key_mask.shape)}"
            )
        if key_mask.device != query.device:
            raise ValueError(f"key_mask must be on {query.device} like query, got {key_mask.device}")
