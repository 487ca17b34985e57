"""Write a GPTQ int4 Qwen3-MoE checkpoint of any size with random weights, one tensor in memory at a time.

    python -m benchmarks.models.make_synthetic OUT [--layers 4] [--vocab 32000] [--gguf Q4_K_M Q8_0]

The defaults are Qwen3-30B-A3B's sizes (48 layers take 17 GB). Codes are bell-shaped and scales such that activations
keep about the variance they have in a trained model; the same seed gives the same bytes. There is no tokenizer: token
ids are the interface. `--gguf` also writes the model as OUT/<type>.gguf for llama.cpp (`make_gguf.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

#: Standard deviation of the codes around their zero point.
CODE_SPREAD = 2.7

#: Of the outputs that are added to the residual stream, which many layers share.
RESIDUAL_GAIN = 0.3


@dataclass(frozen=True)
class Sizes:
    layers: int = 48
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    experts: int = 128
    top_k: int = 8
    intermediate: int = 768  # of one expert
    vocab: int = 151936
    group_size: int = 128
    sym: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    make: Callable[[np.random.Generator], np.ndarray]

    @property
    def nbytes(self) -> int:
        return {"I32": 4, "F16": 2, "BF16": 2}[self.dtype] * int(np.prod(self.shape))


def _code_pairs() -> np.ndarray:
    """uint8 `[65536]`: two codes per byte, each of a normal distribution, by a uniform 16-bit number."""
    normal = statistics.NormalDist(8, CODE_SPREAD)
    codes = np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)]).round().clip(0, 15).astype(np.uint8)
    return (codes[None, :] | codes[:, None] << 4).reshape(-1)


CODE_PAIRS = _code_pairs()


def _codes(words: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: CODE_PAIRS[rng.integers(0, 65536, words * 4, dtype=np.uint16)].view(np.int32)


def _zeros(words: int, sym: bool) -> Callable[[np.random.Generator], np.ndarray]:
    """GPTQ's first format stores zero points less one: 8 everywhere, or 6 to 9."""
    if sym:
        return lambda rng: np.full(words, 0x77777777, np.int32)

    def make(rng: np.random.Generator) -> np.ndarray:
        low, high = rng.integers(5, 9, (2, words * 4), dtype=np.uint8)
        return (low | high << 4).view(np.int32)

    return make


def _bfloat16(count: int, mean: float, spread: float) -> Callable[[np.random.Generator], np.ndarray]:
    def make(rng: np.random.Generator) -> np.ndarray:
        values = torch.from_numpy(rng.standard_normal(count, np.float32)).mul_(spread).add_(mean)
        return values.bfloat16().view(torch.int16).numpy()

    return make


