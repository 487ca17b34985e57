"""Keys and values in buffers that grow, so that a new token costs its own bytes and not a copy of all before it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

import ferrum_ops
from ferrum_models import huge_pages

#: A full buffer is replaced by one half again as large, and at least this many tokens larger.
LEAST_GROWTH = 256


class GrowingLayer(DynamicLayer):
    """transformers' DynamicLayer, whose `keys` and `values` are the filled part of buffers `[B, Hkv, capacity, D]`.

    Whatever changes `keys` and `values` from outside (beam search, cropping, offloading) works as for the parent: what
    is not the front of the buffers any more is copied into new ones at the next update.
    """

    is_initialized: bool

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the parent's: `[B, Hkv, n, D]` appended, all of `[B, Hkv, kv, D]` returned."""
        lengths = torch.full((key_states.shape[0],), self.get_seq_length(), dtype=torch.int32, device=key_states.device)
        return self.append(key_states.transpose(1, 2), value_states.transpose(1, 2), lengths)

    def append(
        self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` of token-major `[B, n, Hkv, D]`; lengths int32 `[B]`, each what the layer holds."""
        keys, values = self.room_for(key.shape[0], key.shape[1], key.shape[2], key.shape[3], key)
        ferrum_ops.kv_append_(keys, values, key, value, lengths)
        return self.hold(self.get_seq_length() + key.shape[1])

    def room_for(
        self, batch: int, tokens: int, heads: int, head_dim: int, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, with room for that many new tokens behind those held."""
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        length = self.get_seq_length() + tokens
        if self._buffers is None or not self._fits(batch, length):
            self._buffers = self._grown((batch, heads, length + max(length // 2, LEAST_GROWTH), head_dim), like)
        return self._buffers

    def hold(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the first `length` tokens of the buffers as held."""
        assert self._buffers is not None
        keys, values = self._buffers
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values

    def _fits(self, batch: int, length: int) -> bool:
        """Whether what is held lies at the front of the buffers and `length` tokens have room in them."""
        assert self._buffers is not None and self.keys is not None and self.values is not None
        keys, values = self._buffers
        in_place = (
            self.keys.data_ptr() == keys.data_ptr()
            and self.values.data_ptr() == values.data_ptr()
            and (self.keys.numel() == 0 or self.keys.stride() == keys.stride())
        )
        return in_place and length <= keys.shape[2] and keys.shape[0] == batch

    def _grown(self, shape: tuple[int, ...], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Larger buffers with what is held at their front."""
        if like.device.type == "cpu" and not torch.compiler.is_compiling():
            keys, values = (huge_pages.empty(shape, like.dtype) for _ in range(2))
        else:
            keys, values = (like.new_empty(shape) for _ in range(2))
        if held := self.get_seq_length():
            keys[:, :, :held], values[:, :, :held] = self.keys, self.values
        return keys, values

    def reset(self) -> None:
        self._buffers = self.keys = self.values = None
        self.is_initialized = False


def let_grow(cache: Cache) -> None:
    """Give a DynamicCache that holds nothing yet layers of growing buffers; others stay as they are."""
    if type(cache) is not DynamicCache or cache.offloading or torch.compiler.is_compiling():
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = GrowingLayer()
