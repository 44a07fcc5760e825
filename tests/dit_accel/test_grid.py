"""Token grids: exact orders and their inverses on any grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.grid import AXIS_ORDERS, TokenGrid, axes_of, residues

ORDERS = ["frame", "space", "tile:4x4x4", "tile:2x3x5", "tile:64x1x1", "tile:2x2x2/1x2x3", *AXIS_ORDERS]
GRIDS = [
    pytest.param(TokenGrid(7, 13, 11), id="7x13x11"),
    pytest.param(TokenGrid(1, 9, 14), id="one-frame"),
    pytest.param(TokenGrid(1, 1, 70), id="one-row"),
    pytest.param(TokenGrid(5, 1, 1), id="one-place"),
    pytest.param(TokenGrid(3, 5, 7, text_tokens=9), id="text-after"),
    pytest.param(TokenGrid(3, 5, 7, text_tokens=9, text_first=True), id="text-before"),
]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_orders_are_permutations_with_exact_inverses_and_text_last(grid: TokenGrid, name: str) -> None:
    order = grid.order(name)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(grid.total_tokens))
    tokens = torch.randn(grid.total_tokens)
    assert torch.equal(tokens[order][grid.inverse(order)], tokens)
    text = list(range(grid.total_tokens))[grid.text_slice]
    assert order[grid.video_tokens :].tolist() == text


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 9),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    text=st.integers(0, 5),
    first=st.booleans(),
    tile=st.tuples(*(st.integers(1, 6) for _ in range(3))),
)
def test_any_tile_on_any_grid_is_a_permutation(frames, height, width, text, first, tile) -> None:
    grid = TokenGrid(frames, height, width, text, first)
    order = grid.order("tile:{}x{}x{}".format(*tile))
    assert order.sort().values.tolist() == list(range(grid.total_tokens))


def test_inverse_takes_one_order_per_head() -> None:
    grid = TokenGrid(2, 3, 5)
    orders = torch.stack([grid.order(name) for name in ORDERS])
    inverses = grid.inverse(orders)
    for order, inverse in zip(orders, inverses, strict=True):
        assert torch.equal(order[inverse], torch.arange(30))


@pytest.mark.parametrize("grid", GRIDS)
def test_coordinates_follow_the_order(grid: TokenGrid) -> None:
    order = grid.order("tile:4x4x4")
    t, h, w = grid.coordinates(order).unbind(-1)
    position = (t * grid.height + h) * grid.width + w + grid.video_slice.start
    assert torch.equal(position, order[: grid.video_tokens])
    assert torch.equal(grid.coordinates(), grid.coordinates(grid.order("frame")))


def test_frame_and_space_orders() -> None:
    grid = TokenGrid(2, 2, 3, text_tokens=2, text_first=True)
    assert grid.order("frame").tolist() == [*range(2, 14), 0, 1]
    assert grid.order("space").tolist() == [2, 8, 3, 9, 4, 10, 5, 11, 6, 12, 7, 13, 0, 1]
    assert not grid.is_model_order("frame")
    assert TokenGrid(2, 2, 3, text_tokens=2).is_model_order("frame")
    assert not TokenGrid(2, 2, 3).is_model_order("space")


@pytest.mark.parametrize("name", AXIS_ORDERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_axis_orders_count_the_last_axis_fastest_and_the_first_slowest(grid: TokenGrid, name: str) -> None:
    places = [(t, h, w) for t in range(grid.frames) for h in range(grid.height) for w in range(grid.width)]
    expected = sorted(places, key=lambda place: [place["fhw".index(axis)] for axis in name])
    found = grid.coordinates(grid.order(name))
    assert [tuple(place) for place in found.tolist()] == expected
    assert axes_of(name) == name


def test_aliases_and_tiles_have_axes() -> None:
    grid = TokenGrid(3, 5, 7, text_tokens=2)
    assert (axes_of("frame"), axes_of("space"), axes_of("tile:2x3x4")) == ("fhw", "hwf", "fhw")
    assert axes_of("tile:2x3x4/1x2x2") == "fhw"
    assert torch.equal(grid.order("frame"), grid.order("fhw"))
    assert torch.equal(grid.order("space"), grid.order("hwf"))
    assert grid.is_model_order("fhw")
    assert not any(grid.is_model_order(name) for name in (*AXIS_ORDERS[1:], "tile:2x3x4"))


def spans(grid: TokenGrid, name: str, block: int) -> torch.Tensor:
    """Tokens per axis that each run of `block` ordered tokens covers, `[runs, 3]`."""
    places = grid.coordinates(grid.order(name))
    runs = places[: len(places) // block * block].view(-1, block, 3)
    return runs.amax(1) - runs.amin(1) + 1


def test_tiles_of_a_divisible_grid_are_runs() -> None:
    assert spans(TokenGrid(8, 12, 16), "tile:4x4x4", 64).unique().tolist() == [4]
    assert spans(TokenGrid(1, 16, 32), "tile:4x4x4", 64).unique(dim=0).tolist() == [[1, 8, 8]]


@pytest.mark.parametrize("grid", [TokenGrid(14, 24, 24), TokenGrid(21, 30, 52), TokenGrid(7, 13, 11)])
def test_runs_stay_compact_on_ragged_grids(grid: TokenGrid) -> None:
    tiled = spans(grid, "tile:4x4x4", 64).float()
    assert tiled.mean(0).max() < 6.0
    assert tiled.prod(1).mean() < 1.7 * 64
    assert spans(grid, "frame", 64).float().prod(1).mean() > tiled.prod(1).mean()


def test_dilated_tiles_keep_each_dilated_grid_together() -> None:
    grid = TokenGrid(5, 7, 9, text_tokens=3, text_first=True)
    order = grid.order("tile:2x2x2/1x2x3")
    numbers = residues(grid, "tile:2x2x2/1x2x3")[order[: grid.video_tokens] - 3]
    assert numbers.tolist() == sorted(numbers.tolist())
    assert numbers.unique().tolist() == list(range(6))
    places = grid.coordinates(order)[numbers == 4] // torch.tensor([1, 2, 3])
    alone = TokenGrid(5, 3, 3)  # every second of rows 1, 3, 5 and every third of columns 1, 4, 7
    assert torch.equal(places, alone.coordinates(alone.order("tile:2x2x2")))
    assert not residues(grid, "tile:2x2x2").any()


def test_neighbours_in_tile_order_are_near() -> None:
    grid = TokenGrid(9, 10, 11)
    places = grid.coordinates(grid.order("tile:3x5x4"))
    steps = (places[1:] - places[:-1]).abs().amax(1)
    # within a column a step may fall back to its other end, never farther
    assert steps.max() <= 5


def test_grids_with_equal_counts_never_mix() -> None:
    one, other = TokenGrid(2, 3, 4), TokenGrid(4, 3, 2)
    for name in [name for name in ORDERS if name not in ("frame", "fhw")]:
        first, second = one.order(name), other.order(name)
        assert not torch.equal(first, second)
        assert torch.equal(one.order(name), first)


def test_orders_made_in_inference_mode_serve_autograd() -> None:
    grid = TokenGrid(2, 7, 3)
    with torch.inference_mode():
        grid.order("tile:2x2x2")
    tokens = torch.randn(42, requires_grad=True)
    tokens[grid.order("tile:2x2x2")].sum().backward()
    assert torch.equal(tokens.grad, torch.ones(42))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"frames": 0, "height": 2, "width": 2},
            "TokenGrid frames: expected an integer of at least 1, got 0",
        ),
        ({"frames": 2, "height": 2.0, "width": 2}, "TokenGrid height: .* got 2.0"),
        ({"frames": 2, "height": 2, "width": True}, "TokenGrid width: .* got True"),
        ({"frames": 2, "height": 2, "width": 2, "text_tokens": -1}, "text_tokens: .* at least 0, got -1"),
        (
            {"frames": 2, "height": 2, "width": 2, "text_first": 1},
            "text_first: expected True or False, got 1",
        ),
    ],
)
def test_bad_counts_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGrid(**arguments)


@pytest.mark.parametrize(
    "name", ["tiles", "tile:4x4", "tile:0x4x4", "tile:4x4x4 ", "tile:4x4x4/2x2", "", "ffw", "fh"]
)
def test_unknown_orders_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected 'frame', 'space', 'fhw', .* or 'tile:TxHxW', got "):
        TokenGrid(2, 2, 2).order(name)
