"""Which steps of a generation to compute, and the weights that bridge the others, from dense generations.

A forecast is a weighted sum of outputs the transformer has computed, of both guidance branches, and of the latents. The
weights that fit best, and the error they leave, follow from inner products of what dense generations gave; so all
schedules can be compared without running one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dit_accel.caching import CacheConfig, Schedule, Term
from dit_accel.caching.calls import like
from dit_accel.evaluation.timing import now

__all__ = ["StepProducts", "StepRecorder", "cheapest_schedules"]

SAMPLED_VALUES = 2**18  # of the latents, at fixed random places
LONGEST_GAP = 8  # steps from a computed one to the last that is forecast from it
_MOST_SINGLE = 2  # steps between two computed ones that compute the first branch alone, if not all do
_RIDGE = 1e-4  # of the mean inner product: keeps the weights of nearly parallel outputs small
_FIDELITY = 0.05  # what the branches' own errors count beside that of their guided combination


@dataclass(frozen=True, eq=False)
class StepProducts:
    """Mean inner products of the outputs and latents of dense generations.

    Attributes:
        branches: of guidance, in the order in which a step runs them.
        steps: of denoising.
        gram: float64 `[(branches + 1) * steps] * 2`: the outputs of each branch by step, then the latents by step, each
            product divided by the number of values.
        conditional: float64 `[steps]`, mean square of the conditional output where one forward makes both branches:
            the outputs are then those that guidance makes of them. None elsewhere.
    """

    branches: tuple[str, ...]
    steps: int
    gram: Tensor
    conditional: Tensor | None = None

    def combination(self, guidance_scale: float) -> tuple[float, ...]:
        """Of each branch the factor in the guided output: `b1 + guidance_scale * (b0 - b1)`, or the only one's."""
        return (guidance_scale, 1.0 - guidance_scale) if len(self.branches) == 2 else (1.0,)

    def unit(self, guidance_scale: float) -> Tensor:
        """Mean square of the guided output, by step, if each branch erred by its own size in a way of its own."""
        if self.conditional is not None:
            return (guidance_scale**2 + (guidance_scale - 1) ** 2) * self.conditional
        return (
            sum(factor**2 for factor in self.combination(guidance_scale)) * self.gram.diagonal()[: self.steps]
        )

    def __add__(self, other: StepProducts) -> StepProducts:
        if (self.branches, self.steps) != (other.branches, other.steps):
            raise ValueError(
                f"products: expected generations alike, got branches {self.branches} and {other.branches}, "
                f"{self.steps} and {other.steps} steps"
            )
        conditional = None
        if self.conditional is not None and other.conditional is not None:
            conditional = self.conditional + other.conditional
        return StepProducts(self.branches, self.steps, self.gram + other.gram, conditional)


class StepRecorder:
    """Keeps sampled values of the latents and outputs of transformers during one dense generation.

    Args:
        transformers: the pipeline's, with the function that names the guidance branch of the running forward.
        seed: of the sampled places.
        spent: seconds so far that forwards took for other things than themselves.
        paired: whether the batch of the running forward holds both guidance branches, the unconditional one first.
        guidance_scale: of the guided output, which is kept of such a forward.
    """

    def __init__(
        self,
        transformers: Mapping[nn.Module, Callable[[], str]],
        seed: int = 0,
        spent: Callable[[], float] = float,
        paired: Callable[[], bool] = bool,
        guidance_scale: float = 1.0,
    ) -> None:
        self._spent = spent
        self._paired = paired
        self._guidance_scale = guidance_scale
        self._conditional: list[float] = []
        self._seed = seed
        self._places: Tensor | None = None
        self._outputs: list[Tensor] = []
        self._latents: list[Tensor] = []
        self._branches: list[str] = []
        self._seconds: list[float] = []
        self._start = 0.0
        self._handles = []
        for transformer, branch in transformers.items():
            self._handles.append(transformer.register_forward_pre_hook(self._begin, with_kwargs=True))
            keep = functools.partial(self._keep, branch)
            self._handles.append(transformer.register_forward_hook(keep, with_kwargs=True))

    def remove(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()

    @property
    def forward_ms(self) -> float:
        """Median milliseconds of a forward."""
        return 1000 * median(self._seconds)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._start = now(next(module.parameters()).device) - self._spent()

    def _keep(
        self,
        branch: Callable[[], str],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        sample = output[0].detach()
        self._seconds.append(now(sample.device) - self._spent() - self._start)
        latents = like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], sample).detach()
        if self._paired():
            half, scale = sample.shape[0] // 2, self._guidance_scale
            self._conditional.append(float(sample[half:].float().square().mean()))
            sample = scale * sample[half:].float() + (1 - scale) * sample[:half].float()
            latents = latents[half:]
        if self._places is None:
            generator = torch.Generator().manual_seed(self._seed)
            places = torch.randperm(sample.numel(), generator=generator)[:SAMPLED_VALUES]
            self._places = places.sort().values.to(sample.device)
        self._outputs.append(sample.flatten()[self._places].float().cpu())
        self._latents.append(latents.flatten()[self._places].float().cpu())
        self._branches.append(branch())

    def products(self, steps: int) -> StepProducts | None:
        """Inner products over the generation; None unless each of its `steps` steps ran the same guidance branches."""
        branches = tuple(dict.fromkeys(self._branches))
        if self._branches != list(branches) * steps:
            return None
        rows = [
            output for number in range(len(branches)) for output in self._outputs[number :: len(branches)]
        ]
        values = torch.stack([*rows, *self._latents[:: len(branches)]]).double()
        conditional = None
        if len(self._conditional) == steps:
            conditional = torch.tensor(self._conditional, dtype=torch.float64)
        return StepProducts(branches, steps, values @ values.T / values.shape[1], conditional)


