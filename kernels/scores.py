"""Scores of key blocks, for `select_blocks` to choose by: exact softmax mass and three cheaper estimates of it.

All four are one thing: tokens, or stand-ins for several tokens, attend, and the weights are summed over pairs of
blocks. Key stand-ins count by the tokens they stand for: a logit is their mean score plus log(tokens). So every row is
a distribution over the key blocks.

- `block_mass`: the tokens themselves, AdaSpa (https://arxiv.org/abs/2502.21079).
- `antidiagonal_scores`: runs of `stride` tokens, paired in opposite directions, XAttention
  (https://arxiv.org/abs/2503.16428).
- `pooled_scores`: means of runs, MInference (https://arxiv.org/abs/2407.02490), DraftAttention
  (https://arxiv.org/abs/2505.14708).
- `lowbit_scores`: the tokens in 4 bits, SALE (https://arxiv.org/abs/2505.24179).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.backend import torch_or_triton
from dit_accel.kernels.prepare import TINY, checked_order, key_group, ordered, ordered_mask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_TRITON_DIM = 256
# Logits that the torch backend holds at once, unless one row of blocks has more.
STEP_LOGITS = 1 << 22
STEP_LOGITS_CUDA = 1 << 26  # where launches cost more than memory


def step_logits(device: torch.device) -> int:
    """How many logits a device should hold at once."""
    return STEP_LOGITS_CUDA if device.type == "cuda" else STEP_LOGITS


@torch.no_grad()
def block_mass(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    lse: Tensor | None = None,
    scale: float | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact softmax mass that each query block has in each key block, mean over its queries.

    The online search of AdaSpa (https://arxiv.org/abs/2502.21079). Without `lse` the keys are read twice, first for
    the log-sum-exp of every query. With it they are read once; it may come from an earlier step, whose queries and
    keys were others: then every query's mass is scaled by exp(true lse − given lse), and rows do not sum to 1. The
    weights within one query keep their proportions. Memory beyond copies of the inputs grows with blocks × blocks only.

    Args:
        query: `[batch, seq_q, heads, dim]`, float16, bfloat16, float32, or float64 for the torch backend; any strides.
        key: `[batch, seq_k, heads, dim]`, same dtype and device.
        block_q, block_k: tokens per query and key block; the last ones may be short.
        lse: float32 `[batch, heads, seq_q]`, log-sum-exp of each query's scaled scores in natural logarithms, in the
            order of the tensors, as `block_sparse_attention` and this function return it. A query with -inf has no
            mass.
        scale: factor on the scores, default `dim ** -0.5`.
        query_order, key_order: int64 `[1 or heads, seq]` or `[1 or batch, 1 or heads, seq]`, the token at each place of
            the order that is cut into blocks; None if it is that of the tensors. Every token occurs once.
        key_mask: bool `[batch, seq_k]` in the order of the tensors, True = may be attended.
        backend: "triton" on a GPU (head dims up to 256), "torch" anywhere, or "auto": "triton" on CUDA and ROCm where
            it can, otherwise "torch". The host never waits for the device.

    Returns:
        float32 `[batch, heads, ceil(seq_q / block_q), ceil(seq_k / block_k)]`, whose rows sum to 1, or 0 without any
        key, and the log-sum-exp: the given one, or that of these queries and keys, -inf without any key.

    Raises:
        ValueError: if shapes, dtypes, devices, numbers or the backend do not fit.

    Example:
        >>> q, k = torch.randn(1, 333, 4, 64), torch.randn(1, 517, 4, 64)
        >>> mass, lse = block_mass(q, k, block_q=64, block_k=64)
        >>> index = select_blocks(mass, block_q=64, block_k=64, seq_q=333, seq_k=517, top_p=0.9)
    """
    scale, query_order, key_order = _check(
        query, key, scale, query_order, key_order, key_mask, block_q=block_q, block_k=block_k
    )
    _check_lse(lse, query)
    q, k, valid = ordered(query, query_order), ordered(key, key_order), _valid(key_mask, key_order)
    counts = None if valid is None else valid.float()
    if _resolve_backend(backend, query) == "triton":
        from dit_accel.kernels import scores_triton

        return scores_triton.block_mass(
            q, k, counts, block_q=block_q, block_k=block_k, scale=scale, lse=lse, query_order=query_order
        )
    given = lse
    if lse is not None and query_order is not None:
        lse = lse.gather(2, query_order.expand(*lse.shape[:2], -1))
    logits = _logits(q, _without(k, valid), counts, scale)
    mass, found = _mass(
        logits, _run_sizes(query.shape[1], 1, query.device), k.shape[:3], block_q, block_k, lse
    )
    if given is not None:
        return mass, given
    found = found.float()
    if query_order is not None:
        found = torch.empty_like(found).scatter_(2, query_order.expand_as(found), found)
    return mass, found


