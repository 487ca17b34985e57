"""The four Marlin ops as ops: they reach their formats, keep their inputs, and refuse what the layout does not have.

The layout itself is tested in tests/formats/test_marlin.py.
"""

import pytest
import torch

import ferrum_ops
from ferrum_ops.formats import gptq, marlin
from ferrum_ops.ops.gptq import random_projection


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
