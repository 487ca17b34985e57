"""The kernel of marlin_moe_gemm: every size of blocks, and lists of blocks that no host has checked."""

import pytest
import torch

import ferrum_ops
from ferrum_ops.ops.moe_gemm import product_columns, random_marlin_experts
from ferrum_ops.ops.moe_routing import BLOCK_SIZES, moe_align_block_size_ref
from ferrum_ops.testing.compare import assert_close, tolerance
from tests.ops.test_moe_gemm import REFUSED_GROUPED, good_grouped


def routed(tokens, top_k, experts, block_size):
    """Blocks of a random routing in which some pairs have no expert here."""
    ids = torch.randint(-1, experts + 1, (tokens, top_k)).int()
    return moe_align_block_size_ref(ids, experts, block_size, True, None)


def run(kernel, x, stack, blocks, top_k, block_size, out, group_size, bits=4, *, bias=None, weights=None,
        epilogue="none", counters=0, max_sms=0, slots=1):  # fmt: skip
    """The result, as good as the reference's in float64."""
    workspace = torch.zeros(counters, dtype=torch.int32)
    shape = (top_k, block_size, out, group_size, bits, epilogue, "fp32", max_sms, slots)
    args = (*stack, bias, *blocks, weights, workspace, *shape)
    got, left = kernel("marlin_moe_gemm", x, *args)
    expected = ferrum_ops.OPS["marlin_moe_gemm"].ref(x.double(), *args)
    assert (left == 0).all() and got.dtype == x.dtype
    assert_close("marlin_moe_gemm", got, expected, tolerance("marlin_moe_gemm", x.dtype))
    return got


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(kernel, block_size, bits, dtype):
    """An expert with more rows than a block, one with fewer, one with none; the epilogue of gate and up."""
    stack = random_marlin_experts(4, 80, 320, 32, bits, "cpu", asymmetric=True)
    ids = torch.cat((torch.zeros(block_size + 3), torch.tensor([2.0, 3, 3, 9, -1]))).int().view(-1, 1)
    blocks = moe_align_block_size_ref(ids, 4, block_size, True, None)
    x, bias = (0.02 * torch.randn(len(ids), 80)).to(dtype), torch.randn(4, 320)
    out = run(kernel, x, stack, blocks, 1, block_size, 160, 32, bits, bias=bias, epilogue="silu_mul")
    assert (out[-2:] == 0).all() and (out[:-2] != 0).any(1).all()


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_pairs_and_weights(kernel, group_size, act_order):
    """Row p of the result comes from row p // top_k of x and is weighed in float32."""
    stack = random_marlin_experts(5, 64, 128, group_size, 4, "cpu", act_order=act_order)
    x, weights = torch.randn(6, 64).bfloat16(), torch.rand(6, 3)
    run(kernel, x, stack, routed(6, 3, 5, 8), 3, 8, 128, group_size, weights=weights)
    run(kernel, torch.randn(18, 64).half(), stack, routed(6, 3, 5, 16), 1, 16, 100, group_size, weights=weights)


def test_a_routed_expert_block(kernel):
    """Two products and a sum over slots are the experts of a layer, as in a step of decoding."""
    tokens, top_k, experts, hidden, width = 3, 2, 4, 64, 40
    w13 = random_marlin_experts(experts, hidden, product_columns(width, "silu_mul") + 48, 32, 4, "cpu")
    w2 = random_marlin_experts(experts, 48, hidden, 16, 4, "cpu")
    blocks, weights = routed(tokens, top_k, experts, 8), torch.rand(tokens, top_k)
    x = torch.randn(tokens, hidden).half()
    middle = run(kernel, x, w13, blocks, top_k, 8, width, 32, epilogue="silu_mul")
    run(kernel, middle, w2, blocks, 1, 8, hidden, 16, weights=weights)


