"""Which implementation serves a call that exists in plain torch and in Triton."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # Triton has no wheel outside Linux, and the torch backend does without.
    triton = None

BACKENDS = ("auto", "torch", "triton")


@functools.lru_cache(maxsize=4096)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 `[len(numbers)]`, copied once: a copy to a GPU has the host wait. Do not write to it."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def torch_or_triton(backend: str, tensor: Tensor, served: str | None = None) -> str:
    """The backend to use: "auto" is Triton on CUDA and ROCm for all that its kernels serve, torch for the rest.

    Args:
        served: what the Triton kernels serve in place of this call, as in "head dims up to 256, got 320"; None if they
            serve it.

    Raises:
        ValueError: an unknown backend, or one that cannot serve the call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        able = triton is not None and tensor.device.type == "cuda" and served is None
        return "triton" if able else "torch"
    if backend == "torch":
        return backend
    if triton is None:
        raise ValueError("backend 'triton' needs the package triton, which is missing; use 'torch' or 'auto'")
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, got {tensor.device}; use 'torch' or 'auto', "
            "or set TRITON_INTERPRET=1 before the first import to debug the kernel"
        )
    if served is not None:
        raise ValueError(f"backend 'triton' serves {served}; use 'torch' or 'auto'")
    return backend
