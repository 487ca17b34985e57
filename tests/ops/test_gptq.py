"""What the registry's own tests do not say of `gptq_dequantize` and `gptq_gemm`: the formula, its rounding, and what
they refuse."""

import numpy as np
import pytest
import torch

import ferrum_ops
from ferrum_ops.formats import gptq
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.testing.compare import assert_close, tolerance


def dequantize_with_numpy(qweight, qzeros, scales, g_idx, bits, zero_offset):
    """Codes as bits of a byte string, for 2, 4 and 8 bits without any shift in the words' own order."""

    def fields(words):  # [rows, words] -> [rows, fields]
        little = np.unpackbits(words.view(np.uint8).reshape(len(words), -1), axis=1, bitorder="little")
        return little.reshape(len(words), -1, bits) @ (1 << np.arange(bits))

    columns = scales.shape[1]
    codes = fields(np.ascontiguousarray(qweight.numpy().T)).T.astype(np.float64)
    zero_words = qzeros.numpy().astype(np.int64)
    if zero_offset and bits != 3:
        ones = sum(1 << i for i in range(0, 32, bits))
        zero_words = zero_words + ones
    zeros = fields(np.ascontiguousarray(zero_words.astype(np.uint64).astype(np.uint32)))[:, :columns]
    if zero_offset and bits == 3:
        zeros = (zeros + 1) % 8
    return torch.from_numpy((codes - zeros[g_idx]) * scales.double().numpy()[g_idx])


@pytest.mark.parametrize("bits", gptq.SUPPORTED_BITS)
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("columns", [1, 17, 32, 700])
def test_against_numpy(bits, zero_offset, columns, isa):
    qweight, qzeros, scales = random_projection(96, columns, 4, bits, "cpu")
    g_idx = torch.randint(0, 4, (96,), dtype=torch.int32)
    expected = dequantize_with_numpy(qweight, qzeros, scales, g_idx.numpy(), bits, zero_offset)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = ferrum_ops.gptq_dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset, dtype)
        # A product of a 9-bit integer and an fp16 scale is exact in fp32: one rounding, so equality.
        assert torch.equal(out, expected.to(dtype))


