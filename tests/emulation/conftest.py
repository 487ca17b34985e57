import pytest

from tests.emulation import emulator


@pytest.fixture(scope="session")
def emulation():
    """Skips, saying why, where kernels cannot be emulated."""
    if (reason := emulator.missing()) is not None:
        pytest.skip(f"emulation: {reason}")


@pytest.fixture(scope="session")
def emulated(emulation):
    """The library of all shipped CUDA kernels, on CPU tensors."""
    return emulator.shipped()
