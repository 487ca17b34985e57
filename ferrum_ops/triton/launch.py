"""What every launcher of Triton kernels needs.

A module of kernels has, for each op, a pure function `pick_<op>_config(sizes..., target)` that returns a frozen
dataclass, and one function `binaries(capability)`: all that its launchers can ask Triton to compile there. tests/triton
compiles every one of them ahead of time, and no launch there may ask for another.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """What a configuration may depend on besides the sizes."""

    capability: int  # 80, 89, 90, 100
    multiprocessors: int


@dataclass(frozen=True)
class Binary:
    """A kernel with the constants it is specialised to."""

    kernel: Any  # the triton.jit function
    num_warps: int
    num_stages: int
    constants: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Any, num_warps: int, num_stages: int, **constants: Any) -> Binary:
        return cls(kernel, num_warps, num_stages, tuple(constants.items()))

    def __str__(self) -> str:
        constants = "-".join(f"{name.lower()}{value}" for name, value in self.constants)
        return f"{self.kernel.__name__}-{constants}-warps{self.num_warps}-stages{self.num_stages}"


def target_of(tensor: torch.Tensor) -> Target:
    """The CUDA device that `tensor` lies on."""
    return _target(tensor.get_device())


@functools.cache
def _target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def run(binary: Binary, grid: tuple[int, ...], *args: Any) -> None:
    """Launch on the device of the first argument, a tensor, and its current stream."""
    with torch.cuda.device_of(args[0]):
        binary.kernel[grid](*args, **dict(binary.constants), num_warps=binary.num_warps, num_stages=binary.num_stages)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
