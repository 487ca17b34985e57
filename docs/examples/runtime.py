import torch

import ferrum_ops

print(ferrum_ops.backends()["rms_norm"]["cpu"])  # kernel
print(ferrum_ops.cpu_isa() in ferrum_ops.CPU_ISA_LEVELS)  # True

x, weight = torch.randn(4, 64), torch.ones(64)
fastest = ferrum_ops.rms_norm(x, weight)
with ferrum_ops.use_cpu_isa("generic"):
    print(torch.allclose(ferrum_ops.rms_norm(x, weight), fastest, atol=1e-6))  # True
