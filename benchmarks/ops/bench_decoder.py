"""The halves of a decoder layer of Qwen3-30B-A3B over int4 weights, `decoder_attention_int4_` and
`decoder_experts_int4`, and over GGUF blocks, `decoder_attention_gguf_` and `decoder_experts_gguf`, as one op each and
as calls of their parts ("eager").

`python benchmarks/ops/bench_decoder.py [--dtype bfloat16]`

Weights are wherever the call before left them: at few tokens the difference is what calling every part costs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import ferrum_ops
from benchmarks.ops.bench_int4 import GROUP_SIZE, random_packed
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import GGMLType
from ferrum_ops.formats.gguf_tiles import TILED
from ferrum_ops.ops.gguf import random_stack
from ferrum_ops.ops.rope import rotary_tables
from ferrum_ops.testing.timing import Case, bytes_of, main

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 2048, 32, 4, 128, 768
EXPERTS, TOP_K = 8, 2  # few, so that they stay in the cache
HELD, CAPACITY = 64, 1024
TOKENS = (1, 8)
OPS = torch.ops.ferrum


def int4_product(rows: torch.Tensor, weights: tuple[Any, ...], columns: int) -> torch.Tensor:
    *tensors, group_size = weights
    return OPS.int4_linear(rows, *tensors, columns, group_size, "int8")


def gguf_product(rows: torch.Tensor, weights: tuple[Any, ...], columns: int) -> torch.Tensor:
    return OPS.gguf_linear(rows, *weights, None, "int8")


def int4_matrices() -> tuple[tuple[Any, ...], ...]:
    shapes = (((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), (HIDDEN, HEADS * HEAD_DIM))
    return tuple((*random_packed(*shape), None, None, None, GROUP_SIZE) for shape in shapes)


def gguf_matrices() -> tuple[tuple[Any, ...], ...]:
    """Tiles of Q4_K, with v in Q6_K."""
    width, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    q, k, o = (random_tiles(GGMLType.Q4_K, *shape) for shape in ((width, HIDDEN), (kv, HIDDEN), (HIDDEN, width)))
    q4_k, q6_k = GGMLType.Q4_K + TILED, GGMLType.Q6_K + TILED
    return ([q, k, random_tiles(GGMLType.Q6_K, kv, HIDDEN)], [q4_k, q4_k, q6_k]), ([o], [q4_k])


def random_tiles(type: GGMLType, rows: int, in_features: int) -> torch.Tensor:
    return ferrum_ops.gguf_pack(formats.random_blocks(type, rows, in_features), type)


def tensor_bytes(arguments: Any) -> int:
    return bytes_of(*(a for a in tree_leaves(arguments) if isinstance(a, torch.Tensor)))


def attention_case(
    op: str,
    qkv: tuple[Any, ...],
    o: tuple[Any, ...],
    multiply: Callable[..., torch.Tensor],
    tokens: int,
    dtype: torch.dtype,
) -> Case:
    """A token for each of so many sequences. qkv, o: what the op takes of a matrix; multiply(rows, that, columns)."""
    hidden, ones = torch.randn(tokens, HIDDEN).to(dtype), torch.ones(HIDDEN).to(dtype)
    head = torch.ones(HEAD_DIM).to(dtype)
    tables = rotary_tables(tokens, HEAD_DIM)
    caches = [torch.randn(tokens, KV_HEADS, CAPACITY, HEAD_DIM).to(dtype) for _ in range(2)]
    lens, scale = torch.full((tokens,), HELD, dtype=torch.int32), HEAD_DIM**-0.5
    arguments = (hidden, ones, 1e-6, *qkv, head, head, *tables, None, *caches, lens, scale, *o, HEADS, "int8")

    def parts() -> torch.Tensor:
        normed = OPS.rms_norm(hidden, ones, 1e-6)
        rows = multiply(normed, qkv, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        split = OPS.split_qkv_norm_rope(rows, head, head, *tables, None, HEADS, KV_HEADS, HEAD_DIM, 1e-6)
        q, k, v = (t.view(tokens, 1, -1, HEAD_DIM) for t in split)
        OPS.kv_append_(*caches, k, v, lens)
        attended = OPS.attention(q, *caches, lens + 1, scale).view(tokens, -1)
        return multiply(attended, o, HIDDEN)

    keys = 2 * tokens * KV_HEADS * (HELD + 1) * HEAD_DIM * hidden.element_size()
    moved = tensor_bytes((qkv, o)) + keys
    # What attention gives is rounded to int8, where the oracle's last bits may choose another step.
    return Case(op, f"T={tokens} kv={HELD}", arguments, moved, parts, bound=3e-2)


def int4_experts() -> tuple[Any, ...]:
    w13, w13_scales = (t.unflatten(0, (EXPERTS, -1)) for t in random_packed(EXPERTS * 2 * WIDTH))
    w2, w2_scales = (t.unflatten(0, (EXPERTS, -1)) for t in random_packed(EXPERTS * HIDDEN, WIDTH))
    return (w13, w13_scales, None, None, GROUP_SIZE, w2, w2_scales, None, None, GROUP_SIZE, WIDTH, "int8")


def gguf_experts() -> tuple[Any, ...]:
    """Tiles of Q4_K, with down in Q6_K."""
    types = (GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q6_K)
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    stacks = [ferrum_ops.gguf_pack(random_stack(t, EXPERTS, *shape), t) for t, shape in zip(types, shapes)]
    return (*stacks, [t + TILED for t in types], "int8")


def experts_case(
    op: str, experts: tuple[Any, ...], run: Callable[..., torch.Tensor], tokens: int, dtype: torch.dtype
) -> Case:
    attended, residual = (torch.randn(tokens, HIDDEN).to(dtype) for _ in range(2))
    ones, router = torch.ones(HIDDEN).to(dtype), torch.randn(EXPERTS, HIDDEN).to(dtype)
    arguments = (attended, residual, ones, 1e-6, router, TOP_K, True, *experts)

    def parts() -> torch.Tensor:
        normed, total = OPS.fused_add_rms_norm(attended, residual, ones, 1e-6)
        _, ids, weights = OPS.router_topk_softmax(normed, router, TOP_K, True)
        return total + run(normed, ids, weights, *experts)

    # The experts' intermediate is rounded to int8, and in 16 bits so is the norm before the router.
    return Case(op, f"T={tokens} E={EXPERTS}", arguments, tensor_bytes((experts, router)), parts, bound=3e-2)


def cases(dtype: torch.dtype = torch.float32, token_counts: Sequence[int] = TOKENS) -> Iterator[Case]:
    for tokens in token_counts:
        yield attention_case("decoder_attention_int4_", *int4_matrices(), int4_product, tokens, dtype)
        yield experts_case("decoder_experts_int4", int4_experts(), OPS.moe_experts_int4, tokens, dtype)
        yield attention_case("decoder_attention_gguf_", *gguf_matrices(), gguf_product, tokens, dtype)
        yield experts_case("decoder_experts_gguf", gguf_experts(), OPS.moe_experts_gguf, tokens, dtype)


if __name__ == "__main__":
    main(cases, __doc__)
