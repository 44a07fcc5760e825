"""Ragged block lists: which key blocks every query block reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.backend import on_device, triton


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """The kept key blocks of every query block, one ragged list per (batch, head, row).

    Attributes:
        counts: int32 `[batch or 1, heads, rows]`, length of each list; rows = ceil(seq_q / block_q).
        offsets: int64 `[batch or 1, heads, rows]`, where each list starts in `indices`. Lists may be shared.
        indices: int32 `[total]`, key-block numbers, ascending within a list.
        block_q, block_k: tokens per query and key block; the last block of a sequence may be shorter. Blocks of
            varying length are walked through in tiles of about that many tokens.
        seq_q, seq_k: sequence lengths in tokens.
        query_starts, key_starts: int32 `[batch or 1, heads or 1, blocks + 1]`, first token of every block and then
            the sequence length, never falling (a block may be empty); None for equal blocks. Their number of blocks
            stands for rows and cols.

    Example:
        >>> mask = torch.rand(1, 4, 6, 9) < 0.5
        >>> index = BlockIndex.from_mask(mask, 64, 64, seq_q=333, seq_k=517)
    """

    counts: Tensor
    offsets: Tensor
    indices: Tensor
    block_q: int
    block_k: int
    seq_q: int
    seq_k: int
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k", "seq_q", "seq_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, dtype in (("counts", torch.int32), ("offsets", torch.int64), ("indices", torch.int32)):
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {getattr(self, name).dtype}")
        for name in ("query_starts", "key_starts"):
            self._check_starts(name, getattr(self, name))
        if self.counts.ndim != 3 or self.counts.shape[2] != self.rows:
            equal = f" = ceil({self.seq_q}/{self.block_q})" if self.query_starts is None else ""
            raise ValueError(
                f"counts must be [batch or 1, heads, rows] with rows{equal} = {self.rows}, "
                f"got {tuple(self.counts.shape)}"
            )
        if self.offsets.shape != self.counts.shape:
            raise ValueError(
                f"offsets must have the shape of counts, {tuple(self.counts.shape)}, "
                f"got {tuple(self.offsets.shape)}"
            )
        if self.indices.ndim != 1:
            raise ValueError(f"indices must be [total], got {tuple(self.indices.shape)}")
        # Their number changes from plan to plan and step to step: compiled code must not depend on it.
        if not torch.compiler.is_compiling():
            torch._dynamo.maybe_mark_dynamic(self.indices, 0)

    def _check_starts(self, name: str, starts: Tensor | None) -> None:
        if starts is None:
            return
        leading = tuple(starts.shape[:-1])
        shared = len(leading) == 2 and all(
            n in (1, m) for n, m in zip(leading, self.counts.shape[:2], strict=True)
        )
        if starts.dtype != torch.int32 or not shared or starts.shape[-1] < 2:
            raise ValueError(
                f"{name} must be int32 [batch or 1, heads or 1, blocks + 1] for lists "
                f"{tuple(self.counts.shape)}, got {starts.dtype} {tuple(starts.shape)}"
            )
        if starts.device != self.counts.device:
            raise ValueError(f"{name} must be on {self.counts.device} like counts, got {starts.device}")

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        block_q: int,
        block_k: int,
        seq_q: int,
        seq_k: int,
        query_starts: Tensor | None = None,
        key_starts: Tensor | None = None,
        *,
        room: int | None = None,
    ) -> BlockIndex:
        """Lists of the True entries of a block mask.

        Args:
            mask: bool `[batch or 1, heads, rows, cols]`; rows = ceil(seq_q / block_q) and cols = ceil(seq_k / block_k)
                unless the starts say otherwise.
            query_starts, key_starts: see the attributes.
            room: no list is longer than this. Every list gets as much room, so that the host need not wait for the
                device to learn how long they are. Entries beyond a list's end mean nothing.

        Raises:
            ValueError: if the mask is not bool or does not have that shape.
        """
        expected = (_blocks(seq_q, block_q, query_starts), _blocks(seq_k, block_k, key_starts))
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {mask.dtype}; compare scores with a threshold first")
        if mask.ndim != 4 or tuple(mask.shape[2:]) != expected:
            raise ValueError(
                f"mask must be [batch or 1, heads, {expected[0]}, {expected[1]}] for {seq_q} x {seq_k} "
                f"tokens in {block_q} x {block_k} blocks, got {tuple(mask.shape)}"
            )
        counts = mask.sum(-1, dtype=torch.int32)
        if room is not None:
            kept_first = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :room]
            indices = kept_first.to(torch.int32).flatten()
            offsets = torch.arange(counts.numel(), device=mask.device).view_as(counts) * kept_first.shape[-1]
            return cls(counts, offsets, indices, block_q, block_k, seq_q, seq_k, query_starts, key_starts)
        ends = counts.flatten().cumsum(0, dtype=torch.int64).view_as(counts)
        indices = mask.nonzero()[:, 3].to(torch.int32)
        return cls(counts, ends - counts, indices, block_q, block_k, seq_q, seq_k, query_starts, key_starts)

    @classmethod
    def dense(
        cls,
        batch: int,
        heads: int,
        block_q: int,
        block_k: int,
        seq_q: int,
        seq_k: int,
        device: torch.device | str | None = None,
    ) -> BlockIndex:
        """Every query block reads every key block; all rows share one list."""
        rows, cols = -(-seq_q // block_q), -(-seq_k // block_k)
        counts = torch.full((batch, heads, rows), cols, dtype=torch.int32, device=device)
        indices = torch.arange(cols, dtype=torch.int32, device=device)
        offsets = torch.zeros(counts.shape, dtype=torch.int64, device=device)
        return cls(counts, offsets, indices, block_q, block_k, seq_q, seq_k)

    @staticmethod
    def merge_heads(parts: Sequence[tuple[BlockIndex, Sequence[int]]], heads: int) -> BlockIndex:
        """One index for all heads of a layer, so that mixed families need a single launch.

        Where some blocks vary in length all heads get starts, and as many blocks as the head that has most: those
        it lacks are empty.

        Args:
            parts: (index, head_ids) pairs; `head_ids` are the numbers of its heads.
            heads: number of heads of the result; the head ids must cover each exactly once.

        Raises:
            ValueError: if block sizes, lengths or batches differ, or a head is missing or given twice.
        """
        if not parts:
            raise ValueError("merge_heads needs at least one (index, head_ids) pair, got none")
        first = parts[0][0]
        shape = (first.block_q, first.block_k, first.seq_q, first.seq_k)
        batch = max(index.batch for index, _ in parts)
        for index, head_ids in parts:
            got = (index.block_q, index.block_k, index.seq_q, index.seq_k)
            if got != shape:
                raise ValueError(f"(block_q, block_k, seq_q, seq_k) must agree, got {shape} and {got}")
            if index.batch not in (1, batch):
                raise ValueError(f"batches must be equal or 1, got {index.batch} and {batch}")
            if len(head_ids) != index.heads:
                raise ValueError(f"head_ids must name {index.heads} heads, got {len(head_ids)}")
        order = [head for _, head_ids in parts for head in head_ids]
        if sorted(order) != list(range(heads)):
            raise ValueError(f"head_ids must cover 0..{heads - 1} once each, got {sorted(order)}")
        if any(index.varies for index, _ in parts):
            rows, cols = max(i.rows for i, _ in parts), max(i.cols for i, _ in parts)
            parts = [(index._with_blocks(rows, cols), head_ids) for index, head_ids in parts]
        bases = [0]
        for index, _ in parts:
            bases.append(bases[-1] + index.indices.numel())
        places = on_device(tuple(sorted(range(heads), key=order.__getitem__)), first.counts.device)
        counts = torch.cat([i.counts.expand(batch, -1, -1) for i, _ in parts], dim=1)
        offsets = torch.cat(
            [i.offsets.expand(batch, -1, -1) + base for (i, _), base in zip(parts, bases, strict=False)],
            dim=1,
        )
        indices = torch.cat([index.indices for index, _ in parts])
        starts = []
        for name in ("query_starts", "key_starts"):
            given = [(getattr(index, name), index.heads) for index, _ in parts]
            joined = [s.expand(batch, n, -1) for s, n in given if s is not None]
            starts.append(torch.cat(joined, dim=1)[:, places] if joined else None)
        return BlockIndex(counts[:, places], offsets[:, places], indices, *shape, *starts)

    def _with_blocks(self, rows: int, cols: int) -> BlockIndex:
        """The same lists with starts, and with empty blocks behind the last one up to these numbers."""
        missing = (0, rows - self.rows)
        starts = []
        for given, block, seq, have, want in (
            (self.query_starts, self.block_q, self.seq_q, self.rows, rows),
            (self.key_starts, self.block_k, self.seq_k, self.cols, cols),
        ):
            if given is None:
                equal = torch.arange(have + 1, dtype=torch.int32, device=self.counts.device) * block
                given = equal.clamp(max=seq)[None, None]
            starts.append(F.pad(given, (0, want - have), value=seq))
        counts, offsets = F.pad(self.counts, missing), F.pad(self.offsets, missing)
        sizes = (self.block_q, self.block_k, self.seq_q, self.seq_k)
        return BlockIndex(counts, offsets, self.indices, *sizes, *starts)

    @property
    def varies(self) -> bool:
        """Whether blocks vary in length."""
        return self.query_starts is not None or self.key_starts is not None

    @property
    def batch(self) -> int:
        return self.counts.shape[0]

    @property
    def heads(self) -> int:
        return self.counts.shape[1]

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return _blocks(self.seq_q, self.block_q, self.query_starts)

    @property
    def cols(self) -> int:
        """Number of key blocks."""
        return _blocks(self.seq_k, self.block_k, self.key_starts)

    @property
    def density(self) -> float:
        """Kept query-key pairs divided by all pairs, counted exactly."""
        return self.kept_share().item()

    def kept_share(self) -> Tensor:
        """The density as a float64 number on the device, for which the host waits only where keys' blocks vary."""
        pairs = self._pairs() if self.counts.device.type != "cuda" or triton is None else self._pairs_on_gpu()
        return pairs.sum(dtype=torch.float64) / (self.batch * self.heads * self.seq_q * self.seq_k)

    def to_mask(self) -> Tensor:
        """Block mask, bool `[batch or 1, heads, rows, cols]`."""
        row, entry = self._entries()
        mask = torch.zeros(self.counts.numel(), self.cols, dtype=torch.bool, device=self.counts.device)
        mask[row, self.indices[entry].long()] = True
        return mask.view(*self.counts.shape, self.cols)

    def kept_blocks(self, batch: int, rows: Tensor) -> Tensor:
        """Key blocks that some query blocks read, bool `[heads, n, cols]`, for which the host does not wait.

        batch: number of the batch element; rows: int64 `[heads, n]`, numbers of query blocks.
        """
        counts, offsets = (x[batch % self.batch].gather(1, rows) for x in (self.counts, self.offsets))
        kept = torch.zeros(*counts.shape, self.cols + 1, dtype=torch.bool, device=counts.device)
        if self.indices.numel():
            entry = torch.arange(self.cols, device=counts.device)
            place = (offsets[..., None] + entry).clamp(max=self.indices.numel() - 1)
            # Entries past a row's end go to one extra column, which is cut off.
            columns = torch.where(entry < counts[..., None], self.indices[place].long(), self.cols)
            kept.scatter_(-1, columns, True)
        return kept[..., :-1]

    def token_mask(self) -> Tensor:
        """Token mask, bool `[batch or 1, heads, seq_q, seq_k]`: seq_q * seq_k bytes per head."""
        queries, keys = self.query_blocks(), self.key_blocks()
        mask = self.to_mask()
        mask = mask.gather(2, queries[..., None].expand(*mask.shape[:2], -1, self.cols))
        return mask.gather(3, keys[:, :, None].expand(*mask.shape[:3], -1))

    def query_blocks(self) -> Tensor:
        """Number of the query block of every token, int64 `[batch or 1, heads or 1, seq_q]`."""
        return _block_numbers(self.seq_q, self.block_q, self.query_starts, self.counts.device)

    def key_blocks(self) -> Tensor:
        """Number of the key block of every token, int64 `[batch or 1, heads or 1, seq_k]`."""
        return _block_numbers(self.seq_k, self.block_k, self.key_starts, self.counts.device)

    def to(self, device: torch.device | str) -> BlockIndex:
        """The same lists on another device."""
        counts, offsets, indices = (t.to(device) for t in (self.counts, self.offsets, self.indices))
        starts = (None if s is None else s.to(device) for s in (self.query_starts, self.key_starts))
        return BlockIndex(
            counts, offsets, indices, self.block_q, self.block_k, self.seq_q, self.seq_k, *starts
        )

    def _entries(self) -> tuple[Tensor, Tensor]:
        """(flat row number, position in `indices`) of every list entry, row by row."""
        counts = self.counts.flatten().long()
        row = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
        place = torch.arange(row.numel(), device=counts.device) - (counts.cumsum(0) - counts)[row]
        return row, self.offsets.flatten()[row] + place

    def _pairs(self) -> Tensor:
        """int64 like counts: query-key pairs of each list."""
        return self._row_tokens() * self._key_tokens()

    def _pairs_on_gpu(self) -> Tensor:
        """As many for each head, in one launch where key blocks are equal: it is counted for every layer that runs."""
        if self.key_starts is not None:
            return self._pairs()
        from dit_accel.kernels.block_sparse.schedule import kept_pairs

        return kept_pairs(self)

    def _row_tokens(self) -> Tensor:
        if self.query_starts is not None:
            return self.query_starts.diff().long()
        starts = torch.arange(self.rows, device=self.counts.device) * self.block_q
        return (self.seq_q - starts).clamp(max=self.block_q)

    def _key_tokens(self) -> Tensor:
        """int64 like counts: keys in the blocks of each list."""
        if self.key_starts is not None:
            return (self.to_mask() * self.key_starts.diff().long()[:, :, None]).sum(-1)
        # Lists ascend, so only their last entry can be the short block.
        last = (self.offsets + self.counts - 1).clamp(min=0)
        ends_short = torch.zeros_like(self.counts, dtype=torch.bool)
        if self.indices.numel():
            ends_short = (self.indices[last] == self.cols - 1) & (self.counts > 0)
        return self.counts.long() * self.block_k - ends_short * (self.cols * self.block_k - self.seq_k)


def starts_steps(starts: Tensor | None) -> tuple[int, int]:
    """How many heads further the starts `[batch or 1, heads or 1, blocks + 1]` of the next batch element and head are.

    0 where they are shared.
    """
    if starts is None:
        return 0, 0
    batch, heads, _ = starts.shape
    return (heads if batch > 1 else 0), int(heads > 1)


def _blocks(seq: int, block: int, starts: Tensor | None) -> int:
    return -(-seq // block) if starts is None else starts.shape[-1] - 1


def _block_numbers(seq: int, block: int, starts: Tensor | None, device: torch.device) -> Tensor:
    tokens = torch.arange(seq, device=device)
    if starts is None:
        return (tokens // block)[None, None]
    ends = starts[..., 1:].contiguous()
    tokens = tokens.to(ends.dtype).expand(*ends.shape[:2], -1).contiguous()
    return torch.searchsorted(ends, tokens, right=True)
