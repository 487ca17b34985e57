"""The Marlin ops as ops: they reach their formats, keep their inputs, and refuse what the layout does not have; the
product against plain GPTQ weights of the same matrix.

The layout itself is tested in tests/formats/test_marlin.py.
"""

import pytest
import torch

import ferrum_ops
from ferrum_ops.formats import gptq, marlin
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.ops.marlin import marlin_workspace, random_marlin
from ferrum_ops.testing.compare import assert_close, tolerance


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_projection_survives_the_round_trip(bits, act_order):
    """qweight and scales to Marlin and back give the same dequantised weights."""
    in_features, out_features, group_size = 128, 192, 32
    qweight, _, scales = random_projection(in_features, out_features, 4, bits, "cpu")
    g_idx = torch.arange(in_features, dtype=torch.int32) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(in_features)]
    perm = gptq.sort_groups(g_idx, in_features, group_size)
    assert (perm is None) != act_order
    packed = ferrum_ops.marlin_repack(qweight, perm, in_features, out_features, bits)
    permuted = ferrum_ops.marlin_permute_scales(scales, in_features, group_size)
    qweight_back = ferrum_ops.marlin_unpack(packed, perm, in_features, out_features, bits)
    scales_back = ferrum_ops.marlin_unpermute_scales(permuted, in_features, group_size)
    g_idx_back = gptq.g_idx_from_perm(perm, group_size, in_features)
    assert torch.equal(qweight_back, qweight)
    assert torch.equal(scales_back, scales)
    assert torch.equal(g_idx_back, g_idx)


def test_the_two_scale_orders_differ():
    """Choosing by the wrong group count would be silent: only the values show it."""
    scales = torch.randn(1, 64)
    one_group = ferrum_ops.marlin_permute_scales(scales, 128, -1)
    two_groups = ferrum_ops.marlin_permute_scales(scales.expand(2, 64), 256, 128)
    assert not torch.equal(one_group[0], two_groups[0])


def test_results_do_not_alias_their_inputs():
    for shape in ((1, 64), (1, 0)):
        scales = torch.randn(shape)
        out = ferrum_ops.marlin_permute_scales(scales, 128, -1)
        assert out.untyped_storage()._cdata != scales.untyped_storage()._cdata


def test_strided_inputs():
    qweight = torch.randint(-(2**31), 2**31, (64, 4)).to(torch.int32).T
    packed = ferrum_ops.marlin_repack(qweight, None, 32, 64, 4)
    assert torch.equal(packed, ferrum_ops.marlin_repack(qweight.contiguous(), None, 32, 64, 4))
    strided = packed.T.contiguous().T
    assert torch.equal(ferrum_ops.marlin_unpack(strided, None, 32, 64, 4), qweight)


@pytest.mark.parametrize(
    "in_features, out_features, name", [(40, 64, "in_features"), (32, 96, "out_features"), (24, 32, "in_features")]
)
def test_sizes_that_do_not_fit_are_refused_by_name(in_features, out_features, name):
    qweight = torch.zeros(in_features // 8, out_features, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"\[marlin_repack\] {name}: expected a multiple of"):
        ferrum_ops.marlin_repack(qweight, None, in_features, out_features, 4)
    packed = torch.zeros(in_features // 16, out_features * 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"\[marlin_unpack\] {name}: expected a multiple of"):
        ferrum_ops.marlin_unpack(packed, None, in_features, out_features, 4)


@pytest.mark.parametrize("op", ["marlin_permute_scales", "marlin_unpermute_scales"])
def test_scales_refuse_to_be_differentiated(op):
    scales = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"\[{op}\] has no backward"):
        getattr(ferrum_ops, op)(scales, 64, 32)


def test_compiles_without_a_graph_break():
    def load(qweight, scales, perm):
        packed = ferrum_ops.marlin_repack(qweight, perm, 64, 64, 4)
        return packed, ferrum_ops.marlin_permute_scales(scales, 64, 32)

    qweight, _, scales = random_projection(64, 64, 2, 4, "cpu")
    perm = torch.randperm(64).to(torch.int32)
    expected = load(qweight, scales, perm)
    compiled = torch.compile(load, fullgraph=True, backend="eager")(qweight, scales, perm)
    assert all(torch.equal(c, e) for c, e in zip(compiled, expected))
    assert torch.equal(expected[0], marlin.repack(qweight, perm, 64, 64, 4))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_zero_points_survive_the_round_trip(bits, zero_offset):
    zeros = torch.randint(0, 2**bits, (3, 128)).to(torch.uint8)
    qzeros = gptq.encode_zeros(zeros, bits, "gptq" if zero_offset else "gptq_v2")
    packed = ferrum_ops.marlin_repack_zeros(qzeros, 128, bits, zero_offset)
    assert torch.equal(marlin.unpack_zeros(packed, bits), zeros)
    assert torch.equal(marlin.restore_zeros(packed, 128, bits, zero_offset), qzeros)
    stack = torch.stack([qzeros, qzeros.flip(0)])
    assert torch.equal(ferrum_ops.marlin_repack_zeros(stack, 128, bits, zero_offset)[0], packed)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 3}, r"bits: expected one of \(4, 8\), got 3"),
        ({"out_features": 96}, "out_features: expected a multiple of 64"),
        ({"out_features": 128}, r"qzeros: expected int32 \(G, 16\) or \(E, G, 16\), got int32 \(2, 8\)"),
        ({"qzeros": torch.zeros(2, 8)}, "qzeros: expected int32"),
        ({"zero_offset": 2}, "zero_offset: expected 0 or 1, got 2"),
    ],
)
def test_repacking_zeros_refuses_by_name(change, message):
    arguments = {"qzeros": torch.zeros(2, 8, dtype=torch.int32), "out_features": 64, "bits": 4, "zero_offset": 1}
    with pytest.raises(ValueError, match=r"\[marlin_repack_zeros\] " + message):
        ferrum_ops.marlin_repack_zeros(**{**arguments, **change})


