"""What an evaluation found, and its form on disk."""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from torch import Tensor

from dit_accel.evaluation.files import write_json
from dit_accel.evaluation.metrics import latent_rel_l2, psnr, ssim
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.store import GenerationStore

FORMAT_VERSION = 1
REPORT_FILE = "evaluation.json"
PREVIOUS_FILE = "evaluation.previous.json"
# Frames of the first prompts are kept for the pictures; all others are dropped once measured.
PICTURED_PROMPTS = 3

# scorer(frames `[frames, height, width, 3]` in [0, 1], prompt): which parts of the prompt the video shows.
Scorer = Callable[[Tensor, str], dict[str, bool]]


@dataclass(frozen=True)
class Run:
    """One generation, measured against the dense one of the same prompt and seed."""

    prompt: int
    variant: str
    seconds: float
    psnr: float
    ssim: float
    latent_rel_l2: float
    density: float | None
    semantic: dict[str, bool] | None
    skipped_share: float | None = None
    cache_bytes: int | None = None
    guarded_heads: int | None = None
    attention_seconds: float | None = None


@dataclass(frozen=True)
class DenseAttention:
    """Seconds of a dense generation in its attention, and their share of those in the transformers."""

    seconds: float
    share: float


@dataclass(eq=False)
class Evaluation:
    """All runs of a comparison and what they were made with; `to_dict` is `evaluation.json`.

    fingerprint: changes whenever results of another process could not stand beside these.
    processes: how many processes it took; more than one means that it was killed in between.
    dense_attention: None where it was not measured, or where no variant has sparse attention.
    curve: of MagCache, where a variant needs it.
    """

    model: str
    settings: GenerationSettings
    prompts: list[str]
    seed: int
    variants: list[str]
    machine: dict[str, str | int | None]
    dense_backend: str
    fingerprint: str
    store: GenerationStore
    processes: int = 1
    dense_attention: DenseAttention | None = None
    curve: tuple[float, ...] | None = None
    runs: list[Run] = field(default_factory=list)

    def pictured(self) -> list[int]:
        """Numbers of the prompts whose frames are kept."""
        return list(range(min(len(self.prompts), PICTURED_PROMPTS)))

    def measure(self, prompt: int, scorer: Scorer | None) -> None:
        """Add the runs of a prompt that every variant has generated."""
        dense = self.store.get(prompt, "dense")
        if not dense.is_finite:
            raise ValueError(
                f"prompt {prompt + 1}: expected finite frames of the dense generation, got NaN or infinity; give the "
                "model another dtype, bfloat16 for instance"
            )
        for name in self.variants:
            made = self.store.get(prompt, name)
            if not made.is_finite:
                warnings.warn(
                    f"prompt {prompt + 1}, variant {name!r}: what it generated is not finite, NaN counts as 0",
                    stacklevel=2,
                )
                made = made.with_zeros()
            run = Run(
                prompt=prompt,
                variant=name,
                seconds=made.seconds,
                psnr=psnr(made.frames, dense.frames),
                ssim=ssim(made.frames, dense.frames),
                latent_rel_l2=latent_rel_l2(made.latents, dense.latents),
                density=made.density,
                semantic=None if scorer is None else scorer(made.frames, self.prompts[prompt]),
                skipped_share=made.skipped_share,
                cache_bytes=made.cache_bytes,
                guarded_heads=made.guarded_heads,
                attention_seconds=made.attention_seconds,
            )
            self.runs.append(run)

    def drop_unpictured(self) -> None:
        """Drop the generations of prompts that are measured, but those whose frames are kept."""
        for prompt in range(len(self.runs) // len(self.variants)):
            if prompt not in self.pictured():
                self.store.drop(prompt)

    def summary(self, name: str) -> dict[str, Any]:
        """The row of one variant: medians of seconds, means and worst cases of quality."""
        runs = [run for run in self.runs if run.variant == name]
        dense_p50 = median(run.seconds for run in self.runs if run.variant == "dense")
        p50 = median(run.seconds for run in runs)
        densities = [run.density for run in runs if run.density is not None]
        judged = [run.semantic for run in runs if run.semantic]
        parts = {part: fmean(verdict[part] for verdict in judged) for part in judged[0]} if judged else None
        dense = None if self.dense_attention is None else self.dense_attention.seconds
        spent = [run.attention_seconds for run in runs if run.attention_seconds is not None]
        attention = dense if name == "dense" else median(spent) if spent else None
        skipped = [run.skipped_share for run in runs if run.skipped_share is not None]
        held = [run.cache_bytes for run in runs if run.cache_bytes is not None]
        guarded = [run.guarded_heads for run in runs if run.guarded_heads is not None]
        return {
            "name": name,
            "seconds_dense_p50": dense_p50,
            "seconds_p50": p50,
            "speedup": dense_p50 / p50,
            "psnr_mean": fmean(run.psnr for run in runs),
            "psnr_min": min(run.psnr for run in runs),
            "ssim_mean": fmean(run.ssim for run in runs),
            "latent_rel_l2": fmean(run.latent_rel_l2 for run in runs),
            "density_mean": fmean(densities) if densities else None,
            "semantic": fmean(parts.values()) if parts else None,
            "semantic_parts": parts,
            "attention_speedup": dense / attention if dense and attention else None,
            "attention_seconds": attention,
            "skipped_share": fmean(skipped) if skipped else None,
            "cache_bytes": max(held) if held else None,
            "guarded_heads": fmean(guarded) if guarded else None,
            # A technique that touches nothing must not pass for a speed-up.
            "identical_to_dense": name != "dense" and all(run.latent_rel_l2 == 0.0 for run in runs),
        }

    def to_dict(self) -> dict[str, Any]:
        """`evaluation.json`: what was run on what, one summary per variant, and every single run."""
        dense = self.dense_attention
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "complete": len(self.runs) == len(self.prompts) * len(self.variants),
            "processes": self.processes,
            "model": self.model,
            "machine": self.machine,
            "dense_backend": self.dense_backend,
            "settings": self.settings.to_dict(),
            "seed": self.seed,
            "prompts": self.prompts,
            "attention_share": None if dense is None else dense.share,
            "variants": [self.summary(name) for name in self.variants] if self.runs else [],
            "runs": [asdict(run) for run in self.runs],
            "dense_attention": None if dense is None else asdict(dense),
            "magnitude_curve": self.curve,
        }

    def save(self, folder: Path) -> None:
        """Write `evaluation.json`."""
        write_json(folder / REPORT_FILE, self.to_dict())

    def resume(self, folder: Path) -> None:
        """Take over what a process with the same fingerprint left; another comparison is set aside."""
        saved = _read(folder / REPORT_FILE)
        if saved.get("fingerprint") == self.fingerprint:
            self.processes = saved["processes"] + (not saved["complete"])
            self.runs = [Run(**run) for run in saved["runs"]]
            dense = saved["dense_attention"]
            self.dense_attention = None if dense is None else DenseAttention(**dense)
            self.curve = None if saved["magnitude_curve"] is None else tuple(saved["magnitude_curve"])
        else:
            if saved.get("runs"):
                (folder / REPORT_FILE).replace(folder / PREVIOUS_FILE)
                print(
                    f"{folder}: another comparison was there; its numbers are in {PREVIOUS_FILE} now",
                    file=sys.stderr,
                )
            self.store.clear()
        # Before the first generation: what the store holds must always belong to this fingerprint.
        self.save(folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: expected an evaluation, got broken JSON ({error}); delete the file"
        ) from error
