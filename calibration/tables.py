"""From sums over profiled calls and measured latencies to the tables a plan is chosen from."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from dit_accel.calibration.cost import Latency
from dit_accel.calibration.profile import CallProfile
from dit_accel.calibration.schedule import span_weights


@dataclass(frozen=True, eq=False)
class Tables:
    """What a plan is chosen from.

    Attributes:
        error: float64 `[ranges, layers, heads, candidates]`, weighted squared error of a head over a range.
        cost: float64 `[ranges, candidates]`, milliseconds one head takes over all calls of a range.
        plain_cost: float64 `[ranges]`, the same for a head of an all-dense layer, which runs on the original
            attention.
        density: float64 `[candidates]`, kept pairs / all pairs.
        calls: float64 `[ranges]`, attention calls of one layer in a range: the weight of a range in a mean.
        dense: index of the dense candidate.
        launch: of each candidate the launch that it runs in: those of one precision share it. All the same if empty.
        split_ms: milliseconds that each launch of a layer beyond its first takes, per call.
        carried: float64 `[ranges]`, what forecasts make of each range's error, see `schedule.carried_weights`; None
            where every step is computed.
    """

    error: Tensor
    cost: Tensor
    plain_cost: Tensor
    density: Tensor
    calls: Tensor
    dense: int
    launch: tuple[int, ...] = ()
    split_ms: float = 0.0
    carried: Tensor | None = None

    def __post_init__(self) -> None:
        if self.error.ndim != 4:
            raise ValueError(
                f"error must be [ranges, layers, heads, candidates], got {tuple(self.error.shape)}"
            )
        ranges, _, _, candidates = self.error.shape
        expected = {
            "cost": (ranges, candidates),
            "plain_cost": (ranges,),
            "density": (candidates,),
            "calls": (ranges,),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {tuple(getattr(self, name).shape)}")
        if not 0 <= self.dense < candidates:
            raise ValueError(f"dense must be in 0..{candidates - 1}, got {self.dense}")
        if not self.launch:
            object.__setattr__(self, "launch", (0,) * candidates)
        if len(self.launch) != candidates:
            raise ValueError(f"launch must have {candidates} numbers, got {len(self.launch)}")

    @property
    def weighted(self) -> Tensor:
        """`error` as far as it is carried."""
        return self.error if self.carried is None else self.error * self.carried.view(-1, 1, 1, 1)

    def joined(self, bounds: Sequence[int]) -> Tables:
        """With the ranges between each bound and the next taken together, every step computed."""
        return replace(
            self,
            error=_joined(self.error, bounds),
            cost=_joined(self.cost, bounds),
            plain_cost=_joined(self.plain_cost, bounds),
            calls=_joined(self.calls, bounds),
        )


def _joined(x: Tensor, bounds: Sequence[int]) -> Tensor:
    """Sums along the first axis, from each bound to the next."""
    return torch.stack([x[start:stop].sum(0) for start, stop in itertools.pairwise(bounds)])


class ProfileSums:
    """Sums of call profiles, kept by span of steps and layer, for one guidance branch.

    `mass`, `error`, `norm`, `rows`, `effect`: float64 `[spans, layers, heads, candidates]`; `gradient`: `[spans,
    layers, heads]`; `density`: `[spans, layers, candidates]`; `calls`, `probes`, `alike`: `[spans, layers]`.
    `effect` is the squared change of the model's prediction relative to it, `gradient` the squared norm of its gradient
    by the head's output, mean over the head's channels, see `downstream`; both are sums over the `probes` among the
    calls. `alike` sums up the correlation of the errors with those of the first branch of the step, 0 in that branch.
    """

    NAMES = ("mass", "error", "norm", "rows", "effect", "gradient", "density", "calls", "probes", "alike")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.mass, self.error, self.norm, self.rows, self.effect = (tensors[n] for n in self.NAMES[:5])
        self.gradient, self.density, self.calls, self.probes, self.alike = (
            tensors[n] for n in self.NAMES[5:]
        )

    @classmethod
    def zeros(cls, spans: int, layers: int, heads: int, candidates: int) -> ProfileSums:
        """Nothing profiled yet."""
        per_head, per_layer = (spans, layers, heads, candidates), (spans, layers, candidates)
        shapes = (*(per_head,) * 5, (spans, layers, heads), per_layer, *((spans, layers),) * 3)
        return cls({n: torch.zeros(s, dtype=torch.float64) for n, s in zip(cls.NAMES, shapes, strict=True)})

    def add_call(
        self,
        number: int,
        layer: int,
        call: CallProfile,
        gradient: Tensor | None = None,
        first: Tensor | None = None,
    ) -> None:
        """Adds one call of a layer in span `number`.

        Args:
            gradient: that of `downstream`, `[batch, seq, heads, dim]`.
            first: `CallProfile.errors` of the same layer in the first branch of the step; None in that branch.
        """
        for name in ("mass", "error", "norm", "rows", "density"):
            getattr(self, name)[number, layer] += getattr(call, name)
        self.calls[number, layer] += 1
        if first is not None and first.shape == call.errors.shape:
            self.alike[number, layer] += _correlation(call.errors, first)
        if gradient is not None:
            tokens, width = gradient.shape[0] * gradient.shape[1], gradient.shape[3]
            self.effect[number, layer] += call.effect * tokens / call.rows.clamp(min=1)
            squares = gradient.float().square().sum((0, 1, 3), dtype=torch.float64).cpu()
            self.gradient[number, layer] += squares / width
            self.probes[number, layer] += 1

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, as the constructor takes them."""
        return {name: getattr(self, name) for name in self.NAMES}

    def __add__(self, other: ProfileSums) -> ProfileSums:
        return ProfileSums({name: getattr(self, name) + getattr(other, name) for name in self.NAMES})


