"""Attention kernels: ragged block lists and one block-sparse attention with several backends."""

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.block_sparse import (
    available_precisions,
    block_sparse_attention,
    resolve_backend,
    resolve_precision,
)
from dit_accel.kernels.prepare import PRECISIONS

__all__ = [
    "PRECISIONS",
    "BlockIndex",
    "available_precisions",
    "block_sparse_attention",
    "resolve_backend",
    "resolve_precision",
]
