"""Error of int8 and full activations against float64, for normal activations and with an outlier channel.

    python benchmarks/precision_int4.py

The oracle multiplies the same packed weights in float64, so that only what the activations lose is counted: relative
error in the Frobenius norm. Activations are standard normal; "outlier" multiplies one channel by 100, and "without it"
is that product's error relative to what the other channels contribute.
"""

import torch

import ferrum_ops
from ferrum_ops.formats import int4, int8
from ferrum_ops.ops.int4 import random_int8_matrix, random_matrix
from ferrum_ops.testing.compare import relative_error

ROWS, GROUP_SIZE = 32, 128
#: (name, K, N, bits of the weights)
SHAPES = (
    ("experts, gate and up", 2048, 1536, 4),
    ("experts, down", 768, 2048, 4),
    ("fused qkv", 2048, 5120, 4),
    ("attention output", 4096, 2048, 4),
    ("lm_head", 2048, 8192, 8),
)


def outlier(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, x.shape[1] // 3] *= 100
    return x


def errors(in_features: int, out_features: int, bits: int, activation: str) -> list[float]:
    if bits == 4:
        matrix = random_matrix(in_features, out_features, GROUP_SIZE)
        weight = int4.dequantize(*matrix, in_features, out_features, GROUP_SIZE)
    else:
        packed, scales = random_int8_matrix(in_features, out_features, GROUP_SIZE)
        weight = int8.dequantize(packed, scales, in_features, out_features, GROUP_SIZE)

    def product(x: torch.Tensor) -> torch.Tensor:
        if bits == 4:
            return ferrum_ops.int4_linear(x, *matrix, None, out_features, GROUP_SIZE, activation)
        return ferrum_ops.int8_linear(x, packed, scales, None, out_features, GROUP_SIZE, activation)

    x = torch.randn(ROWS, in_features)
    large = outlier(x)
    difference = (product(large).double() - large.double() @ weight).norm()
    rest = large.clone()
    rest[:, in_features // 3] = 0
    return [
        relative_error(product(x), x.double() @ weight),
        relative_error(product(large), large.double() @ weight),
        float(difference / (rest.double() @ weight).norm()),
    ]


if __name__ == "__main__":
    torch.manual_seed(0)
    print("| linear | K | N | weights | activations | normal | outlier | without it |")
    print("|---|--:|--:|---|---|--:|--:|--:|")
    for name, in_features, out_features, bits in SHAPES:
        for activation in ("int8", "full"):
            cells = " | ".join(f"{e:.1e}" for e in errors(in_features, out_features, bits, activation))
            print(f"| {name} | {in_features} | {out_features} | int{bits} | {activation} | {cells} |")
