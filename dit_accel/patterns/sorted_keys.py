"""Keys sorted within segments by the attention they get, so that blocks hold what is read together.

PBS-Attn (https://arxiv.org/abs/2510.21270): within each segment of the sequence keys stand in descending order of
their mean softmax weight. The authors estimate it from the last block of queries of a causal model; here it comes from
rows sampled over the whole video. Attention does not depend on the order of keys, so queries stay where they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.patterns.base import BlockSpace
from dit_accel.patterns.samples import sampled_mass

SAMPLES = 64


def sorted_keys(space: BlockSpace, query: Tensor, key: Tensor, scale: float, segment: int) -> Tensor:
    """Place in the space's order of every key of the new one, int64 `[batch, heads, seq]`.

    Args:
        query, key: `[batch, seq, heads, dim]` in the order of the space.
        segment: tokens. Keys in blocks that hold text stay in place.
    """
    weight = sampled_mass(space, query, key, scale, SAMPLES).mean(2)
    tokens = space.chosen_tokens
    parts = F.pad(weight, (0, -tokens % segment), value=-1.0).unflatten(2, (-1, segment))
    sorted_parts = parts.argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(0, tokens, segment, device=key.device)
    places = (sorted_parts + starts[:, None]).flatten(2)[..., :tokens]
    rest = torch.arange(tokens, key.shape[1], device=key.device)
    return torch.cat((places, rest.expand(*places.shape[:2], -1)), dim=-1)
