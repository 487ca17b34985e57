"""GPTQ weights to the Marlin tile layout and back, and products with them.

Repacking is data movement, done once at load: the pure-torch form is the implementation on every device. The product is
for tensor cores; elsewhere its reference says what the layout means: unpack, then multiply. The layout is described in
`ferrum_ops.formats.marlin`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ferrum_ops._library import differentiable, needs_grad, refuse_grad, register
from ferrum_ops.formats import gptq, marlin
from ferrum_ops.ops.gptq import random_projection

#: How partial sums of a product whose in-features are split between blocks come together.
REDUCTIONS = ("fp32", "rounded", "atomic")
#: Rows that a matrix may have been padded by without a perm that says so.
MAX_PADDING = 127


def marlin_repack(
    qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int = 4
) -> torch.Tensor:
    """GPTQ words to the Marlin tile layout, int32 `[packed rows/16, N*bits/2]`.

    Args:
        qweight: int32 `[K*bits/32, N]`, or a stack of experts `[E, K*bits/32, N]`, packed one by one.
        perm: int32 `[packed rows]` (`[E, packed rows]` for a stack): packed row j is row `perm[j]`; -1 is a padding row
            of codes `2**(bits - 1)`. See `formats.gptq.sort_groups`. None: rows stay where they are.
        in_features: K. The packed rows (K without a perm) must be a multiple of 16.
        out_features: N, a multiple of 64.
        bits: 4 or 8.

    Raises ValueError for sizes, bits, shapes or dtypes that do not fit, and on CPU for a perm that does not hold
    every row once; on another device an entry outside `[0, K)` makes a padding row.
    """
    return torch.ops.ferrum.marlin_repack(qweight, perm, in_features, out_features, bits)


def marlin_unpack(
    packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int = 4
) -> torch.Tensor:
    """Inverse of `marlin_repack`, same arguments: GPTQ words int32 `[K*bits/32, N]` (`[E, K*bits/32, N]`).

    Raises ValueError like `marlin_repack`.
    """
    return torch.ops.ferrum.marlin_unpack(packed, perm, in_features, out_features, bits)


def marlin_permute_scales(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    """Scales in the order the Marlin kernel's lanes read them, same shape and dtype.

    Args:
        scales: floating `[G, N]` or `[E, G, N]`, `G = ceil(K / group_size)` in the order of the packed rows'
            groups, N a multiple of 64.
        in_features: K, or the packed rows where a perm has padding.
        group_size: -1 for one group. One group has another order (runs of 32) than several (runs of 64).

    Raises ValueError for a shape or dtype that does not fit.
    """
    refuse_grad("marlin_permute_scales", scales)
    return torch.ops.ferrum.marlin_permute_scales(scales, in_features, group_size)


def marlin_unpermute_scales(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    """Inverse of `marlin_permute_scales`, same arguments. Raises ValueError like it."""
    refuse_grad("marlin_unpermute_scales", scales)
    return torch.ops.ferrum.marlin_unpermute_scales(scales, in_features, group_size)


def marlin_repack_zeros(qzeros: torch.Tensor, out_features: int, bits: int = 4, zero_offset: int = 1) -> torch.Tensor:
    """GPTQ zero points in the order the Marlin kernel's lanes read them, same shape.

    Args:
        qzeros: int32 `[G, N*bits/32]`, or of a stack of experts `[E, G, N*bits/32]`.
        out_features: N, a multiple of 64.
        bits: 4 or 8.
        zero_offset: 1 when qzeros hold `zero - 1` (checkpoint_format "gptq"), 0 when they hold the zero point
            ("gptq_v2"). The result holds the zero point.

    The inverse is `ferrum_ops.formats.marlin.restore_zeros`. Raises ValueError for sizes, bits, shapes or dtypes that
    do not fit.
    """
    return torch.ops.ferrum.marlin_repack_zeros(qzeros, out_features, bits, zero_offset)


def marlin_workspace(device: torch.device | str) -> torch.Tensor:
    """A workspace for `marlin_gemm` and `marlin_moe_gemm` on `device`: int32 zeros.

    One serves any number of calls and both ops, as long as they run after one another: one per stream. Allocate it
    before a CUDA graph is captured. It is empty where there is no kernel that needs one.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return torch.zeros(0, dtype=torch.int32, device=device)
    # A counter for every output tile that is split between blocks: fewer than there are blocks at once. Sums over slots
    # take one for every 64 columns.
    blocks = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(blocks, dtype=torch.int32, device=device)


