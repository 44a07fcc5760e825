"""Where a generation is: token grid, denoising position and guidance branch of the running forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn

from dit_accel.caching.runtime import StepCache
from dit_accel.clock import Clock
from dit_accel.grid import TokenGrid
from dit_accel.guard import Guard, GuardMemory
from dit_accel.pipelines import ModelFamily, transformers_of
from dit_accel.plan import AccelPlan

logger = logging.getLogger("dit_accel")

HOOK_NAME = "dit_accel"
# `cache_context` of pipelines that run both guidance branches in one batch, also of those calls without guidance.
_ONE_BATCH = "cond_uncond"
_MOST_TURNS = 3  # forwards of one step beyond its first; more of them are other generations

# capture(layer_index, query, key, value, key_mask): tensors `[batch, seq, heads, dim]` after normalisation
# and RoPE, key_mask bool `[batch, seq]` or None.
Capture = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], None]


@dataclass
class BranchState:
    """One guidance branch during one generation."""

    first_progress: float
    progress: float
    forwards: int = 0
    first_step: int = 0  # of the generation, that the branch saw


@dataclass
class Stats:
    """Attention calls of one generation, and the query-key pairs they kept."""

    kept_pairs: float | Tensor = 0.0  # on a GPU a number there, until somebody asks
    total_pairs: float = 0.0
    sparse_calls: int = 0
    dense_calls: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.kept_pairs + other.kept_pairs,
            self.total_pairs + other.total_pairs,
            self.sparse_calls + other.sparse_calls,
            self.dense_calls + other.dense_calls,
        )


class ForwardError(ValueError):
    """A plan cannot follow a forward of its transformer."""


class AccelState:
    """The plan of one transformer and the position of its running forward.

    What pattern families remember between steps is forgotten when a generation ends or starts.

    Attributes:
        all_dense: whether the plan has no sparse head anywhere.
        grid: token grid of the running forward; None while nobody needs it (a plan that is dense throughout).
        progress: fraction of the denoising done, see `ModelFamily.progress`.
        branch: diffusers' `cache_context` name. Outside one "" for the first forward of a step, which may hold both
            branches, and "turn 1" and so on for those that follow in the same step.
        step: number of the denoising step, as far as the transformer saw them.
        several_branches: whether a step of this generation has run more than one guidance branch.
        paired: whether the batch of the running forward holds two guidance branches, the unconditional one first.
        batch: of the running forward; 0 where nobody said.
        running: whether a forward is under way.
        guard: checks the plan's heads while they run; None leaves them alone.
        stats: counts of the generation that runs, or ran last.
        memory: what its branches of guidance share.
        capture: optional callback on every swapped attention call, before the attention is computed.
        watch: optional context of every swapped attention call.
    """

    def __init__(
        self,
        plan: AccelPlan,
        family: ModelFamily,
        backend: str = "auto",
        guard: Guard | None = None,
        layers: int = 0,
    ) -> None:
        self._first_sparse = plan.first_sparse(layers)
        self.plan = plan
        self.family = family
        self.backend = backend
        self.guard = guard
        self.capture: Capture | None = None
        self.watch: Callable[[], AbstractContextManager[None]] | None = None
        self.grid: TokenGrid | None = None
        self.progress = 0.0
        self.branch = ""
        self.step = 0
        self.paired = False
        self.batch = 0
        self.running = False
        self.stats = Stats()
        self.memory: dict[str, Any] = {}
        self._branches: dict[str, BranchState] = {}
        self.several_branches = False
        self._in_step: set[str] = set()  # branches that the step has seen
        self._finished = False
        self._rows: dict[tuple[int, int], tuple[Tensor, bool]] = {}
        self._compared = plan.grid is None
        self._dense = [candidate.is_dense for candidate in plan.candidates]
        self.all_dense = all(self._dense[choice] for choice in plan.choice.unique().tolist())

    @property
    def guarded(self) -> GuardMemory:
        """What the guard knows of this generation."""
        if self.guard is None:
            raise RuntimeError("this plan runs without a guard")
        if "guard" not in self.memory:
            self.memory["guard"] = self.guard.memory()
        return self.memory["guard"]

    @property
    def guarded_heads(self) -> int:
        """Heads that the guard made dense in this generation."""
        if self.guard is None:
            return 0
        self.guard.settle(self.guarded)
        return int(self.guarded.dense.sum())

    @property
    def launches(self) -> dict[Any, Any]:
        """The block lists of static rows, of both branches, until the generation is complete."""
        return self.memory.setdefault("launches", {})

    @property
    def here(self) -> BranchState:
        """Of the running branch."""
        return self._branches[self.branch]

    @property
    def forwards(self) -> int:
        """Forwards of the running branch in this generation, the running one included."""
        return self.here.forwards

    @property
    def cache(self) -> dict[Any, Any]:
        """What the pattern families keep from step to step."""
        return self.memory.setdefault("patterns", {})

    def _compare(self, grid: TokenGrid | None) -> None:
        """Say once that the plan was calibrated on another grid."""
        if grid is None or self._compared:
            return
        self._compared = True
        here, there = ((g.frames, g.height, g.width) for g in (grid, self.plan.grid or grid))
        if here != there:
            logger.warning(
                "plan: calibrated for %d x %d x %d tokens (frames, height, width), runs on %d x %d x %d; it keeps the "
                "shares of keys that it was given, what quality they give here was not measured",
                *there,
                *here,
            )

    def begin(
        self,
        grid: TokenGrid | None,
        progress: float,
        branch: str = "",
        new: bool | None = None,
        *,
        paired: bool = False,
        batch: int = 0,
    ) -> None:
        """Enter a forward. A generation that ended, failed or was interrupted is forgotten.

        Args:
            new: whether another generation began since the last forward; None if nobody knows.
            paired, batch: see there.
        """
        if self.running or self._finished or new or self._starts_over(progress, branch, new is None):
            self.reset()
        if progress != self.progress or branch in self._in_step:
            self.step += 1
            self.several_branches |= len(self._in_step) > 1
            self._in_step.clear()
        self._in_step.add(branch)
        self.grid, self.progress, self.branch, self.paired, self.batch = grid, progress, branch, paired, batch
        self._compare(grid)
        position = self._branches.setdefault(branch, BranchState(progress, progress))
        position.progress = progress
        position.forwards += 1
        if self.guard is not None:
            self.guard.settle(self.guarded)
        self.running = True

    def holds_both(self, query: Tensor) -> bool:
        """Whether a call's batch holds two guidance branches: FasterCache leaves one out inside a forward."""
        return self.paired and self.batch in (0, query.shape[0])

    def end(self) -> None:
        """Leave the forward. One that raised never gets here, and the next `begin` sees it."""
        self.running = False

    def finish(self) -> None:
        """Mark the generation as complete; its stats stay until the next one begins."""
        self._finished = True
        for part in ("launches", "patterns"):
            self.memory.pop(part, None)

    def reset(self) -> None:
        """Forget the generation."""
        self._branches.clear()
        self._in_step.clear()
        self.several_branches = False
        self.step = 0
        self.memory = {}
        self.stats = Stats()
        self.running = self._finished = False

    def row(self, layer: int) -> tuple[Tensor, bool]:
        """Candidate of each head of a layer at the current position, and whether all of them are dense."""
        key = (self.plan.range_at(self.progress), layer)
        if key not in self._rows:
            row = self.plan.row(self.progress, layer)
            dense = layer < self._first_sparse or all(self._dense[choice] for choice in row.tolist())
            self._rows[key] = row, dense
        if self.guard is None or not self.guarded.dense[layer].any():
            return self._rows[key]
        row = self.guard.row(self._rows[key][0], layer, self.guarded)
        return row, all(self._dense[choice] for choice in row.tolist())

    def record(self, pairs: int, density: float | Tensor, sparse: bool) -> None:
        """Count one attention call over `pairs` query-key pairs."""
        self.stats += Stats(density * pairs, pairs, int(sparse), int(not sparse))

    def _starts_over(self, progress: float, branch: str, guess: bool) -> bool:
        position = self._branches.get(branch)
        if position is None:
            return False
        # Some schedulers visit a timestep twice, but hardly one the first: where nobody knows that is a new generation.
        return progress < position.progress or (guess and progress == position.first_progress)


