"""Finished generations on disk, so that a killed evaluation goes on where it was."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dit_accel.evaluation.files import slug
from dit_accel.evaluation.generate import Generation

# Changes with what a file of the store holds.
STORE_VERSION = 4


class GenerationStore:
    """Generations by (prompt number, variant name): in a directory, or in memory where there is none."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._held: dict[tuple[int, str], Generation] = {}

    def has(self, prompt: int, variant: str) -> bool:
        """Whether the generation was finished, by this process or by an earlier one."""
        path = self._path(prompt, variant)
        return (prompt, variant) in self._held if path is None else path.is_file()

    def get(self, prompt: int, variant: str) -> Generation:
        """A finished generation.

        Raises:
            ValueError: There is none, or its file cannot be read.
        """
        path = self._path(prompt, variant)
        if not self.has(prompt, variant):
            raise ValueError(f"prompt {prompt}, variant {variant!r}: its frames were dropped, or never made")
        if path is None:
            return self._held[prompt, variant]
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a generation, got a broken file; delete it") from error
        seconds, *others = tensors["numbers"].tolist()
        density, skipped, held, guarded, attention = (None if math.isnan(n) else n for n in others)
        return Generation(
            frames=tensors["frames"],
            latents=tensors["latents"],
            seconds=seconds,
            density=density,
            skipped_share=skipped,
            cache_bytes=None if held is None else int(held),
            guarded_heads=None if guarded is None else int(guarded),
            attention_seconds=attention,
        )

    def put(self, prompt: int, variant: str, generation: Generation) -> None:
        """Keep a finished generation."""
        path = self._path(prompt, variant)
        if path is None:
            self._held[prompt, variant] = generation
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        made = generation
        numbers = (
            *(made.seconds, made.density, made.skipped_share, made.cache_bytes, made.guarded_heads),
            made.attention_seconds,
        )
        tensors = {
            "frames": generation.frames,
            "latents": generation.latents.contiguous(),
            "numbers": torch.tensor([math.nan if n is None else n for n in numbers], dtype=torch.float64),
        }
        save_file(tensors, partial)
        partial.replace(path)

    def drop(self, prompt: int) -> None:
        """Forget the generations of a prompt."""
        self._held = {key: made for key, made in self._held.items() if key[0] != prompt}
        self._unlink(f"{prompt:03d}-*.safetensors")

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._unlink("*.safetensors")

    def _path(self, prompt: int, variant: str) -> Path | None:
        return self.directory / f"{prompt:03d}-{slug(variant)}.safetensors" if self.directory else None

    def _unlink(self, pattern: str) -> None:
        if self.directory is not None:
            for path in self.directory.glob(pattern):
                path.unlink()