@dataclass(frozen=True)
class Choice:
    """One schedule: its forwards that are computed, and the error it is expected to leave.

    error: sum over the runs of forecast steps of the mean square of the guided output's errors, each times the root of
        the step's weight, added up.
    """

    computed: int
    error: float
    schedule: Schedule

    @property
    def config(self) -> CacheConfig:
        """The cache of a plan with this schedule."""
        steps = self.schedule.steps
        return CacheConfig("schedule", target="output", schedule=self.schedule, min_steps=min(11, steps))


def cheapest_schedules(
    products: StepProducts,
    *,
    guidance_scale: float,
    weights: Sequence[float],
    warm_up: int = 2,
    cool_down: int = 1,
) -> list[Choice]:
    """The schedules of least error for every number of computed forwards, fewest first.

    A step computes all branches, the first one alone (the others are forecast from it, as guidance changes slowly), or
    none. Within a run of such steps forecasts read the same outputs and err in the same direction, so their errors add
    before they are squared; those of different runs add in squares. Dynamic programming over the steps that compute all
    branches compares all schedules whose runs have at most `LONGEST_GAP` steps and compute the first branch in each of
    them, or in at most two.

    Args:
        products: of the dense generations.
        guidance_scale: the output is `b1 + guidance_scale * (b0 - b1)` of the branches 0 and 1.
        weights: of the squared error at each step, see `schedule.step_weights`.
        warm_up, cool_down: steps computed at the start, at least 2, and at the end.

    Raises:
        ValueError: an argument out of range.
    """
    steps, branches = products.steps, len(products.branches)
    if not 2 <= warm_up <= steps - cool_down or cool_down < 1:
        raise ValueError(
            f"warm_up, cool_down: expected at least 2 and 1, {steps} steps in all, got {warm_up} and {cool_down}"
        )
    if branches > 2:
        raise ValueError(f"products: expected one or two guidance branches, got {branches}")
    if len(weights) != steps:
        raise ValueError(f"weights: expected {steps} numbers, one for each step, got {len(weights)}")
    solver = _Solver(products, guidance_scale, weights)
    # At each step that computes all branches, by history: the least error for each number of computed forwards, and the
    # actions that lead there.
    tables: list[dict[_History, tuple[NDArray[Any], list[Any]]]] = [{} for _ in range(steps)]
    errors = np.full(steps * branches + 1, np.inf)
    paths: list[Any] = [None] * len(errors)
    errors[warm_up * branches], paths[warm_up * branches] = 0.0, (branches,) * warm_up
    tables[warm_up - 1][((warm_up - 1, warm_up - 2),) * branches] = errors, paths
    for step in range(warm_up - 1, steps - 1):
        longest = min(LONGEST_GAP, steps - cool_down - 1 - step)
        for history, (errors, paths) in tables[step].items():
            for run in solver.runs(history, step + 1, longest):
                stop = step + 1 + len(run.actions)
                following = _follow(run.history, stop, branches, branches)
                if following not in tables[stop]:
                    tables[stop][following] = np.full_like(errors, np.inf), [None] * len(errors)
                best, ways = tables[stop][following]
                spent = sum(run.actions) + branches
                totals = errors[:-spent] + run.error
                for forwards in np.flatnonzero(totals < best[spent:]).tolist():
                    best[forwards + spent] = totals[forwards]
                    ways[forwards + spent] = (*paths[forwards], *run.actions, branches)
        tables[step] = {}
        solver.forget(step + 1)
    found: dict[int, tuple[float, tuple[int, ...]]] = {}
    for errors, paths in tables[-1].values():
        for forwards in np.flatnonzero(np.isfinite(errors)).tolist():
            if errors[forwards] < found.get(forwards, (np.inf, ()))[0]:
                found[forwards] = float(errors[forwards]), paths[forwards]
    choices, least = [], float("inf")
    for forwards, (error, actions) in sorted(found.items()):
        if error < least:  # more forwards that are no better are of no use
            least = error
            choices.append(Choice(forwards, error, solver.schedule(actions)))
    return choices


# The last two computed steps of the first branch, then those of the second, latest first.
_History = tuple[tuple[int, ...], ...]


