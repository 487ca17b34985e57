import torch

import ferrum_ops
from ferrum_ops.formats.gguf import GGMLType
from ferrum_ops.ops.gguf import random_stack
from ferrum_ops.ops.moe_gemm import random_experts

# The second half of a layer: residual, norm, router, experts and residual again as one call.
experts, hidden_size, expert_width, group_size = 4, 128, 48, 64
packed = random_experts(experts, hidden_size, expert_width, group_size)
attended, residual = torch.randn(3, hidden_size), torch.randn(3, hidden_size)
norm_weight, router_weight = torch.ones(hidden_size), torch.randn(experts, hidden_size)
out = ferrum_ops.decoder_experts_int4(attended, residual, norm_weight, 1e-6, router_weight, 2, True, *packed, "int8")
print(tuple(out.shape))  # (3, 128)

# The same bits as its parts one after the other.
normed, total = ferrum_ops.fused_add_rms_norm(attended, residual, norm_weight, 1e-6)
_, ids, weights = ferrum_ops.router_topk_softmax(normed, router_weight, 2)
parts = total + ferrum_ops.moe_experts_int4(normed, ids, weights, *packed, "int8")
print(torch.equal(out, parts))  # True

# The same over GGUF blocks: types are ggml's numbers of gate, up and down.
gate, up = (random_stack(GGMLType.Q4_0, experts, 64, hidden_size, seed) for seed in (0, 1))
blocks = (
    gate,
    up,
    random_stack(GGMLType.Q8_0, experts, hidden_size, 64),
    [GGMLType.Q4_0, GGMLType.Q4_0, GGMLType.Q8_0],
)
out = ferrum_ops.decoder_experts_gguf(attended, residual, norm_weight, 1e-6, router_weight, 2, True, *blocks, "int8")
parts = total + ferrum_ops.moe_experts_gguf(normed, ids, weights, *blocks, "int8")
print(torch.equal(out, parts))  # True
