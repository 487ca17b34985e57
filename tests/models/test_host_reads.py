"""The decode path waits for no value of the device: nothing of it could break a graph or stall the queue."""

from pathlib import Path

import pytest
import torch

from ferrum_models import DecodeGraph, Qwen3MoeForCausalLM
from ferrum_models.graphs import NoHostReads
from tests.models.make_checkpoint import tiny_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3-moe"
PAGED = pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])


@PAGED
def test_a_step_calls_no_operator_that_reads(paged):
    model = Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16)
    graph = DecodeGraph(model, 2, 32, paged=paged)
    logits = []
    for guard in (torch.no_grad(), NoHostReads()):
        graph.start(torch.arange(1, 11).view(2, 5))
        with guard:
            logits.append(graph.forward_step(32))
    assert torch.equal(*logits)


@pytest.fixture
def model_without_data():
    """Whatever looks at a value of it raises."""
    return Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16).to("meta")


@PAGED
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_needs_no_values(model_without_data, paged, batch):
    model = model_without_data
    logits = DecodeGraph(model, batch, 32, paged=paged).forward_step(32)
    assert logits.shape == (batch, model.config.vocab_size) and logits.dtype == torch.bfloat16


def test_a_step_of_a_dense_model_needs_no_values():
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(tiny_config(hidden_size=64, moe_intermediate_size=64)).bfloat16()
    assert DecodeGraph(model, 2, 32).forward_step(32).shape == (2, 96)


def test_what_reads_values_is_found_out(model_without_data):
    """The oracle reads the ids: the tests above can fail."""
    model_without_data.set_moe_implementation("per_pair")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        DecodeGraph(model_without_data, 2, 32).forward_step(32)
