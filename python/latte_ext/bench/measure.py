# SPDX-License-Identifier: Apache-2.0
"""Clocks, interleaved repeats and their spread.

Machines drift, shared ones most of all. So what is compared is measured in turn, in one process,
and a short measurement of the peak stands between any two calls: a share is the rate of a call over
the mean of the two peaks around it, and a ratio is one of times of the same round. Another process
lowers the shares of several threads, which are timed by wall time, but not the peak.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .. import _core

# Seconds of one measurement of the peak, and the least that a sample of calls lasts.
PEAK_SECONDS, SAMPLE_SECONDS = 0.004, 0.004
MIN_REPEATS = 3
# A call that takes longer is warm after the first time.
SLOW_SECONDS = 0.5


class Call(NamedTuple):
    """What is timed, by how many threads; one thread by its CPU time unless `wall` is set."""

    function: Callable[[], object]
    threads: int = 1
    wall: bool = False

    @property
    def clock(self) -> str:
        return "wall" if self.wall or self.threads > 1 else "cpu"


class Sample(NamedTuple):
    """Seconds per call, and the float32 operations per second measured around it."""

    seconds: float
    peak: float


class Spread(NamedTuple):
    """Median and quartiles of the repeats."""

    value: float
    low: float
    high: float
    repeats: int


def spread(values: Sequence[float]) -> Spread:
    """The `Spread` of at least one value."""
    low, high = min(values), max(values)
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high, len(values))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's thread count, which the library follows, set to `count` inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def elapsed(call: Call, count: int = 1) -> float:
    """Seconds per call of `count` calls, with torch set to the call's threads."""
    clock = time.perf_counter if call.clock == "wall" else time.thread_time
    with torch_threads(call.threads):
        start = clock()
        for _ in range(count):
            call.function()
        return (clock() - start) / count


def calls_per_sample(seconds: float) -> int:
    """How many calls of so many seconds fill a sample."""
    return max(1, round(SAMPLE_SECONDS / max(seconds, 1e-7)))


def interleave(
    calls: Mapping[str, Call], *, repeats: int, budget: float = float("inf")
) -> dict[str, list[Sample]]:
    """Samples of each call, taken in turn.

    Args:
        calls: what to time, by name.
        repeats: rounds; a round samples every call once.
        budget: seconds after which rounds end, but not before `MIN_REPEATS` of them.
    """
    # The first call pays for page faults and compilation, and of calls of microseconds the first
    # hundred take a fifth longer: the number of calls in a sample comes from a warm one.
    counts: dict[str, int] = {}
    for name, call in calls.items():
        seconds = elapsed(call)
        for _ in range(2 if seconds <= SLOW_SECONDS else 0):
            seconds = elapsed(call, calls_per_sample(seconds))
        counts[name] = calls_per_sample(seconds)
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(repeats):
        if done >= MIN_REPEATS and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            before = _core.fma_rate(call.threads, PEAK_SECONDS)
            seconds = elapsed(call, counts[name])
            after = _core.fma_rate(call.threads, PEAK_SECONDS)
            samples[name].append(Sample(seconds, (before + after) / 2))
    return samples


def times(samples: Sequence[Sample]) -> Spread:
    """Seconds per call."""
    return spread([sample.seconds for sample in samples])


def shares(samples: Sequence[Sample], operations: float) -> Spread:
    """Rate of a call of so many operations over the peak around it."""
    return spread([operations / sample.seconds / sample.peak for sample in samples])


def ratios(above: Sequence[Sample], below: Sequence[Sample]) -> Spread:
    """Time of one call over that of another, round by round."""
    return spread([a.seconds / b.seconds for a, b in zip(above, below, strict=True)])
