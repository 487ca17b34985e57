"""Ferrum next to other engines on a CPU, same shapes, same threads, in turns.

    python -m benchmarks.cpu experts [--tokens 1 16 512] [--peers onnxruntime "llama.cpp Q4_K"] [--save]
    python -m benchmarks.cpu linear [--tokens ...] [--save]
    python -m benchmarks.cpu model [--workloads "decode 1" "prompt 512"] [--save]
    python -m benchmarks.cpu gguf [--workloads ...] [--checkpoint FOLDER] [--save]
    python -m benchmarks.cpu scaling [--kinds threads experts top_k zipf] [--save]
    python -m benchmarks.cpu levels [--families attention gguf] [--tokens ...] [--save]
    python -m benchmarks.cpu summary

Every contender's result is checked against float64 on its own weights before it is timed. Peers that are not
installed are left out by name (benchmarks/peers/requirements.txt). Results go to benchmarks/results/cpu_peers_*.json
with --save, replacing earlier ones at the same sizes; `summary` makes a page and a figure of them. Nothing else should
run meanwhile: the tables say which share of the processor went to other processes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.cpu import experts, gguf, levels, linear, model, scaling, summary

SECTIONS = {
    "experts": experts.main,
    "linear": linear.main,
    "model": model.main,
    "gguf": gguf.main,
    "scaling": scaling.main,
    "levels": levels.main,
    "summary": summary.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of rows")
    parser.add_argument("--peers", nargs="+", help="beginnings of names")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing per line of a table")
    parser.add_argument("--kinds", nargs="+", choices=["threads", "experts", "top_k", "zipf"], help="scaling: of what")
    parser.add_argument("--families", nargs="+", help="levels: of which ops")
    parser.add_argument("--workloads", nargs="+", choices=model.WORKLOADS, help="model: which")
    parser.add_argument("--rounds", type=int, default=3, help="model: counted turns")
    parser.add_argument("--layers", type=int, default=4, help="model: of the synthetic checkpoint")
    parser.add_argument("--vocab", type=int, default=32000, help="model: of the synthetic checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="model: instead of one written under build/")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        SECTIONS[arguments.section](arguments)


if __name__ == "__main__":
    main()
