"""Repacking to the Marlin layout and back at Qwen3-30B-A3B's sizes: once per projection, at load.

`python benchmarks/ops/bench_marlin.py [--compile]`
"""

import argparse
from collections.abc import Iterator

import torch

from ferrum_ops.formats import marlin
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.testing.timing import Case, bytes_of, run_cases

SIZES = ((2048, 768), (768, 2048), (4096, 2048))
GROUP_SIZE = 128


def cases() -> Iterator[Case]:
    for in_features, out_features in SIZES:
        qweight, _, scales = random_projection(in_features, out_features, in_features // GROUP_SIZE, 4, "cpu")
        perm = torch.randperm(in_features).int()
        packed = marlin.repack(qweight, None, in_features, out_features, 4)
        moved = 2 * bytes_of(qweight)
        for order, rows in (("", None), (" act-order", perm)):
            label = f"{in_features}x{out_features}{order}"
            yield Case("marlin_repack", label, (qweight, rows, in_features, out_features, 4), moved)
            yield Case("marlin_unpack", label, (packed, rows, in_features, out_features, 4), moved)
        label, arguments = f"{in_features}x{out_features}", (scales, in_features, GROUP_SIZE)
        yield Case("marlin_permute_scales", label, arguments, 2 * bytes_of(scales))
        yield Case("marlin_unpermute_scales", label, arguments, 2 * bytes_of(scales))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="also time the compiled reference")
    args = parser.parse_args()
    run_cases(cases(), compile_reference=args.compile)
