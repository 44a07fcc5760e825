"""What key blocks that the lists leave out add to attention through random features, after Scatterbrain.

Scatterbrain (https://arxiv.org/abs/2110.15343) keeps the weights of some pairs exact and has those of all others from a
kernel of low rank, exp(s q·k) ≈ φ(q)·φ(k), here with the positive random features of Performer
(https://arxiv.org/abs/2009.14794):

    φ(x)_f = exp(√s ω_f·x − s |x|²/2) / √features,   ω_f ~ N(0, 1), as many as there are channels orthogonal.

What a key adds does not depend on the query that reads it, so each block of keys becomes one matrix, Σ φ(k) [v, 1], and
a query block multiplies φ(q) with the sum over the blocks that its list leaves out: features / block of the work of
dense attention, and rows · blocks · features / seq of it for these sums. The mean of the keys is taken off first. That
scales all weights of a query alike, and makes the features' variance, which grows with exp(s |k|²), smaller.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.prepare import checked_order, ordered, ordered_mask, restored

_LEAST = -1e30  # a logarithm of nothing that can be subtracted


@dataclass(frozen=True, eq=False)
class Features:
    """Random features of the keys of one head.

    sums: `[blocks, features, dim + 1]`, Σ φ(k) [v, 1] over the keys of each block, each feature divided by its peak.
    peaks: `[features]`, logarithms; mean: `[dim]`, of the keys; normals: `[dim, features]`; scale: of the scores.
    """

    sums: Tensor
    peaks: Tensor
    mean: Tensor
    normals: Tensor
    scale: float

    @classmethod
    def of_keys(
        cls, key: Tensor, value: Tensor, valid: Tensor, *, block: int, features: int, seed: int, scale: float
    ) -> Features:
        """Features of keys and values `[blocks * block, dim]`; valid: bool `[blocks * block]`, False for no key."""
        normals = _normals(key.shape[1], features, seed, key.device).to(key.dtype)
        mean = key.masked_fill(~valid[:, None], 0).sum(0) / valid.sum().clamp(min=1)
        logarithms = _logarithms(key - mean, normals, scale).masked_fill(~valid[:, None], -torch.inf)
        peaks = logarithms.amax(0).clamp(min=_LEAST)
        weights = (logarithms - peaks).exp_().view(-1, block, features)
        ones = F.pad(value.masked_fill(~valid[:, None], 0), (0, 1), value=1.0).view(
            -1, block, value.shape[1] + 1
        )
        return cls(weights.transpose(1, 2) @ ones, peaks, mean, normals, scale)

    def attend(self, query: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[rows, queries, dim]` that the left-out blocks have, and the log-sum-exp `[rows, queries]`.

        query: `[rows, queries, dim]`; left_out: bool `[rows, blocks]`.
        """
        sums = (left_out.to(query.dtype) @ self.sums.flatten(1)).view(len(left_out), *self.sums.shape[1:])
        logarithms = _logarithms(query, self.normals, self.scale) + self.peaks
        peaks = logarithms.amax(-1, keepdim=True)
        values, weight = ((logarithms - peaks).exp_() @ sums).split((query.shape[-1], 1), dim=-1)
        shift = self.scale * (query @ self.mean) - math.log(len(self.peaks))
        tiny = torch.finfo(weight.dtype).tiny
        return values / weight.clamp(min=tiny), weight.log()[..., 0] + peaks[..., 0] + shift


