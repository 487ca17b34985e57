"""Load the example checkpoint, continue a prompt with every MoE implementation, and compare with the dense model.

python examples/demo.py [--checkpoint DIR] [--prompt TEXT] [--tokens N] [--compile]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers import Qwen3MoeForCausalLM as HfQwen3MoeForCausalLM
from transformers.utils import logging

import ferrum_ops
from ferrum_models import Qwen3MoeForCausalLM
from ferrum_models.moe import IMPLEMENTATIONS
from ferrum_models.qwen3_moe.saving import dense_state_dict

HERE = Path(__file__).parent


def generate(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def tokens_per_second(model: torch.nn.Module, ids: torch.Tensor, tokens: int, repeats: int = 3) -> float:
    """Median over `repeats` greedy continuations, the prompt's own pass included."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        generate(model, ids, tokens)
        seconds.append(time.perf_counter() - start)
    return tokens / statistics.median(seconds)


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor, context: int) -> float:
    """exp of the mean negative log likelihood over consecutive windows of `context` tokens."""
    total, count = 0.0, 0
    for window in ids[0].split(context):
        if window.numel() < 2:
            continue
        logits = model(window.unsqueeze(0)).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += window.numel() - 1
    return math.exp(total / count)


def dense_twin(model: Qwen3MoeForCausalLM, dtype: torch.dtype) -> HfQwen3MoeForCausalLM:
    """Transformers' own model with this model's weights, dequantised."""
    config = model.config.__class__.from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    logging.disable_progress_bar()
    twin = HfQwen3MoeForCausalLM.from_pretrained(
        None, config=config, state_dict=dense_state_dict(model, dtype), dtype=dtype
    )
    logging.enable_progress_bar()
    twin.generation_config = model.generation_config
    return twin.eval()


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "tiny-qwen3-moe")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--context", type=int, default=256, help="window of the perplexity, tokens")
    parser.add_argument("--compile", action="store_true", help="also time the fused model compiled (takes minutes)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()

    kernels = [devices["cpu"] for devices in ferrum_ops.backends().values()]
    print(
        f"device: cpu ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads), "
        f"torch {torch.__version__}\n"
        f"kernels: {ferrum_ops.cpu_isa()}; {kernels.count('kernel')} of {len(kernels)} ops have one for the CPU"
    )

    model = Qwen3MoeForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    print(f"\n{model.load_report}")

    ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids
    twin = dense_twin(model, torch.float32)
    rows = [("model", "tokens/s", "continuation the same")]
    first = None
    for name in IMPLEMENTATIONS:
        model.set_moe_implementation(name)
        out = generate(model, ids, arguments.tokens)
        text = tokenizer.decode(out[0], skip_special_tokens=True)
        print(f"\n[{name}] {text}")
        first = out if first is None else first
        same = "yes" if torch.equal(out, first) else "NO"
        rows.append((f"ferrum int4, {name}", f"{tokens_per_second(model, ids, arguments.tokens):.1f}", same))
    model.set_moe_implementation("fused")
    if arguments.compile:
        model.forward = torch.compile(model.forward, fullgraph=True)
        model.generation_config.cache_implementation = "static"
        same = "yes" if torch.equal(generate(model, ids, arguments.tokens), first) else "NO"
        rows.append(("ferrum int4, fused, compiled", f"{tokens_per_second(model, ids, arguments.tokens):.1f}", same))
        del model.forward
        model.generation_config.cache_implementation = None
    rows.append(("transformers fp32, dense", f"{tokens_per_second(twin, ids, arguments.tokens):.1f}", ""))
    bf16 = dense_twin(model, torch.bfloat16)
    rows.append(("transformers bf16, dense", f"{tokens_per_second(bf16, ids, arguments.tokens):.1f}", ""))
    print(f"\n{table(rows)}")

    heldout = arguments.checkpoint / "heldout.txt"
    if heldout.exists():
        text_ids = tokenizer(heldout.read_text(), return_tensors="pt", verbose=False).input_ids
        rows = [("model", "perplexity on held-back text")]
        for activation in ("int8", "full"):
            model.set_activation(activation)
            value = perplexity(model, text_ids, arguments.context)
            rows.append((f"ferrum int4, {activation} activations", f"{value:.4f}"))
        value = perplexity(twin, text_ids, arguments.context)
        rows.append(("transformers fp32, the same weights dequantised", f"{value:.4f}"))
        record = arguments.checkpoint / "training.json"
        if record.exists() and "ppl_dense" in (figures := json.loads(record.read_text())):
            rows.append(("before quantisation (recorded when it was made)", f"{figures['ppl_dense']:.4f}"))
        print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
