import torch

import ferrum_ops

x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
residual = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
weight = torch.tensor([1.0, 2.0])

normed = ferrum_ops.rms_norm(x, weight)
print((normed * 12.5**0.5).round(decimals=3)[0].tolist())  # [3.0, 8.0]

# The addition that precedes a norm in every decoder layer costs no pass of its own.
normed, residual = ferrum_ops.fused_add_rms_norm(x, residual, weight)
print(residual.tolist())  # [[3.0, 4.0], [1.0, 1.0]]
print(normed[1].round(decimals=3).tolist())  # [1.0, 2.0]