def add_low_rank(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: BlockIndex,
    *,
    features: int,
    seed: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Complete block-sparse attention by the low-rank weights of the pairs that its lists leave out.

    Computed in float32, or in float64 for tensors of it, head by head. Memory beyond copies of one head: blocks ·
    features · (dim + 1) numbers for the keys and as many for the queries. The host does not wait for the device.

    Args:
        output, lse: what `block_sparse_attention(..., return_lse=True)` gave for the other arguments, without a
            remainder: `[batch, seq_q, heads, dim]` and `[batch, heads, seq_q]`.
        query, key, value, index, scale, key_mask, query_order, key_order: as there; blocks of equal length.
        features: random features, the rank of the weights.
        seed: of the random features.

    Returns:
        Output, in the dtype of `output`, and log-sum-exp over all pairs, float32.

    Raises:
        ValueError: features below 1, blocks that vary in length, orders that do not fit.
    """
    if features < 1:
        raise ValueError(f"features: expected at least 1, got {features!r}")
    if index.varies:
        raise ValueError(
            "index: expected blocks of equal length, got blocks that vary; use the remainder of means"
        )
    batch, seq_q, heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    query_order = checked_order("query_order", query_order, batch, heads, seq_q, query.device)
    key_order = checked_order("key_order", key_order, batch, heads, index.seq_k, query.device)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    missing_q, missing_k = -seq_q % index.block_q, -index.seq_k % index.block_k
    q = F.pad(ordered(query, query_order), (0, 0, 0, missing_q))
    k, v = (F.pad(ordered(x, key_order), (0, 0, 0, missing_k)) for x in (key, value))
    valid = key_mask if key_mask is not None else torch.ones_like(key[..., 0, 0], dtype=torch.bool)
    valid = F.pad(ordered_mask(valid, key_order), (0, missing_k)).expand(batch, heads, -1)
    rest = torch.empty(q.shape, dtype=dtype, device=q.device)
    rest_lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    every_row = torch.arange(index.rows, device=q.device)[None]
    for b in range(batch):
        for h in range(heads):
            kept = _one_head(index, b, h).kept_blocks(0, every_row)[0]
            of_keys = Features.of_keys(
                k[b, h].to(dtype),
                v[b, h].to(dtype),
                valid[b, h],
                block=index.block_k,
                features=features,
                seed=seed,
                scale=scale,
            )
            found, found_lse = of_keys.attend(q[b, h].to(dtype).view(index.rows, index.block_q, dim), ~kept)
            rest[b, h], rest_lse[b, h] = found.flatten(0, 1), found_lse.flatten()
    rest, rest_lse = restored(rest[:, :, :seq_q], query_order), rest_lse[:, :, :seq_q, None]
    rest_lse = restored(rest_lse, query_order)
    lse = lse.transpose(1, 2)[..., None].to(dtype)
    both = torch.logaddexp(lse, rest_lse)
    # A query that has neither stays 0.
    share, rest_share = ((part - both.clamp(min=_LEAST)).exp() for part in (lse, rest_lse))
    completed = share * output.to(dtype) + rest_share * rest
    return completed.to(output.dtype), both[..., 0].transpose(1, 2).contiguous().float()


def _one_head(index: BlockIndex, b: int, h: int) -> BlockIndex:
    b %= index.batch
    return replace(
        index, counts=index.counts[b : b + 1, h : h + 1], offsets=index.offsets[b : b + 1, h : h + 1]
    )


def _logarithms(tokens: Tensor, normals: Tensor, scale: float) -> Tensor:
    """log(φ · √features) of `[..., dim]`."""
    return math.sqrt(scale) * (tokens @ normals) - scale / 2 * tokens.square().sum(-1, keepdim=True)


# A copy to the device would have the host wait.
@functools.lru_cache(maxsize=32)
def _normals(dim: int, features: int, seed: int, device: torch.device) -> Tensor:
    """Directions of the random features, float32 `[dim, features]`, orthogonal within each `dim` of them."""
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(seed)
        squares = torch.randn(-(-features // dim), dim, dim, generator=generator, device="cpu")
        lengths = torch.randn(features, dim, generator=generator, device="cpu").norm(dim=1)
        rotated, upper = torch.linalg.qr(squares)
        # All directions are equally likely once no sign is left to the decomposition.
        rotated = rotated * upper.diagonal(dim1=1, dim2=2).sign()[:, None]
        directions = rotated.transpose(1, 2).flatten(0, 1)[:features]
        return (directions * lengths[:, None]).T.contiguous().to(device)
