"""The decode path waits for no value of the device: nothing of it breaks a graph or stalls the queue."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3MoeConfig

from ferrum_models import DecodeGraph, Qwen3MoeForCausalLM
from ferrum_models.graphs import NoHostReads

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3-moe"


@pytest.fixture(scope="module")
def model():
    return Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_a_step(model, paged):
    graph = DecodeGraph(model, 2, 32, paged=paged)
    graph.start(torch.arange(1, 11).view(2, 5))
    expected = graph.forward_step(32)
    graph.start(torch.arange(1, 11).view(2, 5))
    with torch.no_grad(), NoHostReads():
        assert torch.equal(graph.forward_step(32), expected)
