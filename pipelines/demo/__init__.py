"""The demo model: a real WanPipeline trained on a procedurally drawn world and shipped with the package.

``load_demo()`` loads it, ``PROMPTS`` and ``DEFAULTS`` say how it is used, ``score`` tells whether frames show a
prompt.
"""

import random
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import WanPipeline

__all__ = ["DEFAULTS", "PROMPTS", "load_demo", "prompts", "score"]

DEFAULTS: dict[str, Any] = {
    "height": 160,
    "width": 192,
    "num_frames": 33,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
}
# Where the transformer's 128 positions along each axis end.
MOST = {"height": 1024, "width": 1024, "num_frames": 255}


def prompts(count: int, seed: int) -> list[str]:
    """The first ``count`` prompts of the endless list that ``seed`` names; each is different."""
    from dit_accel.pipelines.demo.world import sample_scene

    rng, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        found[sample_scene(rng).prompt] = None
    return list(found)


def __getattr__(name: str) -> Any:
    if name == "PROMPTS":  # drawn on first use: the world needs torch, this module does not
        return {"calibration": prompts(2, seed=1), "held_out": prompts(64, seed=2)}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_demo(dtype: "torch.dtype | None" = None, device: str = "cpu") -> "WanPipeline":
    """Load the shipped demo model as an ordinary WanPipeline.

    Args:
        dtype: of the transformer and text encoder, and of the VAE; bfloat16 when None.
        device: a torch device string.

    Raises:
        FileNotFoundError: the installation carries no model files.
    """
    import torch
    from diffusers import WanPipeline

    directory = resources.files(__name__) / "model"
    if not (directory / "model_index.json").is_file():
        raise FileNotFoundError(
            f"demo model: expected model_index.json in {directory}, found none; reinstall dit-accel, or train "
            "the model with examples/train_demo_model.py and copy its model/ directory there"
        )
    pipe = WanPipeline.from_pretrained(str(directory), dtype=dtype or torch.bfloat16)
    return pipe.to(device)


def score(frames: "torch.Tensor", prompt: str) -> dict[str, bool]:
    """Whether raw frames show what a prompt of the demo world says.

    Args:
        frames: float video [frames, height, width, 3] in [0, 1].
        prompt: a sentence of the demo world.

    Returns:
        ``{"shape", "colour", "direction", "background"}``, each True only if it holds for all shapes asked for.
    """
    from dit_accel.pipelines.demo.scorer import score as score_frames

    return score_frames(frames, prompt)