_ROUNDING = 1e-4  # of the largest error among the candidates


def _correlation(errors: Tensor, others: Tensor) -> float:
    """Of `[heads, candidates, places, dim]`, mean over those that err in both by more than roundings."""
    a, b = (x.flatten(2).double() for x in (errors, others))
    sizes = a.norm(dim=-1), b.norm(dim=-1)
    known = (sizes[0] > _ROUNDING * sizes[0].max()) & (sizes[1] > _ROUNDING * sizes[1].max())
    return ((a * b).sum(-1) / (sizes[0] * sizes[1]))[known].mean().item() if known.any() else 0.0


class Measures(TypedDict):
    """What a plan records of the candidates it chose, float32 `[ranges, layers, heads]`."""

    recall: Tensor
    rel_l2: Tensor
    latency_ms: Tensor


@dataclass(frozen=True, eq=False)
class Profile:
    """Recall and rel_l2 over all branches, float64 `[ranges, layers, heads, candidates]`, and more.

    sensitivity: float64 `[ranges, layers, heads]`, relative change of the prediction if the output of a head is wrong
        by as much as its own size, in no particular direction; None where it was not measured.
    alike: float64 `[ranges]`, correlation of the errors of two guidance branches, 0 to 1; 0 without guidance.
    """

    recall: Tensor
    rel_l2: Tensor
    sensitivity: Tensor | None
    alike: Tensor
    latency: Latency
    tables: Tables

    def joined(self, bounds: Sequence[int]) -> Profile:
        """With neighbouring ranges taken together, see `Tables.joined`; means are over the calls."""
        calls = self.tables.calls

        def mean(x: Tensor) -> Tensor:
            ones = (1,) * (x.ndim - 1)
            return _joined(x * calls.view(-1, *ones), bounds) / _joined(calls, bounds).view(-1, *ones)

        gain = self.sensitivity
        return Profile(
            recall=mean(self.recall),
            rel_l2=mean(self.rel_l2.square()).sqrt(),
            sensitivity=None if gain is None else mean(gain.square()).sqrt(),
            alike=mean(self.alike),
            latency=self.latency,
            tables=self.tables.joined(bounds),
        )

    def sensitivities(self) -> dict[str, Any]:
        """`sensitivity` as nested lists `[ranges, layers, heads]`, by that name; nothing if it was not measured."""
        return {} if self.sensitivity is None else {"sensitivity": self.sensitivity.tolist()}

    def measures(self, choice: Tensor) -> Measures:
        """Recall, error and latency of the chosen candidates, float32 `[ranges, layers, heads]`."""
        at = choice.long()[..., None]
        latency_ms = self.latency.candidates[choice.long()]
        latency_ms[(choice == self.tables.dense).all(-1)] = self.latency.plain
        return {
            "recall": self.recall.gather(-1, at)[..., 0].float(),
            "rel_l2": self.rel_l2.gather(-1, at)[..., 0].float(),
            "latency_ms": latency_ms.float(),
        }


