"""Tables of a model that does not exist."""

import torch

from dit_accel.calibration.tables import Tables


def tables(layers: int = 6, heads: int = 4) -> Tables:
    """Four ranges of heads that differ widely in how much error their candidates make."""
    generator = torch.Generator().manual_seed(0)
    density = torch.tensor([1.0, 0.0, 0.06, 0.12, 0.2, 0.3, 0.42, 0.6], dtype=torch.float64)
    sensitivity = torch.rand(4, layers, heads, 1, generator=generator, dtype=torch.float64) ** 3 * 1e-2
    error = sensitivity * (1 - density) ** 2
    calls = torch.tensor([4.0, 8.0, 12.0, 16.0], dtype=torch.float64)
    return Tables(error, calls[:, None] * (0.05 + density), calls * 1.0, density, calls, dense=0)
