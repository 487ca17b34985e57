"""Keys and values in buffers that never move, for steps that are recorded: contiguous, or in pages.

How many keys a sequence holds is known on the device only (`lengths`), so that the same launches serve every step. The
host knows a bound on it, `bucket`, from which the attention kernel plans its work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

import ferrum_ops
from ferrum_models import huge_pages


class StepCache(ABC):
    """B sequences of up to `capacity` tokens in each of the layers."""

    batch: int
    capacity: int

    @property
    @abstractmethod
    def description(self) -> str:
        """What of it changes a launch."""

    @abstractmethod
    def buffers(self) -> list[torch.Tensor]:
        """Every tensor that a recording reads or writes."""

    @abstractmethod
    def begin(self, lengths: torch.Tensor, bucket: int) -> None:
        """Start a step: lengths int32 `[2, B]`, tokens of each sequence before and after it, at most `bucket`."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Sequence[torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        """Append a token's key and value `[B, 1, Hkv, D]` and attend: query `[B, 1, Hq, D]` -> `[B, 1, Hq, D]`."""

    @abstractmethod
    def fill(self, layer: int, keys: torch.Tensor, values: torch.Tensor, starts: Sequence[int]) -> None:
        """Hold the tokens from `starts[b]` on of keys and values `[B, Hkv, n, D]`, and nothing else."""


class ContiguousCache(StepCache):
    """Keys and values `[B, Hkv, capacity, D]`, one of each per layer."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys, self.values = keys, values
        self.batch, _, self.capacity, _ = keys[0].shape
        self._bucket = self.capacity

    @classmethod
    def allocate(
        cls,
        layers: int,
        batch: int,
        capacity: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> ContiguousCache:
        shape = (batch, heads, capacity, head_dim)
        # Zeros: rows behind a length are read in whole tiles, and no garbage may come of that.
        keys, values = ([huge_pages.zeros(shape, dtype, device) for _ in range(layers)] for _ in range(2))
        return cls(keys, values)

    @property
    def description(self) -> str:
        return "contiguous"

    def buffers(self) -> list[torch.Tensor]:
        return [*self.keys, *self.values]

    def begin(self, lengths: torch.Tensor, bucket: int) -> None:
        self._bucket = bucket

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Sequence[torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        keys, values, bucket = self.keys[layer], self.values[layer], self._bucket
        ferrum_ops.kv_append_(keys, values, key, value, lengths[0])
        return ferrum_ops.attention(query, keys[:, :, :bucket], values[:, :, :bucket], lengths[1], scale)

    def fill(self, layer: int, keys: torch.Tensor, values: torch.Tensor, starts: Sequence[int]) -> None:
        tokens = keys.shape[2]
        for buffer, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if not any(starts):
                buffer[:, :, :tokens] = new
                continue
            for row, start in enumerate(starts):
                buffer[row, :, : tokens - start] = new[row, :, start:]


class PagedCache(StepCache):
    """A pool of pages for each layer, `[pages, page_size, Hkv, D]`, of the activations' dtype or int8 with scales.

    `block_tables` int32 `[B, pages of a sequence]`, at first in order. Whoever shares pages between sequences or hands
    them out anew writes into it; a recording reads it at every replay.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        capacity: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int,
        int8: bool,
    ) -> None:
        per_sequence = -(-capacity // page_size)
        self.batch, self.capacity, self.page_size, self.int8 = batch, per_sequence * page_size, page_size, int8
        shape = (batch * per_sequence, page_size, heads, head_dim)

        def pools(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
            return [huge_pages.zeros(shape, dtype, device) for _ in range(layers)]

        pool_dtype = torch.int8 if int8 else dtype
        self.keys, self.values = pools(shape, pool_dtype), pools(shape, pool_dtype)
        self.key_scales, self.value_scales = (pools(shape[:3], torch.float32) if int8 else [] for _ in range(2))
        self.block_tables = torch.arange(shape[0], dtype=torch.int32, device=device).view(batch, per_sequence)
        self._starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self._tables, self._slots = self.block_tables, torch.empty(0)

    @property
    def description(self) -> str:
        return f"pages of {self.page_size}, {'int8' if self.int8 else 'not quantised'}"

    def buffers(self) -> list[torch.Tensor]:
        scales = [*self.key_scales, *self.value_scales]
        return [*self.keys, *self.values, *scales, self.block_tables, self._starts]

    def begin(self, lengths: torch.Tensor, bucket: int) -> None:
        # The same for all layers, so computed once.
        self._tables = self.block_tables[:, : -(-bucket // self.page_size)].contiguous()
        self._slots = self.slots(lengths[0].long()[:, None])[:, 0]

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Rows of the pools, int64 `[B, n]`, that hold these positions of every sequence."""
        pages = self.block_tables.gather(1, positions // self.page_size).long()
        return pages * self.page_size + positions % self.page_size

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Sequence[torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        self._write(layer, key.flatten(0, 1), value.flatten(0, 1), self._slots)
        scales = (self.key_scales[layer], self.value_scales[layer]) if self.int8 else (None, None)
        caches = (self.keys[layer], self.values[layer])
        where = (self._tables, self._starts, lengths[1])
        out = ferrum_ops.paged_attention(query.flatten(0, 1), *caches, *where, scale, True, 0, *scales)
        return out.view_as(query)

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        pools = (self.keys[layer], self.values[layer])
        if self.int8:
            scales = (self.key_scales[layer], self.value_scales[layer])
            ferrum_ops.paged_kv_write_int8_(*pools, *scales, key, value, slots)
        else:
            ferrum_ops.paged_kv_write_(*pools, key, value, slots)

    def fill(self, layer: int, keys: torch.Tensor, values: torch.Tensor, starts: Sequence[int]) -> None:
        tokens = keys.shape[2]
        first = torch.tensor(list(starts), device=keys.device)[:, None]
        positions = torch.arange(tokens, device=keys.device) - first
        slots = torch.where(positions >= 0, self.slots(positions.clamp_min(0)), -1)  # -1: padding, written nowhere
        key, value = (t.transpose(1, 2).flatten(0, 1) for t in (keys, values))
        self._write(layer, key, value, slots.flatten())
