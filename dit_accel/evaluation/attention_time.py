"""How much of a generation is attention."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dit_accel.pipelines import transformers_of


class Spans:
    """Adds up the seconds of stretches of work on a device; a GPU marks them itself, so that the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Measure what is done inside."""
        self.count += 1
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        first.record(stream)
        yield
        last.record(stream)
        self._events.append((first, last))

    def seconds(self) -> float:
        """All stretches so far, once the device has finished them."""
        if self._events:
            torch.cuda.synchronize(self._device)
        return self._seconds + sum(first.elapsed_time(last) for first, last in self._events) / 1000


@contextmanager
def attention_watched(pipe: Any) -> Iterator[Spans]:
    """Measure every swapped attention call of an enabled pipeline, dense or sparse, with selection and reordering."""
    from dit_accel.switch import states

    spans = Spans(pipe._execution_device)
    watched = states(pipe)
    for state in watched:
        state.watch = spans.one
    try:
        yield spans
    finally:
        for state in watched:
            state.watch = None


@contextmanager
def transformers_watched(pipe: Any) -> Iterator[Spans]:
    """Measure every forward of the pipeline's transformers."""
    spans = Spans(pipe._execution_device)
    running: list[Any] = []

    def entered(_module: torch.nn.Module, _args: Any) -> None:
        running.append(spans.one())
        running[-1].__enter__()

    def left(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [
        hook
        for transformer in transformers_of(pipe)
        for hook in (transformer.register_forward_pre_hook(entered), transformer.register_forward_hook(left))
    ]
    try:
        yield spans
    finally:
        for hook in hooks:
            hook.remove()
