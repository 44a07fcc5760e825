"""The plan: which pattern each attention head uses at each stage of denoising, and its form on disk."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.caching.config import CacheConfig
from dit_accel.caching.presets import CACHES, cache_preset
from dit_accel.candidate import Candidate
from dit_accel.grid import TokenGrid
from dit_accel.patterns import FAMILIES, select
from dit_accel.plan_files import (
    CONFIG_FILE,
    TENSOR_FILE,
    PlanError,
    local_directory,
    read_files,
    upload_directory,
    write_files,
)
from dit_accel.presets import PRESETS

__all__ = ["AccelPlan", "PlanError", "config_hash_of"]

MEASURES = ("recall", "rel_l2", "latency_ms")

_FIELDS: dict[str, tuple[type, ...]] = {
    "candidates": (list,),
    "range_starts": (list,),
    "layers": (list, type(None)),
    "model_class": (str, type(None)),
    "config_hash": (str, type(None)),
    "grid": (dict, type(None)),
    "block": (int,),
    "dense_layers": (int, float),
    "cache": (dict, type(None)),
    "objective": (dict,),
    "validated": (dict,),
}


@dataclass(frozen=True, eq=False)
class AccelPlan:
    """What every head does in every range of denoising.

    Attributes:
        candidates: the ways to run a head that `choice` numbers; a calibration lists all that it tried.
        choice: int16 `[ranges, layers, heads]`, numbers of candidates. A preset, for any model, has one of
            each.
        range_starts: progress at which each range begins, ascending from 0.0; 0 is noise, 1 the finished
            video.
        layers: names of the attention modules in forward order; None for a preset.
        model_class: class name of the transformer; None for a preset.
        config_hash: `config_hash_of` the transformer; None for a preset.
        grid: the token grid of the calibration.
        block: tokens per block.
        dense_layers: share of a model's layers, from 0 to below 1, whose first ones stay dense whatever `choice` says;
            a part of a layer counts as one. Of presets, which know no layers.
        cache: which steps are computed and what bridges the others; None computes all.
        recall, rel_l2: float32 like choice, measured at calibration; shares without unit.
        latency_ms: float32 like choice, measured milliseconds of each head's attention.
        objective: what was asked of the calibration (JSON values).
        validated: quality and speed that were measured (JSON values).
        source: the file that it was read from, for messages.

    Raises:
        PlanError: the parts do not fit together.
    """

    candidates: tuple[Candidate, ...]
    choice: Tensor
    range_starts: tuple[float, ...] = (0.0,)
    layers: tuple[str, ...] | None = None
    model_class: str | None = None
    config_hash: str | None = None
    grid: TokenGrid | None = None
    block: int = 64
    dense_layers: float = 0.0
    cache: CacheConfig | None = None
    recall: Tensor | None = None
    rel_l2: Tensor | None = None
    latency_ms: Tensor | None = None
    objective: dict[str, Any] = field(default_factory=dict)
    validated: dict[str, Any] = field(default_factory=dict)
    source: str | None = None

    def __post_init__(self) -> None:
        choice, starts = self.choice, self.range_starts
        if not self.candidates:
            raise PlanError("plan", "candidates", "at least one", "none")
        if choice.dtype != torch.int16 or choice.ndim != 3 or not choice.numel():
            raise PlanError("plan", "choice", "int16 [ranges, layers, heads]", _shape(choice))
        numbers = bool(starts) and all(isinstance(start, int | float) for start in starts)
        if (
            not numbers
            or starts[0] != 0
            or starts[-1] >= 1
            or any(a >= b for a, b in itertools.pairwise(starts))
        ):
            raise PlanError("plan", "range_starts", "ascending numbers below 1, the first 0.0", list(starts))
        if self.layers is not None and not all(isinstance(layer, str) for layer in self.layers):
            raise PlanError("plan", "layers", "names", list(self.layers))
        for axis, name, count in (
            (0, "range_starts", len(starts)),
            (1, "layers", 1 if self.layers is None else len(self.layers)),
        ):
            if choice.shape[axis] != count:
                raise PlanError("plan", "choice", f"{count} along axis {axis} for {name}", _shape(choice))
        low, high = int(choice.min()), int(choice.max())
        if low < 0 or high >= len(self.candidates):
            raise PlanError(
                "plan", "choice", f"numbers from 0 to {len(self.candidates) - 1}", f"{low} to {high}"
            )
        if self.cache is not None and not isinstance(self.cache, CacheConfig):
            raise PlanError("plan", "cache", "a CacheConfig", type(self.cache).__name__)
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise PlanError("plan", "block", "a positive integer", repr(self.block))
        share = self.dense_layers
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise PlanError("plan", "dense_layers", "a share of the layers from 0 to below 1", repr(share))
        for name in MEASURES:
            measure = getattr(self, name)
            if measure is not None and (measure.dtype != torch.float32 or measure.shape != choice.shape):
                raise PlanError("plan", name, f"float32 {tuple(choice.shape)} like choice", _shape(measure))
        for name in ("objective", "validated"):
            try:
                json.dumps(getattr(self, name), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise PlanError("plan", name, "finite JSON values", f"({error})") from error

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        density: float | None = None,
        block: int | None = None,
        precision: str = "native",
        remainder: float | None = None,
        warm_up: float | None = None,
        dense_layers: float | None = None,
        cache: str | CacheConfig | None = None,
        **options: Any,
    ) -> AccelPlan:
        """Return an uncalibrated plan that runs one family on every head of any model, or caches its steps, or both.

        Args:
            name: a family, or a published system (`dit_accel.presets.PRESETS`), whose settings then are the defaults of
                all that follows. Names that are both mean the family where a density is given. A cache
                (`dit_accel.caching.CACHES`) leaves attention dense, and takes the fields of `CacheConfig` as options.
            density: kept pairs divided by all pairs.
            block: tokens per block, 64 if nothing says otherwise.
            precision, remainder: see `Candidate`; no remainder if nothing says otherwise.
            warm_up: progress up to which attention stays dense, 0 if nothing says otherwise.
            dense_layers: share of the layers, the first ones, that stay dense, 0 if nothing says otherwise.
            cache: name of a cache with the settings of its authors, or a configuration.
            options: of the family.

        Example:
            >>> plan = AccelPlan.preset("window", density=0.3)
            >>> plan = AccelPlan.preset("cg-taylor", threshold=0.1)
            >>> plan = AccelPlan.preset("xattention")

        Raises:
            ValueError: an unknown name or option, a value that the family cannot have, or no density for a family that
                needs one.
        """
        if name in CACHES:
            if (density, block, remainder, dense_layers, cache) != (None,) * 5 or precision != "native":
                raise ValueError(
                    f"preset {name!r} is a cache: expected the fields of CacheConfig, got others"
                )
            steps = options if warm_up is None else {**options, "warm_up": warm_up}
            return replace(cls.preset("dense"), cache=cache_preset(name, **steps))
        if isinstance(cache, str):
            cache = cache_preset(cache)
        objective: dict[str, Any] = {"preset": name}
        if name in PRESETS and (density is None or name not in FAMILIES):
            published = PRESETS[name]
            if published.calibrated:
                objective["uncalibrated"] = (
                    f"its authors calibrate {published.calibrated}, here all heads are alike; "
                    f"dit_accel.calibrate(..., candidates={name!r}) gives each head {published.chosen}"
                )
            # Means that are asked for take the place of random features.
            settings = {
                o: value for o, value in published.options.items() if o != "features" or not remainder
            }
            name, options = published.family, {**settings, **options}
            density = published.density if density is None else density
            block = published.block if block is None else block
            warm_up = published.warm_up if warm_up is None else warm_up
            dense_layers = published.dense_layers if dense_layers is None else dense_layers
        if name not in FAMILIES:
            raise ValueError(
                f"unknown preset {name!r}; families: {', '.join(FAMILIES)}; published systems: {', '.join(PRESETS)}; "
                f"caches: {', '.join(CACHES)}"
            )
        family = FAMILIES[name]
        if density is None:
            if family.density is None:
                raise ValueError(f"preset {name!r} needs a density, for instance density=0.3")
            density = family.density
        block, warm_up = 64 if block is None else block, 0.0 if warm_up is None else warm_up
        if isinstance(warm_up, bool | str) or not 0.0 <= warm_up < 1.0:
            raise ValueError(f"warm_up: expected a progress from 0 to below 1, got {warm_up!r}")
        candidate = Candidate(name, density, tuple(sorted(options.items())), precision, remainder or 0.0)
        candidates: tuple[Candidate, ...] = (candidate,)
        starts: tuple[float, ...] = (0.0,)
        if warm_up:
            candidates, starts = (Candidate("dense", 1.0), candidate), (0.0, warm_up)
        plan = cls(
            candidates,
            torch.arange(len(candidates), dtype=torch.int16, device="cpu").view(-1, 1, 1),
            starts,
            block=block,
            dense_layers=dense_layers or 0.0,
            cache=cache,
            objective=objective,
        )
        _try(candidate, block)
        return plan

    def range_at(self, progress: float) -> int:
        """Return the number of the range that holds a progress from 0 (pure noise) to 1."""
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress: expected a number from 0 to 1, got {progress!r}")
        return bisect.bisect_right(self.range_starts, progress) - 1

    def first_sparse(self, layers: int) -> int:
        """Return the number of the first of a model's layers that `dense_layers` does not keep dense."""
        return math.ceil(round(self.dense_layers * layers, 6))

    def row(self, progress: float, layer_index: int) -> Tensor:
        """Return the candidate numbers of a layer's heads, int16 `[heads]`, or `[1]` for all alike."""
        return self.choice[self.range_at(progress), layer_index if self.layers is not None else 0]

    @property
    def density_mean(self) -> float:
        """Planned density, mean over layers and heads.

        Over the attention calls of a generation as it was calibrated, which `validated` knows (another choice needs
        another `validated`). A plan that was not calibrated knows nothing of steps; its ranges weigh by their length,
        and its first layers by their share.
        """
        if isinstance(calibrated := self.validated.get("density_mean"), float):
            return calibrated
        density = torch.tensor([c.density for c in self.candidates], dtype=torch.float64, device="cpu")
        lengths = torch.tensor([*self.range_starts, 1.0], dtype=torch.float64, device="cpu").diff()
        planned = float(density[self.choice.long()].mean(dim=(1, 2)) @ lengths)
        return self.dense_layers + (1 - self.dense_layers) * planned

    def check(
        self, transformer_class_name: str, config_hash: str, layer_names: Sequence[str], heads: int
    ) -> None:
        """Refuse a model that the plan was not made for. A preset fits every model.

        Raises:
            PlanError: names the first field that differs.
        """
        remedy, file = "calibrate this model or load its own plan", self.source or "plan"
        for name, planned, got in (
            ("model_class", self.model_class, transformer_class_name),
            ("config_hash", self.config_hash, config_hash),
        ):
            if planned is not None and planned != got:
                raise PlanError(file, name, planned, got, remedy)
        if self.layers is not None and list(self.layers) != list(layer_names):
            raise PlanError(file, "layers", _names(self.layers), _names(layer_names), remedy)
        if self.choice.shape[2] not in (1, heads):
            raise PlanError(file, "choice", f"{self.choice.shape[2]} heads", f"{heads} heads", remedy)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `accel_config.json` and `accel_plan.safetensors` into a directory, at once or not at all."""
        tensors = {name: getattr(self, name) for name in ("choice", *MEASURES)}
        fields = {name: getattr(self, name) for name in _FIELDS}
        fields["candidates"] = [candidate.to_dict() for candidate in self.candidates]
        fields["grid"] = None if self.grid is None else dataclasses.asdict(self.grid)
        fields["cache"] = None if self.cache is None else self.cache.to_dict()
        present = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
        write_files(Path(directory), fields, present)

    @classmethod
    def from_pretrained(cls, directory_or_repo_id: str | Path) -> AccelPlan:
        """Read a plan from a directory or from the Hugging Face hub.

        Raises:
            PlanError: the plan is missing, truncated, corrupted, of a newer format, or makes no sense.
        """
        directory = local_directory(directory_or_repo_id)
        config, tensors = read_files(directory, _FIELDS)
        file = str(directory / CONFIG_FILE)
        values: dict[str, Any] = {name: config[name] for name in _FIELDS}
        values["candidates"] = tuple(
            _parsed(file, f"candidates[{number}]", Candidate.from_dict, entry)
            for number, entry in enumerate(config["candidates"])
        )
        values["grid"] = (
            None if values["grid"] is None else _parsed(file, "grid", _grid_from_dict, values["grid"])
        )
        values["cache"] = (
            None
            if values["cache"] is None
            else _parsed(file, "cache", CacheConfig.from_dict, values["cache"])
        )
        values["range_starts"] = tuple(values["range_starts"])
        values["layers"] = None if values["layers"] is None else tuple(values["layers"])
        unknown = set(tensors) - {"choice", *MEASURES}
        if unknown or "choice" not in tensors:
            known = f"choice and any of {', '.join(MEASURES)}"
            raise PlanError(
                str(directory / TENSOR_FILE), "tensors", known, ", ".join(sorted(tensors)) or "none"
            )
        try:
            return cls(**(values | tensors), source=file)
        except PlanError as error:
            name = TENSOR_FILE if error.field in {"choice", *MEASURES} else CONFIG_FILE
            raise PlanError(str(directory / name), error.field, error.expected, error.got) from error

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, commit_message: str = "Add acceleration plan"
    ) -> str:
        """Upload the plan to a model repository of the hub, made if need be, and return the commit's URL."""
        with tempfile.TemporaryDirectory() as parent:
            self.save_pretrained(Path(parent) / "plan")
            return upload_directory(Path(parent) / "plan", repo_id, private, commit_message)


