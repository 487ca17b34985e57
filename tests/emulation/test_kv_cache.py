"""Cache writes where the host cannot see lengths and slots, and what the registry's samples are too small for."""

import pytest
import torch

from tests.ops.test_kv_cache import BAD, DTYPES, int8_pools, ints, written

OUTSIDE = (-2, 12, 13, 2**31 + 1, 2**40, -(2**40))


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def on_cpu(name, *args):
    """What the CPU kernel writes."""
    args = [a.clone() for a in args]
    getattr(torch.ops.ferrum, name)(*args)
    schema = getattr(torch.ops.ferrum, name).default._schema
    return [a for a, argument in zip(args, schema.arguments) if argument.alias_info is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [(11, -1, 0), *((3, slot, 7) for slot in OUTSIDE)])
def test_slot_outside_the_pool_is_skipped(kernel, slots, dtype):
    pools = torch.randn(2, 3, 4, 2, 16).to(dtype)
    k, v = torch.randn(2, 3, 2, 16).to(dtype).unbind()
    kept = [s if 0 <= s < 12 else -1 for s in slots]
    got = kernel("paged_kv_write_", *pools.unbind(), k, v, ints(*slots, dtype=torch.int64))
    assert torch.equal(got[0], written(pools[0], k, kept)) and torch.equal(got[1], written(pools[1], v, kept))


@pytest.mark.parametrize("slots", [(12, -7, 3), (2**31 - 1, -(2**31), -1)])
def test_int32_slot_outside_the_pool_is_skipped(kernel, slots):
    pools = torch.randn(2, 3, 4, 2, 16)
    k, v = torch.randn(2, 3, 2, 16).unbind()
    kept = [s if 0 <= s < 12 else -1 for s in slots]
    got = kernel("paged_kv_write_", *pools.unbind(), k, v, ints(*slots))
    assert torch.equal(got[0], written(pools[0], k, kept)) and torch.equal(got[1], written(pools[1], v, kept))


@pytest.mark.parametrize("slot", OUTSIDE)
def test_int8_slot_outside_the_pool_is_skipped(kernel, slot):
    k, v = torch.randn(2, 3, 2, 16).unbind()
    got = kernel("paged_kv_write_int8_", *int8_pools(), k, v, ints(3, slot, 7, dtype=torch.int64))
    expected = on_cpu("paged_kv_write_int8_", *int8_pools(), k, v, ints(3, -1, 7))
    assert all(same_bits(g, e) for g, e in zip(got, expected))


def test_a_pool_without_slots_takes_nothing(kernel):
    empty, k = torch.empty(0, 4, 2, 16), torch.randn(2, 2, 16)
    kernel("paged_kv_write_", empty, empty, k, k, ints(0, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [-1, 4, 5, 2**31 - 1, -(2**31)])
def test_a_sequence_that_does_not_fit_is_left_alone(kernel, bad, dtype):
    caches = torch.randn(2, 3, 2, 5, 8).to(dtype)
    k, v = torch.randn(2, 3, 2, 2, 8).to(dtype).unbind()
    expected = caches.clone()
    for b, length in ((0, 3), (2, 0)):
        for cache, new in zip(expected, (k, v)):
            cache[b, :, length : length + 2] = new[b].transpose(0, 1)
    got = kernel("kv_append_", *caches.unbind(), k, v, ints(3, bad, 0))
    assert same_bits(torch.stack(got), expected)


def test_more_tokens_than_the_capacity_are_left_out(kernel):
    caches, new = torch.randn(2, 1, 1, 3, 8), torch.ones(2, 1, 4, 1, 8)
    for length in (0, -1, -4):
        assert same_bits(torch.stack(kernel("kv_append_", *caches.unbind(), *new.unbind(), ints(length))), caches)


@pytest.mark.slow
def test_more_sequences_than_a_grid_is_deep(emulated):
    cache, new = torch.zeros(2, 65540, 1, 2, 1), torch.randn(2, 65540, 1, 1, 1)
    lens = torch.arange(65540, dtype=torch.int32) % 2
    emulated.op("kv_append_")(*cache.unbind(), *new.unbind(), lens)
    rows = torch.arange(65540)
    assert torch.equal(cache[:, rows, 0, lens.long()], new[:, :, 0, 0])
    assert not cache[:, rows, 0, 1 - lens.long()].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, heads, head_dim", [(150, 4, 128), (70, 3, 63), (3, 9, 1000), (1, 1, 5000), (600, 2, 1)]
)
def test_copies_of_many_blocks(emulated, tokens, heads, head_dim, dtype):
    pools = torch.randn(2, tokens + 3, 1, heads, head_dim).to(dtype)
    k, v = torch.randn(2, tokens, heads, head_dim).to(dtype).unbind()
    slots = torch.randperm(tokens + 3)[:tokens]
    args = (*pools.unbind(), k, v, slots)
    expected = on_cpu("paged_kv_write_", *args)
    emulated.op("paged_kv_write_")(*args)
    assert same_bits(pools, torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [16, 17])
