import itertools

import pytest
import torch
import torch.nn.functional as F

import ferrum_ops
from ferrum_ops.ops import attention as ops
from ferrum_ops.ops.kv_cache import quantize_heads
from ferrum_ops.testing.compare import assert_close, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def oracle(q, k, v, scale, causal=True, window=0):
    """One sequence, q `[n, Hq, D]` over k, v `[kv, Hkv, D]`, by PyTorch's own attention in float64 and a mask."""
    tokens, keys = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    key, last = torch.arange(keys), torch.arange(tokens)[:, None] + keys - tokens
    last = last if causal else torch.full_like(last, keys - 1)
    mask = key <= last
    if window:
        mask &= key > last - window
    k, v = (t.repeat_interleave(group, 0) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


def contiguous(k, v, spare=3):
    """A cache `[1, Hkv, kv + spare, D]` of k, v `[kv, Hkv, D]`, NaN behind the keys."""
    return [F.pad(t.transpose(0, 1), (0, 0, 0, spare), value=torch.nan)[None].contiguous() for t in (k, v)]


def paged(sequences, block_size):
    """Pools and shuffled tables for sequences of (k, v), NaN in all that belongs to nobody."""
    lens = tuple(k.shape[0] for k, _ in sequences)
    tables, blocks = ops.block_tables_for(lens, block_size)
    shape = (blocks, block_size, *sequences[0][0].shape[1:])
    pools = [torch.full(shape, torch.nan, dtype=sequences[0][0].dtype) for _ in range(2)]
    for table, pair in zip(tables, sequences):
        for pool, x in zip(pools, pair):
            for i, part in enumerate(x.split(block_size)):
                pool[table[i], : len(part)] = part
    return *pools, tables, ints(*lens)


def random_sequence(tokens, keys, heads=4, kv_heads=2, head_dim=64, dtype=torch.float32):
    q = torch.randn(tokens, heads, head_dim).to(dtype)
    return q, *torch.randn(2, keys, kv_heads, head_dim).to(dtype).unbind()


def check_both(q, k, v, scale=0.125, causal=True, window=0, block_size=16, dtype=torch.float32):
    """Contiguous and paged attention of one sequence against the oracle; they agree in every bit."""
    expected = oracle(q, k, v, scale, causal, window)
    own = OPS.attention(q[None], *contiguous(k, v), ints(k.shape[0]), scale, causal, window)[0]
    assert_close("attention", own, expected, tolerance("attention", dtype))
    k_cache, v_cache, tables, lens = paged([(k, v)], block_size)
    starts = ints(0, q.shape[0])
    page = OPS.paged_attention(q, k_cache, v_cache, tables, starts, lens, scale, causal, window)
    assert torch.equal(page, own)
    return own


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_references_equal_torch_in_float64(causal, window):
    q, k, v = random_sequence(7, 23, dtype=torch.float64)
    expected = oracle(q, k, v, 0.2, causal, window)
    own = ops.attention_ref(q[None], *contiguous(k, v), ints(23), 0.2, causal, window)[0]
    assert_close("attention", own, expected, 1e-13)
    k_cache, v_cache, tables, lens = paged([(k, v)], 4)
    got = ops.paged_attention_ref(q, k_cache, v_cache, tables, ints(0, 7), lens, 0.2, causal, window)
    assert_close("paged_attention", got, expected, 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, keys", [(1, 1), (1, 64), (1, 65), (1, 511), (1, 513), (5, 130), (33, 33), (70, 1100)])
def test_prefill_and_decode(tokens, keys, dtype, isa):
    check_both(*random_sequence(tokens, keys, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (4, 1), (7, 1), (12, 2), (32, 4), (40, 1), (150, 1)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_group_sizes(tokens, heads, kv_heads, dtype, isa):
    check_both(*random_sequence(tokens, 75, heads, kv_heads, 32, dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 2, 15, 17, 63, 80, 126, 127, 192, 256, 600])
@pytest.mark.parametrize("tokens", [1, 2])
def test_head_sizes(tokens, head_dim, dtype, isa):
    check_both(*random_sequence(tokens, 37, head_dim=head_dim, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
def test_window_at_every_length(tokens, causal, isa):
    q, k, v = random_sequence(tokens, 140, 2, 1, 16)
    for window in (*range(12), *range(60, 70), *range(126, 142)):
        check_both(q, k, v, 0.3, causal, window)


def test_window_of_a_long_sequence_reads_only_its_blocks(isa):
    q, k, v = random_sequence(2, 1500, 2, 1, 16)
    k_cache, v_cache, tables, lens = paged([(k, v)], 16)
    expected = OPS.paged_attention(q, k_cache, v_cache, tables, ints(0, 2), lens, 0.3, True, 70)
    assert_close("paged_attention", expected, oracle(q, k, v, 0.3, True, 70))
    tables[0, : (1500 - 71) // 16] = 10**9
    assert torch.equal(OPS.paged_attention(q, k_cache, v_cache, tables, ints(0, 2), lens, 0.3, True, 70), expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7, 5.0])
def test_scale_is_honoured(scale, isa):
    q, k, v = random_sequence(3, 70)
    check_both(q / max(1.0, abs(scale)), k, v, scale=scale)  # an error of a score grows with the score


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 100, 2000])
def test_block_size_does_not_change_a_bit(block_size, isa):
    torch.manual_seed(3)
    check_both(*random_sequence(2, 1100), block_size=block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["kernel", "reference"])
def test_mixed_prefill_and_decode_in_one_call(form, dtype, isa):
    function = OPS.paged_attention if form == "kernel" else ops.paged_attention_ref
    sizes = [(1, 700), (40, 40), (1, 5), (7, 90), (0, 33), (100, 600), (1, 1)]
    sequences = [random_sequence(*size, dtype=dtype) for size in sizes]
    k_cache, v_cache, tables, lens = paged([s[1:] for s in sequences], 16)
    starts = ints(*itertools.accumulate((t for t, _ in sizes), initial=0))
    got = function(torch.cat([s[0] for s in sequences]), k_cache, v_cache, tables, starts, lens, 0.125)
    for (q, k, v), part in zip(sequences, got.split([t for t, _ in sizes])):
        assert_close("paged_attention", part, oracle(q, k, v, 0.125), tolerance("paged_attention", dtype))
        if form == "kernel" and len(q):  # the neighbours change nothing
            k_cache, v_cache, tables, lens = paged([(k, v)], 16)
            assert torch.equal(function(q, k_cache, v_cache, tables, ints(0, len(q)), lens, 0.125), part)


def test_batch_of_sequences_of_different_lengths(isa):
    lens = (9, 0, 70, 3)
    q, caches = torch.randn(4, 3, 4, 64), torch.randn(2, 4, 2, 80, 64)
    got = OPS.attention(q, *caches.unbind(), ints(*lens), 0.125)
    assert not got[1].any()
    for b, length in enumerate(lens):
        if length:
            k, v = caches[:, b, :, :length].transpose(1, 2).unbind()
            assert_close("attention", got[b], oracle(q[b], k, v, 0.125))


@pytest.mark.parametrize("causal", [True, False])
def test_no_keys_give_zeros(causal, isa):
    nan = torch.full((2, 1, 2, 8, 16), torch.nan)
    assert not OPS.attention(torch.randn(1, 3, 4, 16), *nan.unbind(), ints(0), 0.25, causal).any()
    nothing = torch.zeros(1, 0, dtype=torch.int32)
    pools = nan.flatten(1, 2).unbind()
    got = OPS.paged_attention(
        torch.randn(3, 8, 16), *(p[None] for p in pools), nothing, ints(0, 3), ints(0), 0.25, causal
    )
    assert not got.any() and got.shape == (3, 8, 16)


def test_no_queries(isa):
    caches = torch.randn(2, 2, 2, 8, 16).unbind()
    assert OPS.attention(torch.empty(2, 0, 4, 16), *caches, ints(3, 8), 0.25).shape == (2, 0, 4, 16)
    tables = ints(0, 1)[:, None]
    got = OPS.paged_attention(torch.empty(0, 16, 16), *caches, tables, ints(0, 0, 0), ints(1, 2), 0.25)
    assert got.shape == (0, 16, 16)
    empty = torch.empty(0, dtype=torch.int32)
    assert OPS.paged_attention(torch.empty(0, 16, 16), *caches, empty[:, None], ints(0), empty, 0.25).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [5, 31, 32, 600])
def test_what_lies_behind_the_last_key_is_never_read(keys, dtype, isa):
    # `contiguous` and `paged` fill it with NaN, the last page included.
    assert check_both(*random_sequence(2, keys, dtype=dtype), dtype=dtype).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [63, 128])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (12, 1), (8, 4)])
