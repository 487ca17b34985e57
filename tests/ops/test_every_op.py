"""What every op must satisfy, driven by the registry: the kernel equals the reference on float64 inputs at every
instruction level, opcheck passes, an op without tensors to differentiate refuses gradients."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance
from ferrum_ops.testing.timing import torch_op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cases(slow_dtypes=()):
    for name, op in sorted(ferrum_ops.OPS.items()):
        for dtype in DTYPES:
            marks = [pytest.mark.slow] if dtype in slow_dtypes else []
            torch.manual_seed(0)  # samples are drawn while collecting, before any fixture: the same in every run
            for i, args in enumerate(op.inputs("cpu", dtype)):
                case = f"{name}-{str(dtype).removeprefix('torch.')}-{i}"
                yield pytest.param(op, dtype, args, id=case, marks=marks)


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
def test_kernel_equals_reference(op, dtype, args, isa):
    got = outputs(op, torch_op(op.name), copy_args(args))
    expected = outputs(op, op.ref, copy_args(args, to_float64))
    assert len(got) == len(expected)
    for g, e in zip(got, expected):
        assert_close(op.name, g, e, tolerance(op.name, dtype))


@pytest.mark.parametrize("op, dtype, args", list(cases(slow_dtypes=(torch.float16, torch.bfloat16))))
def test_opcheck(op, dtype, args):
    torch.library.opcheck(torch_op(op.name), copy_args(args))
