import os

import pytest
import torch

import ferrum_ops

#: Knobs of whoever runs the tests: a model would take them up, and so would a process that a test starts.
for variable in [name for name in os.environ if name.startswith("FERRUM_")]:
    del os.environ[variable]

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def poisoned_empty_and_fixed_seed():
    """`torch.empty` holds NaN (or the largest integer), so that a kernel which leaves a gap is seen."""
    # Where a device is not initialised, manual_seed keeps the seed for later, with a formatted stack: 2 ms.
    (torch if CUDA else torch.default_generator).manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def isa_levels() -> list[str]:
    """The CPU instruction levels this machine can run, lowest first."""
    levels = ferrum_ops.CPU_ISA_LEVELS
    return list(levels[: levels.index(ferrum_ops.cpu_isa()) + 1])


@pytest.fixture(params=isa_levels())
def isa(request):
    """Runs the test on every instruction level of this machine."""
    with ferrum_ops.use_cpu_isa(request.param):
        yield request.param
