"""A whole Qwen3-MoE of random weights on one device: tokens per second of decoding and of a prompt, beside the ceiling.

`python -m benchmarks.gpu_model [--out FOLDER] [--batch 1 8 32 128] [--layers 48 ...] [--candidates graph ...]`

Writes FOLDER/model.json and FOLDER/model.md. The defaults are Qwen3-30B-A3B's sizes. One layer goes through a
checkpoint and the loader, as any does; the others are copies of it on the device with the experts in another order and
a router of their own, and the embedding and lm_head are made there: no file of the model's size is written.

The ceiling is the bytes that a step has to read (weights of the experts that uniform routing picks, everything else
once, keys and values) over the bandwidth of a copy measured in the same run. Candidates: "graph", recorded steps
(`DecodeGraph`), after they were seen to give the logits of eager ones bit for bit; "eager", the same steps one by one;
"generate", transformers' loop; "compiled", torch.compile(mode="reduce-overhead") over a static cache.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.gpu import commit
from benchmarks.models.make_synthetic import Sizes, make_synthetic
from ferrum_models import DecodeGraph, Qwen3MoeForCausalLM
from ferrum_ops.testing import gpu

CANDIDATES = ("graph", "eager", "generate", "compiled")
#: Steps of one sample, and samples.
STEPS, SAMPLES = 32, 5


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    """The model, packed as the loader packs for the device."""
    with tempfile.TemporaryDirectory() as directory:
        make_synthetic(Path(directory), replace(sizes, layers=1, vocab=256))
        model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=dtype, device_map=str(device))
    config, template = model.config, model.model.layers[0]
    for index in range(1, sizes.layers):
        model.model.layers.append(another_layer(template, index, sizes))
    config.num_hidden_layers = sizes.layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * sizes.layers
    config.vocab_size = model.vocab_size = sizes.vocab
    for module, spread in ((model.model.embed_tokens, 1.0), (model.lm_head, 2 * sizes.hidden**-0.5)):
        module.weight = random_parameter((sizes.vocab, sizes.hidden), spread, dtype, device)
    return model


def another_layer(template: Any, index: int, sizes: Sizes) -> Any:
    """A copy with the experts in another order, and another router."""
    layer = copy.deepcopy(template, {id(template.self_attn.config): template.self_attn.config})
    layer.self_attn.layer_idx = index
    experts = layer.mlp.experts
    for tensors in (experts._buffers, experts._parameters):
        for tensor in tensors.values():
            if tensor is not None and sizes.experts in tensor.shape[:2] and tensor.dim() > 2:
                tensor.copy_(tensor.roll(index, tensor.shape.index(sizes.experts)))
    gate = layer.mlp.gate
    gate.weight = random_parameter(gate.weight.shape, sizes.hidden**-0.5, gate.weight.dtype, gate.weight.device)
    return layer


def random_parameter(shape: Any, spread: float, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, dtype=dtype, device=device).mul_(spread), requires_grad=False)


def nbytes(module: Any) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def step_bytes(model: Qwen3MoeForCausalLM, batch: int, keys: int) -> float:
    """Bytes that a step of `batch` sequences of `keys` tokens reads, with uniform routing."""
    config = model.config
    active = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch
    experts = sum(nbytes(layer.mlp.experts) for layer in model.model.layers)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    embedding = nbytes(model.model.embed_tokens)
    return nbytes(model) - embedding - experts + experts * active + cache * keys * batch


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written."""
    if device.type == "cuda":
        return gpu.copy_bandwidth()
    source = torch.ones(1 << 24, dtype=torch.uint8)
    target = source.clone()
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, 9)


def median_seconds(work: Callable[[], Any], device: torch.device, samples: int) -> float:
    """Of one call, the device's queue empty before and after."""
    times = []
    for _ in range(samples):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """One model and batch; a method per candidate gives seconds per step. Sequences start with `prompt` tokens."""

    def __init__(self, model: Qwen3MoeForCausalLM, batch: int, prompt: int, steps: int, samples: int) -> None:
        self.model, self.batch, self.steps, self.samples = model, batch, steps, samples
        self.device = model.device
        self.ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=self.device)
        self.capacity = prompt + steps * (samples + 1) + 16

    def eager(self) -> float:
        return self._steps(self._started(recorded=False))

    def graph(self) -> float:
        graphs = [self._started(recorded) for recorded in (True, False)]
        for steps in (1, 4):
            logits, expected = (graph.run(steps) for graph in graphs)
            if not torch.equal(logits, expected):
                raise AssertionError("a replay's logits differ from those of the same steps one by one")
        graph = graphs[0]
        del graphs
        if graph.fallback is not None:
            raise RuntimeError(graph.fallback)
        return self._steps(graph)

    def _started(self, recorded: bool) -> DecodeGraph:
        graph = DecodeGraph(self.model, self.batch, self.capacity)
        if not recorded:
            graph.runner.graphs = None
        graph.start(self.ids)
        return graph

    def _steps(self, graph: DecodeGraph) -> float:
        graph.run(3)
        return median_seconds(lambda: graph.run(self.steps), self.device, self.samples) / self.steps

    def generate(self) -> float:
        def seconds(tokens: int) -> float:
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            work = partial(self.model.generate, self.ids, max_new_tokens=tokens, **options)
            return median_seconds(work, self.device, 3)

        seconds(2)
        return (seconds(2 + self.steps) - seconds(2)) / self.steps

    @torch.no_grad()
    def compiled(self) -> float:
        torch._dynamo.reset()
        forward: Any = torch.compile(self.model, mode="reduce-overhead", fullgraph=True, dynamic=False)
        cache = StaticCache(config=self.model.config, max_cache_len=self.capacity)
        position = torch.arange(self.ids.shape[1], device=self.device)
        self.model(self.ids, position_ids=position[None], past_key_values=cache, logits_to_keep=1)
        ids, position = self.ids[:, -1:].clone(), position[-1:] + 1

        def steps(count: int) -> None:
            nonlocal ids
            for _ in range(count):
                torch.compiler.cudagraph_mark_step_begin()
                out = forward(input_ids=ids, position_ids=position[None], past_key_values=cache, use_cache=True)
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                position.add_(1)

        steps(5)  # compiled, recorded, replayed
        return median_seconds(lambda: steps(self.steps), self.device, self.samples) / self.steps


