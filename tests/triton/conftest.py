import pytest

from ferrum_ops.triton.launch import Target


@pytest.fixture
def interpreter():
    """`with interpreter(multiprocessors=4):` runs the launchers of `ferrum_ops.triton` on CPU tensors."""
    pytest.importorskip("triton")
    from tests.triton.interpreter import interpreted

    return lambda multiprocessors=4: interpreted(Target(90, multiprocessors))
