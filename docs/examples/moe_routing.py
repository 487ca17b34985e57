import torch

import ferrum_ops

# Two tokens, four experts, the best two of each.
logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
ids, weights = ferrum_ops.route_topk_softmax(logits, top_k=2)
print(ids.tolist())  # [[1, 2], [0, 1]]
print(weights.sum(-1).tolist())  # [1.0, 1.0]

# The same from hidden states: a router whose weight is the identity has them as logits.
_, router_ids, _ = ferrum_ops.router_topk_softmax(logits, torch.eye(4), top_k=2)
print(router_ids.tolist())  # [[1, 2], [0, 1]]

# Pair t*2 + j is slot j of token t. Expert 0 owns packed row 0, expert 1 rows 1 and 2, expert 2 row 3, expert 3 none.
pairs_by_token, packed_token_idx, expert_offsets = ferrum_ops.moe_build_pairs_by_token(ids, num_experts=4)
print(expert_offsets.tolist())  # [0, 1, 3, 4, 4]
print(packed_token_idx.tolist())  # [1, 0, 1, 0]
print(pairs_by_token.tolist())  # [1, 3, 0, 2]

# The same order in blocks of eight rows of one expert each, as a grouped product reads it; 4 is padding.
sorted_token_ids, block_ids, total = ferrum_ops.moe_align_block_size(ids, num_experts=4, block_size=8)
print(sorted_token_ids[: total.item()].view(-1, 8)[:, :3].tolist())  # [[2, 4, 4], [0, 3, 4], [1, 4, 4]]
print(block_ids.tolist())  # [0, 1, 2, -1]

# Both at once, in one launch for few tokens on a GPU.
_, _, _, same_block_ids, _ = ferrum_ops.route_topk_align(logits, top_k=2, renormalize=True, block_size=8)
print(same_block_ids.tolist())  # [0, 1, 2, -1]
