"""The routed experts of one Qwen3-30B-A3B layer with cold weights: `moe_experts_int4`.

    python benchmarks/ops/bench_moe_gemm.py [--tokens 1 8 512] [--activation int8] [--dtype float32] [--layers 3]

Calls go round several layers, whose weights together do not fit any cache, with fresh uniform routing each time.
Printed per number of tokens: median microseconds and quartiles, GB/s of the weights of the experts in use, that as a
fraction of the read bandwidth measured in the same run, and billions of integer operations per second.

First one gate_up product of a few experts by `marlin_moe_gemm` and one by `gptq_moe_gemm`, warm. Where they have no
kernel their references unpack the weights of every expert in use at each call.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import ferrum_ops
from ferrum_ops.formats import int4
from ferrum_ops.ops.marlin import marlin_workspace
from ferrum_ops.ops.moe_gemm import random_gptq_experts, random_marlin_experts
from ferrum_ops.testing.timing import Case, bytes_of, check_case, read_bandwidth, run_cases

HIDDEN, WIDTH, EXPERTS, TOP_K, GROUP_SIZE = 2048, 768, 128, 8, 128
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


def random_layer(experts: int = EXPERTS) -> tuple[Any, ...]:
    """The arguments from `w13` to `intermediate_size`."""

    def matrix(in_features: int, out_features: int) -> tuple[Any, ...]:
        packed = torch.randint(0, 256, (experts, out_features // 16, in_features // 8, 64), dtype=torch.uint8)
        scales = torch.rand(experts, in_features // GROUP_SIZE, out_features).mul_(0.01).half()
        return packed, int4.pack_groups(scales), None, None, GROUP_SIZE

    return (*matrix(HIDDEN, 2 * WIDTH), *matrix(WIDTH, HIDDEN), WIDTH)


def routing(tokens: int, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.rand(tokens, experts).topk(min(TOP_K, experts))
    return ids.to(torch.int32), weights


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = (1, 4, 64)) -> Iterator[Case]:
    """Small enough to be checked against the float64 reference; operands warm."""
    layer = random_layer(experts=8)
    for tokens in token_counts:
        hidden, (ids, weights) = torch.randn(tokens, HIDDEN).to(dtype), routing(tokens, 8)
        for activation in ("int8", "full"):
            label = f"T={tokens} E=8 {activation}"
            # Of the thousands of int8 codes between the products, the few that lie on a rounding boundary may fall to
            # the other side of the float64 reference's; each moves its row by about 3e-4.
            bound = 3e-3 if activation == "int8" and dtype == torch.float32 else None
            arguments = (hidden, ids, weights, *layer, activation)
            yield Case("moe_experts_int4", label, arguments, bytes_of(*layer[:2]), bound=bound)


def marlin_cases(dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    stack = random_marlin_experts(8, HIDDEN, 2 * WIDTH, GROUP_SIZE, 4, "cpu")
    for tokens in (1, 64):
        hidden, (ids, _) = torch.randn(tokens, HIDDEN).to(dtype), routing(tokens, 8)
        blocks = ferrum_ops.moe_align_block_size(ids, 8, 16)
        shape = (ids.shape[1], 16, WIDTH, GROUP_SIZE, 4, "silu_mul", "fp32", 0, 1)
        arguments = (hidden, *stack, None, *blocks, None, marlin_workspace("cpu"), *shape)
        moved = bytes_of(hidden, *(t for t in stack if t is not None)) + ids.numel() * WIDTH * dtype.itemsize
        yield Case("marlin_moe_gemm", f"T={tokens} E=8", arguments, moved)


def gptq_cases(dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    stack = random_gptq_experts(8, HIDDEN, 2 * WIDTH, HIDDEN // GROUP_SIZE, 4, "cpu")
    for tokens in (1, 64):
        hidden, (ids, _) = torch.randn(tokens, HIDDEN).to(dtype), routing(tokens, 8)
        blocks = ferrum_ops.moe_align_block_size(ids, 8, 16)
        arguments = (hidden, *stack, None, None, *blocks, None, ids.shape[1], 16, 4, 1)
        moved = bytes_of(hidden, *stack) + ids.numel() * 2 * WIDTH * dtype.itemsize
        yield Case("gptq_moe_gemm", f"T={tokens} E=8", arguments, moved)


def run(tokens: int, layers: list[tuple[Any, ...]], activation: str, dtype: torch.dtype, bandwidth: float) -> None:
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    expert_bytes = sum(bytes_of(layers[0][i]) for i in (0, 1, 5, 6)) / EXPERTS
    seconds, rates = [], []
    for call in range(60 if tokens <= 16 else 15):
        ids, weights = routing(tokens)
        arguments = (hidden, ids, weights, *layers[call % len(layers)], activation)
        start = time.perf_counter()
        torch.ops.ferrum.moe_experts_int4(*arguments)
        seconds.append(time.perf_counter() - start)
        rates.append(ids.unique().numel() * expert_bytes / seconds[-1])
    lower, median, upper = torch.tensor(seconds).mul(1e6).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    rate = sorted(rates)[len(rates) // 2]
    operations = 2 * tokens * TOP_K * 3 * HIDDEN * WIDTH / (median * 1e3)
    quartiles = f"[{lower:.0f}, {upper:.0f}]"
    print(
        f"{tokens:>6}{median:>10.0f}{quartiles:>20}{rate / 1e9:>8.1f}{rate / bandwidth:>9.2f}{operations:>8.0f}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--activation", default="int8", choices=["int8", "full"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    run_cases([*marlin_cases(dtype), *gptq_cases(dtype)], repeats=5)
    for case in cases(dtype):
        check_case(case)
    bandwidth = read_bandwidth()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU level {ferrum_ops.cpu_isa()}, "
        f"memory reads at {bandwidth / 1e9:.1f} GB/s; {args.activation} activations; weights cold"
    )
    print(f"{'T':>6}{'us':>10}{'quartiles':>20}{'GB/s':>8}{'of read':>9}{'GOP/s':>8}")
    layers = [random_layer() for _ in range(args.layers)]
    for tokens in args.tokens:
        run(tokens, layers, args.activation, dtype, bandwidth)
