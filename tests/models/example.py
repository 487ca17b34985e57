"""The example checkpoint, prompts for it, transformers' own path through a model, and generate's beside it."""

from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import DynamicCache

from ferrum_models.qwen3_moe.generation import CachedSteps

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3-moe"


def ids(batch, length):
    return torch.randint(1, 2000, (batch, length), generator=torch.Generator().manual_seed(length))


@contextmanager
def hooked(model):
    """A hook anywhere asks for transformers' path, of the forward pass and of `generate`."""
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def assert_steps_are_forward(model, prompts: torch.Tensor, tokens: torch.Tensor) -> CachedSteps:
    """Steps of generate's loop have the logits, keys and values of forward; returns the steps."""
    steps, cache = CachedSteps(model, prompts.shape[0]), DynamicCache()
    logits = [steps.start(prompts, None)]
    expected = [model(prompts, past_key_values=cache).logits[:, -1]]
    for token in tokens.unbind(1):
        logits.append(steps.run(1, token))
        expected.append(model(token[:, None], past_key_values=cache).logits[:, -1])
    assert all(torch.equal(a, b) for a, b in zip(logits, expected))
    for own, other in zip(steps.cache.layers, cache.layers):
        assert torch.equal(own.keys, other.keys) and torch.equal(own.values, other.values)
    return steps
