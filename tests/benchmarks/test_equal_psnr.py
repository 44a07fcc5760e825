"""The comparison at equal PSNR: which systems, how speed-ups are read, ablations, that it goes on, what it writes."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import equal_psnr
import pytest
import tables
import torch

from dit_accel.calibration import default_candidates, stages
from dit_accel.calibration.cost import Latency
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.variants import parse_variant
from dit_accel.pipelines import demo, load_demo
from dit_accel.presets import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("means", ["", equal_psnr.MEANS])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_dial_is_the_system_as_published_but_for_one_number(name, means):
    preset, dial = PRESETS[name], equal_psnr.dial_of(name + means, 20)
    for value in (dial.low, dial.high):
        plan = parse_variant(dial.name(value)).plan
        candidate = plan.candidates[-1]
        options = dict(candidate.options)
        assert (candidate.family, plan.block) == (preset.family, preset.block)
        assert candidate.remainder == bool(means)
        assert plan.range_starts == ((0.0, preset.warm_up) if preset.warm_up else (0.0,))
        expected = {name: x for name, x in preset.options.items() if name != "features" or not means}
        if "top_p" in expected:
            assert (candidate.density, options.pop("top_p")) == (1.0, value)
            del expected["top_p"]
        else:
            assert candidate.density == value
        if "reuse" in expected:
            expected["reuse"] = round(expected["reuse"] * 20 / 50)
        assert options == expected
    assert dial.low > dial.high  # from what saves least to what saves most


def test_the_best_systems_are_taken_each_in_its_better_way():
    def row(preset, remainder, psnr, speedup):
        return {"preset": preset, "remainder": remainder, "psnr_mean": psnr, "speedup": speedup}

    rows = [
        row("svg2", False, 27.0, 1.2), row("svg2", True, 28.0, 1.1),
        row("sale", False, 29.0, 1.0), row("sale", True, 30.0, 0.6),  # no faster than dense
        row("sta", False, 20.0, 3.0), row("sta", True, 25.0, 2.5),
        row("moa", False, 24.9, 2.9), row("moa", True, 24.0, 2.4),  # better as it is
        row("hyperattention", True, 24.5, 2.45), row("scatterbrain", True, 24.5, 2.45),  # one and the same
        row("scatterbrain", False, 19.0, 3.5), row("calibrated", True, 50.0, 4.0),  # ours
    ]  # fmt: skip
    report = {"generations": {"rows": rows}}
    assert equal_psnr.best_presets(report, 2) == ["svg2+means", "sta+means"]
    found = equal_psnr.best_presets(report, 9)
    assert found[:3] == ["svg2+means", "sta+means", "moa"]
    assert len(found) == 4
    assert found[3] in ("hyperattention+means", "scatterbrain+means")


class TestSpeedupAt:
    points = ((28.0, 3.0), (32.0, 2.0), (36.0, 1.5))

    @pytest.mark.parametrize(
        ("psnr", "expected"),
        [(28.0, 3.0), (32.0, 2.0), (20.0, 3.0), (30.0, 6.0**0.5), (36.0, 1.5), (36.4, 1.5)],
    )
    def test_it_is_read_between_points(self, psnr, expected):
        assert equal_psnr.speedup_at(self.points, psnr) == pytest.approx(expected)

    def test_what_was_not_reached_is_unknown(self):
        assert equal_psnr.speedup_at(self.points, 36.6) is None

    def test_what_was_never_but_dense_is_unknown(self):
        assert equal_psnr.speedup_at((), 30.0) is None

    def test_a_point_that_is_slower_and_worse_says_nothing(self):
        worse = (*self.points, (30.0, 1.0))
        for psnr in (28.0, 30.0, 31.0):
            assert equal_psnr.speedup_at(worse, psnr) == equal_psnr.speedup_at(self.points, psnr)


def test_ablations_take_away_what_they_say():
    every = default_candidates("cuda:0" if torch.cuda.is_available() else "cpu")
    found = {name: list(c.candidates(every)) for name, c in equal_psnr.ABLATION.items()}
    assert found["plan"] == list(every)
    for family in ("balanced", "pooled"):
        kept = [c for c in every if c.family in ("dense", family)]
        assert found[f"{family} only"] == kept
        assert {c.precision for c in kept} == {c.precision for c in every}
    assert found["without balanced"] == [c for c in every if c.family != "balanced"] != every
    assert not any(c.remainder for c in found["without remainder"])
    assert len({(c.family, c.density, c.options, c.precision) for c in every}) == len(
        found["without remainder"]
    )
    assert {c.precision for c in found["native precision only"]} == {"native"}
    assert all(any(c.is_dense for c in candidates) for candidates in found.values())


def by_pairs(query, key, value, grid, candidates, original, **_):
    """A clock that says the same in every process; dense costs most, hashing is dear."""
    price = [0.1 + c.density + 0.2 * (c.family == "hashed") for c in candidates]
    return Latency(torch.tensor(price, dtype=torch.float64), 2.0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equal_psnr")
    kept = ("plan", "with downstream weights", "without measured cost", "native precision only")
    return equal_psnr.Bench(
        pipe=load_demo(torch.float32),
        settings=GenerationSettings(48, 64, 5, 3, 4.0),
        seed=0,
        tuning_prompts=demo.PROMPTS["calibration"][:1],
        prompts=demo.PROMPTS["held_out"][:1],
        machine={},
        targets=[26.0, 34.0],
        probes=2,
        beyond=[30.0],
        dials=[equal_psnr.dial_of("sta", 3), equal_psnr.dial_of("sparge+means", 3)],
        calibrators={name: equal_psnr.ABLATION[name] for name in kept},
        folder=folder / "work",
        output=folder / "equal.json",
    )


@pytest.fixture(scope="module")
def killed_then_finished(bench):
    """The report of a run that is killed twice on its way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "measure_latency", by_pairs)
        killed = []
        for limit in (12, 60, None):
            forwards = 0

            def count(_module, _args, limit=limit):
                nonlocal forwards
                forwards += 1
                if forwards == limit:
                    raise KeyboardInterrupt

            handle = bench.pipe.transformer.register_forward_pre_hook(count)
            try:
                equal_psnr.run(bench)
            except KeyboardInterrupt:
                killed.append(limit)
            finally:
                handle.remove()
        assert killed == [12, 60]
    return json.loads(bench.output.read_text(encoding="utf-8"))


