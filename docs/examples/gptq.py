import torch

import ferrum_ops
from ferrum_ops.formats import gptq

# One group of eight input channels and eight output channels, four bits: codes 0..15, zero point 8, scale 0.5.
codes = torch.arange(64, dtype=torch.uint8).view(8, 8) % 16
qweight = gptq.pack_rows(codes, bits=4)
qzeros = gptq.encode_zeros(torch.full((1, 8), 8, dtype=torch.uint8), bits=4, checkpoint_format="gptq")
scales = torch.full((1, 8), 0.5)
print(tuple(qweight.shape), qweight.dtype)  # (1, 8) torch.int32

weight = ferrum_ops.gptq_dequantize(qweight, qzeros, scales)
print(weight[1].tolist())  # [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]

# A product with the words as they are. Row 1 of the weights is what the second unit vector picks.
x = torch.eye(8)[1:2]
print(ferrum_ops.gptq_gemm(x, qweight, qzeros, scales).tolist() == [weight[1].tolist()])  # True
