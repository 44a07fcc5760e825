"""The training script makes a model that loads, is fixed by its seed, and continues after a kill."""

import subprocess
import sys
from pathlib import Path

import torch
import train_demo_model
from diffusers import WanPipeline
from safetensors.torch import load_file

from dit_accel.pipelines import demo
from dit_accel.pipelines.demo.architecture import build_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPT = "a red triangle moves down right over a checkered background"
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
    rope = build_transformer().rope
    some = train_demo_model.FrameRope(rope)
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


def test_labels_say_what_the_pixels_show() -> None:
    """Each token's label against the colour that is really drawn there."""
    prompts = ["a red circle moves left and a blue star moves up over a dotted background", PROMPT]
    drawn = [
        train_demo_model.render_owned(
            train_demo_model.parse(prompt), frames=9, height=96, width=112, seed=5 + n
        )
        for n, prompt in enumerate(prompts)
    ]
    labels = train_demo_model.token_labels(prompts, torch.stack([owner for _, owner in drawn]), (2, 8, 8))
    assert labels.shape == (2, 5, 12, 14, 4)
    backgrounds, shapes, colours, directions = labels.unbind(-1)
    assert [b.unique().tolist() for b in backgrounds] == [[2], [1]]
    for number, (video, _) in enumerate(drawn):
        centres = video[::2, 4::8, 4::8]
        red = (centres[..., 0] > 0.35) & (centres[..., 1] < 0.3) & (centres[..., 2] < 0.3)
        says_red = colours[number] == 1
        assert (red == says_red).float().mean() > 0.97
        assert bool(says_red.any())
        assert ((shapes[number] > 0) == (directions[number] > 0)).all()
    assert set(shapes[1].unique().tolist()) == {0, 3}
    assert set(directions[1].unique().tolist()) == {0, 8}


def test_the_reader_learns_through_the_block_it_reads() -> None:
    torch.manual_seed(0)
    block = torch.nn.Linear(4, 16)
    reader = train_demo_model.Reader(block, 16)
    labels = torch.randint(0, 4, (2, 6, 4))
    block(torch.randn(2, 6, 4))
    loss = reader.loss(labels)
    # untrained, each kind costs about the logarithm of its number of answers
    expected = sum(torch.tensor(float(kinds)).log() for kinds in train_demo_model.Reader.KINDS)
    assert abs(loss.item() - expected.item()) < 1.0
    loss.backward()
    assert block.weight.grad.abs().sum() > 0