def _follow(history: _History, step: int, action: int, branches: int) -> _History:
    return tuple((step, *history[b])[:2] if b < action else history[b] for b in range(branches))


@dataclass(frozen=True, eq=False)
class _Fit:
    """Forecasts of one step.

    rows: of the products that they sum up; weights: `[branches that are forecast, rows]`.
    error: of the guided output, times the root of the step's weight; a vector whose inner products with others of its
        kind are mean products of the values.
    """

    rows: list[int]
    weights: NDArray[Any]
    error: NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Run:
    """Steps in a row that do not compute all branches: how many each computes, their error, what is known after."""

    actions: tuple[int, ...]
    error: float
    history: _History


class _Solver:
    """Best weights for every situation, each solved once."""

    def __init__(self, products: StepProducts, guidance_scale: float, weights: Sequence[float]) -> None:
        self._products = products
        self._gram = products.gram.numpy()
        self._weights = weights
        # Rows of which `gram` holds the inner products.
        sizes, directions = np.linalg.eigh(self._gram)
        self._rows = directions * np.sqrt(sizes.clip(min=0.0))
        self._combination = products.combination(guidance_scale)
        self._fits: dict[int, dict[tuple[_History, int], _Fit]] = {}

    def fit(self, history: _History, step: int, action: int) -> _Fit:
        """Forecasts of the branches from number `action` on."""
        found, key = self._fits.setdefault(step, {}), (history, action)
        if key not in found:
            found[key] = self._solve(history, step, action)
        return found[key]

    def forget(self, step: int) -> None:
        """Let go of the forecasts of a step."""
        self._fits.pop(step, None)

    def runs(self, history: _History, first: int, longest: int) -> Iterator[_Run]:
        """The runs of at most `longest` steps that may begin at step `first`, the empty one too."""
        branches = len(self._products.branches)
        empty = _Run((), 0.0, history)
        yield empty
        growing = [(empty, np.zeros(len(self._rows)))]
        while growing:
            run, before = growing.pop()
            if len(run.actions) >= longest:
                continue
            step = first + len(run.actions)
            for action in range(branches):
                actions = (*run.actions, action)
                if _MOST_SINGLE < sum(actions) < len(actions):
                    continue
                error = before + self.fit(run.history, step, action).error
                after = _follow(run.history, step, action, branches)
                longer = _Run(actions, float(error @ error), after)
                yield longer
                growing.append((longer, error))

    def _row(self, branch: int, step: int) -> int:
        return branch * self._products.steps + step

    def _solve(self, history: _History, step: int, action: int) -> _Fit:
        """Least squares, jointly for the branches that are forecast.

        Minimised is the mean square of the guided combination's error, plus a little of each branch's own.
        """
        products, gram = self._products, self._gram
        branches = len(products.branches)
        known = [(branch, step) for branch in range(action)]
        known += [(branch, s) for branch in range(branches) for s in history[branch]]
        rows = [self._row(*where) for where in dict.fromkeys(known)] + [self._row(branches, step)]
        missing = list(range(action, branches))
        size = len(rows)
        inner = gram[np.ix_(rows, rows)]
        targets = [self._row(branch, step) for branch in missing]
        factors = [self._combination[branch] for branch in missing]
        # Of the stacked weights of all missing branches: sum over pairs of (f_i f_j + fidelity [i = j]) <r_i, r_j>.
        pairing = np.outer(factors, factors) + _FIDELITY * np.eye(len(missing))
        matrix = np.kron(pairing, inner)
        matrix[np.diag_indices_from(matrix)] += _RIDGE * np.trace(inner) / size
        cross = gram[np.ix_(rows, targets)]
        right = np.concatenate(
            [sum(pairing[i, j] * cross[:, j] for j in range(len(missing))) for i in range(len(missing))]
        )
        weights = np.linalg.solve(matrix, right).reshape(len(missing), size)
        error = np.zeros(len(gram))
        for factor, target, of_branch in zip(factors, targets, weights, strict=True):
            error += factor * (self._rows[target] - of_branch @ self._rows[rows])
        return _Fit(rows, weights, self._weights[step] ** 0.5 * error)

    def schedule(self, actions: Sequence[int]) -> Schedule:
        """The schedule of a generation's actions, one for each step."""
        branches, names = self._products.branches, [*self._products.branches, "latents"]
        forecasts: dict[str, dict[int, tuple[Term, ...]]] = {branch: {} for branch in branches}
        history: _History = ((),) * len(branches)
        for step, action in enumerate(actions):
            if action < len(branches):
                fit = self.fit(history, step, action)
                for branch, of_branch in zip(branches[action:], fit.weights, strict=True):
                    forecasts[branch][step] = tuple(
                        Term(names[row // len(actions)], row % len(actions), float(weight))
                        for row, weight in zip(fit.rows, of_branch, strict=True)
                    )
            history = _follow(history, step, action, len(branches))
        return Schedule(len(actions), forecasts)
