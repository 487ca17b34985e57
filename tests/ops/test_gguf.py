"""The ops on GGUF blocks. tests/formats/test_gguf.py compares gguf_dequantize with the Python package gguf."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import GGMLType

BYTES = torch.zeros(2, 144, dtype=torch.uint8)


@pytest.mark.parametrize(
    "blocks, type, dtype, argument, message",
    [
        (BYTES, 4, torch.float32, "type", "expected a ggml type that ferrum_ops.formats.gguf.GGMLType lists, got 4"),
        (BYTES, -1, torch.float32, "type", "expected a ggml type .*, got -1"),
        (BYTES.float(), GGMLType.Q4_K, torch.float32, "blocks", "expected Byte, got Float"),
        (BYTES[:, :72], GGMLType.Q4_0, torch.float32, "blocks", "expected a contiguous tensor"),
        (torch.tensor(1, dtype=torch.uint8), GGMLType.Q4_0, torch.float32, "blocks", "expected at least 1 dimension"),
        (
            BYTES,
            GGMLType.Q6_K,
            torch.float32,
            "blocks",
            r"rows of a multiple of 210 bytes for Q6_K, got shape \(2, 144\)",
        ),
        (BYTES, GGMLType.Q4_K, torch.int32, "dtype", "expected float32, float16 or bfloat16, got Int"),
    ],
)
def test_bad_dequantize_argument_is_named(blocks, type, dtype, argument, message):
    with pytest.raises(RuntimeError, match=rf"\[gguf_dequantize\] {argument}: .*{message}"):
        ferrum_ops.gguf_dequantize(blocks, type, dtype)


def test_number_of_threads_does_not_matter():
    blocks = formats.random_blocks(GGMLType.Q5_K, 300, 512)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ferrum_ops.gguf_dequantize(blocks, GGMLType.Q5_K, torch.float16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)