def _try(candidate: Candidate, block: int) -> None:
    """Choose once among a few random tokens: what a family refuses is known before a generation is under way."""
    grid = TokenGrid(2, 2, block)
    generator = torch.Generator("cpu").manual_seed(0)
    query, key, value = torch.randn(3, 1, grid.total_tokens, 1, 16, generator=generator, device="cpu")
    given: dict[str, Any] = dict(candidate.options)
    select(candidate.family, query, key, grid, density=candidate.density, block=block, value=value, **given)


def config_hash_of(transformer: Any) -> str:
    """Return a sha256 of the architecture fields of a diffusers model's config.

    Names and versions (fields that begin with an underscore) do not count, nor does how the weights are quantised; a
    tuple counts as a list.
    """
    config = dict(transformer.config)
    config.pop("quantization_config", None)
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _parsed(file: str, field: str, parse: Callable[[Any], Any], value: Any) -> Any:
    """Parse a JSON value; what goes wrong is a PlanError that names the field."""
    try:
        return parse(value)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise PlanError(file, field, "a valid entry", f"{value!r} ({error})") from error


def _grid_from_dict(values: Mapping[str, Any]) -> TokenGrid:
    return TokenGrid(**values)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _names(names: Sequence[str]) -> str:
    if len(names) <= 2:
        return f"{len(names)} layers {list(names)}"
    return f"{len(names)} layers {names[0]} .. {names[-1]}"
