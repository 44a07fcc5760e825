"""Finished stages of a calibration on disk, so that one killed at any moment continues where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FINGERPRINT = "fingerprint.json"

# Tensors and JSON values.
Stage = tuple[dict[str, Tensor], dict[str, Any]]


class Checkpoint:
    """Named results, each one file written to a temporary name, flushed and renamed.

    Args:
        directory: where the files go; None keeps the results in memory only.
        fingerprint: JSON values of everything the results depend on.

    Raises:
        ValueError: if the directory holds stages of a calibration with another fingerprint.
    """

    def __init__(self, directory: Path | None, fingerprint: dict[str, Any]) -> None:
        self._directory = directory
        self._memory: dict[str, Stage] = {}
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / _FINGERPRINT
        fingerprint = json.loads(json.dumps(fingerprint))
        # A first attempt that finished nothing, for want of memory say, is in nobody's way.
        if path.exists() and any(directory.glob("*.safetensors")):
            _check_same(path, json.loads(path.read_text()), fingerprint)
        else:
            _write_atomically(path, json.dumps(fingerprint, indent=2).encode())

    def load(self, name: str) -> Stage | None:
        """A finished stage, None if it is still to be done.

        Raises:
            ValueError: if the stage's file cannot be read.
        """
        if self._directory is None:
            return self._memory.get(name)
        path = self._directory / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                values = json.loads(file.metadata()["values"])
                return {key: file.get_tensor(key) for key in file.keys()}, values  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not a readable calibration stage ({error}); delete it to redo it"
            ) from error

    def names(self, prefix: str) -> list[str]:
        """Finished stages whose name begins like this, sorted."""
        known = (
            self._memory
            if self._directory is None
            else [p.stem for p in self._directory.glob("*.safetensors")]
        )
        return sorted(name for name in known if name.startswith(prefix))

    def save(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> Stage:
        """Keeps and returns the result of a stage; after this the stage is never done again."""
        if self._directory is None:
            self._memory[name] = (tensors, values)
            return tensors, values
        path = self._directory / f"{name}.safetensors"
        temporary = path.with_suffix(".tmp")
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"values": json.dumps(values)})
        _flush_and_rename(temporary, path)
        return tensors, values


def _check_same(path: Path, stored: dict, given: dict) -> None:
    for key in sorted(stored.keys() | given.keys()):
        if stored.get(key) != given.get(key):
            raise ValueError(
                f"{path.parent} holds a calibration with {key} = {stored.get(key)!r}, "
                f"got {given.get(key)!r}; "
                "use the same arguments to continue it, give another output_dir (--output), or delete this one"
            )


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    _flush_and_rename(temporary, path)


def _flush_and_rename(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
