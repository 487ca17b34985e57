"""Triton kernels on CPU tensors: Triton's own interpreter, with bfloat16 made right and every access checked.

Triton decides at decoration whether a kernel is interpreted. `interpreted` replaces the decorated functions, ours and
Triton's own, by interpreted twins instead, for the length of a `with` block: one process can interpret and compile.
"""

import contextlib
import functools
import operator
import sys
from types import SimpleNamespace

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, InterpreterOptions, TensorHandle
from triton.runtime.jit import JITFunction

from ferrum_ops.triton import launch

LANGUAGE = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)


@contextlib.contextmanager
def interpreted(target, *names):
    """Launches run in the interpreter, as if on `target`. Yields a list that fills with the names of the binaries.

    Kernels are found in the modules of `ferrum_ops.triton` that are imported, and in those of `names`.
    """
    modules = [m for name, m in sys.modules.items() if name.startswith("ferrum_ops.triton.") or name in names]
    builder = InterpreterBuilder
    asked = []

    def run(binary, grid, *args):
        asked.append(str(binary))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        options = {"num_warps": binary.num_warps, "num_stages": binary.num_stages}
        with _restored(builder), np.errstate(all="ignore"):
            builder.create_masked_load, builder.create_masked_store = _checked_access(builder, tensors)
            binary.kernel[grid](*args, **dict(binary.constants), **options)

    with (
        _restored(builder, interpreter, interpreter.interpreter_builder, launch, *LANGUAGE, *modules),
        triton.knobs.runtime.scope(),
    ):
        for namespace in (tl, tl.core, tl.math, tl.standard, *modules):
            for name, value in list(vars(namespace).items()):
                if isinstance(value, JITFunction):
                    setattr(namespace, name, _twin(value.fn))
        triton.knobs.runtime.interpret = True
        # Integers wrap, as on a GPU: an address that did lies outside. (The check takes a third of the time.)
        interpreter.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
        interpreter._patch_lang_tensor = _patch_lang_tensor
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        make_bfloat16_right(builder)
        launch.run, launch.target_of = run, lambda tensor: target
        try:
            yield asked
        finally:
            InterpretedFunction.rewritten_fn.clear()  # they need names that are removed from the modules now


class Twin(InterpretedFunction):
    def __call__(self, *args, **kwargs):
        """A call from a kernel. (The original patches the language again for each, a quarter of all time.)"""
        return self.rewrite()(*args, **kwargs)


_twin = functools.cache(Twin)


def _patch_lang_tensor(tensor, scope, original=interpreter._patch_lang_tensor):
    """Triton 3.6 makes an index of an array with one dimension, which NumPy refuses since 2.4."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


@contextlib.contextmanager
def _restored(*namespaces):
    """Attributes of modules and classes are afterwards what they were. (The interpreter leaves some of its own.)"""
    before = [dict(vars(namespace)) for namespace in namespaces]
    try:
        yield
    finally:
        for namespace, names in zip(namespaces, before):
            for name in set(vars(namespace)) - set(names):
                delattr(namespace, name)
            for name, value in names.items():
                if vars(namespace)[name] is not value:
                    setattr(namespace, name, value)


def _checked_access(builder, tensors):
    """Load and store of the builder, raising for an address outside `tensors` that no mask holds back."""
    load, store = builder.create_masked_load, builder.create_masked_store
    extents = []
    for t in tensors:
        if t.numel():
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            extents.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))

    def check(what, pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        address = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        inside = functools.reduce(
            operator.or_, ((address >= low) & (address + size <= high) for low, high in extents), np.False_
        )
        outside = ~inside & mask.data
        if outside.any():
            raise IndexError(f"{what} outside the kernel's tensors at {np.argwhere(outside)[0].tolist()} of its block")

    def checked_load(self, pointers, mask, *rest):
        check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    return checked_load, checked_store


def make_bfloat16_right(builder):
    """Arithmetic of bfloat16, which the interpreter keeps as uint16 and computes on as integers.

    Operands are widened to float32, exactly, and a result is rounded to nearest even, once: what a GPU does for a
    single operation. What cannot be done so raises.
    """

    def is_bfloat16(handle):
        return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16

    def widened(handle):
        if not is_bfloat16(handle):
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(values):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)

    def through_float32(original):
        def method(self, *args):
            if not any(map(is_bfloat16, args)) or np.where in args:  # a selection moves bits
                return original(self, *args)
            result = original(self, *map(widened, args))
            return result if result.data.dtype == np.bool_ else rounded(result.data)

        return method

    def refused(original):
        def method(self, *args):
            if any(map(is_bfloat16, args)) or tl.bfloat16 in [getattr(a, "scalar", None) for a in args]:
                raise NotImplementedError(f"{original.__name__} of bfloat16 in the interpreter")
            return original(self, *args)

        return method

    def cast_impl(self, source, dtype, original=builder.cast_impl):
        source = widened(source)
        return rounded(source.data.astype(np.float32)) if dtype.scalar == tl.bfloat16 else original(self, source, dtype)

    def create_dot(self, a, b, sums, *rest, original=builder.create_dot):
        return original(self, widened(a), widened(b), sums, *rest)

    for name in ("binary_op", "ternary_op", "unary_op", "create_erf", "create_rsqrt"):
        setattr(builder, name, through_float32(getattr(builder, name)))
    for name in ("create_fp_to_fp", "create_fma", "create_atomic_rmw", "create_atomic_cas"):
        setattr(builder, name, refused(getattr(builder, name)))
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.get_bf16 = lambda self, value: rounded(np.array([value], np.float32))
