"""Compare ways to run a pipeline: speed, distance from the dense run, and pictures of both."""

from importlib import import_module
from typing import Any

_HOME = {
    "DENSE": "variants",
    "Evaluation": "result",
    "GenerationSettings": "models",
    "Variant": "variants",
    "console_table": "report",
    "evaluate": "run",
    "load_model": "models",
    "markdown_table": "report",
    "parse_variants": "variants",
    "plan_variant": "variants",
    "resolve_settings": "models",
    "write_outputs": "outputs",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Looked up on first use: who only needs the metrics does not load matplotlib."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
