"""marlin_gemm and marlin_moe_gemm on wgmma, which takes what pick_marlin_config gives tiles of 64 tokens."""

import pytest
import torch

from ferrum_ops.ops.marlin import random_marlin
from ferrum_ops.ops.moe_gemm import random_marlin_experts
from ferrum_ops.ops.moe_routing import moe_align_block_size_ref
from tests.emulation.test_marlin import COUNTERS, check
from tests.emulation.test_moe_gemm import routed, run

DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_instance(kernel, wgmma, bits, dtype):
    """Two tiles of tokens; 5 units of columns fill no tile of 4; K ends within a stage, and within a row of x."""
    tensors = random_marlin(208, 320, 32, bits, "cpu", asymmetric=True)
    check(kernel, torch.randn(65, 202).to(dtype), tensors, 32, bits, torch.randn(320))


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 16, 48, 64, 128])
def test_groups(kernel, wgmma, group_size, asymmetric):
    """Of one step, of stages, beginning and ending within stages; more stages than lie in shared memory."""
    bits, dtype = (8, torch.bfloat16) if group_size in (-1, 48) else (4, torch.float16)
    tensors = random_marlin(464, 64, group_size, bits, "cpu", asymmetric=asymmetric)
    check(kernel, torch.randn(40, 464).to(dtype), tensors, group_size, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_of_any_dtype(kernel, wgmma, dtype):
    packed, scales, zeros, perm = random_marlin(96, 256, 32, 4, "cpu", act_order=True)
    check(kernel, torch.randn(33, 96).half(), (packed, scales.to(dtype), zeros, perm), 32, 4)


@pytest.mark.parametrize("in_features", [16, 64, 128])
def test_fewer_stages_than_are_fetched_ahead(kernel, wgmma, in_features):
    check(kernel, torch.randn(33, in_features).half(), random_marlin(in_features, 64, 16, 4, "cpu"), 16)


def test_split_k(kernel, wgmma):
    tensors = random_marlin(1040, 64, 48, 4, "cpu", asymmetric=True)
    check(kernel, torch.randn(50, 1040).half(), tensors, 48, counters=COUNTERS)


def test_one_block_walks_over_all_tiles(kernel, wgmma):
    tensors = random_marlin(192, 448, 64, 4, "cpu")
    check(kernel, torch.randn(70, 192).half(), tensors, 64, options=("fp32", 1))


@pytest.mark.parametrize("block_size", [48, 64, 128])
def test_every_block_size(kernel, wgmma, block_size):
    """An expert with more rows than a block, one with fewer, one with none; the epilogue of gate and up."""
    stack = random_marlin_experts(4, 80, 320, 32, 4, "cpu", asymmetric=True)
    ids = torch.cat((torch.zeros(block_size + 3), torch.tensor([2.0, 3, 3, 9, -1]))).int().view(-1, 1)
    blocks = moe_align_block_size_ref(ids, 4, block_size, True, None)
    x, bias = (0.02 * torch.randn(len(ids), 80)).bfloat16(), torch.randn(4, 320)
    out = run(kernel, x, stack, blocks, 1, block_size, 160, 32, bias=bias, epilogue="silu_mul")
    assert (out[-2:] == 0).all() and (out[:-2] != 0).any(1).all()


def test_pairs_and_weights(kernel, wgmma):
    stack = random_marlin_experts(3, 64, 128, 32, 4, "cpu", act_order=True)
    x, weights = torch.randn(40, 64).half(), torch.rand(40, 2)
    run(kernel, x, stack, routed(40, 2, 3, 64), 2, 64, 100, 32, weights=weights)


def test_blocks_without_an_expert(kernel, wgmma):
    stack = random_marlin_experts(2, 48, 64, 16, 4, "cpu")
    ids = torch.full((192,), 40).int()
    ids[:3], ids[64:67], ids[128:131] = (
        torch.tensor(three).int() for three in ([5, -1, 0], [1, 2, 3], [4, 6, 2**31 - 1])
    )
    out = run(kernel, torch.randn(20, 48).half(), stack, (ids, torch.tensor([1, -1, 0]).int(), torch.tensor([130]).int()), 2, 64, 64, 16)  # fmt: skip
    assert (out != 0).any(1).nonzero().flatten().tolist() == [0, 4, 5, 6]


def test_it_is_another_kernel_and_only_where_asked_for(emulated):
    """More collectives where wgmma is taken: of 64 tokens, not of 32."""
    tensors, counts = random_marlin(64, 64, 64, 4, "cpu"), {}
    for tokens in (32, 33):
        for on in (0, 1):
            args = (*tensors, None, torch.zeros(0, dtype=torch.int32), 64, 64, 4, "fp32", 0)
            emulated.c.ferrum_marlin_wgmma(on)
            before = emulated.collectives()
            emulated.op("marlin_gemm")(torch.randn(tokens, 64).half(), *args)
            counts[tokens, on] = emulated.collectives() - before
            emulated.c.ferrum_marlin_wgmma(0)
    assert counts[32, 0] == counts[32, 1] and counts[33, 0] != counts[33, 1]
