"""The decode path waits for no value of the device: nothing of it could break a graph or stall the queue."""

import pytest
import torch

from ferrum_models import DecodeGraph, Qwen3MoeForCausalLM
from ferrum_models.graphs import NoHostReads
from tests.models.example import EXAMPLE

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


def without_data(**options):
    """A model of which nobody can look at a value."""
    return Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16, **options).to("meta")


@pytest.mark.parametrize(
    "layout, implementation",
    [("int4_cpu", "fused"), ("marlin", "fused"), ("marlin", "bucketed"), ("gptq", "fused"), ("dense", "fused")],
)
def test_a_step_needs_no_values(layout, implementation):
    model = without_data(layout=layout)
    model.set_moe_implementation(implementation)
    for batch, paged in ((1, True), (1, False), (40, False)):
        logits = DecodeGraph(model, batch, 32, paged=paged).forward_step(32)
        assert logits.shape == (batch, model.config.vocab_size) and logits.dtype == torch.bfloat16


def test_what_reads_values_is_found_out():
    """The oracle reads the ids: the tests above can fail."""
    model = without_data()
    model.set_moe_implementation("per_pair")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        DecodeGraph(model, 2, 32).forward_step(32)