def test_special_scales_and_subnormal_halves(isa):
    """Infinity, NaN, overflow of fp16 and results that are subnormal there."""
    scales = torch.tensor([[float("inf"), float("nan"), 6e4, 1e-7, -3e-8, 65535.0, 65519.9, 1e-9, 0.0]])
    columns = scales.shape[1]
    qweight = torch.full((1, columns), 0x13579BDF, dtype=torch.int32)
    qzeros = gptq.pack_columns(torch.full((1, columns), 8, dtype=torch.uint8), 4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = ferrum_ops.gptq_dequantize(qweight, qzeros, scales, None, 4, 0, dtype)
        codes = torch.tensor([15, 13, 11, 9, 7, 5, 3, 1]).view(8, 1)
        torch.testing.assert_close(out, ((codes - 8.0) * scales).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_expert_of_a_stack():
    stack = [torch.stack(t) for t in zip(*(random_projection(64, 32, 2, 4, "cpu") for _ in range(3)))]
    for expert in range(3):
        tensors = [t[expert] for t in stack]
        out = ferrum_ops.gptq_dequantize(*tensors, None, 4, 1, torch.float32)
        assert torch.equal(out, gptq.dequantize(*tensors, None, 4, 1))


def test_reference_marks_rows_of_bad_groups_where_the_host_must_not_look():
    """The meta device stands in for one whose values the host does not read: no exception."""
    tensors = [t.to("meta") for t in random_projection(32, 16, 2, 4, "cpu")]
    g_idx = torch.full((32,), 9, dtype=torch.int32, device="meta")
    assert gptq.dequantize(*tensors, g_idx, 4, 1).shape == (32, 16)


def good():
    qweight, qzeros, scales = random_projection(64, 32, 2, 4, "cpu")
    return {
        "qweight": qweight,
        "qzeros": qzeros,
        "scales": scales,
        "g_idx": torch.arange(64, dtype=torch.int32) // 32,
        "bits": 4,
        "zero_offset": 1,
        "dtype": torch.float32,
    }


REFUSED = [
    ({"bits": 5}, "bits: expected .*2, 3, 4.*8.*, got 5"),
    ({"zero_offset": 2}, "zero_offset: expected 0 or 1, got 2"),
    ({"dtype": torch.float64}, "dtype: expected float32, float16 or bfloat16"),
    ({"qweight": torch.zeros(8, 32)}, "qweight: expected"),
    ({"qweight": torch.zeros(8, dtype=torch.int32)}, "qweight: expected"),
    ({"qweight": torch.zeros(8, 24, dtype=torch.int32)}, "scales: expected"),
    ({"scales": torch.zeros(2, 33)}, "scales: expected"),
    ({"scales": torch.zeros(2, 32, dtype=torch.int32)}, "scales: expected"),
    ({"scales": torch.zeros(0, 32)}, "scales: expected"),
    ({"qzeros": torch.zeros(2, 5, dtype=torch.int32)}, "qzeros: expected"),
    ({"qzeros": torch.zeros(3, 4, dtype=torch.int32)}, "qzeros: expected"),
    ({"qzeros": torch.zeros(2, 4)}, "qzeros: expected"),
    ({"g_idx": torch.zeros(63, dtype=torch.int32)}, "g_idx: expected"),
    ({"g_idx": torch.zeros(64, dtype=torch.int64)}, "g_idx: expected"),
    ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, r"g_idx: expected values in \[0, 2\), got .*2"),
    ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, r"g_idx: expected values in \[0, 2\), got .*-1"),
    ({"bits": 3, "qweight": torch.zeros(8, 32, dtype=torch.int32)}, "qweight: expected"),
    (
        {"g_idx": None, "scales": torch.zeros(3, 32), "qzeros": torch.zeros(3, 4, dtype=torch.int32)},
        "g_idx: expected int32 .*64.*3 groups do not divide that, got None",
    ),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_kernel_and_reference_refuse_by_name(change, message):
    arguments = {**good(), **change}
    with pytest.raises(RuntimeError, match=r"\[gptq_dequantize\] " + message):
        ferrum_ops.gptq_dequantize(**arguments)
    with pytest.raises(ValueError, match=r"\[gptq_dequantize\] " + message):
        ferrum_ops.OPS["gptq_dequantize"].ref(**arguments)


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_kernel_refuses_strided_tensors(name):
    arguments = good()
    arguments[name] = arguments[name].T.contiguous().T
    with pytest.raises(RuntimeError, match=rf"\[gptq_dequantize\] {name}: expected a contiguous tensor"):
        ferrum_ops.gptq_dequantize(**arguments)


def test_refuses_to_be_differentiated():
    arguments = good()
    arguments["scales"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"\[gptq_dequantize\] has no backward"):
        ferrum_ops.gptq_dequantize(**arguments)
    with torch.no_grad():
        ferrum_ops.gptq_dequantize(**arguments)


@pytest.mark.parametrize("threads", [1, 2])
def test_independent_of_threads(threads):
    arguments = good() | dict(zip(("qweight", "qzeros", "scales"), random_projection(512, 512, 2, 4, "cpu")))
    arguments["g_idx"] = torch.randint(0, 2, (512,), dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = ferrum_ops.gptq_dequantize(**arguments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, ferrum_ops.OPS["gptq_dequantize"].ref(**arguments))


def gemm_case(bits, zero_offset, groups, in_features=192, out_features=70):
    """Tensors, g_idx and the float64 weights by the numpy decoder. groups "shuffled": act-order, 5 uneven groups."""
    count = {"one": 1, "regular": 6, "shuffled": 5}[groups]
    tensors = random_projection(in_features, out_features, count, bits, "cpu")
    regular = torch.arange(in_features, dtype=torch.int32) // -(-in_features // count)
    g_idx = regular[torch.randperm(in_features)] if groups == "shuffled" else regular
    weight = dequantize_with_numpy(*tensors, g_idx.numpy(), bits, zero_offset)
    return tensors, (g_idx if groups == "shuffled" else None), weight


@pytest.mark.parametrize("bits", gptq.SUPPORTED_BITS)
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("groups", ["one", "regular", "shuffled"])
def test_gemm_against_the_dequantised_weights(bits, zero_offset, groups, isa):
    tensors, g_idx, weight = gemm_case(bits, zero_offset, groups)
    for rows, dtype in ((0, torch.float32), (1, torch.float32), (2, torch.bfloat16), (63, torch.float32)):
        x, bias = torch.randn(rows, len(weight)).to(dtype), torch.randn(weight.shape[1])
        out = ferrum_ops.gptq_gemm(x, *tensors, g_idx, bias, bits, zero_offset)
        assert out.dtype == dtype and out.is_contiguous()
        assert_close("gptq_gemm", out, x.double() @ weight + bias.double(), tolerance("gptq_gemm", dtype))


@pytest.mark.parametrize("out_features", [1, 15, 64, 129])
@pytest.mark.parametrize("in_features", [8, 72, 512])
def test_gemm_of_odd_sizes(in_features, out_features, isa):
    tensors = random_projection(in_features, out_features, in_features // 8, 4, "cpu")
    weight = ferrum_ops.gptq_dequantize(*tensors, None, 4, 1, torch.float32).double()
    parts = [torch.randn(rows, in_features) for rows in (1, 7, 13)]
    # Held against all rows: in one whose products cancel, rounding is large beside what is left.
    out = torch.cat([ferrum_ops.gptq_gemm(x, *tensors) for x in parts])
    assert_close("gptq_gemm", out, torch.cat(parts).double() @ weight)


def test_gemm_rounds_once(isa):
    """The activations are exact in fp32, so one dtype's result is another's, rounded."""
    tensors, g_idx, _ = gemm_case(4, 1, "shuffled")
    for dtype in (torch.float16, torch.bfloat16):
        x, bias = torch.randn(9, 192).to(dtype), torch.randn(70).to(dtype)
        out = ferrum_ops.gptq_gemm(x, *tensors, g_idx, bias)
        assert torch.equal(out, ferrum_ops.gptq_gemm(x.float(), *tensors, g_idx, bias.float()).to(dtype))


@pytest.mark.parametrize("groups", ["regular", "shuffled"])
def test_gemm_of_a_row_does_not_depend_on_the_batch_or_the_threads(groups, isa):
    tensors, g_idx, _ = gemm_case(4, 1, groups, in_features=384, out_features=200)
    x = torch.randn(200, 384)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = ferrum_ops.gptq_gemm(x, *tensors, g_idx)
        torch.set_num_threads(2)
        assert torch.equal(whole, ferrum_ops.gptq_gemm(x, *tensors, g_idx))
    finally:
        torch.set_num_threads(before)
    for rows in (1, 2, 3, 5, 6, 11, 193):
        part = ferrum_ops.gptq_gemm(x[-rows:], *tensors, g_idx)
        assert torch.equal(part, whole[-rows:]), f"{rows} rows"


def test_gemm_spreads_nan_and_keeps_it_in_its_row(isa):
    tensors, g_idx, _ = gemm_case(4, 1, "regular")
    x = torch.randn(8, 192)
    x[3, 100], x[5, 0] = float("nan"), float("inf")
    out = ferrum_ops.gptq_gemm(x, *tensors, g_idx)
    assert out[3].isnan().all() and not out[5].isfinite().any()
    assert out[[0, 1, 2, 4, 6, 7]].isfinite().all()


def test_gemm_without_in_features_is_the_bias(isa):
    tensors, bias = random_projection(0, 33, 0, 4, "cpu"), torch.randn(33)
    assert torch.equal(ferrum_ops.gptq_gemm(torch.randn(2, 0), *tensors, None, bias), bias.expand(2, 33))
    assert torch.equal(ferrum_ops.gptq_gemm(torch.randn(2, 0), *tensors), torch.zeros(2, 33))


def good_gemm():
    arguments = good()
    del arguments["dtype"]
    return {"x": torch.randn(3, 64), **arguments, "bias": torch.randn(32)}


@pytest.mark.parametrize(
    "change, message",
    [
        *(r for r in REFUSED if "dtype" not in r[0]),
        ({"x": torch.zeros(3, 63)}, "x: expected"),
        ({"x": torch.zeros(3, 64, dtype=torch.int32)}, "x: expected"),
        ({"x": torch.tensor(1.0)}, "x: expected"),
        ({"bias": torch.zeros(33)}, "bias: expected"),
        ({"bias": torch.zeros(32, dtype=torch.int32)}, "bias: expected"),
    ],
)
def test_gemm_kernel_and_reference_refuse_by_name(change, message):
    arguments = {**good_gemm(), **change}
    with pytest.raises(RuntimeError, match=r"\[gptq_gemm\] " + message):
        ferrum_ops.gptq_gemm(**arguments)
    with pytest.raises(ValueError, match=r"\[gptq_gemm\] " + message):
        ferrum_ops.OPS["gptq_gemm"].ref(**arguments)


@pytest.mark.parametrize("name", ["x", "qweight", "qzeros", "scales"])
def test_gemm_kernel_refuses_strided_tensors(name):
    arguments = good_gemm()
    arguments[name] = arguments[name].T.contiguous().T
    with pytest.raises(RuntimeError, match=rf"\[gptq_gemm\] {name}: expected .*contiguous"):
        ferrum_ops.gptq_gemm(**arguments)


def test_gemm_refuses_to_be_differentiated_by_its_weights():
    arguments = good_gemm()
    arguments["scales"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"\[gptq_gemm\] has no backward"):
        ferrum_ops.gptq_gemm(**arguments)
