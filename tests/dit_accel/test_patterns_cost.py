"""What a choice costs: counts made by hand, and the products that really run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.grid import TokenGrid
from dit_accel.patterns import FAMILIES, Cost, cost, select

# 64 tokens in 4 blocks of 16, dim 8, one head of 16-bit numbers: 1,024 bytes of queries and as many of keys
SQUARE = TokenGrid(1, 8, 8)
EACH, SCORES = 64 * 8 * 2, 4 * 4 * 4
BY_HAND = [
    pytest.param("pooled", {"parts": 1}, 4 * 4 * 8, 2 * EACH + SCORES, id="pooled"),
    pytest.param("pooled", {"parts": 4}, 16 * 16 * 8, 2 * EACH + SCORES, id="pooled-parts"),
    pytest.param("pooled", {"parts": 1, "guard": 0.5}, 4 * 4 * 8, 4 * EACH + SCORES, id="pooled-guard"),
    # 2 squares a side, both looked into: 4 products of squares, then all pairs of means, keys fetched per row
    pytest.param(
        "pooled",
        {"parts": 1, "coarse": 2},
        2 * 2 * 8 + 4 * 4 * 8,
        4 * EACH + 2 * 2 * 4 + 2 * 4 * 8 * 4 + SCORES,
        id="pooled-coarse",
    ),
    pytest.param(
        "pooled",
        {"parts": 1, "segment": 32},
        64 * 64 * 8 + 4 * 4 * 8,
        2 * EACH + 64 * 64 * 4 + 2 * EACH + 2 * EACH + SCORES,
        id="pooled-segment",
    ),
    pytest.param("antidiagonal", {"stride": 8}, 8 * 8 * 64, 2 * EACH + SCORES, id="antidiagonal"),
    pytest.param("lowbit", {}, 64 * 64 * 8, 2 * EACH + SCORES, id="lowbit"),
    pytest.param(
        "channels", {"channels": 2}, 64 * 64 * 2, 2 * EACH + 2 * 2 * 64 * 2 * 2 + SCORES, id="channels"
    ),
    pytest.param("searched", {}, 2 * 64 * 64 * 8, 4 * EACH + 64 * 4 + SCORES, id="searched"),
    pytest.param("stripes", {"samples": 6}, 6 * 64 * 8, 70 * 8 * 2 + 6 * 64 * 4 + SCORES, id="stripes"),
    pytest.param(
        "clustered",
        {"query_clusters": 3, "key_clusters": 5, "iterations": 7},
        7 * 64 * 8 * 8 + 3 * 5 * 8,
        2 * 7 * 2 * EACH + 3 * 5 * 4,
        id="clustered",
    ),
    # A side: second moment, four small products and their three rounds, points, then two levels of 64 places, 5 passes.
    pytest.param(
        "balanced",
        {"axes": 3, "parts": 2},
        2 * (64 * 8**2 + 2 * 8**3 + 4 * 8**2 * 3 + 3 * 8 * 3**2 + 64 * 8 * 3 + (2 * 5 * 64 + 2 * (1 + 2)) * 3)
        + 8 * 8 * 8,
        3 * 2 * EACH + SCORES + 2 * 2 * EACH,
        id="balanced",
    ),
    pytest.param("hashed", {"planes": 9}, 2 * 64 * 8 * 9, 4 * EACH + 2 * 64 * 8, id="hashed"),
    pytest.param(
        "profiled", {"samples": 6}, 6 * 64 * 8 * 4, (6 + 128) * 8 * 2 + 3 * 6 * 64 * 4, id="profiled"
    ),
]


@pytest.mark.parametrize(("name", "options", "products", "moved"), BY_HAND)
def test_costs_are_those_counted_by_hand(name: str, options: dict, products: int, moved: int) -> None:
    assert cost(name, SQUARE, 1, 8, 16, density=0.5, **options) == Cost(products, moved)
    assert cost(name, SQUARE, 3, 8, 16, density=0.5, batch=2, **options) == Cost(6 * products, 6 * moved)


def test_every_dynamic_family_has_a_cost_and_static_ones_none() -> None:
    counted = {name for case in BY_HAND for name in [case.values[0]]}
    assert counted == {name for name, family in FAMILIES.items() if not family.static}
    for name, family in FAMILIES.items():
        if family.static:
            assert cost(name, SQUARE, 2, 8, density=family.density or 0.0) == Cost(0, 0)


MEASURED = [
    *(pytest.param(*case.values[:2], False, 1, id=case.id) for case in BY_HAND if case.id != "searched"),
    pytest.param("pooled", {"coarse": 4}, False, 1, id="pooled-coarse-parts"),
    pytest.param("profiled", {"orders": "fhw+fwh+hwf"}, False, 1, id="profiled-three"),
    pytest.param("profiled", {"orders": "whf"}, False, 1, id="profiled-one"),
    pytest.param("profiled", {"orders": "fhw+hwf", "top_p": 0.9}, False, 1, id="profiled-until"),
    pytest.param("profiled", {"orders": "whf", "top_p": 0.9}, False, 1, id="profiled-one-until"),
    pytest.param("hashed", {"top_p": 0.9}, False, 1, id="hashed-until"),
    pytest.param("clustered", {"query_clusters": 4}, True, 1, id="clustered-later"),
    pytest.param("balanced", {}, True, 1, id="balanced-later"),
    # On a CPU one product serves both passes of the first search.
    pytest.param("searched", {}, False, 2, id="searched-first"),
    pytest.param("searched", {}, True, 1, id="searched-later"),
]


@pytest.mark.parametrize(
    "grid", [TokenGrid(5, 7, 9), TokenGrid(3, 7, 9, text_tokens=21)], ids=["odd", "text"]
)
@pytest.mark.parametrize(("name", "options", "later", "shared"), MEASURED)
def test_a_choice_multiplies_as_often_as_it_says(
    grid: TokenGrid, name: str, options: dict, later: bool, shared: int
) -> None:
    query, key, value = torch.randn(3, 2, grid.total_tokens, 3, 8, generator=torch.Generator().manual_seed(0))
    memory: dict = {}
    arguments = {"density": 0.2, "block": 16, "value": value, "state": memory, **options}
    if later:
        select(name, query, key, grid, **arguments)
    with FlopCounterMode(display=False) as counter:
        select(name, query, key, grid, **arguments)
    claimed = cost(name, grid, 3, 8, 16, density=0.2, batch=2, item_bytes=4, later=later, **options)
    assert counter.get_total_flops() * shared == 2 * claimed.multiply_adds


def test_cheap_choices_cost_a_small_part_of_dense_attention() -> None:
    grid = TokenGrid(21, 45, 80)  # Wan at 720p, 81 frames
    dense = 2 * grid.total_tokens**2 * 128
    shares = {
        name: cost(name, grid, 1, 128, 128, **options).multiply_adds / dense
        for name, options in {
            "pooled": {"parts": 1},
            "stripes": {},
            "antidiagonal": {"stride": 8},
            "clustered": {"iterations": 2},
            "balanced": {},
            "searched": {},
        }.items()
    }
    assert shares["pooled"] < 1e-4
    assert shares["stripes"] < 1e-3
    assert shares["antidiagonal"] == pytest.approx(1 / 16, rel=1e-3)
    assert shares["clustered"] < 0.02
    assert shares["balanced"] < 0.005
    assert shares["searched"] == 1.0
    # squares first cost less than all pairs where few blocks are kept
    fine = cost("pooled", grid, 1, 128, 64, density=0.05)
    coarse = cost("pooled", grid, 1, 128, 64, density=0.05, coarse=8)
    assert coarse.multiply_adds < fine.multiply_adds / 5


def test_costs_of_nothing_to_choose_and_of_nonsense() -> None:
    assert cost("pooled", TokenGrid(1, 1, 5, text_tokens=30), 2, 8, 16) == Cost(0, 0)
    with pytest.raises(ValueError, match="unknown family 'pool'"):
        cost("pool", SQUARE, 1, 8)
    with pytest.raises(ValueError, match="family 'pooled' has no option 'stride'"):
        cost("pooled", SQUARE, 1, 8, stride=8)
    with pytest.raises(ValueError, match="density: expected a number from 0 to 1, got 2"):
        cost("pooled", SQUARE, 1, 8, density=2)
