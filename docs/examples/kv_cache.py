import torch

import ferrum_ops

num_blocks, block_size, num_kv_heads, head_dim = 4, 16, 2, 8
k, v = torch.randn(3, num_kv_heads, head_dim), torch.randn(3, num_kv_heads, head_dim)

# Slot 33 is row 1 of block 2; the token with slot -1 is skipped.
slots = torch.tensor([33, -1, 0])
k_pool = torch.zeros(num_blocks, block_size, num_kv_heads, head_dim)
v_pool = torch.zeros_like(k_pool)
ferrum_ops.paged_kv_write_(k_pool, v_pool, k, v, slots)
print(torch.equal(k_pool[2, 1], k[0]), torch.equal(v_pool[0, 0], v[2]))  # True True

# int8 takes a quarter of the memory of float32: half a step of 127 is the largest error.
k_int8, v_int8 = k_pool.to(torch.int8), v_pool.to(torch.int8)
k_scale, v_scale = torch.zeros(k_pool.shape[:-1]), torch.zeros(v_pool.shape[:-1])
ferrum_ops.paged_kv_write_int8_(k_int8, v_int8, k_scale, v_scale, k, v, slots)
read_back = k_int8[2, 1] * k_scale[2, 1].unsqueeze(-1)
print(((read_back - k[0]).abs() <= 0.51 * k_scale[2, 1].unsqueeze(-1)).all().item())  # True

# One contiguous cache per sequence: a token is appended to sequences that hold five and two.
k_cache, v_cache = torch.zeros(2, num_kv_heads, 32, head_dim), torch.zeros(2, num_kv_heads, 32, head_dim)
cache_lens = torch.tensor([5, 2], dtype=torch.int32)
ferrum_ops.kv_append_(k_cache, v_cache, k[:2].unsqueeze(1), v[:2].unsqueeze(1), cache_lens)
print(torch.equal(k_cache[0, :, 5], k[0]), torch.equal(v_cache[1, :, 2], v[1]))  # True True
