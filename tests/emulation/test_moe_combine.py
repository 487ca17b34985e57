"""What the CUDA kernels of the combine family must do beyond the registry's samples: unchecked pairs, more slots than
are loaded at once, rows longer than a block keeps in registers, nothing written beside the rows."""

import pytest
import torch

from ferrum_ops.testing.compare import assert_close, tolerance
from tests.emulation.conftest import ORDERS
from tests.ops.test_moe_combine import BAD, naive_combine

CPU = torch.ops.ferrum
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UPDATE, UPDATE_NORM = "weighted_sum_residual_", "weighted_sum_residual_norm_"


@pytest.fixture(params=ORDERS)
def run(request, emulated):
    """`run(name, *args)` under one order of the threads."""

    def call(name, *args):
        with emulated.schedule(request.param, seed=3):
            return emulated.op(name)(*args)

    return call


@pytest.mark.parametrize("outside", [-1, -7, 6, 2**31 - 1, -(2**31)])
def test_pair_outside_is_neither_read_nor_weighted(outside, run, emulated):
    for side in ("behind", "before"):
        with emulated.guard_pages(side):
            packed, weights = torch.randn(6, 64), torch.rand(3, 2)
            pairs = torch.tensor([0, 1, 2, outside, 4, 5], dtype=torch.int32)
        weights[1, 1] = torch.nan
        assert_close("moe_combine", run("moe_combine", packed, pairs, weights), naive_combine(packed, pairs, weights))


def test_nan_in_an_unused_row_is_not_read(run):
    packed = torch.randn(4, 104)
    packed[2] = torch.nan
    pairs = torch.tensor([0, 3, -1, 1, 3, 4], dtype=torch.int32)
    assert run("moe_combine", packed, pairs, torch.rand(3, 2)).isfinite().all()


@pytest.mark.parametrize("top_k", [0, 1, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("hidden", [8, 63, 1032])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_equal_the_cpus_bit_for_bit(top_k, hidden, dtype, run):
    slots, weights = torch.randn(3, top_k, hidden).to(dtype), torch.rand(3, top_k)
    assert torch.equal(run("weighted_sum", slots, weights), CPU.weighted_sum(slots, weights))
    pairs = torch.randint(-1, 3 * top_k + 1, (3 * top_k,)).int()
    packed = slots.view(-1, hidden)
    assert torch.equal(run("moe_combine", packed, pairs, weights), CPU.moe_combine(packed, pairs, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [1, 8])
def test_tokens_of_any_stride(gap, dtype, run):
    slots, weights = torch.randn(3, 4 * 64 + gap).to(dtype)[:, : 4 * 64].view(3, 4, 64), torch.rand(3, 4)
    assert torch.equal(run("weighted_sum", slots, weights), CPU.weighted_sum(slots, weights))


def test_order_of_the_sum_is_ascending(run):
    # 1e8 + 1 - 1e8 is 0 in float32 in this order and 1 in any order that adds the large ones first.
    slots = torch.zeros(1, 11, 160)
    slots[0, 6], slots[0, 7], slots[0, 10] = 1e8, 1.0, -1e8
    assert torch.equal(run("weighted_sum", slots, torch.ones(1, 11)), torch.zeros(1, 160))


# Vectors and single elements; rows of one and of several columns for each of the 512 threads.
@pytest.mark.parametrize("hidden", [1, 40, 1030, 2056, 4104, 8200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_and_norm_are_those_of_the_unrounded_sum(hidden, dtype, run, emulated):
    storage = torch.randn(2, hidden + 24).to(dtype)
    before, columns = storage.clone(), slice(8, 8 + hidden)
    slots, weights, norm_weight = torch.randn(2, 9, hidden).to(dtype), torch.rand(2, 9), torch.randn(hidden)
    updated = before.clone()
    run(UPDATE, updated[:, columns], slots, weights)
    out = torch.empty(2, hidden, dtype=dtype)
    run(UPDATE_NORM, storage[:, columns], slots, weights, norm_weight, out, 1e-5)
    assert torch.equal(storage, updated)
    assert torch.equal(storage[:, :8], before[:, :8]) and torch.equal(storage[:, 8 + hidden :], before[:, 8 + hidden :])
    total = before[:, columns].double() + torch.einsum("tk,tkh->th", weights.double(), slots.double())
    assert_close(UPDATE, storage[:, columns], total, tolerance(UPDATE, dtype))
    expected = torch.nn.functional.rms_norm(total, (hidden,), norm_weight.double(), 1e-5)
    assert_close(UPDATE_NORM, out, expected, tolerance(UPDATE_NORM, dtype))


def test_residual_is_normalised_before_it_is_rounded(run):
    # 257 is no bfloat16, and the norm of the rounded 256 has another last bit.
    residual, out = torch.tensor([[256.0, 1.0]]).bfloat16(), torch.empty(1, 2).bfloat16()
    slots = torch.tensor([[[1.0, 0.0]]]).bfloat16()
    run(UPDATE_NORM, residual, slots, torch.ones(1, 1), torch.ones(2), out, 0.0)
    exact = torch.tensor([[257.0, 1.0]], dtype=torch.float64)
    assert torch.equal(out, (exact / exact.square().mean().sqrt()).bfloat16())
    assert residual.tolist() == [[256.0, 1.0]]


def test_a_token_does_not_depend_on_its_neighbours(run):
    slots, weights = torch.randn(20, 4, 160).half(), torch.rand(20, 4)
    assert torch.equal(run("weighted_sum", slots, weights)[13:14], run("weighted_sum", slots[13:14], weights[13:14]))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, emulated):
    name, args, message = BAD[case]
    with pytest.raises(RuntimeError, match=rf"\[{name}\] {message}"):
        emulated.op(name)(*args)
