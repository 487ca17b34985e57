"""Every CUDA kernel, executed on the CPU: equal to the reference under every order of its threads, in bounds, and
bit-identical from one order to the next."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance
from tests.emulation.conftest import GUARD
from tests.emulation.emulator import SCHEDULES, emulated_op_names
from tests.ops.test_every_op import cases, copy_args, outputs, to_float64

NAMES = set(emulated_op_names())
#: Kernels for tensor cores, which multiply numbers of 16 bits.
NO_FLOAT32 = {"marlin_gemm", "marlin_moe_gemm"}


def emulated_cases():
    return [case for case in cases((torch.float16,), names=sorted(NAMES)) if has_kernel(*case.values[:2])]


def has_kernel(op, dtype, names=NAMES):
    return op.name in names and not (op.name in NO_FLOAT32 and dtype == torch.float32)


def bits(t):
    return t.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("op, dtype, args", emulated_cases())
def test_kernel_equals_reference(op, dtype, args, emulated):
    expected = outputs(op, op.ref, copy_args(args, to_float64))
    results = []
    for schedule in SCHEDULES:
        with emulated.guard_pages(GUARD[schedule]), emulated.schedule(schedule, seed=1):
            results.append(outputs(op, emulated.op(op.name), copy_args(args)))
        assert len(results[-1]) == len(expected)
        for got, e in zip(results[-1], expected):
            assert_close(op.name, got, e, tolerance(op.name, dtype))
    for other in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other)), "the order of threads shows"


def test_kernels_are_registered(emulated):
    for name in NAMES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ferrum_emulated::{name}", "CPU"), name


@pytest.mark.parametrize("family, count", [("activation", 4), ("kv_cache", 3), ("rope", 3)])
def test_every_op_of_the_family_has_a_kernel(family, count, emulated):
    names = [op.name for op in ferrum_ops.OPS.values() if op.family == family]
    assert len(names) == count and all(emulated.op(name) for name in names)
