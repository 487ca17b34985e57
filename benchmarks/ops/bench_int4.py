"""int4 linear layers at Qwen3-30B-A3B's widths, and packing.

`python benchmarks/ops/bench_int4.py [--dtype bfloat16] [--compile]`

The head-sized matrix does not fit a last-level cache: its GB/s are the memory's. The other operands are warm.
"""

from collections.abc import Iterator

import torch

from ferrum_ops.formats import int4
from ferrum_ops.testing.timing import Case, bytes_of, main

HIDDEN = 2048
GROUP_SIZE = 128
EXPERT_WIDTH = 768
ATTENTION_WIDTH = 4096 + 2 * 512
HEAD_WIDTH = 65536
TOKENS = (1, 4, 8, 16, 64, 512)


def random_packed(out_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.randint(0, 256, (out_features // 16, HIDDEN // 8, 64), dtype=torch.uint8)
    return packed, int4.pack_groups(torch.rand(HIDDEN // GROUP_SIZE, out_features).mul(0.01).half())


def linear_case(
    x: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], out_features: int, activation: str
) -> Case:
    label = f"T={x.shape[0]} K={HIDDEN} N={out_features} {activation}"
    arguments = (x, *weights, None, None, None, out_features, GROUP_SIZE, activation)
    moved = bytes_of(x, *weights) + x.shape[0] * out_features * x.element_size()
    return Case("int4_linear", label, arguments, moved)


def cases(dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    for out_features in (2 * EXPERT_WIDTH, ATTENTION_WIDTH):
        weights = random_packed(out_features)
        for tokens in TOKENS:
            for activation in ("int8", "full"):
                yield linear_case(torch.randn(tokens, HIDDEN).to(dtype), weights, out_features, activation)
    weights = random_packed(HEAD_WIDTH)
    for activation in ("int8", "full"):
        yield linear_case(torch.randn(1, HIDDEN).to(dtype), weights, HEAD_WIDTH, activation)
    for out_features in (EXPERT_WIDTH, HEAD_WIDTH):
        qweight = torch.randint(-(2**31), 2**31, (HIDDEN // 8, out_features)).to(torch.int32)
        label = f"K={HIDDEN} N={out_features}"
        yield Case("int4_pack", label, (qweight, None, HIDDEN), 2 * bytes_of(qweight))
        perm = torch.randperm(HIDDEN).to(torch.int32)
        yield Case("int4_pack", f"{label} permuted", (qweight, perm, HIDDEN), 2 * bytes_of(qweight))
        packed = int4.pack(qweight, None, HIDDEN)
        yield Case("int4_unpack", label, (packed, None, HIDDEN, out_features), 2 * bytes_of(qweight))


if __name__ == "__main__":
    main(cases, __doc__)