def build_profile(
    runs: Sequence[Mapping[str, ProfileSums]],
    latency: Latency,
    *,
    dense: int,
    launch: tuple[int, ...] = (),
    bounds: Sequence[int],
    progress: Sequence[float],
    guidance_scale: float,
    forwards: int | None = None,
    downstream: bool = True,
) -> Profile:
    """Combines branches, spans of steps, which are the ranges here, and latencies.

    Classifier-free guidance predicts g * cond - (g - 1) * uncond. So squared errors of the branches are averaged with
    g^2 and (g - 1)^2, and what both err alike is taken off, 2 g (g - 1) times their correlation; spans are weighted by
    `span_weights`.

    Args:
        runs: of each prompt the sums by branch name; "cond" and "uncond" are the guided pair, other branches
            count alike.
        launch: see `Tables`.
        bounds, progress: see `schedule`.
        forwards: of a step, to which the latency belongs; as many as branches if None.
        downstream: errors are the measured relative squared changes of the prediction. Otherwise a head's error enters
            relative to the norm of its whole layer's output, which the layer's projection receives, and all layers
            count alike.
    """
    branches = list(runs[0])
    if not (functools.reduce(operator.add, (run[b].calls for run in runs for b in run)) > 0).all():
        raise RuntimeError("a layer was never profiled in some span of steps; something skips its attention")
    sums = {branch: functools.reduce(operator.add, (run[branch] for run in runs)) for branch in branches}
    guided = {"cond": guidance_scale**2, "uncond": (guidance_scale - 1) ** 2}
    weights = [guided.get(branch, 1.0) if set(guided) <= set(branches) else 1.0 for branch in branches]
    relative = torch.zeros_like(sums[branches[0]].error)
    gain = torch.zeros_like(sums[branches[0]].gradient)
    measured = _measured(list(sums.values())) if downstream else None
    own: list[Tensor] = []  # relative squared error of each branch
    for number, (weight, branch) in enumerate(zip(weights, branches, strict=True)):
        share, of_branch = weight / sum(weights), sums[branch]
        if measured is not None:
            # An error as large as the output and alike in all directions: the gradient's square times the output's.
            squares = of_branch.norm[..., dense] / of_branch.rows[..., dense].clamp(min=1)
            gain += share * measured.gradient[number] * squares
            own.append(measured.effect[number])
        else:
            layer_norm = of_branch.norm.sum(2, keepdim=True).clamp(min=1e-30)
            own.append(of_branch.error / layer_norm / of_branch.error.shape[1])
        relative += share * own[-1]
    alike = torch.zeros(len(relative), dtype=torch.float64)
    if set(guided) == set(branches):
        alike = _alike(list(sums.values()))
        relative -= _cancelled(own, alike, guidance_scale)
    both = functools.reduce(operator.add, sums.values())
    lengths = torch.tensor([b - a for a, b in itertools.pairwise(bounds)], dtype=torch.float64)
    calls = lengths * (len(branches) if forwards is None else forwards)
    in_span = torch.tensor(span_weights(bounds, progress), dtype=torch.float64)
    error = in_span.view(-1, 1, 1, 1) * relative
    error[..., dense] = 0.0  # not even rounding: nothing is more faithful than dense
    return Profile(
        recall=both.mass / both.rows.clamp(min=1),
        rel_l2=(both.error / both.norm.clamp(min=1e-30)).sqrt(),
        sensitivity=gain.sqrt() if downstream else None,
        alike=alike,
        latency=latency,
        tables=Tables(
            error=error,
            cost=calls[:, None] * latency.candidates,
            plain_cost=calls * latency.plain,
            density=both.density.sum((0, 1)) / both.calls.sum(),
            calls=calls,
            dense=dense,
            launch=launch,
            split_ms=latency.split,
        ),
    )


