import torch

import ferrum_ops

# One projection gives gate and up side by side: rows [gate | up].
gate_up = torch.tensor([[0.0, 100.0, 5.0, 7.0]])
print(ferrum_ops.silu_mul(gate_up).tolist())  # [[0.0, 700.0]]

# The same of two tensors.
gate, up = gate_up.chunk(2, dim=-1)
print(ferrum_ops.silu_mul(gate, up).tolist())  # [[0.0, 700.0]]

# Row 0 of gate_up into row 2 of a buffer.
out = torch.zeros(3, 2)
ferrum_ops.silu_mul_out(gate_up, 0, out, 2, 1)
print(out.tolist())  # [[0.0, 0.0], [0.0, 0.0], [0.0, 700.0]]
