"""Caches of other projects on a pipeline, what they keep in memory, and how many forwards they really skip."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import StateManager
from torch import Tensor, nn

from dit_accel.evaluation.timing import package_version
from dit_accel.pipelines import family_of, transformers_of


@dataclass(frozen=True)
class Technique:
    """A foreign cache: the configuration class, the field that the number after @ sets, and the fields that may follow.

    options: types of the fields that a variant's options may set, under the names they have there.
    settings: fields whose own default is not used.
    """

    config: type | str
    dial: str
    options: Mapping[str, type]
    settings: Mapping[str, Any] = field(default_factory=dict)


DIFFUSERS: dict[str, Technique] = {
    "first_block": Technique(FirstBlockCacheConfig, "threshold", {"threshold": float}),
    "mag_cache": Technique(
        MagCacheConfig,
        "threshold",
        {"threshold": float, "max_skip_steps": int, "retention_ratio": float},
    ),
    # Its default patterns end in "attn", which no attention of Wan ("attn1") matches; the lite mode skips whole blocks.
    "taylorseer": Technique(
        TaylorSeerCacheConfig,
        "cache_interval",
        {
            "cache_interval": int,
            "disable_cache_before_step": int,
            "disable_cache_after_step": int,
            "max_order": int,
            "use_lite_mode": bool,
        },
        {"use_lite_mode": True},
    ),
}

# taylorseer and taylorseer_order belong to its TaylorSeerCalibratorConfig, the others to its DBCacheConfig.
CACHE_DIT: dict[str, Technique] = {
    "dbcache": Technique(
        "DBCacheConfig",
        "residual_diff_threshold",
        {
            "residual_diff_threshold": float,
            "Fn_compute_blocks": int,
            "Bn_compute_blocks": int,
            "max_warmup_steps": int,
            "max_cached_steps": int,
            "max_continuous_cached_steps": int,
            "enable_separate_cfg": bool,
            "taylorseer": bool,
            "taylorseer_order": int,
        },
    )
}


def cache_dit_version() -> str:
    """Version of the installed cache-dit.

    Raises:
        ValueError: it is not installed.
    """
    found = None if importlib.util.find_spec("cache_dit") is None else package_version("cache-dit")
    if found is None:
        raise ValueError(
            "cache-dit: expected the package to be installed, got none; run pip install cache-dit"
        )
    return found


@contextmanager
def diffusers_cache(pipe: Any, config: Any) -> Iterator[None]:
    """Run a pipeline's transformers with a cache of diffusers, given by its configuration.

    Raises:
        ValueError: a transformer that diffusers cannot cache.
    """
    enabled: list[Any] = []
    try:
        for transformer in transformers_of(pipe):
            if not hasattr(transformer, "enable_cache"):
                raise ValueError(
                    f"pipe: expected a transformer with enable_cache, got {type(transformer).__name__}; "
                    "leave the caches of diffusers out"
                )
            cast(Any, transformer).enable_cache(config)
            enabled.append(transformer)
        yield
    finally:
        for transformer in enabled:
            transformer.disable_cache()


@contextmanager
def cache_dit_cache(pipe: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Run a pipeline with the DBCache of cache-dit; `options` are those of `CACHE_DIT`.

    Raises:
        ValueError: cache-dit is not installed or does not know the pipeline, or no block would be left to skip.
    """
    cache_dit_version()
    import cache_dit

    fields = dict(options)
    taylorseer, order = fields.pop("taylorseer", False), fields.pop("taylorseer_order", 1)
    config = cache_dit.DBCacheConfig(**fields)
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if taylorseer else None
    transformers = transformers_of(pipe)
    _check_blocks(transformers, config.Fn_compute_blocks, config.Bn_compute_blocks)
    own = [transformer.__dict__.get("forward") for transformer in transformers]
    with _without_notes():
        try:
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        except ValueError as error:
            raise ValueError(
                f"pipe: expected a pipeline that cache-dit knows, got {type(pipe).__name__} ({error}); leave it out"
            ) from error
    try:
        yield
    finally:
        for transformer, forward in zip(transformers, own, strict=True):
            _give_back(transformer, forward)
        with _without_notes():
            cache_dit.disable_cache(pipe)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Silence what cache-dit says about each step of its set-up, its end among the warnings."""
    handlers = [(handler, handler.level) for handler in logging.getLogger("CACHE_DIT").handlers]
    for handler, _ in handlers:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in handlers:
            handler.setLevel(level)


def _give_back(transformer: nn.Module, forward: Any) -> None:
    """Undo what cache-dit did to `forward`: itself it leaves a method behind, and fails where a hook had been on it."""
    transformer.__dict__.pop("_original_forward", None)
    if forward is None:
        del transformer.__dict__["forward"]
    else:
        cast(Any, transformer).forward = forward


def _check_blocks(transformers: list[nn.Module], first: int, last: int) -> None:
    for transformer in transformers:
        for name, _ in family_of(transformer).blocks:
            blocks = len(cast(Any, getattr(transformer, name)))
            if first < 0 or last < 0 or first + last >= blocks:
                raise ValueError(
                    f"cache-dit: expected Fn_compute_blocks + Bn_compute_blocks below the {blocks} blocks of "
                    f"{type(transformer).__name__}.{name}, got {first} + {last}; give for instance Fn_compute_blocks=1"
                )


class Watch:
    """Counts, while it is entered, the forwards of a pipeline's transformers and those that left blocks out.

    What runs is seen at the attention modules, since caches skip inside of blocks. Attributes:

    forwards, skipped: forwards so far, and those in which at least one attention module did not run.
    cache_bytes: most memory that a cache of diffusers or cache-dit held at the end of a step, see `look`.
    """

    def __init__(self, pipe: Any) -> None:
        self.forwards = self.skipped = self.cache_bytes = 0
        self._pipe = pipe
        self._ran = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for transformer in transformers_of(self._pipe):
            modules = list(family_of(transformer).attention_modules(transformer).values())
            self._handles.append(transformer.register_forward_pre_hook(self._begin))
            self._handles += [module.register_forward_pre_hook(self._count) for module in modules]
            self._handles.append(transformer.register_forward_hook(self._ender(len(modules))))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def look(self) -> None:
        """Note how much memory is held now."""
        self.cache_bytes = max(self.cache_bytes, _held_bytes(self._pipe))

    @property
    def skipped_share(self) -> float:
        """Skipped forwards ÷ all."""
        return self.skipped / self.forwards

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        self._ran = 0

    def _count(self, _module: nn.Module, _args: Any) -> None:
        self._ran += 1

    def _ender(self, modules: int) -> Any:
        def end(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.forwards += 1
            self.skipped += self._ran < modules

        return end


def can_watch(pipe: Any) -> bool:
    """Whether it is known where the attention of the pipeline's transformers is."""
    try:
        return bool([family_of(transformer) for transformer in transformers_of(pipe)])
    except ValueError:
        return False


