"""Launches that overlap the one before them read nothing before it is written: without a look by the host in between."""

import pytest
import torch

from benchmarks.gpu_moe import random_inputs, random_layer
from benchmarks.peers.interface import MoeShape
from ferrum_models.graphs import CudaGraphs

BLOCK = MoeShape(hidden=1024, width=512, experts=32, top_k=8)
ROUNDS = 5


@pytest.fixture
def steps(cuda):
    """`steps(tokens)`: layers, inputs, and what each gives when nothing runs beside it."""

    def make(tokens):
        layers, inputs, expected = [random_layer(BLOCK, "cuda") for _ in range(10)], [], []
        for layer in layers:
            inputs.append(random_inputs(BLOCK, tokens, "cuda"))
            torch.cuda.synchronize()
            expected.append(layer.fused(*inputs[-1]))
            torch.cuda.synchronize()
        return layers, inputs, expected

    return make


def weights_of(layer):
    return layer.w13, layer.w13_scales, layer.w2, layer.w2_scales


def overwrite(layer, inputs, new_layer, new_inputs):
    """By kernels, behind which the layer's start at once."""
    for to, new in zip((*weights_of(layer), *inputs), (*weights_of(new_layer), *new_inputs)):
        torch.add(new, 0, out=to)  # a kernel, where a copy need not be one


@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_eager(steps, tokens):
    layers, inputs, expected = steps(tokens)
    layer, place = random_layer(BLOCK, "cuda"), tuple(torch.empty_like(t) for t in inputs[0])
    outs = []
    for _ in range(ROUNDS):
        for new_layer, new_inputs in zip(layers, inputs):
            overwrite(layer, place, new_layer, new_inputs)
            outs.append(layer.fused(*place))
    assert all(torch.equal(out, expected[i % len(expected)]) for i, out in enumerate(outs))
    assert not layer.workspace.any()


@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_in_a_graph(steps, cuda, tokens):
    """Layers in one recording, so that they overlap, and the kernels that write their inputs in it too."""
    layers, inputs, expected = steps(tokens)
    place = tuple(torch.empty_like(t) for t in inputs[0])

    def every_layer():
        outs = []
        for layer, new in zip(layers, inputs):
            for to, t in zip(place, new):
                torch.add(t, 0, out=to)
            outs.append(layer.fused(*place))
        return torch.stack(outs)

    every_layer()
    replay, result = CudaGraphs(cuda).capture(every_layer)
    for _ in range(ROUNDS):
        result.zero_()
        replay()
        assert torch.equal(result, torch.stack(expected))
