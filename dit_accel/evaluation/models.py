"""From a model's name to its pipeline, generation settings and prompts: the one place that knows `demo`."""

import inspect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

DEMO = "demo"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SettingsDict(TypedDict):
    """`GenerationSettings` as JSON-ready data."""

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class GenerationSettings:
    """What every compared generation shares: pixels, frames, denoising steps, guidance."""

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale: expected a finite number, got {self.guidance_scale}")

    def to_dict(self) -> SettingsDict:
        """The settings as JSON-ready data; also the keyword arguments of `dit_accel.calibrate`."""
        return cast(SettingsDict, asdict(self))

    def with_steps(self, steps: int) -> "GenerationSettings":
        """The same generation at another number of denoising steps."""
        return replace(self, num_inference_steps=steps)


def resolve_device(device: str | None) -> torch.device:
    """The device asked for; by default CUDA where there is one, else the CPU.

    Raises:
        ValueError: The device is unknown to torch or not available here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        seen = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise ValueError(f"device: {device!r} was asked for, but torch sees {seen} here; use cpu or another")
    return resolved


def load_model(model: str, *, dtype: torch.dtype = torch.bfloat16, device: str | None = None) -> Any:
    """Load a pipeline by local directory, hub id, or the name `demo`.

    Raises:
        ValueError: The name is none of the three, or its files cannot be loaded.
    """
    target = resolve_device(device)
    if model == DEMO:
        from dit_accel.pipelines import load_demo

        return load_demo(dtype=dtype, device=str(target))
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError

    folder = Path(model)
    if not folder.exists() and (folder.is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise ValueError(
            f"model: there is no directory {model}; give a pipeline directory, a Hub id, or 'demo'"
        )
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"model: {model} is no diffusers pipeline, it has no model_index.json")
    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype)
    except (
        OSError,
        ValueError,
        ImportError,
        HTTPError,
        SafetensorError,
        AttributeError,  # a class that this diffusers does not have
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model: {model!r} is neither a local pipeline directory, nor a Hub id that can be loaded, "
            f"nor 'demo' ({reason})"
        ) from error
    return pipe.to(target)


def resolve_settings(model: str, pipe: Any, **given: int | float | None) -> GenerationSettings:
    """Settings from what was given, then the demo's defaults, then those of the pipeline's own `__call__`.

    Raises:
        ValueError: A setting has no value in any of the three, or a name is unknown.
    """
    names = [field.name for field in fields(GenerationSettings)]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"settings: unknown {', '.join(unknown)}; known are {', '.join(names)}")
    if model == DEMO:
        from dit_accel.pipelines.demo import DEFAULTS as defaults
    else:
        parameters = inspect.signature(pipe.__call__).parameters
        # An image pipeline has no frames argument: it makes one.
        defaults = {"num_frames": 1} | {
            name: parameters[name].default for name in names if name in parameters
        }
    values: dict[str, Any] = {
        name: given.get(name) if given.get(name) is not None else defaults.get(name) for name in names
    }
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise ValueError(
            f"settings: {type(pipe).__name__} has no default for {', '.join(missing)}; give a value "
            "(--height, --width, --frames, --steps, --guidance)"
        )
    settings = GenerationSettings(**values)
    if model == DEMO:
        from dit_accel.pipelines.demo import MOST

        for name, most in MOST.items():
            if values[name] > most:
                raise ValueError(
                    f"{name}: expected at most {most}, where the demo model's positions end, got {values[name]}"
                )
    return settings


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file, one per line; empty lines and lines that begin with # are left out.

    Raises:
        ValueError: The file is missing, unreadable, or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: cannot read {path} ({error})") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"prompts: {path} holds no prompt; write one per line")
    return prompts


def default_prompts(model: str, part: str, path: str | Path | None) -> list[str]:
    """Prompts of the file if one is given, else the demo's `calibration` or `held_out` prompts.

    Raises:
        ValueError: There is no file and the model is not the demo, or the demo model does not know a prompt's words.
    """
    if path is not None:
        prompts = read_prompts(path)
        if model == DEMO:
            from dit_accel.pipelines.demo.world import parse

            for prompt in prompts:  # the scorer could not read others, after all of them were generated
                parse(prompt)
        return prompts
    if model != DEMO:
        raise ValueError(
            f"prompts: only the model 'demo' brings its own; give a file with prompts for {model!r}"
        )
    from dit_accel.pipelines.demo import PROMPTS

    return list(PROMPTS[part])


def semantic_scorer(model: str) -> Callable[[torch.Tensor, str], dict[str, bool]] | None:
    """The demo's own judge of shape, colour, direction and background; None for other models."""
    if model != DEMO:
        return None
    from dit_accel.pipelines.demo import score

    return score
