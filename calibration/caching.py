"""Which steps of a generation to compute, and the weights that bridge the others, from dense generations.

A forecast is a weighted sum of outputs the transformer has computed, of both guidance branches, and of the latents. The
weights that fit best, and the error they leave, follow from inner products of what dense generations gave; so all
schedules can be compared without running one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dit_accel.caching import CacheConfig, Schedule, Term
from dit_accel.caching.runtime import like
from dit_accel.evaluation.timing import now

__all__ = ["StepProducts", "StepRecorder", "cheapest_schedules"]

SAMPLED_VALUES = 2**18  # of the latents, at fixed random places
LONGEST_GAP = 8  # steps from a computed one to the last that is forecast from it
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
    """

    branches: tuple[str, ...]
    steps: int
    gram: Tensor

    def __add__(self, other: StepProducts) -> StepProducts:
        if (self.branches, self.steps) != (other.branches, other.steps):
            raise ValueError(
                f"products: expected generations alike, got branches {self.branches} and {other.branches}, "
                f"{self.steps} and {other.steps} steps"
            )
        return StepProducts(self.branches, self.steps, self.gram + other.gram)


class StepRecorder:
    """Keeps sampled values of the latents and outputs of transformers during one dense generation.

    Args:
        transformers: the pipeline's, with the function that names the guidance branch of the running forward.
        seed: of the sampled places.
    """

    def __init__(self, transformers: Mapping[nn.Module, Callable[[], str]], seed: int = 0) -> None:
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
        self._start = now(next(module.parameters()).device)

    def _keep(
        self,
        branch: Callable[[], str],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        sample = output[0].detach()
        self._seconds.append(now(sample.device) - self._start)
        latents = like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], sample).detach()
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
        return StepProducts(branches, steps, values @ values.T / values.shape[1])


@dataclass(frozen=True)
class Choice:
    """One schedule: its forwards that are computed, and the error it is expected to leave.

    error: sum over the forecast steps of the mean square of the guided output's error, times the step's weight.
    """

    computed: int
    error: float
    config: CacheConfig


def cheapest_schedules(
    products: StepProducts,
    *,
    guidance_scale: float,
    weights: Sequence[float],
    warm_up: int = 2,
    cool_down: int = 1,
) -> list[Choice]:
    """The schedules of least error for every number of computed forwards, fewest first.

    Exact, by dynamic programming over the last computed steps. A step computes all branches, the first one alone (the
    others are forecast from it, as guidance changes slowly), or none; errors of steps add in squares.

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
    solver = _Solver(products, guidance_scale)
    if len(weights) != steps:
        raise ValueError(f"weights: expected {steps} numbers, one for each step, got {len(weights)}")
    # By history: the least error for each number of computed forwards, and where it came from.
    table: dict[_History, tuple[NDArray[Any], list[Any]]] = {
        (): (np.where(np.arange(steps * branches + 1) == 0, 0.0, np.inf), [()] * (steps * branches + 1))
    }
    for step in range(steps):
        forced = step < warm_up or step >= steps - cool_down
        after: dict[_History, tuple[NDArray[Any], list[Any]]] = {}
        for history, (errors, paths) in table.items():
            for action in (branches,) if forced else range(branches + 1):
                if not _allowed(history, step, action, branches):
                    continue
                cost = weights[step] * solver.fit(history, step, action).error if action < branches else 0.0
                following = _follow(history, step, action, branches)
                if following not in after:
                    after[following] = np.full_like(errors, np.inf), [None] * len(errors)
                best, ways = after[following]
                for forwards in np.flatnonzero(np.isfinite(errors)).tolist():
                    total = errors[forwards] + cost
                    if total < best[forwards + action]:
                        best[forwards + action] = total
                        ways[forwards + action] = (*paths[forwards], action)
        table = after
    found: dict[int, tuple[float, tuple[int, ...]]] = {}
    for errors, paths in table.values():
        for forwards in np.flatnonzero(np.isfinite(errors)).tolist():
            if errors[forwards] < found.get(forwards, (np.inf, ()))[0]:
                found[forwards] = float(errors[forwards]), paths[forwards]
    choices, least = [], float("inf")
    for forwards, (error, actions) in sorted(found.items()):
        if error < least:  # more forwards that are no better are of no use
            least = error
            choices.append(Choice(forwards, error, solver.config(actions)))
    return choices


# The last two computed steps of the first branch, then those of the second, latest first.
_History = tuple[tuple[int, ...], ...] | tuple[()]


def _allowed(history: _History, step: int, action: int, branches: int) -> bool:
    """Whether every branch that is not computed has been so not long ago."""
    return all(history and step - history[branch][0] <= LONGEST_GAP for branch in range(action, branches))


def _follow(history: _History, step: int, action: int, branches: int) -> _History:
    last = history or ((),) * branches
    return tuple((step, *last[b])[:2] if b < action else last[b] for b in range(branches))


@dataclass(frozen=True, eq=False)
class _Fit:
    """Forecasts of one step: terms by branch, and the mean square error of the guided output."""

    terms: dict[int, tuple[Term, ...]]
    error: float


class _Solver:
    """Best weights for every situation, each solved once."""

    def __init__(self, products: StepProducts, guidance_scale: float) -> None:
        self._products = products
        self._gram = products.gram.numpy()
        self._combination = (guidance_scale, 1.0 - guidance_scale) if len(products.branches) == 2 else (1.0,)
        self._fits: dict[tuple[_History, int, int], _Fit] = {}

    def fit(self, history: _History, step: int, action: int) -> _Fit:
        """Forecasts of the branches from number `action` on."""
        key = history, step, action
        if key not in self._fits:
            self._fits[key] = self._solve(history, step, action)
        return self._fits[key]

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
        error = 0.0
        for (i, f), (j, g) in itertools.product(enumerate(factors), repeat=2):
            error += (
                f
                * g
                * (
                    gram[targets[i], targets[j]]
                    - weights[i] @ cross[:, j]
                    - weights[j] @ cross[:, i]
                    + weights[i] @ inner @ weights[j]
                )
            )
        names = [*products.branches, "latents"]
        terms = {
            branch: tuple(
                Term(names[row // products.steps], row % products.steps, float(weight))
                for row, weight in zip(rows, weights[i], strict=True)
            )
            for i, branch in enumerate(missing)
        }
        return _Fit(terms, max(float(error), 0.0))

    def config(self, actions: Sequence[int]) -> CacheConfig:
        """The schedule of a generation's actions, one for each step."""
        branches = self._products.branches
        forecasts: dict[str, dict[int, tuple[Term, ...]]] = {branch: {} for branch in branches}
        history: _History = ()
        for step, action in enumerate(actions):
            if action < len(branches):
                for branch, terms in self.fit(history, step, action).terms.items():
                    forecasts[branches[branch]][step] = terms
            history = _follow(history, step, action, len(branches))
        schedule = Schedule(len(actions), forecasts)
        return CacheConfig("schedule", target="output", schedule=schedule, min_steps=min(11, len(actions)))