def _alike(sums: Sequence[ProfileSums]) -> Tensor:
    """Correlation of the errors of two branches, one number for each span.

    Those of single candidates say too little of how alike the predictions err in the end, and what guidance leaves is a
    small difference of theirs.
    """
    both = functools.reduce(operator.add, (s.alike.sum(1) for s in sums))
    return (both / sums[0].calls.sum(1).clamp(min=1)).clamp(0, 1)


def _cancelled(own: Sequence[Tensor], alike: Tensor, guidance_scale: float) -> Tensor:
    """What guidance takes off the mean squared error of two branches, since they err alike."""
    factor = guidance_scale * (guidance_scale - 1) / (guidance_scale**2 + (guidance_scale - 1) ** 2)
    return 2 * factor * alike.view(-1, 1, 1, 1) * (own[0] * own[1]).sqrt()


@dataclass(frozen=True, eq=False)
class _Measured:
    """Of each branch the mean effect and gradient of one call, `[branches, ranges, layers, heads(, candidates)]`."""

    effect: Tensor
    gradient: Tensor


def _measured(sums: Sequence[ProfileSums]) -> _Measured:
    """What was measured downstream, less the chance of few directions.

    One direction says little about one candidate, and a choice among many would take those that it flatters. So each
    head gets one weight, the geometric mean of effect per relative squared error over its candidates, and candidates
    of a head compare by their errors. A branch that was not probed in a range gets the others' weight.
    """
    probes = torch.stack([s.probes for s in sums])[..., None]
    if not (probes.sum(0) > 0).all():
        raise RuntimeError("a layer was profiled without a gradient in some span of steps")
    share = probes / probes.sum(0)
    error = torch.stack([s.error / s.norm.clamp(min=1e-30) for s in sums])
    effect = torch.stack([s.effect for s in sums]) / probes.clamp(min=1)[..., None]
    # Candidates that lose nothing but roundings tell nothing.
    lossy = (error > _LOSSLESS) & (effect > 0)
    logs = torch.where(lossy, (effect / error.clamp(min=_LOSSLESS)).clamp(min=1e-300).log(), 0.0)
    weight = (logs.sum(-1) / lossy.sum(-1).clamp(min=1)).exp() * lossy.any(-1)
    gradient = torch.stack([s.gradient for s in sums]) / probes.clamp(min=1)
    weight, gradient = (torch.where(probes > 0, x, (share * x).sum(0)) for x in (weight, gradient))
    steady = _steadied(gradient)
    return _Measured((weight * steady)[..., None] * error, gradient * steady)


# Relative squared error of roundings in float32.
_LOSSLESS = 1e-10

# How much of what sets a head apart in one range and branch is believed; the rest is the chance of one direction.
_BELIEVED = 0.3


def _steadied(gradient: Tensor) -> Tensor:
    """Factors `[branches, ranges, layers, heads]` that take chance out of squared gradients of that shape.

    Each of them comes from few random directions. In logarithms a head's place among all is much the same in every
    range and branch, so their mean is taken, and of the deviation from it a part.
    """
    logs = gradient.clamp(min=torch.finfo(torch.float64).tiny).log()
    from_level = logs - logs.mean((2, 3), keepdim=True)
    deviation = from_level - from_level.mean((0, 1), keepdim=True)
    return ((_BELIEVED - 1) * deviation).exp()