def test_every_row_is_tuned_and_compared(killed_then_finished, bench):
    report = killed_then_finished
    labels = ["sta", "sparge+means", "plan", "with downstream weights", "without measured cost"]
    # CPUs have one precision: that ablation could only repeat the plan.
    assert list(dict.fromkeys(row["label"] for row in report["rows"])) == labels
    assert list(report["speedup_at"]) == labels
    names = {row["name"] for row in report["evaluation"]["variants"]}
    assert names == {"dense", *(row["row"] for row in report["rows"])}
    for row in report["rows"]:
        assert row["ours"] == (row["label"] not in ("sta", "sparge+means"))
        assert row["reached"] == (row["tuned_psnr"] >= row["target"])
    targets = {label: [row["target"] for row in report["rows"] if row["label"] == label] for label in labels}
    assert all(aims == [*bench.targets, *bench.beyond] for aims in targets.values())
    assert all(len(found) == len(bench.targets) for found in report["speedup_at"].values())
    assert report["evaluation"]["complete"]
    assert report["evaluation"]["prompts"] != report["tuning_prompts"]
    files = list((bench.folder / "tuning").glob("000-*.json"))
    assert 4 <= len(files) <= 2 * 3 * bench.probes


def test_without_measured_cost_every_pair_costs_alike(killed_then_finished, bench):
    assert killed_then_finished
    (folder,) = bench.folder.glob("plan-*-by-pairs")
    latency = equal_psnr.Checkpoint(
        folder / "calibration", json.loads((folder / "calibration" / "fingerprint.json").read_text())
    ).load("latency")
    candidates = default_candidates("cpu")
    assert latency[0]["candidates"].tolist() == pytest.approx([2.0 * c.density for c in candidates])
    measured = folder.with_name(folder.name.removesuffix("-by-pairs"))
    assert (measured / "calibration" / "latency.safetensors").is_file()
    assert not list(bench.folder.glob("*.partial"))


def test_another_run_generates_nothing(killed_then_finished, bench):
    def refuse(_module, _args):
        raise AssertionError("a forward")

    handle = bench.pipe.transformer.register_forward_pre_hook(refuse)
    try:
        again = equal_psnr.run(dataclasses.replace(bench, output=bench.output.with_name("again.json")))
    finally:
        handle.remove()
    assert again["rows"] == killed_then_finished["rows"]
    assert again["speedup_at"] == killed_then_finished["speedup_at"]


