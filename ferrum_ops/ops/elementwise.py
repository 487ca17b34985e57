"""Thin ops: each is one line of ATen that a compiler sees through.

They are registered as composites, so they have autograd, work on every device and fuse with what stands around them.
Those that only rearrange return views, which their schemas declare. gather_columns has a CUDA kernel besides, for calls
that are neither traced nor differentiated: ATen reads device memory in the order of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ferrum_ops._checks import check_activation, check_shape, expect
from ferrum_ops._library import register

INDEX_DTYPES = (torch.int32, torch.int64)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """`(x - mean(x)) * rsqrt(var(x) + eps) * weight + bias` over the last dimension (arXiv:1607.06450).

    Args:
        x: `[..., D]`, float32, float16 or bfloat16; statistics are float32.
        weight, bias: `[D]` of x's dtype; bias may be None.
        eps: added to the variance.

    Returns:
        `[..., D]` of x's dtype.

    Raises:
        RuntimeError: other dtypes or shapes.
    """
    return torch.ops.ferrum.layer_norm(x, weight, bias, eps)


def _check_vector(op: str, argument: str, vector: torch.Tensor, x: torch.Tensor) -> None:
    expect(x.dim() >= 1, op, "x", "at least 1 dimension", x.dim())
    expect(vector.dtype == x.dtype, op, argument, str(x.dtype), vector.dtype)
    check_shape(op, argument, vector, (x.shape[-1],))


def layer_norm_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    check_activation("layer_norm", "x", x)
    _check_vector("layer_norm", "weight", weight, x)
    if bias is not None:
        _check_vector("layer_norm", "bias", bias, x)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _randn(device: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    return randn


def layer_norm_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    randn = _randn(device, dtype)
    for shape in ((0, 64), (1, 2048), (3, 63), (2, 3, 100), (5,)):
        yield randn(*shape), randn(shape[-1]), randn(shape[-1]), 1e-5
    yield randn(6, 200)[:, 30:157], randn(127), None, 1e-6


def gelu(x: torch.Tensor) -> torch.Tensor:
    """`x * (1 + erf(x / sqrt(2))) / 2`, the exact GELU (arXiv:1606.08415), of a floating-point tensor of any shape."""
    return torch.ops.ferrum.gelu(x)


def gelu_ref(x: torch.Tensor) -> torch.Tensor:
    check_activation("gelu", "x", x)
    return F.gelu(x)


def gelu_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    randn = _randn(device, dtype)
    for shape in ((0, 8), (1, 768), (3, 63), (2, 3, 100), ()):
        yield (randn(*shape),)
    yield (10 * randn(6, 200)[:, 30:157],)


def add_bias_(x: torch.Tensor, bias: torch.Tensor) -> None:
    """`x += bias` in place, the same bias for every row.

    Args:
        x: `[..., N]`, float32, float16 or bfloat16.
        bias: `[N]` of x's dtype.

    Raises:
        RuntimeError: other dtypes or shapes.
    """
    torch.ops.ferrum.add_bias_(x, bias)


def add_bias__ref(x: torch.Tensor, bias: torch.Tensor) -> None:
    check_activation("add_bias_", "x", x)
    _check_vector("add_bias_", "bias", bias, x)
    x.add_(bias)


def add_bias__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    randn = _randn(device, dtype)
    for shape in ((0, 8), (1, 768), (3, 63), (2, 3, 100), (5,)):
        yield randn(*shape), randn(shape[-1])
    yield randn(6, 200)[:, 30:157], randn(127)


def scaled_add_(dst: torch.Tensor, src: torch.Tensor, scale: float) -> None:
    """`dst += scale * src` in place, rounded as `Tensor.add_(src, alpha=scale)` rounds it.

    Args:
        dst, src: of one shape and dtype (float32, float16 or bfloat16).
        scale: any number.

    Raises:
        RuntimeError: other dtypes or shapes.
    """
    torch.ops.ferrum.scaled_add_(dst, src, scale)


def scaled_add__ref(dst: torch.Tensor, src: torch.Tensor, scale: float) -> None:
    op = "scaled_add_"
    check_activation(op, "dst", dst)
    expect(src.dtype == dst.dtype, op, "src", str(dst.dtype), src.dtype)
    check_shape(op, "src", src, tuple(dst.shape))
    dst.add_(src, alpha=scale)


def scaled_add__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    randn = _randn(device, dtype)
    for shape in ((0, 8), (1, 768), (3, 63), (2, 3, 100)):
        yield randn(*shape), randn(*shape), -0.75
    # ATen rounds the product of tensors without dimensions; in a sum that cancels, that would be the whole result.
    yield randn().abs(), randn().abs(), 0.75
    yield randn(6, 200)[:, 30:157], randn(127, 6).t(), 3.0


def _check_indices(op: str, argument: str, indices: torch.Tensor) -> None:
    expect(indices.dtype in INDEX_DTYPES, op, argument, "int32 or int64", indices.dtype)


def _select(op: str, argument: str, limit: int, indices: torch.Tensor, select: Callable[[], torch.Tensor]) -> Any:
    """`select()`, with ATen's complaint about an index (which it makes before it reads) named after the op."""
    try:
        return select()
    except (IndexError, RuntimeError):  # ATen raises the one or the other, by shape and dtype
        outside = indices[(indices < 0) | (indices >= limit)]
        expect(outside.numel() == 0, op, argument, f"0 <= index < {limit}", outside[:1].tolist())
        raise


