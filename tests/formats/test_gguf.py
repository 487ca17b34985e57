"""The torch decoders and gguf_dequantize against the Python package gguf, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ferrum_ops
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import BLOCK_SIZES, QUANTIZED_TYPES, GGMLType

gguf = pytest.importorskip("gguf")

DATA = Path(__file__).parents[3] / "shared" / "data" / "gguf"


def oracle(blocks, type):
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(int(type))).copy())


def assert_same_bits(got, expected):
    """Bit for bit; a NaN may have any payload."""
    assert got.shape == expected.shape and got.dtype == expected.dtype == torch.float32
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.masked_fill(nan, 0).view(torch.int32), expected.masked_fill(nan, 0).view(torch.int32))


@pytest.mark.parametrize("type", GGMLType, ids=lambda t: t.name)
def test_numbers_and_sizes_are_the_packages(type):
    known = gguf.GGMLQuantizationType(int(type))
    assert known.name == type.name
    assert gguf.GGML_QUANT_SIZES[known] == BLOCK_SIZES[type]


@pytest.mark.parametrize("type", GGMLType, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["uniform bits", "sensible", "zeros", "ones"])
def test_decoders_equal_gguf(isa, type, kind):
    """Uniform bits hold every scale there is: NaN, infinite, subnormal, negative."""
    elements, nbytes = BLOCK_SIZES[type]
    columns = max(elements * 3, 96)
    rows = 700 if kind == "uniform bits" else 7
    blocks = {
        "uniform bits": lambda: torch.randint(0, 256, (rows, columns // elements * nbytes), dtype=torch.uint8),
        "sensible": lambda: formats.random_blocks(type, rows, columns),
        "zeros": lambda: torch.zeros(rows, columns // elements * nbytes, dtype=torch.uint8),
        "ones": lambda: torch.full((rows, columns // elements * nbytes), 255, dtype=torch.uint8),
    }[kind]()
    expected = oracle(blocks, type)
    assert_same_bits(formats.dequantize(blocks, type), expected)
    assert_same_bits(ferrum_ops.gguf_dequantize(blocks, type, torch.float32), expected)
    if kind == "sensible":
        assert expected.isfinite().all() and 0.005 < expected.std() < 0.06


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("type", GGMLType, ids=lambda t: t.name)
def test_other_dtypes_are_rounded_once(isa, type, dtype):
    blocks = formats.random_blocks(type, 5, 512)
    assert torch.equal(ferrum_ops.gguf_dequantize(blocks, type, dtype), oracle(blocks, type).to(dtype))


@pytest.mark.parametrize("file", ["Q4_K_M.gguf", "Q8_0.gguf"])
def test_real_files(isa, file):
    if not DATA.exists():
        pytest.skip(f"needs {DATA}")
    types = set()
    for tensor in gguf.GGUFReader(DATA / file).tensors:
        data = torch.from_numpy(tensor.data.copy())
        blocks = data.view(torch.uint8)
        expected = oracle(blocks, tensor.tensor_type)
        assert_same_bits(formats.dequantize(blocks, tensor.tensor_type), expected)
        assert_same_bits(ferrum_ops.gguf_dequantize(blocks, tensor.tensor_type, torch.float32), expected)
        types.add(tensor.tensor_type.name)
    assert types >= {"F32", "Q8_0"}


@pytest.mark.parametrize("type", QUANTIZED_TYPES, ids=lambda t: t.name)
def test_rows_are_whole_blocks(type):
    elements, nbytes = BLOCK_SIZES[type]
    assert formats.row_bytes(type, 3 * elements) == 3 * nbytes
    assert formats.row_elements(type, 3 * nbytes) == 3 * elements
    with pytest.raises(
        ValueError, match=rf"\[row_bytes\] in_features: expected a multiple of {elements} for {type.name}"
    ):
        formats.row_bytes(type, elements + 1)
    with pytest.raises(ValueError, match=rf"\[row_elements\] nbytes: expected a multiple of {nbytes} for {type.name}"):
        formats.row_elements(type, nbytes - 1)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3)])
def test_leading_dimensions(shape):
    blocks = formats.random_blocks(GGMLType.Q4_K, 6, 512).reshape(-1)[: int(np.prod(shape)) * 288].reshape(*shape, 288)
    out = formats.dequantize(blocks, GGMLType.Q4_K)
    assert out.shape == (*shape, 512)
    assert torch.equal(out, ferrum_ops.gguf_dequantize(blocks, GGMLType.Q4_K, torch.float32))
