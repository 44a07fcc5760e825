"""The public entry point: validation, the choice of backend, dispatch."""

from __future__ import annotations

import torch
from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.block_sparse import gather, reference
from torch import Tensor

BACKENDS = ("auto", "reference", "torch")
PRECISIONS = ("native",)


def resolve_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that `auto` runs for tensors of this device and dtype."""
    return "reference" if dtype == torch.float64 else "torch"


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
    _check(query, key, value, index, precision, backend, key_mask)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if backend == "auto":
        backend = resolve_backend(query.device, query.dtype)
    if backend == "reference":
        output, lse = reference.attention(query, key, value, index, scale, key_mask)
    else:
        output, lse = gather.attention(query, key, value, index, scale, key_mask, return_lse)
    return (output, lse) if return_lse else output


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: BlockIndex,
    precision: str,
    backend: str,
    key_mask: Tensor | None,
) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
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
