"""Rotary position embedding with the per-head RMS norm before it, on heads or on a whole projected qkv row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ferrum_ops._checks import check_activation, check_float32, check_weight, compute_dtype, expect
from ferrum_ops._library import differentiable, needs_grad, refuse_grad, register
from ferrum_ops.ops.kv_cache import POOL_SHAPE, check_caches, check_slot_mapping, inside_pool, write_rows
from ferrum_ops.ops.norm import normalize, normalize_backward


def qk_norm_rope(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> torch.Tensor:
    """RMS norm of every head when a weight is given, then rotary embedding (RoFormer, arXiv:2104.09864).

    With R = 2 * cos.shape[1] <= D, elements `i` and `i + R/2` (half-split), or `2i` and `2i + 1` (interleaved), are
    rotated as `(a*cos - b*sin, b*cos + a*sin)` by column i of the row of the table that belongs to the token.
    Elements from R on are not rotated. Evaluated in float32 and rounded once to x's dtype. x and norm_weight have
    gradients, the tables have none.

    Args:
        x: `[T, heads, D]`, float32, float16 or bfloat16; last dimension contiguous, other strides free.
        norm_weight: `[D]`, contiguous, x's dtype or float32; None leaves the norm out.
        cos, sin: float32 `[max_pos, R/2]` of one shape; rows contiguous, any row stride.
        positions: int32 or int64 `[T]`, row of the table of each token; None means token t takes row t.
        eps: added to the mean of squares.

    Returns:
        Contiguous `[T, heads, D]` of x's dtype.

    Raises:
        RuntimeError: other dtypes, shapes or strides; on CPU a position outside the table; a table that requires grad
            while autograd is on. On other devices, where positions are not read on the host, the rotated elements of
            such a token are NaN (and no row of the table is read for it).
    """
    refuse_grad("qk_norm_rope", cos, sin)
    if needs_grad(x, norm_weight):
        return _differentiable_qk_norm_rope(x, norm_weight, cos, sin, positions, eps, interleaved)
    return torch.ops.ferrum.qk_norm_rope(x, norm_weight, cos, sin, positions, eps, interleaved)


def _check_tables(
    op: str, x: torch.Tensor, head_dim: int, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None
) -> None:
    tokens = x.shape[0]
    check_float32(op, "cos", cos, x)
    check_float32(op, "sin", sin, x)
    expect(
        cos.dim() == 2 and 2 * cos.shape[1] <= head_dim,
        op,
        "cos",
        f"shape (max_pos, rotary_dim / 2) with rotary_dim <= {head_dim}",
        tuple(cos.shape),
    )
    expect(sin.shape == cos.shape, op, "sin", f"shape {tuple(cos.shape)}", tuple(sin.shape))
    for name, table in (("cos", cos), ("sin", sin)):
        rows = table.numel() == 0 or table.shape[1] == 1 or table.stride(1) == 1
        expect(rows, op, name, "a contiguous last dimension", f"strides {tuple(table.stride())}")
    if positions is None:
        expect(cos.shape[0] >= tokens, op, "cos", f"at least {tokens} rows, one per token", cos.shape[0])
        return
    expect(positions.dtype in (torch.int32, torch.int64), op, "positions", "int32 or int64", positions.dtype)
    expect(tuple(positions.shape) == (tokens,), op, "positions", f"shape ({tokens},)", tuple(positions.shape))
    expect(positions.is_contiguous(), op, "positions", "a contiguous tensor", f"strides {positions.stride()}")
    expect(tokens == 0 or cos.shape[0] > 0, op, "cos", "at least 1 row", cos.shape[0])


def _table_rows(
    op: str, tokens: int, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[T, 1, R/2]` of each token; raises on the host for a position outside, NaN on other devices."""
    if positions is None or tokens == 0:
        return cos[:tokens, None], sin[:tokens, None]
    inside = (positions >= 0) & (positions < cos.shape[0])
    if positions.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(inside.all()):
        expect(False, op, "positions", f"0 <= position < {cos.shape[0]}", int(positions[~inside][0]))
    rows = torch.where(inside, positions, 0).long()
    outside = ~inside[:, None]
    return cos[rows].masked_fill(outside, torch.nan)[:, None], sin[rows].masked_fill(outside, torch.nan)[:, None]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else (rotated[..., :half], rotated[..., half:])
    first, second = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        return torch.cat((torch.stack((first, second), -1).flatten(-2), rest), -1)
    return torch.cat((first, second, rest), -1)