def test_heads_with_gaps_and_any_alignment(kernel, first, dtype):
    qkv = torch.randn(5, 8, 100).to(dtype)[..., first : first + 64]
    k, v, slots = qkv[:, 4:6], qkv[:, 6:], ints(5, 2, 0, -1, 11)
    pools = torch.randn(2, 3, 4, 2, 64).to(dtype)
    got = kernel("paged_kv_write_", *pools.unbind(), k, v, slots)
    assert same_bits(torch.stack(got), torch.stack(on_cpu("paged_kv_write_", *pools.unbind(), k, v, slots)))
    args = (*int8_pools(head_dim=64), k, v, slots)
    assert all(
        same_bits(*pair) for pair in zip(kernel("paged_kv_write_int8_", *args), on_cpu("paged_kv_write_int8_", *args))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k_first, v_first", [(0, 1), (1, 0), (8, 0)])
def test_keys_and_values_that_lie_differently(kernel, k_first, v_first, dtype):
    """Each side has its own alignment and its own strides of sequences, tokens and heads."""
    k = torch.randn(2, 3, 2, 40).to(dtype)[..., k_first : k_first + 16]
    v = torch.randn(2, 4, 3, 24).to(dtype)[:, 1:, 1:, v_first : v_first + 16]
    caches = torch.randn(2, 2, 2, 6, 16).to(dtype)
    args = (*caches.unbind(), k, v, ints(3, 1))
    assert same_bits(torch.stack(kernel("kv_append_", *args)), torch.stack(on_cpu("kv_append_", *args)))
    pools = torch.randn(2, 3, 4, 2, 16).to(dtype)
    args = (*pools.unbind(), k[1], v[0], ints(11, 0, 6))
    assert same_bits(torch.stack(kernel("paged_kv_write_", *args)), torch.stack(on_cpu("paged_kv_write_", *args)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 16, 63, 128, 520])
def test_int8_equals_the_cpus_bit_for_bit(kernel, head_dim, dtype):
    scale = torch.logspace(-9, 6, 6)[:, None, None]  # below the smallest scale, and at the largest half
    k, v = (torch.randn(2, 6, 2, head_dim) * scale).clamp(-6e4, 6e4).to(dtype).unbind()
    args = (*int8_pools(head_dim=head_dim), k, v, ints(7, 0, -1, 11, 2, 5))
    got, expected = kernel("paged_kv_write_int8_", *args), on_cpu("paged_kv_write_int8_", *args)
    assert all(same_bits(g, e) for g, e in zip(got, expected))


def test_int8_ties_go_to_even(kernel):
    k = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -3.5, 126.5, -125.5]).expand(1, 2, 8)
    codes, _, scales, _ = kernel("paged_kv_write_int8_", *int8_pools(head_dim=8), k, k, ints(0))
    assert codes[0, 0, 1].tolist() == [127, 0, 2, 2, 0, -4, 126, -126] and scales[0, 0, 1] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 17, 63])
def test_int8_head_that_is_not_finite_reads_back_as_nan(kernel, at, bad, dtype):
    k = torch.ones(1, 2, 64).to(dtype)
    k[0, 1, at] = bad
    codes, _, scales, _ = kernel("paged_kv_write_int8_", *int8_pools(head_dim=64), k, k, ints(3))
    read = codes[0, 3] * scales[0, 3, :, None]
    assert torch.isnan(read[1]).all() and torch.isfinite(read[0]).all() and not codes[0, 3, 1].any()


def test_int8_of_many_blocks(emulated):
    k, v = torch.randn(2, 300, 4, 64).unbind()
    pools = int8_pools(64, 16, 4, 64)
    args = (*pools, k, v, torch.randperm(1024)[:300])
    expected = on_cpu("paged_kv_write_int8_", *args)
    emulated.op("paged_kv_write_int8_")(*args)
    assert all(same_bits(p, e) for p, e in zip(pools, expected))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(emulated, case):
    op, args, message = BAD[case]
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        emulated.op(op)(*args)
