"""RMS norm at Qwen3-30B-A3B's hidden size. `python benchmarks/ops/bench_norm.py [--dtype bfloat16] [--compile]`"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from ferrum_ops.testing.timing import Case, bytes_of, main

HIDDEN = 2048
TOKENS = (1, 8, 128, 512)
EPS = 1e-6


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    weight = torch.randn(HIDDEN).to(dtype)
    for tokens in token_counts:
        x, residual = torch.randn(2, tokens, HIDDEN).to(dtype).unbind()
        label = f"T={tokens} D={HIDDEN}"

        def norm(x=x):
            return F.rms_norm(x, (HIDDEN,), weight, EPS)

        def add_norm(x=x, residual=residual):
            total = x + residual
            return F.rms_norm(total, (HIDDEN,), weight, EPS), total

        yield Case("rms_norm", label, (x, weight, EPS), 2 * bytes_of(x), norm)
        yield Case("fused_add_rms_norm", label, (x, residual, weight, EPS), 4 * bytes_of(x), add_norm)
        # In place and repeated, the residual grows by x every call: x of zeros stays zero and leaves it as it is.
        zeros = torch.zeros_like(x)
        yield Case("fused_add_rms_norm_", label, (zeros, zeros.clone(), weight, EPS), 4 * bytes_of(x), add_norm)


if __name__ == "__main__":
    main(cases, __doc__)