def marlin_gemm(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    workspace: torch.Tensor,
    out_features: int,
    group_size: int,
    bits: int = 4,
    reduction: str = "fp32",
    max_sms: int = 0,
) -> torch.Tensor:
    """`x @ w + bias` with w in the Marlin layout, sums in fp32, rounded once.

    packed, scales and zeros may be views: the columns from one multiple of 64 to another (`packed[:, 64*i*bits//2 :
    64*j*bits//2]`, `scales[:, 64*i : 64*j]`, `zeros[:, 64*i*bits//32 : 64*j*bits//32]`) of a matrix that holds several
    projections, or one expert of a stack. Only their last dimension has to be contiguous; the CUDA kernel wants their
    rows to start at multiples of 16 bytes, which these views of an aligned matrix do, and groups of whole 16 rows.

    Args:
        x: `[..., K]`, float16 or bfloat16 (the reference takes any floating dtype), contiguous in the last dimension.
        packed: int32 `[R/16, N*bits/2]` from `marlin_repack`; R packed rows, N columns, a multiple of 64.
        scales: float16, bfloat16 or float32 `[G, N]` from `marlin_permute_scales`, whatever the dtype of x.
        zeros: int32 `[G, N*bits/32]` from `marlin_repack_zeros`; None: every zero point is `2**(bits - 1)`.
        perm: int32 `[R]`, the one given to `marlin_repack`: packed row j multiplies `x[..., perm[j]]`, a padding row
            (-1) nothing. None: packed row j multiplies `x[..., j]`; rows from K on, at most 127, are padding.
        bias: floating `[out_features]`, added in fp32.
        workspace: int32, from `marlin_workspace`. All zero before the call and after it; not to be used by two streams
            at once. Without a counter for every tile, none is split.
        out_features: columns of the result, at most N; those behind are padding.
        group_size: packed row j is of group `j // group_size`; -1: one group.
        bits: 4 or 8.
        reduction: how the partial sums of a product that is split over K come together. "fp32": in fp32 and a fixed
            order, so that equal calls have equal bits. "rounded": in a fixed order, but rounded to x's dtype on the
            way. "atomic": in fp32, in any order. Without effect where nothing is split.
        max_sms: the most multiprocessors to use; 0: all of the device.

    Returns:
        `[..., out_features]`, contiguous, of x's dtype.

    x and bias have gradients; that of x is `grad @ w.T` with the dequantised weights, in fp32.

    Raises ValueError for sizes, shapes, dtypes or strides that do not fit, and on the CPU for a perm with an entry
    outside `[-1, K)`; on another device such an entry makes a padding row.
    """
    values = (out_features, group_size, bits, reduction, max_sms)
    if needs_grad(x, bias):
        # The workspace goes along inside a tuple: what a later call does with it must not void what autograd saved.
        return _differentiable_marlin_gemm(x, packed, scales, zeros, perm, bias, (workspace,), *values)
    return torch.ops.ferrum.marlin_gemm(x, packed, scales, zeros, perm, bias, workspace, *values)


def marlin_dequantize_out(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    expert_offsets: torch.Tensor | None,
    group_size: int,
    bits: int,
    interleaved: bool,
    out: torch.Tensor,
) -> None:
    """Write the weights of the Marlin layout into `out`, rows in their old order: `x @ out` is the product with them.

    packed, scales and zeros may be views as for `marlin_gemm`, which for `interleaved` have whole pairs of runs.

    Args:
        packed, scales, zeros, perm: as for `marlin_gemm`, or with E leading for a stack of E matrices. A perm names
            every row of `[0, K)` once.
        expert_offsets: int32 `[E+1]` from `moe_build_pairs_by_token`: the matrix of expert e is written only where rows
            are its, `expert_offsets[e + 1] > expert_offsets[e]`. None: all are.
        group_size, bits: as for `marlin_gemm`.
        interleaved: the columns are runs of gate and up (`formats.marlin.interleave_gate_up`); `out` has those of gate
            and then as many of up.
        out: `[K, N]` or `[E, K, N]` of float32, float16 or bfloat16; K and N at most the rows and columns of packed,
            whose other ones are padding. Rows contiguous and apart from each other, best at multiples of 16 bytes.

    A weight is `(code - zero) * scale` in fp32, rounded to out's dtype.

    Raises ValueError for sizes, shapes, dtypes or strides that do not fit, and on the CPU for a perm that does not hold
    every row once; on another device rows that no entry names are left as they are. RuntimeError where scales or out
    require grad.
    """
    refuse_grad("marlin_dequantize_out", scales, out)
    torch.ops.ferrum.marlin_dequantize_out(
        packed, scales, zeros, perm, expert_offsets, group_size, bits, interleaved, out
    )


