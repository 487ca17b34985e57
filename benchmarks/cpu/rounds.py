"""Contenders take turns, so that a disturbance of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Between turns: the threads of the contender before stop spinning.
PAUSE_SECONDS = 0.02

#: Turns of each contender, at least and at most, and calls per turn while they are short.
MIN_ROUNDS, MAX_ROUNDS, CALLS = 5, 24, 3
SHORT_SECONDS = 0.02


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


def take_turns(contenders: dict[str, Callable[[int], Callable[[], Any]]], budget: float) -> dict[str, Spread]:
    """Time every contender for about `budget` seconds in all.

    A contender gives its n-th call; all of them get the same numbers in the same round, and what it does to choose the
    call is not timed. Every turn begins with a call that wakes its threads and is not counted.
    """
    number = 0
    estimate = {name: min(seconds_of(call(number + i)) for i in range(2)) for name, call in contenders.items()}
    calls = CALLS if max(estimate.values()) < SHORT_SECONDS else 1
    round_seconds = sum(PAUSE_SECONDS + seconds * (calls + 1) for seconds in estimate.values())
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            bound = [call(number + i) for i in range(calls + 1)]
            time.sleep(PAUSE_SECONDS)
            bound[0]()
            samples[name] += [seconds_of(b) for b in bound[1:]]
        number += calls + 1
    return {name: Spread.of(values) for name, values in samples.items()}
