"""One timed generation: prompt in, raw frames and final latents out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.evaluation.attention_time import attention_watched, transformers_watched
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.peers import Watch, can_watch
from dit_accel.evaluation.timing import now
from dit_accel.evaluation.variants import DENSE, Variant, plan_variant
from dit_accel.plan import AccelPlan
from dit_accel.state import ForwardError

# What a pipeline may need beside a prompt, though it has a default.
_PICTURES = (
    "image",
    "video",
    "conditions",
    "control_image",
    "control_video",
    "mask_image",
    "image_reference",
)


@dataclass(frozen=True, eq=False)
class Generation:
    """What one run of a pipeline gave.

    frames: `[frames, height, width, 3]`, float in [0, 1] as the VAE made them, never rounded to 8 bits.
    latents: what the last denoising step left, float32.
    seconds: from the prompt to the frames, everything included.
    density: kept ÷ all query–key pairs of the swapped attention; None where nothing was swapped.
    skipped_share: forwards of the transformer in which blocks were skipped ÷ all; None where that is unknown.
    cache_bytes: memory that a cache held between steps; None where that is unknown.
    guarded_heads: heads that the guard made dense; None where nothing was guarded.
    attention_seconds: of these seconds, those in the swapped attention, selection and reordering included; None where
        no head is sparse.
    """

    frames: Tensor
    latents: Tensor
    seconds: float
    density: float | None = None
    skipped_share: float | None = None
    cache_bytes: int | None = None
    guarded_heads: int | None = None
    attention_seconds: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether neither frames nor latents hold NaN or infinity."""
        return bool(self.frames.isfinite().all() and self.latents.isfinite().all())

    def with_zeros(self) -> Generation:
        """The same with 0 for NaN and infinity."""
        frames, latents = (x.nan_to_num(0.0, 0.0, 0.0) for x in (self.frames, self.latents))
        return replace(self, frames=frames, latents=latents)


def generate(
    pipe: Any,
    prompt: str,
    settings: GenerationSettings,
    *,
    seed: int,
    on_step: Callable[[], object] | None = None,
) -> Generation:
    """Run the pipeline once and time it from prompt to frames.

    The noise comes from a CPU generator, so that a seed means the same on every device. `on_step` is called
    after each denoising step.

    Raises:
        ValueError: the pipeline needs more than a prompt and settings, an image for instance.
    """
    last: dict[str, Tensor] = {}

    def keep_latents(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last["latents"] = tensors["latents"]
        if on_step is not None:
            on_step()
        return {}

    arguments: dict[str, Any] = {"prompt": prompt, **settings.to_dict()}
    parameters = inspect.signature(pipe.__call__).parameters
    if "num_frames" not in parameters:
        del arguments["num_frames"]
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in kinds and name not in arguments
    ]
    if missing:
        raise ValueError(
            f"pipe: expected a pipeline that needs a prompt and sizes alone, got {type(pipe).__name__}, which also "
            f"needs {', '.join(missing)}; dit_accel.enable takes it with a preset"
        )
    device = pipe._execution_device
    start = now(device)
    try:
        output = pipe(
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pt",
            callback_on_step_end=keep_latents,
            **arguments,
        )
    except ForwardError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        lacking = [name for name in _PICTURES if name in parameters]
        if not lacking or last:
            raise
        raise ValueError(
            f"pipe: expected a pipeline that needs a prompt and sizes alone, got {type(pipe).__name__}, which also "
            f"takes {', '.join(lacking)} and says: {error}; if it needs them, dit_accel.enable takes it with a preset"
        ) from error
    seconds = now(device) - start
    return Generation(_frames(output), last["latents"].float().cpu(), seconds)


def generate_variant(
    pipe: Any,
    variant: Variant,
    prompt: str,
    settings: GenerationSettings,
    *,
    seed: int,
    on_step: Callable[[], object] | None = None,
) -> Generation:
    """`generate` with a variant applied, which is undone afterwards; adds the numbers that only a variant has."""
    with variant.apply(pipe):
        if variant is DENSE:
            made = generate(pipe, prompt, settings, seed=seed, on_step=on_step)
            return replace(made, density=1.0, skipped_share=0.0, cache_bytes=0)
        if variant.plan is None:
            return _watched(pipe, prompt, settings, seed, on_step)
        from dit_accel.switch import states, stats

        with attention_watched(pipe) as attention:
            made = generate(pipe, prompt, settings, seed=seed, on_step=on_step)
        found = stats(pipe)
        guarded = found.get("guarded_heads")
        skipped, computed = found.get("skipped_forwards", 0.0), found.get("computed_forwards", 1.0)
        return replace(
            made,
            density=found["density_mean"],
            skipped_share=skipped / (skipped + computed),
            cache_bytes=int(found.get("cache_bytes", 0)),
            guarded_heads=None if guarded is None else int(guarded),
            attention_seconds=None if all(s.all_dense for s in states(pipe)) else attention.seconds(),
        )


def dense_attention(
    pipe: Any,
    prompt: str,
    settings: GenerationSettings,
    *,
    seed: int,
    on_step: Callable[[], object] | None = None,
) -> tuple[float, float]:
    """Seconds of a dense generation in its attention and in all of its transformers.

    Dense attention goes through the same op as a plan's, which calls the model's own function.
    """
    dense = plan_variant(AccelPlan.preset("dense"), "dense")
    with dense.apply(pipe), attention_watched(pipe) as attention, transformers_watched(pipe) as transformers:
        generate(pipe, prompt, settings, seed=seed, on_step=on_step)
    return attention.seconds(), transformers.seconds()


def _watched(
    pipe: Any, prompt: str, settings: GenerationSettings, seed: int, on_step: Callable[[], object] | None
) -> Generation:
    """`generate` under a foreign cache, of which only the blocks that run tell what it skips."""
    if not can_watch(pipe):
        return generate(pipe, prompt, settings, seed=seed, on_step=on_step)
    with Watch(pipe) as watch:

        def look() -> None:
            watch.look()
            if on_step is not None:
                on_step()

        made = generate(pipe, prompt, settings, seed=seed, on_step=look)
    return replace(made, skipped_share=watch.skipped_share, cache_bytes=watch.cache_bytes)


def _frames(output: Any) -> Tensor:
    """The first video `[frames, height, width, 3]` of a pipeline's output; an image is one frame."""
    made = output.frames[0] if hasattr(output, "frames") else output.images[:1]
    return made.float().cpu().movedim(1, -1).contiguous()


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar, since one bar over everything stands above it."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
