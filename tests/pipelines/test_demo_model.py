"""The shipped demo model is what the documentation says, and generates."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from dit_accel.pipelines import demo, load_demo
from dit_accel.pipelines.demo import architecture

MODEL = Path(demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = load_demo(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_parts_are_the_real_classes(pipe: WanPipeline) -> None:
    assert type(pipe) is WanPipeline
    assert type(pipe.transformer) is WanTransformer3DModel
    assert type(pipe.vae) is AutoencoderKLWan
    assert type(pipe.text_encoder) is UMT5EncoderModel
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    config = pipe.transformer.config
    assert config.attention_head_dim == 64
    assert config.num_layers >= 6
    assert config.num_attention_heads >= 4


def test_default_generation_has_enough_tokens_for_attention_to_dominate(pipe: WanPipeline) -> None:
    frames = (demo.DEFAULTS["num_frames"] - 1) // pipe.vae.config.scale_factor_temporal + 1
    patch = pipe.transformer.config.patch_size[1] * pipe.vae.config.scale_factor_spatial
    tokens = frames * (demo.DEFAULTS["height"] // patch) * (demo.DEFAULTS["width"] // patch)
    assert 8_000 <= tokens <= 12_000
    assert 20 <= demo.DEFAULTS["num_inference_steps"] <= 30
    assert demo.DEFAULTS["guidance_scale"] > 1


def test_files_are_small_safetensors() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    assert len(weights) == 3
    assert all(path.stat().st_size <= 16 * 2**20 for path in files)
    assert sum(path.stat().st_size for path in files) <= 40 * 2**20
    assert all(t.isfinite().all() for path in weights for t in load_file(path).values())


def test_latent_statistics_were_measured() -> None:
    config = json.loads((MODEL / "vae" / "config.json").read_text())
    assert len(config["latents_std"]) == architecture.LATENT_CHANNELS
    assert all(0.05 < value < 100 and value != 1.0 for value in config["latents_std"])


def test_short_prompt_embeddings_equal_the_pipeline_s(pipe: WanPipeline) -> None:
    prompts = ["a red circle moves left over a striped background", ""]
    theirs, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=architecture.TEXT_TOKENS
    )
    with torch.no_grad():
        ours = architecture.encode_prompts(pipe, prompts)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_generates_small_videos_by_seed(pipe: WanPipeline) -> None:
    def generate(prompt: str) -> torch.Tensor:
        return pipe(
            prompt, height=48, width=80, num_frames=5, num_inference_steps=2, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).frames[0]  # fmt: skip

    first = generate("a red circle moves left over a striped background")
    assert first.shape == (5, 3, 48, 80)
    assert bool(first.isfinite().all())
    assert torch.equal(first, generate("a red circle moves left over a striped background"))
    assert not torch.equal(first, generate("a white star moves up over a dotted background"))


def test_vae_keeps_what_the_scorer_reads(pipe: WanPipeline) -> None:
    from dit_accel.pipelines.demo.world import parse, render

    prompt = "a purple star moves down right over a checkered background"
    video = render(parse(prompt), frames=9, height=160, width=176, seed=5)
    with torch.no_grad():
        latents = pipe.vae.encode(video.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mode()
        again = (pipe.vae.decode(latents).sample[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    psnr = -10 * float((again - video).square().mean().log10())
    assert psnr > 24
    assert all(demo.score(again, prompt).values())


def test_missing_files_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"demo model: expected model_index.json in .*train_demo_model.py"
    ):
        load_demo()
