import torch

import ferrum_ops

num_heads, num_kv_heads, head_dim = 4, 2, 8
scale = head_dim**-0.5

# Two sequences that hold five and nine keys, the two new tokens of each included.
k_cache, v_cache = torch.randn(2, num_kv_heads, 16, head_dim), torch.randn(2, num_kv_heads, 16, head_dim)
kv_lens = torch.tensor([5, 9], dtype=torch.int32)
q = torch.randn(2, 2, num_heads, head_dim)
out = ferrum_ops.attention(q, k_cache, v_cache, kv_lens, scale)
print(tuple(out.shape))  # (2, 2, 4, 8)

# The last token of the first sequence sees all five keys: the same as PyTorch's attention over them.
keys, values = (cache[:1, :, :5].repeat_interleave(2, dim=1) for cache in (k_cache, v_cache))
last = torch.nn.functional.scaled_dot_product_attention(q[:1, 1:].transpose(1, 2), keys, values, scale=scale)
print(torch.allclose(out[:1, 1:], last.transpose(1, 2), atol=1e-5))  # True

# Paged: a prefill of three tokens and one decode step in one call, pages in any order.
k_pool, v_pool = torch.randn(4, 16, num_kv_heads, head_dim), torch.randn(4, 16, num_kv_heads, head_dim)
block_tables = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
cu_seqlens_q = torch.tensor([0, 3, 4], dtype=torch.int32)
lengths = torch.tensor([3, 20], dtype=torch.int32)
packed = torch.randn(4, num_heads, head_dim)
paged = ferrum_ops.paged_attention(packed, k_pool, v_pool, block_tables, cu_seqlens_q, lengths, scale)
print(tuple(paged.shape), paged.isfinite().all().item())  # (4, 4, 8) True