def linear(sizes: Sizes, name: str, out_features: int, in_features: int, gain: float = 1.0) -> Iterator[Tensor]:
    """One quantised projection; outputs have `gain` times the inputs' standard deviation."""
    groups = in_features // sizes.group_size
    scale = gain / (CODE_SPREAD * in_features**0.5)
    yield Tensor(f"{name}.qweight", "I32", (in_features // 8, out_features), _codes(in_features // 8 * out_features))
    yield Tensor(f"{name}.qzeros", "I32", (groups, out_features // 8), _zeros(groups * out_features // 8, sizes.sym))
    yield Tensor(
        f"{name}.scales",
        "F16",
        (groups, out_features),
        lambda rng: (rng.uniform(0.75, 1.25, groups * out_features) * scale).astype(np.float16),
    )
    g_idx = np.arange(in_features, dtype=np.int32) // sizes.group_size
    yield Tensor(f"{name}.g_idx", "I32", (in_features,), lambda rng: g_idx)


def dense(name: str, *shape: int, mean: float = 0.0, spread: float) -> Tensor:
    return Tensor(name, "BF16", shape, _bfloat16(int(np.prod(shape)), mean, spread))


def layer(sizes: Sizes, index: int) -> Iterator[Tensor]:
    prefix, hidden = f"model.layers.{index}", sizes.hidden
    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    for norm, width in (
        ("input_layernorm", hidden),
        ("post_attention_layernorm", hidden),
        ("self_attn.q_norm", sizes.head_dim),
        ("self_attn.k_norm", sizes.head_dim),
    ):
        yield dense(f"{prefix}.{norm}.weight", width, mean=1.0, spread=0.05)
    for projection, width in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        yield from linear(sizes, f"{prefix}.self_attn.{projection}", width, hidden)
    yield from linear(sizes, f"{prefix}.self_attn.o_proj", hidden, query, RESIDUAL_GAIN)
    yield dense(f"{prefix}.mlp.gate.weight", sizes.experts, hidden, spread=hidden**-0.5)
    for expert in range(sizes.experts):
        name = f"{prefix}.mlp.experts.{expert}"
        yield from linear(sizes, f"{name}.gate_proj", sizes.intermediate, hidden)
        yield from linear(sizes, f"{name}.up_proj", sizes.intermediate, hidden)
        yield from linear(sizes, f"{name}.down_proj", hidden, sizes.intermediate, RESIDUAL_GAIN)


def tensors(sizes: Sizes) -> Iterator[Tensor]:
    yield dense("model.embed_tokens.weight", sizes.vocab, sizes.hidden, spread=1.0)
    for index in range(sizes.layers):
        yield from layer(sizes, index)
    yield dense("model.norm.weight", sizes.hidden, mean=1.0, spread=0.05)
    yield dense("lm_head.weight", sizes.vocab, sizes.hidden, spread=2 * sizes.hidden**-0.5)


def shards(sizes: Sizes, shard_bytes: int) -> list[list[Tensor]]:
    """All tensors in order, cut where a shard is full."""
    parts: list[list[Tensor]] = [[]]
    room = shard_bytes
    for tensor in tensors(sizes):
        if parts[-1] and tensor.nbytes > room:
            parts.append([])
            room = shard_bytes
        parts[-1].append(tensor)
        room -= tensor.nbytes
    return parts


def write_shard(path: Path, content: list[Tensor], seed: int) -> None:
    """The safetensors format: length of the header, the header in JSON, the tensors' bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in content:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in content:
            # Seeded by name: a tensor does not depend on the others, nor on the cut into shards.
            values = tensor.make(np.random.default_rng([seed, zlib.crc32(tensor.name.encode())]))
            if values.nbytes != tensor.nbytes:
                raise RuntimeError(f"{tensor.name}: made {values.nbytes} bytes, announced {tensor.nbytes}")
            file.write(values.tobytes())


def config(sizes: Sizes) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": 3 * sizes.hidden,  # of layers without experts: there are none
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.intermediate,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": sizes.group_size,
            "desc_act": False,
            "sym": sizes.sym,
            "lm_head": False,
        },
    }


def check(sizes: Sizes) -> None:
    """Raise ValueError for widths that whole groups and whole words of eight codes do not fill."""
    widths = {
        "hidden": sizes.hidden,
        "intermediate": sizes.intermediate,
        "heads * head_dim": sizes.heads * sizes.head_dim,
    }
    for name, width in widths.items():
        if width % sizes.group_size or width % 8:
            raise ValueError(f"{name}: expected a multiple of 8 and of group_size {sizes.group_size}, got {width}")
    if not 0 < sizes.top_k <= sizes.experts:
        raise ValueError(f"top_k: expected 1 to {sizes.experts} (experts), got {sizes.top_k}")


def make_synthetic(directory: Path, sizes: Sizes, shard_bytes: int = 2 << 30) -> int:
    """Write the checkpoint; returns its bytes. Raises ValueError for sizes that do not fit each other."""
    check(sizes)
    directory.mkdir(parents=True, exist_ok=True)
    parts = shards(sizes, shard_bytes)
    weight_map = {}
    for i, content in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        write_shard(directory / file, content, sizes.seed)
        weight_map |= {tensor.name: file for tensor in content}
    total = sum(tensor.nbytes for content in parts for tensor in content)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config(sizes), indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": False}) + "\n")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, value in vars(Sizes()).items():
        option = f"--{name.replace('_', '-')}"
        if name == "sym":
            parser.add_argument("--asym", dest="sym", action="store_false", help="random zero points")
        else:
            parser.add_argument(option, type=int, default=value, help=f"[{value}]")
    parser.add_argument("--shard-bytes", type=int, default=2 << 30)
    parser.add_argument("--gguf", nargs="*", default=[], metavar="TYPE", help="Q4_K_M, Q4_0, Q8_0")
    arguments = parser.parse_args()
    sizes = Sizes(**{name: getattr(arguments, name) for name in vars(Sizes())})
    print(f"{arguments.out}: {make_synthetic(arguments.out, sizes, arguments.shard_bytes):,} bytes")
    if arguments.gguf:
        from benchmarks.models.make_gguf import make_gguf

        for path in make_gguf(arguments.out, arguments.gguf):
            print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
