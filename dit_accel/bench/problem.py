"""Attention problems of real models' sizes, with lists as ragged as plans make them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.grid import TokenGrid
from dit_accel.kernels import BlockIndex


@dataclass(frozen=True)
class Shape:
    """One attention layer: tokens (text included), heads and head dim; where it is a model's, the grid they lie on."""

    tokens: int
    heads: int
    dim: int
    grid: TokenGrid | None = None

    @property
    def flops(self) -> float:
        """Floating point operations of dense attention: two products of 2 · tokens² · dim per head."""
        return 4.0 * self.tokens**2 * self.heads * self.dim


def of_model(grid: TokenGrid, heads: int, dim: int) -> Shape:
    """The layer of a model."""
    return Shape(grid.total_tokens, heads, dim, grid)


# As the models' own default resolutions give them.
SHAPES = {
    "wan2.1-1.3b-480p": of_model(TokenGrid(21, 30, 52), 12, 128),
    "wan2.1-14b-720p": of_model(TokenGrid(21, 45, 80), 40, 128),
    "hunyuanvideo-720p": of_model(TokenGrid(33, 45, 80, text_tokens=256), 24, 128),
    "cogvideox1.5": of_model(TokenGrid(11, 48, 85, text_tokens=226, text_first=True), 48, 64),
    "flux-1024": of_model(TokenGrid(1, 64, 64, text_tokens=512, text_first=True), 24, 128),
    "flux-2048": of_model(TokenGrid(1, 128, 128, text_tokens=512, text_first=True), 24, 128),
}


def tensors(
    shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value `[1, tokens, heads, dim]`, in the memory layout a model's projections leave."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (1, shape.tokens, shape.heads, shape.dim)
    query, key, value = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(3))
    return query, key, value


def block_mask(
    heads: int, rows: int, cols: int, density: float, device: torch.device, seed: int = 0
) -> Tensor:
    """bool `[1, heads, rows, cols]`: random blocks, lists that differ by up to a third in length, the mean as asked."""
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.rand(1, heads, rows, cols, generator=generator, device=device)
    if density >= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    share = density * (1 + (2 * torch.rand(1, heads, rows, 1, generator=generator, device=device) - 1) / 3)
    keep = (share * cols).round().clamp(1, cols).long()
    threshold = scores.sort(dim=-1).values.gather(-1, keep - 1)
    return scores <= threshold


def index_of(shape: Shape, block_q: int, block_k: int, density: float, device: torch.device) -> BlockIndex:
    """Lists over a shape's tokens."""
    rows, cols = -(-shape.tokens // block_q), -(-shape.tokens // block_k)
    mask = block_mask(shape.heads, rows, cols, density, device)
    return BlockIndex.from_mask(mask, block_q, block_k, shape.tokens, shape.tokens)
