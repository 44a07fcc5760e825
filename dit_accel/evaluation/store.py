"""Finished generations on disk, so that a killed evaluation goes on where it was."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dit_accel.evaluation.generate import Generation


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name, then rename: a killed process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def slug(name: str) -> str:
    """A file-system-safe name that stays different for different variants."""
    safe = re.sub(r"[^A-Za-z0-9.@=]+", "-", name).strip("-")
    if safe == name:
        return safe
    return f"{safe[-60:].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


class GenerationStore:
    """Generations by (prompt number, variant name); in memory, and in a directory where there is one."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._held: dict[tuple[int, str], Generation] = {}

    def _path(self, prompt: int, variant: str) -> Path | None:
        return self.directory / f"{prompt:03d}-{slug(variant)}.safetensors" if self.directory else None

    def get(self, prompt: int, variant: str) -> Generation | None:
        """The generation if it was finished, by this process or by an earlier one."""
        if (prompt, variant) in self._held:
            return self._held[prompt, variant]
        path = self._path(prompt, variant)
        if path is None or not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            return None  # unreadable: made again, at the price of one generation
        seconds, density = tensors["seconds_density"].tolist()
        found = Generation(tensors["frames"], tensors["latents"], seconds, None if density < 0 else density)
        self._held[prompt, variant] = found
        return found

    def put(self, prompt: int, variant: str, generation: Generation) -> None:
        """Keep a finished generation."""
        self._held[prompt, variant] = generation
        path = self._path(prompt, variant)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        density = -1.0 if generation.density is None else generation.density
        save_file(
            {
                "frames": generation.frames,
                "latents": generation.latents.contiguous(),
                "seconds_density": torch.tensor([generation.seconds, density], dtype=torch.float64),
            },
            partial,
        )
        partial.replace(path)

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        if self.directory is not None:
            for path in self.directory.glob("*.safetensors"):
                path.unlink()

    def drop(self, prompt: int) -> None:
        """Forget the generations of a prompt."""
        for key in [key for key in self._held if key[0] == prompt]:
            del self._held[key]
        if self.directory is not None:
            for path in self.directory.glob(f"{prompt:03d}-*.safetensors"):
                path.unlink()