def test_what_is_identical_to_dense_is_nobody_s_success(killed_then_finished):
    report = copy.deepcopy(killed_then_finished)
    rows = [row for row in report["rows"] if row["label"] == "plan"]
    variants = {row["name"]: row for row in report["evaluation"]["variants"]}
    variants[rows[0]["row"]].update(psnr_mean=27.0, speedup=2.0, identical_to_dense=False)
    for row in rows[1:]:
        variants[row["row"]].update(psnr_mean=100.0, speedup=1.01, identical_to_dense=True)
    points = equal_psnr.measured_points(report["rows"], report["evaluation"])
    assert points["plan"] == [(27.0, 2.0)]
    assert equal_psnr.speedup_at(points["plan"], 34.0) is None
    (line,) = (x for x in tables.TABLES["equal_psnr"][1](report).splitlines() if x.startswith("| plan |"))
    assert "27.0 dB" in line
    assert "100.0 dB" not in line


@pytest.mark.parametrize(("speedup", "told"), [(2.2, "`sparge+means` at 33.0 dB"), (1.9, "none")])
def test_points_above_the_plan_s_curve_are_told(killed_then_finished, speedup, told):
    report = copy.deepcopy(killed_then_finished)
    variants = {row["name"]: row for row in report["evaluation"]["variants"]}
    measured = {
        ("plan", 26.0): (27.0, 3.0),
        ("plan", 34.0): (34.0, 1.8),  # between them 1.94 at 33 dB
        ("sparge+means", 26.0): (33.0, speedup),
        ("sparge+means", 34.0): (60.0, 0.9),  # slower than dense
        ("sta", 26.0): (26.0, 2.9),
        ("sta", 34.0): (26.0, 2.9),
    }
    for row in report["rows"]:
        level, faster = measured.get((row["label"], row["target"]), (100.0, 1.0))
        variants[row["row"]].update(psnr_mean=level, speedup=faster, identical_to_dense=level == 100.0)
    lines = tables.TABLES["equal_psnr"][1](report).splitlines()
    assert f"Measured points above the plan's curve: {told}." in lines


def rows_of(report, label):
    return {row["row"] for row in report["rows"] if row["label"] == label}


def test_the_table_reads_speedups_and_names_the_best_of_the_others(killed_then_finished):
    report = copy.deepcopy(killed_then_finished)
    report["speedup_at"] |= {"sta": [2.0, None], "sparge+means": [1.5, 1.2], "plan": [3.0, 1.8]}
    lines = tables.TABLES["equal_psnr"][1](report).splitlines()
    assert lines[0] == "|  | 26 dB | 34 dB | measured |"
    lowest = min(
        row["psnr_mean"] for row in report["evaluation"]["variants"] if row["name"] in rows_of(report, "sta")
    )
    assert lowest > 26.0
    assert lines[2].startswith("| `sta` | ≥2.00 | – | ")
    assert re.match(r"\| plan \| ≥?3\.00 \| ≥?1\.80 \| ", lines[4])
    assert lines[-2] == (
        "At 26 dB the plan is 1.50 times as fast as the best of the others, `sta`, measured from "
        f"{lowest:.1f} dB on."
    )
    assert lines[-1] == (
        "At 34 dB the plan is 1.50 times as fast as the best of the others that reach it (1 of 2), `sparge+means`."
    )
    report["speedup_at"] |= {"plan": [3.0, None]}
    last = tables.TABLES["equal_psnr"][1](report).splitlines()[-1]
    assert last == "34 dB no plan was measured to reach; `sparge+means` does, 1.20 times dense."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "magic"], "only: expected names out of adaspa,"),
        (["--presets", "nowhere.json"], "presets: expected nowhere.json; run benchmarks/presets.py"),
        (["--group", "ablation", "--only", "sta"], "only: expected --group presets with it"),
        (["--prompts", "0", "--only", "sta"], "prompts: expected a number from 1 to 64, got 0"),
        (["--probes", "0", "--only", "sta"], "probes: expected a number from 1, got 0"),
        (["--targets", "30", "30", "--only", "sta"], "targets: expected each once"),
        (
            ["--beyond", "150", "--only", "sta"],
            "beyond: expected each once, above 0 and below 100 dB, got [150.0]",
        ),
        (
            ["--targets", "150", "--only", "sta"],
            "targets: expected each once, above 0 and below 100 dB, got [150.0]",
        ),
        (["--count", "0", "--only", "sta"], "count: expected a number from 1, got 0"),
        (["--only", "sta", "--device", "abacus"], "expected cpu, cuda or cuda:N"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        equal_psnr.main([*arguments, "--work", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_comparison_of_presets_that_is_not_finished_is_refused(tmp_path, capsys):
    unfinished = tmp_path / "presets.json"
    unfinished.write_text(json.dumps({"generations": {"rows": [], "done": 3, "of": 44}}))
    with pytest.raises(SystemExit):
        equal_psnr.main(["--presets", str(unfinished), "--work", str(tmp_path)])
    assert "to hold all generations, got 3 of 44" in capsys.readouterr().err