def projection(in_features, out_features, group_size, bits, act_order, asymmetric):
    """The float64 weights of a GPTQ projection, its Marlin tensors (packed, scales, zeros, perm) and their group size.

    With act-order groups have any number of rows and are padded to whole tiles.
    """
    groups = gptq.num_groups(in_features, group_size)
    qweight, qzeros, scales = random_projection(in_features, out_features, groups, bits, "cpu")
    if not asymmetric:
        middle = torch.full((groups, out_features), 2 ** (bits - 1), dtype=torch.uint8)
        qzeros = gptq.encode_zeros(middle, bits, "gptq")
    g_idx = torch.arange(in_features, dtype=torch.int32) // gptq.effective_group_size(in_features, group_size)
    if act_order:
        g_idx = torch.cat((torch.randint(0, groups, (in_features - groups,)), torch.arange(groups))).int()
    weight = gptq.dequantize(qweight, qzeros, scales.double(), g_idx, bits, 1)
    size = gptq.packed_group_size(g_idx, in_features, group_size, marlin.TILE_ROWS)
    perm = gptq.sort_groups(g_idx, in_features, group_size, size)
    rows = in_features if perm is None else len(perm)
    tensors = (
        ferrum_ops.marlin_repack(qweight, perm, in_features, out_features, bits),
        ferrum_ops.marlin_permute_scales(scales, rows, size),
        ferrum_ops.marlin_repack_zeros(qzeros, out_features, bits, 1) if asymmetric else None,
        perm,
    )
    return weight, tensors, -1 if group_size == -1 else size


def product(x, tensors, group_size, bits=4, bias=None, out_features=None, **options):
    columns = tensors[0].shape[-1] * 2 // bits if out_features is None else out_features
    workspace = marlin_workspace("cpu")
    return ferrum_ops.marlin_gemm(x, *tensors, bias, workspace, columns, group_size, bits, **options)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 48, 128])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_product_against_gptq_weights(bits, group_size, act_order, asymmetric):
    weight, tensors, packed_group = projection(144, 128, group_size, bits, act_order, asymmetric)
    assert act_order == (tensors[3] is not None) or group_size == -1
    for rows, dtype in ((0, torch.float32), (1, torch.float16), (63, torch.bfloat16), (5, torch.float32)):
        x, bias = torch.randn(rows, 144).to(dtype), torch.randn(128)
        out = product(x, tensors, packed_group, bits, bias)
        assert out.dtype == dtype
        assert_close("marlin_gemm", out, x.double() @ weight + bias.double(), tolerance("marlin_gemm", dtype))


def test_padding_at_load():
    """100 in-features on 112 packed rows, 100 out-features on 128 columns: padding counts for nothing, whatever is in
    it."""
    weight, tensors, group = projection(112, 128, 32, 4, False, True)
    x, bias = torch.randn(3, 100), torch.randn(100)
    out = product(x, tensors, group, 4, bias, out_features=100)
    assert out.shape == (3, 100) and out.is_contiguous()
    assert_close("marlin_gemm", out, x.double() @ weight[:100, :100] + bias.double())


