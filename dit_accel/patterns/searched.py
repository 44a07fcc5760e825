"""Searched: the exact mass of every block.

AdaSpa (https://arxiv.org/abs/2502.21079): Σ exp(q·k/√d − LSE(q)) over the keys of a block, mean over its queries. It
costs as much as the scores of dense attention and pays through `reuse`, the steps that a search serves. From the
second search on the first one's log-sum-exp saves a pass over the keys, and the blocks of a row are compared by
their shares of its mass.

`easy` = r > 0 is AdaSpa's budget by head: of the heads that run together, those that hold more than r of the mass,
at most half of all, leave half of their blocks to as many that hold least. Other options: see `scored.py`.
"""

from torch import Tensor

from dit_accel.kernels.prepare import TINY
from dit_accel.kernels.scores import block_mass
from dit_accel.patterns.base import BlockSpace, Memory
from dit_accel.patterns.scored import scored_family


def _searched(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, memory: Memory
) -> Tensor:
    before = memory.get("lse")
    mass, memory["lse"] = block_mass(
        query, key, block_q=space.block, block_k=space.block, lse=before, scale=scale
    )
    if before is not None:
        # By the log-sum-exp of another step a row does not add up to 1.
        mass /= mass.sum(-1, keepdim=True).clamp(min=TINY)
    return mass


SEARCHED = scored_family("searched", _searched, ("easy",), easy=0.0)
