import pytest
import torch

import ferrum_ops
from ferrum_ops.ops import kv_cache

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def appended(cache, new, lens):
    """The cache after the append, one row at a time."""
    cache = cache.clone()
    for b, length in enumerate(lens):
        for i in range(new.shape[1]):
            for h in range(new.shape[2]):
                cache[b, h, length + i] = new[b, i, h]
    return cache


def written(pool, new, slots):
    """The pool after the write, one token at a time."""
    pool = pool.clone()
    for t, slot in enumerate(slots):
        if slot >= 0:
            pool[slot // pool.shape[1], slot % pool.shape[1]] = new[t]
    return pool


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("tokens, lens", [(1, (0, 6)), (3, (4, 0)), (7, (0, 0)), (0, (7, 2))])
def test_append_writes_the_rows_behind_each_sequence(form, tokens, lens, dtype):
    function = OPS.kv_append_ if form == "kernel" else kv_cache.kv_append__ref
    k_cache, v_cache = torch.randn(2, 2, 3, 7, 63).to(dtype).unbind()
    k, v = torch.randn(2, 2, tokens, 3, 63).to(dtype).unbind()
    k_expected, v_expected = appended(k_cache, k, lens), appended(v_cache, v, lens)
    function(k_cache, v_cache, k, v, ints(*lens))
    assert torch.equal(k_cache, k_expected) and torch.equal(v_cache, v_expected)


@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("lens", [(0, 6), (7, 0), (-1, 0), (2147483647, 0)])
def test_append_beyond_the_capacity_raises_and_writes_nothing(form, lens):
    function = OPS.kv_append_ if form == "kernel" else kv_cache.kv_append__ref
    k_cache, v_cache = torch.zeros(2, 2, 3, 7, 16).unbind()
    k, v = torch.ones(2, 2, 2, 3, 16).unbind()
    bad = next(n for n in lens if not 0 <= n <= 5)
    with pytest.raises(
        RuntimeError, match=rf"cache_lens: expected 0 <= length <= 5 \(capacity 7 less 2 new\), got {bad}"
    ):
        function(k_cache, v_cache, k, v, ints(*lens))
    assert not k_cache.any() and not v_cache.any()


def test_append_of_more_tokens_than_the_capacity_raises():
    caches, new = torch.zeros(2, 1, 1, 3, 8).unbind(), torch.ones(2, 1, 4, 1, 8).unbind()
    with pytest.raises(RuntimeError, match=r"\[kv_append_\] cache_lens: expected 0 <= length <= -1"):
        OPS.kv_append_(*caches, *new, ints(0))


@pytest.mark.parametrize("bad", [-1, 3, 4, 2**31 - 1, -(2**31)])
def test_append_where_the_host_cannot_see_leaves_a_sequence_that_does_not_fit(bad):
    # A traced reference stands for a device without a kernel: it must not read the lengths on the host.
    k_cache, v_cache = torch.zeros(2, 2, 3, 4, 8).unbind()
    k, v = torch.randn(2, 2, 2, 3, 8).unbind()
    torch.compile(kv_cache.kv_append__ref, backend="eager", fullgraph=True)(k_cache, v_cache, k, v, ints(bad, 2))
    assert torch.equal(k_cache[1, :, 2:], k[1].transpose(0, 1)) and torch.equal(v_cache[1, :, 2:], v[1].transpose(0, 1))
    assert not k_cache[0].any() and not v_cache[0].any() and not k_cache[1, :, :2].any()


def test_append_takes_column_slices_of_a_projection():
    qkv = torch.randn(2, 3, 8, 64)
    k, v = qkv[:, :, 4:6], qkv[:, :, 6:]
    k_cache, v_cache = torch.zeros(2, 2, 2, 5, 64).unbind()
    OPS.kv_append_(k_cache, v_cache, k, v, ints(2, 0))
    assert torch.equal(k_cache, appended(torch.zeros(2, 2, 5, 64), k, (2, 0)))
    assert torch.equal(v_cache, appended(torch.zeros(2, 2, 5, 64), v, (2, 0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "blocks, block_size, slots", [(4, 16, (5, 63, -1, 0, 17)), (9, 1, (8, -1, 0)), (1, 100, (99,))]
)
def test_paged_write_fills_the_slots(form, blocks, block_size, slots, index, dtype):
    function = OPS.paged_kv_write_ if form == "kernel" else kv_cache.paged_kv_write__ref
    k_cache, v_cache = torch.randn(2, blocks, block_size, 2, 63).to(dtype).unbind()
    k, v = torch.randn(2, len(slots), 2, 63).to(dtype).unbind()
    k_expected, v_expected = written(k_cache, k, slots), written(v_cache, v, slots)
    function(k_cache, v_cache, k, v, ints(*slots, dtype=index))
    assert torch.equal(k_cache, k_expected) and torch.equal(v_cache, v_expected)


def int8_pools(blocks=3, block_size=4, heads=2, head_dim=16):
    codes = torch.zeros(2, blocks, block_size, heads, head_dim, dtype=torch.int8)
    return *codes.unbind(), *torch.zeros(2, blocks, block_size, heads).unbind()


@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("op", ["paged_kv_write_", "paged_kv_write_int8_"])
@pytest.mark.parametrize("slot", [12, -2, 2**31 + 1, -(2**40)])
def test_slot_outside_the_pool_raises_and_writes_nothing(form, op, slot):
    function = getattr(OPS, op) if form == "kernel" else ferrum_ops.OPS[op].ref
    pools = int8_pools() if op == "paged_kv_write_int8_" else torch.zeros(2, 3, 4, 2, 16).unbind()
    k, v = torch.ones(2, 3, 2, 16).unbind()
    with pytest.raises(RuntimeError, match=rf"\[{op}\] slot_mapping: expected -1 <= slot < 12, got {slot}"):
        function(*pools, k, v, ints(0, slot, 1, dtype=torch.int64))
    assert not any(pool.any() for pool in pools)


@pytest.mark.parametrize("slots", [(1, 12, -7, 3), (99, -1, 99, -1)])
def test_slot_outside_is_skipped_where_the_host_cannot_see_it(slots):
    pool = torch.randn(3, 4, 2, 8)
    k_cache, v_cache = pool.clone(), pool.clone()
    k, v = torch.randn(2, 4, 2, 8).unbind()
    torch.compile(kv_cache.paged_kv_write__ref, backend="eager", fullgraph=True)(k_cache, v_cache, k, v, ints(*slots))
    kept = tuple(s if 0 <= s < 12 else -1 for s in slots)
    assert torch.equal(k_cache, written(pool, k, kept)) and torch.equal(v_cache, written(pool, v, kept))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 16, 63, 128])
def test_int8_is_the_formula_bit_for_bit(dtype, head_dim, isa):
    pools = int8_pools(head_dim=head_dim)
    k, v = (
        (torch.randn(2, 5, 2, head_dim) * torch.logspace(-6, 6, 5)[:, None, None]).clamp(-6e4, 6e4).to(dtype).unbind()
    )
    slots = (7, 0, -1, 11, 2)
    OPS.paged_kv_write_int8_(*pools, k, v, ints(*slots))
    for x, codes, scales in ((k, pools[0], pools[2]), (v, pools[1], pools[3])):
        for t, slot in enumerate(slots):
            if slot < 0:
                continue
            scale = x[t].float().abs().amax(-1).clamp(min=1e-8) / 127
            assert torch.equal(scales[slot // 4, slot % 4], scale)
            expected = torch.round(x[t].float() / scale[:, None]).clamp(-127, 127)
            assert torch.equal(codes[slot // 4, slot % 4].float(), expected)
        assert not codes[0, 1].any() and not scales[0, 1].any()


def test_int8_ties_go_to_even(isa):
    pools = int8_pools(head_dim=6)
    k = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -3.5]).expand(1, 2, 6)
    OPS.paged_kv_write_int8_(*pools, k, k, ints(0))
    assert pools[0][0, 0, 1].tolist() == [127, 0, 2, 2, 0, -4] and pools[2][0, 0, 1] == 1


def test_int8_reads_back_within_half_a_step(isa):
    pools = int8_pools(head_dim=63)
    k, v = torch.randn(2, 12, 2, 63).unbind()
    OPS.paged_kv_write_int8_(*pools, k, v, torch.arange(12))
    for x, codes, scales in ((k, pools[0], pools[2]), (v, pools[1], pools[3])):
        error = (codes * scales[..., None]).view_as(x) - x
        assert (error.abs() <= scales.view(12, 2, 1) * 0.5001).all()


def test_int8_of_zeros_is_zero(isa):
    pools = int8_pools()
    zeros = torch.zeros(1, 2, 16)
    pools[0][0, 0] = 5
    OPS.paged_kv_write_int8_(*pools, zeros, zeros, ints(0))
    assert not pools[0].any() and (pools[2][0, 0] == torch.tensor(1e-8) / 127).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 17, 62])
def test_int8_head_that_is_not_finite_reads_back_as_nan(bad, at, isa):
    pools = int8_pools(head_dim=63)
    k = torch.ones(1, 2, 63)
    k[0, 1, at] = bad
    OPS.paged_kv_write_int8_(*pools, k, k, ints(3))
    read = pools[0][0, 3] * pools[2][0, 3, :, None]
    assert torch.isnan(read[1]).all() and torch.isfinite(read[0]).all() and not pools[0][0, 3, 1].any()


def test_result_does_not_depend_on_threads(isa):
    k, v = torch.randn(2, 900, 4, 64).unbind()
    slots = torch.randperm(1024)[:900].int()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            pools = int8_pools(64, 16, 4, 64)
            OPS.paged_kv_write_int8_(*pools, k, v, slots)
            results.append(pools)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


CACHE, NEW, LENS = torch.zeros(2, 3, 5, 16), torch.zeros(2, 4, 3, 16), torch.zeros(2, dtype=torch.int32)
POOL, TOKENS, SLOTS = torch.zeros(4, 5, 3, 16), torch.zeros(2, 3, 16), torch.zeros(2, dtype=torch.int32)
CODES, SCALES = POOL.to(torch.int8), torch.zeros(4, 5, 3)
STRIDED = torch.zeros(4, 5, 3, 32)[..., ::2]
BAD = {
    "cache dtype": (
        "kv_append_",
        (CACHE.int(), CACHE, NEW, NEW, LENS),
        "k_cache: expected float32, float16 or bfloat16",
    ),
    "cache dimensions": ("kv_append_", (CACHE[0], CACHE, NEW, NEW, LENS), r"k_cache: expected shape \(batch, kv_heads"),
    "cache strides": (
        "kv_append_",
        (CACHE.transpose(0, 1), CACHE, NEW, NEW, LENS),
        "k_cache: expected a contiguous tensor, got",
    ),
    "v_cache dtype": (
        "kv_append_",
        (CACHE, CACHE.half(), NEW, NEW, LENS),
        r"v_cache: expected (Float|torch.float32), got",
    ),
    "v_cache shape": (
        "kv_append_",
        (CACHE, CACHE[:1], NEW, NEW, LENS),
        r"v_cache: expected shape \(2, 3, 5, 16\), got",
    ),
    "k heads": ("kv_append_", (CACHE, CACHE, NEW[:, :, 1:], NEW, LENS), r"k: expected shape \(2, \*, 3, 16\), got"),
    "k dtype": ("kv_append_", (CACHE, CACHE, NEW.half(), NEW.half(), LENS), r"k: expected (Float|torch.float32), got"),
    "v tokens": ("kv_append_", (CACHE, CACHE, NEW, NEW[:, 1:], LENS), r"v: expected shape \(2, 4, 3, 16\), got"),
    "k last stride": (
        "kv_append_",
        (CACHE, CACHE, torch.zeros(2, 4, 3, 32)[..., ::2], NEW, LENS),
        "k: expected a contiguous last dimension, got",
    ),
    "lens dtype": ("kv_append_", (CACHE, CACHE, NEW, NEW, LENS.long()), "cache_lens: expected [iI]nt(32)?, got"),
    "lens shape": ("kv_append_", (CACHE, CACHE, NEW, NEW, LENS[:1]), r"cache_lens: expected shape \(2,?\), got"),
    "pool dtype": ("paged_kv_write_", (CODES, CODES, TOKENS, TOKENS, SLOTS), "k_cache: expected float32, float16 or"),
    "pool strides": (
        "paged_kv_write_",
        (STRIDED, POOL, TOKENS, TOKENS, SLOTS),
        "k_cache: expected a contiguous tensor",
    ),
    "token heads": (
        "paged_kv_write_",
        (POOL, POOL, TOKENS[:, 1:], TOKENS, SLOTS),
        r"k: expected shape \(\*, 3, 16\), got",
    ),
    "slots dtype": (
        "paged_kv_write_",
        (POOL, POOL, TOKENS, TOKENS, SLOTS.half()),
        "slot_mapping: expected int32 or int64",
    ),
    "slots shape": (
        "paged_kv_write_",
        (POOL, POOL, TOKENS, TOKENS, SLOTS[:1]),
        r"slot_mapping: expected shape \(2,?\)",
    ),
    "slots strides": (
        "paged_kv_write_",
        (POOL, POOL, TOKENS, TOKENS, torch.zeros(4, dtype=torch.int32)[::2]),
        "slot_mapping: expected a contiguous tensor, got",
    ),
    "codes dtype": (
        "paged_kv_write_int8_",
        (POOL, POOL, SCALES, SCALES, TOKENS, TOKENS, SLOTS),
        "k_cache: expected ([cC]har|int8), got",
    ),
    "scale dtype": (
        "paged_kv_write_int8_",
        (CODES, CODES, SCALES.half(), SCALES, TOKENS, TOKENS, SLOTS),
        "k_scale: expected [fF]loat(32)?, got",
    ),
    "scale shape": (
        "paged_kv_write_int8_",
        (CODES, CODES, SCALES, SCALES[1:], TOKENS, TOKENS, SLOTS),
        r"v_scale: expected shape \(4, 5, 3\), got",
    ),
}


@pytest.mark.parametrize("form", ["kernel", "reference", "fake"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    op, args, message = BAD[case]
    function = {"kernel": getattr(OPS, op), "reference": ferrum_ops.OPS[op].ref, "fake": ferrum_ops.OPS[op].fake}
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        function[form](*args)


def test_gradients_are_refused():
    new, tokens = NEW.clone().requires_grad_(), TOKENS.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="has no backward"):
        ferrum_ops.kv_append_(CACHE, CACHE, new, NEW, LENS)
    with pytest.raises(RuntimeError, match="has no backward"):
        ferrum_ops.paged_kv_write_(POOL, POOL, TOKENS, tokens, SLOTS)
    with pytest.raises(RuntimeError, match="has no backward"):
        ferrum_ops.paged_kv_write_int8_(CODES, CODES, SCALES, SCALES, tokens, TOKENS, SLOTS)
