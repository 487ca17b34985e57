import torch

from ferrum_ops.formats import gptq, int4

# Three-bit codes are one stream of bits: 32 of them in three words.
codes = torch.randint(0, 8, (64, 10), dtype=torch.uint8)
words = gptq.pack_rows(codes, bits=3)
print(tuple(words.shape), torch.equal(gptq.unpack_rows(words, bits=3), codes))  # (6, 10) True

# Version 1 of the format stores every zero point minus one, version 2 the zero point.
zeros = torch.full((1, 8), 8, dtype=torch.uint8)
v1, v2 = (gptq.encode_zeros(zeros, 4, version).item() for version in ("gptq", "gptq_v2"))
print(f"{v1 & 0xFFFFFFFF:x} {v2 & 0xFFFFFFFF:x}")  # 77777777 88888888

# Act-order: the order that lays the rows of a group together, and back.
g_idx = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1], dtype=torch.int32)
perm = gptq.sort_groups(g_idx, in_features=8, group_size=4)
print(perm.tolist())  # [0, 2, 5, 6, 1, 3, 4, 7]
print(torch.equal(gptq.g_idx_from_perm(perm, 4, 8), g_idx))  # True

packed = int4.pack(gptq.pack_rows(codes, bits=4), None, in_features=64)
print(tuple(packed.shape))  # (1, 8, 64)
