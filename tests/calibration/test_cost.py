"""What a second launch of a layer costs, on a clock that counts launches."""

from dataclasses import replace

import pytest
import torch

from dit_accel.calibration import cost
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid

DENSE, WINDOW = Candidate("dense", 1.0), Candidate("window", 0.4, remainder=True)
INT8 = replace(WINDOW, precision="int8")
GRID = TokenGrid(3, 5, 7)


def measured(candidates, heads, monkeypatch):
    """Latencies where each launch takes 7 ms and 1 ms a head, the original attention 2 ms a head."""
    now = 0.0

    def attend(query, key, value, grid, ways, row, **options):
        nonlocal now
        row = list(row) * (heads if len(row) == 1 else 1)
        now += 7e-3 * len({ways[number].precision for number in row}) + 1e-3 * heads
        return query, 1.0

    def original(*_):
        nonlocal now
        now += 2e-3 * heads

    monkeypatch.setattr(cost, "attend", attend)

    def milliseconds(call, device):
        start = now
        call()
        return 1e3 * (now - start)

    monkeypatch.setattr(cost, "milliseconds", milliseconds)
    query, key, value = torch.randn(3, 1, GRID.total_tokens, heads, 16)
    return cost.measure_latency(query, key, value, GRID, candidates, original, block=16)


@pytest.mark.parametrize("heads", [2, 3, 8])
def test_the_price_is_what_a_mixed_layer_takes_longer(heads, monkeypatch):
    found = measured((DENSE, WINDOW, INT8), heads, monkeypatch)
    assert found.plain == pytest.approx(2.0)
    assert found.candidates.tolist() == pytest.approx([(7 + heads) / heads] * 3)
    assert found.split == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("candidates", "heads"),
    [
        ((DENSE, WINDOW, INT8), 1),
        ((DENSE, WINDOW), 4),
        ((DENSE, replace(DENSE, precision="int8"), WINDOW), 4),
        ((DENSE, INT8, replace(WINDOW, density=0.3)), 4),
    ],
    ids=["one-head", "one-precision", "dense-alone", "no-twin"],
)
def test_nothing_to_split_has_no_price(candidates, heads, monkeypatch):
    assert measured(candidates, heads, monkeypatch).split == 0.0


def test_layers_are_split_on_the_real_attention():
    query, key, value = torch.randn(3, 1, GRID.total_tokens, 4, 16)
    found = cost.measure_latency(
        query,
        key,
        value,
        GRID,
        (DENSE, WINDOW, INT8),
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        block=16,
        backend="reference",
    )
    assert (found.candidates > 0).all()
    assert found.split >= 0.0
