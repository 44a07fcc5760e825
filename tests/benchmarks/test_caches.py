"""The comparison of feature caches: how dials are tuned, that it goes on where it was killed, what it writes."""

import dataclasses
import json
from pathlib import Path

import caches
import pytest
import tables
import torch

from dit_accel.caching import CACHES
from dit_accel.evaluation.models import GenerationSettings, load_model
from dit_accel.evaluation.peers import DIFFUSERS
from dit_accel.evaluation.variants import parse_variant

ROOT = Path(__file__).parents[2]


STEPS = 12
LABELS = ("diffusers:mag_cache", "cache-dit:dbcache", "taylorseer")


def test_every_cache_of_ours_and_of_the_peers_has_a_row():
    ours = {dial.label for dial in caches.DIALS if not caches.of_peer(dial)}
    assert ours == set(CACHES)
    theirs = {dial.label for dial in caches.DIALS if caches.of_peer(dial)}
    assert {label.removeprefix("diffusers:") for label in theirs if "diffusers" in label} == set(DIFFUSERS)
    assert {label for label in theirs if "cache-dit" in label} == {
        "cache-dit:dbcache",
        "cache-dit:dbcache+taylorseer",
    }


@pytest.mark.parametrize("dial", caches.DIALS, ids=lambda dial: dial.label)
def test_both_ends_of_every_dial_are_variants(dial):
    names = [dial.name(value) for value in (dial.low, dial.high)]
    assert names[0] != names[1]
    for name in names:
        assert parse_variant(name).name == name


