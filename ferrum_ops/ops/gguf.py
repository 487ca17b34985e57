"""Products with GGUF blocks as files hold them (`ferrum_ops.formats.gguf`), and their dequantisation.

Every op also takes the blocks in tiles of 16 rows (`gguf_pack`), where `[..., N, bytes]` stands below: the type is then
`type + TILED` and the tensor `[..., N/16, bytes of a tile]`. Products with activation "int8" have the same bits.

T rows, K in-features, N out-features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ferrum_ops._library import refuse_grad, register
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats import gguf_tiles
from ferrum_ops.formats.gguf import BLOCK_SIZES, FLOAT_TYPES, QUANTIZED_TYPES, GGMLType
from ferrum_ops.formats.gguf_tiles import TILED
from ferrum_ops.ops.int4 import ACTIVATIONS, check_activation, compute_dtype, quantize_activations


def gguf_dequantize(blocks: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    """Packed rows of any ggml type in `ferrum_ops.formats.gguf.GGMLType` as dense weights.

    blocks uint8 `[..., bytes]`, contiguous, whole blocks in the last dimension. The weights are those of ggml in
    float32, rounded once to dtype: float32, float16 or bfloat16.

    Returns `[..., K]` of dtype. Raises RuntimeError naming the argument for anything else.
    """
    return torch.ops.ferrum.gguf_dequantize(blocks, type, dtype)


def gguf_pack(blocks: torch.Tensor, type: int) -> torch.Tensor:
    """Packed rows in the order that products read fastest: tiles of 16 rows (layout: csrc/common/gguf.h).

    blocks uint8 `[..., N, bytes]`, contiguous, of a quantised ggml type; N a multiple of 16, K of 256. A tile has about
    as many bytes as its rows: as many for the types of 32 elements, 1 to 6 % more for those of 256 (Q2_K: 19 %).
    `gguf_dequantize` of both gives the same weights.

    Returns uint8 `[..., N/16, bytes of a tile]`, whose type is `type + ferrum_ops.formats.gguf_tiles.TILED`. Raises
    RuntimeError naming the argument for anything else.
    """
    return torch.ops.ferrum.gguf_pack(blocks, type)


def gguf_linear(
    x: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    types: Sequence[int],
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """`x @ concat(w_0, w_1, ...).T + bias` with weights in GGUF blocks: one or more matrices of one input, each of its
    own type, outputs side by side.

    x float32, float16 or bfloat16 `[..., K]`, contiguous; blocks[i] uint8 `[N_i, bytes]`, rows of types[i]; K is a
    multiple of every type's block. types are ggml's numbers of quantised types; bias `[sum N_i]` of any floating dtype.

    activation "int8": x is rounded to symmetric int8 for each block of the weights (of 256, or of 32 elements), as
    `int4_linear` does for its groups. Products inside a block are exact integers; blocks are added in ascending order
    in fp32, those of 32 elements by eights. The result has the same bits on every instruction level, for any number of
    threads and whatever else is in the batch. NaN or infinity in a row of x makes its row of the result NaN.
    activation "full": x is kept in fp32 and fp32 sums are taken; the same bits for any number of threads and batch.

    Returns `[..., sum N_i]` of x's dtype. Raises RuntimeError naming the argument for anything else. No gradients.
    """
    refuse_grad("gguf_linear", x, bias)
    return torch.ops.ferrum.gguf_linear(x, blocks, types, bias, activation)


def gguf_moe_linear(
    x: torch.Tensor, blocks: torch.Tensor, type: int, topk_ids: torch.Tensor, activation: str
) -> torch.Tensor:
    """`x @ w[id].T` for every (token, slot) pair with stacked experts in GGUF blocks.

    x float32, float16 or bfloat16, contiguous: `[T, K]`, the same for all slots of a token (gate and up), or
    `[T, slots, K]` (down); blocks uint8 `[E, N, bytes]` of ggml's quantised type; topk_ids int32 `[T, slots]`. Rows of
    ids outside `[0, E)` are 0. activation as in `gguf_linear`.

    Returns `[T, slots, N]` of x's dtype. Raises RuntimeError naming the argument for anything else. No gradients.
    """
    refuse_grad("gguf_moe_linear", x)
    return torch.ops.ferrum.gguf_moe_linear(x, blocks, type, topk_ids, activation)


def moe_experts_gguf(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    types: Sequence[int],
    activation: str,
) -> torch.Tensor:
    """A whole block of experts in GGUF blocks: `out[t] = sum_k weights[t, k] * down(silu(gate(h)) * up(h))` with the
    projections of expert `topk_ids[t, k]`.

    hidden float32, float16 or bfloat16 `[T, H]`; topk_ids int32 and topk_weights float32 `[T, slots]`, ids outside
    `[0, E)` are skipped; gate and up uint8 `[E, I, bytes of H weights]`, down uint8 `[E, H, bytes of I weights]`, all
    contiguous; types are ggml's numbers of the three. activation as in `gguf_linear`, applied to hidden and to the
    product that goes into `down`. A token's experts are added in ascending order in fp32, so that the result does not
    depend on the number of threads or on the other tokens.

    Returns `[T, H]` of hidden's dtype. Raises RuntimeError naming the argument for anything else. No gradients.
    """
    refuse_grad("moe_experts_gguf", hidden, topk_weights)
    return torch.ops.ferrum.moe_experts_gguf(hidden, topk_ids, topk_weights, gate, up, down, types, activation)


def check_type(op: str, name: str, type: int) -> GGMLType:
    """ggml's type, of rows or of tiles."""
    if (type - TILED not in QUANTIZED_TYPES) if type >= TILED else type not in BLOCK_SIZES:
        raise RuntimeError(
            f"[{op}] {name}: expected a ggml type that ferrum_ops.formats.gguf.GGMLType lists, got {int(type)}"
        )
    return GGMLType(type % TILED)


