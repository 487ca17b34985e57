"""A step that runs again and again on the same buffers, recorded once and replayed with one launch.

What a recording holds is fixed: addresses, shapes, and every value that Python decided while it was made. So one is
kept under a key that names all of these, and none is used once a buffer it reads or writes lies elsewhere.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ferrum_ops._graphs import recording

Step = Callable[[], torch.Tensor]


class HostReadError(RuntimeError):
    """A step made the host wait for a value of the device, which a recording cannot."""


class NoHostReads(TorchDispatchMode):
    """Inside, an operator whose result or shape depends on a tensor's values raises HostReadError with its name.

    It sees operators, not what is inside the compiled ones; of those the capture itself complains.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads_on_host(func, args, kwargs or {}):
            raise HostReadError(f"{func} reads a tensor's values on the host")
        return func(*args, **(kwargs or {}))


def _reads_on_host(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    aten = torch.ops.aten
    if func is aten.index.Tensor:  # a mask's result has as many rows as the mask has ones; indices are harmless
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if func is aten._to_copy.default:
        target = kwargs.get("device")
        return target is not None and torch.device(target).type == "cpu" and args[0].device.type != "cpu"
    if func is aten.copy_.default:
        return args[0].device.type == "cpu" and args[1].device.type != "cpu"
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


class Graphs(Protocol):
    """Records what a step launches."""

    def capture(self, step: Step, rewind: Callable[[], None] = ...) -> tuple[Callable[[], None], torch.Tensor]:
        """Runs the step a few times and records it. Returns what replays it, and its result, which replays overwrite.

        `rewind` undoes what a run has changed, before the next: there may be no room for another step behind this one.
        Whatever the step reads must lie in tensors that live as long as the recording.
        """


class CudaGraphs:
    """CUDA graphs of one device; their intermediate results share memory, since one replays at a time.

    `warm_ups` runs on another stream come first: kernels are compiled and workspaces allocated there. The first of them
    refuses host reads, which names the operator; a capture would only say that something was not permitted.
    """

    def __init__(self, device: torch.device | str, warm_ups: int = 2) -> None:
        self.device, self.warm_ups = torch.device(device), warm_ups
        # Those still in use: torch takes no pool a second time whose graphs are all gone.
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def capture(self, step: Step, rewind: Callable[[], None] = lambda: None) -> tuple[Callable[[], None], torch.Tensor]:
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    with NoHostReads():
                        step()
                    for _ in range(self.warm_ups - 1):
                        rewind()
                        step()
            finally:  # a step that raises has launched what changes the caller's buffers
                current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with recording(graph, next((other.pool() for other in self._graphs), None)):
                result = step()
            self._graphs.add(graph)
        return graph.replay, result


@dataclass(frozen=True)
class _Recording:
    replay: Callable[[], None]
    result: torch.Tensor


class StepRunner:
    """Recordings of steps by key. Where one cannot be made the step runs as it is, and `failures` says why.

    Attributes:
        failures: by key, the error of a capture that failed. It is not tried again before `reset`.
        captures, replays, eager_steps, resets: how often each happened.
    """

    def __init__(self, name: str, graphs: Graphs | None) -> None:
        """`name` is for messages; without `graphs` every step runs as it is."""
        self.name, self.graphs = name, graphs
        self.failures: dict[Hashable, str] = {}
        self.captures = self.replays = self.eager_steps = self.resets = 0
        self._recordings: dict[Hashable, _Recording] = {}
        self._addresses: tuple[int, ...] = ()

    @property
    def keys(self) -> list[Hashable]:
        """Of the recordings there are."""
        return list(self._recordings)

    def reset(self) -> None:
        """Drop every recording, and forget the failures."""
        self.resets += bool(self._recordings)
        self._recordings.clear()
        self.failures.clear()

    def check(self, buffers: Sequence[torch.Tensor]) -> None:
        """Drop the recordings if one of the buffers that they use has moved."""
        addresses = tuple(buffer.data_ptr() for buffer in buffers)
        if addresses != self._addresses:
            self.reset()
            self._addresses = addresses

    def run(self, key: Hashable, step: Step, state: Sequence[torch.Tensor]) -> torch.Tensor:
        """One step. Its result is valid until the next one.

        A capture runs the step too, several times; `state` is what the step changes and must not have changed by then.
        """
        found = self._recordings.get(key)
        if found is None and self.graphs is not None and key not in self.failures:
            found = self._capture(key, step, state)
        if found is None:
            self.eager_steps += 1
            return step()
        self.replays += 1
        found.replay()
        return found.result

    def _capture(self, key: Hashable, step: Step, state: Sequence[torch.Tensor]) -> _Recording | None:
        assert self.graphs is not None
        before = [tensor.clone() for tensor in state]

        def rewind() -> None:
            for tensor, old in zip(state, before):
                tensor.copy_(old)

        try:
            captured = _Recording(*self.graphs.capture(step, rewind))
        except Exception as error:
            self.failures[key] = reason = f"{type(error).__name__}: {_first_line(error)}"
            warnings.warn(f"[{self.name}] runs without a graph, capture failed: {reason}", stacklevel=4)
            return None
        finally:
            rewind()
        self.captures += 1
        self._recordings[key] = captured
        return captured


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
