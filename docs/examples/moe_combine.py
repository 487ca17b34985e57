import torch

import ferrum_ops

ids = torch.tensor([[1, 2], [0, 1]], dtype=torch.int32)
weights = torch.tensor([[0.5, 0.5], [0.75, 0.25]])
pairs_by_token, packed_token_idx, _ = ferrum_ops.moe_build_pairs_by_token(ids, num_experts=4)

# Rows sorted by expert, as a grouped product leaves them; here every row is its token's number plus one.
packed = (packed_token_idx + 1.0).unsqueeze(-1).repeat(1, 3)
print(ferrum_ops.moe_combine(packed, pairs_by_token, weights).tolist())  # [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]

# The same sum of outputs that lie in the order of the slots.
slots = torch.tensor([[[4.0], [8.0]], [[4.0], [8.0]]])
print(ferrum_ops.weighted_sum(slots, weights).tolist())  # [[6.0], [5.0]]
