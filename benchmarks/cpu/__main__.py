"""Ferrum next to other engines on a CPU, same shapes, same threads, in turns.

    python -m benchmarks.cpu experts [--tokens 1 16 512] [--peers onnxruntime "llama.cpp Q4_K"] [--save]

Every contender's result is checked against float64 on its own weights before it is timed. Peers that are not
installed are left out by name (benchmarks/peers/requirements.txt). Results go to benchmarks/results/cpu_peers_*.json
with --save, replacing earlier ones at the same sizes; `figure` draws them.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.cpu import experts

SECTIONS = {"experts": experts.main}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of rows")
    parser.add_argument("--peers", nargs="+", help="beginnings of names")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timing per line of a table")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        SECTIONS[arguments.section](arguments)


if __name__ == "__main__":
    main()
