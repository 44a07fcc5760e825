"""The comparison itself: order, seeds, JSON, what a killed run leaves, attention timed alone."""

import contextlib
import json

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from dit_accel.evaluation.attention_time import attention_watched
from dit_accel.evaluation.generate import dense_attention, generate, generate_variant
from dit_accel.evaluation.models import (
    GenerationSettings,
    load_model,
    read_prompts,
    resolve_device,
    resolve_settings,
)
from dit_accel.evaluation.result import Evaluation
from dit_accel.evaluation.run import evaluate
from dit_accel.evaluation.timing import dense_backend, pipeline_digest
from dit_accel.evaluation.variants import DENSE, Variant, parse_variant, parse_variants
from dit_accel.switch import stats

SETTINGS = GenerationSettings(height=48, width=80, num_frames=5, num_inference_steps=2, guidance_scale=3.0)
PROMPTS = [
    "a red circle moves left",
    "a blue square moves up",
    "a red square moves left",
    "a blue circle moves up",
]

FIELDS = {
    "name": str,
    "seconds_dense_p50": float,
    "seconds_p50": float,
    "speedup": float,
    "psnr_mean": float,
    "psnr_min": float,
    "ssim_mean": float,
    "latent_rel_l2": float,
    "density_mean": float | None,
    "semantic": float | None,
    "attention_speedup": float | None,
    "attention_seconds": float | None,
    "skipped_share": float | None,
    "cache_bytes": int | None,
    "guarded_heads": float | None,
    "identical_to_dense": bool,
}


@pytest.fixture(scope="module")
def pipe(tiny_wan_dir):
    return load_model(str(tiny_wan_dir), dtype=torch.float32, device="cpu")


def _score(frames, prompt):
    assert frames.shape == (5, 48, 80, 3)
    return {"colour": "red" in prompt, "shape": True}


@pytest.fixture(scope="module")
def evaluation(pipe, tmp_path_factory) -> tuple[dict, Evaluation]:
    """One comparison that most tests below read."""
    folder = tmp_path_factory.mktemp("evaluation")
    variants = parse_variants("dense,preset:window@0.3:block=8,diffusers:first_block@0.1")
    result = evaluate(
        pipe,
        variants,
        PROMPTS,
        SETTINGS,
        model="tiny",
        seed=3,
        scorer=_score,
        output_dir=folder,
        progress=False,
    )
    return json.loads((folder / "evaluation.json").read_text()), result


def test_a_digest_tells_weights_schedulers_and_adapters_apart(wan_pipeline):
    pipe = wan_pipeline()
    found = [pipeline_digest(pipe)]
    assert pipeline_digest(wan_pipeline()) == found[0]
    layer = pipe.transformer.blocks[0].attn1.to_q
    # What peft keeps on the layers that it adapts; diffusers changes these and no weights.
    for name, value in (
        ("scaling", {"style": 1.0}),
        ("active_adapters", ["style"]),
        ("disable_adapters", False),
    ):
        setattr(layer, name, value)
    found.append(pipeline_digest(pipe))
    layer.scaling["style"] = 0.4
    found.append(pipeline_digest(pipe))
    layer.disable_adapters = True
    found.append(pipeline_digest(pipe))
    layer.active_adapters = ["other"]
    found.append(pipeline_digest(pipe))
    with torch.no_grad():
        layer.weight.view(-1)[0] += 1
    found.append(pipeline_digest(pipe))
    pipe.scheduler = type(pipe.scheduler)(shift=4.0)
    found.append(pipeline_digest(pipe))
    assert len(set(found)) == len(found) == 7


def test_a_generation_is_the_pipelines_own(pipe):
    made = generate(pipe, PROMPTS[0], SETTINGS, seed=5)
    arguments = SETTINGS.to_dict() | {"prompt": PROMPTS[0], "output_type": "np"}
    frames = pipe(generator=torch.Generator().manual_seed(5), **arguments).frames[0]
    latents = pipe(generator=torch.Generator().manual_seed(5), **arguments | {"output_type": "latent"}).frames
    assert torch.equal(made.frames, torch.from_numpy(frames))
    assert torch.equal(made.latents, latents)
    assert made.seconds > 0


def test_on_step_is_called_at_every_step(pipe):
    calls = []
    generate(pipe, PROMPTS[0], SETTINGS.with_steps(3), seed=0, on_step=lambda: calls.append(1))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("name", "density"),
    [("dense", 1.0), ("preset:dense", 1.0), ("preset:skip", 0.0), ("diffusers:first_block", None)],
)
def test_density_of_a_variant(pipe, name, density):
    assert generate_variant(pipe, parse_variant(name), PROMPTS[0], SETTINGS, seed=0).density == density


