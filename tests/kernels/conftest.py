"""Fixtures of the kernel tests: attention problems, the float64 error budget, poisoned memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import BlockIndex


@dataclass
class Problem:
    """Inputs of one attention call and their float64 answer from SDPA with a dense mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    index: BlockIndex
    key_mask: Tensor | None
    query_order: Tensor | None = None
    key_order: Tensor | None = None
    remainder: float | Tensor = False

    @property
    def mask(self) -> Tensor:
        """bool [batch, heads, seq_q, seq_k] in the model's order"""
        mask = self.index.token_mask().expand(self.query.shape[0], -1, -1, -1)
        for dim, order in ((2, self.query_order), (3, self.key_order)):
            if order is not None:
                order = order if order.ndim == 3 else order[None]
                shape = [*order.shape[:2], 1, 1]
                shape[dim] = order.shape[2]
                mask = torch.zeros_like(mask).scatter_(dim, order.view(shape).expand_as(mask), mask)
        return mask if self.key_mask is None else mask & self.key_mask[:, None, None]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, BlockIndex]:
        return self.query, self.key, self.value, self.index

    @property
    def options(self) -> dict[str, object]:
        names = ("key_mask", "query_order", "key_order", "remainder")
        return {name: getattr(self, name) for name in names}

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v [batch, heads, seq, dim] and an additive bias; a remainder adds mean keys and values."""
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (self.query, self.key, self.value))
        bias = torch.zeros(self.mask.shape, dtype=dtype).masked_fill_(~self.mask, -torch.inf)
        if self.remainder is False:
            return q, k, v, bias
        batch, heads, seq_k, _ = k.shape
        cols, block = self.index.cols, self.index.block_k
        order = torch.arange(seq_k)[None] if self.key_order is None else self.key_order
        order = order if order.ndim == 3 else order[None]
        member = torch.zeros(batch, heads, cols, seq_k, dtype=torch.float64)
        edges = torch.arange(cols + 1).mul(block).clamp(max=seq_k)[None, None]
        if self.index.key_starts is not None:
            edges = self.index.key_starts
        for b, head, col in itertools.product(range(batch), range(heads), range(cols)):
            first, end = edges[b % len(edges), head % edges.shape[1], col : col + 2].tolist()
            member[b, head, col, order[b % len(order), head % order.shape[1], first:end]] = 1
        if self.key_mask is not None:
            member *= self.key_mask[:, None, None]
        sizes = member.sum(-1)
        member /= sizes.clamp(min=1)[..., None]
        k, v = (torch.cat([x, (member @ x.double()).to(dtype)], dim=2) for x in (k, v))
        left_out = ~self.index.to_mask().expand(batch, -1, -1, -1)
        lengths = torch.full((1, 1, self.index.rows), self.index.block_q)
        if self.index.query_starts is not None:
            lengths = self.index.query_starts.diff()
        left_out = torch.stack(
            [
                torch.stack(
                    [
                        left_out[b, h].repeat_interleave(lengths[b % len(lengths), h % lengths.shape[1]], 0)[
                            : self.index.seq_q
                        ]
                        for h in range(heads)
                    ]
                )
                for b in range(batch)
            ]
        )
        if self.query_order is not None:
            rows = self.query_order.expand(batch, heads, -1)[..., None].expand_as(left_out)
            left_out = torch.zeros_like(left_out).scatter_(2, rows, left_out)
        weight = torch.as_tensor(self.remainder, dtype=torch.float64).expand(heads)
        rest = (sizes * weight[:, None]).log()[:, :, None].expand(left_out.shape)
        rest = rest.masked_fill(~left_out, -torch.inf)
        return q, k, v, torch.cat([bias, rest.to(dtype)], dim=3)

    def expected(self) -> Tensor:
        q, k, v, bias = self.operands(torch.float64)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return output.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0).transpose(1, 2)

    def expected_lse(self) -> Tensor:
        q, k, _, bias = self.operands(torch.float64)
        return (q @ k.mT * q.shape[-1] ** -0.5 + bias).logsumexp(-1)

    def eager(self) -> Tensor:
        """The textbook formula in the dtype of the inputs."""
        q, k, v, bias = self.operands(self.query.dtype)
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
        return (weights.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0) @ v).transpose(1, 2)

    def check(self, output: Tensor) -> None:
        """No further from float64 than eager torch in the same dtype, plus a rounding band.

        The band: one rounding of the output, and a few of the accumulation in float32. In float64 the oracle
        itself errs, so there it is the bound for sums of that many terms.
        """
        expected = self.expected()
        assert output.shape == expected.shape
        assert output.dtype == self.query.dtype
        largest = self.value.abs().max()
        band = (
            torch.finfo(output.dtype).eps * expected.abs().max()
            + 8 * torch.finfo(torch.float32).eps * largest
        )
        if output.dtype == torch.float64:
            band = (self.index.seq_k + self.query.shape[-1]) * torch.finfo(torch.float64).eps * largest
        budget = (self.eager() - expected).abs().max() + band
        error = (output - expected).abs().max()
        assert error <= budget, f"error {error:.2e} is over the budget {budget:.2e}"
        dead = (self.operands(torch.float64)[3] == -torch.inf).all(-1).transpose(1, 2)
        assert (output[dead] == 0).all()

    def check_lse(self, lse: Tensor) -> None:
        """As `check`, for the log-sum-exp: the scores are rounded once to the dtype of the inputs."""
        expected = self.expected_lse()
        assert lse.dtype == torch.float32
        assert torch.equal(lse == -torch.inf, expected == -torch.inf)
        alive = expected.isfinite()
        if not alive.any():
            return
        band = torch.finfo(self.query.dtype).eps * max(1.0, expected[alive].abs().max().item()) * 4
        assert (lse[alive] - expected[alive]).abs().max() <= max(band, 1e-6)


def _random_starts(batch: int, heads: int, seq: int, blocks: int) -> Tensor:
    """int32 [batch, heads, blocks + 1]; some blocks are empty."""
    inner = torch.randint(seq + 1, (batch, heads, blocks - 1), dtype=torch.int32).sort(-1).values
    inner[..., 1::5] = inner[..., ::5][..., : inner[..., 1::5].shape[-1]]
    ends = [inner.new_full((batch, heads, 1), n) for n in (0, seq)]
    return torch.cat([ends[0], inner, ends[1]], -1)


@pytest.fixture(scope="session")
def random_starts() -> Callable[[int, int, int, int], Tensor]:
    """`random_starts(batch, heads, seq, blocks)`: where blocks of varying length begin; some are empty."""
    return _random_starts


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """Builder of attention problems from a seed; keys of batch element 0 are half masked by `masked`."""

    def build(
        dtype: torch.dtype = torch.float32,
        *,
        batch: int = 2,
        seq_q: int = 333,
        seq_k: int = 517,
        heads: int = 2,
        dim: int = 64,
        block_q: int = 64,
        block_k: int = 64,
        density: float = 0.4,
        index_batch: int = 1,
        masked: bool = False,
        strided: bool = False,
        dead_rows: bool = False,
        blocks: Tensor | None = None,
        orders: int = 0,
        cuts: tuple[int, int] | None = None,
        remainder: float | list[bool] | list[float] = False,
    ) -> Problem:
        torch.manual_seed(0)
        q, k, v = (torch.randn(batch, n, heads, dim, dtype=dtype) for n in (seq_q, seq_k, seq_k))
        if strided:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
            k = torch.stack([k, k], -1)[..., 0]
            v = torch.cat([v, v], 1)[:, :seq_k]
        starts: list[Tensor | None] = [None, None]
        rows, cols = -(-seq_q // block_q), -(-seq_k // block_k)
        if cuts is not None:  # so many blocks of random lengths, empty ones too, different for every head
            rows, cols = cuts
            starts = [_random_starts(index_batch, heads, n, c) for n, c in ((seq_q, rows), (seq_k, cols))]
        if blocks is None:
            shape = (index_batch, heads, rows, cols)
            blocks = torch.rand(shape) < density
        if dead_rows:
            blocks[0, 0, ::2] = False
        key_mask = None
        if masked:
            key_mask = torch.rand(batch, seq_k) < 0.5
            key_mask[0, : seq_k // 2] = False
        index = BlockIndex.from_mask(blocks, block_q, block_k, seq_q, seq_k, *starts)
        query_order = key_order = None
        if (
            orders
        ):  # as many different orders of queries and of keys: one, one per head, or one per head and sample
            query_order, key_order = (
                torch.stack([torch.randperm(n) for _ in range(orders)]) for n in (seq_q, seq_k)
            )
            if orders > heads:
                query_order, key_order = (x.view(batch, heads, -1) for x in (query_order, key_order))
        if isinstance(remainder, list):
            remainder = torch.tensor(remainder)
        return Problem(q, k, v, index, key_mask, query_order, key_order, remainder)

    return build


@pytest.fixture
def far_apart(tmp_path: Path) -> Callable[[Tensor, int], Tensor]:
    """`far_apart(tensor, dim)`: a copy whose last element along `dim` lies 2**31 elements behind its first.

    In a file full of holes, so that only what is written takes room.
    """
    numbers = itertools.count()

    def spread(tensor: Tensor, dim: int) -> Tensor:
        step = -(-(2**31) // (tensor.shape[dim] - 1) // 16) * 16 + 16
        strides = list(tensor.select(dim, 0).contiguous().stride())
        strides.insert(dim, step)
        size = step * (tensor.shape[dim] - 1) + tensor.select(dim, 0).numel()
        path = str(tmp_path / f"far_{next(numbers)}")
        room = torch.from_file(path, shared=True, size=size, dtype=tensor.dtype)
        return room.as_strided(tensor.shape, strides).copy_(tensor)

    return spread


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
