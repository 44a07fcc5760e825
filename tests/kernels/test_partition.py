"""Equal blocks of tokens that are alike in attention: the metric against its definition, and planted groups."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.kernels import partition as module
from dit_accel.kernels.partition import partition, products

SIDES = pytest.mark.parametrize("side", [0, 1], ids=["queries", "keys"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "block"), [(1, 1, 64), (64, 65, 64), (333, 333, 32), (517, 150, 64), (250, 41, 7)]
)
def test_every_token_has_one_place(seq_q: int, seq_k: int, block: int, dtype: torch.dtype) -> None:
    query, key = draw(2, seq_q, 3, 24).to(dtype), draw(2, seq_k, 3, 24, seed=1).to(dtype)
    orders = partition(query, key, block=block)
    for order, seq in zip(orders, (seq_q, seq_k), strict=True):
        assert order.dtype == torch.int64
        assert torch.equal(order.sort(-1).values, torch.arange(seq).expand(2, 3, seq))
    for order, again in zip(orders, partition(query, key, block=block), strict=True):
        assert torch.equal(order, again)


@pytest.mark.parametrize("seq_k", [333, 150])
def test_heads_and_batch_entries_are_divided_alone(seq_k: int) -> None:
    query, key = draw(2, 333, 3, 16).double(), draw(2, seq_k, 3, 16, seed=1).double()
    whole = partition(query, key, block=32)
    for b in range(2):
        for h in range(3):
            alone = partition(*(x[b : b + 1, :, h : h + 1] for x in (query, key)), block=32)
            for order, one in zip(whole, alone, strict=True):
                assert torch.equal(one[0, 0], order[b, h])


@SIDES
def test_points_are_as_far_apart_as_the_other_side_scores_them_differently(side: int) -> None:
    """On all axes |p − p′|² is the mean over the others of (logit of t − logit of t′)², for queries about its mean."""
    query, key = 3.0 + draw(1, 60, 1, 12), 2.0 + draw(1, 90, 1, 12, seed=1)
    points = module._points(query, key, 12)[side].double()
    found = torch.cdist(points, points).square()[0]
    logits = query[0, :, 0].double() @ key[0, :, 0].double().T
    logits = logits.T if side else logits - logits.mean(-1, keepdim=True)
    wanted = (logits[:, None] - logits).square().mean(-1)
    # float32 points, sums of 12 products of the size of the points
    assert (found - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * wanted.max()


@SIDES
def test_few_axes_are_those_of_the_largest_spread(side: int) -> None:
    query, key = draw(1, 400, 1, 12), draw(1, 400, 1, 12, seed=1)
    (query, key)[side][..., 3:] *= 0.01
    points = module._points(query, key, 3)[side][0].double()
    logits = query[0, :, 0].double() @ key[0, :, 0].double().T
    logits = logits.T if side else logits - logits.mean(-1, keepdim=True)
    best = torch.linalg.svdvals(logits - logits.mean(0)).square()
    # What an exact decomposition keeps of the spread on its three best axes.
    assert points.square().sum() * 400 == pytest.approx(float(best[:3].sum()), rel=1e-3)


@SIDES
def test_groups_that_lie_anywhere_become_blocks(side: int) -> None:
    groups, block = 8, 32
    shuffled = torch.randperm(groups * block, generator=torch.Generator().manual_seed(2))
    member = shuffled % groups
    # Corners of a box with unequal edges, which its longest axes divide.
    corners = torch.tensor([8.0, 4.0, 2.0]) * (torch.arange(groups)[:, None] >> torch.arange(3) & 1)
    tokens = 0.1 * draw(1, groups * block, 1, 16, seed=1)
    tokens[0, :, 0, :3] += corners[member]
    others = draw(1, 300, 1, 16, seed=3)
    order = partition(*((others, tokens) if side else (tokens, others)), block=block)[side][0, 0]
    found = member[order].view(groups, block)
    assert (found == found[:, :1]).all()


@SIDES
def test_what_the_other_side_does_not_see_does_not_count(side: int) -> None:
    tokens, others = draw(1, 128, 1, 2), draw(1, 200, 1, 2, seed=1)
    tokens[..., 1] *= 1000
    others[..., 1] = 0
    order = partition(*((others, tokens) if side else (tokens, others)), block=64)[side][0, 0]
    first, second = tokens[0, order, 0, 0].view(2, 64)
    assert first.max() < second.min() or second.max() < first.min()


@SIDES
def test_what_all_queries_share_tells_keys_apart_and_what_all_keys_share_no_queries(side: int) -> None:
    tokens, others = draw(1, 128, 1, 2), 0.1 * draw(1, 200, 1, 2, seed=1)
    tokens[..., 0] *= 10
    others[..., 0] = 50.0  # every one of them sees the first axis, and to the same degree
    order = partition(*((others, tokens) if side else (tokens, others)), block=64)[side][0, 0]
    first, second = tokens[0, order, 0, 0 if side else 1].view(2, 64)
    assert first.max() < second.min() or second.max() < first.min()


def test_tokens_that_say_nothing() -> None:
    nothing = torch.zeros(1, 130, 2, 8)
    for query, key in ((nothing, nothing), (draw(1, 130, 2, 8), nothing), (nothing, draw(1, 130, 2, 8))):
        for order in partition(query, key, block=64):
            assert torch.equal(order.sort(-1).values, torch.arange(130).expand(1, 2, 130))


def test_blocks_hold_tokens_that_are_near_each_other() -> None:
    tokens = draw(1, 1024, 1, 8)
    order = partition(draw(1, 500, 1, 8, seed=1), tokens, block=64)[1][0, 0]
    blocks = tokens[0, order, 0].view(16, 64, 8)
    within = (blocks - blocks.mean(1, keepdim=True)).square().sum()
    # Gaussian tokens halved at the mean along four axes of eight: each loses 2/π of its spread.
    whole = (tokens - tokens.mean(1, keepdim=True)).square().sum()
    assert within / whole < 1 - 4 / 8 * 2 / torch.pi + 0.03


@pytest.mark.parametrize(("seq", "block"), [(333, 32), (1024, 64), (50, 64), (65, 64)])
def test_products_are_those_that_run(seq: int, block: int) -> None:
    with FlopCounterMode(display=False) as counter:
        partition(draw(2, seq, 3, 24), draw(2, seq, 3, 24, seed=1), block=block, axes=6)
    assert counter.get_total_flops() == 2 * 6 * products(seq, 24, block=block, axes=6)


@pytest.mark.parametrize("seq_k", [333, 150])
def test_the_host_never_waits(seq_k: int) -> None:
    query, key = draw(1, 333, 2, 16), draw(1, seq_k, 2, 16)
    real = partition(query, key, block=64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = partition(*(mode.from_tensor(x) for x in (query, key)), block=64)
    assert [order.shape for order in found] == [order.shape for order in real]


def test_autocast_does_not_coarsen_the_metric() -> None:
    query, key = draw(1, 333, 2, 16), draw(1, 150, 2, 16)
    plain = partition(query, key, block=64)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, partition(query, key, block=64), strict=True))


@pytest.mark.parametrize(
    ("query", "key", "options", "message"),
    [
        (
            (5, 8),
            (1, 5, 1, 8),
            {},
            r"query: expected \[batch, seq, heads, dim\], each at least 1, got \(5, 8\)",
        ),
        ((1, 0, 1, 8), (1, 5, 1, 8), {}, r"query: expected .* got \(1, 0, 1, 8\)"),
        ((1, 5, 2, 8), (1, 5, 1, 8), {}, r"key: expected \[1, any, 2, 8\] .* got \(1, 5, 1, 8\)"),
        ((1, 5, 1, 8), (1, 0, 1, 8), {}, r"key: expected \[1, any, 1, 8\] .* got \(1, 0, 1, 8\)"),
        ((1, 5, 1, 8), (5, 8), {}, r"key: expected \[1, any, 1, 8\] .* got \(5, 8\)"),
        ((1, 5, 1, 8), (1, 5, 1, 8), {"block": 0}, "block: expected at least 1, got 0"),
        ((1, 5, 1, 8), (1, 5, 1, 8), {"axes": 0}, "axes: expected at least 1, got 0"),
    ],
)
def test_nonsense_is_refused(query: tuple, key: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(torch.zeros(query), torch.zeros(key), **{"block": 4, **options})


def test_heads_some_at_a_time_are_as_all_together(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(2, seq, 5, 16, generator=generator) for seq in (150, 201))
    together = partition(query, key, block=16)
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 2 * 2 * (150 + 201) * 16)  # two heads
    assert all(torch.equal(x, y) for x, y in zip(partition(query, key, block=16), together, strict=True))
