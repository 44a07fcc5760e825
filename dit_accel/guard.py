"""Watches a calibrated plan while it runs: heads that err far more than they did at calibration go dense.

Every few steps each sparse layer's output is compared, at a few query rows, with exact attention. The comparison stays
on the device and its verdicts are read once, when the next forward begins. Where heads have just been given their
patterns, in the first forward of each range of the plan and guidance branch, the device itself puts exact attention in
the place of what errs, before the layer's output is used.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import BlockIndex, block_sparse_attention

if TYPE_CHECKING:
    from dit_accel.plan import AccelPlan

__all__ = ["Guard", "GuardMemory"]

_LOST = 0.95  # error of a head whose output is all but lost

logger = logging.getLogger("dit_accel")


@dataclass
class GuardMemory:
    """What the guard found in one generation.

    pending: verdicts not yet read, by layer; dense: the heads it made dense; last: by guidance branch and layer, the
    forward that was checked last and the range of the plan that it was in.
    """

    pending: dict[int, Tensor]
    dense: Tensor  # bool [layers, heads]
    checks: int = 0
    last: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)


class Guard:
    """Checks the heads of a calibrated plan.

    A head is made dense for the rest of the generation where its relative L2 error at the sampled rows is more than
    `factor` times that of the calibration, more than `usual` times the median of all heads of its range, and more than
    `floor`; or where it is all but 1, that of an output of zeros, and was not at calibration. On prompts that the
    calibration has not seen, heads of the demo model err up to twice as much as at calibration, single ones up to five
    times, those that erred least above all; to run these dense brought videos no nearer.

    Args:
        plan: a calibrated plan, with `rel_l2` and a dense candidate.
        factor, usual, floor: see above, without unit.
        rows: query rows that are compared, per head; of a sequence of n tokens they cost rows ÷ n of dense attention.
        every: denoising steps, at least, from one check to the next; a cache may skip those in between. The first step
            of each range of the plan, where heads change their patterns, is checked in any case.

    Raises:
        ValueError: a plan that was not calibrated.
    """

    def __init__(
        self,
        plan: AccelPlan,
        *,
        factor: float = 5.0,
        usual: float = 2.0,
        floor: float = 0.05,
        rows: int = 32,
        every: int = 4,
    ) -> None:
        dense = [candidate.is_dense for candidate in plan.candidates]
        if plan.rel_l2 is None or not any(dense):
            raise ValueError(
                "guard: expected a calibrated plan, which knows the errors of its heads and has a dense candidate, got "
                "one without; calibrate, or enable without a guard"
            )
        if factor <= 0 or usual < 0 or rows < 1 or every < 1:
            raise ValueError(
                f"guard: expected factor > 0, usual >= 0, rows and every at least 1, got {factor}, {usual}, {rows} and "
                f"{every}"
            )
        own, of_range = plan.rel_l2, plan.rel_l2.flatten(1).median(1).values[:, None, None]
        limits = (factor * own).maximum(usual * of_range).clamp(min=floor)
        self._limits = torch.where(own < _LOST, limits.clamp(max=_LOST), limits)
        self._dense = dense.index(True)
        self._shape = (plan.choice.shape[1], plan.choice.shape[2])
        self.rows = rows
        self.every = every

    def memory(self) -> GuardMemory:
        """For a new generation."""
        return GuardMemory({}, torch.zeros(self._shape, dtype=torch.bool, device="cpu"))

    def due(
        self, memory: GuardMemory, branch: str, layer: int, forward: int, number: int
    ) -> Literal["", "later", "now"]:
        """When the verdict on a layer is wanted in the forward with this number in its branch; it counts as checked.

        Not at all, when the next forward begins, or before its output is used, where the plan's range `number` begins.
        """
        before = memory.last.get((branch, layer))
        entered = before is None or number != before[1]
        if before is not None and not entered and forward - before[0] < self.every:
            return ""
        memory.last[branch, layer] = forward, number
        return "now" if entered else "later"

    def row(self, row: Tensor, layer: int, memory: GuardMemory) -> Tensor:
        """Candidate numbers of a layer's heads with those made dense replaced."""
        return torch.where(memory.dense[layer], self._dense, row.expand(self._shape[1])).to(row.dtype)

    def check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        number: int,
        layer: int,
        memory: GuardMemory,
        *,
        scale: float | None,
        key_mask: Tensor | None,
    ) -> Tensor:
        """Compare sampled rows of one layer's output with exact attention; bool `[heads]`, the heads that err.

        Args:
            query, key, value, output: `[batch, seq, heads, dim]`.
            number: of the plan's range.
            key_mask: bool `[batch, seq]`, True = may be read.
        """
        tokens = query.shape[1]
        count = min(self.rows, tokens)
        # Evenly spread, moved on from check to check.
        first = (memory.checks * 7919) % tokens
        places = (first + torch.arange(count, device=query.device) * tokens // count) % tokens
        mask = None if key_mask is None else key_mask[:, None, None]
        exact = F.scaled_dot_product_attention(
            query[:, places].transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            scale=scale,
        ).float()
        error = output[:, places].transpose(1, 2).float() - exact
        squares = [x.square().sum(-1) for x in (error, exact)]
        if key_mask is not None:
            # What padded queries get matters to nobody, and a calibration does not count it either.
            real = key_mask[:, None, places]
            squares = [x.masked_fill(~real, 0.0) for x in squares]
        squares = [x.sum(-1) for x in squares]
        if self._limits.device != query.device:
            self._limits = self._limits.to(query.device)
        limits = self._limits[number, layer]
        # Each element of a batch by itself; NaN too is an error.
        memory.pending[layer] = (~(squares[0] <= limits.square() * squares[1])).any(0)
        memory.checks += 1
        return memory.pending[layer]

    @staticmethod
    def repaired(
        wrong: Tensor,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        block: int,
        scale: float | None,
        key_mask: Tensor | None,
        backend: str,
    ) -> Tensor:
        """The output with exact attention for the heads in `wrong`, bool `[heads]`, which the host does not read.

        The lists of the other heads are empty, so that on a GPU they cost the writing of zeros.
        """
        if wrong.device.type == "cpu" and not wrong.any():
            return output
        heads, tokens = query.shape[2], query.shape[1]
        index = BlockIndex.dense(1, heads, block, block, tokens, tokens, query.device)
        index = replace(index, counts=index.counts * wrong[None, :, None])
        exact = block_sparse_attention(
            query, key, value, index, scale=scale, key_mask=key_mask, backend=backend
        )
        return torch.where(wrong[:, None], exact, output)

    def settle(self, memory: GuardMemory) -> bool:
        """Read the verdicts that are pending; returns whether a head went dense."""
        if not memory.pending:
            return False
        before = int(memory.dense.sum())
        layers = list(memory.pending)
        verdicts = torch.stack([memory.pending[layer] for layer in layers]).cpu()
        memory.dense[layers] |= verdicts
        memory.pending.clear()
        found = int(memory.dense.sum())
        if found and not before:
            logger.warning(
                "guard: heads err more than the plan allows and run dense for the rest of this generation; "
                "dit_accel.stats(pipe) counts them"
            )
        return found > before
