"""Channels: all pairs of tokens, by the few channels that weigh most in their scores.

DoubleSparsity (https://arxiv.org/abs/2408.07092): with C the `channels` strongest ones of a head, the mass of a
block is that of the softmax of Σ_{c∈C} q_c·k_c/√d over all keys. The authors find C offline, here each head finds it
in the call itself, by mean |q_c| times mean |k_c − k̄_c|: a share that all keys have adds nothing that a softmax
sees. Theirs are single tokens, ours blocks. Other options: see `scored.py`.
"""

import torch
from torch import Tensor

from dit_accel.kernels.scores import block_mass
from dit_accel.patterns.base import BlockSpace, Memory
from dit_accel.patterns.scored import scored_family


def _channels(
    space: BlockSpace, kept: int, query: Tensor, key: Tensor, scale: float, memory: Memory, *, channels: int
) -> Tensor:
    if channels < 1:
        raise ValueError(f"option 'channels' of family 'channels': expected at least 1, got {channels}")
    # What a channel adds to a score, in size; a share that all keys have adds nothing that a softmax sees.
    varying = (key - key.mean(1, keepdim=True)).abs().mean(1, dtype=torch.float32)
    weight = query.abs().mean(1, dtype=torch.float32) * varying
    best = weight.topk(min(channels, query.shape[3]), dim=-1).indices[:, None]
    query, key = (x.gather(3, best.expand(*x.shape[:3], -1)) for x in (query, key))
    return block_mass(query, key, block_q=space.block, block_k=space.block, scale=scale)[0]


CHANNELS = scored_family("channels", _channels, channels=16)
