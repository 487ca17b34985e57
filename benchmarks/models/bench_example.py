"""The example checkpoint: tokens per second of every implementation, eager and compiled, next to transformers dense.

    python -m benchmarks.models.bench_example [--tokens N] [--repeats N] [--compile NAME...] [--output FILE]

Contenders take turns within one process; figures are medians with quartiles. One that does not continue the prompt as
the others do is reported as wrong and not timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

import ferrum_ops
from examples.demo import dense_twin, generate, perplexity, table
from ferrum_models import Qwen3MoeForCausalLM
from ferrum_models.moe import IMPLEMENTATIONS

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "tiny-qwen3-moe"


def eager(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> Callable[[], torch.Tensor]:
    return lambda: generate(model, ids, tokens)


def compiled(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> Callable[[], torch.Tensor]:
    """`generate` with a static cache and the forward pass compiled as one graph."""
    forward = torch.compile(model.forward, fullgraph=True)

    def run() -> torch.Tensor:
        plain, model.forward = model.forward, forward
        try:
            return model.generate(
                ids,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                cache_implementation="static",
            )
        finally:
            model.forward = plain

    return run


def load(implementation: str, activation: str = "int8") -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, moe_implementation=implementation, activation=activation
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=IMPLEMENTATIONS,
        default=["fused"],
        help="implementations that are timed compiled too; inductor takes its time for each",
    )
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids
    models = {name: load(name) for name in IMPLEMENTATIONS}
    report = models["fused"].load_report
    assert report is not None
    fp32, bf16 = (dense_twin(models["fused"], dtype) for dtype in (torch.float32, torch.bfloat16))

    contenders = {f"ferrum int4 {name}, eager": eager(models[name], ids, arguments.tokens) for name in models}
    contenders |= {
        f"ferrum int4 {name}, compiled": compiled(models[name], ids, arguments.tokens) for name in arguments.compile
    }
    contenders["transformers fp32, eager"] = eager(fp32, ids, arguments.tokens)
    contenders["transformers bf16, eager"] = eager(bf16, ids, arguments.tokens)
    contenders["transformers fp32, compiled"] = compiled(fp32, ids, arguments.tokens)

    expected = contenders["ferrum int4 fused, eager"]()
    right = {}
    for name, run in contenders.items():
        # The dense peers hold other numbers (no int8 activations): only Ferrum's own must agree to the token.
        right[name] = not name.startswith("ferrum") or torch.equal(run(), expected)
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders if right[name]}
    for _ in range(arguments.repeats):
        for name, samples in seconds.items():
            start = time.perf_counter()
            contenders[name]()
            samples.append(time.perf_counter() - start)

    baseline = statistics.median(seconds["transformers fp32, eager"])
    rows = [("contender", "tokens/s", "quartiles", "x transformers fp32")]
    speeds = {}
    for name, samples in seconds.items():
        low, middle, high = statistics.quantiles(samples, n=4)
        speeds[name] = {"tokens_per_second": arguments.tokens / middle, "ratio_to_fp32": baseline / middle}
        rows.append(
            (
                name,
                f"{arguments.tokens / middle:.1f}",
                f"{arguments.tokens / high:.1f} - {arguments.tokens / low:.1f}",
                f"{baseline / middle:.2f}",
            )
        )
    rows += [(name, "WRONG", "", "") for name in contenders if not right[name]]
    print(table(rows))

    text = tokenizer((CHECKPOINT / "heldout.txt").read_text(), return_tensors="pt", verbose=False).input_ids
    full = load("fused", "full")
    perplexities = {
        "ferrum int4, int8 activations": perplexity(models["fused"], text, arguments.context),
        "ferrum int4, full activations": perplexity(full, text, arguments.context),
        "transformers fp32, same weights": perplexity(fp32, text, arguments.context),
    }
    print()
    print(table([("model", "perplexity"), *((name, f"{value:.4f}") for name, value in perplexities.items())]))
    print(f"\n{report}")

    if arguments.output:
        result = {
            "machine": {
                "processor": _processor(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "kernels": ferrum_ops.cpu_isa(),
            },
            "commit": _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
            "command": " ".join(["python -m benchmarks.models.bench_example", *sys.argv[1:]]),
            "tokens": arguments.tokens,
            "speeds": speeds,
            "wrong": [name for name in contenders if not right[name]],
            "perplexity": perplexities,
            "load": {
                "seconds": report.seconds,
                "bytes": report.model_nbytes,
                "dense_bytes": report.dense_nbytes,
                "peak_bytes_above_start": report.peak_nbytes - report.baseline_nbytes,
            },
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
