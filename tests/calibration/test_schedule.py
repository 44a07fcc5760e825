"""Step ranges, sampled steps and weights."""

import itertools

import pytest

from dit_accel.calibration.schedule import range_bounds, range_starts, range_weights, sampled_steps


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 50])
def test_ranges_cover_all_steps_and_none_is_empty(steps):
    bounds = range_bounds(steps)
    assert bounds[0] == 0
    assert bounds[-1] == steps
    assert all(a < b for a, b in itertools.pairwise(bounds))
    assert len(bounds) - 1 == min(4, steps)


def test_ranges_are_finer_early():
    assert range_bounds(20) == (0, 2, 6, 12, 20)


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        range_bounds(0)


@pytest.mark.parametrize("prompts", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_every_prompt_samples_one_step_of_every_range(steps, prompts):
    bounds = range_bounds(steps)
    for prompt in range(prompts):
        sampled = sampled_steps(bounds, prompt, prompts)
        assert sorted(sampled.values()) == list(range(len(bounds) - 1))
        assert all(bounds[number] <= step < bounds[number + 1] for step, number in sampled.items())


def test_prompts_sample_different_steps():
    first, second = (set(sampled_steps(range_bounds(20), prompt, 2)) for prompt in range(2))
    assert not first & second


def test_range_starts_separate_the_steps():
    progress = [0.0, 0.02, 0.05, 0.1, 0.3, 0.7]
    bounds = (0, 1, 4, 6)
    starts = range_starts(bounds, progress)
    assert starts[0] == 0.0
    numbers = [sum(start <= value for start in starts) - 1 for value in progress]
    assert numbers == [0, 1, 1, 1, 2, 2]


def test_weights_grow_with_step_length_and_with_noise():
    even = [0.0, 0.25, 0.5, 0.75]
    weights = range_weights((0, 1, 2, 3, 4), even)
    # Equal steps: the earlier an error is made, the more it is amplified.
    assert list(weights) == sorted(weights, reverse=True)
    longer = range_weights((0, 1, 2), [0.0, 0.1])
    assert longer[1] > longer[0]
    # At the very end the flow changes nothing any more: the weight is the squared step.
    assert range_weights((0, 1), [0.999])[0] == pytest.approx(0.001**2, rel=1e-2)
