"""The parts of a calibration that take time; each is done once, by this process or by an earlier one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from tqdm import tqdm

from dit_accel.bench.timing import milliseconds
from dit_accel.calibration.caching import StepProducts, StepRecorder
from dit_accel.calibration.capture import Recorder
from dit_accel.calibration.checkpoint import Checkpoint, Stage
from dit_accel.calibration.cost import Latency, latency_calls, measure_latency, measure_layers
from dit_accel.calibration.tables import ProfileSums
from dit_accel.candidate import Candidate
from dit_accel.evaluation.attention_time import attention_watched
from dit_accel.evaluation.generate import Generation, generate
from dit_accel.evaluation.metrics import latent_rel_l2, psnr, ssim
from dit_accel.evaluation.models import GenerationSettings
from dit_accel.evaluation.timing import now
from dit_accel.grid import TokenGrid
from dit_accel.pipelines import family_of, transformers_of
from dit_accel.plan import AccelPlan
from dit_accel.state import AccelState
from dit_accel.switch import disable, enable, states

# The latency measurement on the progress bar, in steps of a generation.
LATENCY_STEPS = 5
_LAYERS_TIMED = 3  # of a plan, after each of its generations
_WARM_UP_STEPS = 2

logger = logging.getLogger("dit_accel")


@dataclass(frozen=True, eq=False)
class DenseRun:
    """A dense generation, and what was measured during it if it was profiled.

    frames: `[frames, height, width, 3]`, float in [0, 1]; latents: what the last denoising step left.
    seconds: of the generation alone; profile_seconds come on top.
    forward_ms: of one forward of the transformer.
    products: of its steps; None where the branches of guidance change from step to step.
    sums: by guidance branch.
    forwards: of a step; one where a batch holds both branches.
    progress: of each step.
    """

    frames: Tensor
    latents: Tensor
    seconds: float
    profile_seconds: float
    forward_ms: float
    products: StepProducts | None
    sums: dict[str, ProfileSums]
    forwards: int
    progress: list[float]
    grid: TokenGrid


@dataclass(frozen=True)
class AcceleratedRun:
    """A generation with a plan, compared with the dense one as `evaluation.metrics` does.

    guarded_heads: that the guard made dense.
    attention_ms: of the swapped attention, all calls together.
    plain_ms: of a head on the original path, measured right after the generation, see `Latency.plain`.
    layer_errors: by how much a few of the plan's layers, timed then too, take longer than is predicted of their heads.
    """

    psnr: float
    ssim: float
    latent_rel_l2: float
    seconds: float
    guarded_heads: int
    attention_ms: float
    plain_ms: float
    layer_errors: list[float]


def _is_slow_at_first(device: torch.device) -> bool:
    return device.type != "cpu"


class Stages:
    """Runs or loads the stages of one calibration; `bar` counts denoising steps."""

    def __init__(
        self,
        pipe: Any,
        settings: GenerationSettings,
        candidates: Sequence[Candidate],
        checkpoint: Checkpoint,
        bar: tqdm,
        *,
        downstream: bool = True,
    ) -> None:
        self._downstream = downstream
        self._pipe = pipe
        self._settings = settings
        self._candidates = candidates
        self._checkpoint = checkpoint
        self._bar = bar
        self._label = ""
        self._warm: set[bool] = set()  # of dense generations (True) and those with plans
        self._attention = family_of(pipe.transformer).attention_modules(pipe.transformer)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the attention modules in forward order."""
        return tuple(self._attention)

    def profiled(
        self, name: str, prompt: str, seed: int, sampled: Mapping[int, int], share: int = 0
    ) -> DenseRun:
        """Generates densely and profiles attention on the way; the first such run times the candidates."""
        timed = self._checkpoint.load("latency") is not None
        # Without the latencies, which somebody may have deleted, it is done again.
        stage = self._load(name) if timed else None
        if stage is None:
            self._warm_up(AccelPlan.preset("dense"), prompt)
            recorder = Recorder(
                self._candidates,
                sampled,
                len(self._attention),
                self._settings.num_inference_steps,
                once=None if timed else self._measure_latency,
                downstream=self._downstream,
                share=share,
                seed=seed,
            )
            with self._enabled(AccelPlan.preset("dense")) as all_states, ExitStack() as listening:
                steps_of = StepRecorder(
                    {
                        transformer: functools.partial(getattr, state, "branch")
                        for state, transformer in zip(all_states, transformers_of(self._pipe), strict=True)
                    },
                    spent=lambda: recorder.spent,
                    paired=lambda: any(state.paired for state in all_states),
                    guidance_scale=self._settings.guidance_scale,
                )
                listening.callback(steps_of.remove)
                for state, transformer in zip(all_states, transformers_of(self._pipe), strict=True):
                    listening.enter_context(recorder.attached(state, transformer))
                made = self._dense(name, prompt, seed)
                grid = next(state.grid for state in all_states if state.grid is not None)
            steps = self._settings.num_inference_steps
            if len(recorder.progress) != steps:
                raise ValueError(
                    f"scheduler: expected {steps} steps with different timesteps, "
                    f"got {len(recorder.progress)}; give the pipeline another scheduler"
                )
            tensors = {"frames": made.frames, "latents": made.latents}
            products = steps_of.products(steps)
            if products is not None:
                tensors["products"] = products.gram
                if products.conditional is not None:
                    tensors["conditional"] = products.conditional
            for branch, profiled in recorder.sums.items():
                tensors |= {f"{key}.{branch}": tensor for key, tensor in profiled.tensors().items()}
            values: dict[str, Any] = {
                "seconds": made.seconds - recorder.spent,
                "profile_seconds": recorder.spent,
                "forward_ms": steps_of.forward_ms,
                "step_branches": [] if products is None else list(products.branches),
                "branches": list(recorder.sums),
                "forwards": recorder.forwards,
                "progress": recorder.progress,
                "grid": asdict(grid),
            }
            stage = self._checkpoint.save(name, tensors, values)
        tensors, values = stage
        sums = {
            branch: ProfileSums({key: tensors[f"{key}.{branch}"] for key in ProfileSums.NAMES})
            for branch in values["branches"]
        }
        products = None
        if "products" in tensors:
            branches = tuple(values["step_branches"])
            steps = len(values["progress"])
            products = StepProducts(branches, steps, tensors["products"], tensors.get("conditional"))
        return DenseRun(
            tensors["frames"],
            tensors["latents"],
            values["seconds"],
            values["profile_seconds"],
            values["forward_ms"],
            products,
            sums,
            values["forwards"],
            values["progress"],
            TokenGrid(**values["grid"]),
        )

    def latency(self) -> Latency:
        """Latency of every candidate, known after the first `profiled`."""
        stage = self._checkpoint.load("latency")
        if stage is None:
            raise RuntimeError(
                "latencies are measured during the first profiled generation, which is still to come"
            )
        # Calibrations that know no price had one precision, and nothing to split.
        return Latency(stage[0]["candidates"], stage[1]["plain"], stage[1].get("split", 0.0))

    def dense(self, name: str, prompt: str, seed: int) -> Generation:
        """A plain dense generation."""
        stage = self._load(name)
        if stage is None:
            self._warm_up(AccelPlan.preset("dense"), prompt)
            made = self._dense(name, prompt, seed)
            tensors = {"frames": made.frames, "latents": made.latents}
            stage = self._checkpoint.save(name, tensors, {"seconds": made.seconds})
        return Generation(stage[0]["frames"], stage[0]["latents"], stage[1]["seconds"])

    def accelerated(
        self, name: str, plan: AccelPlan, prompt: str, seed: int, dense: DenseRun | Generation
    ) -> AcceleratedRun:
        """Generates with a plan and compares with the dense generation."""
        stage = self._load(name)
        if stage is None:
            self._warm_up(plan, prompt)
            calls: list[list[Any]] = []

            def keep_one(_layer: int, *call: Tensor | None) -> None:
                # Gigabytes for large models, and the decoder is still to come.
                calls[:] = [[None if x is None else x.cpu() for x in call]]
                for state in all_states:
                    state.capture = None

            with self._enabled(plan) as all_states, attention_watched(self._pipe) as attention:
                for state in all_states:
                    state.capture = keep_one
                made = self._generate(name, prompt, seed)
                guarded = sum(state.guarded_heads for state in all_states)
            device = self._pipe._execution_device
            one: list[Any] = [None if x is None else x.to(device) for x in calls[0]]
            if not made.is_finite:
                logger.warning(
                    "%s: what the plan generated is not finite, NaN counts as 0", name.replace("_", " ")
                )
                made = made.with_zeros()
            values = {
                "psnr": psnr(made.frames, dense.frames),
                "ssim": ssim(made.frames, dense.frames),
                "latent_rel_l2": latent_rel_l2(made.latents, dense.latents),
                "seconds": made.seconds,
                "guarded_heads": guarded,
                "attention_ms": 1000 * attention.seconds(),
                **self._timed_alone(plan, all_states[0], *one),
            }
            stage = self._checkpoint.save(name, {"choice": plan.choice}, values)
        return AcceleratedRun(**stage[1])

    def known_trials(self, goal: str, search: str) -> list[dict[str, Any]]:
        """Trials of the searches for goals of that name that were finished when this one first began."""
        stage = self._checkpoint.load(f"known_{search}")
        if stage is None:
            others = [name for name in self._checkpoint.names(f"search_{goal}") if name != f"search_{search}"]
            loaded = [self._checkpoint.load(name) for name in others]
            trials = [trial for found in loaded if found is not None for trial in found[1]["trials"]]
            stage = self._checkpoint.save(f"known_{search}", {}, {"trials": trials})
        return stage[1]["trials"]

    def keep_trials(self, search: str, trials: Sequence[Mapping[str, Any]]) -> None:
        """Leave the trials of a finished search to others."""
        self._checkpoint.save(f"search_{search}", {}, {"trials": list(trials)})

    def skip(self, generations: int) -> None:
        """Takes generations that are not needed off the progress bar."""
        self._bar.total = (self._bar.total or 0) - generations * self._settings.num_inference_steps
        self._bar.refresh()

    def _load(self, name: str) -> Stage | None:
        stage = self._checkpoint.load(name)
        if stage is not None:
            self.skip(1)
        return stage

    def _dense(self, name: str, prompt: str, seed: int) -> Generation:
        made = self._generate(name, prompt, seed)
        if not made.is_finite:
            raise ValueError(
                f"pipe: expected finite frames of its dense generation of {prompt!r}, got NaN or infinity; give the "
                "model another dtype, bfloat16 for instance"
            )
        return made

    def _warm_up(self, plan: AccelPlan, prompt: str) -> None:
        """Keep what is loaded and compiled once out of the times of a process on a GPU, of dense generations and plans.

        On a CPU that is little, and two steps are long.
        """
        dense = all(candidate.is_dense for candidate in plan.candidates)
        if dense in self._warm or not _is_slow_at_first(self._pipe._execution_device):
            return
        self._warm.add(dense)
        self._bar.set_description("warm-up")
        short = self._settings.with_steps(min(_WARM_UP_STEPS, self._settings.num_inference_steps))
        with self._enabled(plan):
            generate(self._pipe, prompt, short, seed=0)

    def _generate(self, name: str, prompt: str, seed: int) -> Generation:
        self._label = name.replace("_", " ")
        self._bar.set_description(self._label)
        return generate(self._pipe, prompt, self._settings, seed=seed, on_step=self._bar.update)

    @contextmanager
    def _enabled(self, plan: AccelPlan) -> Iterator[list[AccelState]]:
        enable(self._pipe, plan)
        try:
            yield states(self._pipe)
        finally:
            disable(self._pipe)

    def _original(self, key_mask: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The model's own attention."""
        mask = None if key_mask is None else key_mask[:, None, None]
        backend = getattr(next(iter(self._attention.values())).processor, "_attention_backend", None)
        return lambda q, k, v: dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)

    def _timed_alone(
        self,
        plan: AccelPlan,
        state: AccelState,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
    ) -> dict[str, Any]:
        """What `AcceleratedRun` has of the original path and of single layers, on the tensors of one call."""
        plain, latency = self._plain_ms(query, key, value, key_mask), self.latency()
        found: dict[str, Any] = {"plain_ms": plain, "layer_errors": []}
        if state.grid is None:
            return found
        rows = [row for row in plan.choice.flatten(0, 1).unique(dim=0).tolist() if not self._is_dense(row)]
        places = {number * len(rows) // _LAYERS_TIMED for number in range(_LAYERS_TIMED)} if rows else ()
        rows = [rows[place] for place in sorted(places)]
        with torch.no_grad():
            taken = measure_layers(
                query,
                key,
                value,
                state.grid,
                plan.candidates,
                rows,
                block=plan.block,
                key_mask=key_mask,
                branches=2 if state.several_branches else 1,
                paired=state.paired,
            )
        for row, measured in zip(rows, taken, strict=True):
            launches = len({self._candidates[number].precision for number in row})
            predicted = float(latency.candidates[row].sum()) + (launches - 1) * latency.split
            if predicted > 0:  # calibrations that price by pairs have heads that cost nothing
                found["layer_errors"].append(measured / (predicted * plain / latency.plain) - 1)
        return found

    def _is_dense(self, row: Sequence[int]) -> bool:
        return all(self._candidates[number].is_dense for number in row)

    def _plain_ms(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> float:
        """Of a head on the original path, as fast as the machine is now: median of three calls after one."""
        original = self._original(key_mask)
        with torch.no_grad():
            taken = [milliseconds(lambda: original(query, key, value), query.device) for _ in range(4)]
        return median(taken[1:]) / query.shape[2]

    def _measure_latency(
        self,
        state: AccelState,
        branches: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
    ) -> None:
        if state.grid is None:
            raise RuntimeError(
                "the token grid is unknown; AccelState.capture must be set before the generation"
            )
        share = LATENCY_STEPS / latency_calls(self._candidates)
        self._bar.set_description("latency")
        start = now(query.device)
        with torch.no_grad():
            latency = measure_latency(
                query,
                key,
                value,
                state.grid,
                self._candidates,
                self._original(key_mask),
                block=state.plan.block,
                key_mask=key_mask,
                branches=branches,
                paired=state.paired,
                on_call=lambda: self._bar.update(share),
            )
        values = {"plain": latency.plain, "split": latency.split, "seconds": now(query.device) - start}
        self._checkpoint.save("latency", {"candidates": latency.candidates}, values)
        self._bar.set_description(self._label)
