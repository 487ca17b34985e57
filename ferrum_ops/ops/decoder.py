"""The halves of a decoder layer over int4 weights or GGUF blocks, each as one op: what a model does with a token
between two products costs less than calling every part of it.

T tokens in B sequences of n, H hidden, Hq/Hkv heads of D, I expert width, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ferrum_ops._checks import expect
from ferrum_ops._library import refuse_grad, register
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import GGMLType
from ferrum_ops.formats.gguf_tiles import TILED
from ferrum_ops.ops.attention import attention_ref
from ferrum_ops.ops.gguf import (
    gguf_linear_ref,
    moe_experts_gguf_ref,
    num_rows,
    random_stack,
    random_tile_stack,
    random_tiles,
)
from ferrum_ops.ops.int4 import ACTIVATIONS, int4_linear_ref, random_matrix
from ferrum_ops.ops.kv_cache import kv_append__ref
from ferrum_ops.ops.moe_gemm import moe_experts_int4_ref, random_experts
from ferrum_ops.ops.moe_routing import router_topk_softmax_ref
from ferrum_ops.ops.norm import fused_add_rms_norm_ref, rms_norm_ref
from ferrum_ops.ops.rope import rotary_tables, split_qkv_norm_rope_ref


def decoder_attention_gguf_(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: Sequence[torch.Tensor],
    qkv_types: Sequence[int],
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    scale: float,
    o: Sequence[torch.Tensor],
    o_types: Sequence[int],
    num_heads: int,
    activation: str,
) -> torch.Tensor:
    """The attention half of a layer over GGUF blocks, `[T, H] -> [T, H]`: `decoder_attention_int4_` with the bits of
    `gguf_linear` in place of `int4_linear`.

    Args:
        qkv, qkv_types: as `gguf_linear` takes them: matrices side by side, of `(Hq + 2 Hkv) * D` rows together.
        o, o_types: the same, of H rows together.

    The other arguments, and errors, are those of `decoder_attention_int4_`.
    """
    refuse_grad("decoder_attention_gguf_", hidden, norm_weight, q_weight, k_weight, k_cache, v_cache)
    return torch.ops.ferrum.decoder_attention_gguf_(
        hidden,
        norm_weight,
        eps,
        qkv,
        qkv_types,
        q_weight,
        k_weight,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        cache_lens,
        scale,
        o,
        o_types,
        num_heads,
        activation,
    )


def decoder_attention_int4_(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: torch.Tensor,
    qkv_scales: torch.Tensor,
    qkv_zeros: torch.Tensor | None,
    qkv_perm: torch.Tensor | None,
    qkv_bias: torch.Tensor | None,
    qkv_group_size: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    scale: float,
    o: torch.Tensor,
    o_scales: torch.Tensor,
    o_zeros: torch.Tensor | None,
    o_perm: torch.Tensor | None,
    o_bias: torch.Tensor | None,
    o_group_size: int,
    num_heads: int,
    activation: str,
) -> torch.Tensor:
    """The attention half of a layer, `[T, H] -> [T, H]`, without the addition of the residual.

    The bits of `rms_norm`, `int4_linear`, `split_qkv_norm_rope`, `kv_append_`, `attention` (causal, no window) and
    `int4_linear` one after the other; tensors are as those ops take them. eps is that of all three norms.

    Args:
        hidden: `[T, H]`, contiguous, T = B * n; sequence b has rows `b*n` to `(b+1)*n - 1`.
        qkv, qkv_scales, qkv_zeros, qkv_perm, qkv_bias: weights of `(Hq + 2 Hkv) * D` columns.
        q_weight, k_weight: `[D]` of the norms of heads, or None for none.
        cos, sin, positions: as in `split_qkv_norm_rope`.
        k_cache, v_cache: `[B, Hkv, capacity, D]`, contiguous; written from `cache_lens` on.
        cache_lens: int32 `[B]`, tokens of each sequence held before.
        o, o_scales, o_zeros, o_perm, o_bias: weights of H columns.
        num_heads: Hq.
        activation: "int8" or "full", of both products.

    Raises:
        RuntimeError: in the name of the op whose argument does not fit. Rows of the caches behind `cache_lens` may be
            written by then.
    """
    refuse_grad("decoder_attention_int4_", hidden, norm_weight, q_weight, k_weight, k_cache, v_cache)
    return torch.ops.ferrum.decoder_attention_int4_(
        hidden,
        norm_weight,
        eps,
        qkv,
        qkv_scales,
        qkv_zeros,
        qkv_perm,
        qkv_bias,
        qkv_group_size,
        q_weight,
        k_weight,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        cache_lens,
        scale,
        o,
        o_scales,
        o_zeros,
        o_perm,
        o_bias,
        o_group_size,
        num_heads,
        activation,
    )


def decoder_experts_gguf(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    router_weight: torch.Tensor,
    top_k: int,
    renormalize: bool,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    types: Sequence[int],
    activation: str,
) -> torch.Tensor:
    """The half of a layer behind attention over GGUF blocks, `[T, H] -> [T, H]`: `decoder_experts_int4` with the bits
    of `moe_experts_gguf` in place of `moe_experts_int4`.

    Args:
        gate, up, down, types: as in `moe_experts_gguf`.

    The other arguments, and errors, are those of `decoder_experts_int4`.
    """
    refuse_grad("decoder_experts_gguf", attended, residual, norm_weight, router_weight)
    return torch.ops.ferrum.decoder_experts_gguf(
        attended,
        residual,
        norm_weight,
        eps,
        router_weight,
        top_k,
        renormalize,
        gate,
        up,
        down,
        types,
        activation,
    )


def decoder_experts_int4(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    router_weight: torch.Tensor,
    top_k: int,
    renormalize: bool,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_zeros: torch.Tensor | None,
    w13_perm: torch.Tensor | None,
    w13_group_size: int,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_zeros: torch.Tensor | None,
    w2_perm: torch.Tensor | None,
    w2_group_size: int,
    intermediate_size: int,
    activation: str,
) -> torch.Tensor:
    """The half of a layer behind attention, `[T, H] -> [T, H]`: s + experts(norm(s)) with s = attended + residual.

    The bits of `fused_add_rms_norm`, `router_topk_softmax`, `moe_experts_int4` and an addition one after the other;
    tensors are as those ops take them.

    Args:
        attended, residual: `[T, H]`, attended contiguous.
        norm_weight, eps: of the norm.
        router_weight, top_k, renormalize: as in `router_topk_softmax`.
        w13, w2: and what follows, as in `moe_experts_int4`.

    Raises:
        RuntimeError: in the name of the op whose argument does not fit.
    """
    refuse_grad("decoder_experts_int4", attended, residual, norm_weight, router_weight)
    return torch.ops.ferrum.decoder_experts_int4(
        attended,
        residual,
        norm_weight,
        eps,
        router_weight,
        top_k,
        renormalize,
        w13,
        w13_scales,
        w13_zeros,
        w13_perm,
        w13_group_size,
        w2,
        w2_scales,
        w2_zeros,
        w2_perm,
        w2_group_size,
        intermediate_size,
        activation,
    )


#: Rows, and how many columns their product has, to the product.
Multiply = Callable[[torch.Tensor, int], torch.Tensor]


def _check_attention(op: str, hidden: torch.Tensor, k_cache: torch.Tensor, num_heads: int) -> None:
    expect(hidden.dim() == 2, op, "hidden", "shape (*, *)", tuple(hidden.shape))
    expect(
        k_cache.dim() == 4 and k_cache.shape[0] >= 1,
        op,
        "k_cache",
        "shape (batch, kv_heads, capacity, head_dim) with a batch of at least 1",
        tuple(k_cache.shape),
    )
    tokens, batch = hidden.shape[0], k_cache.shape[0]
    expect(tokens % batch == 0, op, "hidden", f"as many tokens for each of {batch} sequences", tokens)
    expect(num_heads >= 1, op, "num_heads", "at least 1", num_heads)


def _attention_half(
    op: str,
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    multiply_qkv: Multiply,
    multiply_o: Multiply,
    num_heads: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    _check_attention(op, hidden, k_cache, num_heads)
    batch, kv_heads, _, head_dim = k_cache.shape
    rows = multiply_qkv(rms_norm_ref(hidden, norm_weight, eps), (num_heads + 2 * kv_heads) * head_dim)
    heads = split_qkv_norm_rope_ref(rows, q_weight, k_weight, cos, sin, positions, num_heads, kv_heads, head_dim, eps)
    length = hidden.shape[0] // batch
    query, key, value = (h.reshape(batch, length, h.shape[1], head_dim) for h in heads)
    kv_append__ref(k_cache, v_cache, key, value, cache_lens)
    attended = attention_ref(query, k_cache, v_cache, cache_lens + length, scale)
    return multiply_o(attended.reshape(hidden.shape[0], num_heads * head_dim), hidden.shape[1])


def _check_rows(op: str, name: str, blocks: Sequence[torch.Tensor], types: Sequence[int], expected: int) -> None:
    rows = sum(num_rows(b.shape[0], t) for b, t in zip(blocks, types))
    expect(rows == expected, op, name, f"{expected} rows of weights", rows)


def _gguf_product(
    op: str, name: str, blocks: Sequence[torch.Tensor], types: Sequence[int], activation: str
) -> Multiply:
    def multiply(rows: torch.Tensor, columns: int) -> torch.Tensor:
        _check_rows(op, name, blocks, types, columns)
        return gguf_linear_ref(rows, blocks, types, None, activation)

    return multiply


def _int4_product(weights: Sequence[Any], activation: str) -> Multiply:
    packed, scales, zeros, perm, bias, group_size = weights

    def multiply(rows: torch.Tensor, columns: int) -> torch.Tensor:
        return int4_linear_ref(rows, packed, scales, zeros, perm, bias, columns, group_size, activation)

    return multiply


def decoder_attention_gguf__ref(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: Sequence[torch.Tensor],
    qkv_types: Sequence[int],
    *rest: Any,
) -> torch.Tensor:
    op, heads, (o, o_types, num_heads, activation) = "decoder_attention_gguf_", rest[:9], rest[9:]
    multiply_qkv = _gguf_product(op, "qkv", qkv, qkv_types, activation)
    multiply_o = _gguf_product(op, "o", o, o_types, activation)
    return _attention_half(op, hidden, norm_weight, eps, multiply_qkv, multiply_o, num_heads, *heads)


def decoder_attention_gguf__fake(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: Sequence[torch.Tensor],
    qkv_types: Sequence[int],
    *rest: Any,
) -> torch.Tensor:
    op, k_cache, (o, o_types, num_heads) = "decoder_attention_gguf_", rest[5], rest[9:12]
    _check_attention(op, hidden, k_cache, num_heads)
    _check_rows(op, "qkv", qkv, qkv_types, (num_heads + 2 * k_cache.shape[1]) * k_cache.shape[3])
    _check_rows(op, "o", o, o_types, hidden.shape[1])
    return hidden.new_empty(hidden.shape)


def decoder_attention_int4__ref(
    hidden: torch.Tensor, norm_weight: torch.Tensor, eps: float, *rest: Any
) -> torch.Tensor:
    qkv, heads, o, (num_heads, activation) = rest[:6], rest[6:15], rest[15:21], rest[21:]
    products = _int4_product(qkv, activation), _int4_product(o, activation)
    return _attention_half("decoder_attention_int4_", hidden, norm_weight, eps, *products, num_heads, *heads)


def decoder_attention_int4__fake(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_attention("decoder_attention_int4_", hidden, rest[13], rest[23])
    return hidden.new_empty(hidden.shape)


def _randn(g: torch.Generator, device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=g).to(device, dtype)


def _random_heads(
    g: torch.Generator,
    device: str,
    dtype: torch.dtype,
    length: int,
    kv_heads: int,
    head_dim: int,
    lens: Sequence[int],
    capacity: int,
    normed: bool,
) -> tuple[Any, ...]:
    """The arguments from `q_weight` to `scale`, of `length` tokens in each sequence."""
    norms = [_randn(g, device, dtype, head_dim) if normed else None for _ in range(2)]
    starts = torch.tensor(lens)
    positions = (starts[:, None] + torch.arange(length)).flatten().to(device)
    caches = [_randn(g, device, dtype, len(lens), kv_heads, capacity, head_dim) for _ in range(2)]
    tables = rotary_tables(16, head_dim // 2, device)
    return (*norms, *tables, positions, *caches, starts.to(device, torch.int32), head_dim**-0.5)


def decoder_attention_gguf__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    q4_k, q6_k, q8_0 = GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0
    tiles = [q4_k + TILED, q4_k + TILED, q6_k + TILED]
    cases: tuple[tuple[Any, ...], ...] = (
        # B, n, H, Hq, Hkv, D, lengths before, capacity, types of q, k and v, type of o, norms of heads
        (1, 1, 256, 4, 2, 64, (5,), 9, tiles, q4_k + TILED, True),
        (2, 3, 256, 2, 1, 128, (0, 4), 7, [q4_k, q4_k, q6_k], q8_0 + TILED, False),
        (3, 1, 64, 3, 1, 32, (2, 0, 6), 7, [q8_0, q8_0, GGMLType.Q5_0], GGMLType.Q4_0, True),
        (2, 0, 32, 2, 1, 16, (1, 2), 4, [q8_0] * 3, q8_0, False),
    )

    def matrix(type: int, rows: int, in_features: int, seed: int) -> torch.Tensor:
        random = random_tiles if type >= TILED else formats.random_blocks
        return random(type % TILED, rows, in_features, seed=seed).to(device)

    for batch, length, hidden_size, heads, kv_heads, head_dim, lens, capacity, types, o_type, normed in cases:
        rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        for activation in ACTIVATIONS:
            yield (
                _randn(g, device, dtype, batch * length, hidden_size),
                _randn(g, device, dtype, hidden_size),
                1e-6,
                [matrix(t, n, hidden_size, seed) for seed, (t, n) in enumerate(zip(types, rows))],
                [int(t) for t in types],
                *_random_heads(g, device, dtype, length, kv_heads, head_dim, lens, capacity, normed),
                [matrix(o_type, hidden_size, heads * head_dim, 3)],
                [int(o_type)],
                heads,
                activation,
            )


def decoder_attention_int4__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    cases = (
        # B, n, H, Hq, Hkv, D, lengths before, capacity, group size, act-order and zeros, bias and norms of heads
        (1, 1, 64, 4, 2, 16, (5,), 9, 32, False, True),
        (2, 3, 72, 2, 2, 24, (0, 4), 7, 8, True, False),
        (3, 1, 40, 3, 1, 8, (2, 0, 6), 7, 16, False, True),
        (2, 0, 32, 2, 1, 16, (1, 2), 4, 16, False, False),
    )
    for batch, length, hidden_size, heads, kv_heads, head_dim, lens, capacity, group, ordered, biased in cases:
        width = (heads + 2 * kv_heads) * head_dim
        for activation in ACTIVATIONS:
            qkv = random_matrix(hidden_size, width, group, asymmetric=ordered, act_order=ordered, device=device)
            o = random_matrix(heads * head_dim, hidden_size, group, asymmetric=ordered, device=device, seed=1)
            yield (
                _randn(g, device, dtype, batch * length, hidden_size),
                _randn(g, device, dtype, hidden_size),
                1e-6,
                *qkv,
                _randn(g, device, dtype, width) if biased else None,
                group,
                *_random_heads(g, device, dtype, length, kv_heads, head_dim, lens, capacity, biased),
                *o,
                _randn(g, device, dtype, hidden_size) if biased else None,
                group,
                heads,
                activation,
            )


def _check_attended(op: str, attended: torch.Tensor) -> None:
    expect(attended.dim() == 2, op, "attended", "shape (*, *)", tuple(attended.shape))


def _experts_half(
    op: str,
    run_experts: Callable[..., torch.Tensor],
    attended: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    router_weight: torch.Tensor,
    top_k: int,
    renormalize: bool,
    *experts: Any,
) -> torch.Tensor:
    _check_attended(op, attended)
    normed, total = fused_add_rms_norm_ref(attended, residual, norm_weight, eps)
    _, ids, weights = router_topk_softmax_ref(normed, router_weight, top_k, renormalize)
    return total + run_experts(normed, ids, weights, *experts)


def decoder_experts_gguf_ref(*args: Any) -> torch.Tensor:
    return _experts_half("decoder_experts_gguf", moe_experts_gguf_ref, *args)


def decoder_experts_int4_ref(*args: Any) -> torch.Tensor:
    return _experts_half("decoder_experts_int4", moe_experts_int4_ref, *args)


def decoder_experts_gguf_fake(attended: torch.Tensor, *_: Any) -> torch.Tensor:
    _check_attended("decoder_experts_gguf", attended)
    return attended.new_empty(attended.shape)


def decoder_experts_int4_fake(attended: torch.Tensor, *_: Any) -> torch.Tensor:
    _check_attended("decoder_experts_int4", attended)
    return attended.new_empty(attended.shape)


def _random_routed(
    g: torch.Generator, device: str, dtype: torch.dtype, tokens: int, top_k: int, experts: int, hidden_size: int
) -> tuple[Any, ...]:
    """The arguments from `attended` to `renormalize`.

    Token t is large in the channels of its experts, so that rounding decides no choice of experts.
    """
    router = torch.zeros(experts, hidden_size)
    router[torch.arange(hidden_size) % experts, torch.arange(hidden_size)] = 1.0
    attended = torch.randn(tokens, hidden_size, generator=g)
    favour = torch.stack([torch.randperm(experts, generator=g) for _ in range(tokens)] or [router[:, 0]])
    residual = attended.abs() + favour[:tokens].float() @ router if tokens else attended
    rows, ones = (attended.to(device, dtype), residual.to(device, dtype)), torch.ones(hidden_size)
    return (*rows, ones.to(device, dtype), 1e-6, router.to(device, dtype), top_k, True)


def decoder_experts_gguf_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    q4_k, q6_k, q8_0 = GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0
    cases = (
        # T, K, E, H, I, types of gate, up and down
        (1, 2, 4, 256, 256, (q4_k + TILED, q4_k + TILED, q6_k + TILED)),
        (5, 2, 4, 256, 96, (q4_k, GGMLType.Q5_K, q8_0)),
        (9, 1, 3, 96, 32, (q8_0, GGMLType.Q5_0, GGMLType.IQ4_NL)),
        (0, 2, 3, 64, 32, (q8_0, q8_0, q8_0)),
    )
    for tokens, top_k, experts, hidden_size, width, types in cases:
        shapes = ((width, hidden_size), (width, hidden_size), (hidden_size, width))
        stacks = [
            (random_tile_stack if t >= TILED else random_stack)(t % TILED, experts, *shape, seed).to(device)
            for seed, (t, shape) in enumerate(zip(types, shapes))
        ]
        for activation in ACTIVATIONS:
            routed = _random_routed(g, device, dtype, tokens, top_k, experts, hidden_size)
            yield (*routed, *stacks, [int(t) for t in types], activation)


def decoder_experts_int4_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    cases = (
        # T, K, E, H, I, group size, asymmetric, perm parts
        (1, 2, 4, 128, 48, 64, False, 0),
        (5, 2, 4, 72, 40, 8, True, 0),
        (9, 1, 3, 64, 24, 32, False, 1),
        (0, 2, 3, 64, 16, 32, False, 0),
    )
    for tokens, top_k, experts, hidden_size, intermediate_size, group, asymmetric, parts in cases:
        weights = random_experts(
            experts, hidden_size, intermediate_size, group, asymmetric=asymmetric, perm_parts=parts, device=device
        )
        for activation in ACTIVATIONS:
            yield (*_random_routed(g, device, dtype, tokens, top_k, experts, hidden_size), *weights, activation)


register(
    "decoder_attention_gguf_",
    ref=decoder_attention_gguf__ref,
    fake=decoder_attention_gguf__fake,
    inputs=decoder_attention_gguf__inputs,
)
register(
    "decoder_attention_int4_",
    ref=decoder_attention_int4__ref,
    fake=decoder_attention_int4__fake,
    inputs=decoder_attention_int4__inputs,
)
register(
    "decoder_experts_gguf",
    ref=decoder_experts_gguf_ref,
    fake=decoder_experts_gguf_fake,
    inputs=decoder_experts_gguf_inputs,
)
register(
    "decoder_experts_int4",
    ref=decoder_experts_int4_ref,
    fake=decoder_experts_int4_fake,
    inputs=decoder_experts_int4_inputs,
)
