"""Compare variants of one pipeline: interleaved in one process, equal seeds, whole generations timed."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dit_accel.evaluation.curve import magnitude_curve
from dit_accel.evaluation.generate import dense_attention, generate_variant, quiet
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.result import FORMAT_VERSION, DenseAttention, Evaluation, Scorer
from dit_accel.evaluation.store import STORE_VERSION, GenerationStore
from dit_accel.evaluation.timing import dense_backend, machine, pipeline_digest
from dit_accel.evaluation.variants import DENSE, Variant
from dit_accel.pipelines import transformers_of
from dit_accel.plan import AccelPlan


def evaluate(
    pipe: Any,
    variants: Sequence[Variant],
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    model: str,
    seed: int = 0,
    scorer: Scorer | None = None,
    output_dir: str | Path | None = None,
    warmup_steps: int = 2,
    attention_steps: int = 3,
    progress: bool = True,
) -> Evaluation:
    """Generate every prompt with every variant and measure speed and distance from the dense run.

    Prompt i has the seed `seed + i` in every variant. The variants of a prompt run one after another, in an
    order that rotates from prompt to prompt; the time is that of the whole generation. Before that, each runs
    `warmup_steps` steps once, untimed. How much of a generation is attention is measured on the way where a
    variant has sparse heads, for dense in a pass of `attention_steps` steps; 0 leaves the comparison out. Where
    a variant needs the curve of MagCache, a dense generation of the first prompt, with a seed of its own,
    measures it before all else.

    With `output_dir`, `evaluation.json` is written after each prompt, and an evaluation that was killed goes
    on where it was when it is started again with the same arguments. Started with others, it keeps the former
    comparison as `evaluation.previous.json`, without its generations.

    Raises:
        ValueError: There is no dense variant, no prompt or no transformer, a name occurs twice, steps are too few, or
            the pipeline needs more than a prompt.
    """
    names = [variant.name for variant in variants]
    if "dense" not in names or len(set(names)) != len(names):
        raise ValueError(f"variants: expected different names, one of them 'dense', got {names}")
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    if warmup_steps < 1 or attention_steps < 0:
        raise ValueError(
            "steps: expected warmup_steps of at least 1 and attention_steps of at least 0, "
            f"got {warmup_steps} and {attention_steps}"
        )
    transformers_of(pipe)
    folder = Path(output_dir) if output_dir is not None else None
    backend = dense_backend(pipe.transformer)
    place = machine(pipe._execution_device, pipe.transformer.dtype)
    result = Evaluation(
        model=model,
        settings=settings,
        prompts=list(prompts),
        seed=seed,
        variants=names,
        machine=place,
        dense_backend=backend,
        fingerprint=_fingerprint(
            [FORMAT_VERSION, STORE_VERSION],
            model,
            pipeline_digest(pipe),
            [variant.identity for variant in variants],
            list(prompts),
            settings.to_dict(),
            seed,
            place,
            backend,
        ),
        store=GenerationStore(folder / "generations" if folder else None),
    )
    if folder is not None:
        result.resume(folder)
    if any(variant.with_curve for variant in variants) and result.curve is None:
        _measure_curve(result, pipe, folder, progress)
    ready = [
        variant.with_curve(result.curve or ()) if variant.with_curve else variant for variant in variants
    ]
    _complete(result, pipe, ready, scorer, folder, warmup_steps, attention_steps, progress)
    return result


def _measure_curve(result: Evaluation, pipe: Any, folder: Path | None, progress: bool) -> None:
    steps = result.settings.num_inference_steps
    with quiet(pipe), tqdm(total=steps, unit="step", disable=not progress, desc="curve of MagCache") as bar:
        seed = result.seed + len(result.prompts)  # none of the compared generations has it
        result.curve = magnitude_curve(
            pipe, result.prompts[0], result.settings, seed=seed, on_step=bar.update
        )
    if folder is not None:
        result.save(folder)


def _complete(
    result: Evaluation,
    pipe: Any,
    variants: Sequence[Variant],
    scorer: Scorer | None,
    folder: Path | None,
    warmup_steps: int,
    attention_steps: int,
    progress: bool,
) -> None:
    """Do what is still missing in the result, under one bar."""
    count, settings, seed = len(variants), result.settings, result.seed
    open_prompts = range(len(result.runs) // count, len(result.prompts))
    # The order rotates once over all prompts, so that no variant always runs on the warmer or the busier machine.
    stride = max(1, count // len(result.prompts))
    missing = {
        prompt: [
            variant
            for turn in range(count)
            if not result.store.has(prompt, (variant := variants[(prompt * stride + turn) % count]).name)
        ]
        for prompt in open_prompts
    }
    generations = sum(len(rest) for rest in missing.values())
    warmed = [variant for variant in variants if any(variant in rest for rest in missing.values())]
    # A plan that only caches runs dense attention: its time would tell nothing.
    swapped = any(variant.plan and not _is_dense(variant.plan) for variant in variants)
    if not swapped or result.dense_attention is not None:
        attention_steps = 0
    if attention_steps and not any(variant.name == DENSE.name for variant in warmed):
        warmed = [DENSE, *warmed]
    total = generations * settings.num_inference_steps + len(warmed) * warmup_steps + attention_steps
    reused = len(result.prompts) * count - generations
    if reused and progress:
        tqdm.write(f"{reused} finished generations are taken over from {folder}", file=sys.stderr)
    with quiet(pipe), tqdm(total=total, unit="step", disable=not progress, smoothing=0.05) as bar:
        for variant in warmed:
            bar.set_description(f"warm-up, {variant.name}")
            short = settings.with_steps(warmup_steps)
            generate_variant(pipe, variant, result.prompts[0], short, seed=seed, on_step=bar.update)
        if attention_steps:
            bar.set_description("attention alone, dense")
            short = settings.with_steps(attention_steps)
            seconds, transformers = dense_attention(
                pipe, result.prompts[0], short, seed=seed, on_step=bar.update
            )
            whole = seconds * settings.num_inference_steps / attention_steps
            result.dense_attention = DenseAttention(whole, seconds / transformers)
            if folder is not None:
                result.save(folder)
        for prompt in open_prompts:
            for variant in missing[prompt]:
                bar.set_description(f"prompt {prompt + 1} of {len(result.prompts)}, {variant.name}")
                made = generate_variant(
                    pipe, variant, result.prompts[prompt], settings, seed=seed + prompt, on_step=bar.update
                )
                result.store.put(prompt, variant.name, made)
            result.measure(prompt, scorer)
            if folder is not None:
                result.save(folder)
            result.drop_unpictured()  # once their numbers are safe


def _is_dense(plan: AccelPlan) -> bool:
    return all(plan.candidates[number].is_dense for number in plan.choice.unique().tolist())


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
