"""The picture of masks: what it shows is what was selected."""

import itertools

import pytest
import torch
from PIL import Image

from dit_accel.evaluation.mask_figure import (
    FRAMES_SHOWN,
    Panel,
    attention_panel,
    averaged,
    family_panel,
    frames_shown,
    head_mask,
    middle_token,
    save_masks,
)
from dit_accel.grid import TokenGrid
from dit_accel.patterns import select

GRIDS = [
    pytest.param(TokenGrid(3, 5, 7), id="3x5x7"),
    pytest.param(TokenGrid(1, 9, 6), id="one-frame"),
    pytest.param(TokenGrid(4, 1, 11, text_tokens=5), id="one-row-text-last"),
    pytest.param(TokenGrid(2, 4, 5, text_tokens=3, text_first=True), id="text-first"),
]
FAMILIES = ("window", "sharded", "pooled", "clustered", "hashed", "profiled")


def tensors(grid, heads=3, dim=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, grid.total_tokens, heads, dim, generator=generator).unbind(0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", GRIDS)
def test_mask_of_a_head_is_the_selection_s(grid, family):
    query, key, value = tensors(grid)
    selection = select(family, query, key, grid, density=0.3, block=8, value=value)
    for head in range(3):
        assert torch.equal(head_mask(selection, head), selection.mask()[0, head])
    panel = family_panel(family, selection, 2, recall=0.5)
    mask = selection.mask()[0, 2].float()
    assert torch.equal(panel.pairs, mask)
    assert torch.equal(panel.keys, mask[middle_token(grid)])
    assert panel.note == f"{mask.mean():.0%} of pairs, 50% of mass"


@pytest.mark.parametrize("grid", GRIDS)
def test_middle_token_is_in_the_middle(grid):
    number = middle_token(grid) - grid.video_slice.start
    assert grid.coordinates()[number].tolist() == [grid.frames // 2, grid.height // 2, grid.width // 2]


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 7, 8, 17, 81])
def test_frames_shown_are_even_around_the_middle(frames):
    shown = frames_shown(frames)
    assert shown == sorted(set(shown))
    assert 0 <= shown[0] <= shown[-1] < frames
    assert frames // 2 in shown
    assert len({b - a for a, b in itertools.pairwise(shown)}) <= 1
    assert len(shown) == min(frames, FRAMES_SHOWN)


def test_long_sequences_are_averaged_into_pixels():
    mask = torch.rand(1000, 1000) < 0.3
    small = averaged(mask.float())
    assert small.shape == (334, 334)
    torch.testing.assert_close(small[5, 7], mask[15:18, 21:24].double().mean().float())
    torch.testing.assert_close(small[-1, -1], mask[999, 999].float())  # the rest is a pixel of its own


def test_attention_is_shown_on_a_log_scale():
    grid = TokenGrid(3, 5, 7)
    query, key, _ = (x[0, :, 0] for x in tensors(grid))
    panel = attention_panel(query, key, grid)
    weights = (query.double() @ key.double().T * 8**-0.5).softmax(-1)
    floor = 0.1 / 105
    expected = ((weights / floor).log() / (weights.max() / floor).log()).clamp(min=0).float()
    torch.testing.assert_close(panel.pairs, expected, rtol=0.0, atol=1e-5)
    assert panel.pairs.max() == panel.keys.max() == 1.0
    assert panel.keys.argmax() == weights[middle_token(grid)].argmax()


@pytest.mark.parametrize("grid", GRIDS[1:3])
def test_picture_has_a_line_for_every_five_panels(grid, tmp_path):
    tokens = grid.total_tokens
    panels = [
        Panel(name, "note", torch.rand(tokens, tokens), torch.rand(tokens))
        for name in ("attention", "window", "unknown", "another", "pooled", "bands")
    ]
    sizes = []
    for count in (5, 6):
        path = tmp_path / "deep" / f"{count}.png"
        save_masks(panels[:count], grid, "title", path)
        with Image.open(path) as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > 1.5 * sizes[0][1]


def test_no_panel_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="panels: expected at least one to draw, got none"):
        save_masks([], TokenGrid(1, 2, 2), "title", tmp_path / "masks.png")
