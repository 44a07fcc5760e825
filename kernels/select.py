"""Choosing key blocks by score: top-k and top-p straight into ragged block lists, without host synchronisation.

Top-k with one budget for every row is the row-uniform choice of AdaSpa (https://arxiv.org/abs/2502.21079); top-p,
the fewest blocks that hold a share of the row's attention mass, is that of XAttention
(https://arxiv.org/abs/2503.16428) and ZipVL (https://arxiv.org/abs/2410.08584).

Two things make the choice exact, so that all backends and all runs agree on it. Blocks are compared by an integer
key that orders as their scores do, equal scores by block number. And masses are added up as 64-bit integers in
units of 2⁻³⁹ or less of the row's largest: such a sum does not depend on the order of its terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.backend import torch_or_triton, triton
from dit_accel.kernels.block_index import BlockIndex

if triton is not None:
    import triton.language as tl

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_COLS = 8192
# Bits a mass is shifted up by: those of the smaller masses that survive next to the row's largest.
MASS_BITS = 16


@torch.no_grad()
def select_blocks(
    scores: Tensor,
    *,
    block_q: int,
    block_k: int,
    seq_q: int,
    seq_k: int,
    keep: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_keep: int = 1,
    max_keep: int | None = None,
    forced: Tensor | None = None,
    backend: str = "auto",
) -> BlockIndex:
    """Keep the key blocks with the highest scores of every query block.

    A row ranks its blocks: forced ones first, then by descending score, equal scores by ascending number. It
    keeps the first n of that ranking. `keep` asks for n = `keep`; `top_p` for the smallest n whose blocks hold
    at least that share of the row's mass, where a score is a mass, negative ones count as 0 and forced blocks
    count like all others. Then, each rule overruling those before it:

    1. n is raised to `min_keep` and to the number of forced blocks,
    2. n is lowered to the number of blocks that may be chosen at all: forced, or with a score above -inf,
    3. n is lowered to `max_keep`; if there are more forced blocks than that, the lowest of them are dropped.

    The host never waits for the device: the size of the result depends on shapes and numbers only.

    Args:
        scores: float16, bfloat16 or float32 `[batch or 1, heads, rows, cols]`, rows = ceil(seq_q / block_q),
            cols = ceil(seq_k / block_k). -inf is never chosen unless forced, NaN is taken for -inf. As a mass,
            +inf counts as 2¹²⁸.
        block_q, block_k: tokens per query and key block.
        seq_q, seq_k: sequence lengths in tokens.
        keep: blocks per row, at least 0; an int for all rows, or int32 or int64 broadcastable to
            `[batch or 1, heads, rows]`: `[heads, 1]` is a budget per head. A negative one in a tensor is taken
            for 0.
        top_p: share of the mass over 0 and up to 1, or float32 or float64 broadcastable as `keep`; in a tensor
            they are clamped to 0..1, and NaN is taken for 1. Masses under 2⁻³⁹ of the row's largest count as
            0. Exactly one of `keep` and `top_p` must be given.
        min_keep: blocks that a row keeps at least, from 0.
        max_keep: blocks that a row keeps at most, from 1, and the room each list has. Default: cols, and with
            an int `keep` the larger of `keep` and `min_keep`, so that forced blocks cannot exceed it; give
            `max_keep=cols` if forced blocks must survive a smaller budget.
        forced: bool, broadcastable to `scores`: blocks chosen before all others.
        backend: "triton" on a GPU (one program per row, up to 8192 cols), "torch" anywhere, or "auto": "triton"
            on CUDA and ROCm where it can, otherwise "torch". Both give the same lists.

    Returns:
        The lists, ascending, on the device of `scores`. `indices` has room for `max_keep` (or cols, if that is
        less) blocks per list; behind the end of a list stands block 0.

    Raises:
        ValueError: if shapes, dtypes, devices, numbers or the backend do not fit.

    Example:
        >>> scores = torch.rand(1, 4, 6, 9)
        >>> index = select_blocks(scores, block_q=64, block_k=64, seq_q=333, seq_k=517, top_p=0.9)
    """
    _check_scores(scores, block_q, block_k, seq_q, seq_k)
    batch, heads, rows, cols = scores.shape
    if (keep is None) == (top_p is None):
        got = "neither" if keep is None else "both"
        raise ValueError(f"exactly one of keep and top_p must be given, got {got}; pass the other as None")
    _check_int("min_keep", min_keep, 0)
    if isinstance(keep, Tensor):
        _check_rows("keep", keep, (torch.int32, torch.int64), scores)
    elif keep is not None:
        _check_int("keep", keep, 0)
    if max_keep is None:
        max_keep = max(keep, min_keep, 1) if isinstance(keep, int) else max(cols, min_keep)
    _check_int("max_keep", max_keep, 1)
    if min_keep > max_keep:
        raise ValueError(f"min_keep must be at most max_keep = {max_keep}, got {min_keep}; lower it")
    max_keep = min(max_keep, cols)
    if forced is not None:
        _check_forced(forced, scores)
        forced = forced.expand(scores.shape)
    if isinstance(keep, Tensor):
        budget = keep.clamp(0, cols).to(torch.int32)
    elif keep is not None:
        budget = torch.full((), min(keep, cols), dtype=torch.int32, device=scores.device)
    elif isinstance(top_p, Tensor):
        _check_rows("top_p", top_p, (torch.float32, torch.float64), scores)
        budget = top_p.double().nan_to_num(nan=1.0).clamp(0.0, 1.0)
    else:
        if isinstance(top_p, bool) or not isinstance(top_p, float | int) or not 0.0 < top_p <= 1.0:
            raise ValueError(
                f"top_p must be a number over 0 and up to 1, got {top_p!r}; 1 keeps all the mass"
            )
        budget = torch.full((), float(top_p), dtype=torch.float64, device=scores.device)
    budget = budget.expand(scores.shape[:3])

    select = _select_torch
    many = (
        f"up to {MAX_TRITON_COLS} key blocks per row, got {cols} (longer blocks are fewer)"
        if cols > MAX_TRITON_COLS
        else None
    )
    if torch_or_triton(backend, scores, many) == "triton":
        select = _select_triton
    counts, indices = select(scores.detach(), budget, forced, min(min_keep, cols), max_keep)
    offsets = torch.arange(0, counts.numel() * max_keep, max_keep, dtype=torch.int64, device=scores.device)
    return BlockIndex(
        counts, offsets.view(batch, heads, rows), indices.flatten(), block_q, block_k, seq_q, seq_k
    )


def _select_torch(
    scores: Tensor, budget: Tensor, forced: Tensor | None, min_keep: int, max_keep: int
) -> tuple[Tensor, Tensor]:
    """By sorting; counts `[batch, heads, rows]` and padded lists `[batch, heads, rows, max_keep]`, both int32."""
    cols = scores.shape[3]
    may = scores > -torch.inf  # False for NaN
    values = scores.float().masked_fill(~may, -torch.inf)
    if budget.is_floating_point():
        values = torch.where(may, values.clamp(min=0.0), values)
    values = values.masked_fill(values == 0.0, 0.0)  # -0.0 ranks as 0.0
    bits = values.view(torch.int32)
    # Negative floats order backwards by their bits.
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    if forced is not None:
        rank = rank + (forced.long() << 32)
        may = may | forced
    column = torch.arange(cols, device=scores.device)
    # No two ranks are equal, so that the choice of an unstable sort is the only one.
    ranked = ((rank << 28) - column).topk(max_keep, dim=-1).indices

    available = may.sum(-1)
    if budget.is_floating_point():
        masses = _masses(values)
        target = (budget * masses.sum(-1).double()).ceil().long()
        ranked_masses = masses.gather(-1, ranked)
        needed = (ranked_masses.cumsum(-1) - ranked_masses < target[..., None]).sum(-1)
    else:
        needed = budget.long()
    needed = needed.clamp(min=min_keep)
    if forced is not None:
        needed = torch.maximum(needed, forced.sum(-1))
    counts = torch.minimum(needed, available).clamp(max=max_keep)
    inside = column[:max_keep] < counts[..., None]
    ascending = ranked.masked_fill(~inside, cols).sort(-1).values
    return counts.to(torch.int32), ascending.masked_fill(~inside, 0).to(torch.int32)


def _masses(values: Tensor) -> Tensor:
    """Non-negative float32 as int64 multiples of one unit per row, at most 2⁻³⁹ of the largest, cut off.

    -inf is 0. The sum of fewer than 2²³ masses does not overflow.
    """
    bits = values.clamp(min=0.0).view(torch.int32)
    exponents = (bits >> 23).clamp(min=1)
    mantissas = (bits - ((exponents - 1) << 23)).long()
    shifts = exponents.amax(-1, keepdim=True) - exponents
    return (mantissas << MASS_BITS) >> shifts.clamp(max=63)


if triton is not None:
    # Names: o_ offsets, p_ pointers, m_ masks, b_ values held in registers.
    MASS_BITS_ = tl.constexpr(MASS_BITS)

    # Numbers of blocks change with every resolution; only the power of two above cols may compile anew.
    @triton.jit(
        do_not_specialize=[
            "heads",
            "rows",
            "cols",
            "min_keep",
            "max_keep",
            "stride_fb",
            "stride_fh",
            "stride_fr",
            "stride_fc",
            "stride_bb",
            "stride_bh",
            "stride_br",
        ]
    )
    def select_rows(
        scores,  # [batch, heads, rows, cols], contiguous
        forced,  # bool like scores, any strides, read with FORCED
        budget,  # [batch, heads, rows], any strides, float64 with TOP_P, otherwise int32
        counts,  # int32 [batch, heads, rows]
        indices,  # int32 [batch, heads, rows, max_keep]
        heads,
        rows,
        cols,
        min_keep,
        max_keep,
        stride_fb,
        stride_fh,
        stride_fr,
        stride_fc,
        stride_bb,
        stride_bh,
        stride_br,
        TOP_P: tl.constexpr,
        FORCED: tl.constexpr,
        PADDED: tl.constexpr,
    ):
        """One program: one row. The lowest key that is kept is found bit by bit."""
        entry = tl.program_id(0).to(tl.int64)
        row = entry % rows
        head = entry // rows % heads
        batch = entry // rows // heads
        o_col = tl.arange(0, PADDED)
        m_col = o_col < cols
        b_budget = tl.load(budget + batch * stride_bb + head * stride_bh + row * stride_br)

        b_value = tl.load(scores + entry * cols + o_col, mask=m_col, other=-float("inf")).to(tl.float32)
        m_may = b_value > -float("inf")  # False for NaN
        b_value = tl.where(m_may, b_value, -float("inf"))
        if TOP_P:
            b_value = tl.where(m_may & (b_value < 0.0), 0.0, b_value)
        b_value = tl.where(b_value == 0.0, 0.0, b_value)  # -0.0 ranks as 0.0
        b_bits = b_value.to(tl.int32, bitcast=True)
        # Negative floats order backwards by their bits.
        b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)

        # Either all forced blocks are kept and the others compete for the rest, or they compete among themselves.
        m_sure = o_col < 0
        m_open = m_may
        sure = 0
        room = tl.minimum(tl.sum(m_may.to(tl.int32), 0), max_keep)
        least = tl.minimum(min_keep, room)
        if FORCED:
            p_forced = forced + batch * stride_fb + head * stride_fh + row * stride_fr
            m_forced = tl.load(p_forced + o_col.to(tl.int64) * stride_fc, mask=m_col, other=0) != 0
            sure = tl.sum(m_forced.to(tl.int32), 0)
            m_fits = o_col < tl.where(sure < max_keep, cols, 0)
            m_sure = m_forced & m_fits
            m_open = (m_may & m_fits & (m_forced == 0)) | (m_forced & (m_sure == 0))
            room = tl.minimum(tl.sum((m_may | m_forced).to(tl.int32), 0), max_keep)
            least = tl.minimum(tl.maximum(min_keep, sure), room)
            sure = tl.where(sure < max_keep, sure, 0)
            room = room - sure
            least = least - sure

        if TOP_P:
            b_exponent = tl.maximum(tl.where(m_may, b_bits, 0) >> 23, 1)
            b_mass = (tl.where(m_may, b_bits, 0) - ((b_exponent - 1) << 23)).to(tl.int64)
            b_shift = tl.minimum(tl.max(b_exponent, 0) - b_exponent, 63)
            b_mass = (b_mass << MASS_BITS_) >> b_shift.to(tl.int64)
            total = tl.sum(b_mass, 0)
            target = tl.ceil(b_budget * total.to(tl.float64)).to(tl.int64)
            target = target - tl.sum(tl.where(m_sure, b_mass, 0), 0)
            b_mass = tl.where(m_open, b_mass, 0)
        else:
            least = tl.minimum(tl.maximum(b_budget - sure, least), room)

        # The highest key such that the open blocks from it upwards are enough.
        threshold = tl.full([], -0x80000000, tl.int32)
        step = threshold
        for _ in range(32):
            trial = threshold ^ step
            step = (step >> 1) & 0x7FFFFFFF
            m_up = m_open & (b_key >= trial)
            taken = tl.sum(m_up.to(tl.int32), 0)
            enough = taken >= least
            if TOP_P:
                enough = enough & (tl.sum(tl.where(m_up, b_mass, 0), 0) >= target)
                enough = enough | (taken >= room)
            threshold = tl.where(enough, trial, threshold)

        m_up = m_open & (b_key > threshold)
        m_tie = m_open & (b_key == threshold)
        taken = tl.sum(m_up.to(tl.int32), 0)
        ties = least - taken
        if TOP_P:
            missing = tl.maximum(target - tl.sum(tl.where(m_up, b_mass, 0), 0), 0)
            mass = tl.maximum(tl.max(tl.where(m_tie, b_mass, 0), 0), 1)
            by_mass = tl.minimum((missing + mass - 1) // mass, PADDED).to(tl.int32)
            ties = tl.minimum(tl.maximum(by_mass, ties), room - taken)
        b_tie = m_tie.to(tl.int32)
        m_kept = m_sure | m_up | (m_tie & (tl.cumsum(b_tie, 0) - b_tie < ties))

        b_kept = m_kept.to(tl.int32)
        count = tl.sum(b_kept, 0)
        tl.store(counts + entry, count)
        p_list = indices + entry * max_keep
        tl.store(p_list + tl.cumsum(b_kept, 0) - b_kept, o_col, mask=m_kept)
        tl.store(p_list + o_col, tl.zeros([PADDED], tl.int32), mask=(o_col >= count) & (o_col < max_keep))


def launch_options(cols: int) -> dict[str, int]:
    """Columns with padding to a power of two, and warps: up to 16 columns per thread."""
    padded = max(32, triton.next_power_of_2(cols))
    # The only rounding is that of one product; fused, it would be another one.
    return {"PADDED": padded, "num_warps": min(16, max(1, padded // 512)), "enable_fp_fusion": False}


def _select_triton(
    scores: Tensor, budget: Tensor, forced: Tensor | None, min_keep: int, max_keep: int
) -> tuple[Tensor, Tensor]:
    """By bisection, as `_select_torch`."""
    batch, heads, rows, cols = scores.shape
    scores = scores.contiguous()
    counts = torch.empty(batch, heads, rows, dtype=torch.int32, device=scores.device)
    indices = torch.empty(batch, heads, rows, max_keep, dtype=torch.int32, device=scores.device)
    with torch.cuda.device_of(scores):
        select_rows[(batch * heads * rows,)](
            scores,
            scores if forced is None else forced,
            budget,
            counts,
            indices,
            heads,
            rows,
            cols,
            min_keep,
            max_keep,
            *((0, 0, 0, 0) if forced is None else forced.stride()),
            *budget.stride(),
            TOP_P=budget.is_floating_point(),
            FORCED=forced is not None,
            **launch_options(cols),
        )
    return counts, indices


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_scores(scores: Tensor, block_q: int, block_k: int, seq_q: int, seq_k: int) -> None:
    numbers = {"block_q": block_q, "block_k": block_k, "seq_q": seq_q, "seq_k": seq_k}
    for name, value in numbers.items():
        _check_int(name, value, 1)
    if scores.dtype not in DTYPES:
        raise ValueError(f"scores must be float16, bfloat16 or float32, got {scores.dtype}; convert them")
    expected = (-(-seq_q // block_q), -(-seq_k // block_k))
    if scores.ndim != 4 or tuple(scores.shape[2:]) != expected or 0 in scores.shape[:2]:
        raise ValueError(
            f"scores must be [batch or 1, heads, {expected[0]}, {expected[1]}] for {seq_q} x {seq_k} tokens in "
            f"{block_q} x {block_k} blocks, got {tuple(scores.shape)}; score blocks of that size"
        )


def _check_rows(name: str, values: Tensor, dtypes: tuple[torch.dtype, ...], scores: Tensor) -> None:
    """A budget per row, or fewer to be repeated."""
    if values.dtype not in dtypes:
        raise ValueError(
            f"{name} must be a number or a tensor of {' or '.join(map(str, dtypes))}, got {values.dtype}; "
            "convert it"
        )
    _check_expands(name, values, tuple(scores.shape[:3]), "[batch or 1, heads, rows]", scores.device)


def _check_forced(forced: Tensor, scores: Tensor) -> None:
    if forced.dtype != torch.bool:
        raise ValueError(f"forced must be bool, got {forced.dtype}; compare with a threshold first")
    _check_expands("forced", forced, tuple(scores.shape), "[batch or 1, heads, rows, cols]", scores.device)


def _check_expands(
    name: str, values: Tensor, shape: tuple[int, ...], axes: str, device: torch.device
) -> None:
    given = tuple(values.shape)
    pairs = zip(reversed(given), reversed(shape), strict=False)
    if len(given) > len(shape) or any(size not in (1, full) for size, full in pairs):
        raise ValueError(
            f"{name} must broadcast to {axes} = {shape}, got {given}; the last axes must match or be 1"
        )
    if values.device != device:
        raise ValueError(f"{name} must be on {device} like scores, got {values.device}; move it with .to()")
