"""Euclidean k-means of attention tokens, one clustering per (batch, head), without host synchronisation.

SVG2 (Sparse VideoGen2, arXiv 2505.18875) clusters queries and keys so that tokens which attend alike stand
together, and starts each denoising step from the centroids of the step before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.backend import torch_or_triton, triton

if triton is not None:
    import triton.language as tl

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_DIM = 256
# Floats of one temporary tensor of the torch backend's assignment (64 MiB).
CHUNK_FLOATS = 1 << 24
# Per dtype: how many numbers of it stand for a float32, and the significant bits of one.
PARTS = {torch.float16: (2, 11), torch.bfloat16: (3, 8), torch.float32: (1, 24)}


@dataclass(frozen=True, eq=False)
class Clusters:
    """A clustering of the tokens of every (batch, head).

    Labels and centroids belong together in this sense: each centroid is the mean of the tokens that carry its
    label. (The labels in turn are nearest to the centroids one iteration earlier, so at a fixed point of
    k-means they are also nearest to these.) No cluster is empty.

    Attributes:
        labels: int32 `[batch, heads, seq]`, cluster number of each token.
        centroids: float32 `[batch, heads, clusters, dim]`; pass them to the next call for a warm start.
        sizes: int32 `[batch, heads, clusters]`, tokens of each cluster, at least 1.
        order: int64 `[batch, heads, seq]`, token positions grouped by cluster, ascending within a cluster.
        starts: int32 `[batch, heads, clusters + 1]`; cluster c is `order[starts[c]:starts[c + 1]]`.
        inertia: float32 `[batch, heads]`, mean squared distance of a token to the centroid of its cluster.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor
    order: Tensor
    starts: Tensor
    inertia: Tensor


