"""The interpreter that the other tests trust: bfloat16, bounds, and that it leaves nothing behind."""

import contextlib
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

import ferrum_ops.triton.gptq_kernels  # noqa: E402, F401
from ferrum_ops.triton import launch  # noqa: E402
from ferrum_ops.triton.launch import Binary  # noqa: E402
from tests.triton.interpreter import LANGUAGE, InterpreterBuilder, interpreted  # noqa: E402

TARGET = launch.Target(90, 4)
SIZE = 64


@triton.jit
def compute(a_ptr, b_ptr, out_ptr, STEP: tl.constexpr, SIZE: tl.constexpr):
    """One operation of each kind that Triton has in bfloat16."""
    place = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    if STEP == "add":
        out = a + b
    elif STEP == "multiply":
        out = a * b
    elif STEP == "divide":
        out = a / b
    elif STEP == "maximum":
        out = tl.maximum(a, b)
    elif STEP == "compare":
        out = tl.where(a < b, a, b)
    elif STEP == "negate":
        out = -a
    elif STEP == "abs":
        out = tl.abs(a)
    elif STEP == "constant":
        out = a * 0.3
    elif STEP == "clamp":
        out = tl.clamp(a, -0.5, 0.5)
    elif STEP == "from_int":
        out = (place * 1001).to(a.dtype)
    elif STEP == "from_float":
        out = (a.to(tl.float32) * 1.2345).to(a.dtype)
    elif STEP == "from_half":
        out = a.to(tl.float16).to(a.dtype)
    elif STEP == "sum":
        out = tl.zeros((SIZE,), a.dtype) + tl.sum(a.to(tl.float32), 0).to(a.dtype)
    tl.store(out_ptr + place, out)


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + row * 16 + column), tl.load(b_ptr + row * 16 + column)
    tl.store(out_ptr + row * 16 + column, tl.dot(a, b).to(out_ptr.dtype.element_ty))


@triton.jit
def convert(a_ptr, out_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out_ptr + place, tl.load(a_ptr + place).to(tl.bfloat16))


@triton.jit
def refused(a_ptr, out_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    a = tl.load(a_ptr + place)
    if OPERATION == "fma":
        tl.store(out_ptr + place, tl.fma(a, a, a))
    else:
        tl.atomic_add(out_ptr + place, a)


@triton.jit
def move(a_ptr, out_ptr, from_offset, to_offset, MASKED: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    source, target = place + from_offset, place + to_offset
    if MASKED:
        tl.store(out_ptr + target, tl.load(a_ptr + source, mask=source < SIZE, other=0), mask=target < SIZE)
    else:
        tl.store(out_ptr + target, tl.load(a_ptr + source))


EXPECTED = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "maximum": torch.maximum,
    "compare": torch.minimum,
    "negate": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "constant": lambda a, b: a * torch.tensor(0.3, dtype=a.dtype),
    "clamp": lambda a, b: a.clamp(-0.5, 0.5),
    "from_int": lambda a, b: (torch.arange(SIZE) * 1001).to(a.dtype),
    "from_float": lambda a, b: (a.float() * torch.tensor(1.2345)).to(a.dtype),
    "from_half": lambda a, b: a.half().to(a.dtype),
    "sum": lambda a, b: a.float().sum().to(a.dtype).expand(SIZE),
}


def operands(size, dtype):
    return torch.randn(size).to(dtype), torch.randn(size).to(dtype)


def product(a, b):
    out = torch.empty(16, 16)
    launch.run(Binary.of(multiply, 4, 1, SIZE=SIZE), (1,), a, b, out)
    return out


def computed(step, dtype):
    a, b = operands(SIZE, dtype)
    out = torch.empty_like(a)
    launch.run(Binary.of(compute, 4, 1, STEP=step, SIZE=SIZE), (1,), a, b, out)
    return out, EXPECTED[step](a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", EXPECTED)
def test_every_operation_is_rounded_once_to_nearest_even(step, dtype):
    with interpreted(TARGET, __name__):
        out, expected = computed(step, dtype)
    torch.testing.assert_close(out, expected, rtol=1e-6 if step == "sum" else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products(dtype):
    a, b = operands((16, 16), dtype)
    with interpreted(TARGET, __name__):
        torch.testing.assert_close(product(a, b), a.float() @ b.float())


@pytest.mark.parametrize(
    "step", ["add", "multiply", "divide", "compare", "negate", "from_int", "from_float", "product"]
)
def test_the_correction_is_needed(step, monkeypatch):
    """Where this fails, Triton has learnt bfloat16 and the correction can go."""
    monkeypatch.setattr("tests.triton.interpreter.make_bfloat16_right", lambda builder: None)
    a, b = operands((16, 16), torch.bfloat16)
    with interpreted(TARGET, __name__):
        out, expected = (product(a, b), a.float() @ b.float()) if step == "product" else computed(step, torch.bfloat16)
    assert not torch.allclose(out.float(), expected.float(), rtol=1e-3)


def test_rounding_of_every_kind_of_float():
    """Ties to even, subnormals, overflow to infinity, NaN with any payload."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x00008000, 0x00018000, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
    values = torch.tensor([b - (b >> 31 << 32) for b in [*bits, 0x7F800001, 0xFFFFFFFF]], dtype=torch.int32)
    values = values.view(torch.float32).repeat(7)[:SIZE]
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    with interpreted(TARGET, __name__):
        launch.run(Binary.of(convert, 4, 1, SIZE=SIZE), (1,), values, out)
    torch.testing.assert_close(out, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_what_is_not_covered_raises():
    a = torch.zeros(SIZE, dtype=torch.bfloat16)
    for operation in ("fma", "atomic"):
        with interpreted(TARGET, __name__), pytest.raises(Exception, match="of bfloat16 in the interpreter"):
            launch.run(Binary.of(refused, 4, 1, OPERATION=operation, SIZE=SIZE), (1,), a, a)


@pytest.mark.parametrize(
    "offset, masked, inside", [(0, False, True), (1, False, False), (1, True, True), (-1, True, False)]
)
@pytest.mark.parametrize("what", ["load", "store"])
def test_accesses_outside_the_tensors_are_reported(what, offset, masked, inside):
    whole = torch.zeros(3 * SIZE)
    a, b = whole[:SIZE], whole[2 * SIZE :]  # neighbours of memory that is not theirs
    offsets = (offset, 0) if what == "load" else (0, offset)
    problem = None if inside else pytest.raises(Exception, match=f"{what} outside the kernel's tensors")
    with interpreted(TARGET, __name__), problem or contextlib.nullcontext():
        launch.run(Binary.of(move, 4, 1, MASKED=masked, SIZE=SIZE), (1,), a, b, *offsets)


def test_nothing_of_the_interpreter_stays():
    namespaces = (
        *LANGUAGE,
        InterpreterBuilder,
        launch,
        sys.modules[__name__],
        sys.modules["ferrum_ops.triton.gptq_kernels"],
    )
    before = [dict(vars(namespace)) for namespace in namespaces]
    with pytest.raises(ZeroDivisionError), interpreted(TARGET, __name__):
        computed("sum", torch.bfloat16)
        raise ZeroDivisionError
    for namespace, names in zip(namespaces, before):
        assert dict(vars(namespace)) == names, namespace
    assert not triton.knobs.runtime.interpret
