"""Loads the compiled library and attaches the Python side of every op: reference, fake, sample inputs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_SHARED_LIBRARY = Path(__file__).with_name("_C.abi3.so")
if not _SHARED_LIBRARY.exists():
    raise ImportError(
        f"[ferrum_ops] compiled library: expected {_SHARED_LIBRARY.name} beside {Path(__file__).parent}, found none; "
        "build it with `pip install --no-build-isolation -e .`"
    )
torch.ops.load_library(_SHARED_LIBRARY)
_c = ctypes.CDLL(str(_SHARED_LIBRARY))
_c.ferrum_cpu_isa.restype = ctypes.c_char_p
_c.ferrum_set_cpu_isa.argtypes = [ctypes.c_char_p]

_fragment = torch.library.Library("ferrum", "IMPL")

#: Instruction levels of the CPU kernels, lowest first.
CPU_ISA_LEVELS = ("generic", "avx2", "avx512")


@dataclass(frozen=True)
class Op:
    """What `tests/test_registry.py`, opcheck and the benchmarks know of one op."""

    name: str  # "rms_norm", or with its overload "silu_mul.gate_up"
    family: str  # stem of its file in every folder
    ref: Callable[..., Any]  # pure torch, any device: the oracle
    fake: Callable[..., Any] | None  # None for an op that only mutates, and for a composite
    inputs: Callable[..., Iterator[tuple[Any, ...]]]  # (device, dtype) -> argument tuples
    composite: bool = False  # the reference is a line of ATen that tracing and autograd see through


#: Every registered op by name.
OPS: dict[str, Op] = {}


def register(
    name: str,
    *,
    ref: Callable[..., Any],
    inputs: Callable[..., Iterator[tuple[Any, ...]]],
    fake: Callable[..., Any] | None = None,
    composite: bool = False,
) -> None:
    """Attach `ref` as the kernel of every device without one of its own, and `fake` for tracing.

    A `composite` op is its reference on every device. Tracing and autograd see the ATen ops inside, so it has no fake.
    Where the library has a CUDA kernel of one all the same, that serves calls without either.
    The family is the stem of the module that calls this.
    """
    family = ref.__module__.rpartition(".")[2]
    key = "CompositeImplicitAutograd" if composite else "CompositeExplicitAutograd"
    _fragment.impl(name, _on_one_device(name, ref), key)
    if composite and torch._C._dispatch_has_kernel_for_dispatch_key(f"ferrum::{name}", "CUDA"):
        keep_composite(_fragment, name, ref, "CUDA")
    if fake is not None:
        torch.library.register_fake(f"ferrum::{name}", _on_one_device(name, fake), lib=_fragment)
    OPS[name] = Op(name, family, ref, fake, inputs, composite)


def keep_composite(library: torch.library.Library, name: str, ref: Callable[..., Any], device: str) -> None:
    """Let autograd and tracing see through a composite op that also has a kernel for `device`.

    The dispatcher by itself would take the kernel for differentiable and lose the gradient, and trace an opaque op.
    """
    packet, _, overload = name.partition(".")
    op = getattr(getattr(getattr(torch.ops, library.ns), packet), overload or "default")

    def composite_or_kernel(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        if needs_grad(*tensors) or not plain or is_in_torch_dispatch_mode():
            return ref(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    library.impl(name, _on_one_device(name, composite_or_kernel), f"Autograd{device}")


def register_kernel(name: str, key: str, kernel: Callable[..., Any]) -> None:
    """Attach a kernel written in Python for one dispatch key, "CUDA" or "MPS"."""
    _fragment.impl(name, _on_one_device(name, kernel), key)


def _on_one_device(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, raising first where tensors lie on several devices. (Kernels check for themselves.)"""
    packet, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.ferrum, packet), overload or "default")._schema
    names = [argument.name for argument in schema.arguments]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        expected: torch.device | None = None
        for argument, value in (*zip(names, args), *kwargs.items()):
            for t in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(t, torch.Tensor):
                    expected = t.device if expected is None else expected
                    if t.device != expected:
                        raise RuntimeError(f"[{packet}] {argument}: expected a tensor on {expected}, got {t.device}")
        return function(*args, **kwargs)

    return checked


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would have to differentiate an op of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_grad(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise for an op without a backward when autograd would have to differentiate it."""
    if needs_grad(*tensors):
        raise RuntimeError(
            f"[{op}] has no backward: expected inputs that do not require grad; call it under torch.no_grad()"
        )


def differentiable(
    function: Callable[..., Any], backward: Callable[..., tuple[torch.Tensor | None, ...]]
) -> Callable[..., Any]:
    """`function` with a gradient, for the calls that need one.

    `backward(needs, grads, *args)` takes which arguments need a gradient, the gradients of the outputs, and the
    arguments of the call; it returns a gradient or None for each argument.

    A public function calls this only where `needs_grad`. An Autograd kernel of the op (torch.library.register_autograd)
    would stand in the way of every other call too: it is Python, and costs more than a small op's own work. A call of
    `torch.ops.ferrum.<op>` itself has torch's answer for ops without one: a warning with the op's name in backward.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return function(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = [a if isinstance(a, torch.Tensor) else None for a in inputs]
            ctx.save_for_backward(*tensors)
            ctx.values = [None if isinstance(a, torch.Tensor) else a for a in inputs]

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            args = [value if tensor is None else tensor for tensor, value in zip(ctx.saved_tensors, ctx.values)]
            return backward(ctx.needs_input_grad, grads, *args)

    return Differentiable.apply


def backends() -> dict[str, dict[str, str]]:
    """Which kernel serves each op on each device.

    Returns `{op: {"cpu" | "cuda" | "mps": "kernel" | "reference" | "composite"}}`; "reference" is the pure-torch
    formula, "composite" a line of ATen that needs no kernel of its own.
    """
    keys = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS"}
    has = torch._C._dispatch_has_kernel_for_dispatch_key

    def served_by(op: Op, key: str) -> str:
        if has(f"ferrum::{op.name}", key):
            return "kernel"
        return "composite" if op.composite else "reference"

    return {name: {device: served_by(op, key) for device, key in keys.items()} for name, op in sorted(OPS.items())}


def cpu_isa() -> str:
    """The instruction level the CPU kernels run on: "generic", "avx2" or "avx512"."""
    return _c.ferrum_cpu_isa().decode()


@contextmanager
def use_cpu_isa(level: str) -> Iterator[None]:
    """Run the CPU kernels on another instruction level inside a `with` block (process-wide; for tests and benchmarks).

    Raises ValueError for a level that is unknown or that this processor lacks.
    """
    if _c.ferrum_set_cpu_isa(level.encode()) != 0:
        raise ValueError(f"[use_cpu_isa] level: expected one of {CPU_ISA_LEVELS} up to {cpu_isa()!r}, got {level!r}")
    try:
        yield
    finally:
        _c.ferrum_set_cpu_isa(None)
