import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

import ferrum_ops
from ferrum_ops.ops import norm
from ferrum_ops.testing.compare import assert_close, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum


def test_reference_equals_torch_in_float64():
    x, weight = torch.randn(5, 100, dtype=torch.float64), torch.randn(100, dtype=torch.float64)
    assert_close("rms_norm", norm.rms_norm_ref(x, weight, 1e-6), F.rms_norm(x, (100,), weight, 1e-6), 1e-14)


def test_reference_equals_transformers():
    module = Qwen3MoeRMSNorm(128, eps=1e-5)
    module.weight.data.normal_()
    x = torch.randn(3, 7, 128)
    with torch.no_grad():
        assert_close("rms_norm", norm.rms_norm_ref(x, module.weight, 1e-5), module(x))


def test_reference_of_the_sum_is_norm_of_the_sum():
    x, residual = torch.randn(2, 6, 63, dtype=torch.float64).unbind()
    weight = torch.randn(63, dtype=torch.float64)
    normed, total = norm.fused_add_rms_norm_ref(x, residual, weight, 1e-6)
    assert_close("fused_add_rms_norm", total, x + residual, 0.0)
    assert_close("fused_add_rms_norm", normed, F.rms_norm(x + residual, (63,), weight, 1e-6), 1e-14)


@pytest.mark.parametrize("form", ["kernel", "reference"])
def test_sum_is_normalised_before_it_is_rounded(form, isa):
    # 257 is no bfloat16: normalising the rounded 256 gives another last bit in the second column.
    x = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    residual = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    weight = torch.ones(2, dtype=torch.bfloat16)
    function = OPS.fused_add_rms_norm if form == "kernel" else norm.fused_add_rms_norm_ref
    normed, total = function(x, residual, weight, 0.0)
    exact = torch.tensor([257.0, 1.0], dtype=torch.float64)
    expected = (exact / exact.square().mean().sqrt()).to(torch.bfloat16)
    rounded = torch.tensor([256.0, 1.0], dtype=torch.float64)
    assert (rounded / rounded.square().mean().sqrt()).to(torch.bfloat16)[1] != expected[1]
    assert torch.equal(normed[0], expected)
    assert torch.equal(total[0], torch.tensor([256.0, 1.0], dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_the_rounded_sum_to_the_bit(dtype, isa):
    x, residual = torch.randn(2, 9, 127).to(dtype).unbind()
    _, total = OPS.fused_add_rms_norm(x, residual, torch.ones(127, dtype=dtype), 1e-6)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_equals_functional_and_writes_nothing_else(dtype, isa):
    storage = torch.randn(2, 6, 300).to(dtype)
    before = storage.clone()
    x, residual = storage[0, :, 50:177], storage[1, :, 20:147]
    weight = torch.randn(127).to(dtype)
    normed, total = OPS.fused_add_rms_norm(x, residual, weight, 1e-6)
    assert OPS.fused_add_rms_norm_(x, residual, weight, 1e-6) is None
    before[0, :, 50:177], before[1, :, 20:147] = normed, total
    assert torch.equal(storage, before)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_float32_weight_is_not_rounded(dtype, isa):
    x, weight = torch.randn(4, 100).to(dtype), 1 + 1e-4 * torch.randn(100)
    expected = F.rms_norm(x.double(), (100,), weight.double(), 1e-6)
    assert_close("rms_norm", OPS.rms_norm(x, weight, 1e-6), expected, tolerance("rms_norm", dtype))


def test_squares_beyond_float16_do_not_overflow(isa):
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    assert torch.equal(OPS.rms_norm(x, torch.ones(64), 1e-6), torch.ones(1, 64, dtype=torch.float16))


def test_no_rows(isa):
    empty, weight = torch.empty(0, 64), torch.ones(64)
    assert OPS.rms_norm(empty, weight, 1e-6).shape == (0, 64)
    assert [t.shape for t in OPS.fused_add_rms_norm(empty, empty, weight, 1e-6)] == [(0, 64), (0, 64)]


def test_a_row_of_zeros_stays_zero(isa):
    assert torch.equal(OPS.rms_norm(torch.zeros(2, 63), torch.ones(63), 1e-6), torch.zeros(2, 63))


@pytest.mark.parametrize("column", [0, 40, 126])
def test_nan_makes_its_row_nan_and_no_other(column, isa):
    x = torch.randn(3, 127)
    x[1, column] = torch.nan
    nan = OPS.rms_norm(x, torch.ones(127), 1e-6).isnan()
    assert nan[1].all() and not nan[0].any() and not nan[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_depends_on_neither_threads_nor_neighbours(dtype, isa):
    x, residual = torch.randn(2, 300, 512).to(dtype).unbind()
    weight = torch.randn(512).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS.fused_add_rms_norm(x, residual, weight, 1e-6))
    finally:
        torch.set_num_threads(threads)
    alone = OPS.fused_add_rms_norm(x[123:124], residual[123:124], weight, 1e-6)
    for result in results:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])
        assert torch.equal(result[0][123:124], alone[0])


