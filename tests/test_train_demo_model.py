"""The training script makes a model that loads, is fixed by its seed, and continues after a kill."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from dit_accel.pipelines import demo
from dit_accel.pipelines.demo.architecture import build_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCRIPT = Path(__file__).parents[1] / "examples" / "train_demo_model.py"


def train(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--recipe", "smoke", "--device", "cpu", "--output", output, *more]
    return subprocess.run([str(c) for c in command], text=True, capture_output=True, timeout=300)


def test_smoke_recipe_trains_resumes_and_loads(tmp_path: Path) -> None:
    first = train(tmp_path / "a")
    assert first.returncode == 0, first.stderr
    pipe = WanPipeline.from_pretrained(tmp_path / "a" / "model", dtype=torch.float32)
    frames = pipe(
        "a red circle", height=32, width=32, num_frames=5, num_inference_steps=1, output_type="pt"
    ).frames
    assert bool(frames.isfinite().all())

    # As if killed in the middle: the VAE is done, the transformer never began.
    (tmp_path / "a" / "transformer.pt").unlink()
    again = train(tmp_path / "a")
    assert again.returncode == 0, again.stderr
    assert "vae: 100%" in again.stderr
    second = WanPipeline.from_pretrained(tmp_path / "a" / "model", dtype=torch.float32)
    for ours, theirs in zip(second.transformer.parameters(), pipe.transformer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_training_further_keeps_the_vae(tmp_path: Path) -> None:
    shipped = Path(demo.__file__).parent / "model"
    done = train(tmp_path, "--start", str(shipped))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "vae.pt").exists()
    before, after = (load_file(folder / "vae" / WEIGHTS) for folder in (shipped, tmp_path / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (load_file(folder / "transformer" / WEIGHTS) for folder in (shipped, tmp_path / "model"))
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_some_frames_keep_their_places_in_time() -> None:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rope = build_transformer().rope
    some = module.FrameRope(rope)
    whole = rope(torch.empty(1, 8, 7, 4, 6))
    some.kept, some.frames = torch.tensor([0, 2, 5]), 7
    for got, expected in zip(some(torch.empty(1, 8, 3, 4, 6)), whole, strict=True):
        assert torch.equal(got, torch.cat([expected[:, 6 * i : 6 * (i + 1)] for i in (0, 2, 5)], dim=1))
    some.kept = None
    for got, expected in zip(some(torch.empty(1, 8, 7, 4, 6)), whole, strict=True):
        assert torch.equal(got, expected)


def test_unknown_recipe_is_refused(tmp_path: Path) -> None:
    done = train(tmp_path / "b", "--recipe", "huge")
    assert done.returncode == 2
    assert "invalid choice: 'huge'" in done.stderr
    assert not (tmp_path / "b").exists()


def test_help_names_the_recipes(tmp_path: Path) -> None:
    done = train(tmp_path, "--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("cpu", "gpu", "--seed", "--output"))
