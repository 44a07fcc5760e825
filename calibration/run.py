"""The whole calibration: dense runs with profiling, choice, closed loop, report, plan."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dit_accel.calibration.caching import StepProducts
from dit_accel.calibration.candidates import default_candidates, published_candidates
from dit_accel.calibration.checkpoint import Checkpoint
from dit_accel.calibration.goals import Goal, the_goal
from dit_accel.calibration.knapsack import choose_density
from dit_accel.calibration.offers import Pick, offers_of
from dit_accel.calibration.ranges import find_ranges
from dit_accel.calibration.schedule import range_starts, sampled_steps, span_bounds
from dit_accel.calibration.search import TOLERANCE_DB
from dit_accel.calibration.stages import LATENCY_STEPS, DenseRun, Stages
from dit_accel.calibration.tables import build_profile
from dit_accel.calibration.validate import Validation, generations_needed, most_trials
from dit_accel.candidate import Candidate
from dit_accel.evaluation.generate import quiet
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.timing import dense_backend, machine, pipeline_digest
from dit_accel.kernels import PRECISIONS, available_precisions
from dit_accel.pipelines import family_of
from dit_accel.plan import AccelPlan, config_hash_of
from dit_accel.state import check_plain

_STAGES = 8  # raised when what a stage writes, or what it means, changes
_PROFILE_STEPS = 8  # what profiling one prompt takes, in steps of a dense generation
# What a calibration depends on besides its arguments and the model: latencies belong to a machine.
_MACHINE = ("cpu", "gpu", "threads", "dtype", "torch", "diffusers", "dit_accel")


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
    guidance_scale: float,
    target_psnr: float | None = None,
    target_ssim: float | None = None,
    target_latent_rel_l2: float | None = None,
    density: float | None = None,
    speedup: float | None = None,
    downstream: bool = False,
    cache: bool = False,
    candidates: Sequence[Candidate] | str | None = None,
    max_trials: int | None = None,
    output_dir: str | Path | None = None,
    seed: int = 0,
    held_out_prompts: Sequence[str] | None = None,
    progress: bool = True,
) -> AccelPlan:
    """Measure a pipeline's attention heads and return the fastest plan at the quality asked for.

    Prompt i is generated densely once, with the seed `seed + i`, while its attention is profiled and the
    latency of every candidate is measured; then each step range, layer and head gets a candidate. With a target
    some accelerated generations of the first two prompts steer the choice. Two prompts are enough; more
    cost a dense generation each. Exactly one of the targets, `density` and `speedup` is given.

    Args:
        pipe: a diffusers pipeline with a supported transformer, without a plan on it; it is left as it was.
        prompts: calibration prompts.
        height, width: pixels.
        num_frames: frames of the video; image pipelines do not read it.
        target_psnr: mean PSNR in dB against the dense runs that the plan should reach.
        target_ssim: mean SSIM against the dense runs, above 0 and below 1. The mean is one of log(1 - SSIM).
        target_latent_rel_l2: `‖latents − dense‖ / ‖dense‖` of the final latents, above 0 and below 1; its mean is
            geometric.
        density: mean density over all attention calls that the plan should have, instead of a PSNR; the plan
            of least error at that density, however long its candidates take.
        speedup: of whole generations over dense ones; the plan of least error that is as fast, corrected by up to
            three generations of the first prompt.
        downstream: weigh the errors of heads by how far they move the model's prediction, which takes a backward pass
            through the transformer at each profiled step. Otherwise all layers count alike, which gave the better
            videos on the demo model.
        cache: also choose which steps to compute, and how to forecast the others, under the same goal: the plan gets a
            schedule, see `dit_accel.caching.Schedule`.
        candidates: what heads may be given, dense among them; `calibration.default_candidates(device, dtype)` if None.
            The name of a published system that its authors calibrate stands for what they choose among, see
            `calibration.published_candidates`.
        max_trials: most accelerated generations that may steer the choice towards a quality, at least 1; four for a
            single prompt and six for more if None.
        output_dir: where the plan is written. Finished stages are kept in its folder `calibration`: killed at
            any moment and called again with the same arguments, it continues and ends with the same plan.
            Called with another target_psnr or density, it keeps what was measured and only chooses anew.
        held_out_prompts: further prompts on which PSNR and speed-up are measured, see `plan.validated`.

    Returns:
        The plan. Its `validated` tells what was measured: quality and speed, the trials, what each step range and part
        spends, and in `head_ms` the milliseconds of a head on this device: `dense`, and `candidates` in the plan's
        order; `split` is what a layer takes longer for each further precision.

    Raises:
        ValueError: not exactly one goal, no prompts, a scheduler with several evaluations in a step, candidates that
            repeat, lack dense or need a precision that the device lacks, an unsupported pipeline or one with a plan or
            a cache, a transformer that no gradient can pass, or an output_dir that holds a calibration of other
            prompts, settings, weights or of another machine.

    Example:
        >>> plan = calibrate(pipe, ["a red circle moves left"], height=192, width=336, num_frames=33,
        ...                  num_inference_steps=20, guidance_scale=5.0, target_psnr=30.0, output_dir="plan")
    """
    check_plain(pipe)
    prompts, held_out = _texts("prompts", prompts), _texts("held_out_prompts", held_out_prompts or [])
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    if set(prompts) & set(held_out):
        seen = sorted(set(prompts) & set(held_out))
        raise ValueError(
            f"held_out_prompts: expected others than prompts, got {', '.join(map(repr, seen))} in both"
        )
    asked = {
        "target_psnr": target_psnr,
        "target_ssim": target_ssim,
        "target_latent_rel_l2": target_latent_rel_l2,
        "density": density,
        "speedup": speedup,
    }
    goal = the_goal(**asked)
    max_trials = most_trials(len(prompts)) if max_trials is None else max_trials
    if isinstance(max_trials, bool) or not isinstance(max_trials, int) or max_trials < 1:
        raise ValueError(f"max_trials: expected an integer from 1, got {max_trials!r}")
    if cache and goal.name == "density":
        raise ValueError(
            "cache: expected a quality or a speed-up as the goal, since a density says nothing of steps"
        )
    if (order := getattr(pipe.scheduler, "order", 1)) != 1:
        raise ValueError(
            f"pipe: expected a scheduler that evaluates the model once in a step, got {type(pipe.scheduler).__name__}, "
            f"which does so {order} times; calibrate with FlowMatchEulerDiscreteScheduler, the plan runs with any"
        )
    settings = GenerationSettings(height, width, num_frames, num_inference_steps, guidance_scale)
    conditions: dict[str, Any] = {"seed": seed, **settings.to_dict()}
    candidates = _allowed(candidates, pipe)
    fingerprint = {
        "stages": _STAGES,
        "prompts": prompts,
        "held_out_prompts": held_out,
        **conditions,
        "downstream": downstream,
        "spans": list(span_bounds(num_inference_steps)),
        "candidates": [candidate.label for candidate in candidates],
        **_describe(pipe),
    }
    checkpoint = Checkpoint(None if output_dir is None else Path(output_dir) / "calibration", fingerprint)
    generations = generations_needed(len(prompts), len(held_out), goal, max_trials)
    steps = generations * num_inference_steps + (0 if checkpoint.load("latency") else LATENCY_STEPS)
    spans = span_bounds(num_inference_steps)
    if progress:
        dense = len(prompts) + len(held_out)
        generations_of_time = (steps + _PROFILE_STEPS * len(prompts)) / num_inference_steps
        _tell(
            f"calibration: {dense} dense and at most {generations - dense} accelerated generations of "
            f"{num_inference_steps} steps, {len(candidates)} candidates to time; with profiling about the time of "
            f"{generations_of_time:.1f} dense generations, less what an earlier run has finished"
        )
    with (
        quiet(pipe),
        logging_redirect_tqdm(),
        tqdm(total=steps, unit="step", disable=not progress, smoothing=0.05) as bar,
    ):
        stages = Stages(pipe, settings, candidates, checkpoint, bar, downstream=downstream)
        runs = [
            stages.profiled(f"dense_{i}", prompt, seed + i, sampled_steps(spans, i, len(prompts)), share=i)
            for i, prompt in enumerate(prompts)
        ]
        latency = stages.latency()
        profile = build_profile(
            [run.sums for run in runs],
            latency,
            dense=[candidate.is_dense for candidate in candidates].index(True),
            launch=tuple(PRECISIONS.index(candidate.precision) for candidate in candidates),
            bounds=spans,
            progress=runs[0].progress,
            guidance_scale=guidance_scale,
            forwards=runs[0].forwards,
            downstream=downstream,
        )
        ranges = find_ranges(profile.tables)
        profile = profile.joined(ranges)
        bounds = tuple(spans[number] for number in ranges)
        draft = AccelPlan(
            candidates=candidates,
            choice=torch.zeros(profile.recall.shape[:3], dtype=torch.int16),
            range_starts=range_starts(bounds, runs[0].progress),
            layers=stages.layers,
            model_class=family_of(pipe.transformer).transformer_class,
            config_hash=config_hash_of(pipe.transformer),
            grid=runs[0].grid,
            objective={**asked, "cache": cache, "downstream": downstream, **conditions},
        )
        offers = offers_of(
            profile.tables,
            _products(runs) if cache else None,
            bounds=bounds,
            progress=runs[0].progress,
            guidance_scale=guidance_scale,
            alike=profile.alike,
            forward_ms=fmean(run.forward_ms for run in runs),
        )

        def planned(found: Pick) -> AccelPlan:
            measures = profile.measures(found.choice)
            return replace(draft, choice=found.choice, cache=found.offer.cache, **measures)

        validation = Validation(stages, planned, offers, runs, prompts, held_out, seed, goal, max_trials)
        if goal.quality is not None:
            found = validation.meet_quality()
        elif goal.name == "speedup":
            found = validation.meet_speedup()
        else:
            found = Pick(offers[0], choose_density(profile.tables, goal.value))
        validated = validation.report(found) | profile.sensitivities() | {"head_ms": latency.to_dict()}
    plan = replace(planned(found), validated=validated)
    _say(goal, validated, max_trials, all_dense=found.error == 0.0)
    if output_dir is not None:
        plan.save_pretrained(output_dir)
    return plan


def _products(runs: Sequence[DenseRun]) -> StepProducts:
    """Those of all dense runs together."""
    found = [run.products for run in runs if run.products is not None]
    if len(found) < len(runs):
        raise ValueError(
            "cache: expected every step to run the same guidance branches, got steps that differ; calibrate without it"
        )
    return functools.reduce(operator.add, found)


def _allowed(candidates: Sequence[Candidate] | str | None, pipe: Any) -> tuple[Candidate, ...]:
    if candidates is None:
        return default_candidates(pipe._execution_device, pipe.transformer.dtype)
    if isinstance(candidates, str):
        return published_candidates(candidates)
    if not any(candidate.is_dense for candidate in candidates) or len(set(candidates)) < len(candidates):
        got = ", ".join(candidate.label for candidate in candidates) or "none"
        raise ValueError(
            f"candidates: expected different ones, with Candidate('dense', 1.0) among them, got {got}"
        )
    here = available_precisions(pipe._execution_device, pipe.transformer.dtype)
    absent = [candidate.label for candidate in candidates if candidate.precision not in here]
    if absent:
        raise ValueError(
            f"candidates: expected precisions of this device ({', '.join(here)}), got {', '.join(absent)}"
        )
    return tuple(candidates)


def _texts(name: str, prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{name}: expected a list of strings, got {prompts!r}")
    return list(prompts)


def _tell(line: str) -> None:
    """Above the progress bar, where it is, and like it not into what a command prints as its result."""
    tqdm.write(line, file=sys.stderr)


def _say(goal: Goal, validated: dict[str, Any], max_trials: int, *, all_dense: bool) -> None:
    """What the user has to know of a plan that is not what was asked for, in one line."""
    unit = " dB" if goal.name == "target_psnr" else ""
    if goal.quality is not None and all_dense:
        _tell(
            f"{goal.name} {goal.value:g}{unit}: only the dense generation reaches it, nothing will be faster"
        )
    if goal.quality is not None and not all_dense and validated["target_met"]:
        found = validated[f"{goal.quality.metric}_calibration"]
        above = goal.quality.decibel(found) - goal.quality.decibel(goal.value)
        if above > TOLERANCE_DB:
            _tell(
                f"{goal.name} {goal.value:g}{unit} was exceeded: {found:.4g}{unit}, since no faster plan that reaches "
                f"it was found in {len(validated['trials'])} generations (at most {max_trials} steer the choice)"
            )
    if validated.get("target_met", True):
        return
    if goal.quality is None:
        _tell(
            f"speedup {goal.value:g} was not reached; the plan is the fastest that was tried, "
            f"{validated['speedup']:.2f} times as fast as dense"
        )
        return
    found = validated[f"{goal.quality.metric}_calibration"]
    _tell(
        f"{goal.name} {goal.value:g}{unit} was not reached in {max_trials} generations; the plan is the one that came "
        f"nearest, {found:.4g}{unit} on the calibration prompts"
    )


def _describe(pipe: Any) -> dict[str, Any]:
    """The model and the machine, as JSON values."""
    here = machine(pipe._execution_device, pipe.transformer.dtype)
    return {
        "model_class": type(pipe.transformer).__name__,
        "config_hash": config_hash_of(pipe.transformer),
        "weights": pipeline_digest(pipe),
        "dense_backend": dense_backend(pipe.transformer),
        **{name: here[name] for name in _MACHINE},
    }
