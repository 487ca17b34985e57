import importlib

import pytest

import ferrum_ops
from ferrum_ops.triton import KERNELS
from ferrum_ops.triton.launch import Target
from tests.ops.test_every_op import copy_args, outputs


@pytest.fixture
def interpreter():
    """`with interpreter(multiprocessors=4):` runs the launchers of `ferrum_ops.triton` on CPU tensors."""
    pytest.importorskip("triton")
    from tests.triton.interpreter import interpreted

    return lambda multiprocessors=4: interpreted(Target(90, multiprocessors))


@pytest.fixture
def kernel(interpreter):
    """As the fixture of tests/emulation: `kernel(name, *args)` runs the launcher of an op on copies."""

    def run(name, *args):
        launcher = getattr(importlib.import_module(KERNELS[name]), name)
        with interpreter():
            return outputs(ferrum_ops.OPS[name], launcher, copy_args(args))

    return run
