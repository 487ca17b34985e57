"""Linear layers over int4 and int8 weights in the CPU layout (see `ferrum_ops.formats.int4` and `.int8`).

T rows, K in-features, N out-features, G groups, K_packed packed rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ferrum_ops._library import differentiable, needs_grad, refuse_grad, register
from ferrum_ops.formats import gptq, int8
from ferrum_ops.formats import int4 as layout

ACTIVATIONS = ("int8", "full")


def int4_pack(qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int) -> torch.Tensor:
    """Repack a 4-bit GPTQ matrix for CPU vectors.

    qweight int32 `[ceil(K/8), N]`, nibble i of word row r being input channel 8r + i. perm int32 `[K_packed]` (a
    multiple of 8) holds the input channel of every packed row, -1 for padding; None keeps the order, K_packed being K
    rounded up to 8.

    Returns uint8 `[N_pad/16, K_packed/8, 64]`. Raises RuntimeError for other dtypes or shapes, and for an entry of
    perm outside `[-1, K)`.
    """
    return torch.ops.ferrum.int4_pack(qweight, perm, in_features)


def int4_unpack(packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int) -> torch.Tensor:
    """Exact inverse of `int4_pack`: qweight int32 `[ceil(K/8), N]`. Channels that perm does not name are 0.

    Raises RuntimeError like `int4_pack`.
    """
    return torch.ops.ferrum.int4_unpack(packed, perm, in_features, out_features)


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    """`x @ w + bias` with int4 weights.

    x float32, float16 or bfloat16 `[..., K]`, contiguous; packed uint8 `[N_pad/16, K_packed/8, 64]`; scales float16 and
    zeros uint8 `[N_pad/16, G, 16]` with G = ceil(K_packed / group_size); perm int32 `[K_packed]`; bias `[N]` of any
    floating dtype. group_size is a multiple of 8 from 8 to 128; the last group may be shorter.

    activation "int8": each row and group of x is rounded to symmetric int8 (scale max|x| / 127, to nearest even), the
    products inside a group are exact integers, and groups are added in ascending order in fp32. The result has the
    same bits on every instruction level, for any number of threads and whatever else is in the batch. NaN or infinity
    in a row of x makes its row of the result NaN.
    activation "full": x is kept in fp32 and fp32 sums are taken; the same bits for any number of threads and batch.

    x and bias have gradients; that of x is `grad @ w.T` with the dequantised weights, in fp32. For "int8" it is the
    straight-through estimate: the rounding of x counts as the identity.

    Returns `[..., N]` of x's dtype. Raises RuntimeError naming the argument for anything else.
    """
    arguments = (x, packed, scales, zeros, perm, bias, out_features, group_size, activation)
    if needs_grad(x, bias):
        return _differentiable_int4_linear(*arguments)
    return torch.ops.ferrum.int4_linear(*arguments)


def int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    """`x @ w + bias` with symmetric int8 weights: the head of a model, where int4 is too coarse.

    x float32, float16 or bfloat16 `[..., K]`, contiguous; packed uint8 `[N_pad/16, K_packed/8, 128]`
    (`ferrum_ops.formats.int8.pack`); scales float16 `[N_pad/16, G, 16]` with G = ceil(K_packed / group_size); bias
    `[N]` of any floating dtype. group_size is a multiple of 8 from 8 to 128; the last group may be shorter.

    activation "int8" and "full" as in `int4_linear`, with the same promises about bits.

    Returns `[..., N]` of x's dtype; no gradient. Raises RuntimeError naming the argument for anything else.
    """
    refuse_grad("int8_linear", x, bias)
    return torch.ops.ferrum.int8_linear(x, packed, scales, bias, out_features, group_size, activation)


def quantize_activations(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per group of the last dimension: codes float32 `[..., G, group_size]`, scales float32 `[..., G]`.

    The kernels' formula: scale = max|x| / 127, code = rint(x * (127 / max|x|)). A group below 2^-100 counts as zero;
    one with NaN or infinity has codes 0 and scale NaN. Always in float32, because rounding decides the codes.
    """
    grouped = F.pad(x.float(), (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    largest = grouped.abs().amax(-1)
    finite = torch.isfinite(grouped).all(-1)
    used = finite & (largest >= 2.0**-100)
    safe = torch.where(used, largest, 1.0)
    steps = torch.full_like(safe, 127.0)  # a tensor: with a Python number torch would divide by way of a reciprocal
    codes = torch.where(used[..., None], torch.round(grouped * (steps / safe)[..., None]), 0.0)
    scales = torch.where(used, safe / steps, torch.where(finite, 0.0, torch.nan))
    return codes, scales


def gather_channels(x: torch.Tensor, perm: torch.Tensor | None, packed_rows: int) -> torch.Tensor:
    """x `[..., K]` in the order of the packed rows, `[..., K_packed]`; padding rows are 0."""
    if perm is None:
        return F.pad(x, (0, packed_rows - x.shape[-1]))
    return torch.where(perm >= 0, x[..., perm.clamp_min(0).long()], 0)


def multiply_packed(
    x: torch.Tensor,  # [M, K_packed] in the order of the packed rows, float32 or float64
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    """`[M, N_pad]` in x's dtype: group by group as the kernels add them, which in float32 gives int8's very bits."""
    columns = packed.shape[0] * layout.TILE_COLUMNS
    codes = layout.unpack_codes(packed, columns)
    zero = layout.SYMMETRIC_ZERO if zeros is None else layout.unpack_groups(zeros, columns)
    return multiply_codes(x, codes, layout.unpack_groups(scales, columns), zero, group_size, activation)


def multiply_codes(
    x: torch.Tensor,  # [M, K_packed]
    codes: torch.Tensor,  # [K_packed, N_pad]
    scales: torch.Tensor,  # [G, N_pad]
    zeros: torch.Tensor | int,  # [G, N_pad], or one for all
    group_size: int,
    activation: str,
) -> torch.Tensor:
    """`multiply_packed` behind the unpacking."""
    codes, weight_scales = codes.to(x.dtype), scales.to(x.dtype)
    zero = zeros.to(x.dtype) if isinstance(zeros, torch.Tensor) else None
    if activation == "int8":
        activations, activation_scales = (t.to(x.dtype) for t in quantize_activations(x, group_size))
    out = x.new_zeros(x.shape[0], codes.shape[1])
    for g in range(scales.shape[0]):
        part = slice(g * group_size, min((g + 1) * group_size, codes.shape[0]))
        weights = codes[part] - (zeros if zero is None else zero[g])
        if activation == "int8":
            dot = activations[:, g, : weights.shape[0]] @ weights
            out = out + dot * (weight_scales[g] * activation_scales[:, g, None])
        else:
            out = out + (x[:, part] @ weights) * weight_scales[g]
    return out


def dequantize_packed(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weights `[K_packed, N_pad]` in the order of the packed rows."""
    columns = packed.shape[0] * layout.TILE_COLUMNS
    codes = layout.unpack_codes(packed, columns).to(dtype)
    group = torch.arange(codes.shape[0], device=codes.device) // group_size
    zero = layout.SYMMETRIC_ZERO if zeros is None else layout.unpack_groups(zeros, columns).to(dtype)[group]
    return (codes - zero) * layout.unpack_groups(scales, columns).to(dtype)[group]


def scatter_channels(rows: torch.Tensor, perm: torch.Tensor | None, in_features: int) -> torch.Tensor:
    """The transpose of `gather_channels`: `[M, K_packed]` added up by input channel, `[M, K]`."""
    if perm is None:
        return rows[:, :in_features]
    channel = torch.where(perm >= 0, perm, in_features).long()  # padding goes to a column behind the last
    return rows.new_zeros(rows.shape[0], in_features + 1).index_add(1, channel, rows)[:, :in_features]


def check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise RuntimeError(f'[{op}] activation: expected "int8" or "full", got "{activation}"')


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def int4_pack_ref(qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int) -> torch.Tensor:
    return layout.pack(qweight, perm, in_features)


def int4_unpack_ref(
    packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int
) -> torch.Tensor:
    return layout.unpack(packed, perm, in_features, out_features)


def int4_linear_ref(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    check_activation("int4_linear", activation)
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    rows = gather_channels(rows, perm, packed.shape[1] * layout.LINE_ROWS)
    out = multiply_packed(rows, packed, scales, zeros, group_size, activation)[:, :out_features]
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(x.dtype).reshape(*x.shape[:-1], out_features)


def int8_linear_ref(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    check_activation("int8_linear", activation)
    in_features = packed.shape[1] * layout.LINE_ROWS
    codes = int8.unpack(packed, in_features, out_features)
    rows = gather_channels(x.reshape(-1, x.shape[-1]).to(compute_dtype(x)), None, in_features)
    out = multiply_codes(rows, codes, layout.unpack_groups(scales, out_features), int8.ZERO, group_size, activation)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(x.dtype).reshape(*x.shape[:-1], out_features)


def int4_linear_backward(
    needs: Sequence[bool],
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> tuple[torch.Tensor | None, ...]:
    compute = compute_dtype(x)
    grad = grads[0].reshape(-1, out_features).to(compute)
    grad_x = None
    if needs[0]:
        weight = dequantize_packed(packed, scales, zeros, group_size, compute)[:, :out_features]
        grad_x = scatter_channels(grad @ weight.T, perm, x.shape[-1]).to(x.dtype).reshape(x.shape)
    grad_bias = grad.sum(0).to(bias.dtype) if bias is not None and needs[5] else None
    return grad_x, *(None,) * 4, grad_bias, *(None,) * 3


_differentiable_int4_linear = differentiable(torch.ops.ferrum.int4_linear, int4_linear_backward)


def int4_pack_fake(qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int) -> torch.Tensor:
    tiles = -(-qweight.shape[1] // layout.TILE_COLUMNS)
    lines = layout.packed_rows(perm, in_features) // layout.LINE_ROWS
    return qweight.new_empty(tiles, lines, layout.LINE_BYTES, dtype=torch.uint8)


def int4_unpack_fake(
    packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int
) -> torch.Tensor:
    return packed.new_empty(-(-in_features // layout.LINE_ROWS), out_features, dtype=torch.int32)


def int4_linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def int8_linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def random_matrix(
    in_features: int,
    out_features: int,
    group_size: int,
    *,
    asymmetric: bool = False,
    act_order: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Random `(packed, scales, zeros, perm)` for tests and benchmarks; the extreme zero points 0 and 16 occur."""
    g = torch.Generator().manual_seed(seed)
    perm = None
    if act_order:
        groups = (torch.arange(in_features) // group_size).to(torch.int32)
        perm = gptq.sort_groups(groups[torch.randperm(in_features, generator=g)], in_features, group_size)
        if perm is None:  # a single group has no other order: name the rows as they lie
            perm = torch.arange(layout.packed_rows(None, in_features), dtype=torch.int32)
            perm[in_features:] = -1
    rows = layout.packed_rows(perm, in_features)
    words = -(-in_features // layout.LINE_ROWS)
    qweight = torch.randint(-(2**31), 2**31, (words, out_features), generator=g).to(torch.int32)
    shape = (-(-rows // group_size), out_features)
    scales = torch.rand(shape, generator=g) * 0.02 + 0.005
    zeros = torch.randint(0, 17, shape, generator=g) if asymmetric else None
    packed = layout.pack(qweight, perm, in_features)
    packed_zeros = None if zeros is None else layout.pack_groups(zeros.to(torch.uint8)).to(device)
    packed_perm = None if perm is None else perm.to(device)
    return packed.to(device), layout.pack_groups(scales.half()).to(device), packed_zeros, packed_perm


#: (K, N, group size, asymmetric, act-order): odd widths, short last groups, the smallest and the largest group.
SHAPES = (
    (256, 48, 128, False, False),
    (200, 40, 64, True, False),
    (72, 17, 8, True, True),
    (136, 80, 32, False, True),
    (50, 5, 16, False, False),
)


def int4_pack_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    for in_features, out_features, group_size, _, act_order in SHAPES:
        words = torch.randint(-(2**31), 2**31, (-(-in_features // 8), out_features), generator=g)
        perm = random_matrix(in_features, out_features, group_size, act_order=act_order, device=device)[3]
        yield words.to(torch.int32).to(device), perm, in_features


def int4_unpack_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for in_features, out_features, group_size, _, act_order in SHAPES:
        packed, _, _, perm = random_matrix(in_features, out_features, group_size, act_order=act_order, device=device)
        yield packed, perm, in_features, out_features


def int4_linear_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    for rows, (in_features, out_features, group_size, asymmetric, act_order) in zip(
        ((1,), (3,), (7,), (2, 5), (0,)), SHAPES
    ):
        for activation in ACTIVATIONS:
            x = torch.randn(*rows, in_features, generator=g).to(device, dtype)
            packed, scales, zeros, perm = random_matrix(
                in_features, out_features, group_size, asymmetric=asymmetric, act_order=act_order, device=device
            )
            bias = torch.randn(out_features, generator=g).to(device, dtype) if asymmetric else None
            yield x, packed, scales, zeros, perm, bias, out_features, group_size, activation


def random_int8_matrix(
    in_features: int, out_features: int, group_size: int, *, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random `(packed, scales)` for tests and benchmarks; every code from 0 to 255 occurs."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (in_features, out_features), generator=g).to(torch.uint8)
    scales = torch.rand(-(-in_features // group_size), out_features, generator=g) * 2e-3 + 5e-4
    return int8.pack(codes).to(device), layout.pack_groups(scales.half()).to(device)


def int8_linear_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    shapes = [shape[:3] for shape in SHAPES]
    for rows, (in_features, out_features, group_size) in zip(((1,), (3,), (7,), (2, 5), (0,)), shapes):
        for activation in ACTIVATIONS:
            x = torch.randn(*rows, in_features, generator=g).to(device, dtype)
            matrix = random_int8_matrix(in_features, out_features, group_size, device=device)
            bias = torch.randn(out_features, generator=g).to(device, dtype) if len(rows) == 2 else None
            yield x, *matrix, bias, out_features, group_size, activation


register("int4_pack", ref=int4_pack_ref, fake=int4_pack_fake, inputs=int4_pack_inputs)
register("int4_unpack", ref=int4_unpack_ref, fake=int4_unpack_fake, inputs=int4_unpack_inputs)
register("int4_linear", ref=int4_linear_ref, fake=int4_linear_fake, inputs=int4_linear_inputs)
register("int8_linear", ref=int8_linear_ref, fake=int8_linear_fake, inputs=int8_linear_inputs)
