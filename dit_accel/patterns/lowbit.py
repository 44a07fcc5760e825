"""Lowbit: all pairs of tokens, with queries and keys in 4 bits.

SALE (https://arxiv.org/abs/2505.24179): queries and keys are rounded to −n..n with n = 2^(bits−1) − 1, times a scale
of each query and of each block of keys, and the softmax of their integer products over all keys gives the mass of
every block. The authors keep the blocks whose score exceeds a threshold, relative to the largest in the sinks and
the neighbourhood and calibrated for each head; here each row keeps its best, or with `top_p` until they hold that
share. From the keys their mean is taken first, which no softmax sees (SageAttention,
https://arxiv.org/abs/2410.02367). Other options: see `scored.py`.
"""

from torch import Tensor

from dit_accel.kernels.scores import lowbit_scores
from dit_accel.patterns.base import BlockSpace, Memory
from dit_accel.patterns.scored import scored_family


def _lowbit(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, memory: Memory, *, bits: int
) -> Tensor:
    return lowbit_scores(query, key, block_q=space.block, block_k=space.block, bits=bits, scale=scale)


LOWBIT = scored_family("lowbit", _lowbit, bits=4)
