"""The lanes of `bucketed`: every launch between fork and join, lanes in turns. CUDA's streams are played by a recorder."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from ferrum_models.moe import CudaLanes, InOrder, MarlinExpertWeights
from ferrum_models.moe.bucketed import bucketed, refuse_capture, split_buckets
from ferrum_models.moe.per_pair import per_pair
from ferrum_models.moe.streams import lanes_of
from ferrum_ops.testing.compare import relative_error
from tests.moe.test_implementations import ROUTINGS, H, K, inputs, make_gptq, make_marlin


class RecordingCuda:
    """What `CudaLanes` uses of torch.cuda. `log` has every call in order; `active` is the stream of the moment."""

    def __init__(self):
        self.log, self.made = [], 0
        self.active = self.main = self.Stream("main")

    def Stream(self, device=None):
        cuda, name = self, "main" if device == "main" else f"lane {self.made}"
        self.made += device != "main"

        class Stream:
            def wait_event(self, event):
                cuda.log.append((name, "waits for", event.recorded))

            def __str__(self):
                return name

        return Stream()

    def Event(self):
        cuda = self

        class Event:
            recorded = None

            def record(self, stream):
                self.recorded = f"{stream} at {len(cuda.log)}"
                cuda.log.append((str(stream), "records", self.recorded))

        return Event()

    def current_stream(self, device):
        return self.active

    @contextmanager
    def stream(self, stream):
        before, self.active = self.active, stream
        try:
            yield
        finally:
            self.active = before


@pytest.fixture
def weights():
    torch.manual_seed(3)
    return make_marlin(make_gptq(), streams=3)


@pytest.fixture
def launches(monkeypatch):
    """Logs the products of MarlinExpertWeights with the stream that is active and the workspace they were given."""

    def watch(cuda):
        for name in ("_linear", "_grouped"):
            inner = getattr(MarlinExpertWeights, name)

            def logged(self, *args, inner=inner):
                cuda.log.append((str(cuda.active), "launches", self.workspace.data_ptr()))
                return inner(self, *args)

            monkeypatch.setattr(MarlinExpertWeights, name, logged)

    return watch


@pytest.mark.parametrize("host_route", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_fork_launches_join(routing, host_route, weights, launches):
    hidden, ids, topk_weights = inputs(routing)
    # Lanes of their own workspace: on the CPU it is empty, so here it is told apart by where it is.
    weights = replace(weights, host_route=host_route, workspace=torch.zeros(3, 4, dtype=torch.int32))
    expected = per_pair(hidden, ids, topk_weights, weights)
    cuda = RecordingCuda()
    lanes = CudaLanes(hidden.device, 3, cuda)
    launches(cuda)
    got = bucketed(hidden, ids, topk_weights, weights, lanes)
    assert relative_error(got, expected) < 2e-6
    log = cuda.log
    fork = log[0]
    assert fork[:2] == ("main", "records")
    assert log[1:4] == [(f"lane {i}", "waits for", fork[2]) for i in range(3)]
    joins = log[-6:]
    assert joins[::2] == [(f"lane {i}", "records", joins[2 * i][2]) for i in range(3)]
    assert joins[1::2] == [("main", "waits for", joins[2 * i][2]) for i in range(3)]
    middle = log[4:-6]
    assert all(what == "launches" and stream != "main" for stream, what, _ in middle)
    # Gate and up are two launches, down is one: three to a bucket, buckets on the lanes in turns.
    assert [stream for stream, *_ in middle] == [f"lane {i // 3 % 3}" for i in range(len(middle))]
    workspaces = {(stream, workspace) for stream, _, workspace in middle}
    assert len(workspaces) == min(3, len(middle) // 3) == len({workspace for _, workspace in workspaces})
    assert str(cuda.active) == "main"


def test_device_buckets_depend_on_sizes_only(weights, launches):
    counts = []
    for routing in ("random", "nothing-kept"):
        ids = ROUTINGS[routing]()[:1].repeat(5, 1).to(torch.int32).contiguous()
        cuda = RecordingCuda()
        launches(cuda)
        bucketed(torch.randn(5, H), ids, torch.rand(5, K), weights, CudaLanes(torch.device("cpu"), 3, cuda))
        counts.append(sum(what == "launches" for _, what, _ in cuda.log))
    assert counts[0] == counts[1] > 0


def test_lanes_join_when_a_launch_raises():
    cuda = RecordingCuda()
    lanes = CudaLanes(torch.device("cpu"), 2, cuda)
    with pytest.raises(KeyError), lanes.forked():
        raise KeyError
    assert [entry[:2] for entry in cuda.log[-4:]] == [
        ("lane 0", "records"),
        ("main", "waits for"),
        ("lane 1", "records"),
        ("main", "waits for"),
    ]


def test_lanes_of_a_cpu_are_in_order():
    lanes = lanes_of(torch.device("cpu"), 4)
    assert isinstance(lanes, InOrder) and lanes.count == 1
    with lanes.forked(), lanes.on(3):
        pass


def test_buckets():
    assert split_buckets([0, 0, 17, 20], 16) == [(1, 0, 16), (1, 16, 17), (2, 17, 20)]
    assert split_buckets([0, 0, 17, 20], None) == [(1, 0, 17), (2, 17, 20)]
    assert split_buckets([0], 16) == []


def test_a_host_plan_is_refused_while_a_graph_is_captured(weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"\[bucketed\] moe_host_route: expected False while a CUDA graph"):
        refuse_capture(torch.device("cuda"))
    refuse_capture(torch.device("cpu"))
