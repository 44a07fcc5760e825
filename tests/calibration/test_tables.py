"""From sums over calls to the tables of a plan, against the formulas written out."""

import pytest
import torch

from dit_accel.calibration.cost import Latency
from dit_accel.calibration.profile import CallProfile
from dit_accel.calibration.schedule import span_weights
from dit_accel.calibration.tables import ProfileSums, build_profile

RANGES, LAYERS, HEADS, CANDIDATES = 2, 3, 2, 4
BOUNDS, PROGRESS = (0, 2, 5), (0.0, 0.1, 0.3, 0.5, 0.8)


def sums(seed: int) -> ProfileSums:
    generator = torch.Generator().manual_seed(seed)
    zeros = ProfileSums.zeros(RANGES, LAYERS, HEADS, CANDIDATES).tensors()
    filled = {
        name: torch.rand(x.shape, generator=generator, dtype=torch.float64) + 1.0 for name, x in zeros.items()
    }
    filled["calls"] = torch.full((RANGES, LAYERS), 2.0, dtype=torch.float64)
    filled["probes"] = torch.full((RANGES, LAYERS), 2.0, dtype=torch.float64)
    return ProfileSums(filled)


def built(runs, **options):
    latency = Latency(torch.tensor([3.0, 0.1, 1.0, 2.0], dtype=torch.float64), 4.0)
    return build_profile(
        runs, latency, dense=0, bounds=BOUNDS, progress=PROGRESS, guidance_scale=5.0, **options
    )


def steadied(*gradients):
    """By loops: log gradient = level of the range and branch + place of the head + .3 of the rest."""
    logs = [gradient.log() for gradient in gradients]
    levels = [log.mean((1, 2)) for log in logs]
    found = [torch.empty_like(log) for log in logs]
    for layer in range(LAYERS):
        for head in range(HEADS):
            apart = [
                log[r, layer, head] - level[r]
                for log, level in zip(logs, levels, strict=True)
                for r in (0, 1)
            ]
            place = sum(apart) / len(apart)
            for result, log, level in zip(found, logs, levels, strict=True):
                for r in (0, 1):
                    own = log[r, layer, head] - level[r]
                    result[r, layer, head] = (place + 0.3 * (own - place) - own).exp()
    return found


def weighted(s: ProfileSums) -> torch.Tensor:
    """Relative squared errors times each head's geometric mean of effect per error, by loops."""
    relative, found = s.error / s.norm, torch.empty_like(s.error)
    for place in torch.cartesian_prod(
        torch.arange(RANGES), torch.arange(LAYERS), torch.arange(HEADS)
    ).tolist():
        r, layer, head = place
        ratios = s.effect[r, layer, head] / 2 / relative[r, layer, head]
        found[r, layer, head] = relative[r, layer, head] * ratios.prod() ** (1 / CANDIDATES)
    return found


def test_errors_are_changes_of_the_guided_prediction():
    """v = 5 cond - 4 uncond: squared errors count 25 and 16, less what both err alike; spans by what they do."""
    cond, uncond = sums(0), sums(1)
    cond.alike[:] = 0.0  # the first branch has none to be compared with
    uncond.alike[:] = torch.tensor([[1.5, 0.3, 0.9], [-0.5, -0.1, -0.3]])
    found = built([{"cond": cond, "uncond": uncond}])
    steady = steadied(cond.gradient, uncond.gradient)
    a, b = weighted(cond) * steady[0][..., None], weighted(uncond) * steady[1][..., None]
    alike = torch.tensor([2.7 / 6, 0.0])[:, None, None, None]  # of two calls in each of three layers
    mean = (25 * a + 16 * b - 40 * alike * (a * b).sqrt()) / 41
    weights = torch.tensor(span_weights(BOUNDS, PROGRESS), dtype=torch.float64)
    expected = mean * weights[:, None, None, None]
    expected[..., 0] = 0
    torch.testing.assert_close(found.tables.error, expected)
    gains = [s.gradient * s.norm[..., 0] / s.rows[..., 0] for s in (cond, uncond)]
    gain = (25 * gains[0] * steady[0] + 16 * gains[1] * steady[1]) / 41 / 2
    torch.testing.assert_close(found.sensitivity, gain.sqrt())


def test_candidates_of_a_head_compare_by_their_errors():
    """A candidate whose error one direction happens to miss gains no more than its share of the mean."""
    plain, lucky = sums(0), sums(0)
    lucky.effect[0, 1, 0, 2] *= 1e-4
    one, other = (built([{"": s}]).tables.error for s in (plain, lucky))
    torch.testing.assert_close(other[0, 1, 0], one[0, 1, 0] * 1e-4 ** (1 / CANDIDATES))
    torch.testing.assert_close(other[1], one[1])


def test_candidates_without_an_error_do_not_count():
    plain, exact = sums(0), sums(0)
    exact.error[..., 3], exact.effect[..., 3] = 0.0, 0.0
    found = built([{"": exact}]).tables.error
    assert (found[..., 3] == 0).all()
    ratios = (plain.effect / 2 / (plain.error / plain.norm))[..., :3].prod(-1) ** (1 / 3)
    expected = (
        built([{"": plain}]).tables.error[..., 1]
        / weighted(plain)[..., 1]
        * (plain.error / plain.norm)[..., 1]
    )
    torch.testing.assert_close(found[..., 1], expected * ratios)


