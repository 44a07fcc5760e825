"""Stripes: all queries read the same few key columns, the first blocks, and their own neighbourhood.

MInference's vertical-slash heads (https://arxiv.org/abs/2407.02490) without the causal mask: the columns are those
with the most softmax mass from query rows sampled over the whole video, not from its last rows. With `slashes` the
diagonals compete with them: a pair of blocks counts by the mean mass of its column or of its diagonal, whichever is
more. A diagonal's mean is over the sampled rows that it crosses. `top_p` > 0 lets a row stop earlier, once its blocks
hold that share of the mass that it is so expected to have.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from dit_accel.kernels import BlockIndex
from dit_accel.kernels.prepare import TINY
from dit_accel.patterns.base import SERVES, BlockSpace, Family, check_share, ranked_lists
from dit_accel.patterns.samples import sampled_mass, sampled_rows


def _choose(
    space: BlockSpace,
    kept: int,
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    sinks: int,
    local: int,
    samples: int,
    slashes: int,
    top_p: float,
    memory: object,
) -> BlockIndex:
    """`sinks`: first blocks kept by all; `local`: blocks at each side of a row's own; `samples`: rows."""
    for name, value, least in (("sinks", sinks, 0), ("local", local, 0), ("samples", samples, 1)):
        if value < least:
            raise ValueError(f"option {name!r} of family 'stripes': expected at least {least}, got {value!r}")
    if slashes not in (0, 1):
        raise ValueError(f"option 'slashes' of family 'stripes': expected 0 or 1, got {slashes!r}")
    check_share("stripes", "top_p", top_p)
    rows = space.video_blocks
    mass = sampled_mass(space, query, key, scale, samples)
    mass = space.means(mass, 3, space.block) * space.run_sizes(space.block)
    columns = mass.mean(2)
    score = columns[:, :, None].expand(-1, -1, rows, -1)
    blocks = torch.arange(rows, device=space.device)
    if slashes:
        offsets = torch.arange(1 - rows, rows, device=space.device)
        met = (sampled_rows(space, samples) // space.block)[:, None] + offsets
        inside = (met >= 0) & (met < rows)
        along = mass.gather(3, met.clamp(0, rows - 1).expand(*mass.shape[:3], -1)) * inside
        means = along.sum(2) / inside.sum(0).clamp(min=1)
        score = torch.maximum(score, means[:, :, blocks - blocks[:, None] + rows - 1])
    apart = (blocks[:, None] - blocks).abs()
    # The mean mass is at most 1, so these come first, the own block before all.
    ranking = score + 2.0 * ((apart <= local) | (blocks < sinks)) + 2.0 * (apart == 0)
    masses = score / score.sum(-1, keepdim=True).clamp(min=TINY) if top_p else None
    return ranked_lists(space, ranking, kept, masses=masses, top_p=top_p)


STRIPES = Family(
    "stripes",
    _choose,
    static=False,
    options=MappingProxyType(
        {"order": "frame", "sinks": 1, "local": 1, "samples": 64, "slashes": 0, "top_p": 0.0, **SERVES}
    ),
)