def dequantize(blocks: torch.Tensor, type: int) -> torch.Tensor:
    """Rows or tiles to float32 `[..., N, K]`."""
    if type >= TILED:
        return gguf_tiles.dequantize(blocks, type - TILED)
    return formats.dequantize(blocks, type)


def num_rows(count: int, type: int) -> int:
    """Rows in `count` packed rows, or in as many tiles."""
    return count * gguf_tiles.ROWS if type >= TILED else count


def in_features(blocks: torch.Tensor, type: int) -> int:
    if type >= TILED:
        return blocks.shape[-1] // gguf_tiles.TILINGS[type - TILED].chunk_bytes * gguf_tiles.CHUNK
    return formats.row_elements(type, blocks.shape[-1])


def gguf_dequantize_ref(blocks: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    check_type("gguf_dequantize", "type", type)
    return dequantize(blocks, type).to(dtype)


def gguf_dequantize_fake(blocks: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    rows = (num_rows(blocks.shape[-2], type),) if type >= TILED else blocks.shape[-2:-1]
    return blocks.new_empty(*blocks.shape[:-2], *rows, in_features(blocks, type), dtype=dtype)


def gguf_dequantize_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for type in GGMLType:
        in_features = 100 if type in FLOAT_TYPES else BLOCK_SIZES[type][0] * 3
        yield formats.random_blocks(type, 3, in_features).to(device), int(type), dtype
        if type in QUANTIZED_TYPES:
            yield random_tiles(type, 32, 512).to(device), type + TILED, dtype
    yield formats.random_blocks(GGMLType.Q6_K, 4, 256).reshape(2, 2, -1).to(device), int(GGMLType.Q6_K), dtype
    yield torch.empty(0, 288, dtype=torch.uint8, device=device), int(GGMLType.Q4_K), dtype


def gguf_pack_ref(blocks: torch.Tensor, type: int) -> torch.Tensor:
    return gguf_tiles.pack(blocks, check_type("gguf_pack", "type", type))


def gguf_pack_fake(blocks: torch.Tensor, type: int) -> torch.Tensor:
    in_features = formats.row_elements(type, blocks.shape[-1])
    tile_bytes = gguf_tiles.tile_bytes(type, in_features)
    return blocks.new_empty(*blocks.shape[:-2], blocks.shape[-2] // gguf_tiles.ROWS, tile_bytes)


def gguf_pack_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for type in QUANTIZED_TYPES:
        yield formats.random_blocks(type, 48, 512).to(device), int(type)
    yield random_stack(GGMLType.Q4_K, 3, 32, 256).to(device), int(GGMLType.Q4_K)
    yield torch.empty(0, 288, dtype=torch.uint8, device=device), int(GGMLType.Q4_K)


def random_tiles(type: int, rows: int, in_features: int, seed: int = 0) -> torch.Tensor:
    return gguf_tiles.pack(formats.random_blocks(type, rows, in_features, seed=seed), type)


def round_activations(x: torch.Tensor, type: int) -> torch.Tensor:
    """What the int8 codes of rows `[..., K]` stand for beside blocks of this type, in x's dtype."""
    codes, scales = quantize_activations(x, BLOCK_SIZES[type][0])
    return (codes.to(x.dtype) * scales.to(x.dtype)[..., None]).flatten(-2)[..., : x.shape[-1]]


def multiply_blocks(x: torch.Tensor, blocks: torch.Tensor, type: int, activation: str) -> torch.Tensor:
    """`[M, K]` in float32 or float64 times packed rows `[N, bytes]`: `[M, N]`."""
    kind = check_type("gguf_linear", "types", type)
    weight = dequantize(blocks, type).to(x.dtype)
    return (round_activations(x, kind) if activation == "int8" else x) @ weight.T


def gguf_linear_ref(
    x: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    types: Sequence[int],
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    check_activation("gguf_linear", activation)
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    out = torch.cat(
        [multiply_blocks(rows, b, t, activation) for b, t in zip(blocks, types)],
        dim=1,
    )
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[1])


def gguf_linear_fake(
    x: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    types: Sequence[int],
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(num_rows(b.shape[0], t) for b, t in zip(blocks, types)))


def gguf_linear_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[int, ...], int, list[tuple[GGMLType, int]]]] = [
        ((1,), 512, [(GGMLType.Q4_K, 40), (GGMLType.Q4_K, 16), (GGMLType.Q6_K, 5)]),
        ((2, 3), 256, [(GGMLType.Q8_0, 33), (GGMLType.Q5_K, 70)]),
        ((0,), 256, [(GGMLType.Q4_0, 3)]),
        *(((rows,), 288 if BLOCK_SIZES[t][0] == 32 else 512, [(t, 23)]) for t in QUANTIZED_TYPES for rows in (2, 9)),
    ]
    for rows, in_features, parts in cases:
        blocks = [formats.random_blocks(t, n, in_features, seed=i).to(device) for i, (t, n) in enumerate(parts)]
        bias = torch.randn(sum(n for _, n in parts), generator=g).to(device, dtype) if len(parts) > 1 else None
        for activation in ACTIVATIONS:
            x = torch.randn(*rows, in_features, generator=g).to(device, dtype)
            yield x, blocks, [int(t) for t, _ in parts], bias, activation
    for type in QUANTIZED_TYPES:
        tiles = [random_tiles(type, 48, 512).to(device)]
        for tokens, activation in ((1, "int8"), (7, "full"), (13, "int8")):
            yield torch.randn(tokens, 512, generator=g).to(device, dtype), tiles, [type + TILED], None, activation
    tiles = [random_tiles(GGMLType.Q4_K, 32, 512).to(device), formats.random_blocks(GGMLType.Q8_0, 5, 512).to(device)]
    types = [GGMLType.Q4_K + TILED, int(GGMLType.Q8_0)]
    yield torch.randn(3, 512, generator=g).to(device, dtype), tiles, types, None, "int8"


def gguf_moe_linear_ref(
    x: torch.Tensor, blocks: torch.Tensor, type: int, topk_ids: torch.Tensor, activation: str
) -> torch.Tensor:
    check_activation("gguf_moe_linear", activation)
    check_type("gguf_moe_linear", "type", type)
    rows = x.to(compute_dtype(x))
    out = rows.new_zeros(*topk_ids.shape, num_rows(blocks.shape[1], type))
    for e in range(blocks.shape[0]):
        tokens, slot = torch.where(topk_ids == e)
        mine = rows[tokens] if x.dim() == 2 else rows[tokens, slot]
        out[tokens, slot] = multiply_blocks(mine, blocks[e], type, activation)
    return out.to(x.dtype)


def gguf_moe_linear_fake(
    x: torch.Tensor, blocks: torch.Tensor, type: int, topk_ids: torch.Tensor, activation: str
) -> torch.Tensor:
    return x.new_empty(*topk_ids.shape, num_rows(blocks.shape[1], type))


def random_ids(tokens: int, top_k: int, experts: int, g: torch.Generator) -> torch.Tensor:
    """int32 `[tokens, top_k]`, distinct in a row; an expert that would be number `experts` is a skipped id."""
    ids = torch.rand(tokens, experts + 1, generator=g).argsort(1)[:, :top_k]
    skipped = torch.where(torch.arange(top_k) % 2 == 0, experts, -1)
    return torch.where(ids == experts, skipped, ids).to(torch.int32)


def random_stack(type: int, experts: int, rows: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """Random uint8 `[E, rows, bytes]`."""
    return formats.random_blocks(type, experts * rows, in_features, seed=seed).reshape(experts, rows, -1)


def random_tile_stack(type: int, experts: int, rows: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """Random uint8 `[E, rows / 16, bytes of a tile]`."""
    return gguf_tiles.pack(random_stack(type, experts, rows, in_features, seed), type)


def gguf_moe_linear_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    cases = (
        # T, slots, E, K, N, type, an input for each slot
        (1, 2, 4, 256, 40, GGMLType.Q4_K, False),
        (5, 3, 4, 512, 70, GGMLType.Q6_K, True),
        (60, 1, 2, 96, 33, GGMLType.Q8_0, False),
        (0, 2, 3, 256, 16, GGMLType.Q5_K, True),
    )
    for tokens, top_k, experts, in_features, out_features, type, per_slot in cases:
        ids = random_ids(tokens, top_k, experts, g).to(device)
        blocks = random_stack(type, experts, out_features, in_features).to(device)
        for activation in ACTIVATIONS:
            shape = (tokens, top_k, in_features) if per_slot else (tokens, in_features)
            yield torch.randn(shape, generator=g).to(device, dtype), blocks, int(type), ids, activation
    for tokens in (1, 40):
        tiles = random_tile_stack(GGMLType.Q6_K, 4, 48, 256).to(device)
        x, ids = torch.randn(tokens, 256, generator=g), random_ids(tokens, 2, 4, g)
        yield x.to(device, dtype), tiles, GGMLType.Q6_K + TILED, ids.to(device), "int8"


def moe_experts_gguf_ref(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    types: Sequence[int],
    activation: str,
) -> torch.Tensor:
    check_activation("moe_experts_gguf", activation)
    x = hidden.to(compute_dtype(hidden))
    gates = gguf_moe_linear_ref(x, gate, types[0], topk_ids, activation)
    ups = gguf_moe_linear_ref(x, up, types[1], topk_ids, activation)
    slots = gguf_moe_linear_ref(F.silu(gates) * ups, down, types[2], topk_ids, activation)
    kept = (topk_ids >= 0) & (topk_ids < gate.shape[0])
    out = torch.zeros_like(x)
    for k in range(topk_ids.shape[1]):
        out = out + torch.where(kept[:, k, None], topk_weights[:, k, None].to(x.dtype) * slots[:, k], 0)
    return out.to(hidden.dtype)


def moe_experts_gguf_fake(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


def moe_experts_gguf_inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(0)
    cases = (
        # T, slots, E, H, I, types of gate, up, down
        (1, 2, 4, 256, 96, (GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q8_0)),
        (5, 3, 4, 512, 256, (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K)),
        (70, 1, 2, 256, 288, (GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.Q4_0)),
        (9, 2, 3, 96, 32, (GGMLType.Q5_0, GGMLType.IQ4_NL, GGMLType.Q8_0)),
        (0, 2, 3, 256, 32, (GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q8_0)),
    )
    for tokens, top_k, experts, hidden_size, width, types in cases:
        ids = random_ids(tokens, top_k, experts, g).to(device)
        weights = torch.rand(tokens, top_k, generator=g).to(device)
        gate = random_stack(types[0], experts, width, hidden_size, 0).to(device)
        up = random_stack(types[1], experts, width, hidden_size, 1).to(device)
        down = random_stack(types[2], experts, hidden_size, width, 2).to(device)
        for activation in ACTIVATIONS:
            hidden = torch.randn(tokens, hidden_size, generator=g).to(device, dtype)
            yield hidden, ids, weights, gate, up, down, [int(t) for t in types], activation
    for tokens in (1, 50):
        ids, weights = random_ids(tokens, 2, 3, g).to(device), torch.rand(tokens, 2, generator=g).to(device)
        types = (GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q8_0)
        gate, up = (random_tile_stack(types[0], 3, 256, 256, seed).to(device) for seed in (0, 1))
        down = random_stack(types[2], 3, 256, 256, 2).to(device)
        hidden = torch.randn(tokens, 256, generator=g).to(device, dtype)
        yield hidden, ids, weights, gate, up, down, [types[0] + TILED] * 2 + [int(types[2])], "int8"


register("gguf_moe_linear", ref=gguf_moe_linear_ref, fake=gguf_moe_linear_fake, inputs=gguf_moe_linear_inputs)
register("moe_experts_gguf", ref=moe_experts_gguf_ref, fake=moe_experts_gguf_fake, inputs=moe_experts_gguf_inputs)
register("gguf_linear", ref=gguf_linear_ref, fake=gguf_linear_fake, inputs=gguf_linear_inputs)
register("gguf_pack", ref=gguf_pack_ref, fake=gguf_pack_fake, inputs=gguf_pack_inputs)
register("gguf_dequantize", ref=gguf_dequantize_ref, fake=gguf_dequantize_fake, inputs=gguf_dequantize_inputs)
