"""What every Triton kernel must satisfy, driven by the registry: its launcher, interpreted on CPU tensors, equals the
reference on float64 inputs, and asks for nothing that the compile gate does not know."""

import importlib
import subprocess
import sys

import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance
from ferrum_ops.triton import KERNELS
from tests.ops.test_every_op import cases, copy_args, outputs, to_float64

pytest.importorskip("triton")

EASIER = (torch.float32, torch.float16)  # than bfloat16, for the interpreter


@pytest.mark.parametrize("op, dtype, args", list(cases(slow_dtypes=EASIER, names=KERNELS)))
def test_kernel_equals_reference(op, dtype, args, interpreter):
    name, module = op.name, importlib.import_module(KERNELS[op.name])
    listed = {str(binary) for binary in module.binaries(90)}
    with interpreter() as asked:
        got = outputs(op, getattr(module, name), copy_args(args))
    expected = outputs(op, op.ref, copy_args(args, to_float64))
    meta = outputs(op, op.fake, copy_args(args)) if op.fake else got
    assert set(asked) <= listed
    assert len(got) == len(expected)
    for g, e, m in zip(got, expected, meta):
        assert_close(name, g, e, tolerance(name, dtype))
        assert g.dtype == m.dtype and g.stride() == m.stride()


@pytest.mark.parametrize("name", KERNELS)
def test_cuda_tensors_are_served_by_the_kernel(name):
    assert ferrum_ops.backends()[name]["cuda"] == "kernel"


def test_triton_is_imported_by_the_first_call_only():
    program = "import sys, ferrum_ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_without_triton_the_reference_serves():
    program = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import ferrum_ops
assert {ferrum_ops.backends()[name]["cuda"] for name in ferrum_ops.triton.KERNELS} == {"reference"}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
