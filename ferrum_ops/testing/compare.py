"""The error metric and the one tolerance table of the project.

The metric is `||out - ref|| / ||ref||` against an oracle in float64, with a bound on the largest single error (in units
of the root mean square of the oracle) so that one wrong row in a big tensor is seen.
"""

from __future__ import annotations

import torch

#: Relative error allowed by the output's rounding alone, by dtype of the activations.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}

#: Looser bounds, each with its reason. Key: (op, dtype) or (op, None) for every dtype.
TOLERANCES: dict[tuple[str, torch.dtype | None], float] = {
    # The intermediate is rounded to int8 again: where the float64 oracle's value lies on the other side of a rounding
    # boundary than the kernel's float32, the code differs by one of 127 steps.
    ("moe_experts_int4", torch.float32): 1e-4,
    ("moe_experts_gguf", torch.float32): 1e-4,
    # The same between the ops that these are made of, where 16 bits round as well before the next codes are chosen.
    ("decoder_attention_gguf_", torch.float32): 1e-4,
    ("decoder_attention_gguf_", torch.float16): 1.2e-2,
    ("decoder_attention_gguf_", torch.bfloat16): 2.5e-2,
    ("decoder_attention_int4_", torch.float32): 1e-4,
    ("decoder_attention_int4_", torch.float16): 8e-3,
    ("decoder_experts_gguf", torch.float32): 1e-4,
    ("decoder_experts_gguf", torch.float16): 8e-3,
    ("decoder_experts_int4", torch.float32): 1e-4,
    ("decoder_experts_int4", torch.float16): 8e-3,
}

#: The largest single error may be this many times the allowed relative error (times the oracle's RMS).
MAX_ERROR_FACTOR = 40.0


def tolerance(op: str, dtype: torch.dtype) -> float:
    """Allowed relative error of `op` computing in `dtype`."""
    loose = TOLERANCES.get((op, dtype), TOLERANCES.get((op, None)))
    return ROUNDING[dtype] if loose is None else loose


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """`||out - ref|| / ||ref||` in float64; 0 for two empty or two zero tensors."""
    out64, ref64 = out.double(), ref.double()
    norm = torch.linalg.vector_norm(ref64).item()
    error = torch.linalg.vector_norm(out64 - ref64).item()
    if norm == 0.0:
        return error
    return error / norm


def assert_close(op: str, out: torch.Tensor, ref: torch.Tensor, bound: float | None = None) -> None:
    """Raise AssertionError when `out` is further from the oracle `ref` than the table allows.

    `bound` replaces the table's value. Integer and boolean tensors must be equal.
    """
    assert out.shape == ref.shape, f"[{op}] shape: expected {tuple(ref.shape)}, got {tuple(out.shape)}"
    if not out.dtype.is_floating_point:
        assert torch.equal(out, ref.to(out.dtype)), f"[{op}] values differ:\n{out}\n{ref}"
        return
    assert torch.isfinite(out).equal(torch.isfinite(ref)), f"[{op}] finite elements differ from the oracle's"
    finite = torch.isfinite(ref)
    out, ref = out[finite].double(), ref[finite].double()
    if ref.numel() == 0:
        return
    limit = tolerance(op, torch.float32) if bound is None else bound
    error = relative_error(out, ref)
    assert error <= limit, f"[{op}] relative error: expected at most {limit:.2e}, got {error:.2e}"
    rms = ref.square().mean().sqrt().item()
    worst = (out - ref).abs().max().item()
    allowed = MAX_ERROR_FACTOR * limit * max(rms, 1e-30)
    assert worst <= allowed, f"[{op}] largest error: expected at most {allowed:.2e}, got {worst:.2e}"
