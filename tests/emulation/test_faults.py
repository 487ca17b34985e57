"""Whatever goes wrong in a kernel is a RuntimeError that says where, and the next kernel runs as if nothing had been."""

import re

import pytest
import torch

from tests.emulation.emulator import HERE, SCHEDULES, Emulated

#: Of the emulator itself, with a library of its own to compile.
pytestmark = pytest.mark.slow

#: By the number of the case in faults.cu; the message as the forward order gives it.
FAULTS = {
    "deadlock": (0, "deadlock: threads 1-63 wait in __syncthreads (faults.cu:24); threads 0 wait in __syncwarp (faults.cu:22); 0 of 64 exited"),
    "exited-lanes": (1, "diverged: 5 lanes of a warp exited while others wait in __syncthreads (faults.cu:30)"),
    "livelock": (2, "livelock: threads spin on memory that no thread of the block changes"),
    "stack": (3, "stack overflow: the locals of a thread need more than 61440 bytes"),
    "exception": (4, "thread (0, 0, 0): thrown in a kernel"),
    "padding": (5, "wrote out of bounds: byte 252 of a tensor of 252 bytes"),
    "guard-page": (6, "access out of bounds: byte 16636 of a tensor of 252 bytes"),
    "null": (7, "access out of bounds: (nil), in no tensor"),
    "shift": (8, "shift by 32 bits (faults.cu:51)"),
    "division": (9, "integer division by zero (faults.cu:54)"),
    "cast": (10, "a number that its integer type does not hold"),
    "alignment": (11, "misaligned access: 'const struct int2' needs 8 bytes, the address is 4 past that (faults.cu:60)"),
    "shared": (12, "access out of bounds: byte 32 of dynamic shared memory of 32 bytes"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faults(emulation):
    return Emulated([HERE / "kernels" / "faults.cu"], "ferrum_faults")


def launch(library, kind, blocks_y=1, threads=64, shared_bytes=32, size=63):
    with library.guard_pages("behind"):
        x = torch.zeros(size, dtype=torch.int32)
        library.op("misbehave_")(x, kind, blocks_y, threads, shared_bytes)
    return x


@pytest.mark.parametrize("kind, message", FAULTS.values(), ids=FAULTS)
def test_fault(kind, message, faults):
    with pytest.raises(RuntimeError, match=re.escape(message)) as error:
        launch(faults, kind)
    assert "[misbehave_] emulated kernel, block (0, 0, 0)" in str(error.value)
    for schedule in SCHEDULES:  # every order finds it, perhaps in another thread
        with faults.schedule(schedule, seed=2), pytest.raises(RuntimeError, match="emulated kernel"):
            launch(faults, kind)
        assert launch(faults, kind=99, size=64).tolist() == list(range(64))


@pytest.mark.parametrize(
    "limits, message",
    [
        (dict(threads=1025), "expected 1 to 1024 threads, got a block of (1025, 1, 1)"),
        (dict(threads=0), "expected 1 to 1024 threads, got a block of (0, 1, 1)"),
        (dict(blocks_y=65536), "expected a grid of 1 to (2^31 - 1, 65535, 65535) blocks, got (1, 65536, 1)"),
        (dict(shared_bytes=232449), "expected at most 232448 bytes of shared memory, got 232449"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_limits_of_a_launch(limits, message, faults):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        launch(faults, kind=99, **limits)


def start_early(library, kind, schedule):
    with library.guard_pages("behind"), library.schedule(schedule, seed=2):
        x = torch.zeros(64, dtype=torch.int32)
        library.op("start_early_")(x, kind)
    return x.tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_early_launch_waits(schedule, faults):
    """Whatever it guesses before; a read before the wait is found where the launch before is taken to run still."""
    assert start_early(faults, 0, schedule) == list(range(64))
    with pytest.raises(RuntimeError, match="prefetch out of bounds: byte 4095 of a tensor of 256 bytes"):
        start_early(faults, 1, schedule)
    with pytest.raises(RuntimeError, match="exited without a wait for the previous launch"):
        start_early(faults, 3, schedule)
    if schedule == "reverse":
        assert start_early(faults, 2, schedule) == list(range(64))
    if schedule == "forward":
        with pytest.raises(RuntimeError, match="access before the wait for the previous launch: byte 0 of a tensor"):
            start_early(faults, 2, schedule)
    assert start_early(faults, 0, schedule) == list(range(64))
