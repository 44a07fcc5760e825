"""Spans of steps, sampled steps and weights."""

import itertools
import math

import pytest

from dit_accel.calibration.schedule import (
    range_starts,
    sampled_steps,
    span_bounds,
    span_weights,
    step_weights,
)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 50])
def test_spans_cover_all_steps_and_none_is_empty(steps):
    bounds = span_bounds(steps)
    assert bounds[0] == 0
    assert bounds[-1] == steps
    assert all(a < b for a, b in itertools.pairwise(bounds))
    assert len(bounds) - 1 == min(8, steps)


def test_spans_are_finer_early():
    assert span_bounds(20) == (0, 1, 2, 4, 6, 9, 12, 16, 20)


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        span_bounds(0)


@pytest.mark.parametrize("prompts", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_every_prompt_samples_one_step_of_every_span(steps, prompts):
    bounds = span_bounds(steps)
    for prompt in range(prompts):
        sampled = sampled_steps(bounds, prompt, prompts)
        assert sorted(sampled.values()) == list(range(len(bounds) - 1))
        assert all(bounds[number] <= step < bounds[number + 1] for step, number in sampled.items())


def test_prompts_sample_different_steps():
    bounds = span_bounds(20)
    first, second = (set(sampled_steps(bounds, prompt, 2)) for prompt in range(2))
    # Where a span has but one step there is no other to take.
    assert (
        first & second == {start for start, stop in itertools.pairwise(bounds) if stop - start == 1} == {0, 1}
    )


def test_range_starts_separate_the_steps():
    progress = [0.0, 0.02, 0.05, 0.1, 0.3, 0.7]
    bounds = (0, 1, 4, 6)
    starts = range_starts(bounds, progress)
    assert starts[0] == 0.0
    numbers = [sum(start <= value for start in starts) - 1 for value in progress]
    assert numbers == [0, 1, 1, 1, 2, 2]


def test_weights_grow_with_step_length_and_with_noise():
    even = [0.0, 0.25, 0.5, 0.75]
    weights = span_weights((0, 1, 2, 3, 4), even)
    # Equal steps: the earlier an error is made, the more it is amplified.
    assert list(weights) == sorted(weights, reverse=True)
    longer = span_weights((0, 1, 2), [0.0, 0.1])
    assert longer[1] > longer[0]
    # At the very end the flow changes nothing any more: the weight is the squared step.
    assert span_weights((0, 1), [0.999])[0] == pytest.approx(0.001**2, rel=1e-2)


def test_errors_of_steps_alike_add_before_they_are_squared():
    progress = [0.1, 0.15, 0.3, 0.5, 0.9]
    effect = step_weights(progress)
    ratio = [math.log(p / (1 - p)) for p in progress]
    pairs = {
        (a, b): (effect[a] * effect[b]) ** 0.5 * math.exp(-abs(ratio[a] - ratio[b]) / 1.9)
        for a in range(5)
        for b in range(5)
    }
    first, rest = span_weights((0, 2, 5), progress)
    across = sum(pairs[a, b] for a in (0, 1) for b in (2, 3, 4))
    assert first == pytest.approx(sum(pairs[a, b] for a in (0, 1) for b in (0, 1)) + across)
    assert rest == pytest.approx(sum(pairs[a, b] for a in (2, 3, 4) for b in (2, 3, 4)) + across)
    # As many steps again in between, which are nearly the same, hardly change what a span weighs.
    coarse, fine = ([n / steps for n in range(steps)] for steps in (50, 100))
    assert sum(span_weights((0, 100), fine)) == pytest.approx(sum(span_weights((0, 50), coarse)), rel=0.05)