def test_int8_pools(heads, kv_heads, head_dim, dtype, isa):
    # What belongs to nobody has scales of NaN.
    sizes = [(1, 530), (9, 41), (1, 7)]
    sequences = [random_sequence(*size, heads, kv_heads, head_dim, dtype) for size in sizes]
    pools = paged([(k.float(), v.float()) for _, k, v in sequences], 16)
    (k_codes, k_scale), (v_codes, v_scale) = map(quantize_heads, pools[:2])
    assert k_scale.isnan().any()
    q, starts = torch.cat([s[0] for s in sequences]), ints(0, 1, 10, 11)
    got = OPS.paged_attention(q, k_codes, v_codes, *pools[2:3], starts, pools[3], 0.2, True, 0, k_scale, v_scale)
    for (q, k, v), part in zip(sequences, got.split([1, 9, 1])):
        k, v = ((codes * scale[..., None]) for codes, scale in map(quantize_heads, (k, v)))
        assert_close("paged_attention", part, oracle(q, k, v, 0.2), tolerance("paged_attention", dtype))


def decode_int8(q, k, v, k_factor=1.0, v_factor=1.0):
    """A decode over int8 pools whose scales are multiplied by factors per key, and the oracle's over the same codes."""
    pools = paged([(k.float(), v.float())], 16)
    (k_codes, k_scale), (v_codes, v_scale) = (quantize_heads(pool.nan_to_num()) for pool in pools[:2])
    factors, key = [torch.ones(len(k)) * f for f in (k_factor, v_factor)], torch.arange(len(k))
    for scale, factor in zip((k_scale, v_scale), factors):
        scale[pools[2][0, key // 16].long(), key % 16] *= factor[:, None]
    got = OPS.paged_attention(q, k_codes, v_codes, pools[2], ints(0, 1), pools[3], 0.2, True, 0, k_scale, v_scale)
    k, v = (c * s[..., None] * f[:, None, None] for (c, s), f in zip(map(quantize_heads, (k, v)), factors))
    return got, oracle(q, k, v, 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 24, 600, 1024, 1025])
def test_int8_pools_of_many_head_sizes(head_dim, dtype, isa):
    q, k, v = random_sequence(1, 75, head_dim=head_dim, dtype=dtype)
    got, expected = decode_int8(q * head_dim**-0.5, k, v)
    assert_close("paged_attention", got, expected, tolerance("paged_attention", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_scales_of_all_sizes(dtype, isa):
    q, k, v = random_sequence(1, 300, dtype=dtype)
    got, expected = decode_int8(q, k, v, v_factor=10.0 ** (torch.arange(300) % 9 - 7))
    assert_close("paged_attention", got, expected, tolerance("paged_attention", dtype))
    assert not decode_int8(q, k, v, v_factor=0.0)[0].any()
    assert_close("paged_attention", *decode_int8(q * 0, k, v), tolerance("paged_attention", dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:])  # 40000 weights add up to float32's own error
def test_int8_a_key_that_outweighs_thousands_leaves_them_their_part(dtype, isa):
    # Together the light keys weigh as much as the heavy one, each alone less than any step of 16 bits.
    keys = 40_000
    q, v = torch.zeros(1, 1, 8).to(dtype), torch.randn(keys, 1, 8)
    q[..., 0], k = 8.0, torch.zeros(keys, 1, 8)
    k[keys // 2, 0, 0] = torch.tensor(float(keys)).log() / 1.6
    got, expected = decode_int8(q, k, v.sign() + 0.5)
    assert_close("paged_attention", got, expected, tolerance("paged_attention", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["query", "key", "value"])
@pytest.mark.parametrize("at", [0, 36, 69])
def test_nan_reaches_those_that_see_it_and_nobody_else(what, at, dtype, isa):
    q, k, v = random_sequence(70, 70, dtype=dtype)
    clean = check_both(q, k, v, dtype=dtype)
    {"query": q, "key": k, "value": v}[what][at, 1, 7] = torch.nan
    for function in (OPS.attention, ops.attention_ref):
        nan = function(q[None], *contiguous(k, v), ints(70), 0.125)[0].isnan()
        if what == "query":
            assert nan[at, 1].all() and nan.sum() == 64
        else:
            assert not nan[:at].any() and not nan[:, :2].any()
            assert nan[at:, 2:].all() if what == "key" else nan[at:, 2:, 7].all()
    got = OPS.attention(q[None], *contiguous(k, v), ints(70), 0.125)[0]
    unseen = slice(0, at) if what != "query" else slice(at + 1, None)
    assert_close("attention", got[unseen], clean[unseen], tolerance("attention", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["query", "key", "value", "k_scale", "v_scale"])
def test_nan_in_a_decode_reaches_its_heads(what, dtype, isa):
    q, k, v = random_sequence(1, 100, 8, 4, dtype=dtype)
    clean = q.clone()
    k_cache, v_cache, tables, lens = paged([(k, v)], 16)
    scales = (None, None)
    if what.endswith("scale"):
        (k_cache, k_scale), (v_cache, v_scale) = (
            quantize_heads(pool.float().nan_to_num()) for pool in (k_cache, v_cache)
        )
        scales = (k_scale, v_scale)
    block, position = tables[0, 70 // 16], 70 % 16
    args = (k_cache, v_cache, tables, ints(0, 1), lens, 0.125, True, 0, *scales)
    expected = OPS.paged_attention(q, *args)
    target = {"query": q[0, 3], "key": k_cache[block, position, 1], "value": v_cache[block, position, 1]}
    if what in target:
        target[what][7] = torch.nan
    else:
        (k_scale if what == "k_scale" else v_scale)[block, position, 1] = torch.nan
    got = OPS.paged_attention(q, *args)[0]
    hit = torch.zeros(8, 64, dtype=torch.bool)
    hit[3 if what == "query" else slice(2, 4), 7 if what == "value" else slice(None)] = True
    assert torch.equal(got.isnan(), hit) and torch.equal(got[~hit], expected[0][~hit])
    # Behind the last key nobody sees it.
    assert OPS.paged_attention(clean, *args[:4], ints(70), *args[5:]).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_scales_of_unseen_keys_touch_nobody(dtype, isa):
    q, k, v = random_sequence(20, 90, dtype=dtype)
    k_cache, v_cache, tables, lens = paged([(k.float(), v.float())], 16)
    (k_codes, k_scale), (v_codes, v_scale) = (quantize_heads(pool.nan_to_num()) for pool in (k_cache, v_cache))
    args = (k_codes, v_codes, tables, ints(0, 20), lens, 0.2, True, 0, k_scale, v_scale)
    clean = OPS.paged_attention(q, *args)
    for scale in (k_scale, v_scale):
        scale[tables[0, 80 // 16], 80 % 16] = torch.nan
    got = OPS.paged_attention(q, *args)  # token t sees the keys up to 70 + t
    assert got[10:].isnan().all()
    assert_close("paged_attention", got[:10], clean[:10].double(), tolerance("paged_attention", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_scores_are_not_hidden(dtype, isa):
    q, k, v = random_sequence(1, 5, dtype=dtype)
    k[:, 0] = -torch.inf
    q = q.abs()
    got = OPS.attention(q[None], *contiguous(k, v), ints(5), 0.125)[0, 0]
    assert got[:2].isnan().all() and got[2:].isfinite().all()


def test_a_key_of_minus_infinity_has_no_weight(isa):
    q, k, v = random_sequence(1, 200, 2, 1)
    q, k[:70] = q.abs(), -torch.inf  # more than a tile of them
    assert_close(
        "attention", OPS.attention(q[None], *contiguous(k, v), ints(200), 0.125)[0], oracle(q, k[70:], v[70:], 0.125)
    )


def test_large_scores_do_not_overflow(isa):
    q, k, v = random_sequence(2, 600)
    got = OPS.attention(q[None] * 30, *contiguous(k * 30, v), ints(600), 0.125)[0]
    # Scores near 1000 carry an absolute error of 1e-4 in float32, which the exponential makes a relative one.
    assert_close("attention", got, oracle(q * 30, k * 30, v, 0.125), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_threads(dtype, isa):
    # Tasks of one thread hold more heads than those of three.
    sizes = [(1, 2100), (130, 700), (3, 9), (1, 900), (1, 1)]
    sequences = [random_sequence(*size, heads=8, kv_heads=4, dtype=dtype) for size in sizes]
    q, pools = torch.cat([s[0] for s in sequences]), paged([s[1:] for s in sequences], 16)
    starts = ints(*itertools.accumulate((t for t, _ in sizes), initial=0))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS.paged_attention(q, *pools[:3], starts, pools[3], 0.125))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("keys", [512, 513, 1024, 1537])
def test_splits_merge_to_the_whole(keys, isa):
    # 16 query rows are cut along the keys, 144 are not; the last token of both is the same.
    q, k, v = random_sequence(72, keys)
    caches = contiguous(k, v)
    whole = OPS.attention(q[None], *caches, ints(keys), 0.125)[0]
    cut = OPS.attention(q[None, -8:], *caches, ints(keys), 0.125)[0]
    assert_close("attention", cut, whole[-8:].double())


def test_strided_queries(isa):
    qkv = torch.randn(2, 5, 8, 100)
    q, caches = qkv[:, :, :4, 17:81], torch.randn(2, 2, 2, 9, 64).unbind()
    got = OPS.attention(q, *caches, ints(5, 9), 0.125)
    assert got.is_contiguous() and torch.equal(got, OPS.attention(q.contiguous(), *caches, ints(5, 9), 0.125))


Q, CACHE, LENS = torch.ones(2, 3, 4, 16), torch.zeros(2, 2, 8, 16), ints(3, 8)
TOKENS, POOL, TABLES, STARTS = (
    torch.ones(5, 4, 16),
    torch.zeros(6, 4, 2, 16),
    ints(0, 1, 2, 3).view(2, 2),
    ints(0, 2, 5),
)
CODES, SCALES = POOL.to(torch.int8), torch.zeros(6, 4, 2)
SHAPES = {
    "q dtype": ("attention", (Q.int(), CACHE, CACHE, LENS, 1.0), "q: expected float32, float16 or bfloat16, got"),
    "q dimensions": (
        "attention",
        (Q[0], CACHE, CACHE, LENS, 1.0),
        r"q: expected shape \(batch, tokens, heads, head_dim",
    ),
    "q last stride": (
        "attention",
        (torch.ones(2, 3, 4, 32)[..., ::2], CACHE, CACHE, LENS, 1.0),
        "q: expected a contiguous last dimension, got",
    ),
    "cache dtype": (
        "attention",
        (Q, CACHE.half(), CACHE.half(), LENS, 1.0),
        "k_cache: expected (Float|torch.float32), got",
    ),
    "cache last stride": (
        "attention",
        (Q, torch.ones(2, 2, 8, 32)[..., ::2], CACHE, LENS, 1.0),
        "k_cache: expected a contiguous last dimension, got",
    ),
    "cache rows": (
        "attention",
        (Q, torch.ones(2, 2, 8, 17)[..., :16], CACHE, LENS, 1.0),
        "k_cache: expected strides that are multiples of head_dim, got",
    ),
    "cache strides": (
        "attention",
        (Q, CACHE.transpose(0, 1), CACHE, LENS, 1.0),
        r"v_cache: expected the strides \(128, 256, 16, 1\) of k_cache, got",
    ),
    "batch": ("attention", (Q[:1], CACHE, CACHE, LENS, 1.0), "k_cache: expected "),
    "head size": ("attention", (Q[..., :15], CACHE, CACHE, LENS, 1.0), "k_cache: expected "),
    "v shape": ("attention", (Q, CACHE, CACHE[:, :, 1:], LENS, 1.0), r"v_cache: expected shape \(2, 2, 8, 16\), got"),
    "heads": (
        "attention",
        (Q[:, :, :3], CACHE, CACHE, LENS, 1.0),
        "q: expected heads that are a multiple of the cache's 2, got 3",
    ),
    "window": ("attention", (Q, CACHE, CACHE, LENS, 1.0, True, -1), "window: expected at least 0, got -1"),
    "lens dtype": ("attention", (Q, CACHE, CACHE, LENS.long(), 1.0), "kv_lens: expected [iI]nt(32)?, got"),
    "lens shape": ("attention", (Q, CACHE, CACHE, LENS[:1], 1.0), r"kv_lens: expected shape \(2,?\), got"),
    "token dimensions": (
        "paged_attention",
        (Q, POOL, POOL, TABLES, STARTS, LENS, 1.0),
        r"q: expected shape \(tokens, heads, head_dim\), got",
    ),
    "pool dtype": (
        "paged_attention",
        (TOKENS, POOL.half(), POOL.half(), TABLES, STARTS, LENS, 1.0),
        "k_cache: expected (Float|torch.float32), got",
    ),
    "no scales": (
        "paged_attention",
        (TOKENS, CODES, CODES, TABLES, STARTS, LENS, 1.0, True, 0, SCALES, None),
        "v_scale: expected a tensor beside int8 caches, got none",
    ),
    "scales for nothing": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES, STARTS, LENS, 1.0, True, 0, SCALES, SCALES),
        "k_scale: expected none beside caches that are not int8, got a tensor",
    ),
    "scale shape": (
        "paged_attention",
        (TOKENS, CODES, CODES, TABLES, STARTS, LENS, 1.0, True, 0, SCALES, SCALES[1:]),
        r"v_scale: expected shape \(6, 4, 2\), got",
    ),
    "block size": (
        "paged_attention",
        (TOKENS, POOL[:, :0], POOL[:, :0], TABLES, STARTS, LENS, 1.0),
        "k_cache: expected a block size of at least 1, got 0",
    ),
    "tables dtype": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES.long(), STARTS, LENS, 1.0),
        "block_tables: expected [iI]nt(32)?, got",
    ),
    "tables dimensions": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES[0], STARTS, LENS, 1.0),
        r"block_tables: expected shape \(sequences, max_blocks\), got",
    ),
    "tables strides": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES.t(), STARTS, LENS, 1.0),
        "block_tables: expected a contiguous tensor, got",
    ),
    "starts shape": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES, STARTS[1:], LENS, 1.0),
        r"cu_seqlens_q: expected shape \(3,?\), got",
    ),
}
VALUES = {
    "length above capacity": (
        "attention",
        (Q, CACHE, CACHE, ints(3, 9), 1.0),
        "kv_lens: expected 0 <= length <= 8, got 9",
    ),
    "length below 0": ("attention", (Q, CACHE, CACHE, ints(-1, 8), 1.0), "kv_lens: expected 0 <= length <= 8, got -1"),
    "length below the queries": (
        "attention",
        (Q, CACHE, CACHE, ints(3, 2), 1.0),
        "kv_lens: expected 0 or at least the 3 causal queries, got 2",
    ),
    "paged length": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES, STARTS, ints(3, 9), 1.0),
        "kv_lens: expected 0 <= length <= 8, got 9",
    ),
    "paged length below the queries": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES, STARTS, ints(1, 8), 1.0),
        "kv_lens: expected 0 or at least the 2 causal queries, got 1",
    ),
    "first start": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES, ints(1, 2, 5), LENS, 1.0),
        "cu_seqlens_q: expected 0 first, got 1",
    ),
    "last start": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES, ints(0, 2, 6), LENS, 1.0),
        "cu_seqlens_q: expected the 5 rows of q last, got 6",
    ),
    "descending starts": (
        "paged_attention",
        (TOKENS, POOL, POOL, TABLES, ints(0, 7, 5), ints(8, 8), 1.0),
        "cu_seqlens_q: expected ascending values, got 7 before 5",
    ),
    "block above the pool": (
        "paged_attention",
        (TOKENS, POOL, POOL, ints(0, 1, 2, 6).view(2, 2), STARTS, LENS, 1.0),
        "block_tables: expected 0 <= block < 6, got 6",
    ),
    "block below 0": (
        "paged_attention",
        (TOKENS, POOL, POOL, ints(-1, 1, 2, 3).view(2, 2), STARTS, LENS, 1.0),
        "block_tables: expected 0 <= block < 6, got -1",
    ),
}


@pytest.mark.parametrize("form", ["kernel", "reference", "fake"])
@pytest.mark.parametrize("case", SHAPES)
def test_bad_input_is_named(case, form):
    op, args, message = SHAPES[case]
    function = {"kernel": getattr(OPS, op), "reference": ferrum_ops.OPS[op].ref, "fake": ferrum_ops.OPS[op].fake}
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        function[form](*args)


@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("case", VALUES)
def test_bad_values_are_named(case, form):
    op, args, message = VALUES[case]
    function = {"kernel": getattr(OPS, op), "reference": ferrum_ops.OPS[op].ref}
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        function[form](*args)


def test_blocks_that_hold_no_visible_key_are_not_looked_at(isa):
    tables = ints(0, 99, 2, 3).view(2, 2)
    assert OPS.paged_attention(TOKENS, POOL, POOL, tables, STARTS, ints(4, 8), 1.0).isfinite().all()


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="has no backward"):
        ferrum_ops.attention(Q.clone().requires_grad_(), CACHE, CACHE, LENS, 1.0)
    with pytest.raises(RuntimeError, match="has no backward"):
        ferrum_ops.paged_attention(TOKENS, POOL.clone().requires_grad_(), POOL, TABLES, STARTS, LENS, 1.0)
