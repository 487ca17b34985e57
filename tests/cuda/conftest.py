import pytest
import torch

import ferrum_ops
from ferrum_ops.testing import gpu
from ferrum_ops.testing.timing import torch_op
from tests.cuda.test_every_op import strided_on
from tests.ops.test_every_op import outputs


def pytest_collection_modifyitems(items, config):
    """Where there is no GPU, of a test that takes the `cuda` fixture one case is skipped, by name, and none is run."""
    if torch.cuda.is_available():
        return
    seen, more = set(), []
    for item in items:
        if "cuda" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
            name = item.nodeid.partition("[")[0]
            if name in seen:
                more.append(item)
            seen.add(name)
    config.hook.pytest_deselected(items=more)
    left = set(items).difference(more)
    items[:] = [item for item in items if item in left]


@pytest.fixture
def cuda():
    return torch.device("cuda")


@pytest.fixture
def kernel(cuda):
    """As the fixture of tests/emulation, on the device: results come back to the CPU."""

    def run(name, *args):
        op = ferrum_ops.OPS[name]
        return [t.cpu() for t in outputs(op, torch_op(name), strided_on(cuda, args))]

    return run


@pytest.fixture
def wgmma(cuda):
    """As the fixture of tests/emulation."""
    if not gpu.has_wgmma():
        pytest.skip("wgmma: compute capability 9.0 alone has it")
    with gpu.wgmma():
        yield