def test_one_noisy_direction_weighs_a_third_of_its_share():
    """A head ten times its usual gradient in one of four places is believed to be 10 ** (.25 + .3 * .75) times it."""
    quiet, loud = sums(0), sums(0)
    quiet.gradient[:], loud.gradient[:] = 1.0, 1.0
    loud.gradient[1, 2, 1] = 10.0
    one, other = built([{"a": quiet, "b": quiet}]), built([{"a": quiet, "b": loud}])
    ratio = (2 * other.sensitivity**2 / one.sensitivity**2 - 1)[1, 2, 1]
    assert 10**0.3 < ratio < 10**0.65


def test_a_branch_without_a_probe_gets_the_effect_of_the_same_error():
    cond, uncond = sums(0), sums(1)
    for name in ("effect", "gradient", "probes"):
        getattr(uncond, name)[1] = 0
    found = built([{"cond": cond, "uncond": uncond}])
    relative = [s.error / s.norm for s in (cond, uncond)]
    uncond.effect[1] = (weighted(cond) * 2 / relative[0] * relative[1])[1]
    uncond.gradient[1], uncond.probes[1] = cond.gradient[1], cond.probes[1]
    expected = built([{"cond": cond, "uncond": uncond}])
    torch.testing.assert_close(found.tables.error, expected.tables.error)
    torch.testing.assert_close(found.sensitivity, expected.sensitivity)


def test_a_span_without_any_probe_is_an_error():
    only = sums(0)
    only.probes[1, 2] = 0
    with pytest.raises(RuntimeError, match="a layer was profiled without a gradient in some span of steps"):
        built([{"": only}])


def test_without_gradients_layers_count_alike():
    only = sums(2)
    found = built([{"": only}], downstream=False)
    weights = torch.tensor(span_weights(BOUNDS, PROGRESS), dtype=torch.float64)
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
    """Sampled rows stand for all."""
    rows, tokens, dim = 10, 40, 8
    profile = CallProfile(
        mass=torch.full((HEADS, CANDIDATES), 7.0),
        error=torch.full((HEADS, CANDIDATES), 2.0),
        effect=torch.full((HEADS, CANDIDATES), 0.5),
        norm=torch.full((HEADS, CANDIDATES), 30.0),
        rows=torch.full((HEADS, CANDIDATES), float(rows)),
        density=torch.full((CANDIDATES,), 0.25),
        errors=torch.randn(HEADS, CANDIDATES, 3, dim),
    )
    gradient = torch.zeros(1, tokens, HEADS, dim)
    gradient[0, :, 1] = 0.1
    found = ProfileSums.zeros(RANGES, LAYERS, HEADS, CANDIDATES)
    found.add_call(1, 2, profile, gradient)
    assert found.effect[1, 2, 0, 0] == pytest.approx(0.5 * tokens / rows)
    assert found.gradient[1, 2].tolist() == pytest.approx([0.0, 0.01 * tokens])
    assert found.calls.tolist() == found.probes.tolist() == [[0, 0, 0], [0, 0, 1]]
    found.add_call(1, 2, profile)
    assert (found.calls[1, 2], found.probes[1, 2]) == (2, 1)


def test_a_call_is_compared_with_that_of_the_first_branch():
    """Errors that are half the first branch's and half new correlate by one over the root of two."""
    generator = torch.Generator().manual_seed(0)
    first, new = torch.randn(2, HEADS, CANDIDATES, 50, 64, generator=generator)
    first[:, 3] *= 1e-6  # what dense attention is off by
    errors = torch.stack([first[:, 0], -2 * first[:, 1], first[:, 2] + new[:, 2], 1e-6 * new[:, 3]], 1)
    ones = torch.ones(HEADS, CANDIDATES)
    found = ProfileSums.zeros(RANGES, LAYERS, HEADS, CANDIDATES)
    call = CallProfile(ones, ones, ones, ones, ones, torch.ones(CANDIDATES), errors)
    found.add_call(0, 1, call, first=first)
    # Candidates without an error tell nothing.
    assert found.alike[0].tolist() == [0.0, pytest.approx((1.0 - 1.0 + 0.5**0.5) / 3, abs=0.02), 0.0]
    # Branches of other lengths cannot be compared.
    found.add_call(0, 2, call, first=first[..., :10, :])
    assert found.alike[0, 2] == 0
    assert found.effect[0].sum() == found.gradient[0].sum() == 0


def test_calls_are_those_of_the_forwards_that_were_timed():
    """A batch that holds both branches makes one call of them."""
    runs = [{"cond": sums(0), "uncond": sums(1)}]
    each, one = built(runs), built(runs, forwards=1)
    assert torch.equal(one.tables.calls * 2, each.tables.calls)
    assert torch.equal(one.tables.cost * 2, each.tables.cost)
    assert torch.equal(one.tables.plain_cost * 2, each.tables.plain_cost)
    assert torch.equal(one.tables.error, each.tables.error)