@pytest.mark.parametrize("bits, dtype", [(4, torch.bfloat16), (8, torch.float16)])
@pytest.mark.parametrize(
    "tokens, top_k, block_size, out, options",
    [
        (1, 8, 8, 128, {}),
        (16, 8, 8, 104, {}),
        (9, 3, 16, 101, {}),
        (7, 2, 32, 70, {"counters": 64}),  # K is split as well
        (6, 9, 8, 64, {"max_sms": 1}),
        (5, 4, 128, 39, {"epilogue": "silu_mul"}),
    ],
    ids=str,
)
def test_sums_over_slots(kernel, tokens, top_k, block_size, out, options, bits, dtype):
    """The router's weight and the sum in float32, of every routing's pairs that have an expert here."""
    stack = random_marlin_experts(5, 528, 128, 48, bits, "cpu", asymmetric=True)
    x, weights = (0.05 * torch.randn(tokens * top_k, 528)).to(dtype), torch.rand(tokens, top_k)
    blocks = routed(tokens, top_k, 5, block_size)
    options = {
        "counters": 2,
        "weights": weights,
        "bias": torch.randn(5, 80 if options.get("epilogue") else out),
    } | options
    run(kernel, x, stack, blocks, 1, block_size, out, 48, bits, slots=top_k, **options)


def test_sums_over_slots_of_many_tokens(kernel):
    """More rows than a block of threads looks for at a time; tokens of no expert here; a weight that counts nowhere."""
    stack = random_marlin_experts(2, 16, 64, 16, 4, "cpu")
    ids = torch.full((700, 3), -1).int()
    ids[::40, 1], ids[5, 2], weights = 1, 0, torch.rand(700, 3)
    weights[0, 0] = torch.nan
    blocks = moe_align_block_size_ref(ids, 2, 8, True, None)
    out = run(kernel, torch.randn(2100, 16).half(), stack, blocks, 1, 8, 3, 16, weights=weights, counters=1, slots=3)
    assert (out != 0).any(1).sum() == 19


