"""The public entry point: validation, the choice of backend, dispatch."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from typing import Any, Literal, overload

import torch
from torch import Tensor

from dit_accel.kernels.backend import triton
from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.block_sparse import by_row, gather, reference
from dit_accel.kernels.prepare import PRECISIONS, checked_order, prepare, restored

BACKENDS = ("auto", "reference", "torch", "flex", "triton")
# The oldest CUDA architectures whose matrix units multiply a precision's numbers.
_FIRST_ARCHITECTURE = {"int8": (8, 0), "int8_fp8": (8, 9), "fp8": (8, 9)}
_MOST_DIMS = 256  # of a head that the Triton kernel serves
# What "auto" takes where a precision is missing.
_NEXT_BEST = {"fp8": "int8", "int8_fp8": "int8", "int8": "native"}


def resolve_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that "auto" runs for tensors of this device and dtype.

    CUDA and ROCm run "triton" where the package is there. float64 runs "reference", the only purpose of float64 being
    exactness. Everything else runs "torch": measured on a CPU with AVX512-bf16 it takes half the time of "flex" at
    every density, and it has no compilation of many seconds to earn back. "flex" is there on request.
    """
    if dtype == torch.float64:
        return "reference"
    return "triton" if torch.device(device).type == "cuda" and triton is not None else "torch"


def resolve_precision(precision: str, device: torch.device | str, backend: str) -> str:
    """The precision that "auto" runs in place of one that the device or backend lacks; says so once.

    8-bit products exist in the Triton kernel (INT8 from sm_80, E4M3 from sm_89) and in the reference.
    """
    device = torch.device(device)
    reason, found = _missing(precision, device, backend), precision
    while _missing(found, device, backend):
        found = _NEXT_BEST[found]
    if reason:
        warnings.warn(f"precision {precision!r}: {reason}; using {found!r}", stacklevel=3)
    return found