def _norm_rotate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    interleaved: bool,
) -> torch.Tensor:
    compute = compute_dtype(x.dtype)
    heads = x.to(compute) if weight is None else normalize(x.to(compute), weight, eps)
    return _rotate(heads, cos.to(compute), sin.to(compute), interleaved).to(x.dtype).contiguous()


def _check_qk_norm_rope(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
) -> None:
    op = "qk_norm_rope"
    check_activation(op, "x", x)
    expect(x.dim() == 3, op, "x", "shape (tokens, heads, head_dim)", tuple(x.shape))
    rows = x.numel() == 0 or x.shape[2] == 1 or x.stride(2) == 1
    expect(rows, op, "x", "a contiguous last dimension", f"strides {tuple(x.stride())}")
    if norm_weight is not None:
        check_weight(op, "norm_weight", norm_weight, x, x.shape[2])
    _check_tables(op, x, x.shape[2], cos, sin, positions)


def qk_norm_rope_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    interleaved: bool = False,
) -> torch.Tensor:
    _check_qk_norm_rope(x, norm_weight, cos, sin, positions)
    cos, sin = _table_rows("qk_norm_rope", x.shape[0], cos, sin, positions)
    return _norm_rotate(x, norm_weight, cos, sin, eps, interleaved)


def qk_norm_rope_backward(
    needs: Sequence[bool],
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[torch.Tensor | None, ...]:
    compute = compute_dtype(x.dtype)
    cos, sin = _table_rows("qk_norm_rope", x.shape[0], cos, sin, positions)
    # A rotation's inverse is its transpose.
    grad = _rotate(grads[0].to(compute), cos.to(compute), -sin.to(compute), interleaved)
    if norm_weight is None:
        return grad.to(x.dtype), *(None,) * 6
    grad_x, grad_weight = normalize_backward(grad, x.to(compute), norm_weight, eps)
    return grad_x.to(x.dtype), grad_weight.to(norm_weight.dtype) if needs[1] else None, *(None,) * 5


_differentiable_qk_norm_rope = differentiable(torch.ops.ferrum.qk_norm_rope, qk_norm_rope_backward)


def qk_norm_rope_fake(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    interleaved: bool = False,
) -> torch.Tensor:
    _check_qk_norm_rope(x, norm_weight, cos, sin, positions)
    return x.new_empty(x.shape)


def rotary_tables(
    max_pos: int, rotary_dim: int, device: str | torch.device = "cpu", theta: float = 1e6
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin float32 `[max_pos, rotary_dim/2]` of `position * theta^(-2i / rotary_dim)`, formed in float64."""
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.arange(max_pos, dtype=torch.float64)[:, None] * theta**-steps
    return angles.cos().float().to(device), angles.sin().float().to(device)


def qk_norm_rope_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def positions(tokens: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(0, 50, (tokens,), device=device).to(dtype)

    tables = {dim: rotary_tables(50, dim, device) for dim in (2, 62, 64, 100, 126, 128)}
    yield randn(0, 4, 64), randn(64), *tables[64], positions(0), 1e-6, False
    yield randn(1, 32, 128), randn(128), *tables[128], positions(1), 1e-6, False
    yield randn(3, 2, 63), randn(63), *tables[62], positions(3, torch.int64), 1e-6, False
    yield randn(5, 3, 100), None, *tables[100], None, 1e-6, False
    yield randn(4, 2, 127), randn(127).float(), *tables[126], positions(4), 1e-5, True
    yield randn(4, 2, 128), randn(128), *tables[64], positions(4), 1e-6, True
    yield randn(4, 2, 128), None, *tables[64], positions(4), 1e-6, False
    yield randn(2, 1, 2), None, *tables[2], None, 1e-6, True
    yield randn(6, 9, 128)[:, 2:5], randn(128), *tables[128], positions(6), 1e-6, False
    yield randn(3, 7, 100).transpose(0, 1)[..., 10:73], randn(63), *tables[62], positions(7), 1e-6, False
    wide_cos, wide_sin = torch.randn(2, 50, 128, device=device).unbind()
    yield randn(4, 3, 128), randn(128), wide_cos[:, :64], wide_sin[:, :64], positions(4), 1e-6, False


def split_qkv_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows `[q heads | k heads | v heads]` taken apart in one pass: `qk_norm_rope` (half-split) of Q and K, V moved.

    Args:
        qkv: `[T, (num_heads + 2 * num_kv_heads) * head_dim]`, float32, float16 or bfloat16; rows contiguous, any row
            stride.
        q_weight, k_weight: `[head_dim]`, contiguous, qkv's dtype or float32; None leaves that norm out.
        cos, sin, positions, eps: as in `qk_norm_rope`.

    Returns:
        q `[T, num_heads, head_dim]`, k and v `[T, num_kv_heads, head_dim]`: new contiguous tensors of qkv's dtype.

    Raises:
        RuntimeError: as `qk_norm_rope`; V does not depend on positions.
    """
    refuse_grad("split_qkv_norm_rope", qkv, q_weight, k_weight, cos, sin)
    return torch.ops.ferrum.split_qkv_norm_rope(
        qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim, eps
    )


def _check_split_qkv(
    op: str,
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    check_activation(op, "qkv", qkv)
    for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        expect(count >= 1, op, name, "at least 1", count)
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    expect(qkv.dim() == 2 and qkv.shape[1] == columns, op, "qkv", f"shape (*, {columns})", tuple(qkv.shape))
    rows = qkv.numel() == 0 or columns == 1 or qkv.stride(1) == 1
    expect(rows, op, "qkv", "a contiguous last dimension", f"strides {tuple(qkv.stride())}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_weight(op, name, weight, qkv, head_dim)
    _check_tables(op, qkv, head_dim, cos, sin, positions)


def _split_norm_rotate(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v from rows of the tables `[T, 1, R/2]`."""
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    return (
        _norm_rotate(q, q_weight, cos, sin, eps, False),
        _norm_rotate(k, k_weight, cos, sin, eps, False),
        v.clone(memory_format=torch.contiguous_format),
    )


def split_qkv_norm_rope_ref(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "split_qkv_norm_rope"
    _check_split_qkv(op, qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim)
    cos, sin = _table_rows(op, qkv.shape[0], cos, sin, positions)
    return _split_norm_rotate(qkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads, head_dim, eps)


def split_qkv_norm_rope_fake(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "split_qkv_norm_rope"
    _check_split_qkv(op, qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim)
    tokens = qkv.shape[0]
    return (
        qkv.new_empty((tokens, num_heads, head_dim)),
        qkv.new_empty((tokens, num_kv_heads, head_dim)),
        qkv.new_empty((tokens, num_kv_heads, head_dim)),
    )


def split_qkv_norm_rope_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def positions(tokens: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(0, 50, (tokens,), device=device).to(dtype)

    tables = {dim: rotary_tables(50, dim, device) for dim in (32, 62, 64, 128)}
    yield randn(0, 8 * 64), randn(64), randn(64), *tables[64], positions(0), 4, 2, 64, 1e-6
    yield randn(1, 40 * 128), randn(128), randn(128), *tables[128], positions(1), 32, 4, 128, 1e-6
    yield randn(5, 5 * 63), randn(63), None, *tables[62], positions(5, torch.int64), 3, 1, 63, 1e-6
    yield randn(3, 4 * 64), None, randn(64).float(), *tables[32], None, 2, 1, 64, 1e-5
    yield randn(7, 900)[:, 37:677], randn(64), randn(64), *tables[64], positions(7), 6, 2, 64, 1e-6


def split_qkv_norm_rope_paged_(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """`split_qkv_norm_rope` with K and V written straight to their slots of a paged pool.

    Args:
        qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim, eps: as there.
        k_cache, v_cache: contiguous `[num_blocks, block_size, num_kv_heads, head_dim]` of qkv's dtype; written.
        slot_mapping: int32 or int64 `[T]` as in `paged_kv_write_`; K and V of a token with slot -1 go nowhere.

    Returns:
        q, contiguous `[T, num_heads, head_dim]` of qkv's dtype.

    Raises:
        RuntimeError: as `split_qkv_norm_rope` and `paged_kv_write_`, before anything is written. On other devices a
            token with a slot outside the pool is written nowhere, and one with a position outside the tables leaves NaN
            in q and in its slot of `k_cache`.
    """
    refuse_grad("split_qkv_norm_rope_paged_", qkv, q_weight, k_weight, cos, sin, k_cache, v_cache)
    return torch.ops.ferrum.split_qkv_norm_rope_paged_(
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        positions,
        num_heads,
        num_kv_heads,
        head_dim,
        eps,
        k_cache,
        v_cache,
        slot_mapping,
    )


def _check_split_qkv_paged(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    op = "split_qkv_norm_rope_paged_"
    _check_split_qkv(op, qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim)
    check_caches(op, k_cache, v_cache, POOL_SHAPE)
    expect(k_cache.dtype == qkv.dtype, op, "k_cache", str(qkv.dtype), k_cache.dtype)
    fits = tuple(k_cache.shape[2:]) == (num_kv_heads, head_dim)
    expect(fits, op, "k_cache", f"shape (*, *, {num_kv_heads}, {head_dim})", tuple(k_cache.shape))
    check_slot_mapping(op, slot_mapping, qkv.shape[0])


def split_qkv_norm_rope_paged__ref(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    _check_split_qkv_paged(
        qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim, k_cache, v_cache, slot_mapping
    )
    op = "split_qkv_norm_rope_paged_"
    inside = inside_pool(op, slot_mapping, k_cache.shape[0] * k_cache.shape[1])
    table_rows = _table_rows(op, qkv.shape[0], cos, sin, positions)
    q, k, v = _split_norm_rotate(qkv, q_weight, k_weight, *table_rows, num_heads, num_kv_heads, head_dim, eps)
    for cache, new in ((k_cache, k), (v_cache, v)):
        write_rows(cache.flatten(0, 1), slot_mapping, inside, new)
    return q


def split_qkv_norm_rope_paged__fake(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    _check_split_qkv_paged(
        qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim, k_cache, v_cache, slot_mapping
    )
    return qkv.new_empty((qkv.shape[0], num_heads, head_dim))


def split_qkv_norm_rope_paged__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for case in split_qkv_norm_rope_inputs(device, dtype):
        tokens, (num_kv_heads, head_dim) = case[0].shape[0], case[7:9]
        caches = torch.randn(2, 3, 4, num_kv_heads, head_dim, device=device).to(dtype)
        slots = torch.randperm(12, device=device)[:tokens].int()
        yield *case, *caches.unbind(), slots.masked_fill(slots == 11, -1)


register("qk_norm_rope", ref=qk_norm_rope_ref, fake=qk_norm_rope_fake, inputs=qk_norm_rope_inputs)
register(
    "split_qkv_norm_rope",
    ref=split_qkv_norm_rope_ref,
    fake=split_qkv_norm_rope_fake,
    inputs=split_qkv_norm_rope_inputs,
)
register(
    "split_qkv_norm_rope_paged_",
    ref=split_qkv_norm_rope_paged__ref,
    fake=split_qkv_norm_rope_paged__fake,
    inputs=split_qkv_norm_rope_paged__inputs,
)
