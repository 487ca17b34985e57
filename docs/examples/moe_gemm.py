import torch

import ferrum_ops
from ferrum_ops.formats import gptq, int4

tokens, hidden_size, intermediate_size, num_experts, top_k, group_size = 5, 64, 32, 4, 2, 32
random = torch.Generator().manual_seed(0)


def pack(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = int4.quantize_rtn(torch.randn(out_features, in_features, generator=random) / 8, group_size)
    return ferrum_ops.int4_pack(gptq.pack_rows(codes, bits=4), None, in_features), int4.pack_groups(scales)


# Every expert's gate and up with their tiles alternating, and its down; then all experts stacked.
w13, w13_scales, w2, w2_scales = [], [], [], []
for _ in range(num_experts):
    gate, up = pack(intermediate_size, hidden_size), pack(intermediate_size, hidden_size)
    down = pack(hidden_size, intermediate_size)
    w13.append(int4.interleave_tiles(gate[0], up[0]))
    w13_scales.append(int4.interleave_tiles(gate[1], up[1]))
    w2.append(down[0])
    w2_scales.append(down[1])

hidden = torch.randn(tokens, hidden_size, generator=random)
topk_ids, topk_weights = ferrum_ops.route_topk_softmax(torch.randn(tokens, num_experts, generator=random), top_k)


def experts(ids: torch.Tensor) -> torch.Tensor:
    return ferrum_ops.moe_experts_int4(
        hidden,
        ids,
        topk_weights,
        *(torch.stack(w13), torch.stack(w13_scales), None, None, group_size),
        *(torch.stack(w2), torch.stack(w2_scales), None, None, group_size),
        intermediate_size,
        "int8",
    )


out = experts(topk_ids)
print(tuple(out.shape), out.abs().max().item() > 0)  # (5, 64) True

# Slots of experts that live elsewhere add nothing.
print(experts(torch.full_like(topk_ids, -1)).abs().max().item())  # 0.0

# One product of such a block, over GPTQ words as they lie in a checkpoint: row t*2 + j is slot j of token t.
parts = []
for _ in range(num_experts):
    codes, scales = int4.quantize_rtn(torch.randn(intermediate_size, hidden_size, generator=random) / 8, group_size)
    zeros = gptq.encode_zeros(torch.full(scales.shape, 8, dtype=torch.uint8), bits=4, checkpoint_format="gptq")
    parts.append((gptq.pack_rows(codes, bits=4), zeros, scales))
stacks = [torch.stack(part) for part in zip(*parts)]
blocks = ferrum_ops.moe_align_block_size(topk_ids, num_experts, block_size=8)
rows = ferrum_ops.gptq_moe_gemm(hidden, *stacks, None, None, *blocks, None, top_k, block_size=8)
print(tuple(rows.shape))  # (10, 32)
alone = ferrum_ops.gptq_gemm(hidden[:1], *parts[topk_ids[0, 1].item()])
print(torch.allclose(rows[1], alone[0], atol=1e-5))  # True
