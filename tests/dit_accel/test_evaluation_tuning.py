"""Dials: how a search closes in on a target, what several targets share, and that finished generations are kept."""

import json

import pytest
import torch

from dit_accel.evaluation.models import GenerationSettings, load_model
from dit_accel.evaluation.tuning import Dial, Probe, Tuning, chosen, tune
from dit_accel.evaluation.variants import parse_variant


def falling(bend):
    """A dial that saves more and more, and whose PSNR is `bend` of its value."""
    seen = []

    def measure(value):
        seen.append(value)
        return Probe(value, bend(value), value / 10)

    return measure, seen


class TestTune:
    def test_thresholds_close_in_on_the_crossing(self):
        dial = Dial("x", "preset:cg-taylor@{}", 0.005, 1.0)
        measure, seen = falling(lambda value: 40.0 - 50.0 * value)  # 30 dB at 0.2
        found = tune(dial, 30.0, 8, measure)
        assert found.reached
        assert found.chosen.value == pytest.approx(0.2, rel=0.03)
        assert found.chosen.value <= 0.2
        assert [probe.value for probe in found.probes] == seen
        assert len(seen) == 8
        assert all(value == float(f"{value:.3g}") for value in seen)

    def test_it_ends_where_names_have_no_more_digits(self):
        dial = Dial("x", "preset:cg-taylor@{}", 0.005, 1.0)
        measure, seen = falling(lambda value: 40.0 - 50.0 * value)
        found = tune(dial, 30.0, 40, measure)
        assert len(set(seen)) == len(seen) < 16
        assert found.chosen.value in (0.199, 0.2)

    def test_densities_fall_towards_the_crossing(self):
        dial = Dial("x", "preset:window@{}", 0.9, 0.03)
        seen = []

        def measure(value):
            seen.append(value)
            return Probe(value, 20.0 + 40.0 * value, 1 - value)  # 30 dB at 0.25

        found = tune(dial, 30.0, 7, measure)
        assert found.reached
        assert 0.25 <= found.chosen.value < 0.27
        assert all(0.03 <= value <= 0.9 for value in seen)

    @pytest.mark.parametrize("crossing", [0.99, 0.9, 0.4])
    def test_what_shares_leave_is_searched_evenly(self, crossing):
        dial = Dial("x", "preset:pooled@1.0:top_p={}", 0.999, 0.2, share=True)
        seen = []

        def measure(value):
            seen.append(value)
            return Probe(value, 30.0 if value >= crossing else 20.0, 1 - value)

        found = tune(dial, 30.0, 6, measure)
        assert found.reached
        assert 1 - crossing >= 1 - found.chosen.value > 0.8 * (1 - crossing)
        assert seen[0] == 0.9717
        assert all(0.2 < value < 0.999 for value in seen)

    @pytest.mark.parametrize("crossing", range(1, 9))
    def test_whole_dials_are_searched_exactly(self, crossing):
        dial = Dial("x", "preset:taylorseer:max_skips={}", 1, 7)
        measure, seen = falling(lambda value: 40.0 if value < crossing else 20.0)
        found = tune(dial, 30.0, 6, measure)
        assert len(seen) <= dial.probes(6) == 3
        if crossing == 1:
            assert not found.reached
        else:
            assert (found.chosen.value, found.reached) == (min(crossing - 1, 7), True)

    def test_where_nothing_reaches_the_target_the_nearest_stands_in(self):
        dial = Dial("x", "preset:cg-taylor@{}", 0.005, 1.0)
        measure, seen = falling(lambda value: 20.0 - value)
        found = tune(dial, 30.0, 5, measure)
        assert not found.reached
        assert found.chosen.value == min(seen)

    def test_the_one_that_saves_most_of_all_that_keep_to_the_target_is_chosen(self):
        """A dial that is not monotone, as those of forecasts are."""
        dial = Dial("x", "preset:cg-taylor@{}", 0.01, 1.0)
        places = iter([(35.0, 0.3), (28.0, 0.5), (31.0, 0.2), (30.5, 0.3)])

        def measure(value):
            psnr, saved = next(places)
            return Probe(value, psnr, saved)

        chosen = tune(dial, 30.0, 4, measure).chosen
        assert (chosen.psnr, chosen.saved) == (35.0, 0.3)

    @pytest.mark.parametrize(("low", "high"), [(0.01, 1.0), (1.0, 0.01)])
    def test_another_target_begins_where_the_first_one_ended(self, low, high):
        dial = Dial("x", "preset:x@{}", low, high)
        slope = -20.0 if high > low else 20.0
        measure, seen = falling(lambda value: 30.0 + slope * (value - 0.4))
        first = tune(dial, 30.0, 6, measure)
        del seen[:]
        second = tune(dial, 32.0, 3, measure, known=first.probes)
        crossing = 0.3 if high > low else 0.5
        assert len(seen) == 3
        inside = sorted(probe.value for probe in first.probes)
        lower = max((v for v in inside if v <= crossing), default=0.01)
        upper = min((v for v in inside if v > crossing), default=1.0)
        assert all(lower < value < upper for value in seen)
        assert second.probes == (*first.probes, *second.probes[-3:])
        assert second.reached
        assert second.chosen.value == pytest.approx(crossing, rel=0.15)

    def test_a_dip_on_the_cautious_side_does_not_send_the_search_back(self):
        dial = Dial("x", "preset:x@{}", 0.9, 0.05)
        known = [Probe(0.9, 37.0, 0.1), Probe(0.5, 33.9, 0.5), Probe(0.3, 34.2, 0.7), Probe(0.1, 30.0, 0.9)]
        measure, seen = falling(lambda value: 33.0)
        assert tune(dial, 34.0, 3, measure, known).chosen.value == 0.3
        assert all(0.1 < value < 0.3 for value in seen)

    def test_a_target_has_the_choice_of_what_was_found_for_others(self):
        probes = (Probe(0.3, 27.0, 0.7), Probe(0.9, 40.0, 0.1), Probe(0.5, 33.0, 0.5))
        assert [chosen(target, probes).chosen.value for target in (20.0, 28.0, 36.0, 50.0)] == [
            0.3,
            0.5,
            0.9,
            0.9,
        ]
        assert [chosen(target, probes).reached for target in (36.0, 50.0)] == [True, False]

    @pytest.mark.parametrize(("low", "high"), [(1, 8), (8, 1)])
    def test_whole_dials_may_fall(self, low, high):
        assert Dial("x", "preset:x@{}", low, high).probes(9) == 4

    def test_a_known_whole_dial_needs_nothing_new(self):
        dial = Dial("x", "preset:taylorseer:max_skips={}", 1, 3)
        measure, seen = falling(lambda value: 40.0 - 5.0 * value)
        first = tune(dial, 30.0, 2, measure)
        assert first.chosen.value == 2
        del seen[:]
        assert tune(dial, 35.0, 2, measure, known=first.probes).chosen.value == 1
        assert seen == [1]


