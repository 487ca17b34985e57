"""Tensors on two devices raise by name, and nothing is kept between calls. (The meta device stands for a second one.)"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.timing import torch_op


def tensor_indices(args):
    return [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]


def to_meta(argument):
    if isinstance(argument, list):
        return [to_meta(a) for a in argument]
    return argument.to("meta") if isinstance(argument, torch.Tensor) else argument


def sample_with_most_tensors(op):
    return max(op.inputs("cpu", torch.float32), key=lambda args: len(tensor_indices(args)))


@pytest.mark.parametrize("name", sorted(ferrum_ops.OPS))
def test_a_tensor_on_another_device_is_named(name):
    args = sample_with_most_tensors(ferrum_ops.OPS[name])
    indices = tensor_indices(args)
    arguments = torch_op(name)._schema.arguments
    for moved in indices[1:]:
        elsewhere = [a.to("meta") if i == moved else a for i, a in enumerate(args)]
        message = rf"\[{name.partition('.')[0]}\] {arguments[moved].name}: expected a tensor on cpu, got meta"
        with pytest.raises(RuntimeError, match=message):
            torch_op(name)(*elsewhere)
    if len(indices) > 1:
        others = [a.to("meta") if i == indices[0] else a for i, a in enumerate(args)]
        with pytest.raises(RuntimeError, match=r"expected a tensor on meta, got cpu"):
            torch_op(name)(*others)


def test_a_tensor_of_a_list_on_another_device_is_named():
    x, blocks, types, bias, activation = sample_with_most_tensors(ferrum_ops.OPS["gguf_linear"])
    blocks = [blocks[0], *(b.to("meta") for b in blocks[1:])]
    assert len(blocks) > 1
    with pytest.raises(RuntimeError, match=r"\[gguf_linear\] blocks: expected a tensor on cpu, got meta"):
        torch_op("gguf_linear")(x, blocks, types, bias, activation)


@pytest.mark.parametrize("name", sorted(ferrum_ops.OPS))
def test_meta_tensors_alone_give_meta_tensors(name):
    args = [to_meta(a) for a in sample_with_most_tensors(ferrum_ops.OPS[name])]
    result = torch_op(name)(*args)
    outputs = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    assert all(o.device.type == "meta" for o in outputs)


def test_calls_from_several_threads_do_not_meet():
    """Every op at once from four threads, each in another order: the bits of one thread alone."""
    names = sorted(ferrum_ops.OPS)
    samples = {}
    for name in names:
        torch.manual_seed(0)
        samples[name] = [args for args, _ in zip(ferrum_ops.OPS[name].inputs("cpu", torch.float32), range(2))]

    def run(order):
        results = {}
        for name in order:
            arguments = torch_op(name)._schema.arguments
            for args in samples[name]:
                args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
                result = torch_op(name)(*args)
                outputs = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
                written = [a for a, s in zip(args, arguments) if s.alias_info is not None and s.alias_info.is_write]
                results.setdefault(name, []).extend([*outputs, *written])
        return results

    expected = run(names)
    orders = [names[k:] + names[:k] for k in range(0, len(names), max(1, len(names) // 4))][:4]
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(run, orders):
            for name in names:
                for g, e in zip(got[name], expected[name], strict=True):
                    assert torch.equal(g.nan_to_num(), e.nan_to_num()), name


@pytest.mark.skipif(sys.platform != "linux", reason="there is no CUDA")
def test_the_library_asks_for_libtorch():
    """Through it the loader finds libtorch_cuda.so, which has the current stream: without, no CUDA op would run."""
    assert b"\0libtorch.so\0" in Path(ferrum_ops.__file__).with_name("_C.abi3.so").read_bytes()
