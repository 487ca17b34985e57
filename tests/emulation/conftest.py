import pytest

from tests.emulation import emulator


@pytest.fixture(scope="session")
def emulated():
    """The library of all shipped CUDA kernels, on CPU tensors."""
    if (reason := emulator.missing()) is not None:
        pytest.skip(f"emulation: {reason}")
    return emulator.shipped()