def available_precisions(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """The precisions that "auto" runs as they are for tensors of this device and dtype, "native" first."""
    device = torch.device(device)
    backend = resolve_backend(device, dtype)
    return tuple(p for p in PRECISIONS if _missing(p, device, backend) is None)


def _missing(precision: str, device: torch.device, backend: str) -> str | None:
    """Why a backend cannot run a precision on a device, None if it can."""
    if precision == "native" or backend == "reference":
        return None
    if backend != "triton":
        return f"backend {backend!r} computes in the inputs' dtype only"
    if device.type == "cuda" and torch.version.hip is not None and precision != "int8":
        return "E4M3 is built for NVIDIA GPUs only"
    if device.type == "cuda" and torch.version.cuda is not None:
        found = torch.cuda.get_device_capability(device)
        if found < (first := _FIRST_ARCHITECTURE[precision]):
            return f"needs sm_{first[0]}{first[1]} or newer, got sm_{found[0]}{found[1]}"
    return None


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
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    remainder: float | Tensor = False,
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
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    remainder: float | Tensor = False,
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
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    remainder: float | Tensor = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query block reads only the key blocks its list names.

    Args:
        query: `[batch, seq_q, heads, dim]`, float16, bfloat16, float32 or float64, any strides.
        key, value: `[batch, seq_k, heads, dim]`, same dtype and device.
        index: the block lists; their batch may be 1 for lists shared by the whole batch.
        scale: factor on the scores, default `dim ** -0.5`.
        precision: "native" multiplies in the dtype of the inputs; "int8" queries and keys in INT8; "int8_fp8" also
            weights and values in E4M3; "fp8" all four in E4M3. See `dit_accel.kernels.prepare`.
        backend: "auto" (see `resolve_backend`; it also replaces a precision that the device lacks, and says so),
            "reference", "torch", "flex" or "triton".
        return_lse: also return the log-sum-exp of each query's scaled scores.
        key_mask: bool `[batch, seq_k]`, True = may be attended, on top of the lists.
        query_order, key_order: int64 `[1 or heads, seq]` or `[1 or batch, 1 or heads, seq]`, the token at each place of
            the order that the lists speak of; None if it is that of the tensors. Every token occurs once.
        remainder: key blocks that a row's list leaves out contribute through their mean key and mean value, with the
            weight of all their tokens: logit `scale·q·k̄ + log(tokens)`, in the same softmax. A number from 0 weighs
            them that many times as much (True is 1, False is 0), bool or floating `[heads]` does so head by head.

    Returns:
        The output, shaped like `query`, and with `return_lse` also float32 `[batch, heads, seq_q]` in
        natural logarithms. A query without any key gives 0 and -inf. Both follow the order of the tensors.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, a name is unknown, or the backend or device
            lacks the precision.
    """
    _check(query, key, value, index, key_mask)
    batch, _, heads, _ = query.shape
    query_order = checked_order("query_order", query_order, batch, heads, index.seq_q, query.device)
    key_order = checked_order("key_order", key_order, batch, heads, index.seq_k, query.device)
    remainder = _checked_remainder(query, remainder)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    _check_backend(backend, query, index, return_lse, remainder is not False)
    run = _op if torch.compiler.is_compiling() else _attend
    output, lse = run(
        query,
        key,
        value,
        index.counts,
        index.offsets,
        index.indices,
        index.query_starts,
        index.key_starts,
        [index.block_q, index.block_k, index.seq_q, index.seq_k],
        scale,
        precision,
        backend,
        return_lse,
        key_mask,
        query_order,
        key_order,
        remainder is not False,
        remainder if isinstance(remainder, Tensor) else None,
    )
    return (output, lse) if return_lse else output


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    offsets: Tensor,
    indices: Tensor,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    sizes: list[int],
    scale: float,
    precision: str,
    backend: str,
    return_lse: bool,
    key_mask: Tensor | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    remainder: bool,
    remainder_of: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The call in terms that an operator of torch.library can have; without `return_lse` the second result is empty."""
    block_q, block_k, seq_q, seq_k = sizes
    index = BlockIndex(counts, offsets, indices, block_q, block_k, seq_q, seq_k, query_starts, key_starts)
    rest = remainder_of if remainder_of is not None else remainder
    if backend == "auto":
        backend = resolve_backend(query.device, query.dtype)
        if backend == "triton" and query.shape[-1] > _MOST_DIMS:
            warnings.warn(
                f"backend 'triton' serves head dims up to {_MOST_DIMS}, got {query.shape[-1]}; using 'torch'",
                stacklevel=2,
            )
            backend = "torch"
        precision = resolve_precision(precision, query.device, backend)
    if reason := _missing(precision, query.device, backend):
        raise ValueError(f"precision {precision!r}: {reason}; use another, or backend 'auto'")
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(query):
        given: dict[str, Any] = {
            "precision": precision,
            "scale": scale,
            "block_k": index.block_k,
            "key_starts": key_starts,
            "key_order": key_order,
            "key_mask": key_mask,
            "remainder": rest,
        }
        none = query.new_empty(0, dtype=torch.float32)
        # Triton and the compiler stack behind flex are imported by those who use them.
        if backend == "triton":
            from dit_accel.kernels import prepare_triton
            from dit_accel.kernels.block_sparse import triton_kernel

            laid_out = prepare_triton.prepare(query, key, value, **given)
            output, lse = triton_kernel.attention(laid_out, index, scale, query_order, query.dtype)
            return output, lse if return_lse else none
        prepared = prepare(query, key, value, query_order=query_order, **given)
        if backend == "flex":
            from dit_accel.kernels.block_sparse import flex

            return restored(flex.attention(prepared, index, scale), query_order), none
        if backend == "reference":
            output, lse = reference.attention(prepared, index, scale)
            output = output.to(query.dtype)
        elif index.varies:
            output, lse = by_row.attention(prepared, index, scale, return_lse)
        else:
            output, lse = gather.attention(prepared, index, scale, return_lse)
        output = restored(output, query_order)
        if not return_lse:
            return output, none
        return output, restored(lse[..., None], query_order)[..., 0].transpose(1, 2).contiguous()


# Under torch.compile a call is one node, whose cost of dispatch eager calls do without.
_op = torch.library.custom_op("dit_accel::block_sparse_attention", _attend, mutates_args=())


@_op.register_fake
def _shapes(query: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    given = inspect.signature(_attend).bind(query, *arguments, **named).arguments
    batch, seq_q, heads, _ = query.shape
    lse_shape = (batch, heads, seq_q) if given["return_lse"] else (0,)
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)


def _check_backend(backend: str, query: Tensor, index: BlockIndex, return_lse: bool, remainder: bool) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "flex" and return_lse:
        raise ValueError("backend 'flex' cannot return the log-sum-exp; use 'torch', 'triton' or 'auto'")
    if backend == "flex" and remainder:
        raise ValueError("backend 'flex' has no remainder; use 'torch', 'triton' or 'auto'")
    if backend == "flex" and index.varies:
        raise ValueError("backend 'flex' has equal blocks only; use 'torch', 'triton' or 'auto'")
    if backend in ("flex", "triton") and query.dtype == torch.float64:
        raise ValueError(f"backend {backend!r} has no float64; use 'reference', 'torch' or 'auto'")
    if backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
        if query.device.type != "cuda" and not interpreted:
            raise ValueError(
                f"backend 'triton' needs tensors on a GPU, got {query.device}; use 'torch' or 'auto', "
                "or set TRITON_INTERPRET=1 before the first import to debug the kernel"
            )
        if query.shape[-1] > _MOST_DIMS:
            raise ValueError(
                f"backend 'triton' serves head dims up to {_MOST_DIMS}, got {query.shape[-1]}; use 'torch'"
            )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: BlockIndex,
    key_mask: Tensor | None,
) -> None:
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


def _checked_remainder(query: Tensor, remainder: float | Tensor) -> bool | Tensor:
    """True or False for all heads, else a weight for each."""
    heads = query.shape[2]
    if isinstance(remainder, Tensor):
        numbers = remainder.dtype == torch.bool or remainder.dtype.is_floating_point
        got = f"{remainder.dtype} {tuple(remainder.shape)}"
        if numbers and remainder.shape == (heads,):
            if remainder.device != query.device:
                raise ValueError(f"remainder must be on {query.device} like query, got {remainder.device}")
            return remainder
    elif isinstance(remainder, bool | int | float) and 0 <= remainder < math.inf:
        if remainder in (0, 1):
            return bool(remainder)
        return query.new_full((heads,), remainder, dtype=torch.float64)
    else:
        got = repr(remainder)
    raise ValueError(
        f"remainder must be True, False, a number from 0, or bool or floating [{heads}], one per head, got {got}"
    )
