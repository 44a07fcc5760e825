"""The selection kernel under Triton's interpreter; test_select.py runs this with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels.select import MAX_TRITON_COLS, select_blocks

# Scores and whether blocks are forced. A row takes the interpreter a tenth of a second.
SHAPES = [((1, 1, 1, 1), False), ((1, 1, 2, 32), False), ((2, 2, 1, 13), True), ((1, 1, 1, 100), True)]
RULES = [
    pytest.param({"keep": 4}, id="keep"),
    pytest.param({"keep": "keeps", "max_keep": 7}, id="keep-per-row"),
    pytest.param({"top_p": 0.7}, id="top-p"),
    pytest.param({"top_p": "shares", "min_keep": 2, "max_keep": 5}, id="top-p-per-row"),
]


def draw(shape: tuple[int, ...], values: str) -> torch.Tensor:
    if values == "wide":  # all magnitudes, so that most masses round to nothing
        return torch.randn(shape).exp() ** 20 * torch.randn(shape).sign()
    if values == "special":
        return torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-45, -1.0, 3e38])[
            torch.randint(8, shape)
        ]
    return torch.randint(4, shape).float().masked_fill_(torch.rand(shape) < 0.2, -torch.inf)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("values", ["ties", "wide", "special"])
@pytest.mark.parametrize("rule", RULES)
def test_equals_torch(rule, values):
    torch.manual_seed(0)
    for shape, masked in SHAPES:
        scores = draw(shape, values)
        budgets = {"keeps": torch.randint(-1, 9, shape[:3]), "shares": torch.rand(1, shape[1], 1)}
        sized = {name: budgets.get(value, value) for name, value in rule.items()}
        check(scores, forced=torch.rand(shape[2:]) < 0.2 if masked else None, **sized)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides_equal_torch(dtype):
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 13, 2).to(dtype).transpose(2, 3)
    forced = (torch.rand(1, 2, 13, 1) < 0.1).transpose(2, 3)
    check(scores, forced=forced, top_p=torch.tensor(0.6))
    check(scores, forced=forced, keep=torch.tensor([[2], [5]]), max_keep=4)


def test_every_tie_count():
    """Thresholds that fall at each place of a run of equal scores."""
    scores = torch.tensor([1.0, 2, 1, 1, 3, 1, 0]).expand(1, 1, 8, 7)
    check(scores, keep=torch.arange(8))
    check(scores, top_p=torch.arange(8) / 7, min_keep=0)


def test_most_columns():
    torch.manual_seed(0)
    scores = torch.randint(50, (1, 1, 1, MAX_TRITON_COLS)).float()
    check(scores, keep=5000)
    check(scores, top_p=0.9)
    with pytest.raises(ValueError, match="serves up to 8192 key blocks per row, got 8193 .longer blocks"):
        choose(torch.zeros(1, 1, 1, MAX_TRITON_COLS + 1), backend="triton", keep=1)


def choose(scores: torch.Tensor, **rule):
    rows, cols = scores.shape[2:]
    return select_blocks(scores, block_q=16, block_k=16, seq_q=rows * 16, seq_k=cols * 16 - 3, **rule)


def check(scores: torch.Tensor, **rule) -> None:
    expected, index = (choose(scores, backend=backend, **rule) for backend in ("torch", "triton"))
    for name in ("counts", "offsets", "indices"):
        assert torch.equal(getattr(index, name), getattr(expected, name)), (name, scores, rule)