def gather_columns(x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """`out[..., j] = x[..., perm[j]]`: the columns in the order of an act-order checkpoint, or some of them.

    Args:
        x: `[..., K]` of any dtype.
        perm: int32 or int64 `[J]`, each in `[0, K)`.

    Returns:
        Contiguous `[..., J]` of x's dtype.

    Raises:
        RuntimeError: other dtypes or shapes; an entry of perm outside `[0, K)` on the CPU (a device assertion on CUDA).
    """
    return torch.ops.ferrum.gather_columns(x, perm)


def gather_columns_ref(x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    op = "gather_columns"
    expect(x.dim() >= 1, op, "x", "at least 1 dimension", x.dim())
    _check_indices(op, "perm", perm)
    expect(perm.dim() == 1, op, "perm", "shape (columns,)", tuple(perm.shape))
    return _select(op, "perm", x.shape[-1], perm, lambda: x.index_select(-1, perm))


def gather_columns_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    randn = _randn(device, dtype)
    yield randn(0, 8), torch.randperm(8, device=device).int()
    yield randn(1, 2048), torch.randperm(2048, device=device)
    yield randn(3, 63), torch.randint(0, 63, (20,), device=device).int()
    yield randn(2, 3, 100), torch.randperm(100, device=device).int()
    yield randn(6, 200)[:, 30:157], torch.randperm(127, device=device)
    yield randn(4, 5), torch.empty(0, dtype=torch.int32, device=device)


def embedding_lookup(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`out[...] = table[ids[...]]`: the rows of an embedding table.

    Args:
        table: `[V, H]` of any dtype.
        ids: int32 or int64 `[...]`, each in `[0, V)`.

    Returns:
        Contiguous `[..., H]` of table's dtype.

    Raises:
        RuntimeError: other dtypes or shapes; an id outside `[0, V)` on the CPU (a device assertion on CUDA).
    """
    return torch.ops.ferrum.embedding_lookup(table, ids)


def embedding_lookup_ref(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    op = "embedding_lookup"
    expect(table.dim() == 2, op, "table", "shape (vocabulary, hidden)", tuple(table.shape))
    _check_indices(op, "ids", ids)
    return _select(op, "ids", table.shape[0], ids, lambda: F.embedding(ids, table))


def embedding_lookup_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    randn = _randn(device, dtype)
    yield randn(7, 64), torch.empty(0, dtype=torch.int32, device=device)
    yield randn(1000, 128), torch.randint(0, 1000, (1,), device=device)
    yield randn(50, 63), torch.randint(0, 50, (3, 5), device=device).int()
    yield randn(50, 200)[:, 30:157], torch.randint(0, 50, (9, 4), device=device).t()


def transpose_head_to_token(x: torch.Tensor) -> torch.Tensor:
    """Head-major `[..., heads, T, D]` as token-major `[..., T, heads, D]`: a view.

    Raises RuntimeError for fewer than 3 dimensions.
    """
    return torch.ops.ferrum.transpose_head_to_token(x)


def transpose_head_to_token_ref(x: torch.Tensor) -> torch.Tensor:
    expect(x.dim() >= 3, "transpose_head_to_token", "x", "shape (..., heads, tokens, head_dim)", tuple(x.shape))
    return x.transpose(-3, -2)


def transpose_token_to_head(x: torch.Tensor) -> torch.Tensor:
    """Token-major `[..., T, heads, D]` as head-major `[..., heads, T, D]`: a view, inverse of the op above.

    Raises RuntimeError for fewer than 3 dimensions.
    """
    return torch.ops.ferrum.transpose_token_to_head(x)


def transpose_token_to_head_ref(x: torch.Tensor) -> torch.Tensor:
    expect(x.dim() >= 3, "transpose_token_to_head", "x", "shape (..., tokens, heads, head_dim)", tuple(x.shape))
    return x.transpose(-3, -2)


def transpose_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    randn = _randn(device, dtype)
    for shape in ((0, 4, 8), (1, 32, 128), (3, 5, 63), (2, 3, 7, 16)):
        yield (randn(*shape),)
    yield (randn(6, 4, 200)[1:, :, 30:157],)


def split_qkv(
    qkv: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows `[q heads | k heads | v heads]` taken apart: three views of `qkv`.

    Args:
        qkv: `[T, (num_heads + 2 * num_kv_heads) * head_dim]` of any dtype.

    Returns:
        q `[T, num_heads, head_dim]`, k and v `[T, num_kv_heads, head_dim]`, each with qkv's row stride. (Heads are
        contiguous, tokens are not: `split_qkv_norm_rope` makes contiguous copies on its way.)

    Raises:
        RuntimeError: other shapes, or a count below 1.
    """
    return torch.ops.ferrum.split_qkv(qkv, num_heads, num_kv_heads, head_dim)


def split_qkv_ref(
    qkv: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "split_qkv"
    for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        expect(count >= 1, op, name, "at least 1", count)
    heads = num_heads + 2 * num_kv_heads
    matches = qkv.dim() == 2 and qkv.shape[1] == heads * head_dim
    expect(matches, op, "qkv", f"shape (*, {heads * head_dim})", tuple(qkv.shape))
    q, k, v = qkv.unflatten(1, (heads, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), 1)
    return q, k, v


def split_qkv_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    randn = _randn(device, dtype)
    yield randn(0, 8 * 64), 4, 2, 64
    yield randn(1, 40 * 128), 32, 4, 128
    yield randn(5, 5 * 63), 3, 1, 63
    yield randn(7, 700)[:, 30:670], 6, 2, 64


register("layer_norm", ref=layer_norm_ref, inputs=layer_norm_inputs, composite=True)
register("gelu", ref=gelu_ref, inputs=gelu_inputs, composite=True)
register("add_bias_", ref=add_bias__ref, inputs=add_bias__inputs, composite=True)
register("scaled_add_", ref=scaled_add__ref, inputs=scaled_add__inputs, composite=True)
register("gather_columns", ref=gather_columns_ref, inputs=gather_columns_inputs, composite=True)
register("embedding_lookup", ref=embedding_lookup_ref, inputs=embedding_lookup_inputs, composite=True)
register("transpose_head_to_token", ref=transpose_head_to_token_ref, inputs=transpose_inputs, composite=True)
register("transpose_token_to_head", ref=transpose_token_to_head_ref, inputs=transpose_inputs, composite=True)
register("split_qkv", ref=split_qkv_ref, inputs=split_qkv_inputs, composite=True)
