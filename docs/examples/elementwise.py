import torch

import ferrum_ops

table = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
x = ferrum_ops.embedding_lookup(table, torch.tensor([2, 0]))
print(x.tolist())  # [[4.0, 5.0], [0.0, 1.0]]

ferrum_ops.add_bias_(x, torch.tensor([10.0, 20.0]))
print(x.tolist())  # [[14.0, 25.0], [10.0, 21.0]]

print(ferrum_ops.gather_columns(x, torch.tensor([1, 0])).tolist())  # [[25.0, 14.0], [21.0, 10.0]]

# Views of one projected row: two query heads, one key head, one value head of two elements.
qkv = torch.arange(8.0).view(1, 8)
q, k, v = ferrum_ops.split_qkv(qkv, num_heads=2, num_kv_heads=1, head_dim=2)
print(q.tolist(), k.tolist(), v.tolist())  # [[[0.0, 1.0], [2.0, 3.0]]] [[[4.0, 5.0]]] [[[6.0, 7.0]]]