def prefill_seconds(model: Qwen3MoeForCausalLM, tokens: int, samples: int) -> float:
    ids = torch.randint(1, model.config.vocab_size, (1, tokens), device=model.device)
    work = partial(model, ids, use_cache=True, logits_to_keep=1)
    work()
    return median_seconds(work, model.device, samples)


def markdown(result: dict[str, Any]) -> str:
    head = (
        f"{result['device']}, torch {result['torch']}, commit {result['commit']}: {result['layers']} layers, "
        f"{result['model_bytes'] / 1e9:.2f} GB ({', '.join(result['layouts'])}), copy "
        f"{result['copy_bandwidth'] / 1e12:.2f} TB/s. A prompt of {result['prefill_tokens']} tokens: "
        f"{result['prefill_tokens'] / result['prefill_seconds']:.0f} tokens/s."
    )
    lines = [head, "", "| batch | candidate | ms/step | tokens/s | of ceiling | GB held |", "|--:|---|--:|--:|--:|--:|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['batch']} | {row['candidate']} | {row['seconds'] * 1e3:.2f} | {row['tokens_per_s']:.0f} | "
            f"{row['of_ceiling']:.2f} | {row['peak_bytes'] / 1e9:.1f} |"
        )
    return "\n".join([*lines, "", *result["notes"], ""])


def describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return gpu.describe()
    return {"device": device.type, "torch": torch.__version__}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument("--prompt", type=int, default=256, help="tokens held when decoding starts")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt that is timed")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seconds", type=float, default=1000, help="start nothing further after this time")
    for name, value in vars(Sizes()).items():
        if name != "sym":
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started, device = time.monotonic(), torch.device(args.device)
    torch.manual_seed(args.seed)
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes()) if name != "sym"})
    model = build(sizes, device, getattr(torch, args.dtype))
    synchronize(device)
    result: dict[str, Any] = describe(device) | {"commit": commit(), "dtype": args.dtype} | vars(sizes)
    result |= {
        "build_seconds": time.monotonic() - started,
        "model_bytes": nbytes(model),
        "layouts": sorted({module.layout for module in model.modules() if hasattr(module, "layout")}),
        "copy_bandwidth": copy_bandwidth(device),
        "prompt": args.prompt,
        "prefill_tokens": args.prefill,
        "prefill_seconds": prefill_seconds(model, args.prefill, args.samples),
        "rows": [],
        "notes": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for candidate in sorted(args.candidates, key=CANDIDATES.index):
        for batch in args.batch:
            what = f"{candidate}, batch {batch}"
            try:
                if time.monotonic() - started > args.seconds:
                    result["notes"].append(f"{what}: not reached in {args.seconds:.0f} s")
                else:
                    result["rows"].append(measure(model, candidate, batch, args, result["copy_bandwidth"]))
            except Exception as error:
                result["notes"].append(f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            # What is finished is on disk, should the machine be taken away.
            (args.out / "model.json").write_text(json.dumps(result, indent=1))
            (args.out / "model.md").write_text(markdown(result))
    print(markdown(result))
    if any("graph" in note and "not reached" not in note for note in result["notes"]):
        raise SystemExit(1)


def measure(
    model: Qwen3MoeForCausalLM, candidate: str, batch: int, args: argparse.Namespace, bandwidth: float
) -> dict[str, Any]:
    device = model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = getattr(Bench(model, batch, args.prompt, args.steps, args.samples), candidate)()
    read = step_bytes(model, batch, args.prompt + args.steps * (args.samples + 1) // 2)
    return {
        "batch": batch,
        "candidate": candidate,
        "seconds": seconds,
        "tokens_per_s": batch / seconds,
        "step_bytes": read,
        "of_ceiling": read / bandwidth / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else nbytes(model),
    }


if __name__ == "__main__":
    main()
