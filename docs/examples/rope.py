import torch

import ferrum_ops

num_heads, num_kv_heads, head_dim, theta = 4, 2, 8, 10000.0

# Tables of 32 positions, and the projected rows of three tokens at positions 7, 8 and 9.
frequencies = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
angles = torch.outer(torch.arange(32), frequencies)
cos, sin = angles.cos(), angles.sin()
positions = torch.tensor([7, 8, 9])
qkv = torch.randn(3, (num_heads + 2 * num_kv_heads) * head_dim)

weight = torch.ones(head_dim)
q, k, v = ferrum_ops.split_qkv_norm_rope(qkv, weight, weight, cos, sin, positions, num_heads, num_kv_heads, head_dim)
print(tuple(q.shape), tuple(k.shape), tuple(v.shape))  # (3, 4, 8) (3, 2, 8) (3, 2, 8)

# Scores depend on the distance of two positions, not on where they stand.
x = torch.randn(1, 1, head_dim)
at = {p: ferrum_ops.qk_norm_rope(x, None, cos, sin, torch.tensor([p])).flatten() for p in (0, 4, 20, 24)}
print(torch.allclose(at[0] @ at[4], at[20] @ at[24], atol=1e-4))  # True
