"""The demo world draws what its prompts say, and the scorer reads it back."""

import random

import pytest
import torch

from dit_accel.pipelines import demo
from dit_accel.pipelines.demo.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Actor,
    Scene,
    parse,
    render,
    sample_scene,
)

SIZE = {"frames": 9, "height": 160, "width": 176}


def test_world_is_as_rich_as_promised() -> None:
    assert len(SHAPES) >= 5
    assert len(COLOURS) >= 6
    assert len(DIRECTIONS) == 8
    assert len(BACKGROUNDS) >= 3


def test_prompts_parse_back_into_their_scene() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(200)]
    assert [parse(scene.prompt) for scene in scenes] == scenes
    assert {len(scene.actors) for scene in scenes} == {1, 2}


@pytest.mark.parametrize("prompt", ["", "a dog runs", "a red circle moves left", "over a striped background"])
def test_foreign_prompts_are_refused_with_an_example(prompt: str) -> None:
    with pytest.raises(
        ValueError, match=r"prompt: expected .*'a red circle moves left over a striped background'"
    ):
        parse(prompt)


def test_rendering_is_reproducible_and_in_range() -> None:
    scene = parse("a white ring moves up right and a blue star moves down over a marbled background")
    video = render(scene, **SIZE, seed=3)
    assert video.shape == (9, 160, 176, 3)
    assert video.dtype == torch.float32
    assert 0 <= float(video.min()) < float(video.max()) <= 1
    torch.testing.assert_close(video, render(scene, **SIZE, seed=3), rtol=0, atol=0)
    assert not torch.equal(video, render(scene, **SIZE, seed=4))


def test_background_stays_in_place_while_the_shape_moves() -> None:
    video = render(Scene((Actor("red", "circle", "right"),), "dotted"), **SIZE, seed=1)
    moved = (video[0] - video[-1]).abs().amax(-1) > 0.02
    assert 0.02 < float(moved.float().mean()) < 0.5
    assert torch.equal(video[0, :8], video[-1, :8]) or torch.equal(video[0, -8:], video[-1, -8:])


@pytest.mark.parametrize("part", range(2))
def test_scorer_reads_rendered_scenes(part: int) -> None:
    """At least 98 of 100 answers right, over 28 scenes of two canvas sizes and four questions each."""
    rng = random.Random(part)
    right, size = [], [SIZE, {"frames": 17, "height": 224, "width": 256}][part]
    for number in range(14):
        scene = sample_scene(rng)
        right += demo.score(render(scene, **size, seed=100 * part + number), scene.prompt).values()
    assert sum(right) >= 0.98 * len(right)


@pytest.mark.parametrize(
    ("wrong", "attribute"),
    [
        ("a blue star moves up left over a dotted background", "colour"),
        ("a red ring moves up left over a dotted background", "shape"),
        ("a red star moves left over a dotted background", "direction"),
        ("a red star moves up left over a checkered background", "background"),
        ("a red star moves up left and a green ring moves up over a dotted background", "colour"),
    ],
)
def test_scorer_says_no_to_a_wrong_prompt(wrong: str, attribute: str) -> None:
    video = render(parse("a red star moves up left over a dotted background"), **SIZE, seed=7)
    assert demo.score(video, "a red star moves up left over a dotted background")[attribute]
    assert not demo.score(video, wrong)[attribute]


@pytest.mark.parametrize(
    "frames", [torch.zeros(3, 64, 80, 3), torch.full((1, 40, 50, 3), 0.5)], ids=["black", "one-grey"]
)
def test_scorer_says_no_to_empty_pictures(frames: torch.Tensor) -> None:
    result = demo.score(frames, "a red star moves up left over a dotted background")
    assert not any(result.values())


def test_scorer_refuses_bytes_and_odd_shapes() -> None:
    with pytest.raises(ValueError, match=r"frames: expected a float tensor .* got torch.uint8"):
        demo.score(
            torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "a red star moves left over a dotted background"
        )
    with pytest.raises(ValueError, match=r"frames: expected .*\(2, 3, 32, 32\)"):
        demo.score(torch.zeros(2, 3, 32, 32), "a red star moves left over a dotted background")


def test_prompt_lists_are_fixed_and_disjoint() -> None:
    lists = demo.PROMPTS
    assert len(lists["calibration"]) == 2
    assert len(lists["held_out"]) == 64
    assert not set(lists["calibration"]) & set(lists["held_out"])
    assert lists == demo.PROMPTS
    assert all(parse(prompt).prompt == prompt for part in lists.values() for prompt in part)
