"""Packing to the Marlin layout and back at Qwen3-30B-A3B's sizes, dense weights of it, and the product.

`python benchmarks/ops/bench_marlin.py [--compile]`

Where there is no kernel for the product, its reference unpacks the weights at every call.
"""

from collections.abc import Iterator, Sequence

import torch

from ferrum_ops.formats import marlin
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.ops.marlin import marlin_workspace, random_marlin
from ferrum_ops.testing.compare import tolerance
from ferrum_ops.testing.timing import Case, bytes_of, main

SIZES = ((2048, 768), (768, 2048), (4096, 2048))
GROUP_SIZE = 128
ROWS = (1, 128)


def cases(dtype: torch.dtype = torch.float32, row_counts: Sequence[int] = ROWS) -> Iterator[Case]:
    device = str(torch.get_default_device())
    for in_features, out_features in SIZES:
        qweight, qzeros, scales = random_projection(in_features, out_features, in_features // GROUP_SIZE, 4, device)
        perm = torch.randperm(in_features, device=device).int()
        packed = marlin.repack(qweight, None, in_features, out_features, 4)
        moved = 2 * bytes_of(qweight)
        for order, rows in (("", None), (" act-order", perm)):
            label = f"{in_features}x{out_features}{order}"
            yield Case("marlin_repack", label, (qweight, rows, in_features, out_features, 4), moved)
            yield Case("marlin_unpack", label, (packed, rows, in_features, out_features, 4), moved)
        label, arguments = f"{in_features}x{out_features}", (scales, in_features, GROUP_SIZE)
        yield Case("marlin_permute_scales", label, arguments, 2 * bytes_of(scales))
        yield Case("marlin_unpermute_scales", label, arguments, 2 * bytes_of(scales))
        yield Case("marlin_repack_zeros", label, (qzeros, out_features, 4, 1), 2 * bytes_of(qzeros))
    yield from dense_cases(dtype, device)
    yield from product_cases(dtype, row_counts, device)


def dense_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """What the expert block dequantises at a time: half of the columns of gate and up, and down. A few experts where
    the reference does it."""
    experts = 128 if device.startswith("cuda") else 2
    for name, in_features, columns in (("gate and up", 2048, 768), ("down", 768, 2048)):
        shape = (experts, in_features // marlin.TILE_ROWS, columns * 2)
        packed = torch.randint(-(2**31), 2**31, shape, device=device, dtype=torch.int32)
        scales = (torch.rand(experts, in_features // GROUP_SIZE, columns, device=device) + 0.5).half()
        for order in ("", " act-order"):
            perms = [torch.randperm(in_features, device=device).int() for _ in range(experts)]
            perm = torch.stack(perms) if order else None
            out = torch.empty(experts, in_features, columns, device=device, dtype=dtype)
            yield Case(
                "marlin_dequantize_out",
                f"E={experts} {name}{order}",
                (packed, scales, None, perm, None, GROUP_SIZE, 4, name != "down", out),
                bytes_of(packed, scales, out, *([] if perm is None else [perm])),
                # Scales are float16 beside weights of another dtype.
                bound=tolerance("marlin_dequantize_out", dtype),
            )


def product_cases(dtype: torch.dtype, row_counts: Sequence[int], device: str) -> Iterator[Case]:
    in_features, out_features = SIZES[0]
    packed, scales, _, perm = random_marlin(in_features, out_features, GROUP_SIZE, 4, device, act_order=True)
    workspace = marlin_workspace(device)
    for rows in row_counts:
        x = torch.randn(rows, in_features, device=device).to(dtype)
        arguments = (x, packed, scales, None, perm, None, workspace, out_features, GROUP_SIZE, 4)
        moved = bytes_of(x, packed, scales) + rows * out_features * dtype.itemsize
        yield Case("marlin_gemm", f"M={rows}", (*arguments, "fp32", 0), moved)


if __name__ == "__main__":
    main(cases, __doc__)
