"""transformers' `generate` for greedy decoding and sampling of one sequence per prompt: on recorded steps, or on a CPU
on steps that go straight to the forward pass, past a loop whose Python costs as much as a small layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

import ferrum_ops
from ferrum_models.qwen3_moe import decode, direct
from ferrum_models.qwen3_moe.attention import NAME
from ferrum_models.qwen3_moe.bound_model import BoundModel
from ferrum_models.qwen3_moe.decode import DecodeGraph

if TYPE_CHECKING:
    from ferrum_models.qwen3_moe.modeling import Qwen3MoeForCausalLM

#: What `generate` passes on that a DecodeGraph does itself or has no use for.
KNOWN_ARGUMENTS = {"attention_mask", "past_key_values", "position_ids", "use_cache", "logits_to_keep"}


def why_not(
    model: Qwen3MoeForCausalLM,
    input_ids: torch.Tensor,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    arguments: dict[str, Any],
) -> str | None:
    """Why this call cannot run on steps of our own, or None."""
    cache = arguments.get("past_key_values")
    others = {name for name, value in arguments.items() if value is not None} - KNOWN_ARGUMENTS
    if others:
        return f"{', '.join(sorted(others))} given"
    if generation_config.return_dict_in_generate:
        return "return_dict_in_generate asks for more than tokens"
    if model.config._attn_implementation != NAME:
        return f"the attention implementation is {model.config._attn_implementation!r}"
    if arguments.get("use_cache") is False:
        return "use_cache is False"
    if cache is not None and (
        type(cache) is not DynamicCache or cache.get_seq_length() > 0 or getattr(cache, "_is_user_defined", False)
    ):
        return "a cache was given"
    if getattr(generation_config, "prefill_chunk_size", None) is not None:
        return "the prompt is to be read in chunks"
    if model.runtime_config.moe_profile:
        return "the MoE blocks are profiled"
    if stopping_criteria.max_length is None:
        return "there is no maximum length"
    return decode.check_model(model)


def check_mode(model: Qwen3MoeForCausalLM, mode: GenerationMode) -> None:
    """Warns where recorded steps are asked for and `generate` goes a way that never comes to `steps_for`."""
    asked = model.runtime_config.cuda_graph and decode.graphs_for(model.device) is not None
    if asked and mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        decode.warn_once(model, f"the generation mode is {mode.value}")


class CachedSteps:
    """Steps on transformers' cache, on a CPU; no padding."""

    def __init__(self, model: Qwen3MoeForCausalLM, batch: int) -> None:
        self.model, self.batch = model, batch
        self._cache = DynamicCache()
        self._held, self._room = 0, 0  # tokens in the cache, and how many fit before `_bind` is needed
        self._lengths = torch.zeros(2, batch, dtype=torch.int32)  # before and after the next step
        self._bound: BoundModel | None = None

    @staticmethod
    def applies(model: Qwen3MoeForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether these prompts can be continued so: where the first forward pass goes the direct way."""
        arguments = {"use_cache": True, "logits_to_keep": 1}
        return input_ids.is_cpu and direct.applies(model, input_ids, attention_mask, None, DynamicCache(), arguments)

    @property
    def cache(self) -> DynamicCache:
        """The keys and values so far."""
        if self._bound is not None:
            for layer in self._cache.layers:
                layer.hold(self._held)
        return self._cache

    @torch.no_grad()
    def start(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Take in the prompts. Returns logits `[B, V]`."""
        out = self.model(input_ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=1)
        self._cache, self._bound = out.past_key_values, None
        self._held = self._room = input_ids.shape[1]
        self._lengths[0], self._lengths[1] = self._held, self._held + 1
        return out.logits[:, -1]

    @torch.no_grad()
    def run(self, steps: int, input_ids: torch.Tensor) -> torch.Tensor:
        """One step with these tokens, int64 `[B]`. Returns logits `[B, V]`."""
        assert steps == 1
        if self._held == self._room:
            self._bound = BoundModel.bind(self.model, self.cache, self._lengths[0])
            self._room = sys.maxsize if self._bound is None else self._bound.room
        if self._bound is None:
            positions = self._lengths[:1, :1].long()
            hidden = direct.hidden_states(self.model, input_ids[:, None], positions, self._cache, self._lengths)
            logits = self.model.lm_head(hidden[:, -1])
        else:
            logits = self._bound.forward(input_ids)
        self._held += 1
        self._lengths += 1
        return logits


def graph_of(model: Qwen3MoeForCausalLM, batch: int, length: int) -> DecodeGraph:
    """The model's DecodeGraph for a batch, kept from call to call as long as sequences fit."""
    kept = model.decode_graph
    if kept is None or kept.batch != batch or kept.capacity < length or kept.device != model.device:
        model.decode_graph = None  # its buffers are freed before others are allocated
        most = model.runtime_config.cuda_max_kv
        kept = DecodeGraph(model, batch, decode.kv_bucket(length, 2 * length) if most is None else most)
        model.decode_graph = kept
    return kept


def steps_for(
    model: Qwen3MoeForCausalLM,
    input_ids: torch.Tensor,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    arguments: dict[str, Any],
) -> DecodeGraph | CachedSteps | None:
    """What `generate` continues these prompts with: recorded steps if asked for, which warns where they cannot serve,
    or on a CPU steps on its cache; None: transformers' loop."""
    recorded = model.runtime_config.cuda_graph and decode.graphs_for(input_ids.device) is not None
    if not recorded and not input_ids.is_cpu:
        return None
    reason = why_not(model, input_ids, stopping_criteria, generation_config, arguments)
    if reason is None and synced_gpus:
        reason = "several processes generate together"
    if not recorded:
        applies = reason is None and CachedSteps.applies(model, input_ids, arguments.get("attention_mask"))
        return CachedSteps(model, input_ids.shape[0]) if applies else None
    longest, most = stopping_criteria.max_length, model.runtime_config.cuda_max_kv
    if reason is None and most is not None and longest > most:
        reason = f"max_length {longest} is above cuda_max_kv {most}"
    if reason is not None:
        decode.warn_once(model, reason)
        return None
    return graph_of(model, input_ids.shape[0], longest)


def generate(
    steps: DecodeGraph | CachedSteps,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """What transformers' `_sample` returns with these arguments."""
    eos = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
    eos_ids = [int(i) for ids in eos for i in ids.flatten().tolist()]
    pad = generation_config._pad_token_tensor
    pad_id = 0 if pad is None else int(pad)
    plain = all(isinstance(criterion, EosTokenCriteria | MaxLengthCriteria) for criterion in stopping_criteria)
    greedy = not generation_config.do_sample and len(logits_processor) == 0
    if isinstance(steps, DecodeGraph) and greedy and plain and len(eos_ids) <= decode.MOST_EOS_IDS:
        return steps.generate(
            input_ids,
            attention_mask,
            max_new_tokens=stopping_criteria.max_length - input_ids.shape[1],
            eos_token_ids=eos_ids,
            pad_token_id=pad_id,
            streamer=streamer,
        )

    def choose(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if greedy:
            return ferrum_ops.argmax_rows(logits)
        scores = logits_processor(ids, logits.to(torch.float32, copy=True))
        return torch.multinomial(scores.softmax(-1), 1)[:, 0] if generation_config.do_sample else scores.argmax(-1)

    ended = pad_id if eos_ids else None
    return _generate_on_host(steps, input_ids, choose, stopping_criteria, ended, streamer, attention_mask)


def _generate_on_host(
    steps: DecodeGraph | CachedSteps,
    input_ids: torch.Tensor,
    choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stopping_criteria: StoppingCriteriaList,
    pad_id: int | None,
    streamer: Any,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """`steps` runs the model; `choose` (of the ids so far and logits) and criteria run as they are.

    `pad_id` follows in a sequence that has ended; None: no id ends one.
    """
    logits = steps.start(input_ids, attention_mask)
    # The only question then is how long it has become, and the host knows.
    counted = all(type(criterion) is MaxLengthCriteria for criterion in stopping_criteria)
    unfinished = torch.ones(steps.batch, dtype=torch.long, device=input_ids.device)
    while True:
        chosen = choose(input_ids, logits)
        if pad_id is not None:
            chosen = chosen * unfinished + pad_id * (1 - unfinished)
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(chosen.cpu())
        if counted:
            if input_ids.shape[1] >= stopping_criteria.max_length:
                break
        else:
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            if not bool(unfinished.any()):
                break
        logits = steps.run(1, chosen)
    if streamer is not None:
        streamer.end()
    return input_ids
