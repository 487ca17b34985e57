"""The example checkpoint, prompts for it, and transformers' own path through a model of it."""

from contextlib import contextmanager
from pathlib import Path

import torch

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
