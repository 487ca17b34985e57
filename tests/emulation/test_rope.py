"""Rotation where the host cannot see positions and slots, and what the registry's samples are too small for."""

import pytest
import torch

from ferrum_ops.ops import rope
from ferrum_ops.testing.compare import assert_close, tolerance
from tests.ops.test_rope import BAD, COS, DTYPES, SIN

OPS = torch.ops.ferrum
OUTSIDE = (-1, 50, 51, 2**31 - 1, -(2**31))


def check(got, expected, dtype):
    assert_close("qk_norm_rope", got, expected, tolerance("qk_norm_rope", dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", OUTSIDE)
def test_position_outside_the_table_is_nan(kernel, bad, dtype, interleaved):
    x, weight = torch.randn(3, 2, 80).to(dtype), torch.randn(80).to(dtype)  # 64 elements are rotated
    (got,) = kernel(
        "qk_norm_rope", x, weight, COS, SIN, torch.tensor([49, bad, 0], dtype=torch.int32), 1e-6, interleaved
    )
    at = torch.tensor([49, 0, 0])
    expected = rope.qk_norm_rope_ref(x.double(), weight.double(), COS, SIN, at, 1e-6, interleaved)
    assert got[1, :, :64].isnan().all()
    check(got[1, :, 64:], expected[1, :, 64:], dtype)
    check(got[::2], expected[::2], dtype)


@pytest.mark.parametrize("bad", [*OUTSIDE, 2**40, -(2**40), 2**32])
def test_long_position_outside_the_table_is_nan(kernel, bad):
    qkv, at = torch.randn(3, 5 * 64), torch.tensor([49, bad, 0])
    q, k, v = kernel("split_qkv_norm_rope", qkv, None, None, COS, SIN, at, 3, 1, 64, 1e-6)
    good = OPS.split_qkv_norm_rope(qkv, None, None, COS, SIN, at.clamp(0, 49), 3, 1, 64, 1e-6)
    assert q[1].isnan().all() and k[1].isnan().all() and torch.equal(v, good[2])
    check(q[::2], good[0][::2], torch.float32)
    check(k[::2], good[1][::2], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [(7, -1, 0, 11, 3), (7, 12, -2, 2**31 + 1, 3), (-(2**40), 0, 2**40, 2, -1)])
def test_paged_skips_slots_outside_the_pool(kernel, slots, dtype):
    qkv, weights = torch.randn(5, 700).to(dtype)[:, 30:606], torch.randn(2, 64).to(dtype).unbind()
    at, slots = torch.tensor([3, 49, 0, 7, 7]), torch.tensor(slots)
    caches = torch.randn(2, 3, 4, 2, 64).to(dtype)
    args = (qkv, *weights, COS, SIN, at, 5, 2, 64, 1e-6)
    got, *pools = kernel("split_qkv_norm_rope_paged_", *args, *caches.unbind(), slots)
    q, k, v = kernel("split_qkv_norm_rope", *args)
    assert torch.equal(got, q)
    for pool, cache, new in zip(pools, caches, (k, v)):
        expected = cache.flatten(0, 1).clone()
        for t, slot in enumerate(slots.tolist()):
            if 0 <= slot < 12:
                expected[slot] = new[t]
        assert torch.equal(pool.flatten(0, 1), expected)


def test_paged_position_outside_leaves_nan_in_its_slot(kernel):
    qkv, at, slots = torch.randn(2, 4 * 64), torch.tensor([50, 1]), torch.tensor([2, 0])
    q, k_cache, v_cache = kernel(
        "split_qkv_norm_rope_paged_", qkv, None, None, COS, SIN, at, 2, 1, 64, 1e-6, *torch.zeros(2, 3, 4, 1, 64), slots
    )
    assert q[0].isnan().all() and q[1].isfinite().all()
    assert k_cache[0, 2].isnan().all() and k_cache.isnan().sum() == 64 and torch.equal(v_cache[0, 2, 0], qkv[0, 192:])


@pytest.mark.parametrize(
    "dtype, integers", [(torch.float32, torch.int32), (torch.float16, torch.int16), (torch.bfloat16, torch.int16)]
)
@pytest.mark.parametrize("columns", [64, 63])
def test_v_is_moved_bit_for_bit(kernel, columns, dtype, integers):
    info = torch.iinfo(integers)
    bits = torch.randint(info.min, info.max + 1, (6, 4 * columns)).to(integers)
    v = kernel(
        "split_qkv_norm_rope", bits.view(dtype), None, None, COS[:, :31], SIN[:, :31], None, 2, 1, columns, 1e-6
    )[2]
    assert torch.equal(v.view(integers).flatten(1), bits[:, 3 * columns :])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim, rotary", [(1024, 1024), (520, 264), (514, 258), (257, 130), (192, 192), (1, 0), (40, 0)]
)
def test_heads_of_many_steps(kernel, head_dim, rotary, dtype, interleaved):
    cos, sin = rope.rotary_tables(9, rotary)
    x, weight, at = torch.randn(2, 3, head_dim).to(dtype), torch.randn(head_dim), torch.tensor([8, 2])
    (got,) = kernel("qk_norm_rope", x, weight, cos, sin, at, 1e-6, interleaved)
    check(got, rope.qk_norm_rope_ref(x.double(), weight.double(), cos, sin, at, 1e-6, interleaved), dtype)


@pytest.mark.parametrize("q_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k_dtype", [None, torch.bfloat16, torch.float32])
def test_weights_of_either_dtype(kernel, q_dtype, k_dtype):
    weights = [None if d is None else torch.randn(64).to(d) for d in (q_dtype, k_dtype)]
    args = (torch.randn(3, 7 * 64).bfloat16(), *weights, COS, SIN, torch.tensor([1, 49, 7]), 3, 2, 64, 1e-6)
    for got, expected in zip(kernel("split_qkv_norm_rope", *args), OPS.split_qkv_norm_rope(*args)):
        check(got, expected, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("misaligned", ["x", "heads", "weight", "tables"])
def test_any_alignment(kernel, misaligned, dtype):
    def tensor(shape, dtype, moved):
        size = torch.Size(shape).numel()
        return torch.randn(size + 1).to(dtype)[int(moved) :][:size].view(shape)

    x, weight = tensor((3, 2, 64), dtype, misaligned == "x"), tensor((64,), dtype, misaligned == "weight")
    if misaligned == "heads":
        x = torch.randn(3, 4, 66).to(dtype)[:, :2, :64]
    cos, sin = tensor((9, 32), torch.float32, misaligned == "tables"), tensor((9, 32), torch.float32, False)
    args = (x, weight, cos, sin, torch.tensor([8, 0, 3]), 1e-6, False)
    check(kernel("qk_norm_rope", *args)[0], OPS.qk_norm_rope(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_neighbours(emulated, dtype):
    """One token alone is launched with other blocks than 460 of them."""
    qkv, weight = torch.randn(460, 9 * 64).to(dtype), torch.randn(64).to(dtype)
    at = torch.arange(460) % 50
    op = emulated.op("split_qkv_norm_rope")
    together = op(qkv, weight, weight, COS, SIN, at, 5, 2, 64, 1e-6)
    for t in (0, 77, 459):
        alone = op(qkv[t : t + 1], weight, weight, COS, SIN, at[t : t + 1], 5, 2, 64, 1e-6)
        assert all(torch.equal(a, b[t : t + 1]) for a, b in zip(alone, together))
    for got, expected in zip(together, OPS.split_qkv_norm_rope(qkv, weight, weight, COS, SIN, at, 5, 2, 64, 1e-6)):
        check(got, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 7, 33, 63])
def test_nan_stays_in_its_head(kernel, at, dtype):
    x = torch.randn(3, 2, 64).to(dtype)
    x[1, 1, at] = torch.nan
    nan = kernel("qk_norm_rope", x, torch.ones(64).to(dtype), COS, SIN, None, 1e-6, False)[0].isnan()
    assert nan[1, 1].all() and nan.sum() == 64
    nan = kernel("qk_norm_rope", x, None, COS, SIN, None, 1e-6, False)[0].isnan()
    assert nan[1, 1, at % 32] and nan[1, 1, at % 32 + 32] and nan.sum() == 2


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(emulated, case):
    op, args, message = BAD[case]
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        emulated.op(op)(*args)