def test_evaluation_json_has_the_promised_fields(evaluation):
    data, _ = evaluation
    assert data["format_version"] == 1
    assert data["complete"] is True
    assert data["processes"] == 1
    assert data["prompts"] == PROMPTS
    assert data["settings"] == SETTINGS.to_dict()
    assert data["dense_backend"].startswith("SDPA (CPU")
    assert {"cpu", "gpu", "cores", "torch", "triton", "diffusers", "dtype"} <= set(data["machine"])
    assert data["machine"]["dtype"] == "float32"
    assert 0 < data["attention_share"] < 1
    assert [row["name"] for row in data["variants"]] == [
        "dense",
        "preset:window@0.3:block=8",
        "diffusers:first_block@0.1",
    ]
    for row in data["variants"]:
        for name, kind in FIELDS.items():
            assert isinstance(row[name], kind), name
    assert len(data["runs"]) == len(PROMPTS) * 3


def test_summaries_follow_from_the_runs(evaluation):
    data, _ = evaluation
    rows = {row["name"]: row for row in data["variants"]}
    for name, row in rows.items():
        runs = [run for run in data["runs"] if run["variant"] == name]
        seconds = sorted(run["seconds"] for run in runs)
        assert row["seconds_p50"] == pytest.approx((seconds[1] + seconds[2]) / 2)
        assert row["speedup"] == pytest.approx(rows["dense"]["seconds_p50"] / row["seconds_p50"])
        assert row["psnr_min"] == min(run["psnr"] for run in runs) <= row["psnr_mean"]
        assert row["semantic"] == 0.75
        assert row["semantic_parts"] == {"colour": 0.5, "shape": 1.0}
    assert (rows["dense"]["psnr_min"], rows["dense"]["latent_rel_l2"]) == (100.0, 0.0)
    assert rows["preset:window@0.3:block=8"]["latent_rel_l2"] > 0
    assert 0.2 < rows["preset:window@0.3:block=8"]["density_mean"] < 1
    assert rows["diffusers:first_block@0.1"]["density_mean"] is None
    assert rows["diffusers:first_block@0.1"]["attention_speedup"] is None
    assert rows["dense"]["attention_speedup"] == 1.0
    assert rows["dense"]["attention_seconds"] == data["dense_attention"]["seconds"]
    assert data["attention_share"] == data["dense_attention"]["share"]
    seconds = {name: row["attention_seconds"] for name, row in rows.items()}
    sparse = rows["preset:window@0.3:block=8"]
    assert sparse["attention_speedup"] == pytest.approx(seconds["dense"] / seconds[sparse["name"]])
    assert seconds["diffusers:first_block@0.1"] is None
    assert (sparse["skipped_share"], sparse["cache_bytes"], sparse["identical_to_dense"]) == (0.0, 0, False)
    assert rows["diffusers:first_block@0.1"]["cache_bytes"] > 0


def test_variants_rotate_and_share_the_seed(pipe, monkeypatch):
    order = []

    def record(pipe, variant, prompt, settings, *, seed, on_step):
        order.append((settings.num_inference_steps, prompt, variant.name, seed))
        return generate_variant(pipe, variant, prompt, settings, seed=seed, on_step=on_step)

    monkeypatch.setattr("dit_accel.evaluation.run.generate_variant", record)
    variants = parse_variants("dense,preset:window@0.5,preset:dense")
    evaluate(
        pipe,
        variants,
        PROMPTS[:2],
        SETTINGS,
        model="tiny",
        seed=7,
        warmup_steps=1,
        attention_steps=0,
        progress=False,
    )
    names = [variant.name for variant in variants]
    assert order[:3] == [(1, PROMPTS[0], name, 7) for name in names]
    assert order[3:6] == [(2, PROMPTS[0], name, 7) for name in names]
    assert order[6:] == [(2, PROMPTS[1], name, 8) for name in (names[1], names[2], names[0])]


def test_only_the_pictured_prompts_keep_their_frames(evaluation):
    _, result = evaluation
    assert result.pictured() == [0, 1, 2]
    assert result.store.get(2, "dense").frames.shape == (5, 48, 80, 3)
    with pytest.raises(ValueError, match="prompt 3, variant 'dense': its frames were dropped"):
        result.store.get(3, "dense")
    assert not list(result.store.directory.glob("003-*"))


