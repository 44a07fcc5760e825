"""Plans: what they answer, what survives the disk, and what is refused with which words."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save

from dit_accel.attention import attend
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.plan import AccelPlan, PlanError, config_hash_of
from dit_accel.presets import PRESETS

CONFIG, TENSORS = "accel_config.json", "accel_plan.safetensors"
LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
CANDIDATES = (
    Candidate("dense", 1.0),
    Candidate("skip", 0.0),
    Candidate("window", 0.3, (("aspect", 1.5),)),
    Candidate("bands", 0.25, (("order", "space"),), remainder=True),
)


def make(**changes) -> AccelPlan:
    choice = torch.tensor([[[0, 1, 2], [3, 2, 1]], [[2, 2, 2], [3, 3, 3]]], dtype=torch.int16)
    generator = torch.Generator().manual_seed(0)
    parts = {
        "candidates": CANDIDATES,
        "choice": choice,
        "range_starts": (0.0, 0.4),
        "layers": LAYERS,
        "model_class": "WanTransformer3DModel",
        "config_hash": "ab" * 32,
        "grid": TokenGrid(5, 7, 9, text_tokens=3, text_first=True),
        "block": 32,
        "recall": torch.rand(2, 2, 3, generator=generator),
        "rel_l2": torch.rand(2, 2, 3, generator=generator),
        "latency_ms": torch.rand(2, 2, 3, generator=generator),
        "objective": {"target_psnr": 30.0, "steps": 24, "prompts": ["ein Kreis — 圆"]},
        "validated": {"psnr": 29.7, "held_out": {"psnr": None}},
    }
    return AccelPlan(**{**parts, **changes})


def assert_equal(one: AccelPlan, other: AccelPlan) -> None:
    for name in set(AccelPlan.__dataclass_fields__) - {"source"}:
        first, second = getattr(one, name), getattr(other, name)
        if isinstance(first, torch.Tensor):
            assert first.dtype == second.dtype
            assert torch.equal(first, second)
        else:
            assert first == second, name


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(make(), id="full"),
        pytest.param(make(recall=None, latency_ms=None, grid=None), id="without-measures"),
        pytest.param(AccelPlan.preset("stripes", density=0.2, sinks=3, order="space"), id="preset"),
    ],
)
def test_round_trip(plan: AccelPlan, tmp_path: Path) -> None:
    plan.save_pretrained(tmp_path / "new" / "plan")
    assert sorted(file.name for file in (tmp_path / "new").rglob("*")) == [CONFIG, TENSORS, "plan"]
    assert_equal(AccelPlan.from_pretrained(tmp_path / "new" / "plan"), plan)
    assert_equal(AccelPlan.from_pretrained(str(tmp_path / "new" / "plan")), plan)


def test_saving_again_replaces_the_plan_and_nothing_else(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    other = make(block=48, recall=None)
    other.save_pretrained(tmp_path)
    assert_equal(AccelPlan.from_pretrained(tmp_path), other)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, TENSORS, "notes.txt"]


def test_the_folder_one_is_in_can_be_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make().save_pretrained(".")
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, TENSORS]
    assert_equal(AccelPlan.from_pretrained("."), make())


def test_nothing_is_written_beside_a_folder_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "plan"
    folder.mkdir(parents=True)
    before = folder.parent.stat().st_mtime_ns
    make().save_pretrained(folder)
    assert folder.parent.stat().st_mtime_ns == before
    assert_equal(AccelPlan.from_pretrained(folder), make())


def test_config_is_plain_json_with_versions(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert config["format_version"] == 4
    assert config["library_versions"]["torch"] == torch.__version__
    assert set(config["library_versions"]) == {"dit-accel", "torch", "diffusers"}
    assert config["candidates"][3] == {
        "family": "bands",
        "density": 0.25,
        "options": {"order": "space"},
        "precision": "native",
        "remainder": True,
    }


def test_a_plan_of_an_older_format_has_no_dense_layers(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    change(tmp_path, format_version=3, dense_layers="REMOVED")
    assert_equal(AccelPlan.from_pretrained(tmp_path), make())


def test_dense_layers_are_kept_and_count_as_dense(tmp_path: Path) -> None:
    plan = AccelPlan.preset("window", density=0.2, dense_layers=0.25, warm_up=0.5)
    plan.save_pretrained(tmp_path)
    assert AccelPlan.from_pretrained(tmp_path).dense_layers == 0.25
    assert plan.density_mean == pytest.approx(0.25 + 0.75 * (0.5 + 0.5 * 0.2))


def change(directory: Path, **fields) -> None:
    file = directory / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config.update(fields)
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "REMOVED"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 5}, "format_version: expected at most 4, got 5; upgrade dit-accel to read it"),
        ({"dense_layers": 1.5}, "dense_layers: expected a share of the layers from 0 to below 1, got 1.5"),
        ({"dense_layers": "REMOVED"}, "dense_layers: expected int or float, got no such field"),
        ({"format_version": "1"}, "format_version: expected a positive integer, got '1'"),
        ({"format_version": "REMOVED"}, "format_version: expected a positive integer, got None"),
        ({"block": "REMOVED"}, "block: expected int, got no such field"),
        ({"block": True}, "block: expected int, got True"),
        ({"block": 0}, "block: expected a positive integer, got 0"),
        ({"layers": "blocks.0"}, "layers: expected list or null, got 'blocks.0'"),
        ({"layers": ["blocks.0.attn1", 7]}, r"layers: expected names, got \['blocks.0.attn1', 7\]"),
        ({"model_class": 3}, "model_class: expected str or null, got 3"),
        ({"grid": {"frames": 2}}, r"grid: expected a valid entry, got \{'frames': 2\} \(.*height"),
        (
            {"grid": {"frames": 0, "height": 1, "width": 1}},
            r"grid: expected a valid entry, .*TokenGrid frames: expected an integer of at least 1, got 0",
        ),
        (
            {"range_starts": [0.0, 0.9, 0.4]},
            "range_starts: expected ascending numbers below 1, the first 0.0, got",
        ),
        ({"range_starts": [0.0, "x"]}, r"range_starts: expected ascending .* got \[0.0, 'x'\]"),
        ({"candidates": []}, "candidates: expected at least one, got none"),
        ({"candidates": [7]}, r"candidates\[0\]: expected a valid entry, got 7"),
        (
            {
                "candidates": [
                    {
                        "family": "spiral",
                        "density": 0.3,
                        "options": {},
                        "precision": "native",
                        "remainder": False,
                    }
                ]
            },
            r"candidates\[0\]: .*unknown family 'spiral'; known: dense",
        ),
        (
            {
                "candidates": [
                    {
                        "family": "window",
                        "density": "x",
                        "options": {},
                        "precision": "native",
                        "remainder": False,
                    }
                ]
            },
            r"candidates\[0\]: .*density: expected a number from 0 to 1, got 'x'",
        ),
        (
            {
                "candidates": [
                    {
                        "family": "window",
                        "density": 0.3,
                        "options": {},
                        "precision": "int4",
                        "remainder": False,
                    }
                ]
            },
            r"candidates\[0\]: .*precision: expected one of native, int8, int8_fp8, fp8, got 'int4'",
        ),
        (
            {"candidates": [{"family": "window", "density": 0.3, "options": {}}]},
            r"candidates\[0\]: .*expected the keys \['density', 'family', 'options', 'precision', 'remainder'\]",
        ),
        ({"tensors_sha256": "REMOVED"}, "tensors_sha256: expected str, got no such field"),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(PlanError, match=message) as caught:
        AccelPlan.from_pretrained(tmp_path)
    assert str(tmp_path / CONFIG) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"range_starts": [0.0]}, r"choice: expected 1 along axis 0 for range_starts, got int16 \(2, 2, 3\)"),
        ({"layers": ["only.one"]}, r"choice: expected 1 along axis 1 for layers, got int16 \(2, 2, 3\)"),
        (
            {
                "candidates": [
                    {
                        "family": "dense",
                        "density": 1.0,
                        "options": {},
                        "precision": "native",
                        "remainder": False,
                    }
                ]
            },
            "choice: expected numbers from 0 to 0, got 0 to 3",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(fields: dict, message: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(PlanError, match=message) as caught:
        AccelPlan.from_pretrained(tmp_path)
    assert str(tmp_path / TENSORS) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 40, 200, -1])
def test_truncated_files_are_found_out(kept: int, tmp_path: Path) -> None:
    for name, message in (
        (CONFIG, "file: expected complete JSON"),
        (TENSORS, r"sha256: .*truncated, corrupted"),
    ):
        make().save_pretrained(tmp_path)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: kept if kept >= 0 else -3])
        with pytest.raises(PlanError, match=message) as caught:
            AccelPlan.from_pretrained(tmp_path)
        assert str(tmp_path / name) in str(caught.value)


def test_a_flipped_bit_and_foreign_tensors_are_found_out(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    file = tmp_path / TENSORS
    content = bytearray(file.read_bytes())
    content[-2] ^= 4
    file.write_bytes(content)
    with pytest.raises(PlanError, match=f"{TENSORS}: sha256: expected [0-9a-f]{{64}} .* got [0-9a-f]{{64}}"):
        AccelPlan.from_pretrained(tmp_path)
    make(block=8, recall=None).save_pretrained(tmp_path / "other")
    file.write_bytes((tmp_path / "other" / TENSORS).read_bytes())
    with pytest.raises(PlanError, match="of another plan"):
        AccelPlan.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"choice": torch.zeros(1, 1, 1)}, r"choice: expected int16 \[ranges, layers, heads\], got float32"),
        ({"choice": torch.zeros(1, 1, dtype=torch.int16)}, r"choice: expected int16 .* got int16 \(1, 1\)"),
        ({"recall": torch.zeros(1, 1, 1)}, "tensors: expected choice and any of recall, .*, got recall"),
        (
            {"choice": torch.zeros(1, 1, 1, dtype=torch.int16), "speed": torch.zeros(1)},
            "tensors: expected choice and any of recall, rel_l2, latency_ms, got choice, speed",
        ),
        (
            {"choice": torch.zeros(1, 1, 1, dtype=torch.int16), "recall": torch.zeros(1, 1, 2)},
            r"recall: expected float32 \(1, 1, 1\) like choice, got float32 \(1, 1, 2\)",
        ),
    ],
)
def test_tensors_of_wrong_shape_are_named(tensors: dict, message: str, tmp_path: Path) -> None:
    AccelPlan.preset("window", density=0.3).save_pretrained(tmp_path)
    payload = save(tensors)
    (tmp_path / TENSORS).write_bytes(payload)
    change(tmp_path, tensors_sha256=hashlib.sha256(payload).hexdigest())
    with pytest.raises(PlanError, match=message) as caught:
        AccelPlan.from_pretrained(tmp_path)
    assert TENSORS in str(caught.value)


def test_missing_plans_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match="directory: expected a directory, got nothing there; give the directory"
    ):
        AccelPlan.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(PlanError, match="got nothing there"):
        AccelPlan.from_pretrained("./nowhere")
    with pytest.raises(PlanError, match=f"{CONFIG}: file: expected a file, got none; is this the directory"):
        AccelPlan.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(PlanError, match=f"{TENSORS}: file: expected a file, got none"):
        AccelPlan.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match="got a file"):
        AccelPlan.from_pretrained(tmp_path / CONFIG)


def test_a_hub_repository_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        PlanError, match=r"someone/no-such-plan: directory: expected a directory or a hub repo"
    ):
        AccelPlan.from_pretrained("someone/no-such-plan")


def test_ranges_and_rows() -> None:
    plan = make()
    assert [plan.range_at(progress) for progress in (0.0, 0.39, 0.4, 0.41, 1.0)] == [0, 0, 1, 1, 1]
    assert plan.row(0.2, 1).tolist() == [3, 2, 1]
    assert plan.row(1.0, 0).tolist() == [2, 2, 2]
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress: expected a number from 0 to 1, got"):
            plan.range_at(progress)
    preset = AccelPlan.preset("pooled", density=0.25)
    assert preset.row(0.7, 29).tolist() == [0]


def test_planned_density_weighs_ranges_by_length() -> None:
    first = (1.0 + 0.0 + 0.3 + 0.25 + 0.3 + 0.0) / 6
    second = (3 * 0.3 + 3 * 0.25) / 6
    assert make().density_mean == pytest.approx(0.4 * first + 0.6 * second)
    assert AccelPlan.preset("dense").density_mean == 1.0
    assert AccelPlan.preset("skip").density_mean == 0.0


def test_planned_density_of_a_calibrated_plan_is_that_over_its_steps() -> None:
    assert make(validated={"density_mean": 0.37}).density_mean == 0.37


def test_check_accepts_the_model_of_the_plan_and_presets_accept_all() -> None:
    make().check("WanTransformer3DModel", "ab" * 32, LAYERS, 3)
    AccelPlan.preset("window", density=0.3).check("AnyTransformer", "00", ["a", "b", "c"], 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {0: "FluxTransformer2DModel"},
            "model_class: expected WanTransformer3DModel, got FluxTransformer2DModel",
        ),
        ({1: "cd" * 32}, f"config_hash: expected {'ab' * 32}, got {'cd' * 32}; calibrate this model"),
        ({2: LAYERS[:1]}, r"layers: expected 2 layers \[.*\], got 1 layers \['blocks.0.attn1'\]"),
        ({2: ["x"] * 40}, r"layers: expected 2 layers \[.*\], got 40 layers x .. x"),
        ({3: 5}, "choice: expected 3 heads, got 5 heads"),
    ],
)
def test_check_refuses_another_model(changes: dict[int, object], message: str) -> None:
    arguments = ["WanTransformer3DModel", "ab" * 32, LAYERS, 3]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(PlanError, match=message):
        make().check(*arguments)


def test_a_refusal_names_the_file_of_the_plan(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(PlanError) as refused:
        AccelPlan.from_pretrained(tmp_path).check("FluxTransformer2DModel", "ab" * 32, LAYERS, 3)
    assert str(refused.value).startswith(
        f"{tmp_path / CONFIG}: model_class: expected WanTransformer3DModel, got Flux"
    )


def test_config_hash_is_of_the_architecture_alone(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "freq_dim": 16, "text_dim": 8}
    model = WanTransformer3DModel(**sizes, num_layers=1)
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config._name_or_path != model.config.get("_name_or_path")
    assert config_hash_of(loaded) == config_hash_of(model)
    loaded.register_to_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert config_hash_of(loaded) == config_hash_of(model)
    assert len(config_hash_of(model)) == 64
    assert config_hash_of(WanTransformer3DModel(**sizes, num_layers=2)) != config_hash_of(model)


@pytest.mark.parametrize(
    ("candidate", "label"),
    [
        (Candidate("window", 0.3), "window@0.30"),
        (Candidate("dense", 1.0), "dense@1.00"),
        (Candidate("bands", 0.25, (("order", "space"),)), "bands@0.25 order=space"),
        (Candidate("bands", 0.25, (("order", "space"),), remainder=True), "bands@0.25 order=space remainder"),
    ],
)
def test_labels_and_dicts(candidate: Candidate, label: str) -> None:
    assert candidate.label == label
    assert Candidate.from_dict(json.loads(json.dumps(candidate.to_dict()))) == candidate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "spiral", "density": 0.3},
            "unknown preset 'spiral'; families: dense, .* systems: adaspa, clear",
        ),
        (
            {"name": "bands", "density": 0.3, "warm_up": 1.0},
            "warm_up: expected a progress from 0 to below 1, got 1.0",
        ),
        ({"name": "window"}, "preset 'window' needs a density, for instance density=0.3"),
        ({"name": "dense", "density": 0.3}, "family 'dense' has density 1.0 only, got 0.3"),
        ({"name": "bands", "density": 0.3, "width": 3}, "family 'bands' has no option 'width'"),
        (
            {"name": "bands", "density": 0.3, "precision": "int4"},
            "precision: expected one of native, int8, int8_fp8, fp8, got 'int4'",
        ),
        (
            {"name": "bands", "density": 0.3, "remainder": -1},
            "remainder: expected true, false or a number from 0, the weight of the means, got -1",
        ),
        (
            {"name": "bands", "density": 0.3, "remainder": "all"},
            "remainder: expected .* the means, got 'all'",
        ),
        ({"name": "dense", "remainder": True}, "expected false, since family 'dense' leaves nothing out"),
        ({"name": "bands", "density": 0.3, "block": 0}, "block: expected a positive integer, got 0"),
        (
            {"name": "bands", "density": 0.3, "dense_layers": 1.0},
            "dense_layers: expected a share of the layers from 0 to below 1, got 1.0",
        ),
        ({"name": "cg-taylor", "dense_layers": 0.1}, "preset 'cg-taylor' is a cache: expected the fields"),
        # What only the family itself knows, before anything is generated.
        (
            {"name": "window", "density": 0.3, "shape": "cone"},
            "option 'shape' of family 'window': .*, got 'cone'",
        ),
        ({"name": "window", "density": 0.3, "order": "tiles"}, "token order: expected .*, got 'tiles'"),
        (
            {"name": "pooled", "density": 0.3, "parts": 3},
            "option 'parts' of family 'pooled': expected a divisor of the block, 64, got 3",
        ),
        (
            {"name": "balanced", "density": 0.3, "branches": "x"},
            "option 'branches' .* 'own' or 'shared', got 'x'",
        ),
        (
            {"name": "xattention", "stride": 7},
            "option 'stride' .*: expected a divisor of the block, 128, got 7",
        ),
    ],
)
def test_presets_that_make_no_sense_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccelPlan.preset(**arguments)


@pytest.mark.parametrize("name", PRESETS)
def test_published_systems_run_as_published_and_as_changed(name: str) -> None:
    published, plan = PRESETS[name], AccelPlan.preset(name)
    sparse = plan.candidates[-1]
    assert (sparse.family, sparse.density, plan.block) == (
        published.family,
        published.density,
        published.block,
    )
    assert dict(sparse.options) == published.options
    assert not sparse.remainder
    assert plan.dense_layers == published.dense_layers
    assert plan.range_starts == ((0.0, published.warm_up) if published.warm_up else (0.0,))
    assert (plan.candidates[plan.row(0.0, 0)].family == "dense") == bool(published.warm_up)
    assert plan.candidates[plan.row(0.9, 0)] is sparse
    grid = TokenGrid(5, 7, 9)
    query, key, value = torch.randn(3, 1, grid.total_tokens, 2, 16).unbind(0)
    output, density = attend(query, key, value, grid, plan.candidates, plan.row(0.9, 0), block=plan.block)
    assert output.isfinite().all()
    assert 0 < density <= 1
    assert AccelPlan.preset(name, remainder=False).candidates[-1] == replace(sparse, remainder=False)
    changed = AccelPlan.preset(name, block=32, warm_up=0.5, remainder=True)
    assert (changed.block, changed.range_starts) == (32, (0.0, 0.5))
    assert changed.candidates[-1] == sparse.with_means()


def test_names_of_both_mean_the_family_where_a_density_is_given() -> None:
    assert AccelPlan.preset("radial").candidates[-1].options == (("sink", 1),)
    assert AccelPlan.preset("radial", density=0.3).candidates[-1].options == ()
    assert AccelPlan.preset("draft", density=0.1).candidates[-1] == Candidate(
        "pooled", 0.1, (("budget", "map"), ("order", "tile:1x8x16"), ("parts", 1))
    )


@pytest.mark.parametrize(
    ("name", "value"), [("validated", {"psnr": math.inf}), ("objective", {"x": object()})]
)
def test_notes_must_be_json_when_the_plan_is_made(name: str, value: dict) -> None:
    with pytest.raises(PlanError, match=f"plan: {name}: expected finite JSON values, got"):
        make(**{name: value})
