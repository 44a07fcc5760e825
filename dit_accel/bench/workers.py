"""Processes of their own: for what may hang, crash or lose the device, and for what compilers leave on disk."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from tqdm import tqdm

# One core stays with the process that waits.
COMPILERS = 15
_GLANCE_S = 1.0  # at the processes that compile


class TaskError(Exception):
    """What went wrong in another process, in words."""


class Worker:
    """A process that runs tasks one by one, and makes way for a new one when it hangs, dies or loses the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ProcessPoolExecutor | None = None

    def run(self, task: Callable[[], Any], seconds: float) -> Any:
        """What a task returns; task and result travel as pickles.

        Raises:
            TaskError: it failed, or did not end within `seconds`.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            value, error, answers = self._pool.submit(_attempt, task, self._device).result(timeout=seconds)
        except TimeoutError:
            self.stop()
            raise TaskError(f"did not end within {seconds:.0f} s") from None
        except BrokenProcessPool:
            self.stop()
            raise TaskError("its process died") from None
        if not answers:
            self.stop()
        if error is not None:
            raise TaskError(error if answers else f"{error}; {self._device} no longer answered")
        return value

    def stop(self) -> None:
        """End the process; the next task gets a new one."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _attempt(task: Callable[[], Any], device: torch.device) -> tuple[Any, str | None, bool]:
    """What a task returns or how it failed, and whether the device still runs anything."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return task(), None, True
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:500], _answers(device)


def _answers(device: torch.device) -> bool:
    """Also lets go of what a failed call held. After an access to memory that is not there nothing runs any more."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    except (RuntimeError, AssertionError):  # the latter of a torch without CUDA
        return False
    return True


def compile_ahead(tasks: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> int:
    """Run tasks in several processes at once, for what they leave in the compilers' caches.

    What they return or raise is of no interest: the suite runs them again. Returns how many ended in time.
    """
    end = time.perf_counter() + seconds
    ended = 0
    workers = max(1, min(COMPILERS, (os.cpu_count() or 2) - 1, len(tasks)))
    context = multiprocessing.get_context("spawn")
    lost = context.Value("i", 0)
    with (
        context.Pool(workers, _count_losses, (lost,)) as pool,  # leaving it ends them all
        tqdm(total=len(tasks), desc="compile") as bar,
    ):
        results = pool.imap_unordered(_Quiet(device), tasks, chunksize=1)
        # What a process took with it never comes back.
        while ended + lost.value < len(tasks) and (left := end - time.perf_counter()) > 0:
            try:
                results.next(timeout=min(_GLANCE_S, left))
            except multiprocessing.TimeoutError:
                continue
            ended += 1
            bar.update()
    return ended


def _count_losses(lost: Any) -> None:
    """Begin a process of a pool: where it says that it ends."""
    _Quiet.lost = lost


class _Quiet:
    """Runs a task; a process that has lost the device says so and ends, and the pool makes a new one."""

    lost: Any = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, task: Callable[[], object]) -> None:
        _, _, answers = _attempt(task, self._device)
        if not answers:
            with self.lost.get_lock():
                self.lost.value += 1
            os._exit(1)
