"""transformers' attention interface "ferrum": `ferrum_ops.attention` where it has a kernel, torch's sdpa elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import ferrum_ops

NAME = "ferrum"
#: Where the interface is its own; on other devices it is sdpa.
KERNEL_DEVICES = tuple(device for device, by in ferrum_ops.backends()["attention"].items() if by == "kernel")


def ferrum_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """None where each query sees the keys up to its own, counted from the last: what `ferrum_attention` computes.

    That is any number of new tokens behind any number of cached ones, without padding and without the unused keys of a
    static cache. Everything else gets the mask of sdpa.
    """
    own = torch.device(device).type in KERNEL_DEVICES
    if (
        own
        and allow_is_causal_skip
        and isinstance(q_offset, int)
        and kv_offset == 0
        and q_offset + q_length == kv_length
        and (attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())))
    ):
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and not own,  # sdpa's own None means keys counted from the first
        device=device,
        **kwargs,
    )


def ferrum_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query `[B, Hq, n, D]`, key and value `[B, Hkv, kv, D]` -> `[B, n, Hq, D]`."""
    if attention_mask is not None or query.device.type not in KERNEL_DEVICES:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    lengths = torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ferrum_ops.attention(query.transpose(1, 2), key, value, lengths, scale, True, sliding_window or 0), None


AttentionInterface.register(NAME, ferrum_attention)
AttentionMaskInterface.register(NAME, ferrum_mask)
