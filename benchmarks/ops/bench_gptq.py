"""Dequantising GPTQ weights, and multiplying by them, at Qwen3-30B-A3B's sizes, groups of 128.

`python benchmarks/ops/bench_gptq.py [--dtype bfloat16] [--bits 4] [--compile]`

What gptq_gemm is held against is gptq_dequantize and a dense product in x's dtype.
"""

import argparse
from collections.abc import Iterator, Sequence

import torch

import ferrum_ops
from ferrum_ops.formats import gptq
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.testing.timing import Case, bytes_of, run_cases

# (in, out): an expert's gate or up, its down, attention's output projection.
SIZES = ((2048, 768), (768, 2048), (4096, 2048))
GROUP_SIZE = 128
ROWS = (1, 8, 128, 512)


def cases(
    dtype: torch.dtype = torch.float32,
    widths: Sequence[int] = gptq.SUPPORTED_BITS,
    row_counts: Sequence[int] = ROWS,
) -> Iterator[Case]:
    reference = ferrum_ops.OPS["gptq_dequantize"].ref
    for bits in widths:
        for in_features, out_features in SIZES:
            tensors = random_projection(in_features, out_features, in_features // GROUP_SIZE, bits, "cpu")
            written = in_features * out_features * dtype.itemsize
            regular = torch.arange(in_features, dtype=torch.int32) // GROUP_SIZE
            for order, g_idx in (("", None), (" act-order", regular[torch.randperm(in_features)])):
                arguments = (*tensors, g_idx, bits, 1, dtype)

                def eager(arguments=arguments):
                    return reference(*arguments)

                label = f"{bits} bit {in_features}x{out_features}{order}"
                yield Case("gptq_dequantize", label, arguments, bytes_of(*tensors) + written, eager)
    yield from gemm_cases(dtype, widths, row_counts)


def gemm_cases(dtype: torch.dtype, widths: Sequence[int], row_counts: Sequence[int]) -> Iterator[Case]:
    for bits in widths:
        in_features, out_features = SIZES[0]
        tensors = random_projection(in_features, out_features, in_features // GROUP_SIZE, bits, "cpu")
        regular = torch.arange(in_features, dtype=torch.int32) // GROUP_SIZE
        for order, g_idx in (("", None), (" act-order", regular[torch.randperm(in_features)])):
            for rows in row_counts:
                x = torch.randn(rows, in_features, dtype=dtype)
                dequantize = (*tensors, g_idx, bits, 1, dtype)

                def eager(x=x, dequantize=dequantize):
                    return x @ ferrum_ops.gptq_dequantize(*dequantize)

                moved = bytes_of(*tensors, x) + rows * out_features * dtype.itemsize
                label = f"{bits} bit M={rows}{order}"
                yield Case("gptq_gemm", label, (x, *tensors, g_idx, None, bits, 1), moved, eager)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--bits", type=int, nargs="+", default=gptq.SUPPORTED_BITS, choices=gptq.SUPPORTED_BITS)
    parser.add_argument("--compile", action="store_true", help="also time the compiled reference")
    args = parser.parse_args()
    run_cases(cases(getattr(torch, args.dtype), args.bits), compile_reference=args.compile)
