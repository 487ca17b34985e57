"""int4 and int8 linear layers at Qwen3-30B-A3B's widths, and packing.

    python benchmarks/ops/bench_int4.py [--dtype bfloat16] [--compile]
    python benchmarks/ops/bench_int4.py --cold [--activation full]

The first times operands that are wherever the call before left them; only the head-sized matrix does not fit a
last-level cache. --cold evicts the caches before every call of `int4_linear` and prints GB/s of the weights, that as a
fraction of the read bandwidth measured in the same run, and billions of operations per second.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

import ferrum_ops
from ferrum_ops.formats import int4
from ferrum_ops.testing.timing import Case, bytes_of, compare, main, read_bandwidth

HIDDEN = 2048
GROUP_SIZE = 128
EXPERT_WIDTH = 768
ATTENTION_WIDTH = 4096 + 2 * 512
HEAD_WIDTH = 65536
TOKENS = (1, 4, 8, 16, 64, 512)
#: (K, N, bits) of the products that --cold times: fused qkv, attention output, language head.
COLD = ((2048, ATTENTION_WIDTH, 4), (4096, 2048, 4), (2048, 151936, 4), (2048, 151936, 8))


def random_packed(out_features: int, in_features: int = HIDDEN, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.randint(0, 256, (out_features // 16, in_features // 8, 16 * bits), dtype=torch.uint8)
    return packed, int4.pack_groups(torch.rand(in_features // GROUP_SIZE, out_features).mul(0.01).half())


def linear_case(
    x: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], out_features: int, activation: str
) -> Case:
    label = f"T={x.shape[0]} K={HIDDEN} N={out_features} {activation}"
    arguments = (x, *weights, None, None, None, out_features, GROUP_SIZE, activation)
    moved = bytes_of(x, *weights) + x.shape[0] * out_features * x.element_size()
    return Case("int4_linear", label, arguments, moved)


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    for out_features in (2 * EXPERT_WIDTH, ATTENTION_WIDTH):
        weights = random_packed(out_features)
        for tokens in token_counts:
            for activation in ("int8", "full"):
                yield linear_case(torch.randn(tokens, HIDDEN).to(dtype), weights, out_features, activation)
    weights = random_packed(HEAD_WIDTH)
    for activation in ("int8", "full"):
        yield linear_case(torch.randn(1, HIDDEN).to(dtype), weights, HEAD_WIDTH, activation)
    weights = random_packed(ATTENTION_WIDTH, bits=8)
    for tokens in (n for n in (1, 8, 64, 512) if n in token_counts):
        for activation in ("int8", "full"):
            x = torch.randn(tokens, HIDDEN).to(dtype)
            label = f"T={tokens} K={HIDDEN} N={ATTENTION_WIDTH} {activation}"
            moved = bytes_of(x, *weights) + tokens * ATTENTION_WIDTH * x.element_size()
            yield Case("int8_linear", label, (x, *weights, None, ATTENTION_WIDTH, GROUP_SIZE, activation), moved)
    for out_features in (EXPERT_WIDTH, HEAD_WIDTH):
        qweight = torch.randint(-(2**31), 2**31, (HIDDEN // 8, out_features)).to(torch.int32)
        label = f"K={HIDDEN} N={out_features}"
        yield Case("int4_pack", label, (qweight, None, HIDDEN), 2 * bytes_of(qweight))
        perm = torch.randperm(HIDDEN).to(torch.int32)
        yield Case("int4_pack", f"{label} permuted", (qweight, perm, HIDDEN), 2 * bytes_of(qweight))
        packed = int4.pack(qweight, None, HIDDEN)
        yield Case("int4_unpack", label, (packed, None, HIDDEN, out_features), 2 * bytes_of(qweight))


def run_cold(activation: str) -> None:
    bandwidth = read_bandwidth()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU level {ferrum_ops.cpu_isa()}, "
        f"memory reads at {bandwidth / 1e9:.1f} GB/s; {activation} activations; weights cold"
    )
    print(f"{'K':>6}{'N':>8}{'bits':>6}{'T':>5}{'us':>10}{'quartiles':>20}{'GB/s':>7}{'of read':>9}{'GOP/s':>7}")
    for in_features, out_features, bits in COLD:
        packed, scales = random_packed(out_features, in_features, bits)
        for tokens in (1, 4, 16, 64, 512):
            x = torch.randn(tokens, in_features)
            call = partial(torch.ops.ferrum.int8_linear, x, packed, scales, None)
            if bits == 4:
                call = partial(torch.ops.ferrum.int4_linear, x, packed, scales, None, None, None)
            call = partial(call, out_features, GROUP_SIZE, activation)
            timing = compare({"": call}, repeats=5 if tokens * out_features > 1e7 else 15, warmup=1, cold=True)[""]
            rate, operations = bytes_of(packed, scales) / timing.median, 2 * tokens * in_features * out_features
            quartiles = f"[{timing.lower * 1e6:.0f}, {timing.upper * 1e6:.0f}]"
            print(
                f"{in_features:>6}{out_features:>8}{bits:>6}{tokens:>5}{timing.median * 1e6:>10.0f}{quartiles:>20}"
                f"{rate / 1e9:>7.1f}{rate / bandwidth:>9.2f}{operations / timing.median / 1e9:>7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    if "--cold" in sys.argv:
        run_cold("full" if "full" in sys.argv else "int8")
    else:
        main(cases, __doc__)