def test_columns_of_a_wider_matrix_and_an_expert_of_a_stack():
    _, (packed, scales, zeros, perm), group = projection(96, 256, 32, 4, True, True)
    x = torch.randn(7, 96)
    whole = product(x, (packed, scales, zeros, perm), group)
    views = (packed[:, 64 * 2 : 192 * 2], scales[:, 64:192], zeros[:, 8:24], perm)
    assert_close("marlin_gemm", product(x, views, group), whole[:, 64:192].double())
    stack = [torch.stack((torch.zeros_like(t), t)) for t in (packed, scales, zeros, perm)]
    assert torch.equal(product(x, [t[1] for t in stack], group), whole)


def test_options_of_the_kernel_do_not_change_the_meaning():
    _, tensors, group = projection(64, 64, 32, 4, False, False)
    x = torch.randn(2, 64)
    for options in ({"reduction": "rounded"}, {"reduction": "atomic"}, {"max_sms": 3}):
        assert torch.equal(product(x, tensors, group, **options), product(x, tensors, group))


def test_a_padding_row_keeps_its_nan_out():
    """What lies behind K, or in no packed row, is not read."""
    _, tensors, group = projection(48, 64, 16, 4, True, False)
    x = torch.randn(2, 60)
    x[:, 48:] = float("nan")
    assert product(x, tensors, group).isfinite().all()


def good_product():
    _, (packed, scales, zeros, perm), group = projection(64, 64, 32, 4, True, True)
    return {
        "x": torch.randn(3, 64),
        "packed": packed,
        "scales": scales,
        "zeros": zeros,
        "perm": perm,
        "bias": torch.randn(60),
        "workspace": marlin_workspace("cpu"),
        "out_features": 60,
        "group_size": group,
        "bits": 4,
    }


REFUSED_PRODUCTS = [
    ({"bits": 3}, r"bits: expected one of \(4, 8\), got 3"),
    ({"packed": torch.zeros(4, 128)}, "packed: expected int32"),
    ({"packed": torch.zeros(1, 4, 128, dtype=torch.int32)}, "packed: expected int32"),
    ({"packed": torch.zeros(4, 64, dtype=torch.int32)}, "out_features: expected a multiple of 64, got 32"),
    ({"out_features": 65}, "out_features: expected at most 64 columns of packed, got 65"),
    ({"scales": torch.zeros(3, 64)}, r"scales: expected floating \(2, 64\)"),
    ({"scales": torch.zeros(2, 64, dtype=torch.int32)}, "scales: expected floating"),
    ({"group_size": 16}, "scales: expected floating"),
    ({"zeros": torch.zeros(2, 4, dtype=torch.int32)}, r"zeros: expected int32 \(2, 8\)"),
    ({"zeros": torch.zeros(2, 8)}, "zeros: expected int32"),
    ({"x": torch.zeros(3, 64, dtype=torch.int32)}, "x: expected floating"),
    ({"x": torch.tensor(1.0)}, "x: expected floating"),
    ({"perm": None, "x": torch.zeros(3, 1000)}, r"x: expected floating \(..., K\), K from"),
    ({"perm": torch.arange(16).int()}, "perm: expected int32"),
    ({"x": torch.zeros(3, 40)}, r"perm: expected values in \[-1, 40\), got"),
    ({"bias": torch.zeros(64)}, r"bias: expected contiguous floating \(60,\)"),
    ({"workspace": torch.zeros(4)}, "workspace: expected int32"),
    ({"reduction": "fast"}, r"reduction: expected one of \('fp32', 'rounded', 'atomic'\), got 'fast'"),
    ({"max_sms": -1}, "max_sms: expected 0 or more, got -1"),
    ({"x": torch.zeros(64, 3).T}, "x: expected a contiguous last dimension"),
]


@pytest.mark.parametrize("change, message", REFUSED_PRODUCTS)
def test_product_refuses_by_name(change, message):
    arguments = good_product()
    ferrum_ops.marlin_gemm(**arguments)
    with pytest.raises(ValueError, match=r"\[marlin_gemm\] " + message):
        ferrum_ops.marlin_gemm(**{**arguments, **change})


def test_workspace_is_zero_before_and_after():
    workspace = torch.zeros(64, dtype=torch.int32)
    ferrum_ops.marlin_gemm(**{**good_product(), "workspace": workspace})
    assert (workspace == 0).all()