def test_sums_over_slots_that_nothing_names(kernel):
    stack = random_marlin_experts(2, 32, 64, 16, 4, "cpu")
    for entries, used in ((0, 0), (8, 0), (8, -3)):
        blocks = (torch.zeros(entries).int(), torch.zeros(entries // 8).int(), torch.tensor([used]).int())
        out = run(kernel, torch.randn(6, 32).half(), stack, blocks, 1, 8, 64, 16, counters=1, slots=3)
        assert out.shape == (2, 64) and (out == 0).all()


def test_sums_over_slots_have_one_order(emulated):
    """Whichever block is the last, and however K and tiles are spread over blocks."""
    stack, blocks = random_marlin_experts(4, 512, 128, 64, 4, "cpu"), routed(9, 4, 4, 8)
    x, outs = torch.randn(36, 512).half(), []
    for schedule in ("forward", "reverse", "random"):
        for max_sms in (0, 1, 3):
            workspace = torch.zeros(2, dtype=torch.int32)
            with emulated.schedule(schedule, seed=7):
                shape = (1, 8, 128, 64, 4, "none", "fp32", max_sms, 4)
                outs.append(emulated.op("marlin_moe_gemm")(x, *stack, None, *blocks, None, workspace, *shape))
    assert all(torch.equal(outs[0], out) for out in outs)


def test_sums_over_slots_need_counters(emulated):
    arguments = {**good_grouped(), "epilogue": "none", "reduction": "fp32", "max_sms": 0, "slots": 2}
    arguments |= {"x": torch.zeros(4, 32).half(), "workspace": torch.zeros(0, dtype=torch.int32)}
    with pytest.raises(
        RuntimeError, match=r"\[marlin_moe_gemm\] workspace: expected at least 1 counters for sums over"
    ):
        emulated.op("marlin_moe_gemm")(**arguments)


def test_entries_and_blocks_out_of_range_are_padding(kernel):
    """Sentinels of any value, experts outside the stack, a count of entries within a block: never read or written."""
    stack = random_marlin_experts(3, 48, 64, 16, 4, "cpu", act_order=True)
    sorted_ids = torch.tensor([5, -1, 2**31 - 1, 0, 6, -(2**31), 6, 6, 1, 2, 6, 6, 6, 6, 6, 6, 3, 4, 6, 6, 6, 6, 6, 6])
    for experts, used in ([2, -1, 0], 24), ([2, 7, -5], 24), ([1, 0, 1], 18), ([1, 0, 1], 17), ([0, 1, 2], 0):
        blocks = (sorted_ids.int(), torch.tensor(experts).int(), torch.tensor([used]).int())
        out = run(kernel, torch.randn(3, 48).half(), stack, blocks, 2, 8, 64, 16)
        assert (out[[1, 2]] == 0).all() == (experts[1] not in (0, 1) or used == 0)


def test_a_used_count_beyond_the_list(kernel):
    stack = random_marlin_experts(1, 32, 64, 16, 4, "cpu")
    blocks = (torch.tensor([0, 1, 2]).int(), torch.tensor([0]).int(), torch.tensor([99]).int())
    run(kernel, torch.randn(4, 32).half(), stack, blocks, 1, 8, 64, 16)


def test_rows_that_no_block_names_are_zero_among_many(kernel):
    """More rows than one block looks for."""
    stack = random_marlin_experts(2, 16, 64, 16, 4, "cpu")
    ids = torch.full((2500, 1), -1).int()
    ids[::300] = 1
    out = run(kernel, torch.randn(2500, 16).half(), stack, moe_align_block_size_ref(ids, 2, 8, True, None), 1, 8, 3, 16)
    assert (out != 0).any(1).sum() == 9


@pytest.mark.parametrize("counters", [0, 64])
def test_split_k_and_few_multiprocessors(kernel, counters):
    stack = random_marlin_experts(3, 640, 64, 64, 4, "cpu")
    blocks = routed(5, 2, 3, 8)
    args = (torch.randn(5, 640).half(), stack, blocks, 2, 8, 32, 64)
    run(kernel, *args, epilogue="silu_mul", counters=counters)
    run(kernel, *args, epilogue="silu_mul", counters=counters, max_sms=1)


def test_views_of_a_stack(kernel):
    """Columns of all experts, and rows of x that have to be copied first."""
    packed, scales, zeros, _ = random_marlin_experts(3, 48, 192, 16, 4, "cpu", asymmetric=True)
    views = (packed[:, :, 128:256], scales[:, :, 64:128], zeros[:, :, 8:16], None)
    x = torch.randn(4, 51).half()[:, 3:]
    run(kernel, x, views, routed(4, 2, 3, 8), 2, 8, 64, 16)
    out = run(kernel, x.contiguous(), (packed, scales, zeros, None), (blocks := routed(4, 2, 3, 8)), 2, 8, 192, 16)
    assert torch.equal(run(kernel, x, views, blocks, 2, 8, 64, 16), out[:, 64:128])


def test_no_rows_and_no_experts(kernel):
    stack = random_marlin_experts(2, 32, 64, 16, 4, "cpu")
    nothing = (torch.zeros(0).int(), torch.zeros(0).int(), torch.zeros(1).int())
    assert run(kernel, torch.randn(0, 32).half(), stack, nothing, 2, 8, 64, 16).shape == (0, 64)
    assert (run(kernel, torch.randn(3, 32).half(), stack, nothing, 2, 8, 64, 16) == 0).all()
    none = tuple(t if t is None else t[:0] for t in stack)
    assert (run(kernel, torch.randn(3, 32).half(), none, nothing, 2, 8, 64, 16) == 0).all()


@pytest.mark.parametrize("change, message", REFUSED_GROUPED)
def test_bad_input_is_named(emulated, change, message):
    arguments = {**good_grouped(), "epilogue": "none", "reduction": "fp32", "max_sms": 0, "slots": 1, **change}
    for name, value in arguments.items():
        if name == "x" and value.dtype == torch.float32:
            arguments[name] = value.half()
    with pytest.raises(RuntimeError, match=r"\[marlin_moe_gemm\] " + message):
        emulated.op("marlin_moe_gemm")(**arguments)
