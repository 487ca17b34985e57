import torch

import ferrum_ops
from ferrum_ops.formats import gptq

in_features, out_features, group_size = 128, 64, 32
codes = torch.randint(0, 16, (in_features, out_features), dtype=torch.uint8)
qweight = gptq.pack_rows(codes, bits=4)
scales = torch.rand(in_features // group_size, out_features)

packed = ferrum_ops.marlin_repack(qweight, None, in_features, out_features)
print(tuple(qweight.shape), tuple(packed.shape))  # (16, 64) (8, 128)

# Nothing is lost: a model writes its original checkpoint back.
print(torch.equal(ferrum_ops.marlin_unpack(packed, None, in_features, out_features), qweight))  # True
permuted = ferrum_ops.marlin_permute_scales(scales, in_features, group_size)
print(torch.equal(ferrum_ops.marlin_unpermute_scales(permuted, in_features, group_size), scales))  # True

# No zero points: every one is 8. One workspace serves all products of a stream.
x, workspace = torch.randn(3, in_features), ferrum_ops.marlin_workspace("cpu")
y = ferrum_ops.marlin_gemm(x, packed, permuted, None, None, None, workspace, out_features, group_size)
weight = (codes.float() - 8) * scales.repeat_interleave(group_size, 0)
print(torch.allclose(y, x @ weight, atol=1e-3))  # True

# For many rows: the dense weights, for a product of any kind.
dense = torch.empty(in_features, out_features)
ferrum_ops.marlin_dequantize_out(packed, permuted, None, None, None, group_size, 4, False, dense)
print(torch.equal(dense, weight))  # True