def test_product_compiles_whole_with_its_workspace():
    """The workspace counts as mutated, so the compiler has to functionalise the call."""
    tensors, workspace = random_marlin(64, 64, 32, 4, "cpu"), torch.zeros(8, dtype=torch.int32)

    def layers(x):
        x = ferrum_ops.marlin_gemm(x, *tensors, None, workspace, 64, 32)
        return ferrum_ops.marlin_gemm(x, *tensors, None, workspace, 64, 32)

    x = torch.randn(3, 64)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layers(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("group_size", [-1, 48])
def test_dense_weights_are_gptqs(group_size, act_order, bits):
    weight, tensors, packed_group = projection(144, 128, group_size, bits, act_order, True)
    out = torch.empty(144, 128, dtype=torch.float64)
    ferrum_ops.marlin_dequantize_out(*tensors, None, packed_group, bits, False, out)
    assert torch.equal(out, weight)


def test_dense_weights_of_the_experts_that_have_rows():
    stacks = [projection(64, 128, 32, 4, True, True) for _ in range(3)]
    tensors = [torch.stack(parts) for parts in zip(*(s[1] for s in stacks))]
    out = torch.full((3, 64, 100), 5.0)
    ferrum_ops.marlin_dequantize_out(*tensors, torch.tensor([0, 2, 2, 4]).int(), stacks[0][2], 4, True, out)
    assert (out[1] == 5).all()
    for e in (0, 2):
        gate, up = marlin.split_gate_up(stacks[e][0])
        assert torch.equal(out[e].double(), torch.cat((gate[:, :50], up[:, :50]), dim=1))


def good_dense():
    _, (packed, scales, zeros, _), group = projection(64, 64, 32, 4, False, True)
    stack = [torch.stack((t, t)) for t in (packed, scales, zeros, torch.randperm(64).int())]
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    values = {
        "expert_offsets": offsets,
        "group_size": group,
        "bits": 4,
        "interleaved": True,
        "out": torch.zeros(2, 64, 64),
    }
    return dict(zip(("packed", "scales", "zeros", "perm"), stack)) | values


REFUSED_DENSE = [
    ({"bits": 3}, r"bits: expected one of \(4, 8\), got 3"),
    ({"packed": torch.zeros(2, 4, 128)}, "packed: expected int32"),
    ({"scales": torch.zeros(2, 3, 64)}, r"scales: expected floating"),
    ({"zeros": torch.zeros(2, 2, 4, dtype=torch.int32)}, "zeros: expected int32"),
    ({"perm": torch.zeros(64, dtype=torch.int32)}, r"perm: expected int32 \(2, 64\), got"),
    ({"expert_offsets": torch.zeros(2, dtype=torch.int32)}, r"expert_offsets: expected contiguous int32 \(E \+ 1,\)"),
    ({"expert_offsets": torch.zeros(3)}, "expert_offsets: expected contiguous int32"),
    ({"out": torch.zeros(2, 64, 65)}, "out: expected .*N up to 64 and even, got"),
    ({"out": torch.zeros(2, 64, 63)}, "out: expected .*N up to 64 and even, got"),
    ({"out": torch.zeros(64, 64)}, "out: expected"),
    ({"out": torch.zeros(2, 65, 64), "perm": None}, "out: expected .*K up to 64"),
    ({"out": torch.zeros(2, 64, 64).mT}, "out: expected"),
    ({"out": torch.zeros(2, 64, 1).expand(2, 64, 64)}, "out: expected"),
    ({"out": torch.zeros(64, 64).expand(2, 64, 64)}, "out: expected rows that do not overlap|out: expected contiguous"),
    ({"out": torch.zeros(2, 64, 64, dtype=torch.int32)}, "out: expected"),
]


@pytest.mark.parametrize("change, message", REFUSED_DENSE)
def test_dense_weights_refuse_by_name(change, message):
    arguments = good_dense()
    ferrum_ops.marlin_dequantize_out(**arguments)
    with pytest.raises(ValueError, match=r"\[marlin_dequantize_out\] " + message):
        ferrum_ops.marlin_dequantize_out(**{**arguments, **change})


def test_dense_weights_want_every_row_of_a_perm():
    arguments = good_dense()
    arguments["perm"] = arguments["perm"].clamp_min(1)
    with pytest.raises(ValueError, match=r"\[marlin_dequantize_out\] perm: expected every row of \[0, 64\) once"):
        ferrum_ops.marlin_dequantize_out(**arguments)
    with pytest.raises(RuntimeError, match=r"\[marlin_dequantize_out\] has no backward"):
        ferrum_ops.marlin_dequantize_out(**{**arguments, "out": torch.zeros(2, 64, 64, requires_grad=True)})