X, W = torch.ones(4, 64), torch.ones(64)
BAD = {
    "integers": ("rms_norm", (X.int(), W, 1e-6), r"x: expected float32, float16 or bfloat16, got"),
    "scalar": ("rms_norm", (torch.ones(()), W, 1e-6), r"x: expected at least 1 dimension, got 0"),
    "transposed": ("rms_norm", (torch.ones(64, 4).t(), W, 1e-6), r"x: expected contiguous rows with one row stride"),
    "two row strides": ("rms_norm", (torch.ones(3, 5, 64)[:, :4], W, 1e-6), r"x: expected contiguous rows with one"),
    "weight size": ("rms_norm", (X, W[:63], 1e-6), r"weight: expected shape \(64,?\), got \(63,?\)"),
    "weight dtype": ("rms_norm", (X.half(), W.bfloat16(), 1e-6), r"weight: expected .*(float16|Half) or .*, got"),
    "weight stride": ("rms_norm", (X, torch.ones(128)[::2], 1e-6), r"weight: expected a contiguous tensor, got"),
    "residual shape": (
        "fused_add_rms_norm",
        (X, X[:3], W, 1e-6),
        r"residual: expected shape \(4, 64\), got \(3, 64\)",
    ),
    "residual dtype": ("fused_add_rms_norm", (X, X.half(), W, 1e-6), r"residual: expected .*[fF]loat.*, got"),
    "rows overlap": (
        "fused_add_rms_norm_",
        (torch.ones(1, 64).expand(4, 64), torch.zeros(4, 64), W, 1e-6),
        r"x: expected rows that do not overlap, got",
    ),
}


@pytest.mark.parametrize("form", ["kernel", "reference", "fake"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    op, args, message = BAD[case]
    function = {"kernel": getattr(OPS, op), "reference": ferrum_ops.OPS[op].ref, "fake": ferrum_ops.OPS[op].fake}
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        function[form](*args)


def test_sum_in_place_on_one_tensor_is_refused():
    x = torch.ones(2, 64)
    with pytest.raises(RuntimeError, match=r"\[fused_add_rms_norm_\] residual: expected other memory than that of x"):
        OPS.fused_add_rms_norm_(x, x, W, 1e-6)


def test_gradients_are_refused_in_place():
    x = torch.ones(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"\[fused_add_rms_norm_\] has no backward"):
        ferrum_ops.fused_add_rms_norm_(X[:2].clone(), x, W)
    with torch.no_grad():
        ferrum_ops.fused_add_rms_norm_(X[:2].clone(), x, W)


def test_references_trace_whole():
    compiled = torch.compile(norm.fused_add_rms_norm_ref, backend="eager", fullgraph=True)
    x, residual = torch.randn(2, 3, 64).unbind()
    for got, expected in zip(compiled(x, residual, W, 1e-6), norm.fused_add_rms_norm_ref(x, residual, W, 1e-6)):
        assert torch.equal(got, expected)