def test_a_killed_evaluation_goes_on_where_it_was(pipe, tmp_path, capsys):
    variants = parse_variants("dense,preset:window@0.3:block=8")
    forwards = []

    def run(stop_after: int | None = None, **changes):
        forwards.clear()

        def count(module, args):
            forwards.append(1)
            if len(forwards) == stop_after:
                raise KeyboardInterrupt

        hook = pipe.transformer.register_forward_pre_hook(count)
        options = {"model": "tiny", "warmup_steps": 1, "attention_steps": 0, "progress": False} | changes
        try:
            return evaluate(pipe, variants, PROMPTS[:2], SETTINGS, output_dir=tmp_path, **options)
        finally:
            hook.remove()

    # Guidance makes 2 forwards a step: 4 of warm-up, then 4 a generation. The third one is hit half-way.
    with pytest.raises(KeyboardInterrupt):
        run(stop_after=14)
    partial = json.loads((tmp_path / "evaluation.json").read_text())
    assert (partial["complete"], len(partial["runs"])) == (False, 2)

    result = run()
    assert len(forwards) == 4 + 2 * 4
    assert result.to_dict()["complete"] is True
    assert result.processes == 2
    assert [run.seconds for run in result.runs[:2]] == [run["seconds"] for run in partial["runs"]]
    assert result.runs[2].psnr == 100.0 or result.runs[3].psnr == 100.0

    again = run()
    assert again.runs == result.runs
    assert again.processes == 2  # this one generated nothing
    assert not forwards
    before = (tmp_path / "evaluation.json").read_text()
    run(seed=1)
    assert len(forwards) == 4 + 4 * 4
    assert (tmp_path / "evaluation.previous.json").read_text() == before
    assert "another comparison was there; its numbers are in evaluation.previous.json now" in (
        capsys.readouterr().err
    )


def test_generations_are_kept_until_their_numbers_are(pipe, tmp_path, monkeypatch):
    variants = parse_variants("dense,preset:window@0.5")
    options = {"model": "tiny", "warmup_steps": 1, "attention_steps": 0, "progress": False}
    save = Evaluation.save

    def full(self, folder):
        if len(self.runs) == 8:
            raise OSError("no space left")
        save(self, folder)

    monkeypatch.setattr(Evaluation, "save", full)
    with pytest.raises(OSError, match="no space left"):
        evaluate(pipe, variants, PROMPTS, SETTINGS, output_dir=tmp_path, **options)
    monkeypatch.undo()
    forwards = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        result = evaluate(pipe, variants, PROMPTS, SETTINGS, output_dir=tmp_path, **options)
    finally:
        hook.remove()
    assert not forwards
    assert len(result.runs) == 8
    assert [result.store.has(prompt, "dense") for prompt in range(4)] == [True, True, True, False]


def test_dense_attention_that_is_asked_for_later_is_kept_too(pipe, tmp_path):
    variants = parse_variants("dense,preset:window@0.5")
    options = {"model": "tiny", "warmup_steps": 1, "progress": False, "output_dir": tmp_path}
    evaluate(pipe, variants, PROMPTS[:1], SETTINGS, attention_steps=0, **options)
    assert json.loads((tmp_path / "evaluation.json").read_text())["dense_attention"] is None
    first = evaluate(pipe, variants, PROMPTS[:1], SETTINGS, attention_steps=2, **options)
    kept = json.loads((tmp_path / "evaluation.json").read_text())["dense_attention"]
    assert kept["seconds"] == first.dense_attention.seconds > 0
    again = evaluate(pipe, variants, PROMPTS[:1], SETTINGS, attention_steps=2, **options)
    assert again.dense_attention == first.dense_attention


def test_a_decoder_that_begins_to_tile_is_another_pipeline(pipe):
    before = pipeline_digest(pipe)
    pipe.vae.enable_tiling(tile_sample_min_height=32)
    try:
        tiled = pipeline_digest(pipe)
        pipe.vae.enable_tiling(tile_sample_min_height=64)
        assert len({before, tiled, pipeline_digest(pipe)}) == 3
    finally:
        pipe.vae.disable_tiling()
    assert pipeline_digest(pipe) == before


def test_a_broken_report_says_what_to_do(pipe, tmp_path):
    (tmp_path / "evaluation.json").write_text('{"fingerprint": ')
    with pytest.raises(
        ValueError, match=r"evaluation.json: expected an evaluation, got broken JSON .*; delete the file"
    ):
        evaluate(pipe, [DENSE], PROMPTS[:1], SETTINGS, model="tiny", output_dir=tmp_path, progress=False)


def test_what_diverges_is_as_far_as_black(pipe, tmp_path):
    """A variant whose velocities are not finite is compared, named and does not stop the others."""

    @contextlib.contextmanager
    def diverging(pipe):
        hook = pipe.transformer.register_forward_hook(lambda *call: (call[-1][0] * torch.nan,))
        try:
            yield
        finally:
            hook.remove()

    broken = Variant("broken", diverging, None, "broken")
    options = {"model": "tiny", "warmup_steps": 1, "attention_steps": 0, "progress": False}
    with pytest.warns(UserWarning, match="prompt 1, variant 'broken': what it generated is not finite"):
        result = evaluate(pipe, [DENSE, broken], PROMPTS[:1], SETTINGS, output_dir=tmp_path, **options)
    row = result.summary("broken")
    assert row["latent_rel_l2"] == pytest.approx(1.0)
    assert 0 < row["psnr_mean"] < 20
    assert json.loads((tmp_path / "evaluation.json").read_text())["complete"] is True
    with (
        diverging(pipe),
        pytest.raises(ValueError, match="prompt 1: expected finite frames of the dense generation"),
    ):
        evaluate(pipe, [DENSE], PROMPTS[:1], SETTINGS, **options)


