"""Model families of diffusers, and the demo pipeline."""

from typing import Any

from dit_accel.pipelines.families import ModelFamily, family_of, transformers_of

__all__ = ["ModelFamily", "family_of", "load_demo", "transformers_of"]


def __getattr__(name: str) -> Any:
    if name == "load_demo":
        from dit_accel.pipelines.demo import load_demo

        return load_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