@torch.no_grad()
def antidiagonal_scores(
    query: Tensor,
    key: Tensor,
    *,
    block: int,
    stride: int = 16,
    scale: float | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Block mass between runs of `stride` tokens, whose score is the mean over the antidiagonal between them.

    XAttention (https://arxiv.org/abs/2503.16428): query s − 1 − i of one run meets key i of another, for i from 0 to
    s − 1; every query and every key takes part, and diagonal and vertical patterns all cross the antidiagonals. The
    scores are scaled, averaged, put through a softmax over the runs and summed over pairs of blocks; the paper's sum
    is a mean over the queries here. 1/stride of the multiplications of `block_mass`.

    What the paper pads with zeros is defined by the tokens that are there. The missing queries of a short last run
    are the last query repeated, and the run counts by its real queries. A run of keys with m < stride valid ones has
    the mean over these m, plus log(m/stride) for being fewer.

    Args:
        block: tokens per query and per key block, a multiple of `stride`.
        stride: tokens per run; the paper's are 8 and 16.

    Other arguments, shape and row sums of the result: see `block_mass`.

    Raises:
        ValueError: if shapes, dtypes, devices, numbers or the backend do not fit.

    Example:
        >>> q, k = torch.randn(1, 333, 4, 64), torch.randn(1, 517, 4, 64)
        >>> scores = antidiagonal_scores(q, k, block=64)  # [1, 4, 6, 9]
    """
    scale, query_order, key_order = _check(
        query, key, scale, query_order, key_order, key_mask, block=block, stride=stride
    )
    if block % stride:
        raise ValueError(
            f"block must be a multiple of stride = {stride}, got {block}; use a stride that divides it"
        )
    q, k, valid = ordered(query, query_order), ordered(key, key_order), _valid(key_mask, key_order)
    seq_q = query.shape[1]
    counts = _counts(valid, key.shape[1], stride, query.device)
    k = _without(k, valid)
    if _resolve_backend(backend, query) == "triton":
        from dit_accel.kernels import scores_triton

        return scores_triton.run_mass(q, k, counts, stride, block=block // stride, scale=scale)
    q = torch.cat([q, q[:, :, -1:].expand(-1, -1, -seq_q % stride, -1)], dim=2)
    q = q.unflatten(2, (-1, stride)).flip(3).flatten(3)
    k = F.pad(k, (0, 0, 0, -k.shape[2] % stride)).unflatten(2, (-1, stride)).flatten(3)
    logits = _logits(q, k, counts, scale)
    sizes = _run_sizes(seq_q, stride, query.device)
    return _mass(logits, sizes, k.shape[:3], block // stride, block // stride)[0]


@torch.no_grad()
def pooled_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    parts: int = 1,
    scale: float | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Block mass between means: each block is pooled in `parts` runs, which count by their tokens.

    MInference (https://arxiv.org/abs/2407.02490) and DraftAttention (https://arxiv.org/abs/2505.14708), whose parts
    are 1. A run's logit is `scale · q̄·k̄ + log(valid keys)`. Between runs of r tokens there is 1/r² of the work of
    `block_mass`. The triton backend rounds means to the dtype of the inputs.

    Args:
        parts: runs per block, a divisor of `block_q` and of `block_k`.

    Other arguments, shape and row sums of the result: see `block_mass`.

    Raises:
        ValueError: if shapes, dtypes, devices or numbers do not fit.

    Example:
        >>> q, k = torch.randn(1, 333, 4, 64), torch.randn(1, 517, 4, 64)
        >>> scores = pooled_scores(q, k, block_q=64, block_k=32, parts=4)  # [1, 4, 6, 17]
    """
    scale, query_order, key_order = _check(
        query, key, scale, query_order, key_order, key_mask, block_q=block_q, block_k=block_k, parts=parts
    )
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block % parts:
            raise ValueError(
                f"parts must divide {name} = {block}, got {parts}; use a divisor of both block sizes"
            )
    if _resolve_backend(backend, query) == "triton":
        from dit_accel.kernels import scores_triton

        return scores_triton.mean_mass(
            query,
            key,
            block_q=block_q,
            block_k=block_k,
            parts=parts,
            scale=scale,
            query_order=query_order,
            key_order=key_order,
            key_mask=key_mask,
        )
    q, k, valid = ordered(query, query_order), ordered(key, key_order), _valid(key_mask, key_order)
    wide = _wide(q)
    sizes = _run_sizes(query.shape[1], block_q // parts, query.device)
    means = _block_sums(q, 2, block_q // parts, wide) / sizes[:, None].to(wide)
    # A sum over its count is a mean: what the logits divide by.
    sums = _block_sums(_without(k, valid), 2, block_k // parts, wide)
    counts = _counts(valid, key.shape[1], block_k // parts, query.device)
    return _mass(_logits(means, sums, counts, scale), sizes, sums.shape[:3], parts, parts)[0]


@torch.no_grad()
def lowbit_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_k: int,
    bits: int = 4,
    scale: float | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Block mass of queries and keys in 4 bits, estimated with integer products.

    SALE (https://arxiv.org/abs/2505.24179) with the smoothing of SageAttention (https://arxiv.org/abs/2410.02367).
    From the keys the mean of the valid ones is subtracted, which no softmax sees. Numbers are rounded to
    −n..n, n = 2^(bits−1) − 1, times a scale: absmax ÷ n of each query, and of the valid keys of each block (a long
    block has several scales, see `prepare.key_group`). The mass is that of the estimated logits, over all queries.

    Args:
        bits: 2 to 4; the Triton kernel reads two numbers per byte and multiplies in INT8.

    Other arguments, shape and row sums of the result: see `block_mass`.

    Raises:
        ValueError: if shapes, dtypes, devices, numbers or the backend do not fit.

    Example:
        >>> q, k = torch.randn(1, 333, 4, 64), torch.randn(1, 517, 4, 64)
        >>> scores = lowbit_scores(q, k, block_q=64, block_k=64)  # [1, 4, 6, 9]
    """
    scale, query_order, key_order = _check(
        query, key, scale, query_order, key_order, key_mask, block_q=block_q, block_k=block_k, bits=bits
    )
    if not 2 <= bits <= 4:
        raise ValueError(f"bits must be 2, 3 or 4, got {bits}; for more use block_mass")
    levels, group = 2 ** (bits - 1) - 1, key_group(block_k)
    mean = _mean_key(key, key_mask)
    valid = _valid(key_mask, key_order)
    if _resolve_backend(backend, query) == "triton":
        from dit_accel.kernels import scores_triton

        return scores_triton.lowbit_mass(
            query,
            key,
            mean,
            valid,
            block_q=block_q,
            block_k=block_k,
            group=group,
            levels=levels,
            scale=scale,
            query_order=query_order,
            key_order=key_order,
        )
    q, k = ordered(query, query_order).to(mean.dtype), ordered(key, key_order) - mean[:, :, None]
    q, query_scale = quantise(q, 1, levels)
    k, key_scale = quantise(_without(k, valid), group, levels)
    key_scale = key_scale.repeat_interleave(group, 2)[:, :, None, : key.shape[1]]
    k = k.transpose(2, 3)

    def logits(first: int, last: int) -> Tensor:
        # Sums of these small integers are exact.
        s = (q[:, :, first:last] @ k) * (query_scale[:, :, first:last, None] * scale) * key_scale
        return s if valid is None else s.masked_fill(~valid[:, :, None], -torch.inf)

    sizes = _run_sizes(query.shape[1], 1, query.device)
    return _mass(logits, sizes, (*q.shape[:2], key.shape[1]), block_q, block_k)[0]


def quantise(tokens: Tensor, group: int, levels: int) -> tuple[Tensor, Tensor]:
    """Round `[batch, heads, seq, dim]` to whole numbers of −levels..levels, in their dtype, with one scale per group.

    Returns the numbers and the scales `[batch, heads, ceil(seq / group)]`. Halves round up.
    """
    largest = F.pad(tokens.abs().amax(3), (0, -tokens.shape[2] % group)).unflatten(2, (-1, group)).amax(3)
    scales = (largest / levels).clamp(min=TINY)
    spread = scales.repeat_interleave(group, 2)[:, :, : tokens.shape[2], None]
    return (tokens / spread + 0.5).floor(), scales


def _mass(
    logits: Callable[[int, int], Tensor],
    sizes: Tensor,
    keys: tuple[int, ...],
    block_q: int,
    block_k: int,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the softmax over pairs of blocks, a few rows at a time.

    Args:
        logits: of the queries from one number up to another, `[batch, heads, queries, seq_k]`.
        sizes: `[seq_q]`, tokens that each query stands for.
        keys: batch, heads, seq_k.
        lse: `[batch, heads, seq_q]`, computed if None.

    Returns:
        float32 mass `[batch, heads, rows, cols]` and the log-sum-exp.
    """
    batch, heads, seq_k = keys
    step = max(1, step_logits(sizes.device) // (batch * heads * seq_k * block_q)) * block_q
    masses, found = [], []
    for first in range(0, len(sizes), step):
        s = logits(first, first + step)
        row_lse = s.logsumexp(-1) if lse is None else lse[:, :, first : first + step]
        # Where there is no key at all, exp(-inf - inf) is 0 where exp(-inf + inf) is NaN.
        shift = row_lse.to(s.dtype).masked_fill(row_lse == -torch.inf, torch.inf)
        p = s.sub_(shift[..., None]).exp_().mul_(sizes[first : first + step, None])
        masses.append(_block_sums(_block_sums(p, 2, block_q), 3, block_k))
        found.append(row_lse)
    mass = torch.cat(masses, dim=2) / _block_sums(sizes[None], 1, block_q)[0, :, None]
    return mass.float(), torch.cat(found, dim=2)


def _logits(q: Tensor, k: Tensor, counts: Tensor | None, scale: float) -> Callable[[int, int], Tensor]:
    """Scaled products; keys that stand for `counts` tokens are sums over these, and are taken for their means.

    Products stay in bfloat16, which processors multiply fast. float16 is widened: sums over runs may leave its range.
    """
    wide = _wide(q)
    if q.dtype == torch.float16:
        q, k = q.to(wide), k.to(wide)
    k = k.transpose(2, 3)
    factor: Tensor | float = scale
    if counts is not None:
        counts = counts[:, :, None].to(wide)
        factor = scale / counts.clamp(min=1)

    def logits(first: int, last: int) -> Tensor:
        s = (q[:, :, first:last] @ k).to(wide) * factor
        return s if counts is None else s + counts.log()

    return logits


def _counts(valid: Tensor | None, seq: int, run: int, device: torch.device) -> Tensor:
    """Valid keys in each run, float32 `[batch or 1, heads or 1, runs]`."""
    if valid is None:
        return _run_sizes(seq, run, device)[None, None]
    return _block_sums(valid, 2, run, torch.float32)


def _run_sizes(seq: int, run: int, device: torch.device) -> Tensor:
    """Tokens in each run, float32 `[runs]`."""
    return (seq - torch.arange(0, seq, run, dtype=torch.float32, device=device)).clamp(max=run)


def _block_sums(x: Tensor, dim: int, block: int, dtype: torch.dtype | None = None) -> Tensor:
    """Sums over runs of `block` along a dim; the last may be short."""
    short = -x.shape[dim] % block
    if short:
        x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, short))
    return x.unflatten(dim, (-1, block)).sum(dim + 1, dtype=dtype)


def _mean_key(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean over the valid keys, `[batch, heads, dim]`, at least float32."""
    wide = _wide(key)
    if key_mask is None:
        return key.mean(1, dtype=wide)
    key = key.masked_fill(~key_mask[:, :, None, None], 0)
    return key.sum(1, dtype=wide) / key_mask.sum(1).clamp(min=1)[:, None, None]


def _valid(key_mask: Tensor | None, key_order: Tensor | None) -> Tensor | None:
    """The mask in the order of the keys, `[batch, heads or 1, seq_k]`."""
    return None if key_mask is None else ordered_mask(key_mask, key_order)


def _without(k: Tensor, valid: Tensor | None) -> Tensor:
    """Keys with zeros for those that may not be read."""
    return k if valid is None else k.masked_fill(~valid[..., None], 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _resolve_backend(backend: str, query: Tensor) -> str:
    served, dim = None, query.shape[3]
    if query.dtype == torch.float64:
        served = "float16, bfloat16 and float32, got float64"
    elif dim > MAX_TRITON_DIM:
        served = f"head dims up to {MAX_TRITON_DIM}, got {dim}"
    return torch_or_triton(backend, query, served)


def _check(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    query_order: Tensor | None,
    key_order: Tensor | None,
    key_mask: Tensor | None,
    **numbers: Any,
) -> tuple[float, Tensor | None, Tensor | None]:
    """Validate what all scores share; the scale and the orders to use."""
    if query.ndim != 4 or 0 in query.shape:
        raise ValueError(f"query must be [batch, seq_q, heads, dim] and not empty, got {tuple(query.shape)}")
    batch, _, heads, dim = query.shape
    if query.dtype not in DTYPES:
        raise ValueError(
            f"query must be float16, bfloat16, float32 or float64, got {query.dtype}; convert it"
        )
    if key.ndim != 4 or key.shape[1] == 0 or (key.shape[0], *key.shape[2:]) != (batch, heads, dim):
        raise ValueError(
            f"key must be [{batch}, seq_k, {heads}, {dim}] to match query and not empty, got {tuple(key.shape)}"
        )
    if key.dtype != query.dtype or key.device != query.device:
        raise ValueError(
            f"key must be {query.dtype} on {query.device} like query, got {key.dtype} on {key.device}; convert it"
        )
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != key.shape[:2]):
        raise ValueError(
            f"key_mask must be bool {tuple(key.shape[:2])}, True = may be attended, "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if key_mask is not None and key_mask.device != query.device:
        raise ValueError(
            f"key_mask must be on {query.device} like query, got {key_mask.device}; move it with .to()"
        )
    if scale is None:
        scale = dim**-0.5
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}; None is dim ** -0.5")
    device = query.device
    return (
        scale,
        checked_order("query_order", query_order, batch, heads, query.shape[1], device),
        checked_order("key_order", key_order, batch, heads, key.shape[1], device),
    )


def _check_lse(lse: Tensor | None, query: Tensor) -> None:
    if lse is None:
        return
    batch, seq_q, heads, _ = query.shape
    if lse.dtype != torch.float32 or tuple(lse.shape) != (batch, heads, seq_q):
        raise ValueError(
            f"lse must be float32 {(batch, heads, seq_q)}, [batch, heads, seq_q], got {lse.dtype} {tuple(lse.shape)}; "
            "pass what block_mass or block_sparse_attention returned, or None"
        )
    if lse.device != query.device:
        raise ValueError(f"lse must be on {query.device} like query, got {lse.device}; move it with .to()")
