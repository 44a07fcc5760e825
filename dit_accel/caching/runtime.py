"""Skips blocks of a running transformer, and puts a forecast in the place of what they would have computed.

A transformer of diffusers runs `for block in self.blocks`. While a cache is on, those module lists hand out their
blocks one at a time and stop where the rest is to be skipped. Blocks are never replaced, so they can be compiled and
offloaded as ever, and what decides runs between them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from dit_accel.caching.calls import block_inputs, block_outputs, like, named_arguments, with_sample
from dit_accel.caching.config import GATES, CacheConfig, Schedule
from dit_accel.caching.forecast import History, weighted_sum
from dit_accel.caching.gates import Gate, gate_of
from dit_accel.pipelines import ModelFamily

__all__ = ["Counts", "StepCache"]

# A schedule at other step counts than its own follows the line through two computed outputs as far as this many times
# their distance, and stays there.
_LINE_REACH = 2
# Names of the guidance branches: in pipelines that name them, and in those that run them one after the other.
_NAMED, _IN_TURNS = ("cond", "uncond"), ("", "turn 1")
_GROUP_OFFLOADING = "group_offloading"  # diffusers' name of that hook


@dataclass
class Counts:
    """Forwards and blocks of one generation that were computed and skipped."""

    computed_forwards: int = 0
    skipped_forwards: int = 0
    computed_blocks: int = 0
    skipped_blocks: int = 0


@dataclass
class _Generation:
    """What one generation remembers for all branches of guidance."""

    gate: Gate
    counts: Counts = field(default_factory=Counts)
    decisions: dict[int, bool] = field(default_factory=dict)
    deciders: dict[int, str] = field(default_factory=dict)
    skips_in_a_row: int = 0
    # Of a schedule; shared with the pipeline's other expert.
    outputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=dict)
    bytes: int = 0  # most that were held at a time

    def let_go(self, config: CacheConfig) -> None:
        """Let go of all tensors but those that the other expert may read."""
        self.gate = gate_of(config)
        self.histories.clear()

    def release(self, config: CacheConfig) -> None:
        """Let go of all tensors."""
        self.let_go(config)
        self.outputs.clear()


@dataclass
class _Forward:
    """The running forward: where it is, and what it has seen."""

    step: int
    steps: int
    branch: str
    latents: Tensor
    generation: _Generation
    decides: bool  # whether this branch's gate speaks for the step
    skip: bool | None = None  # None until the gate has seen its signal
    signal: Tensor | None = None
    start: tuple[Tensor, Tensor | None] | None = None  # input of the part that may be skipped
    head_input: Tensor | None = None
    jumped: bool = False
    blocks: int = 0


class StepCache:
    """The cache of one transformer.

    Args:
        transformer: it must have no cache of its own.
        family: of the transformer.
        config: what to skip.

    Raises:
        ValueError: the configuration does not fit the transformer's blocks.
    """

    def __init__(self, transformer: nn.Module, family: ModelFamily, config: CacheConfig) -> None:
        self.config = config
        self.family = family
        self._forward: _Forward | None = None
        self._said = False
        self._lists: list[nn.ModuleList] = [getattr(transformer, name) for name, _ in family.blocks]
        total = sum(len(blocks) for blocks in self._lists)
        self._first, self._end = config.first_blocks, total - config.last_blocks
        self._total = total
        if self._first >= self._end:
            raise ValueError(
                f"cache: expected first_blocks + last_blocks below the {total} blocks of {type(transformer).__name__}, "
                f"got {config.first_blocks} + {config.last_blocks}; nothing would be left to skip"
            )

    def install(self) -> Callable[[], None]:
        """Let the transformer's block lists ask this cache; return a function that undoes it."""
        before, offset = [type(blocks) for blocks in self._lists], 0
        for blocks in self._lists:
            hand_out = functools.partial(self._hand_out, offset)
            blocks.__class__ = type(type(blocks).__name__, (type(blocks),), {"__iter__": _asking(hand_out)})
            offset += len(blocks)

        def remove() -> None:
            for blocks, cls in zip(self._lists, before, strict=True):
                blocks.__class__ = cls

        return remove

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a forward in which blocks cannot be skipped.

        Raises:
            ValueError: a ControlNet adds to the blocks by their number, the gate needs weights that are offloaded, or
                the last blocks begin in the middle of a group that is offloaded together.
        """
        block = next(iter(self._lists[0].children()))
        if self.config.gate == "teacache" and self.family.modulation_has_weights and _is_offloaded(block):
            raise ValueError(
                "cache: expected weights that stay on the device, since the gate 'teacache' reads those of the first "
                "block before it runs, got a block that is offloaded; use another gate or enable_model_cpu_offload()"
            )
        if self._end < self._total:
            after = [block for blocks in self._lists for block in blocks.children()][self._end]
            leader = _loads(after)
            if leader is not None and leader is not after:
                raise ValueError(
                    f"cache: expected the last {self.config.last_blocks} blocks to begin a group of those that are "
                    "offloaded together, since a skipped step loads no group from its middle, got a group that begins "
                    "before; use enable_group_offload(..., num_blocks_per_group=1), or another last_blocks"
                )
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if self.config.target == "blocks" and arguments.get(name) is not None:
                raise ValueError(
                    f"cache: expected no {name} for the target 'blocks', since they are added to blocks by number, got "
                    "some; use a cache of the target 'output', for instance preset 'easycache'"
                )

    def begin(
        self,
        latents: Tensor,
        step: int,
        steps: int,
        branch: str,
        memory: MutableMapping[str, Any],
        shared: MutableMapping[str, Any] | None = None,
    ) -> None:
        """Enter a forward.

        Args:
            latents: the transformer's input.
            step, steps: number of the denoising step, and how many there are.
            branch: of guidance.
            memory: kept for one generation, shared by its branches.
            shared: like memory, of all transformers of a pipeline.
        """
        branch = self._known(branch)
        generation = memory.get("cache")
        if generation is None:
            shared = {} if shared is None else shared
            for earlier in shared.get("generations", ()):
                earlier.let_go(self.config)  # an expert comes once
            generation = _Generation(gate_of(self.config), outputs=shared.setdefault("outputs", {}))
            shared.setdefault("generations", []).append(generation)
            memory["cache"] = generation
        decides = generation.deciders.setdefault(step, branch) == branch
        forward = _Forward(step, steps, branch, latents, generation, decides)
        if decides and GATES[self.config.gate] == "latents":
            forward.signal = latents
        if self.config.schedule is not None:
            last_read = self.config.schedule.last_read
            for key in [key for key in generation.outputs if last_read.get(key, step) < step]:
                del generation.outputs[key]
            forward.skip = self._allowed(forward) and self.config.schedule.skips(branch, step, steps)
        elif not self._has_history(forward):
            forward.skip = False
        elif step in generation.decisions:
            forward.skip = generation.decisions[step]
        elif not self._allowed(forward):
            forward.skip = False
        elif GATES[self.config.gate] in ("step", "latents"):
            forward.skip = generation.gate.skip(step, steps, forward.signal)
        self._forward = forward

    def _known(self, branch: str) -> str:
        """The schedule's name of a branch: of one model some pipelines name the branches, others run them in turns."""
        schedule = self.config.schedule
        if schedule is None or branch in schedule.forecasts:
            return branch
        theirs = list(schedule.forecasts)
        for here, there in ((_NAMED, _IN_TURNS), (_IN_TURNS, _NAMED)):
            if branch in here and theirs == list(there[: len(theirs)]) and here.index(branch) < len(theirs):
                return theirs[here.index(branch)]
        return branch

    @property
    def _running(self) -> _Forward:
        if self._forward is None:
            raise RuntimeError("cache: expected a forward of the transformer to be running, got none")
        return self._forward

    def abandon(self) -> None:
        """Leave a forward that raised."""
        self._forward = None

    def end(self, output: Any) -> Any:
        """Leave the forward; returns what replaces the transformer's output, None where it stays."""
        forward, self._forward = self._running, None
        generation, counts = forward.generation, forward.generation.counts
        sample = output[0]
        counts.computed_blocks += forward.blocks
        counts.skipped_blocks += self._total - forward.blocks
        if forward.decides:
            generation.decisions[forward.step] = bool(forward.skip)
            generation.skips_in_a_row = generation.skips_in_a_row + 1 if forward.skip else 0
            if not forward.skip:
                generation.gate.computed(forward.step, forward.steps, forward.signal, sample)
        if not forward.skip and self.config.target == "output":
            self._remember_output(forward, sample)
        held = generation.gate.bytes + sum(history.bytes for history in generation.histories.values())
        held += sum(output.numel() * output.element_size() for output in generation.outputs.values())
        generation.bytes = max(generation.bytes, held)
        if not forward.skip:
            counts.computed_forwards += 1
            if forward.step == forward.steps - 1:
                self._say_if_idle(forward)
            if forward.step == forward.steps - 1 and not self._forecasts_last(forward):
                generation.release(self.config)
            return None
        counts.skipped_forwards += 1
        if self.config.target != "output":
            return None
        return with_sample(output, self._forecast_output(forward, sample))

    def _say_if_idle(self, forward: _Forward) -> None:
        """Warn once of a schedule that leaves out steps, but left out none."""
        schedule, counts = self.config.schedule, forward.generation.counts
        if (
            self._said
            or schedule is None
            or not any(schedule.forecasts.values())
            or counts.skipped_forwards
            or forward.steps < self.config.min_steps
            or len(forward.generation.deciders) < forward.steps  # the other expert may have skipped
        ):
            return
        self._said = True
        warnings.warn(
            f"cache: the plan's schedule left out no step: it was made for the guidance branches "
            f"{', '.join(map(repr, schedule.forecasts))}, this generation ends with {forward.branch!r}; generate with "
            "guidance as in the calibration, or calibrate for what you run",
            stacklevel=2,
        )

    def _forecasts_last(self, forward: _Forward) -> bool:
        """Whether a schedule has a branch forecast from the other one at the last step; gates never skip it."""
        schedule = self.config.schedule
        last = forward.steps - 1
        return schedule is not None and any(
            schedule.skips(b, last, forward.steps) for b in schedule.forecasts
        )

    def release(self, memory: MutableMapping[str, Any]) -> None:
        """Let go of the tensors of a generation that is over; what was counted stays."""
        generation = memory.get("cache")
        if generation is not None:
            generation.release(self.config)

    def counts(self, memory: MutableMapping[str, Any]) -> Counts:
        """What the generation that owns the memory has computed and skipped."""
        generation = memory.get("cache")
        return Counts() if generation is None else generation.counts

    def bytes(self, memory: MutableMapping[str, Any]) -> int:
        """Most memory that gate and forecasts took in a generation, with the outputs that experts share."""
        generation = memory.get("cache")
        return 0 if generation is None else generation.bytes

    def _allowed(self, forward: _Forward) -> bool:
        """Whether the plan's limits leave the gate a choice at this step."""
        config = self.config
        if forward.steps < config.min_steps:
            return False
        if config.schedule is not None:
            return self._has_history(forward) and self._in_reach(config.schedule, forward)
        return (
            config.first_choice(forward.steps) <= forward.step < forward.steps - config.cool_down
            and forward.generation.skips_in_a_row < config.max_skips
        )

    def _has_history(self, forward: _Forward) -> bool:
        schedule = self.config.schedule
        if schedule is not None and forward.steps == schedule.steps:
            terms = schedule.forecasts.get(forward.branch, {}).get(forward.step, ())
            stored = forward.generation.outputs
            return all(term.branch == "latents" or (term.branch, term.step) in stored for term in terms)
        return bool(self._history(forward).steps)

    def _in_reach(self, schedule: Schedule, forward: _Forward) -> bool:
        """Whether the last computed forward is no further back than the run of forecasts is long that the step lies in.

        With fewer steps than the schedule's own, steps that it computes may fall between two of the generation's.
        """
        if forward.steps == schedule.steps:
            return True
        last, here = (
            schedule.nearest(step, forward.steps) for step in (self._history(forward).steps[-1], forward.step)
        )
        return here - last <= schedule.reach(forward.branch, here)

    def _history(self, forward: _Forward) -> History:
        order = 1 if self.config.schedule is not None else self.config.order
        return forward.generation.histories.setdefault(forward.branch, History(order + 1))

    # A compiler cannot trace what changes from step to step; the blocks themselves may be compiled.
    @torch.compiler.disable(recursive=False)
    def _hand_out(self, offset: int, blocks: nn.ModuleList) -> Iterator[Callable[..., Any]]:
        forward = self._forward
        if forward is None:  # somebody looks through the blocks, no forward is running
            yield from nn.ModuleList.__iter__(blocks)
            return
        here = range(offset, offset + len(blocks))
        for number, block in zip(here, nn.ModuleList.__iter__(blocks), strict=True):
            if forward.skip and self._begins_skip(forward, number) <= number < self._end:
                if number == self._end - 1 and not forward.jumped:
                    yield functools.partial(self._jump, block)
                continue
            yield functools.partial(self._call, number, block)

    def _begins_skip(self, forward: _Forward, number: int) -> int:
        """First block that a skipped forward leaves out: the head runs where its output is needed."""
        needed = self.config.residual and self.config.target == "blocks"
        decided_late = GATES[self.config.gate] == "head" and forward.signal is not None
        return self._first if needed or decided_late else 0

    def _call(self, number: int, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._computed(number, block, args, kwargs)
        except BaseException:  # hooks of torch do not see a KeyboardInterrupt
            self.abandon()
            raise

    def _computed(self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block, or stand in for it where the gate decides so on its way in."""
        forward = self._running
        hidden, encoder = block_inputs(self.family, args, kwargs)
        looks_at = GATES[self.config.gate]
        if number == 0 and forward.decides:
            if self.config.gate == "first-block":
                forward.head_input = hidden
            if looks_at == "input":
                forward.signal = self.family.modulated(block, named_arguments(block, args, kwargs))
                if forward.skip is None:
                    forward.skip = forward.generation.gate.skip(forward.step, forward.steps, forward.signal)
                if forward.skip and self._first == 0:
                    return (
                        self._jump(block, *args, **kwargs) if self._end == 1 else self._pass(hidden, encoder)
                    )
        if number == self._first:
            forward.start = hidden, encoder
        forward.blocks += 1
        output = block(*args, **kwargs)
        if number == self._first - 1 and looks_at == "head" and forward.decides:
            after = block_outputs(self.family, output)[0]
            forward.signal = after if forward.head_input is None else after - forward.head_input
            if forward.skip is None:
                forward.skip = forward.generation.gate.skip(forward.step, forward.steps, forward.signal)
        if number == self._end - 1 and not forward.skip and self.config.target == "blocks":
            self._remember_blocks(forward, block_outputs(self.family, output))
        return output

    def _jump(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for all skipped blocks: their last one's output, as forecast."""
        forward = self._running
        forward.jumped = True
        hidden, encoder = block_inputs(self.family, args, kwargs)
        if self.config.target == "output":
            return self._pass(hidden, encoder)
        values = self._history(forward).forecast(forward.step)
        if self.config.residual:
            values = tuple(
                v + now for v, now in zip(values, (hidden, encoder), strict=False) if now is not None
            )
        return self._pass(values[0], values[1] if len(values) > 1 else encoder)

    def _pass(self, hidden: Tensor, encoder: Tensor | None) -> Any:
        """What a block of the family returns for these hidden states."""
        by_name = {"hidden_states": hidden, "encoder_hidden_states": encoder}
        parts = tuple(by_name[name] for name in self.family.block_returns)
        return parts if len(parts) > 1 else parts[0]

    def _remember_blocks(self, forward: _Forward, output: tuple[Tensor, Tensor | None]) -> None:
        if forward.start is None:
            raise RuntimeError("a forward ended whose blocks were never begun")
        values: list[Tensor] = []
        for value, before in zip(output, forward.start, strict=True):
            # Text that no later block reads need not be kept.
            if value is not None and (not values or self.config.last_blocks):
                values.append(value - before if self.config.residual and before is not None else value)
        self._history(forward).push(forward.step, tuple(values))

    def _remember_output(self, forward: _Forward, sample: Tensor) -> None:
        schedule = self.config.schedule
        if schedule is not None and forward.steps == schedule.steps:
            key = forward.branch, forward.step
            if key in schedule.last_read:
                forward.generation.outputs[key] = sample
            return
        value = sample - like(forward.latents, sample) if self.config.residual else sample
        history = self._history(forward)
        # With more steps than the schedule's, those that stand for one of its steps are one point: lines through points
        # close together reach far.
        instead = False
        if schedule is not None and history.steps:
            last, now = (schedule.nearest(step, forward.steps) for step in (history.steps[-1], forward.step))
            instead = last == now
        history.push(forward.step, (value,), instead=instead)

    def _forecast_output(self, forward: _Forward, sample: Tensor) -> Tensor:
        schedule = self.config.schedule
        latents = like(forward.latents, sample)
        if schedule is not None and forward.steps == schedule.steps:
            terms = schedule.forecasts[forward.branch][forward.step]
            outputs = forward.generation.outputs
            values = [latents if t.branch == "latents" else outputs[t.branch, t.step] for t in terms]
            return weighted_sum([v.to(sample.dtype) for v in values], [term.weight for term in terms])
        history, at = self._history(forward), float(forward.step)
        if (
            schedule is not None
        ):  # a line through two points close together says little of places far from them
            at = min(at, history.steps[-1] + _LINE_REACH * (history.steps[-1] - history.steps[0]))
        value = history.forecast(at)[0]
        return value + latents if self.config.residual else value


def _is_offloaded(block: nn.Module) -> bool:
    """Whether weights of a block come to the device for its forward alone."""
    for module in block.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if isinstance(registry, HookRegistry) and registry.get_hook(_GROUP_OFFLOADING) is not None:
            return True
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            return True
    return False


def _loads(block: nn.Module) -> nn.Module | None:
    """The module whose forward brings the group of a block to the device; None where it is not offloaded in groups."""
    registry = getattr(block, "_diffusers_hook", None)
    hook = registry.get_hook(_GROUP_OFFLOADING) if isinstance(registry, HookRegistry) else None
    return None if hook is None else cast(Any, hook).group.onload_leader


def _asking(hand_out: Callable[[nn.ModuleList], Iterator[Any]]) -> Callable[[nn.ModuleList], Iterator[Any]]:
    def __iter__(self: nn.ModuleList) -> Iterator[Any]:
        return hand_out(self)

    return __iter__
