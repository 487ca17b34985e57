import torch

import ferrum_ops
from ferrum_ops.formats.gguf import GGMLType, random_blocks
from ferrum_ops.formats.gguf_tiles import TILED

in_features, out_features = 512, 100

# Rows as a file holds them: two blocks of 144 bytes. `gguf.GGUFReader` gives such tensors as memory-mapped arrays.
blocks = random_blocks(GGMLType.Q4_K, out_features, in_features)
print(tuple(blocks.shape), blocks.dtype)  # (100, 288) torch.uint8

weight = ferrum_ops.gguf_dequantize(blocks, GGMLType.Q4_K, torch.float32)
print(tuple(weight.shape))  # (100, 512)

x = torch.ones(3, in_features)
y = ferrum_ops.gguf_linear(x, [blocks], [GGMLType.Q4_K], None, "full")
print(tuple(y.shape), torch.allclose(y, x @ weight.T, atol=1e-4))  # (3, 100) True

# In tiles of 16 rows the same products are faster on AVX512, with the same bits for int8 activations.
tiles = ferrum_ops.gguf_pack(blocks[:96], GGMLType.Q4_K)
z = ferrum_ops.gguf_linear(x, [tiles], [GGMLType.Q4_K + TILED], None, "int8")
same = ferrum_ops.gguf_linear(x, [blocks[:96].contiguous()], [GGMLType.Q4_K], None, "int8")
print(tuple(tiles.shape), torch.equal(z, same))  # (6, 4736) True
