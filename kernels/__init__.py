"""Attention kernels: ragged block lists and one block-sparse attention with several backends."""

from dit_accel.kernels.block_index import BlockIndex
from dit_accel.kernels.block_sparse import block_sparse_attention, resolve_backend

__all__ = ["BlockIndex", "block_sparse_attention", "resolve_backend"]