class _BranchTracker(StateManager):
    """Receives the name of diffusers' `cache_context`; diffusers finds it as an attribute of the hook."""

    def __init__(self) -> None:
        # Diffusers annotates an instance where it takes a class.
        super().__init__(cast(Any, BranchState))
        self.branch = ""

    def set_context(self, context: Any) -> None:
        self.branch = "" if context is None else context.name


class AccelHook(ModelHook):
    """Tells the state, before the first block runs, where the forward is.

    Diffusers tells this hook the guidance branch and the end of a generation. The forward itself is watched
    with hooks of torch: those of diffusers wrap `forward`, which CPU offloading puts back to what it found.
    """

    _is_stateful = True

    def __init__(
        self,
        state: AccelState,
        restore: Callable[[], None],
        swapped: Mapping[str, tuple[nn.Module, type]],
        steps: StepCache | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        self.state = state
        self.restore = restore
        self.in_place = False  # whether the plan's processors were seen on the transformer
        self._swapped = swapped
        self.steps = steps
        self._clock = clock
        self._generation: Tensor | None = None
        self._here: tuple[int | None, float] | None = None
        self._turn = 0
        self.tracker = _BranchTracker()
        self._handles: list[Any] = []

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Watch the forwards of the transformer; diffusers calls this on registration."""
        self._handles = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, always_call=True),
        ]
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Stop watching; diffusers (whose spelling this is) calls it on removal."""
        for handle in self._handles:
            handle.remove()
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Diffusers calls this when a pipeline is done with a generation."""
        if self.steps is not None:
            self.steps.release(self.state.memory)
        self.state.finish()
        if self._clock is not None:
            self._clock.forget()
        return module

    def __deepcopy__(self, memo: Any) -> AccelHook:
        raise ValueError(
            "dit-accel: a copy would share the plan of the original; disable(pipe) before copying it"
        )

    # May read the timestep's value, which a compiler cannot trace; blocks are compiled below this.
    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state
        if getattr(module, "_parallel_config", None) is not None and (self.steps or not state.all_dense):
            kind = "skips steps" if state.all_dense else "has sparse heads"
            raise RuntimeError(
                f"{type(module).__name__} has a parallel config, and a plan that {kind} cannot run "
                "on a split sequence or split heads; disable() dit-accel or use a dense plan."
            )
        self._check_processors()
        arguments = state.family.bind(module, args, kwargs)
        try:
            self._enter(module, arguments)
        except ValueError as error:
            raise ForwardError(str(error)) from error

    def _enter(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        state = self.state
        grid = (
            None if state.all_dense and state.capture is None else state.family.read_grid(module, arguments)
        )
        value = None if self._clock is None else self._clock.value_of(arguments["timestep"])
        progress, new = state.family.progress(arguments, value), None
        if self._clock is not None:
            progress = progress if value is not None else self._clock.unrounded(progress)
            before, self._generation = self._generation, self._clock.generation()
            new = None if self._generation is None else self._generation is not before
        paired = self._holds_both(arguments["hidden_states"])
        batch = len(arguments["hidden_states"])
        state.begin(grid, progress, self._branch(progress, bool(new)), new, paired=paired, batch=batch)
        if self.steps is not None:
            other = other_cache(module)
            if other is not None:
                raise RuntimeError(
                    f"{type(module).__name__}: expected no cache beside the plan's own, got {other}; disable it or "
                    "use a plan without one"
                )
            if self._clock is None:
                raise RuntimeError("a cache of steps runs in a pipeline, which has a scheduler")
            self.steps.check(arguments)
            step, steps = self._place(self._clock)
            shared = self._clock.memory
            self.steps.begin(arguments["hidden_states"], step, steps, state.branch, state.memory, shared)

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if output is None:  # it raised; the state stays as it is, and the next forward sees that
            if self.steps is not None:
                self.steps.abandon()
            return None
        self.state.end()
        return None if self.steps is None else self.steps.end(output)

    def _holds_both(self, latents: Tensor) -> bool:
        """Whether a batch holds both guidance branches: then its halves are the same latents.

        That is looked at in the first two forwards of a generation, for which the host waits: two prompts may begin
        with the same noise, but they do not go on alike.
        """
        if self.tracker.branch != _ONE_BATCH or self._clock is None or len(latents) % 2:
            return False
        looks: list[bool] = self._clock.memory.setdefault("paired", [])
        if len(looks) < 2:
            looks.append(torch.equal(*latents.chunk(2)))
        return all(looks)

    def _branch(self, progress: float, new: bool) -> str:
        """The guidance branch of the forward that begins.

        Some pipelines (image to video, FLUX with a true guidance scale) run both without telling which is which. Then a
        forward of the same step as the one before is the next branch.
        """
        if self.tracker.branch or self._clock is None:
            return self.tracker.branch
        here = (self._clock.step_index(), progress)
        again = here == self._here and not new and self._turn < _MOST_TURNS
        self._here, self._turn = here, self._turn + 1 if again else 0
        return f"turn {self._turn}" if self._turn else ""

    def _check_processors(self) -> None:
        """Refuse to go on without the processors of the plan, once they have been in place."""
        replaced = [
            name for name, (module, cls) in self._swapped.items() if type(module.processor) is not cls
        ]
        if not replaced:
            self.in_place = True
        elif self.in_place or len(replaced) < len(self._swapped):
            raise RuntimeError(
                f"dit-accel: {len(replaced)} of {len(self._swapped)} attention processors were replaced since the plan "
                f"was enabled (by fuse_qkv_projections, load_ip_adapter or set_attn_processor), {replaced[0]} first; "
                "call disable(pipe), then enable(pipe, plan) again"
            )

    def _place(self, clock: Clock) -> tuple[int, int]:
        """Number of the denoising step, and how many the generation has.

        It begins with the first step that any transformer sees: image to image leaves out those before. Two experts
        share one generation, so steps are counted from where this transformer came in.
        """
        state, progress = self.state, clock.progress()
        if clock.stands_still(state.progress):
            raise RuntimeError(
                "dit-accel: expected the scheduler of the pipeline that the plan was enabled on to run, got one that "
                "stood still over three steps; a pipeline that shares the transformer needs enable(pipe, plan) itself"
            )
        if state.forwards == 1:
            distance = [abs(p - state.progress) for p in progress]
            state.here.first_step = distance.index(min(distance))
        first = clock.memory.setdefault("first step", state.here.first_step)
        return state.here.first_step - first + state.forwards - 1, len(progress) - first


def other_cache(transformer: nn.Module) -> str | None:
    """Name of the cache of diffusers or cache-dit that is enabled on a transformer, if any."""
    if getattr(transformer, "is_cache_enabled", False):
        return f"diffusers' {type(cast(Any, transformer)._cache_config).__name__}"
    # cache-dit sets it on the transformers it wraps, and deletes it when it is disabled.
    return "cache-dit" if getattr(transformer, "_is_cached", False) else None


def check_plain(pipe: Any) -> None:
    """Raise ValueError for a pipeline that cannot be measured as it is, since a plan or a cache is on it."""
    for transformer in transformers_of(pipe):
        found = other_cache(transformer) if hook_of(transformer) is None else "a plan of dit-accel"
        if found is not None:
            raise ValueError(
                f"pipe: expected it without plan and cache, to measure it as it is, got {found}; disable it first"
            )


def hook_of(transformer: nn.Module) -> AccelHook | None:
    """The hook on a transformer, or None if dit-accel is not enabled there."""
    registry = getattr(transformer, "_diffusers_hook", None)
    hook = registry.get_hook(HOOK_NAME) if isinstance(registry, HookRegistry) else None
    return hook if isinstance(hook, AccelHook) else None
