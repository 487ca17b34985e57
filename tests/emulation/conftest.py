import pytest

import ferrum_ops
from tests.emulation import emulator, mutations
from tests.ops.test_every_op import copy_args, outputs

#: The orders as parameters. `make test-fast` has one of them here, and all in test_every_kernel.py.
ORDERS = [
    pytest.param(order, id=order, marks=[] if order == "random" else pytest.mark.slow) for order in emulator.SCHEDULES
]
#: Where the tensors lie under an order: reads past either end must meet a guard page.
GUARD = {"forward": "behind", "reverse": "before", "random": "behind"}


@pytest.fixture(scope="session")
def emulation():
    """Skips, saying why, where kernels cannot be emulated."""
    if (reason := emulator.missing()) is not None:
        pytest.skip(f"emulation: {reason}")


def pytest_addoption(parser):
    """Known where pytest is given this folder or a file of it."""
    parser.addoption("--mutation", choices=mutations.SHIPPED, help="test this mutant of the shipped kernels")


@pytest.fixture(scope="session")
def emulated(emulation, request):
    """The library of all shipped CUDA kernels, on CPU tensors."""
    name = request.config.getoption("--mutation", default=None)
    return emulator.shipped(mutations.replacement(mutations.SHIPPED[name]) if name else None)


@pytest.fixture(params=ORDERS)
def kernel(request, emulated):
    """`kernel(name, *args)` runs the CUDA kernel of an op on copies: what it returns, then what it has written."""

    def run(name, *args):
        op = ferrum_ops.OPS[name]
        with emulated.guard_pages(GUARD[request.param]), emulated.schedule(request.param, seed=2):
            return outputs(op, emulated.op(name), copy_args(args))

    return run


@pytest.fixture
def wgmma(emulated):
    """The kernel of marlin_wgmma.cuh wherever it can be picked."""
    emulated.c.ferrum_marlin_wgmma(1)
    yield
    emulated.c.ferrum_marlin_wgmma(0)
