"""Query rows sampled over the whole video, and the attention of these rows."""

import torch
from torch import Tensor

from dit_accel.patterns.base import BlockSpace

_GOLDEN = 0.6180339887498949


def sampled_rows(space: BlockSpace, samples: int) -> Tensor:
    """One row from each of `samples` equal stretches, int64; a fixed stride could meet one image column only."""
    samples = min(samples, space.chosen_tokens)
    number = torch.arange(samples, device=space.device, dtype=torch.float64)
    return ((number + (number * _GOLDEN) % 1.0) * (space.chosen_tokens / samples)).long()


def sampled_mass(space: BlockSpace, query: Tensor, key: Tensor, scale: float, samples: int) -> Tensor:
    """Softmax of sampled rows over the keys in video blocks, float32 `[batch, heads, samples, chosen_tokens]`.

    Query and key are `[batch, seq, heads, dim]` in the order of the space.
    """
    rows = query.index_select(1, sampled_rows(space, samples)).transpose(1, 2)
    # Contiguous heads make the product seven times faster in bfloat16 on a CPU.
    keys = key[:, : space.chosen_tokens].transpose(1, 2).contiguous()
    return torch.softmax((rows * scale) @ keys.transpose(2, 3), dim=-1, dtype=torch.float32)
