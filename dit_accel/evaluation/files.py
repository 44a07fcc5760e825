"""How results reach the disk."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any


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