def diffusers_states(pipe: Any) -> list[Any]:
    """What the caches of diffusers remember, one object per state manager and guidance branch."""
    managers: dict[int, StateManager] = {}
    for transformer in transformers_of(pipe):
        for module in transformer.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if isinstance(registry, HookRegistry):
                for hook in registry.hooks.values():
                    manager = getattr(hook, "state_manager", None)
                    if isinstance(manager, StateManager):
                        managers[id(manager)] = manager
    return [state for manager in managers.values() for state in manager._state_cache.values()]


def _held_bytes(pipe: Any) -> int:
    """Bytes of all tensors that caches of diffusers and cache-dit keep between steps, each counted once."""
    roots = diffusers_states(pipe)
    for transformer in transformers_of(pipe):
        manager = getattr(transformer, "_context_manager", None)
        roots += [cast(Any, manager).get_context(name) for name in getattr(transformer, "_context_names", ())]
    storages = {}
    for tensor in _tensors(roots, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors inside of containers and of the objects of these two packages."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part, seen)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part, seen)
    elif type(value).__module__.startswith(("diffusers.", "cache_dit.")) and not isinstance(value, nn.Module):
        yield from _tensors(getattr(value, "__dict__", {}), seen)


def config_of(technique: Technique, options: Mapping[str, Any], **measured: Any) -> Any:
    """The configuration of a cache of diffusers."""
    config = cast(Any, technique.config)
    return config(**{**technique.settings, **options, **measured})


def checked(technique: Technique, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Options of a technique, each of its type.

    Raises:
        ValueError: an unknown option, or a value of another type or below 0.
    """
    found: dict[str, Any] = {}
    for option, value in options.items():
        kind = technique.options.get(option)
        if kind is None:
            raise ValueError(
                f"variant {name!r}: expected options out of {', '.join(technique.options)}, got {option!r}"
            )
        number = float(value) if type(value) in (int, float) else None
        whole = number is not None and number.is_integer()
        right = isinstance(value, bool) if kind is bool else whole if kind is int else number is not None
        # cache-dit's limits may be -1, which is none; an interval of 0 would skip nothing and divide by zero.
        least = -1 if option.endswith("cached_steps") else 1 if option == "cache_interval" else 0
        if not right or (number is not None and number < least):
            what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            what = what if kind is bool else f"{what} from {least}"
            raise ValueError(f"variant {name!r}: expected {what} for {option}, got {value!r}")
        found[option] = value if kind is bool else kind(value)
    return found
