"""Which plan a calibration ends with, once it was tried on all prompts; generations are stood in for by curves."""

import math
from typing import Any

import pytest
from synthetic import tables

from dit_accel.calibration.goals import the_goal
from dit_accel.calibration.offers import Offer, Pick
from dit_accel.calibration.stages import AcceleratedRun
from dit_accel.calibration.validate import Validation, generations_needed


class Generations:
    """Stands in for `Stages`: the PSNR of a plan on each prompt, a line in log10(error) of another height."""

    def __init__(self, heights: tuple[float, ...]) -> None:
        self.heights = heights
        self.made: list[tuple[str, int]] = []
        self.skipped = 0

    def known_trials(self, goal: str, search: str) -> list[dict[str, Any]]:
        return []

    def keep_trials(self, search: str, trials: list[dict[str, Any]]) -> None:
        self.kept = trials

    def skip(self, generations: int) -> None:
        self.skipped += generations

    def accelerated(self, name: str, plan: Pick, prompt: str, seed: int, dense: None) -> AcceleratedRun:
        self.made.append((plan.name, seed))
        return AcceleratedRun(self.psnr(plan, seed), 0.9, 0.1, 1.0, 0, 1.0, 1.0, [])

    def psnr(self, found: Pick, prompt: int) -> float:
        return self.heights[prompt] - 8 * math.log10(found.error)


def validation(stages: Generations, max_trials: int) -> Validation:
    prompts = [str(number) for number in range(len(stages.heights))]
    return Validation(
        stages, lambda found: found, [Offer(None, tables())], [None] * len(prompts), prompts, [], 0,
        the_goal(target_psnr=28.0), max_trials,
    )  # fmt: skip


def mean(stages: Generations, found: Pick) -> float:
    return sum(stages.psnr(found, prompt) for prompt in range(len(stages.heights))) / len(stages.heights)


# A search looks at the first two prompts; the third is another 3 or 6 dB lower.
@pytest.mark.parametrize("third", [7.0, 4.0, 10.0])
def test_a_plan_that_misses_on_further_prompts_makes_way_for_a_more_faithful_one_that_was_tried(
    third: float,
) -> None:
    stages = Generations((10.0, 10.0, third))
    loop = validation(stages, 6)
    found = loop.meet_quality()
    assert len(stages.made) == len(set(stages.made)) <= 6 + 2
    assert stages.skipped + len(stages.made) == generations_needed(3, 0, the_goal(target_psnr=28.0), 6) - 3
    of_plan: dict[str, set[int]] = {}
    for name, prompt in stages.made:
        of_plan.setdefault(name, set()).add(prompt)
    assert of_plan[found.name] == {0, 1, 2}
    met = mean(stages, found) >= 28.0 - 0.05
    # Whatever was tried on all prompts and is better was not needed.
    assert met or len(stages.made) > 6
    if third == 10.0:
        assert met


def test_what_was_read_off_the_line_and_misses_makes_way_for_what_was_measured() -> None:
    stages = Generations((12.0, 8.0))
    bent = stages.psnr
    # Beyond a certain error the second prompt falls apart, which no line over the first trials foresees.
    stages.psnr = lambda found, prompt: bent(found, prompt) - 9 * (prompt == 1 and found.error > 0.004)
    found = validation(stages, 6).meet_quality()
    assert mean(stages, found) >= 28.0 - 0.05
