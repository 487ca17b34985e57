"""Quantises the checkpoint of `train_tiny.py` with GPTQModel and measures what that costs in perplexity.

4 bit, groups of 128, symmetric, act-order on. Router, norms and embeddings stay dense. Both perplexities come from
transformers' own class in float32, once with the trained weights and once with the packed ones dequantised here.

    python examples/quantize_tiny.py --dense build/tiny-dense --out examples/tiny-qwen3-moe
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

# On a machine with two cores GPTQModel gives its workers one and then asks for two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import gptqmodel
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file
from train_tiny import HELDOUT, TEXT, Batches, continuation, perplexity, read_text
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

PROMPTS = ("Once upon a time", "One day the fox", "The king said")


def dequantise(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor) -> torch.Tensor:
    """One 4-bit GPTQ tensor as a dense weight (out, in), float32.

    qweight (in/8, out) int32 holds eight rows in a word, lowest nibble first; qzeros (groups, out/8) likewise, and
    the file format stores each zero minus one. w[k, n] = scale[g, n] * (q[k, n] - zero[g, n]) with g = g_idx[k].
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    values = ((qweight[:, None, :] >> shifts[:, None]) & 15).reshape(-1, qweight.shape[1])
    zeros = ((qzeros[:, :, None] >> shifts) & 15).reshape(qzeros.shape[0], -1) + 1
    group = g_idx.long()
    return ((values - zeros[group]) * scales.float()[group]).t().contiguous()


def load_dequantised(checkpoint: Path) -> Qwen3MoeForCausalLM:
    """The GPTQ checkpoint as a dense float32 model of transformers' class, for measuring."""
    packed = load_file(checkpoint / "model.safetensors")
    dense = {name: tensor.float() for name, tensor in packed.items() if name.endswith(".weight")}
    for name in packed:
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            parts = (packed[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
            dense[f"{stem}.weight"] = dequantise(*parts)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    with tempfile.TemporaryDirectory() as directory:
        save_file(dense, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        (Path(directory) / "config.json").write_text(json.dumps(config))
        model, report = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    # transformers only warns about tensors it does not know or lacks; random weights would be measured as a model.
    wrong = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    if wrong:
        raise SystemExit(f"{checkpoint}: {wrong}")
    return model.eval()


@torch.no_grad()
def tokens_per_expert(model: Qwen3MoeForCausalLM, windows: list[torch.Tensor]) -> torch.Tensor:
    """How many calibration tokens the router sends to each expert, (layers, experts)."""
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.long)
    for window in windows:
        for layer, logits in enumerate(model(input_ids=window[None], output_router_logits=True).router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=model.config.num_experts)
    return counts


def quantise(dense: Path, out: Path, windows: list[torch.Tensor]) -> None:
    """Runs GPTQModel on the calibration windows and writes the checkpoint to `out`."""
    config = QuantizeConfig(
        bits=4, group_size=128, desc_act=True, sym=True, act_group_aware=False, offload_to_disk=False
    )
    model = GPTQModel.load(str(dense), config, dtype=torch.bfloat16)
    model.quantize([{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows])
    with tempfile.TemporaryDirectory() as directory:
        model.save(directory)
        for name in ("config.json", "quantize_config.json", "model.safetensors"):
            shutil.copy(Path(directory) / name, out / name)
    # Unchanged by quantisation; GPTQModel would write do_sample into the generation settings.
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(dense / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", type=Path, required=True, help="directory written by train_tiny.py")
    parser.add_argument("--out", type=Path, required=True, help="directory of the quantised checkpoint")
    parser.add_argument("--text", type=Path, default=TEXT, help="calibration text: the training text")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="text for the perplexities")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of --context tokens")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--perplexity-context", type=int, default=256, help="tokens in a held-out window")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    heldout = read_text(arguments.heldout)
    batches = Batches(read_text(arguments.text), tokenizer, arguments.windows, arguments.context, arguments.seed)
    windows = list(batches.next())
    model = Qwen3MoeForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32).eval()
    counts = tokens_per_expert(model, windows)
    ppl_dense = perplexity(model, tokenizer, heldout, arguments.perplexity_context)
    if counts.min() < arguments.context:
        raise SystemExit(f"an expert sees only {counts.min()} calibration tokens; use more --windows")

    began = time.perf_counter()
    quantise(arguments.dense, arguments.out, windows)
    seconds = time.perf_counter() - began
    quantised = load_dequantised(arguments.out)

    figures = json.loads((arguments.dense / "training.json").read_text())
    figures |= {
        "perplexity_context": arguments.perplexity_context,
        "ppl_dense": round(ppl_dense, 4),
        "ppl_int4_dequantised": round(perplexity(quantised, tokenizer, heldout, arguments.perplexity_context), 4),
        "calibration_windows": arguments.windows,
        "calibration_tokens_per_expert": {"min": counts.min().item(), "max": counts.max().item()},
        "quantise_seconds": round(seconds, 1),
        "greedy_int4_dequantised": [continuation(quantised, tokenizer, prompt, 96) for prompt in PROMPTS],
    }
    figures["versions"]["gptqmodel"] = gptqmodel.__version__
    (arguments.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
