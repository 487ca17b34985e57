"""What every op must satisfy, driven by the registry: the kernel equals the reference on float64 inputs at every
instruction level, and opcheck passes."""

import functools

import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance
from ferrum_ops.testing.timing import torch_op
from tests.conftest import isa_levels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Of opcheck, what takes ten times as long as all the rest: it traces the op with symbolic shapes.
TRACING = "test_aot_dispatch_dynamic"
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@functools.cache
def samples(name, dtype):
    """Drawn while collecting, before any fixture: the same in every run. Tests change copies only."""
    torch.default_generator.manual_seed(0)
    return list(ferrum_ops.OPS[name].inputs("cpu", dtype))


def cases(slow_dtypes=(), dtypes=DTYPES, names=None):
    """Parameters `op, dtype, args`."""
    for name in sorted(ferrum_ops.OPS) if names is None else names:
        for dtype in dtypes:
            for i, args in enumerate(samples(name, dtype)):
                case = f"{name}-{str(dtype).removeprefix('torch.')}-{i}"
                marks = [pytest.mark.slow] if dtype in slow_dtypes else []
                yield pytest.param(ferrum_ops.OPS[name], dtype, args, id=case, marks=marks)


def copy_tensor(t):
    """A copy with the strides and the storage offset of `t`, which `clone` gives up for views."""
    # Not the storage's own clone, which does not ask the allocator that tests/emulation puts in place.
    storage = torch.empty(t.untyped_storage().nbytes(), dtype=torch.uint8, device=t.device).untyped_storage()
    storage.copy_(t.untyped_storage())
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.size(), t.stride())


def copy_args(args, convert=lambda t: t):
    return tuple(convert(copy_tensor(a)) if isinstance(a, torch.Tensor) else a for a in args)


def to_float64(t):
    return t.double() if t.dtype in DTYPES else t


def outputs(op, function, args):
    """What the op returns and what it writes."""
    result = function(*args)
    returned = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    schema = torch_op(op.name)._schema
    return returned + [args[i] for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]


@pytest.mark.parametrize("op, dtype, args", list(cases()))
def test_kernel_equals_reference(op, dtype, args):
    expected = outputs(op, op.ref, copy_args(args, to_float64))
    for level in isa_levels():
        with ferrum_ops.use_cpu_isa(level):
            got = outputs(op, torch_op(op.name), copy_args(args))
        assert len(got) == len(expected)
        for g, e in zip(got, expected):
            assert_close(f"{op.name}, {level}", g, e, tolerance(op.name, dtype))


@pytest.mark.parametrize("op, dtype, args", list(cases(slow_dtypes=(torch.float16, torch.bfloat16))))
def test_opcheck(op, dtype, args):
    torch.library.opcheck(torch_op(op.name), copy_args(args), test_utils=CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("op, dtype, args", list(cases(dtypes=DTYPES[:1])))
def test_opcheck_tracing(op, dtype, args):
    """In one dtype: a trace sees shapes and no values, and what dtypes come out is in test_opcheck."""
    torch.library.opcheck(torch_op(op.name), copy_args(args), test_utils=TRACING)
