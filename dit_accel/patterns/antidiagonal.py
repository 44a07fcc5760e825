"""Antidiagonal: runs of tokens, paired along their antidiagonals.

XAttention (https://arxiv.org/abs/2503.16428): the score of two runs of `stride` = s tokens is the mean over i of
q_{s−1−i}·k_i/√d, so that every query and every key takes part and diagonal and vertical lines all cross what is
summed. A softmax over the runs of keys gives masses, and those between two blocks add up. The authors keep blocks
until these hold `top_p` of a row; with a density alone each row keeps equally many. What they pad with zeros is
defined here by the tokens that are there, see `kernels.scores.antidiagonal_scores`. Other options: see `scored.py`.
"""

from torch import Tensor

from dit_accel.kernels.scores import antidiagonal_scores
from dit_accel.patterns.base import BlockSpace, Memory, check_divisor
from dit_accel.patterns.scored import scored_family


def _antidiagonal(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, memory: Memory, *, stride: int
) -> Tensor:
    check_divisor("antidiagonal", "stride", stride, space.block)
    return antidiagonal_scores(query, key, block=space.block, stride=stride, scale=scale)


ANTIDIAGONAL = scored_family("antidiagonal", _antidiagonal, stride=8)
