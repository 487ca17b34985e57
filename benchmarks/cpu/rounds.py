"""Contenders take turns, so that a disturbance of the machine meets all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Between turns: the threads of the contender before stop spinning.
PAUSE_SECONDS = 0.01

#: At the start of a turn, not counted: threads wake up and spread over the cores, clocks rise.
WARM_SECONDS = 0.1

#: Of timed calls in a turn, where more than one fit, and how many at most.
TURN_SECONDS, MAX_CALLS = 0.05, 16

#: Turns of each contender, at least and at most.
MIN_ROUNDS, MAX_ROUNDS = 5, 16


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, lower, upper)


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Turns:
    spreads: dict[str, Spread]  # by contender
    foreign: float | None  # share of the machine's CPU time that went elsewhere meanwhile


def take_turns(contenders: dict[str, Callable[[int], Callable[[], Any]]], budget: float) -> Turns:
    """Time every contender for about `budget` seconds in all.

    A contender gives its n-th call; in a round all of them time the same numbers. What it does to choose the call is
    not timed.
    """
    estimates = {name: min(seconds_of(call(n)) for n in range(2)) for name, call in contenders.items()}
    calls = min(MAX_CALLS, max(1, int(TURN_SECONDS / statistics.median(estimates.values()))))
    rounds_cost = sum(PAUSE_SECONDS + max(WARM_SECONDS, t) + calls * t for t in estimates.values())
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / rounds_cost)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    start, foreign = time.perf_counter(), foreign_cpu_seconds()
    for r in range(rounds):
        for name, call in contenders.items():
            bound = [call(r * calls + i) for i in range(calls)]
            time.sleep(PAUSE_SECONDS)
            _warm_up(call, first=(r + 1) * calls)
            samples[name] += [seconds_of(b) for b in bound]
    share = None
    if foreign is not None and (after := foreign_cpu_seconds()) is not None:
        share = (after - foreign) / (time.perf_counter() - start) / (os.cpu_count() or 1)
    return Turns({name: Spread.of(values) for name, values in samples.items()}, share)


def _warm_up(call: Callable[[int], Callable[[], Any]], first: int) -> None:
    """Calls with other numbers than those about to be timed, whose data they would bring into the caches."""
    start, n = time.perf_counter(), first
    while n == first or time.perf_counter() - start < WARM_SECONDS:
        call(n)()
        n += 1


def foreign_cpu_seconds() -> float | None:
    """CPU time since boot that went to other processes, and to other guests of a host. None where /proc is missing."""
    try:
        with open("/proc/stat") as file:
            fields = [int(value) for value in file.readline().split()[1:9]]
    except FileNotFoundError:
        return None
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()
