"""A stand-in for CUDA graphs on a CPU: what a step calls is written down, and replayed on the same tensors.

As in a CUDA graph, whatever Python decided while the step was recorded stays as it was: numbers, shapes, branches, which
tensor is read. Only the contents of tensors may differ from replay to replay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ferrum_models.graphs import NoHostReads


class Recorder(TorchDispatchMode):
    """The operators called inside, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Views and what is written in place lie in tensors that are there at the replay too.
        fresh = [] if any(r.alias_info for r in func._schema.returns) else tree_leaves(result)
        self.calls.append((func, args, kwargs, [t for t in fresh if isinstance(t, torch.Tensor)]))
        return result

    def replay(self) -> None:
        for func, args, kwargs, fresh in self.calls:
            result = func(*args, **kwargs)
            for old, new in zip(fresh, (t for t in tree_leaves(result) if isinstance(t, torch.Tensor)), strict=False):
                old.copy_(new)


class RecordedGraphs:
    """`ferrum_models.graphs.Graphs` for a CPU."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []

    def capture(self, step, rewind=lambda: None):
        with NoHostReads():
            step()
        rewind()
        recorder = Recorder()
        with recorder:
            result = step()
        self.recorders.append(recorder)
        return recorder.replay, result
