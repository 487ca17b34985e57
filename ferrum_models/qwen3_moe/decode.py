"""Decoding one token after another with a whole step recorded: the next token never leaves the device.

    graph = DecodeGraph(model, batch=2, capacity=4096)
    tokens = graph.generate(input_ids, max_new_tokens=64)

`model.generate` uses it where `RuntimeConfig(cuda_graph=True)` asks for it (generation.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import ferrum_ops
from ferrum_models.graphs import CudaGraphs, Graphs, StepRunner
from ferrum_models.qwen3_moe import direct
from ferrum_models.qwen3_moe.step_cache import ContiguousCache, PagedCache, StepCache
from ferrum_ops.config import RuntimeConfig

if TYPE_CHECKING:
    from ferrum_models.qwen3_moe.modeling import Qwen3MoeForCausalLM

#: Attention is planned for this many keys, or twice as many, and so on: a recording serves lengths up to its number.
LEAST_BUCKET = 256
#: Ids that may end a sequence.
MOST_EOS_IDS = 16
#: Steps between two looks at whether all sequences have ended; the tokens behind an end are dropped.
STEPS_BETWEEN_LOOKS = 16


def kv_bucket(length: int, capacity: int) -> int:
    """The number of keys that attention is planned for when the longest sequence has `length`."""
    bucket = LEAST_BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, capacity)


def graphs_for(device: torch.device) -> Graphs | None:
    """What records steps on this device; None where there is nothing that could."""
    return CudaGraphs(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class GraphKey:
    """Everything that a recording of a step has fixed, apart from addresses."""

    batch: int
    kv_bucket: int
    cache: str
    dtype: torch.dtype
    device: torch.device
    runtime_config: RuntimeConfig
    layers: tuple[str, ...]  # implementation, layouts and settings of each one's modules


def check_model(model: Qwen3MoeForCausalLM) -> str | None:
    """Why steps of this model cannot be run by a DecodeGraph, or None."""
    if model.config.sliding_window is not None:
        return "the model has a sliding window"
    if direct.is_spread(model):
        return "the model is spread over several devices"
    if direct.is_hooked(model):
        return "a hook watches the model's modules"
    return None


class DecodeGraph:
    """Greedy decoding of B sequences, one launch per token.

    A step embeds the tokens in `ids`, runs the model, appends keys and values at `lengths[0]`, chooses the next tokens
    and writes them into `ids` and `history`; all of that is recorded, so that the host only says "again". A recording
    is made when a key is first met (`GraphKey`); all are dropped when a buffer of the model or of this object has
    moved. Where a capture fails a warning says why, `fallback` keeps saying it, and steps run as they are.

    Attributes:
        ids: int64 `[B]`, the tokens that the next step is fed.
        lengths: int32 `[2, B]`, tokens of each sequence in the cache before and after the last step; row 0 counts.
        history: int64 `[B, capacity + 1]`, the token at each position, from the last one of the prompt's successors on.
        finished: bool `[B]`, sequences that have met an end; they go on with `pad_token_id`.
        cache: the keys and values. With `paged=True` its `block_tables` may be written to between steps.
    """

    def __init__(
        self,
        model: Qwen3MoeForCausalLM,
        batch: int,
        capacity: int,
        *,
        paged: bool = False,
        graphs: Graphs | None = None,
    ) -> None:
        """
        Args:
            model: on one device, its modules without hooks.
            batch: B.
            capacity: the most tokens a sequence can hold, prompt included.
            paged: pages of `runtime_config.paged_block_size` tokens, int8 with `kv_dtype="int8"`.
            graphs: what records steps; None takes the device's own, and without one steps run as they are.

        Raises:
            ValueError: a batch or capacity below 1, or a model that `check_model` says no to.
        """
        for name, value in (("batch", batch), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"[DecodeGraph] {name}: expected at least 1, got {value}")
        if (reason := check_model(model)) is not None:
            raise ValueError(f"[DecodeGraph] model: expected one that steps can be recorded of, but {reason}")
        self.model, self.batch = model, batch
        weight = model.model.norm.weight  # a packed embedding has none
        self.dtype, self.device = weight.dtype, weight.device
        self.cache = self._make_cache(capacity, paged)
        self.capacity = self.cache.capacity

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.ids, self.history = integers(batch), integers(batch, self.capacity + 1)
        self.lengths = integers(2, batch, dtype=torch.int32)
        self.finished = integers(batch, dtype=torch.bool)
        self.eos_ids, self.pad_id = integers(MOST_EOS_IDS).fill_(-1), integers()
        self.runner = StepRunner("DecodeGraph", graphs_for(self.device) if graphs is None else graphs)
        self._longest = 0  # tokens of the longest sequence: what the host knows of `lengths`
        self._prompt = integers(batch)

    def _make_cache(self, capacity: int, paged: bool) -> StepCache:
        config, knobs = self.model.config, self.model.runtime_config
        attention: Any = self.model.model.layers[0].self_attn
        sizes = (config.num_hidden_layers, self.batch, capacity, attention.num_kv_heads, attention.head_dim)
        if not paged:
            return ContiguousCache.allocate(*sizes, self.dtype, self.device)
        return PagedCache(*sizes, self.dtype, self.device, knobs.paged_block_size, knobs.kv_dtype == "int8")

    @property
    def fallback(self) -> str | None:
        """Why steps run without a graph, or None: the last capture's error, or that nothing records here."""
        if self.runner.graphs is None:
            return f"nothing records steps on {self.device.type}"
        return next(reversed(self.runner.failures.values()), None)

    def key(self) -> GraphKey:
        """Of the next step."""
        layers = tuple(_described(layer) for layer in self.model.model.layers)
        fixed = (self.cache.description, self.dtype, self.device, self.model.runtime_config, layers)
        return GraphKey(self.batch, self._next_bucket(), *fixed)

    def _next_bucket(self) -> int:
        if self._longest >= self.capacity:
            raise ValueError(f"[DecodeGraph] capacity: expected room for one more token, but {self.capacity} are held")
        return kv_bucket(self._longest + 1, self.capacity)

    def _buffers(self) -> list[torch.Tensor]:
        own = [self.ids, self.lengths, self.history, self.finished, self.eos_ids, self.pad_id]
        return [*own, *self.cache.buffers(), *self.model.parameters(), *self.model.buffers()]

    @torch.no_grad()
    def start(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        pad_token_id: int = 0,
    ) -> torch.Tensor:
        """Take in the prompts and choose the first tokens. Returns the logits `[B, V]` they were chosen from.

        Args:
            input_ids: int64 `[B, n]`.
            attention_mask: `[B, n]`, 0 for padding, which must be on the left; None: there is none.
            eos_token_ids: at most MOST_EOS_IDS ids after which a sequence has ended.
            pad_token_id: what follows an end.
        """
        starts = self._check_prompt(input_ids, attention_mask)
        eos = list(eos_token_ids)
        if len(eos) > MOST_EOS_IDS:
            raise ValueError(f"[DecodeGraph] eos_token_ids: expected at most {MOST_EOS_IDS}, got {len(eos)}")
        self.eos_ids.copy_(torch.tensor(eos + [-1] * (MOST_EOS_IDS - len(eos))))
        self.pad_id.fill_(pad_token_id)
        self.finished.zero_()
        mask = attention_mask if any(starts) else None
        out = self.model(
            input_ids,
            attention_mask=mask,
            position_ids=None if mask is None else (mask.long().cumsum(-1) - 1).clamp_min(0),
            use_cache=True,
            logits_to_keep=1,
        )
        for index, layer in enumerate(out.past_key_values.layers):
            self.cache.fill(index, layer.keys, layer.values, starts)
            layer.reset()  # held twice for one layer at a time only
        self._longest = input_ids.shape[1]
        self._prompt.copy_(torch.tensor([self._longest - start for start in starts]))
        self.lengths.copy_(self._prompt.expand(2, -1))
        logits = out.logits[:, -1]
        self._choose(logits)
        return logits

    def _check_prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[int]:
        """Where each sequence starts behind its padding."""
        if input_ids.dim() != 2 or input_ids.shape[0] != self.batch or not 1 <= input_ids.shape[1] <= self.capacity:
            expected = f"({self.batch}, 1 to {self.capacity})"
            raise ValueError(f"[DecodeGraph] input_ids: expected shape {expected}, got {tuple(input_ids.shape)}")
        if attention_mask is None:
            return [0] * self.batch
        if attention_mask.shape != input_ids.shape:
            shape = tuple(attention_mask.shape)
            raise ValueError(f"[DecodeGraph] attention_mask: expected shape {tuple(input_ids.shape)}, got {shape}")
        kept = attention_mask.bool()
        starts: list[int] = (~kept).sum(-1).tolist()
        left = torch.arange(kept.shape[1]) >= torch.tensor(starts)[:, None]
        if not torch.equal(kept.cpu(), left) or max(starts) == kept.shape[1]:
            raise ValueError("[DecodeGraph] attention_mask: expected padding on the left of at least one token only")
        return starts

    def _choose(self, logits: torch.Tensor) -> None:
        """The greedy next tokens to where the next step and the caller find them."""
        chosen = torch.where(self.finished, self.pad_id, ferrum_ops.argmax_rows(logits))
        self.finished.logical_or_((chosen[:, None] == self.eos_ids).any(-1))
        self.ids.copy_(chosen)
        self.history.scatter_(1, self.lengths[1].long()[:, None], chosen[:, None])

    def forward_step(self, bucket: int) -> torch.Tensor:
        """What is recorded: logits `[B, V]` of the tokens in `ids`, and the changes to this object's buffers."""
        torch.add(self.lengths[0], 1, out=self.lengths[1])
        self.cache.begin(self.lengths, bucket)
        positions = self.lengths[0].long()[:, None]
        hidden = direct.hidden_states(self.model, self.ids[:, None], positions, self.cache, self.lengths)
        logits = self.model.lm_head(hidden[:, -1])
        self._choose(logits)
        self.lengths[0].copy_(self.lengths[1])
        return logits

    @torch.no_grad()
    def run(self, steps: int, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """That many steps after `start`. Returns the last one's logits `[B, V]`, valid until the next step.

        `input_ids` int64 `[B]` are fed to the first step in place of the greedy choice.

        Whether the model's tensors or settings have changed is looked up once per call.
        """
        if self._longest == 0 or steps < 1:
            raise ValueError(f"[DecodeGraph] steps: expected at least 1 after start(), got {steps}")
        if input_ids is not None:
            self.ids.copy_(input_ids)
            self.history.scatter_(1, self.lengths[0].long()[:, None], self.ids[:, None])
        return self._run(self._checked_key(), steps)

    def _checked_key(self) -> GraphKey:
        """The next step's key, with recordings of other buffers dropped. Takes longer than a step's launch."""
        self.runner.check(self._buffers())
        return self.key()

    def _run(self, key: GraphKey, steps: int) -> torch.Tensor:
        changed = (self.ids, self.lengths, self.history, self.finished)
        for _ in range(steps):
            bucket = self._next_bucket()
            if bucket != key.kv_bucket:
                key = replace(key, kv_bucket=bucket)
            logits = self.runner.run(key, partial(self.forward_step, bucket), changed)
            self._longest += 1
        return logits

    def tokens(self, count: int) -> torch.Tensor:
        """int64 `[B, count]`: the first tokens behind each prompt."""
        return self.history.gather(1, self._prompt[:, None] + torch.arange(count, device=self.device))

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int = 0,
        streamer: Any = None,
    ) -> torch.Tensor:
        """The prompts and up to `max_new_tokens` greedy tokens, int64 `[B, n + new]`, as transformers' generate.

        Ends when every sequence has. A streamer is given each token, which costs a wait for the device at each.
        """
        self.start(input_ids, attention_mask, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id)
        made, looks = 1, 1 if streamer is not None else STEPS_BETWEEN_LOOKS
        key = self._checked_key() if max_new_tokens > 1 else None
        while True:
            if streamer is not None:
                streamer.put(self.ids.to("cpu", copy=True))  # the next step overwrites it
            if made >= max_new_tokens or (eos_token_ids and bool(self.finished.all())):
                break
            steps = min(looks if eos_token_ids or streamer is not None else max_new_tokens, max_new_tokens - made)
            assert key is not None
            self._run(key, steps)
            made += steps
        if streamer is not None:
            streamer.end()
        new = self.tokens(made)
        if eos_token_ids:
            ended = torch.isin(new, self.eos_ids).int()
            lengths = torch.where(ended.any(-1), ended.argmax(-1) + 1, made)
            new = new[:, : int(lengths.max())]
        return torch.cat([input_ids, new], dim=1)


def _described(layer: Any) -> str:
    """Implementation, layouts and settings of a decoder layer's modules."""
    mlp, attention = layer.mlp, layer.self_attn
    parts = [getattr(mlp, "implementation", "dense")]
    experts = getattr(mlp, "experts", None)
    if experts is not None:
        parts.append(experts.weights.spec())
    for linear in (attention.qkv_proj, attention.o_proj):
        parts += [type(linear).__name__, str(getattr(linear, "layout", "")), str(getattr(linear, "activation", ""))]
    return " ".join(parts)


def warn_once(model: Qwen3MoeForCausalLM, reason: str) -> None:
    """Say once per model and reason that `generate` goes on without a graph."""
    said: set[str] = model.__dict__.setdefault("_graph_reasons", set())
    if reason not in said:
        said.add(reason)
        warnings.warn(f"[generate] cuda_graph: not used: {reason}", stacklevel=3)
