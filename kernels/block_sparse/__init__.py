"""Block-sparse attention over ragged block lists."""

from dit_accel.kernels.block_sparse.api import (
    available_precisions,
    block_sparse_attention,
    resolve_backend,
    resolve_precision,
)

__all__ = ["available_precisions", "block_sparse_attention", "resolve_backend", "resolve_precision"]
