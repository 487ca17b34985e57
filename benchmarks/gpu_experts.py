"""The routed experts of one layer on this machine's GPU, Ferrum beside the engines of benchmarks/peers that are there.

`python -m benchmarks.gpu_experts [--out FOLDER] [--tokens 1 8 32 128 512] [--peers ferrum humming ...]`

Writes FOLDER/experts.json and FOLDER/experts.md. Sizes are Qwen3-30B-A3B's; ids are drawn uniformly. A graph of calls
goes round `LAYERS` layers, so that weights come from memory and not from the L2 cache. A peer whose result is not that
of its weights is not timed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import commit
from benchmarks.peers import GPU_PEERS, select
from benchmarks.peers.interface import MoeShape, check_block, random_experts
from ferrum_ops.testing import gpu

LAYERS = 4


def inputs(shape: MoeShape, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k)
    hidden = torch.randn(tokens, shape.hidden, generator=generator)
    return hidden, ids.to(torch.int32), weights / weights.sum(-1, keepdim=True)


@torch.inference_mode()
def measure(shape: MoeShape, names: list[str] | None, tokens: list[int]) -> tuple[list[dict[str, Any]], list[str]]:
    peers, missing = select(names, GPU_PEERS)
    notes = [f"{name}: {reason}" for name, reason in missing.items()]
    blocks: dict[str, list[Any]] = {}
    for peer in peers:
        if getattr(peer, "moe_block", None) is None:
            continue
        try:
            made = [peer.moe_block(random_experts(shape, seed)) for seed in range(LAYERS)]
            check_block(peer, made[0], *inputs(shape, 5, 0))
            blocks[peer.name] = made
        except Exception as error:
            notes.append(f"{peer.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    rows: list[dict[str, Any]] = []
    for count in tokens:
        given = [inputs(shape, count, seed) for seed in range(LAYERS)]
        calls = {name: [b.bind(*x) for b, x in zip(made, given)] for name, made in blocks.items()}
        active = sum(len(ids.unique()) for _, ids, _ in given) / LAYERS
        for name, timing in gpu.compare(calls).items() if calls else ():
            read = active * blocks[name][0].expert_nbytes
            rows.append({"tokens": count, "peer": name, "us": timing.median * 1e6, "bytes": read})
    return rows, notes


def markdown(head: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> str:
    bandwidth = head["copy_bandwidth"]
    lines = [
        f"{head['device']}, torch {head['torch']}, commit {head['commit']}: copy {bandwidth / 1e12:.2f} TB/s.",
        "",
        "| tokens | peer | us | GB/s | of copy | over the first |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        first = next(other["us"] for other in rows if other["tokens"] == row["tokens"])
        rate = row["bytes"] / row["us"] * 1e6
        lines.append(
            f"| {row['tokens']} | {row['peer']} | {row['us']:.1f} | {rate / 1e9:.0f} | {rate / bandwidth:.2f} | "
            f"{row['us'] / first:.2f} |"
        )
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--peers", nargs="+")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    head = gpu.describe() | {"commit": commit(), "copy_bandwidth": gpu.copy_bandwidth()}
    rows, notes = measure(MoeShape(), args.peers, args.tokens)
    (args.out / "experts.json").write_text(json.dumps(head | {"rows": rows, "notes": notes}, indent=1))
    (args.out / "experts.md").write_text(markdown(head, rows, notes))
    print(markdown(head, rows, notes))
    if not any(row["peer"].startswith("ferrum") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
