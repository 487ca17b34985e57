"""Whole models behind one interface: the same checkpoint in Ferrum, llama.cpp and transformers, greedy decoding."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import Qwen3MoeForCausalLM as HfQwen3MoeForCausalLM
from transformers.generation.streamers import BaseStreamer

from examples.demo import dense_twin
from ferrum_models import Qwen3MoeForCausalLM

#: Tokens that llama.cpp works on at once, and its context per sequence.
UBATCH, CONTEXT = 512, 1024


class Model(Protocol):
    def generate(self, ids: torch.Tensor, tokens: int) -> list[float]:
        """int64 `[B, T]`, without padding, continued greedily by `tokens` each: the clock after every one of them."""

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 `[1, T]` -> float32 `[V]`, of what follows the last token."""


class Clock(BaseStreamer):
    """What `generate` hands its tokens to, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class TorchModel:
    """Ferrum's and transformers' `generate`."""

    def __init__(self, model: Any, **generation: Any) -> None:
        self.model, self.generation = model, generation

    def generate(self, ids: torch.Tensor, tokens: int) -> list[float]:
        clock = Clock()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
            **self.generation,
        )
        return clock.times[1:]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, logits_to_keep=1).logits[0, -1].float()


class LlamaCppModel:
    """llama.cpp's C interface: one batch for the prompts, then one per step with a token of every sequence."""

    def __init__(self, path: Path, repack: bool) -> None:
        import llama_cpp

        self.lib = llama_cpp
        _silence()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp: cannot load {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.sequences = 0

    def start(self, sequences: int) -> None:
        """A context without tokens for so many sequences."""
        lib = self.lib
        if sequences != self.sequences:
            if self.context:
                lib.llama_free(self.context)
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = CONTEXT * sequences, sequences
            params.n_batch, params.n_ubatch = CONTEXT * sequences, UBATCH
            params.n_threads = params.n_threads_batch = torch.get_num_threads()
            self.context = lib.llama_init_from_model(self.model, params)
            self.sequences = sequences
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def decode(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Tokens `[B, T]` from `position` on -> logits `[B, V]` behind the last, a view of the context's."""
        lib = self.lib
        count, length = tokens.shape
        batch = lib.llama_batch_init(count * length, 0, 1)
        batch.n_tokens = count * length
        for i in range(count * length):
            sequence, offset = divmod(i, length)
            batch.token[i] = int(tokens[sequence, offset])
            batch.pos[i] = position + offset
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = offset == length - 1
        status = lib.llama_decode(self.context, batch)
        lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama.cpp: llama_decode failed with status {status}")
        pointer = ctypes.cast(lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (count, self.vocab))

    def generate(self, ids: torch.Tensor, tokens: int) -> list[float]:
        self.start(ids.shape[0])
        step, position, times = ids.numpy(), 0, []
        for _ in range(tokens):
            logits = self.decode(step, position)
            position += step.shape[1]
            step = logits.argmax(-1)[:, None]
            times.append(time.perf_counter())
        return times

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.start(1)
        return torch.from_numpy(self.decode(ids.numpy(), 0)[0].copy())

    def __del__(self) -> None:
        if getattr(self, "context", None):  # a file may have failed to load
            self.lib.llama_free(self.context)
        if getattr(self, "model", None):
            self.lib.llama_model_free(self.model)


@functools.cache
def _silence() -> None:
    import llama_cpp

    global _silent
    _silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(_silent, None)


@dataclass(frozen=True)
class ModelPeer:
    """`load(checkpoint)` gives a `Model`; `needs` names packages, `file` what must lie in the checkpoint's folder."""

    name: str
    load: Callable[[Path], Model]
    needs: tuple[str, ...] = ()
    file: str = "config.json"

    def available(self, checkpoint: Path) -> str | None:
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        return None if (checkpoint / self.file).exists() else f"no {checkpoint / self.file}"


def load_ferrum(checkpoint: Path, **options: Any) -> TorchModel:
    return TorchModel(Qwen3MoeForCausalLM.from_pretrained(checkpoint, **options).eval())


def load_compiled(checkpoint: Path, **options: Any) -> TorchModel:
    """`forward` as one compiled graph over a static cache."""
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, **options).eval()
    model.forward = torch.compile(model.forward, fullgraph=True)
    return TorchModel(model, cache_implementation="static")


def load_transformers(checkpoint: Path) -> TorchModel:
    """transformers' own model over the same weights, dequantised to bfloat16."""
    twin: HfQwen3MoeForCausalLM = dense_twin(
        Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16), torch.bfloat16
    )
    twin.set_experts_implementation("grouped_mm")
    return TorchModel(twin)


def gguf_peer(kind: str, setting: str = "", **options: Any) -> ModelPeer:
    """Ferrum on the very file that llama.cpp runs."""
    file = f"{kind}.gguf"
    return ModelPeer(f"ferrum {file}{setting}", lambda checkpoint: load_ferrum(checkpoint / file, **options), file=file)


def llama_cpp_peer(kind: str, repack: bool) -> ModelPeer:
    return ModelPeer(
        f"llama.cpp {kind}" + (" repacked" if repack else ""),
        lambda checkpoint: LlamaCppModel(checkpoint / f"{kind}.gguf", repack),
        ("llama_cpp",),
        f"{kind}.gguf",
    )


MODELS = (
    ModelPeer("ferrum float32", functools.partial(load_ferrum, dtype=torch.float32)),
    ModelPeer("ferrum bfloat16", functools.partial(load_ferrum, dtype=torch.bfloat16)),
    ModelPeer("ferrum float32 int8 head", functools.partial(load_ferrum, dtype=torch.float32, lm_head="int8")),
    ModelPeer("ferrum bfloat16 int8 head", functools.partial(load_ferrum, dtype=torch.bfloat16, lm_head="int8")),
    ModelPeer("ferrum bfloat16 int4 head", functools.partial(load_ferrum, dtype=torch.bfloat16, lm_head="int4")),
    ModelPeer("ferrum compiled", functools.partial(load_compiled, dtype=torch.bfloat16)),
    *(gguf_peer(kind) for kind in ("Q4_K_M", "Q4_0", "Q8_0")),
    *(gguf_peer(kind, " bfloat16", dtype=torch.bfloat16) for kind in ("Q4_K_M", "Q4_0", "Q8_0")),
    *(gguf_peer(kind, " mapped", gguf_repack=False) for kind in ("Q4_K_M", "Q4_0", "Q8_0")),
    *(llama_cpp_peer(kind, repack) for kind in ("Q4_K_M", "Q4_0", "Q8_0") for repack in (True, False)),
    ModelPeer("transformers bf16", load_transformers),
)


def timed_load(peer: ModelPeer, checkpoint: Path) -> tuple[Model, float]:
    start = time.perf_counter()
    return peer.load(checkpoint), time.perf_counter() - start
