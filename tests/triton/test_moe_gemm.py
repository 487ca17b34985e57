"""The grouped product over GPTQ words beyond the registry's samples: every configuration, blocks without an expert,
entries that name nothing, splits of K, and bad input."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import ferrum_ops
from ferrum_ops.formats import gptq as formats
from ferrum_ops.ops.moe_gemm import random_gptq_experts
from ferrum_ops.testing.compare import assert_close, tolerance
from ferrum_ops.triton import moe_gemm
from ferrum_ops.triton.gptq_kernels import FROM_G_IDX, ONE_PER_TILE
from ferrum_ops.triton.launch import Target

OP = "gptq_moe_gemm"
H200 = Target(90, 132)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXPERTS = 3


def arguments(dtype, bits, groups, block_size, tokens=5, top_k=2, width=160, out=70, weighted=True):
    """`groups` 1: a scale for all of K. More of them come from g_idx, in an order of each expert's own."""
    stack = random_gptq_experts(EXPERTS, width, out, groups, bits, "cpu")
    orders = torch.stack([torch.arange(width).int() * groups // width] * EXPERTS)
    order = orders.gather(1, torch.rand(EXPERTS, width).argsort(1)) if groups > 1 else None
    ids = torch.randint(-1, EXPERTS + 1, (tokens, top_k)).int()
    blocks = ferrum_ops.moe_align_block_size(ids, EXPERTS, block_size)
    x, weights = torch.randn(tokens, width).to(dtype), torch.rand(tokens, top_k) if weighted else None
    bias = torch.randn(EXPERTS, out).to(dtype) if weighted else None
    return [x, *stack, order, bias, *blocks, weights, top_k, block_size, bits, 1]


def check(args):
    expected = ferrum_ops.OPS[OP].ref(args[0].double(), *args[1:])
    assert_close(OP, moe_gemm.gptq_moe_gemm(*args), expected, tolerance(OP, args[0].dtype))


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [8, 48, 128])
@pytest.mark.parametrize("bits", formats.SUPPORTED_BITS)
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(dtype, groups, bits, block_size, interpreter):
    args = arguments(dtype, bits, groups, block_size)
    with interpreter() as asked:
        check(args)
    kind = FROM_G_IDX if groups > 1 or dtype == torch.float32 else ONE_PER_TILE
    assert f"groups{kind.value}-" in asked[0]


@pytest.mark.parametrize("splits", [1, 3])
def test_splits_of_k_with_bias_and_weights(splits, interpreter, monkeypatch):
    pick = moe_gemm.pick_gptq_moe_gemm_config
    monkeypatch.setattr(
        moe_gemm, "pick_gptq_moe_gemm_config", lambda *args: dataclasses.replace(pick(*args), splits=splits)
    )
    args = arguments(torch.float16, 4, 1, 16, width=384)
    with interpreter() as asked:
        check(args)
        again = [moe_gemm.gptq_moe_gemm(*args) for _ in range(2)]
    assert torch.equal(*again) and ("gptq_reduce_kernel" in asked[-1]) == (splits > 1)


def test_groups_shorter_than_a_tile(interpreter):
    args = arguments(torch.bfloat16, 4, 5, 16)
    args[4] = None  # groups of 32, in order
    with interpreter():
        check(args)


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_that_no_block_names_are_zero(splits, interpreter, monkeypatch):
    pick = moe_gemm.pick_gptq_moe_gemm_config
    monkeypatch.setattr(
        moe_gemm, "pick_gptq_moe_gemm_config", lambda *args: dataclasses.replace(pick(*args), splits=splits)
    )
    args = arguments(torch.float32, 8, 1, 8, tokens=9, top_k=1, width=128)
    entries = torch.full((24,), 9, dtype=torch.int32)
    entries[:4] = torch.tensor([4, -1, 10, 2])
    entries[8:11] = torch.tensor([0, 1, 2**31 - 1])
    entries[16:18] = torch.tensor([5, 6])  # from total_post_pad on nothing is looked at
    args[6:9] = entries, torch.tensor([1, -1, 0], dtype=torch.int32), torch.tensor([17], dtype=torch.int32)
    with interpreter():
        out = moe_gemm.gptq_moe_gemm(*args)
        check(args)
    assert sorted(out.any(1).nonzero().flatten().tolist()) == [2, 4, 5]
    args[7] = torch.tensor([3, 2**31 - 1, -(2**31)], dtype=torch.int32)
    with interpreter():
        assert not moe_gemm.gptq_moe_gemm(*args).any()


def test_a_group_outside_makes_its_experts_rows_nan(interpreter):
    args = arguments(torch.float16, 4, 5, 8, tokens=3, top_k=1)
    args[6:9] = ferrum_ops.moe_align_block_size(torch.tensor([[0], [1], [2]], dtype=torch.int32), EXPERTS, 8)
    args[4][1, 7] = 5
    with interpreter():
        out = moe_gemm.gptq_moe_gemm(*args)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_activations_at_any_address(interpreter):
    args = arguments(torch.bfloat16, 4, 1, 8)
    args[0] = torch.randn(5, 200).bfloat16()[:, 13:173]
    with interpreter():
        check(args)


def test_what_is_picked():
    def pick(blocks, block_size, group_size=128, dtype=torch.bfloat16, bits=4):
        return moe_gemm.pick_gptq_moe_gemm_config(blocks, block_size, 2048, 1536, bits, group_size, False, dtype, H200)

    decode = pick(8, 8)  # one token of 8 experts: 8 * 12 tiles of 16 tiles of K
    assert (decode.groups, decode.block_m, decode.block_n, decode.splits) == (ONE_PER_TILE.value, 16, 128, 4)
    assert pick(128, 16).splits == 1 and pick(128, 64).block_m == 64
    assert pick(8, 8, group_size=32).groups == FROM_G_IDX.value
    assert pick(8, 8, dtype=torch.float32).groups == FROM_G_IDX.value


@pytest.mark.parametrize(
    "at, wrong, message",
    [
        (1, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), r"qweight: expected a contiguous tensor"),
        (13, lambda _: 2, r"zero_offset: expected 0 or 1, got 2"),
        (11, lambda _: 24, r"block_size: expected one of"),
    ],
)
def test_bad_input_is_named(at, wrong, message, interpreter):
    args = arguments(torch.float16, 4, 1, 8)
    args[at] = wrong(args[at])
    with interpreter(), pytest.raises((RuntimeError, ValueError), match=rf"\[{OP}\] {message}"):
        moe_gemm.gptq_moe_gemm(*args)