@pytest.fixture(scope="module")
def pipe(tiny_wan_dir):
    return load_model(str(tiny_wan_dir), dtype=torch.float32, device="cpu")


def test_targets_share_generations_and_a_second_process_makes_none(pipe, tmp_path):
    settings = GenerationSettings(32, 48, 5, 3, 3.0)
    tuning = Tuning(pipe, ["a red circle"], settings, 0, tmp_path, parse_variant)
    dials = [Dial("window", "preset:window@{}:block=8", 0.9, 0.1)]
    forwards = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        found = tuning.run(dials, [30.0, 40.0], 2)
        made = len(forwards)
        again = tuning.run(dials, [30.0, 40.0], 2)
    finally:
        handle.remove()
    assert again == found
    files = sorted(tmp_path.glob("000-*.json"))
    assert made == len(forwards) == (1 + len(files)) * 2 * settings.num_inference_steps
    assert len(files) == len(found["window"][40.0].probes)
    first, second = found["window"][30.0], found["window"][40.0]
    assert second.probes == first.probes
    kept = json.loads(files[0].read_text(encoding="utf-8"))
    assert kept["variant"].startswith("preset:window@0.")
    by_density = sorted(second.probes, key=lambda probe: probe.value)
    saved = [probe.saved for probe in by_density]
    assert saved == sorted(saved, reverse=True)
    assert 0 < saved[-1] <= saved[0] < 0.8
    assert [probe.psnr for probe in by_density] == sorted(probe.psnr for probe in by_density)
