"""Gated SiLU and GELU at Qwen3-30B-A3B's expert width, T tokens with 8 experts each.

`python benchmarks/ops/bench_activation.py [--dtype bfloat16] [--compile]`
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ferrum_ops.testing.timing import Case, bytes_of, main

EXPERT_WIDTH = 768
TOP_K = 8
TOKENS = (1, 8, 128, 512)


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    for tokens in token_counts:
        rows = tokens * TOP_K
        gate_up = torch.randn(rows, 2 * EXPERT_WIDTH).to(dtype)
        gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
        out = torch.empty_like(gate)
        label = f"rows={rows} I={EXPERT_WIDTH}"

        def halves(gate_up=gate_up):
            return F.silu(gate_up[:, :EXPERT_WIDTH]) * gate_up[:, EXPERT_WIDTH:]

        def two(gate=gate, up=up):
            return F.silu(gate) * up

        def halves_out(gate_up=gate_up, out=out):
            torch.mul(F.silu(gate_up[:, :EXPERT_WIDTH]), gate_up[:, EXPERT_WIDTH:], out=out)

        def gelu_halves(gate_up=gate_up):
            return F.gelu(gate_up[:, :EXPERT_WIDTH], approximate="tanh") * gate_up[:, EXPERT_WIDTH:]

        moved = bytes_of(gate_up, out)
        yield Case("silu_mul", label, (gate_up,), moved, halves)
        yield Case("silu_mul.gate_up", label, (gate, up), moved, two)
        yield Case("silu_mul_out", label, (gate_up, 0, out, 0, rows), moved, halves_out)
        yield Case("gelu_tanh_mul", label, (gate_up,), moved, gelu_halves)


if __name__ == "__main__":
    main(cases, __doc__)
