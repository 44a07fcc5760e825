"""Ratios of running times, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
# How long a device waits before it is timed, in cycles: some milliseconds, and more where the host needed them.
_AHEAD_CYCLES = 6_000_000
_MOST_CYCLES = 64 * _AHEAD_CYCLES
_ahead: dict[torch.device, int] = {}


def quantile(values: list[float], share: float) -> float:
    """The value below which that share of the values lies, by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def in_turns(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int = 7, seconds: float = 2.0
) -> dict[str, dict[str, float]]:
    """Time calls one after the other, round by round, so that a drifting clock hits all of them alike.

    Each is run once before. Rounds end after `rounds`, or early (but not before three) once `seconds` per call are
    spent.

    Returns:
        per name `{"p20", "p50", "p80"}` in milliseconds.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - start > seconds * len(calls):
            break
        for name, call in calls.items():
            times[name].append(milliseconds(call, device))
    return {
        name: {"p20": quantile(values, 0.2), "p50": median(values), "p80": quantile(values, 0.8)}
        for name, values in times.items()
    }


def milliseconds(call: Call, device: torch.device) -> float:
    """What a call takes. On a GPU the device's own time: the host is ahead there, as in a model, and does not count.

    A call that the host took longer to launch than the device was made to wait for is timed with the host; those that
    follow find the device waiting for twice as long.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = _ahead.setdefault(device, _AHEAD_CYCLES)
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        begin.record()
        call()
        if begin.query():
            _ahead[device] = min(2 * cycles, _MOST_CYCLES)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
