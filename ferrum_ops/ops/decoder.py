"""The halves of a decoder layer over int4 weights, each as one op: what a model does with a token between two products
costs less than calling every part of it.

T tokens in B sequences of n, H hidden, Hq/Hkv heads of D, I expert width, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ferrum_ops._checks import expect
from ferrum_ops._library import refuse_grad, register
from ferrum_ops.ops.attention import attention_ref
from ferrum_ops.ops.int4 import ACTIVATIONS, int4_linear_ref, random_matrix
from ferrum_ops.ops.kv_cache import kv_append__ref
from ferrum_ops.ops.moe_gemm import moe_experts_int4_ref, random_experts
from ferrum_ops.ops.moe_routing import router_topk_softmax_ref
from ferrum_ops.ops.norm import fused_add_rms_norm_ref, rms_norm_ref
from ferrum_ops.ops.rope import rotary_tables, split_qkv_norm_rope_ref


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


def _check_attention(hidden: torch.Tensor, k_cache: torch.Tensor, num_heads: int) -> None:
    op = "decoder_attention_int4_"
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


def decoder_attention_int4__ref(
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
    _check_attention(hidden, k_cache, num_heads)
    batch, kv_heads, _, head_dim = k_cache.shape
    width = (num_heads + 2 * kv_heads) * head_dim
    normed = rms_norm_ref(hidden, norm_weight, eps)
    packed = (qkv, qkv_scales, qkv_zeros, qkv_perm, qkv_bias)
    rows = int4_linear_ref(normed, *packed, width, qkv_group_size, activation)
    heads = split_qkv_norm_rope_ref(rows, q_weight, k_weight, cos, sin, positions, num_heads, kv_heads, head_dim, eps)
    length = hidden.shape[0] // batch
    query, key, value = (h.reshape(batch, length, h.shape[1], head_dim) for h in heads)
    kv_append__ref(k_cache, v_cache, key, value, cache_lens)
    attended = attention_ref(query, k_cache, v_cache, cache_lens + length, scale)
    attended = attended.reshape(hidden.shape[0], num_heads * head_dim)
    packed = (o, o_scales, o_zeros, o_perm, o_bias)
    return int4_linear_ref(attended, *packed, hidden.shape[1], o_group_size, activation)


def decoder_attention_int4__fake(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_attention(hidden, rest[13], rest[23])
    return hidden.new_empty(hidden.shape)


def decoder_attention_int4__inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

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
            cos, sin = rotary_tables(16, head_dim // 2, device)
            starts = torch.tensor(lens)
            positions = (starts[:, None] + torch.arange(length)).flatten().to(device)
            yield (
                randn(batch * length, hidden_size),
                randn(hidden_size),
                1e-6,
                *qkv,
                randn(width) if biased else None,
                group,
                *((randn(head_dim), randn(head_dim)) if biased else (None, None)),
                cos,
                sin,
                positions,
                randn(batch, kv_heads, capacity, head_dim),
                randn(batch, kv_heads, capacity, head_dim),
                starts.to(device, torch.int32),
                head_dim**-0.5,
                *o,
                randn(hidden_size) if biased else None,
                group,
                heads,
                activation,
            )


def decoder_experts_int4_ref(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    router_weight: torch.Tensor,
    top_k: int,
    renormalize: bool,
    *experts: Any,
) -> torch.Tensor:
    op = "decoder_experts_int4"
    expect(attended.dim() == 2, op, "attended", "shape (*, *)", tuple(attended.shape))
    normed, total = fused_add_rms_norm_ref(attended, residual, norm_weight, eps)
    _, ids, weights = router_topk_softmax_ref(normed, router_weight, top_k, renormalize)
    return total + moe_experts_int4_ref(normed, ids, weights, *experts)


def decoder_experts_int4_fake(attended: torch.Tensor, *_: Any) -> torch.Tensor:
    expect(attended.dim() == 2, "decoder_experts_int4", "attended", "shape (*, *)", tuple(attended.shape))
    return attended.new_empty(attended.shape)


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
            # Token t is large in the channels of its experts, so that rounding decides no choice of experts.
            router = torch.zeros(experts, hidden_size)
            router[torch.arange(hidden_size) % experts, torch.arange(hidden_size)] = 1.0
            attended = torch.randn(tokens, hidden_size, generator=g)
            favour = torch.stack([torch.randperm(experts, generator=g) for _ in range(tokens)] or [router[:, 0]])
            residual = attended.abs() + favour[:tokens].float() @ router if tokens else attended
            yield (
                attended.to(device, dtype),
                residual.to(device, dtype),
                torch.ones(hidden_size).to(device, dtype),
                1e-6,
                router.to(device, dtype),
                top_k,
                True,
                *weights,
                activation,
            )


register(
    "decoder_attention_int4_",
    ref=decoder_attention_int4__ref,
    fake=decoder_attention_int4__fake,
    inputs=decoder_attention_int4__inputs,
)
register(
    "decoder_experts_int4",
    ref=decoder_experts_int4_ref,
    fake=decoder_experts_int4_fake,
    inputs=decoder_experts_int4_inputs,
)
