"""Where the time of a MoE block goes: `with profile() as times: model(...)`, then `print(times)`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

PHASES = ("route", "plan", "gather", "gate_up", "activation", "down", "combine", "fused")


@dataclass
class Profile:
    """Seconds and calls of each phase; phases an implementation does not have stay at zero."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        rows = [
            f"{phase:<12}{self.calls[phase]:>8}{1e3 * self.seconds[phase]:>12.3f} ms{self.seconds[phase] / total:>8.1%}"
            for phase in PHASES
            if self.calls[phase]
        ]
        return "\n".join([f"{'phase':<12}{'calls':>8}{'time':>15}{'share':>8}", *rows])


_active: ContextVar[Profile | None] = ContextVar("ferrum_moe_profile", default=None)


def is_profiled() -> bool:
    """Whether somebody collects the phases of MoE blocks in this thread. Compiled code is not seen into."""
    return not torch.compiler.is_compiling() and _active.get() is not None


@contextmanager
def profile() -> Iterator[Profile]:
    """Collects the phases of every MoE block that runs inside the `with` block in this thread.

    On CUDA each phase is synchronised, so the sum is longer than an unprofiled step. Compiled models are not seen into:
    profile the model before `torch.compile`.
    """
    collected = Profile()
    token = _active.set(collected)
    try:
        yield collected
    finally:
        _active.reset(token)


@contextmanager
def _timed(collected: Profile, name: str) -> Iterator[None]:
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    yield
    collected.seconds[name] += now() - start
    collected.calls[name] += 1


def phase(name: str) -> AbstractContextManager[None]:
    """One phase of an implementation; free when nobody profiles or the code is being compiled."""
    if not is_profiled():
        return nullcontext()
    collected = _active.get()
    assert collected is not None
    return _timed(collected, name)
