"""From sums over calls to the tables of a plan, against the formulas written out."""

import pytest
import torch

from dit_accel.calibration.cost import Latency
from dit_accel.calibration.profile import CallProfile
from dit_accel.calibration.schedule import range_weights
from dit_accel.calibration.tables import ProfileSums, build_profile

RANGES, LAYERS, HEADS, CANDIDATES = 2, 3, 2, 4
BOUNDS, PROGRESS = (0, 2, 5), (0.0, 0.1, 0.3, 0.5, 0.8)


def sums(seed: int) -> ProfileSums:
    generator = torch.Generator().manual_seed(seed)
    zeros = ProfileSums.zeros(RANGES, LAYERS, HEADS, CANDIDATES).tensors()
    filled = {
        name: torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.5 for name, x in zeros.items()
    }
    filled["calls"] = torch.full((RANGES, LAYERS), 2.0, dtype=torch.float64)
    return ProfileSums(filled)


def built(runs, **options):
    latency = Latency(torch.tensor([3.0, 0.1, 1.0, 2.0], dtype=torch.float64), 4.0)
    return build_profile(
        runs, latency, dense=0, bounds=BOUNDS, progress=PROGRESS, guidance_scale=5.0, **options
    )


def test_errors_are_changes_of_the_guided_prediction():
    """v = 5 cond - 4 uncond: squared errors count 25 and 16; ranges by what they do to the latents."""
    cond, uncond = sums(0), sums(1)
    found = built([{"cond": cond, "uncond": uncond}])
    mean = (25 * cond.effect + 16 * uncond.effect) / 41 / 2
    weights = torch.tensor(range_weights(BOUNDS, PROGRESS), dtype=torch.float64)
    expected = mean * weights[:, None, None, None]
    expected[..., 0] = 0
    torch.testing.assert_close(found.tables.error, expected)
    gain = (25 * cond.gain + 16 * uncond.gain) / 41 / 2
    torch.testing.assert_close(found.sensitivity, gain.sqrt())


def test_without_gradients_layers_count_alike():
    only = sums(2)
    found = built([{"": only}], downstream=False)
    weights = torch.tensor(range_weights(BOUNDS, PROGRESS), dtype=torch.float64)
    expected = only.error / only.norm.sum(2, keepdim=True) / LAYERS * weights[:, None, None, None]
    expected[..., 0] = 0
    torch.testing.assert_close(found.tables.error, expected)
    assert found.sensitivity is None
    assert found.sensitivities() == {}


def test_prompts_and_branches_are_added_up():
    runs = [{"a": sums(3), "b": sums(4)}, {"a": sums(5), "b": sums(6)}]
    found = built(runs)
    every = [of_branch for run in runs for of_branch in run.values()]
    torch.testing.assert_close(found.recall, sum(s.mass for s in every) / sum(s.rows for s in every))
    torch.testing.assert_close(
        found.rel_l2, (sum(s.error for s in every) / sum(s.norm for s in every)).sqrt()
    )
    assert found.tables.calls.tolist() == [2 * 2, 3 * 2]  # steps x branches
    torch.testing.assert_close(found.tables.plain_cost, torch.tensor([16.0, 24.0], dtype=torch.float64))


def test_a_call_adds_its_share_of_the_prediction():
    """Sampled rows stand for all; the gain is that of an error of the output's own size, alike in all directions."""
    rows, tokens, dim = 10, 40, 8
    profile = CallProfile(
        mass=torch.full((HEADS, CANDIDATES), 7.0),
        error=torch.full((HEADS, CANDIDATES), 2.0),
        effect=torch.full((HEADS, CANDIDATES), 0.5),
        norm=torch.full((HEADS, CANDIDATES), 30.0),
        rows=torch.full((HEADS, CANDIDATES), float(rows)),
        density=torch.full((CANDIDATES,), 0.25),
    )
    gradient = torch.zeros(1, tokens, HEADS, dim)
    gradient[0, :, 1] = 0.1
    found = ProfileSums.zeros(RANGES, LAYERS, HEADS, CANDIDATES)
    found.add_call(1, 2, profile, gradient)
    assert found.effect[1, 2, 0, 0] == pytest.approx(0.5 * tokens / rows)
    # |g|² / entries x |o|² = 0.01 x (30 / 10 per row x 40 rows)
    assert found.gain[1, 2].tolist() == pytest.approx([0.0, 0.01 * 3.0 * tokens])
    assert found.calls.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert found.effect[0].sum() == found.gain[0].sum() == 0