@pytest.fixture(scope="module")
def pipe(tiny_wan_dir):
    return load_model(str(tiny_wan_dir), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def bench(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return caches.Bench(
        pipe=pipe,
        settings=GenerationSettings(32, 48, 5, STEPS, 3.0),
        seed=0,
        tuning_prompts=["a red circle"],
        prompts=["a blue square"],
        machine={},
        target=30.0,
        probes=2,
        dials=[dial for dial in caches.DIALS if dial.label in LABELS],
        given={
            "sparse": parse_variant("preset:window@0.3:block=8"),
            "joint": parse_variant("preset:window@0.3:block=8:cache=magcache@0.1"),
        },
        folder=folder / "work",
        output=folder / "caches.json",
        scorer=None,
    )


@pytest.fixture(scope="module")
def killed_then_finished(pipe, bench):
    """What a run gives that is killed twice, while it tunes and while it compares, and the forwards of each process."""
    forwards = []
    for limit in (100, 180, None):
        forwards.append(0)

        def count(_module, _args, limit=limit):
            forwards[-1] += 1
            if forwards[-1] == limit:
                raise KeyboardInterrupt

        handle = pipe.transformer.register_forward_pre_hook(count)
        try:
            caches.run(bench)
        except KeyboardInterrupt:
            assert limit is not None
        finally:
            handle.remove()
    return json.loads(bench.output.read_text(encoding="utf-8")), forwards


def test_a_killed_run_goes_on_where_it_was(killed_then_finished, bench):
    report, forwards = killed_then_finished
    generation = 2 * STEPS
    probes = sum(len(row["probes"]) for row in report["tuned"])
    rows = 1 + len(LABELS) + len(bench.given)
    tuning = (1 + 1 + probes) * generation  # dense, the curve, the probes
    warm_up, attention = 2 * 2, 3 * 2
    compared = len(bench.prompts) * rows * generation
    assert forwards[:2] == [100, 180]
    # Each kill loses less than a generation; each process that compares warms up what it still has to run, and the
    # attention of dense and of the variants with a plan is timed until its pass was saved.
    least = tuning + compared
    most = least + 2 * generation + 2 * (rows * warm_up + (1 + len(bench.given)) * attention)
    assert least < sum(forwards) <= most
    assert report["evaluation"]["complete"]


def test_the_report_says_how_each_dial_was_found(killed_then_finished, bench):
    report, _ = killed_then_finished
    assert report["format_version"] == 1
    assert {"cpu", "cores", "torch", "diffusers", "cache_dit"} <= set(report["machine"])
    assert report["machine"]["cache_dit"]
    assert (report["target_psnr"], report["tuning_prompts"]) == (30.0, bench.tuning_prompts)
    assert [(row["label"], row["peer"]) for row in report["tuned"]] == [
        ("diffusers:mag_cache", True),
        ("cache-dit:dbcache", True),
        ("taylorseer", False),
    ]
    for row in report["tuned"]:
        assert row["chosen"] in row["probes"]
        assert row["reached"] == (row["chosen"]["psnr"] >= 30.0)
        assert 1 <= len(row["probes"]) <= 2
    assert report["given"] == {
        "sparse": "preset:window@0.3:block=8",
        "joint": "preset:window@0.3:block=8:cache=magcache@0.1",
    }


def test_tuned_and_given_rows_are_compared_with_dense(killed_then_finished):
    report, _ = killed_then_finished
    rows = {row["name"]: row for row in report["evaluation"]["variants"]}
    tuned = [row["variant"] for row in report["tuned"]]
    assert list(rows) == ["dense", *tuned, "sparse", "joint"]
    assert rows["sparse"]["skipped_share"] == 0 < rows["joint"]["skipped_share"]
    assert rows["sparse"]["density_mean"] < 1
    timed = {name for name, row in rows.items() if row["attention_seconds"] is not None}
    assert timed == {"dense", "sparse", "joint"}  # a cache alone leaves attention as it is
    assert rows["joint"]["cache_bytes"] > 0
    for name in tuned:
        assert rows[name]["skipped_share"] is not None


def test_another_set_of_rows_leaves_finished_ones_alone(killed_then_finished, bench):
    folders = [path for path in bench.folder.iterdir() if path.name.startswith("held-out-")]
    assert len(folders) == 1
    assert (folders[0] / "evaluation.json").is_file()


def test_teacache_runs_with_a_polynomial_of_the_model(bench, tmp_path):
    bench = dataclasses.replace(bench, folder=tmp_path)
    variant = bench.variant("preset:teacache@0.2:max_skips=6")
    kept = json.loads((tmp_path / "polynomial.json").read_text(encoding="utf-8"))
    assert len(kept) == 5
    assert variant.plan.cache.polynomial == tuple(kept)
    assert (variant.plan.cache.threshold, variant.plan.cache.max_skips) == (0.2, 6)
    assert variant.identity != parse_variant("preset:teacache@0.2:max_skips=6").identity
    (tmp_path / "polynomial.json").write_text("[1.0, 2.0]")  # measured once
    assert bench.variant("preset:teacache@0.2").plan.cache.polynomial == (1.0, 2.0)


def _row(name, speedup, psnr, **changes):
    return {
        "name": name,
        "seconds_p50": 10.0 / speedup,
        "speedup": speedup,
        "attention_speedup": None,
        "psnr_mean": psnr,
        "psnr_min": psnr - 1,
        "ssim_mean": 0.9,
        "latent_rel_l2": 0.1,
        "density_mean": None,
        "semantic": None,
        "skipped_share": 0.5,
        "cache_bytes": 2_500_000,
        "identical_to_dense": False,
    } | changes


def _tuned(name, peer, reached=True):
    return {"label": name, "peer": peer, "variant": name, "reached": reached}


@pytest.fixture
def report():
    names = [("theirs-a@1", True), ("theirs-b@1", True), ("ours@1", False)]
    return {
        "target_psnr": 30.0,
        "tuning_prompts": ["one"],
        "tuned": [_tuned(name, peer, name != "theirs-b@1") for name, peer in names],
        "evaluation": {
            "model": "demo",
            "machine": {"gpu": None, "cpu": "Chip", "cores": 2, "dtype": "bfloat16", "torch": "2.13.0"},
            "dense_backend": "SDPA",
            "settings": {"height": 160, "width": 192, "num_frames": 33, "num_inference_steps": 20},
            "prompts": ["one"],
            "attention_share": None,
            "variants": [
                _row("dense", 1.0, 100.0, skipped_share=0.0, cache_bytes=0),
                _row("theirs-a@1", 1.6, 30.2),
                _row("theirs-b@1", 3.0, 25.0),
                _row("ours@1", 2.0, 30.0),
                _row("joint", 2.4, 29.6),
            ],
        },
    }


def test_the_table_names_the_fastest_and_where_peers_are_better(report):
    lines = tables.TABLES["caches"][1](report).splitlines()
    assert lines[0].startswith("| variant | seconds | speed-up | PSNR mean |")
    assert lines[0].endswith("| skipped | cache MB |")
    assert lines[3].endswith("| 50% | 2.5 |")
    assert lines[-3] == "Dials tuned to 30 dB on 1 other prompt; not reached by `theirs-b@1`."
    assert lines[-2] == (
        "Fastest at 29.5 dB and above: of the peers `theirs-a@1` with 1.60×, of ours `joint` with 2.40×, "
        "1.50 times as fast."
    )
    # theirs-a has a PSNR that none of ours has, theirs-b a speed-up
    assert (
        lines[-1] == "Peers that none of ours matches in both speed-up and PSNR: `theirs-a@1`, `theirs-b@1`."
    )
    report["evaluation"]["variants"][3]["psnr_mean"] = 30.3
    assert tables.TABLES["caches"][1](report).endswith("PSNR: `theirs-b@1`.")


def test_what_is_identical_to_dense_is_nobody_s_success(report):
    report["evaluation"]["variants"][2] |= {"psnr_mean": 100.0, "identical_to_dense": True}
    lines = tables.TABLES["caches"][1](report).splitlines()
    assert "| `theirs-b@1` | 3.33 | – | 100.00 |" in lines[4]
    assert "identical to dense in every generation, so no speed-up: theirs-b@1." in lines[-4]
    assert "theirs-b@1" not in lines[-2] + lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "cg-taylor,magic"], "only: expected labels out of .* got magic"),
        (["--prompts", "0"], "prompts: expected a number from 1 to 64, got 0"),
        (["--probes", "0"], "probes: expected a number from 1, got 0"),
        (["--joint", "plan"], "variant 'plan': expected dense, plan:DIR"),
        (["--only", "easycache", "--steps", "0"], "num_inference_steps: expected a positive number, got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        caches.main([*arguments, "--work", str(tmp_path)])
    assert message.split(".*")[0] in capsys.readouterr().err


def test_the_command_on_the_demo(tmp_path):
    sizes = ["--height", "32", "--width", "48", "--frames", "1", "--steps", "11", "--device", "cpu"]
    few = [
        "--only",
        "easycache",
        "--probes",
        "1",
        "--prompts",
        "1",
        "--sparse",
        "preset:window@0.5",
        "--joint",
        "none",
    ]
    output = tmp_path / "caches.json"
    caches.main([*sizes, *few, "--output", str(output), "--work", str(tmp_path / "work")])
    report = json.loads(output.read_text(encoding="utf-8"))
    rows = report["evaluation"]["variants"]
    assert [row["name"] for row in rows] == ["dense", report["tuned"][0]["variant"], "schedule", "sparse"]
    assert report["given"] == {"schedule": "calibrated", "sparse": "preset:window@0.5"}
    assert rows[2]["density_mean"] == 1.0  # a schedule alone leaves attention as it is
    assert rows[0]["semantic"] is not None
    assert report["evaluation"]["model"] == "demo"
