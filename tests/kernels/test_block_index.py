"""BlockIndex: lists, masks, densities, merging."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels import BlockIndex

shapes = st.tuples(*(st.integers(1, n) for n in (2, 3, 5, 7, 70, 90)))


def random_mask(seed: int, batch: int, heads: int, seq_q: int, seq_k: int, block_q: int, block_k: int):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, -(-seq_q // block_q), -(-seq_k // block_k))
    # A density per row, so that empty, ragged and full lists meet.
    return (
        torch.rand(shape, generator=generator) < 1.4 * torch.rand((*shape[:3], 1), generator=generator) - 0.2
    )


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 1000))
def test_lists_say_what_the_mask_says(shape, seed):
    batch, heads, block_q, block_k, seq_q, seq_k = shape
    mask = random_mask(seed, batch, heads, seq_q, seq_k, block_q, block_k)
    index = BlockIndex.from_mask(mask, block_q, block_k, seq_q, seq_k)
    assert torch.equal(index.to_mask(), mask)
    assert torch.equal(index.counts, mask.sum(-1))
    longest = int(index.counts.max())
    roomy = BlockIndex.from_mask(mask, block_q, block_k, seq_q, seq_k, room=longest)
    assert torch.equal(roomy.to_mask(), mask)
    assert roomy.indices.numel() == longest * index.counts.numel()
    assert roomy.density == index.density
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[:3])).tolist():
        start, count = index.offsets[b, h, row], index.counts[b, h, row]
        assert index.indices[start : start + count].tolist() == mask[b, h, row].nonzero().flatten().tolist()


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 1000))
def test_density_counts_short_blocks_exactly(shape, seed):
    batch, heads, block_q, block_k, seq_q, seq_k = shape
    mask = random_mask(seed, batch, heads, seq_q, seq_k, block_q, block_k)
    index = BlockIndex.from_mask(mask, block_q, block_k, seq_q, seq_k)
    tokens = index.token_mask()
    assert tokens.shape == (batch, heads, seq_q, seq_k)
    assert index.density == tokens.double().mean().item()
    q, k = seq_q // 2, seq_k - 1
    assert torch.equal(tokens[:, :, q, k], mask[:, :, q // block_q, k // block_k])


def test_dense_shares_one_list():
    index = BlockIndex.dense(2, 3, 64, 32, seq_q=333, seq_k=517)
    assert index.density == 1.0
    assert index.indices.numel() == index.cols == 17
    assert index.to_mask().all()
    assert index.to_mask().shape == (2, 3, 6, 17)


def test_merge_heads_puts_every_head_in_its_place():
    dense = BlockIndex.dense(1, 2, 64, 64, 333, 517)
    ragged = BlockIndex.from_mask(random_mask(1, 2, 3, 333, 517, 64, 64), 64, 64, 333, 517)
    empty = BlockIndex.from_mask(torch.zeros(1, 1, 6, 9, dtype=torch.bool), 64, 64, 333, 517)
    ids = [[4, 1], [5, 0, 2], [3]]
    merged = BlockIndex.merge_heads(list(zip([dense, ragged, empty], ids, strict=True)), heads=6)
    assert merged.batch == 2
    for part, members in zip([dense, ragged, empty], ids, strict=True):
        assert torch.equal(merged.to_mask()[:, members], part.to_mask().expand(2, -1, -1, -1))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 11), st.integers(0, 1000))
def test_blocks_of_varying_length(random_starts, batch, heads, rows, cols, seed):
    torch.manual_seed(seed)
    seq_q, seq_k = 70, 90
    starts = [random_starts(batch, n, s, c) for n, s, c in ((heads, seq_q, rows), (1, seq_k, cols))]
    mask = torch.rand(batch, heads, rows, cols) < 0.5
    index = BlockIndex.from_mask(mask, 16, 16, seq_q, seq_k, *starts)
    assert torch.equal(index.to_mask(), mask)
    tokens = index.token_mask()
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).view(-1, 2).tolist():
        lengths = starts[0][b, h].diff(), starts[1][b, 0].diff()
        expected = mask[b, h].repeat_interleave(lengths[0], 0).repeat_interleave(lengths[1], 1)
        assert torch.equal(tokens[b, h], expected)
    assert index.density == tokens.double().mean().item()


def test_merge_heads_joins_equal_and_varying_blocks(random_starts):
    torch.manual_seed(0)
    equal = BlockIndex.from_mask(random_mask(1, 1, 2, 333, 517, 64, 64), 64, 64, 333, 517)
    starts = random_starts(2, 3, 333, 4), random_starts(2, 3, 517, 20)
    varying = BlockIndex.from_mask(torch.rand(2, 3, 4, 20) < 0.5, 64, 64, 333, 517, *starts)
    ids = [[4, 1], [3, 0, 2]]
    merged = BlockIndex.merge_heads(list(zip([equal, varying], ids, strict=True)), heads=5)
    assert (merged.rows, merged.cols) == (6, 20)
    for part, members in zip([equal, varying], ids, strict=True):
        expected = part.token_mask().expand(2, -1, -1, -1)
        assert torch.equal(merged.token_mask()[:, members], expected)
    assert merged.density == merged.token_mask().double().mean().item()


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        pytest.param(torch.zeros(1, 1, 3), r"key_starts must be int32 \[batch or 1.*float32", id="dtype"),
        pytest.param(torch.zeros(1, 3, 3, dtype=torch.int32), r"got torch.int32 \(1, 3, 3\)", id="heads"),
        pytest.param(torch.zeros(1, 1, 1, dtype=torch.int32), r"got torch.int32 \(1, 1, 1\)", id="none"),
        pytest.param(
            torch.zeros(1, 1, 3, dtype=torch.int32, device="meta"), "on cpu like counts", id="device"
        ),
    ],
)
def test_starts_are_checked(starts, message):
    with pytest.raises(ValueError, match=message):
        BlockIndex(**(vars(BlockIndex.dense(1, 2, 64, 64, 100, 100)) | {"key_starts": starts}))


def test_to_moves_all_lists():
    index = BlockIndex.dense(1, 1, 64, 64, 100, 100).to("meta")
    assert {index.counts.device.type, index.offsets.device.type, index.indices.device.type} == {"meta"}


def test_from_mask_refuses_scores():
    with pytest.raises(ValueError, match=r"mask must be bool, got torch.float32; compare scores"):
        BlockIndex.from_mask(torch.rand(1, 1, 2, 2), 64, 64, 100, 100)


def test_from_mask_refuses_another_shape():
    mask = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask must be \[batch or 1, heads, 2, 2\].*got \(1, 1, 2, 3\)"):
        BlockIndex.from_mask(mask, 64, 64, 100, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"block_q": 0}, "block_q must be at least 1, got 0", id="block"),
        pytest.param({"seq_q": 999}, r"rows = ceil\(999/64\) = 16, got \(1, 2, 2\)", id="rows"),
        pytest.param({"counts": torch.ones(1, 2, 2)}, "counts must be torch.int32", id="dtype"),
        pytest.param({"offsets": torch.zeros(1, 1, 2, dtype=torch.int64)}, "shape of counts", id="offsets"),
        pytest.param({"indices": torch.zeros(1, 2, dtype=torch.int32)}, r"must be \[total\]", id="indices"),
    ],
)
def test_fields_are_checked(change, message):
    index = BlockIndex.dense(1, 2, 64, 64, 100, 100)
    with pytest.raises(ValueError, match=message):
        BlockIndex(**(vars(index) | change))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        pytest.param([], "needs at least one", id="none"),
        pytest.param([((1, 2, 64, 64), [0, 2])], r"cover 0..1 once each, got \[0, 2\]", id="missing"),
        pytest.param([((1, 2, 64, 64), [0])], "must name 2 heads, got 1", id="count"),
        pytest.param([((1, 1, 64, 64), [0]), ((1, 1, 64, 32), [1])], "must agree", id="blocks"),
        pytest.param([((2, 1, 64, 64), [0]), ((3, 1, 64, 64), [1])], "must be equal or 1", id="batch"),
    ],
)
def test_merge_heads_refuses(parts, message):
    built = [(BlockIndex.dense(*shape, 100, 100), ids) for shape, ids in parts]
    with pytest.raises(ValueError, match=message):
        BlockIndex.merge_heads(built, heads=2)
