"""A tiny Wan pipeline whose attention matters, at a size that has several blocks and no round number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import nn

from dit_accel.calibration import stages
from dit_accel.calibration.cost import Latency


@pytest.fixture(scope="session")
def lively_wan_dir(tiny_wan_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny pipeline with weights large enough that every head changes the frames."""
    pipe = WanPipeline.from_pretrained(tiny_wan_dir)
    torch.manual_seed(0)
    for parameter in pipe.transformer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    directory = tmp_path_factory.mktemp("lively-wan")
    pipe.save_pretrained(directory)
    return directory


@pytest.fixture
def pipe(lively_wan_dir: Path) -> WanPipeline:
    """The pipeline, without its progress bar."""
    pipe = WanPipeline.from_pretrained(lively_wan_dir)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def arguments() -> dict[str, Any]:
    """Arguments of `calibrate`: 2 frames x 9 x 11 = 198 tokens are four blocks of 64, the last one short."""
    return {
        "prompts": ["a red circle moves left"],
        "height": 144,
        "width": 176,
        "num_frames": 5,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "progress": False,
    }


@pytest.fixture(scope="module")
def density_clock():
    """Latency as on large models, proportional to density: at 198 tokens launching is all that takes time."""

    def measure(query, key, value, grid, candidates, original, **options):
        return Latency(torch.tensor([0.01 + c.density for c in candidates], dtype=torch.float64), 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "measure_latency", measure)
        yield