@torch.no_grad()
def kmeans(
    tokens: Tensor,
    clusters: int,
    *,
    iterations: int = 10,
    centroids: Tensor | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> Clusters:
    """Cluster the tokens of every (batch, head) by Lloyd's iterations under the Euclidean distance.

    An iteration assigns each token to its nearest centroid (ties to the lower cluster number), gives every
    empty cluster a token (the furthest from its centroid goes to the lowest empty cluster, the next to the
    next, never the last token of a cluster), and moves the centroids to the means. So no cluster is ever
    empty, and inertia does not rise but for rounding.

    The number of iterations is fixed: a test of convergence would have to wait for the device. Nothing else
    waits for it either, and the same inputs give the same result in every run on a device.

    Distances are `|c|^2 - 2 x.c + |x|^2` in float32, so a float32 rounding error of the norms decides between
    centroids that are nearer to each other than that.

    Args:
        tokens: float16, bfloat16 or float32 `[batch, seq, heads, dim]`, any strides, finite.
        clusters: number of clusters, 1 to seq.
        iterations: number of Lloyd iterations, at least 1; 1 or 2 do for a warm start.
        centroids: float32 `[batch, heads, clusters, dim]` to start from; default are tokens, one from each of
            `clusters` equal stretches of the sequence, the same positions in every head. Neighbours in a
            video resemble each other, so stretches spread over its content as a free draw does not, at no
            cost; the position within a stretch is random lest the stretch length fall in with the row length.
        seed: integer that picks the position within each stretch; unused with `centroids`.
        backend: "triton" (dim up to 256), "torch", or "auto": "triton" on a GPU where it can, else "torch". The latter
            follows `torch.set_float32_matmul_precision`, which must be "highest" for float32 distances. It needs
            temporary memory for about 4 x 64 MiB, as long as one token's distances, batch x heads x clusters
            floats, fit in 64 MiB, then 24 bytes per number in the tokens of one (batch, head).

    Raises:
        ValueError: if an argument is out of range, or shapes, dtypes or devices do not fit together.

    Example:
        >>> first = kmeans(torch.randn(1, 517, 2, 64), 20)
        >>> then = kmeans(torch.randn(1, 517, 2, 64), 20, iterations=2, centroids=first.centroids)
    """
    _check(tokens, clusters, iterations, centroids, seed)
    dim = tokens.shape[3]
    wide = f"head dims up to {MAX_TRITON_DIM}, got {dim}" if dim > MAX_TRITON_DIM else None
    assign, update = _BACKENDS[torch_or_triton(backend, tokens, wide)]
    if centroids is None:
        centroids = _first_centroids(tokens, clusters, seed)
    numbers = torch.arange(clusters + 1, dtype=torch.int32, device=tokens.device)
    for iteration in range(iterations):
        labels, distances = assign(tokens, centroids)
        labels = _fill_empty(labels, distances, clusters)
        grouped, order = labels.sort(dim=-1, stable=True)
        starts = torch.searchsorted(
            grouped, numbers.expand(*grouped.shape[:2], -1).contiguous(), out_int32=True
        )
        centroids, spread = update(tokens, order, starts, iteration == iterations - 1)
    inertia = spread.sum(-1) / tokens.shape[1]
    return Clusters(labels, centroids, starts.diff(dim=-1), order, starts, inertia)


def _first_centroids(tokens: Tensor, clusters: int, seed: int) -> Tensor:
    """One token per stretch of the sequence, float32 `[batch, heads, clusters, dim]`.

    The position within a stretch is a hash of its number: random bits made on the device, equal on all.
    """
    edges = torch.arange(clusters + 1, device=tokens.device) * tokens.shape[1] // clusters
    bits = edges.new_full((), seed % 2**32) * 40503 + torch.arange(clusters, device=tokens.device)
    for _ in range(3):
        # 32-bit hash of xorshift-multiply rounds; the products stay below 2^63.
        bits = bits & 0xFFFFFFFF
        bits = ((bits >> 16) ^ bits) * 0x45D9F3B
    places = edges[:-1] + (bits >> 8 & 0xFFFFFF) % edges.diff()
    return tokens[:, places].transpose(1, 2).float()


def _fill_empty(labels: Tensor, distances: Tensor, clusters: int) -> Tensor:
    """Labels in which every empty cluster has got the furthest token that its cluster can spare.

    The `clusters` furthest tokens are always enough to choose from: e empty clusters leave clusters - e
    others, and each of them can hold back only one of these tokens, its last.
    """
    wide = labels.long()
    sizes = torch.zeros(*labels.shape[:2], clusters, dtype=torch.int32, device=labels.device)
    sizes.scatter_add_(-1, wide, torch.ones_like(labels))
    furthest = distances.topk(clusters, dim=-1).indices
    donors = wide.gather(-1, furthest)
    # How many further tokens of the same donor come before each: its place in a run of equal donors.
    runs, run_order = donors.sort(dim=-1, stable=True)
    places = torch.arange(clusters, device=labels.device) - torch.searchsorted(runs, runs)
    given = torch.empty_like(places).scatter_(-1, run_order, places)
    spare = given < sizes.gather(-1, donors) - 1
    turn = spare.cumsum(-1) - 1
    empty_first = (sizes > 0).to(torch.uint8).sort(dim=-1, stable=True).indices
    moves = spare & (turn < (sizes == 0).sum(-1, keepdim=True))
    receivers = torch.where(moves, empty_first.gather(-1, turn.clamp(min=0)), donors)
    return labels.scatter(-1, furthest, receivers.to(labels.dtype))


def _assign_torch(tokens: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid, int32 `[batch, heads, seq]`, and its squared distance, float32, in chunks of tokens."""
    batch, _, heads, dim = tokens.shape
    clusters = centroids.shape[2]
    chunk = max(1, CHUNK_FLOATS // (batch * heads * max(clusters, dim)))
    norms = centroids.square().sum(-1)[:, :, None]
    labels, distances = [], []
    with torch.autocast(tokens.device.type, enabled=False):
        for part in tokens.split(chunk, dim=1):
            x = part.transpose(1, 2).float()
            least, label = torch.sub(norms, x @ centroids.mT, alpha=2).min(-1)
            labels.append(label.int())
            distances.append((least + x.square().sum(-1)).clamp(min=0))
    return torch.cat(labels, -1), torch.cat(distances, -1)


def _update_torch(tokens: Tensor, order: Tensor, starts: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """Means of the clusters, and with `last` also their sums of squared distances (else zeros)."""
    batch, seq, heads, dim = tokens.shape
    clusters = starts.shape[-1] - 1
    centroids = torch.empty(batch, heads, clusters, dim, dtype=torch.float32, device=tokens.device)
    spread = torch.zeros(batch, heads, clusters, dtype=torch.float32, device=tokens.device)
    for b in range(batch):
        for h in range(heads):
            # A sum in token order: deterministic, and in float64 it needs no tree to be exact.
            x = tokens[b, :, h][order[b, h]].double()
            offsets = starts[b, h].long()
            sums = torch.segment_reduce(x, "sum", offsets=offsets, axis=0, unsafe=True)
            centroids[b, h] = sums / offsets.diff()[:, None]
            if last:
                label = torch.searchsorted(offsets, torch.arange(seq, device=x.device), right=True) - 1
                squares = (x - centroids[b, h][label]).square_().sum(-1)
                spread[b, h] = torch.segment_reduce(squares, "sum", offsets=offsets, axis=0, unsafe=True)
    return centroids, spread


if triton is not None:
    # Names: o_ offsets, m_ masks, p_ pointers, b_ values held in registers. Strides come in units of ALIGN.
    # The sequence length and the strides that can depend on it must not compile anew.

    @triton.jit(do_not_specialize=["seq", "heads", "cluster_tiles", "stride_b", "stride_h"])
    def _assign_kernel(
        tokens,  # [batch, seq, heads, dim], stride 1 along dim
        parts,  # dtype of tokens, [batch * heads, CLUSTERS / TILE_C, PARTS, TILE_C, TILE_D]
        norms,  # float32 [batch * heads, CLUSTERS], inf where there is no cluster
        scales,  # float32 [batch * heads, CLUSTERS]
        labels,  # int32 [batch, heads, seq]
        distances,  # float32 [batch, heads, seq]
        seq,
        heads,
        cluster_tiles,
        stride_b: tl.int64,
        stride_s: tl.int64,
        stride_h: tl.int64,
        DIM: tl.constexpr,
        ALIGN: tl.constexpr,
        PARTS: tl.constexpr,
        STEP: tl.constexpr,
        TILE_S: tl.constexpr,
        TILE_C: tl.constexpr,
        TILE_D: tl.constexpr,
    ):
        """One program: TILE_S tokens of one head against all its centroids."""
        pair = tl.program_id(1).to(tl.int64)
        batch = pair // heads
        head = pair % heads
        o_s = tl.program_id(0) * TILE_S + tl.arange(0, TILE_S)
        m_s = o_s < seq
        o_c = tl.arange(0, TILE_C)
        o_d = tl.arange(0, TILE_D)
        # [TILE_S, TILE_D]
        b_x = tl.load(
            tokens
            + (batch * stride_b + head * stride_h) * ALIGN
            + o_s.to(tl.int64)[:, None] * (stride_s * ALIGN)
            + o_d[None, :],
            mask=m_s[:, None] & (o_d < DIM)[None, :],
            other=0.0,
        )
        p_parts = parts + pair * cluster_tiles * (PARTS * TILE_C * TILE_D)
        p_parts += o_c[None, :] * TILE_D + o_d[:, None]
        p_norms = norms + pair * cluster_tiles * TILE_C + o_c
        p_scales = scales + pair * cluster_tiles * TILE_C + o_c
        # One running minimum per lane and column, joined after the loop. NaN never gets in: label 0 stays.
        b_best = tl.full([TILE_S, TILE_C], float("inf"), tl.float32)
        b_tile = tl.zeros([TILE_S, TILE_C], tl.int32)
        for i in range(0, cluster_tiles):
            b_dot = tl.zeros([TILE_S, TILE_C], tl.float32)
            for part in tl.static_range(PARTS):
                # [TILE_D, TILE_C]
                b_c = tl.load(p_parts + part * (TILE_C * TILE_D))
                b_dot = tl.dot(b_x, b_c, b_dot * STEP, input_precision="ieee")
            b_score = tl.load(p_norms)[None, :] - b_dot * (2.0 * tl.load(p_scales))[None, :]
            m_better = b_score < b_best
            b_best = tl.where(m_better, b_score, b_best)
            b_tile = tl.where(m_better, i, b_tile)
            p_parts += PARTS * TILE_C * TILE_D
            p_norms += TILE_C
            p_scales += TILE_C
        b_least = tl.min(b_best, 1)
        b_number = b_tile * TILE_C + o_c[None, :]
        b_label = tl.min(tl.where(b_best == b_least[:, None], b_number, 2147483647), 1)
        b_wide = b_x.to(tl.float32)
        b_distance = tl.maximum(b_least + tl.sum(b_wide * b_wide, 1), 0.0)
        tl.store(labels + pair * seq + o_s, b_label, mask=m_s)
        tl.store(distances + pair * seq + o_s, b_distance, mask=m_s)

    @triton.jit(do_not_specialize=["seq", "heads", "clusters", "stride_b", "stride_h"])
    def _update_kernel(
        tokens,  # [batch, seq, heads, dim], stride 1 along dim
        order,  # int64 [batch, heads, seq]
        starts,  # int32 [batch, heads, clusters + 1]
        centroids,  # float32 [batch, heads, clusters, dim]
        spread,  # float32 [batch, heads, clusters], written with LAST
        seq,
        heads,
        clusters,
        stride_b: tl.int64,
        stride_s: tl.int64,
        stride_h: tl.int64,
        DIM: tl.constexpr,
        ALIGN: tl.constexpr,
        LAST: tl.constexpr,
        TILE_S: tl.constexpr,
        TILE_D: tl.constexpr,
    ):
        """One program: the members of one cluster of one head, in their order."""
        cluster = tl.program_id(0)
        pair = tl.program_id(1).to(tl.int64)
        batch = pair // heads
        head = pair % heads
        start = tl.load(starts + pair * (clusters + 1) + cluster)
        end = tl.load(starts + pair * (clusters + 1) + cluster + 1)
        o_s = tl.arange(0, TILE_S)
        o_d = tl.arange(0, TILE_D)
        m_d = o_d < DIM
        p_order = order + pair * seq
        p_tokens = tokens + (batch * stride_b + head * stride_h) * ALIGN + o_d[None, :]
        b_sum = tl.zeros([TILE_S, TILE_D], tl.float32)
        for i in range(start, end, TILE_S):
            m_s = i + o_s < end
            o_token = tl.load(p_order + i + o_s, mask=m_s, other=0)
            p_x = p_tokens + o_token[:, None] * (stride_s * ALIGN)
            b_sum += tl.load(p_x, mask=m_s[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_mean = tl.sum(b_sum, 0) / (end - start).to(tl.float32)
        tl.store(centroids + (pair * clusters + cluster) * DIM + o_d, b_mean, mask=m_d)
        if LAST:
            b_squares = tl.zeros([TILE_S, TILE_D], tl.float32)
            for i in range(start, end, TILE_S):
                m_s = i + o_s < end
                o_token = tl.load(p_order + i + o_s, mask=m_s, other=0)
                p_x = p_tokens + o_token[:, None] * (stride_s * ALIGN)
                m_x = m_s[:, None] & m_d[None, :]
                b_off = tl.where(m_x, tl.load(p_x, mask=m_x, other=0.0).to(tl.float32) - b_mean[None, :], 0.0)
                b_squares += b_off * b_off
            tl.store(spread + pair * clusters + cluster, tl.sum(tl.sum(b_squares, 1), 0))


def assign_options(dim: int, clusters: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes, warps and stages of the assignment: no spilling on sm_90, shared memory below 99 KiB.

    32-bit tokens run on the plain FMA units, one thread's share of the tile must stay small.
    """
    tile_d = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        tile_s, tile_c, warps = 32, 32, 8
    elif tile_d > 128:
        tile_s, tile_c, warps = 64, 16, 4
    else:
        tile_s, tile_c, warps = 128, 32, 8
    return {
        "TILE_S": tile_s,
        "TILE_C": min(tile_c, max(16, triton.next_power_of_2(clusters))),
        "TILE_D": tile_d,
        "num_warps": warps,
        "num_stages": 2,
    }


def update_options(dim: int) -> dict[str, int]:
    """Tile sizes and warps of the update: a thread sums 32 numbers at a time."""
    tile_d = max(16, triton.next_power_of_2(dim))
    return {"TILE_S": 4096 // tile_d, "TILE_D": tile_d, "num_warps": 4}


def _split(centroids: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Write each centroid as a scale, a power of two, times a sum of parts in the dtype of the tokens.

    The products of a token and a part are exact on the tensor cores, so the parts give the dot products of
    float32 at the speed of the small dtype; rounding the centroids would move the border between two.

    Returns:
        The parts, finest first, each `[..., clusters, dim]` and worth 2^-bits of the next (bits as in PARTS);
        and the scales, float32 `[..., clusters]`.
    """
    if dtype == torch.float32:
        return [centroids], torch.ones_like(centroids[..., 0])
    count, bits = PARTS[dtype]
    peak = centroids.abs().amax(-1)
    scale = torch.where(peak > 0, peak / torch.frexp(peak).mantissa, 1)
    rest = centroids / scale[..., None]
    parts = []
    for _ in range(count):
        parts.append(rest.to(dtype))
        rest = (rest - parts[-1].float()) * 2.0**bits
    return parts[::-1], scale


def _assign_triton(tokens: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """As `_assign_torch`."""
    tokens, align = _align(tokens)
    batch, seq, heads, dim = tokens.shape
    clusters = centroids.shape[2]
    options: dict[str, Any] = assign_options(dim, clusters, tokens.dtype)
    tile_c, tile_d = options["TILE_C"], options["TILE_D"]
    tiles = triton.cdiv(clusters, tile_c)
    count, bits = PARTS[tokens.dtype]
    parts, scales = _split(centroids, tokens.dtype)
    # Padding spares the inner loop its masks: a cluster that is not there is infinitely far away.
    missing = tiles * tile_c - clusters
    padded = F.pad(torch.stack(parts, 2), (0, tile_d - dim, 0, missing))
    padded = padded.view(batch, heads, count, tiles, tile_c, tile_d).transpose(2, 3).contiguous()
    norms = F.pad(centroids.square().sum(-1), (0, missing), value=torch.inf)
    scales = F.pad(scales, (0, missing))
    labels = torch.empty(batch, heads, seq, dtype=torch.int32, device=tokens.device)
    distances = torch.empty(batch, heads, seq, dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _assign_kernel[(triton.cdiv(seq, options["TILE_S"]), batch * heads)](
            tokens,
            padded,
            norms,
            scales,
            labels,
            distances,
            seq,
            heads,
            tiles,
            *(stride // align for stride in tokens.stride()[:3]),
            DIM=dim,
            ALIGN=align,
            PARTS=count,
            STEP=2.0**-bits,
            # Triton 3.10 turns this off by default; the scores count on fused multiply-adds for speed.
            enable_fp_fusion=True,
            **options,
        )
    return labels, distances


def _update_triton(tokens: Tensor, order: Tensor, starts: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """As `_update_torch`; the sums are float32, over a tile of members at a time."""
    tokens, align = _align(tokens)
    batch, seq, heads, dim = tokens.shape
    clusters = starts.shape[-1] - 1
    centroids = torch.empty(batch, heads, clusters, dim, dtype=torch.float32, device=tokens.device)
    spread = torch.zeros(batch, heads, clusters, dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _update_kernel[(clusters, batch * heads)](
            tokens,
            order,
            starts,
            centroids,
            spread,
            seq,
            heads,
            clusters,
            *(stride // align for stride in tokens.stride()[:3]),
            DIM=dim,
            ALIGN=align,
            LAST=last,
            enable_fp_fusion=True,
            **update_options(dim),
        )
    return centroids, spread


def _align(tokens: Tensor) -> tuple[Tensor, int]:
    """Tokens with stride 1 along dim, and a divisor of their other strides: 8 for loads of 16 bytes, or 1.

    With a dim that is a multiple of 8 the divisor does not change with the sequence length.
    """
    if tokens.stride(3) != 1:
        tokens = tokens.contiguous()
    strides = (*tokens.stride()[:3], tokens.shape[3])
    return tokens, 8 if all(stride % 8 == 0 for stride in strides) else 1


_BACKENDS = {"torch": (_assign_torch, _update_torch), "triton": (_assign_triton, _update_triton)}


def _check(tokens: Tensor, clusters: int, iterations: int, centroids: Tensor | None, seed: int) -> None:
    if tokens.ndim != 4 or 0 in tokens.shape:
        raise ValueError(
            f"tokens must be [batch, seq, heads, dim], each at least 1, got {tuple(tokens.shape)}; "
            "unsqueeze what is missing"
        )
    if tokens.dtype not in DTYPES:
        raise ValueError(
            f"tokens must be one of {', '.join(map(str, DTYPES))}, got {tokens.dtype}; use tokens.float()"
        )
    batch, seq, heads, dim = tokens.shape
    for name, value in (("clusters", clusters), ("iterations", iterations), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, got {value!r}; use int({name})")
    if not 1 <= clusters <= seq:
        raise ValueError(
            f"clusters must be 1 to {seq}, the tokens of a sequence, got {clusters}; "
            "ask for fewer clusters, each needs a token"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}; a warm start needs 1 or 2")
    if centroids is None:
        return
    expected = (batch, heads, clusters, dim)
    if tuple(centroids.shape) != expected:
        raise ValueError(
            f"centroids must be [batch, heads, clusters, dim] = {expected}, got {tuple(centroids.shape)}; "
            "warm starts need the shape and number of clusters of the earlier call"
        )
    if centroids.dtype != torch.float32 or centroids.device != tokens.device:
        raise ValueError(
            f"centroids must be torch.float32 on {tokens.device} like tokens, "
            f"got {centroids.dtype} on {centroids.device}; use centroids.to(tokens.device, torch.float32)"
        )
