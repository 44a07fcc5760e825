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
# Sums of features of a step, each a number of 4 bytes: a few large launches on a GPU, and a bound at long videos.
CHUNK_NUMBERS = 1 << 26


@dataclass(frozen=True, eq=False)
class Features:
    """Random features of the keys of n heads.

    sums: `[n, blocks, features, dim + 1]`, Σ φ(k) [v, 1] over the keys of each block, each feature divided by its peak.
    peaks: `[n, 1, features]`, logarithms; mean: `[n, dim, 1]`, of the keys; normals: `[dim, features]`; scale: of the
        scores.
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
        """Of keys and values `[n, blocks * block, dim]`; valid: bool `[n, blocks * block]`, where there is a key."""
        normals = _normals(key.shape[-1], features, seed, key.device).to(key.dtype)
        nothing = ~valid[..., None]
        count = valid.sum(1)[:, None, None].clamp(min=1)
        mean = key.masked_fill(nothing, 0).sum(1, keepdim=True) / count
        logarithms = _logarithms(key - mean, normals, scale).masked_fill_(nothing, -torch.inf)
        peaks = logarithms.amax(1, keepdim=True).clamp(min=_LEAST)
        weights = logarithms.sub_(peaks).exp_().unflatten(1, (-1, block))
        ones = F.pad(value.masked_fill(nothing, 0), (0, 1), value=1.0).unflatten(1, (-1, block))
        return cls(weights.transpose(2, 3) @ ones, peaks, mean.transpose(1, 2), normals, scale)

    def attend(self, query: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[n, rows, queries, dim]` that the left-out blocks have, and the log-sum-exp `[n, rows, queries]`.

        query: `[n, rows, queries, dim]`; left_out: `[n, rows, blocks]`, 1 or True where a block is left out.
        """
        sums = (left_out.to(query.dtype) @ self.sums.flatten(2)).unflatten(2, self.sums.shape[2:])
        logarithms = _logarithms(query, self.normals, self.scale) + self.peaks[:, None]
        peaks = logarithms.amax(-1, keepdim=True)
        values, weight = (logarithms.sub_(peaks).exp_() @ sums).split((query.shape[-1], 1), dim=-1)
        shift = self.scale * (query @ self.mean[:, None]) - math.log(self.peaks.shape[-1])
        tiny = torch.finfo(weight.dtype).tiny
        return values / weight.clamp(min=tiny), (weight.log() + peaks + shift)[..., 0]


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

    Computed in float32, or in float64 for tensors of it, some heads at a time: as many as have `CHUNK_NUMBERS` sums of
    features, at least one. Memory beyond the result: these, and copies of as many heads. The host does not wait for
    the device.

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
    valid = torch.ones_like(key[..., 0, 0], dtype=torch.bool) if key_mask is None else key_mask
    every_row = torch.arange(index.rows, device=query.device)[None]
    completed, completed_lse = torch.empty_like(output), torch.empty_like(lse, dtype=torch.float32)
    numbers = batch * max(index.rows, index.cols) * features * (dim + 1)
    step = max(1, CHUNK_NUMBERS // numbers)
    for first in range(0, heads, step):
        some = slice(first, first + step)
        rows, cols = (
            order if order is None or order.shape[1] == 1 else order[:, some]
            for order in (query_order, key_order)
        )
        q = F.pad(ordered(query[:, :, some], rows).to(dtype), (0, 0, 0, missing_q))
        k, v = (F.pad(ordered(x[:, :, some], cols).to(dtype), (0, 0, 0, missing_k)) for x in (key, value))
        count = q.shape[1]
        real = F.pad(ordered_mask(valid, cols), (0, missing_k)).expand(batch, count, -1)
        of_some = replace(index, counts=index.counts[:, some], offsets=index.offsets[:, some])
        kept = torch.stack([of_some.kept_blocks(b, every_row.expand(count, -1)) for b in range(batch)])
        of_keys = Features.of_keys(
            k.flatten(0, 1),
            v.flatten(0, 1),
            real.flatten(0, 1),
            block=index.block_k,
            features=features,
            seed=seed,
            scale=scale,
        )
        rest, rest_lse = of_keys.attend(
            q.flatten(0, 1).unflatten(1, (-1, index.block_q)), ~kept.flatten(0, 1)
        )
        rest, rest_lse = (x.flatten(1, 2).unflatten(0, (batch, count)) for x in (rest, rest_lse))
        rest = restored(rest[:, :, :seq_q], rows)
        rest_lse = restored(rest_lse[:, :, :seq_q, None], rows)
        exact_lse = lse[:, some].transpose(1, 2)[..., None].to(dtype)
        both = torch.logaddexp(exact_lse, rest_lse)
        # A query that has neither stays 0.
        share, rest_share = ((part - both.clamp(min=_LEAST)).exp() for part in (exact_lse, rest_lse))
        completed[:, :, some] = (rest * rest_share).addcmul_(share, output[:, :, some].to(dtype))
        completed_lse[:, some] = both[..., 0].transpose(1, 2)
    return completed, completed_lse


def _logarithms(tokens: Tensor, normals: Tensor, scale: float) -> Tensor:
    """log(φ · √features) of `[..., dim]`."""
    return (tokens @ (math.sqrt(scale) * normals)).sub_(scale / 2 * tokens.square().sum(-1, keepdim=True))


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
