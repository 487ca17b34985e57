"""Every op on the device: equal to its float64 reference, the same bits again, opcheck, and replayed from a graph."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance
from ferrum_ops.testing.timing import torch_op
from tests.emulation.test_every_kernel import bits, has_kernel
from tests.ops.test_every_op import CHECKS, DTYPES, TRACING, cases, copy_args, outputs, to_float64

WITH_KERNEL = {name for name, devices in ferrum_ops.backends().items() if devices["cuda"] == "kernel"}


def kernel_cases(**kwargs):
    return [case for case in cases(names=sorted(WITH_KERNEL), **kwargs) if has_kernel(*case.values[:2], WITH_KERNEL)]


def on(device, args):
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in copy_args(args))


def strided_on(device, args):
    """As `on`, with the strides of views kept."""

    def move(t):
        storage = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype)
        storage.untyped_storage().copy_(t.untyped_storage())
        return storage.to(device).as_strided(t.size(), t.stride(), t.storage_offset())

    return tuple(move(a) if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.parametrize("op, dtype, args", kernel_cases())
def test_kernel_equals_reference(cuda, op, dtype, args):
    first, again = strided_on(cuda, args), strided_on(cuda, args)
    got, repeated = outputs(op, torch_op(op.name), first), outputs(op, torch_op(op.name), again)
    expected = outputs(op, op.ref, copy_args(args, to_float64))
    assert len(got) == len(expected)
    for g, r, e in zip(got, repeated, expected):
        assert g.is_cuda and torch.equal(bits(g), bits(r))
        assert_close(op.name, g.cpu(), e, tolerance(op.name, dtype))


@pytest.mark.parametrize("op, dtype, args", kernel_cases(slow_dtypes=(torch.float16, torch.bfloat16)))
def test_opcheck(cuda, op, dtype, args):
    torch.library.opcheck(torch_op(op.name), on(cuda, args), test_utils=CHECKS)


@pytest.mark.parametrize("op, dtype, args", kernel_cases(dtypes=DTYPES[1:2]))
def test_opcheck_tracing(cuda, op, dtype, args):
    torch.library.opcheck(torch_op(op.name), on(cuda, args), test_utils=TRACING)


@pytest.mark.parametrize("name", sorted(WITH_KERNEL))
def test_a_captured_op_replays_on_changed_inputs(cuda, name):
    """Capture allocates and launches but never waits; the replay reads what the buffers then hold."""
    op = ferrum_ops.OPS[name]
    torch.manual_seed(1)
    samples = [args for args in op.inputs("cpu", torch.bfloat16) if any_elements(args)]
    torch.manual_seed(2)
    others = [args for args in op.inputs("cpu", torch.bfloat16) if any_elements(args)]
    for sample, other in zip(samples, others):
        buffers = strided_on(cuda, sample)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch_op(name)(*buffers)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs(op, torch_op(name), buffers)
        for buffer, value in zip(buffers, other):
            if isinstance(buffer, torch.Tensor) and buffer.untyped_storage().nbytes():
                buffer.untyped_storage().copy_(value.untyped_storage())
        eager = outputs(op, torch_op(name), strided_on(cuda, other))
        graph.replay()
        torch.cuda.synchronize()
        for c, e in zip(captured, eager):
            assert torch.equal(c, e) or torch.equal(c.nan_to_num(), e.nan_to_num())


def any_elements(args):
    return all(a.numel() > 0 for a in args if isinstance(a, torch.Tensor))


def test_the_current_stream_is_used(cuda):
    x, weight = torch.randn(64, 2048, device=cuda), torch.ones(2048, device=cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the op must queue behind this
        x.mul_(3)
        out = ferrum_ops.rms_norm(x, weight)
    stream.synchronize()
    assert_close("rms_norm", out.cpu(), ferrum_ops.OPS["rms_norm"].ref(x.double().cpu(), weight.double().cpu(), 1e-6))


def test_a_tensor_left_on_the_cpu_is_named(cuda):
    with pytest.raises(RuntimeError, match=r"\[rms_norm\] weight: expected a tensor on"):
        ferrum_ops.rms_norm(torch.randn(2, 64, device=cuda), torch.ones(64))