def _expect(op: str, name: str, good: bool, expected: str, got: object) -> None:
    if not good:
        described = marlin.describe(got) if isinstance(got, torch.Tensor) else repr(got)
        raise ValueError(f"[{op}] {name}: expected {expected}, got {described}")


def check_product(
    op: str,
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    workspace: torch.Tensor,
    columns: int,
    group_size: int,
    bits: int,
    reduction: str,
    max_sms: int,
    experts: tuple[int, ...] = (),
) -> None:
    """What both Marlin products ask of their arguments. `columns` of N are used; `experts` is `()` or `(E,)`."""
    marlin.check_sizes(op, 0, 0, bits)
    lead = "".join(f"{e}, " for e in experts)
    two = len(experts) + 2
    words_fit = packed.dtype == torch.int32 and packed.dim() == two and packed.shape[:-2] == experts
    _expect(op, "packed", words_fit, f"int32 ({lead}R/16, N*{bits}/2)", packed)
    rows, width = packed.shape[-2] * marlin.TILE_ROWS, packed.shape[-1] * 2 // bits
    marlin.check_sizes(op, rows, width, bits)
    _expect(op, "out_features", 0 <= columns <= width, f"at most {width} columns of packed", columns)
    groups = gptq.num_groups(rows, group_size)
    scales_fit = scales.is_floating_point() and scales.shape == (*experts, groups, width)
    _expect(op, "scales", scales_fit, f"floating ({lead}{groups}, {width})", scales)
    if zeros is not None:
        shape = (*experts, groups, width * bits // 32)
        fits = zeros.dtype == torch.int32 and zeros.shape == shape
        _expect(op, "zeros", fits, f"int32 ({lead}{groups}, {shape[-1]})", zeros)
    _expect(op, "x", x.is_floating_point() and x.dim() > 0, "floating (..., K)", x)
    in_features = x.shape[-1]
    if perm is None:
        fits = rows - MAX_PADDING <= in_features <= rows
        _expect(op, "x", fits, f"floating (..., K), K from {max(rows - MAX_PADDING, 0)} to {rows}", x)
    else:
        _expect(op, "perm", perm.dtype == torch.int32 and perm.shape == (*experts, rows), f"int32 ({lead}{rows})", perm)
        if perm.device.type == "cpu" and perm.numel():
            low, high = (int(v) for v in torch.aminmax(perm))
            inside = low >= -1 and high < in_features
            _expect(op, "perm", inside, f"values in [-1, {in_features})", [low, high])
    _expect(op, "workspace", workspace.dtype == torch.int32 and workspace.dim() == 1, "int32 (W,)", workspace)
    _expect(op, "reduction", reduction in REDUCTIONS, f"one of {REDUCTIONS}", reduction)
    _expect(op, "max_sms", max_sms >= 0, "0 or more", max_sms)
    for name, tensor in (("x", x), ("packed", packed), ("scales", scales), ("zeros", zeros), ("perm", perm)):
        if tensor is not None and tensor.numel() and tensor.shape[-1] > 1:
            strides = f"strides {tensor.stride()}"
            if tensor.stride(-1) != 1:
                raise ValueError(f"[{op}] {name}: expected a contiguous last dimension, got {strides}")


def check_bias(op: str, bias: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is not None:
        fits = bias.is_floating_point() and bias.shape == shape and bias.is_contiguous()
        _expect(op, "bias", fits, f"contiguous floating {shape}", bias)


def gather_packed_rows(x: torch.Tensor, perm: torch.Tensor | None, rows: int) -> torch.Tensor:
    """x `[M, K]` in the order of the packed rows, `[M, R]`; padding rows are 0."""
    if perm is None:
        return torch.nn.functional.pad(x, (0, rows - x.shape[-1]))
    padding = (perm < 0) | (perm >= x.shape[-1])
    # One column more, so that an x without columns can be indexed too.
    columns = torch.nn.functional.pad(x, (0, 1))
    return columns[:, torch.where(padding, x.shape[-1], perm).long()]


def marlin_repack_ref(
    qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int
) -> torch.Tensor:
    return marlin.repack(qweight, perm, in_features, out_features, bits)


def marlin_unpack_ref(
    packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int
) -> torch.Tensor:
    return marlin.unpack(packed, perm, in_features, out_features, bits)


def marlin_permute_scales_ref(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    return marlin.permute_scales(scales, in_features, group_size)


def marlin_unpermute_scales_ref(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    return marlin.unpermute_scales(scales, in_features, group_size)


def marlin_repack_zeros_ref(qzeros: torch.Tensor, out_features: int, bits: int, zero_offset: int) -> torch.Tensor:
    return marlin.repack_zeros(qzeros, out_features, bits, zero_offset)


def marlin_gemm_ref(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    workspace: torch.Tensor,
    out_features: int,
    group_size: int,
    bits: int,
    reduction: str,
    max_sms: int,
) -> torch.Tensor:
    """Computes in float64 when x is."""
    op = "marlin_gemm"
    check_product(op, x, packed, scales, zeros, perm, workspace, out_features, group_size, bits, reduction, max_sms)
    check_bias(op, bias, (out_features,))
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = marlin.dequantize(packed, scales, zeros, group_size, bits, compute, op)[:, :out_features]
    rows = gather_packed_rows(x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(compute), perm, weight.shape[0])
    out = rows @ weight
    if bias is not None:
        out = out + bias.to(compute)
    return out.to(x.dtype).reshape(*x.shape[:-1], out_features)


def marlin_dequantize_out_ref(*args: Any) -> None:
    marlin.dequantize_into(*args)


def _marlin_gemm_of_tuple(*args: Any) -> torch.Tensor:
    return torch.ops.ferrum.marlin_gemm(*args[:6], *args[6], *args[7:])


def marlin_gemm_backward(
    needs: Sequence[bool],
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    workspace: tuple[torch.Tensor],
    out_features: int,
    group_size: int,
    bits: int,
    *_: Any,
) -> tuple[torch.Tensor | None, ...]:
    compute = torch.promote_types(x.dtype, torch.float32)
    grad = grads[0].reshape(x.shape[:-1].numel(), out_features).to(compute)
    grad_x = None
    if needs[0]:
        weight = marlin.dequantize(packed, scales, zeros, group_size, bits, compute)[:, :out_features]
        in_features = x.shape[-1]
        rows = grad @ weight.T
        if perm is not None:
            channel = torch.where((perm >= 0) & (perm < in_features), perm, in_features).long()
            rows = rows.new_zeros(rows.shape[0], in_features + 1).index_add(1, channel, rows)
        grad_x = rows[:, :in_features].to(x.dtype).reshape(x.shape)
    grad_bias = grad.sum(0).to(bias.dtype) if bias is not None and needs[5] else None
    return grad_x, *(None,) * 4, grad_bias, *(None,) * 6


_differentiable_marlin_gemm = differentiable(_marlin_gemm_of_tuple, marlin_gemm_backward)


def marlin_dequantize_out_fake(*args: Any) -> None:
    packed, _, _, perm, expert_offsets, _, bits, interleaved, out = args
    marlin.check_dense("marlin_dequantize_out", packed, perm, expert_offsets, bits, interleaved, out)


def marlin_repack_zeros_fake(qzeros: torch.Tensor, out_features: int, bits: int, zero_offset: int) -> torch.Tensor:
    return qzeros.new_empty(qzeros.shape)


def marlin_gemm_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    workspace: torch.Tensor,
    out_features: int,
    group_size: int,
    bits: int,
    reduction: str,
    max_sms: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def marlin_repack_fake(
    qweight: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int
) -> torch.Tensor:
    packed_rows = in_features if perm is None else perm.shape[-1]
    marlin.check_sizes("marlin_repack", packed_rows, out_features, bits)
    return qweight.new_empty((*qweight.shape[:-2], packed_rows // marlin.TILE_ROWS, out_features * bits // 2))


def marlin_unpack_fake(
    packed: torch.Tensor, perm: torch.Tensor | None, in_features: int, out_features: int, bits: int
) -> torch.Tensor:
    packed_rows = in_features if perm is None else perm.shape[-1]
    marlin.check_sizes("marlin_unpack", packed_rows, out_features, bits)
    return packed.new_empty((*packed.shape[:-2], in_features * bits // 32, out_features))


def marlin_permute_scales_fake(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    return scales.new_empty(scales.shape)


def marlin_unpermute_scales_fake(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    return scales.new_empty(scales.shape)


def _words(*shape: int, device: str) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, device=device).to(torch.int32)


def _padded_perm(in_features: int, device: str) -> torch.Tensor:
    """A random act-order of three unequal groups, each padded to the same number of rows."""
    g_idx = (torch.rand(in_features, device=device) * 2.5).to(torch.int32)
    group_size = -(-in_features // 3)
    size = gptq.packed_group_size(g_idx, in_features, group_size, marlin.TILE_ROWS)
    perm = gptq.sort_groups(g_idx, in_features, group_size, size)
    assert perm is not None
    return perm


def marlin_repack_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    if dtype != torch.float32:
        return  # words only: the same samples for every dtype
    for bits in marlin.SUPPORTED_BITS:
        rows = 48 * bits // 32
        yield _words(rows, 128, device=device), None, 48, 128, bits
        perm = torch.randperm(48, device=device).to(torch.int32)
        yield _words(rows, 64, device=device), perm, 48, 64, bits
        yield _words(2, rows, 64, device=device), torch.stack([perm, perm.flip(0)]), 48, 64, bits
        # 40 rows are no multiple of 16, but their padded order is.
        yield _words(40 * bits // 32, 64, device=device), _padded_perm(40, device), 40, 64, bits
        yield _words(0, rows, 64, device=device), None, 48, 64, bits
        yield _words(rows, 0, device=device), None, 48, 0, bits


def marlin_unpack_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for qweight, perm, in_features, out_features, bits in marlin_repack_inputs(device, dtype):
        packed = marlin.repack(qweight, perm, in_features, out_features, bits)
        yield packed, perm, in_features, out_features, bits


def marlin_permute_scales_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape, in_features, group_size in (
        ((4, 128), 128, 32),
        ((1, 128), 128, -1),
        ((1, 64), 128, 128),
        ((3, 2, 64), 100, 64),
        ((3, 1, 192), 100, -1),
        ((2, 0), 64, 32),
        ((0, 2, 64), 64, 32),
    ):
        yield torch.randn(shape, device=device, dtype=dtype), in_features, group_size
    yield torch.randn(128, 4, device=device, dtype=dtype).T, 128, 32


def marlin_unpermute_scales_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    yield from marlin_permute_scales_inputs(device, dtype)


register(
    "marlin_repack",
    ref=marlin_repack_ref,
    fake=marlin_repack_fake,
    inputs=marlin_repack_inputs,
)
register(
    "marlin_unpack",
    ref=marlin_unpack_ref,
    fake=marlin_unpack_fake,
    inputs=marlin_unpack_inputs,
)
register(
    "marlin_permute_scales",
    ref=marlin_permute_scales_ref,
    fake=marlin_permute_scales_fake,
    inputs=marlin_permute_scales_inputs,
)
register(
    "marlin_unpermute_scales",
    ref=marlin_unpermute_scales_ref,
    fake=marlin_unpermute_scales_fake,
    inputs=marlin_unpermute_scales_inputs,
)


def marlin_repack_zeros_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    if dtype != torch.float32:
        return  # words only
    for bits in marlin.SUPPORTED_BITS:
        yield _words(3, 128 * bits // 32, device=device), 128, bits, 1
        yield _words(2, 3, 64 * bits // 32, device=device), 64, bits, 0
    yield _words(0, 8, device=device), 64, 4, 1


def random_marlin(
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
    device: str,
    *,
    asymmetric: bool = False,
    act_order: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Random `(packed, scales, zeros, perm)` for tests and benchmarks."""
    groups = gptq.num_groups(in_features, group_size)
    qweight, qzeros, scales = random_projection(in_features, out_features, groups, bits, device)
    perm = torch.randperm(in_features, device=device).to(torch.int32) if act_order else None
    return (
        marlin.repack(qweight, perm, in_features, out_features, bits),
        marlin.permute_scales(scales, in_features, group_size),
        marlin.repack_zeros(qzeros, out_features, bits, 1) if asymmetric else None,
        perm,
    )


def random_marlin_experts(
    num_experts: int,
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
    device: str,
    *,
    asymmetric: bool = False,
    act_order: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Random `(packed, scales, zeros, perm)` of a stack, for tests and benchmarks; every expert has its own order."""
    matrices = [
        random_marlin(in_features, out_features, group_size, bits, device, asymmetric=asymmetric, act_order=act_order)
        for _ in range(num_experts)
    ]
    return tuple(None if column[0] is None else torch.stack(column) for column in zip(*matrices))


def marlin_gemm_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    workspace = marlin_workspace(device)

    def activations(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    for bits in marlin.SUPPORTED_BITS:
        grouped = random_marlin(64, 128, 32, bits, device, asymmetric=True)
        yield activations(5, 64), *grouped, activations(128), workspace, 128, 32, bits, "fp32", 0
        one_group = random_marlin(48, 64, -1, bits, device, act_order=True)
        yield activations(2, 3, 48), *one_group, None, workspace, 64, -1, bits, "rounded", 1
    # 40 of 48 rows and 50 of 64 columns are used, the last group is short, the batch is empty.
    padded = random_marlin(48, 64, 32, 4, device)
    yield activations(7, 40), *padded, activations(50), workspace, 50, 32, 4, "atomic", 0
    yield activations(0, 48), *padded, None, workspace, 64, 32, 4, "fp32", 0
    # The second of three projections side by side.
    packed, scales, zeros, _ = random_marlin(32, 192, 16, 4, device, asymmetric=True)
    assert zeros is not None
    middle = (packed[:, 128:256], scales[:, 64:128], zeros[:, 8:16])
    yield activations(3, 40)[:, 8:], *middle, None, None, workspace, 64, 16, 4, "fp32", 0


register(
    "marlin_repack_zeros",
    ref=marlin_repack_zeros_ref,
    fake=marlin_repack_zeros_fake,
    inputs=marlin_repack_zeros_inputs,
)
register(
    "marlin_gemm",
    ref=marlin_gemm_ref,
    fake=marlin_gemm_fake,
    inputs=marlin_gemm_inputs,
)


def marlin_dequantize_out_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def zeroed(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    for bits in marlin.SUPPORTED_BITS:
        packed, scales, zeros, perm = random_marlin(96, 128, 32, bits, device, asymmetric=True, act_order=True)
        yield packed, scales, zeros, perm, None, 32, bits, False, zeroed(96, 125)
        yield packed, scales, None, None, None, 32, bits, True, zeroed(90, 128)
        one_group = random_marlin(48, 64, -1, bits, device)
        stack = [torch.stack((t, t)) for t in one_group[:2]]
        offsets = torch.tensor([0, 0, 3], device=device, dtype=torch.int32)
        yield *stack, None, None, offsets, -1, bits, True, zeroed(2, 48, 80)[..., 8:70]
    # The second half of the columns, into the first half of wider rows.
    packed, scales, zeros, _ = random_marlin(160, 128, 16, 4, device, asymmetric=True)
    assert zeros is not None
    yield packed[:, 128:], scales[:, 64:], zeros[:, 8:], None, None, 16, 4, False, zeroed(160, 128)[:, :64]
    yield *one_group, None, -1, 8, False, zeroed(0, 64)


register(
    "marlin_dequantize_out",
    ref=marlin_dequantize_out_ref,
    fake=marlin_dequantize_out_fake,
    inputs=marlin_dequantize_out_inputs,
)
