"""The files of a plan: one JSON and one safetensors file, nothing executable, on disk or on the hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the library for transport that this version of the hub has
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

FORMAT_VERSION = 4
CONFIG_FILE = "accel_config.json"
TENSOR_FILE = "accel_plan.safetensors"


class PlanError(ValueError):
    """A plan that cannot be read, or does not fit the model; names file, field, expected and got."""

    def __init__(self, file: str, field: str, expected: object, got: object, remedy: str = "") -> None:
        message = f"{file}: {field}: expected {expected}, got {got}"
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.field, self.expected, self.got = field, expected, got


def write_files(directory: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a plan so that a reader never meets half of it.

    A new directory appears by one rename. In an existing one the tensors are replaced first and the config
    last; it holds their checksum, so a write that is cut short between the two is found out by the reader.
    """
    payload = save(dict(tensors))
    config = {
        "format_version": FORMAT_VERSION,
        "library_versions": {name: version(name) for name in ("dit-accel", "torch", "diffusers")},
        **fields,
        "tensors_sha256": hashlib.sha256(payload).hexdigest(),
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside a new directory, so that one rename makes it; in one that is there, which may be a disk of its own.
    beside = directory if directory.exists() else directory.parent
    temporary = Path(tempfile.mkdtemp(prefix=".plan.", dir=beside))
    try:
        made = temporary / "plan"
        made.mkdir()
        (made / TENSOR_FILE).write_bytes(payload)
        (made / CONFIG_FILE).write_text(text, encoding="utf-8")
        if directory.exists():
            for name in (TENSOR_FILE, CONFIG_FILE):
                (made / name).replace(directory / name)
        else:
            made.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_files(
    directory: Path, fields: Mapping[str, tuple[type, ...]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the config, whose `fields` must have one of the types named, and the tensors it belongs to.

    Raises:
        PlanError: a file is missing, truncated, corrupted or of a newer format, or a field is missing or
            mistyped.
    """
    config_file, tensor_file = directory / CONFIG_FILE, directory / TENSOR_FILE
    for file in (config_file, tensor_file):
        if not file.is_file():
            raise PlanError(str(file), "file", "a file", "none", "is this the directory of a plan?")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(
            str(config_file), "file", "complete JSON", f"({error})", "write the plan again"
        ) from error
    if not isinstance(config, dict):
        raise PlanError(str(config_file), "file", "a JSON object", type(config).__name__)
    found = config.get("format_version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise PlanError(str(config_file), "format_version", "a positive integer", repr(found))
    if found > FORMAT_VERSION:
        raise PlanError(
            str(config_file),
            "format_version",
            f"at most {FORMAT_VERSION}",
            found,
            "upgrade dit-accel to read it",
        )
    if found < 4:
        config.setdefault("dense_layers", 0.0)  # which such plans have not
    for name, types in {**fields, "tensors_sha256": (str,)}.items():
        value = config.get(name, Ellipsis)
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            got = "no such field" if value is Ellipsis else repr(value)
            raise PlanError(str(config_file), name, expected, got)
    payload = tensor_file.read_bytes()
    checksum = hashlib.sha256(payload).hexdigest()
    if checksum != config["tensors_sha256"]:
        raise PlanError(
            str(tensor_file),
            "sha256",
            f"{config['tensors_sha256']} as tensors_sha256 in {CONFIG_FILE} says",
            f"{checksum} ({len(payload)} bytes)",
            "the file is truncated, corrupted or of another plan: write the plan again",
        )
    try:
        return config, load(payload)
    except SafetensorError as error:
        raise PlanError(str(tensor_file), "file", "safetensors", f"({error})") from error


def local_directory(directory_or_repo_id: str | Path) -> Path:
    """Return the directory of a plan, fetched from the hub if the name is no directory.

    Raises:
        PlanError: there is no such directory and no such repository.
    """
    path = Path(directory_or_repo_id)
    if path.is_dir():
        return path
    name = str(directory_or_repo_id)
    remedy = "give the directory of a plan or the id of a hub repository"
    if (
        path.exists()
        or isinstance(directory_or_repo_id, Path)
        or name.count("/") != 1
        or name.startswith(".")
    ):
        raise PlanError(
            name, "directory", "a directory", "a file" if path.exists() else "nothing there", remedy
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, TENSOR_FILE]))
    except (HTTPError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PlanError(
            name, "directory", "a directory or a hub repository", f"({reason})", remedy
        ) from error


def upload_directory(directory: Path, repo_id: str, private: bool | None, commit_message: str) -> str:
    """Upload a plan's directory to a hub repository, made if need be, and return the commit's URL."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=commit_message)
    return commit.commit_url