def test_a_pipeline_that_needs_an_image_is_refused_before_it_runs(pipe):
    class FromImage:
        transformer = pipe.transformer
        _execution_device = pipe._execution_device

        def __call__(self, image, prompt=None, height=8, width=8, num_frames=1, **others):
            raise AssertionError

    with pytest.raises(
        ValueError, match="alone, got FromImage, which also needs image; dit_accel.enable takes"
    ):
        generate(FromImage(), "x", SETTINGS, seed=0)


def test_a_pipeline_without_transformer_is_refused():
    with pytest.raises(
        ValueError, match="expected a diffusers transformer or a pipeline that has one, got dict"
    ):
        evaluate({}, [DENSE], PROMPTS, SETTINGS, model="none")


def test_attention_is_part_of_the_transformer_and_that_of_a_generation(pipe):
    attention, transformer = dense_attention(pipe, PROMPTS[0], SETTINGS, seed=0)
    assert 0 < attention < transformer
    made = generate_variant(pipe, parse_variant("preset:pooled@0.5"), PROMPTS[0], SETTINGS, seed=0)
    assert 0 < made.attention_seconds < made.seconds
    for name in ("dense", "preset:dense", "preset:dense:cache=cg-taylor"):
        assert (
            generate_variant(pipe, parse_variant(name), PROMPTS[0], SETTINGS, seed=0).attention_seconds
            is None
        )


def test_every_attention_call_is_watched_and_no_longer(pipe):
    with parse_variant("preset:pooled@0.5").apply(pipe):
        with attention_watched(pipe) as spans:
            generate(pipe, PROMPTS[0], SETTINGS, seed=0)
        found = stats(pipe)
        assert spans.count == found["sparse_calls"] + found["dense_calls"] > 0
        generate(pipe, PROMPTS[0], SETTINGS, seed=0)
    assert spans.count == found["sparse_calls"] + found["dense_calls"]


def test_the_users_progress_bar_settings_survive(pipe):
    pipe.set_progress_bar_config(desc="mine", disable=True)
    evaluate(
        pipe, [DENSE], PROMPTS[:1], SETTINGS, model="tiny", warmup_steps=1, attention_steps=0, progress=False
    )
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": [parse_variant("preset:dense")]}, "one of them 'dense', got"),
        ({"variants": [DENSE, DENSE]}, "expected different names"),
        ({"prompts": []}, "prompts: expected at least one"),
        ({"warmup_steps": 0}, "expected warmup_steps of at least 1"),
    ],
)
def test_impossible_comparisons_are_refused(pipe, changes, message):
    arguments = {"variants": [DENSE], "prompts": PROMPTS, "settings": SETTINGS, "model": "tiny"} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, **arguments)


def test_the_dense_backend_is_named(pipe):
    assert dense_backend(pipe.transformer).startswith("SDPA (CPU")
    before, _ = _AttentionBackendRegistry.get_active_backend()
    pipe.transformer.set_attention_backend("_native_math")
    try:
        assert dense_backend(pipe.transformer) == "diffusers _native_math"
    finally:
        pipe.transformer.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(before)  # which the line above leaves as it is


def test_settings_come_from_the_arguments_then_the_pipeline(pipe):
    settings = resolve_settings("tiny", pipe, height=32, guidance_scale=0.0)
    assert settings == GenerationSettings(32, 832, 81, 50, 0.0)
    with pytest.raises(ValueError, match="settings: unknown size; known are height, width"):
        resolve_settings("tiny", pipe, size=3)
    with pytest.raises(ValueError, match="num_frames: expected a positive number, got 0"):
        resolve_settings("tiny", pipe, num_frames=0)


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# two\na red circle\n\n  a blue star  \n")
    assert read_prompts(path) == ["a red circle", "a blue star"]
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no prompt; write one per line"):
        read_prompts(path)
    with pytest.raises(ValueError, match="cannot read"):
        read_prompts(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("name", "message"),
    [("no-device", "expected cpu, cuda or cuda:N"), ("cuda:99", "torch sees no CUDA device|cuda")],
)
def test_unknown_devices_are_refused(name, message):
    if name == "cuda:99" and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(ValueError, match=message):
        resolve_device(name)
