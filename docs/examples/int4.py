import torch

import ferrum_ops
from ferrum_ops.formats import gptq, int4, int8

in_features, out_features, group_size = 256, 100, 64
weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))

# Round to nearest, then the layout of the CPU kernels. A GPTQ checkpoint brings its qweight and scales instead.
codes, scales = int4.quantize_rtn(weight, group_size)
packed = ferrum_ops.int4_pack(gptq.pack_rows(codes, bits=4), None, in_features)
scales = int4.pack_groups(scales)
print(tuple(packed.shape), packed.dtype)  # (7, 32, 64) torch.uint8

x = torch.ones(3, in_features)
y = ferrum_ops.int4_linear(x, packed, scales, None, None, None, out_features, group_size, "full")
dense = int4.dequantize(packed, scales, None, None, in_features, out_features, group_size, torch.float32)
print(tuple(y.shape), torch.allclose(y, x @ dense, atol=1e-3))  # (3, 100) True

# The same tiles with a byte per weight: what a language head wants.
codes, scales = int8.quantize_rtn(weight, group_size)
packed, scales = int8.pack(codes), int4.pack_groups(scales)
y8 = ferrum_ops.int8_linear(x, packed, scales, None, out_features, group_size, "full")
exact = x @ weight.T
print(bool((y8 - exact).norm() < (y - exact).norm() / 10))  # True
