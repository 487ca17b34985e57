"""The Triton kernels for attention beyond the registry's samples: every tile, splits, and what the host cannot see.

Those that take the `kernel` fixture run on a GPU too (tests/cuda/test_edges.py)."""

import itertools
import mmap
import random

import pytest
import torch

pytest.importorskip("triton")

import ferrum_ops
from ferrum_ops.ops import attention as ops
from ferrum_ops.ops.kv_cache import quantize_heads
from ferrum_ops.testing.compare import assert_close, tolerance
from ferrum_ops.triton import attention, launch
from ferrum_ops.triton.attention import ANY_ROWS, MAX_KEYS, MAX_SPLITS, Sizes
from ferrum_ops.triton.launch import Target
from tests.ops.test_attention import SHAPES, contiguous, ints, oracle, paged, random_sequence

H200 = Target(90, 132)
MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = [pytest.param(dtype, marks=[] if dtype == torch.bfloat16 else pytest.mark.slow) for dtype in FLOATS]
CONTIGUOUS, PAGES, INT8_PAGES = attention.SOURCES
WINDOWED = [pytest.param(CONTIGUOUS, id="contiguous", marks=pytest.mark.slow), pytest.param(PAGES, id="pages")]
OUTSIDE = ((-1, 2**31 - 1), pytest.param((-(2**31), 10**6), marks=pytest.mark.slow))


def reference(name, q, k_cache, v_cache, *rest):
    """What the reference says in float64."""
    wide = [t if t.dtype == torch.int8 else t.double() for t in (q, k_cache, v_cache)]
    return ferrum_ops.OPS[name].ref(*wide, *rest)


def starts_of(counts):
    return ints(*itertools.accumulate(counts, initial=0))


def pool_of(source, sequences, block_size=16):
    """Pools, tables and lengths of (k, v); then the scales, which are NaN for what belongs to nobody."""
    k_cache, v_cache, tables, lens = paged(sequences, block_size)
    if source != INT8_PAGES:
        return k_cache, v_cache, tables, lens, None, None
    (k_codes, k_scale), (v_codes, v_scale) = map(quantize_heads, (k_cache.float(), v_cache.float()))
    return k_codes, v_codes, tables, lens, k_scale, v_scale


def arguments(source, q, k, v, scale=0.2, causal=True, window=0):
    """Name and arguments of the op for one sequence."""
    if source == CONTIGUOUS:
        return "attention", q[None], *contiguous(k, v), ints(k.shape[0]), scale, causal, window
    *caches, lens, k_scale, v_scale = pool_of(source, [(k, v)])
    return "paged_attention", q, *caches, ints(0, q.shape[0]), lens, scale, causal, window, k_scale, v_scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 35])
@pytest.mark.parametrize("head_dim", [64, 100, 200])
@pytest.mark.parametrize("source", attention.SOURCES, ids=("contiguous", "pages", "int8"))
def test_every_tile(source, head_dim, tokens, dtype, interpreter):
    name, *args = arguments(source, *random_sequence(tokens, 75, 4, 1, head_dim, dtype))
    with interpreter() as asked:
        got = getattr(attention, name)(*args)
    block_d = attention._block_d(head_dim, dtype, H200)
    tile_of = attention.few_rows_tile if tokens == 1 else attention.many_rows_tile
    used = tile_of(block_d, dtype, source, 90)
    assert asked == [str(attention._binary(used, source, block_d, dtype))]
    assert_close(name, got, reference(name, *args), tolerance(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (7, 1), (32, 4), (40, 1)])
def test_group_sizes(heads, kv_heads, dtype, kernel):
    name, *args = arguments(PAGES, *random_sequence(3, 37, heads, kv_heads, 32, dtype))
    assert_close(name, kernel(name, *args)[0], reference(name, *args), tolerance(name, dtype))


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("source", WINDOWED)
def test_windows(source, tokens, causal, kernel):
    q, k, v = random_sequence(tokens, 140, 2, 1, 16)
    for window in (1, 64, 65, 129, 2**40):
        name, *args = arguments(source, q, k, v, 0.3, causal, window)
        assert_close(name, kernel(name, *args)[0], reference(name, *args))


def test_blocks_before_the_window_and_behind_the_last_key_are_not_looked_at(kernel):
    q, k, v = random_sequence(2, 330, 2, 1, 16)
    name, *args = arguments(PAGES, q, k, v, 0.3, True, 70)
    expected = kernel(name, *args)[0]
    args[3] = torch.cat((args[3], ints(-7, 10**9)[None]), 1)
    args[3][0, : (330 - 71) // 16] = 10**9
    assert torch.equal(kernel(name, *args)[0], expected)


@pytest.mark.slow
def test_block_size_does_not_change_a_bit(kernel):
    q, k, v = random_sequence(2, 150)
    results = []
    for size in (16, 1, 3, 64, 100, 500):
        k_cache, v_cache, tables, lens = paged([(k, v)], size)
        tables = torch.nn.functional.pad(tables, (0, 1024 // size - tables.shape[1]), value=-1)  # the same capacity
        results += kernel("paged_attention", q, k_cache, v_cache, tables, ints(0, 2), lens, 0.125, True, 0, None, None)
        assert torch.equal(results[0], results[-1]), f"blocks of {size}"


SIZES = [(1, 100), (20, 20), (1, 5), (5, 70), (0, 33), (1, 1)]


def mixed(dtype, source=PAGES, sizes=SIZES):
    sequences = [random_sequence(*size, 8, 1, dtype=dtype) for size in sizes]
    q = torch.cat([s[0] for s in sequences])
    *caches, lens, k_scale, v_scale = pool_of(source, [s[1:] for s in sequences])
    return [q, *caches, starts_of(t for t, _ in sizes), lens, 0.125, True, 0, k_scale, v_scale]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [PAGES, INT8_PAGES], ids=("pages", "int8"))
def test_prefills_and_decodes_in_one_call(source, dtype, kernel):
    args = mixed(dtype, source)
    got = kernel("paged_attention", *args)[0]
    assert_close("paged_attention", got, reference("paged_attention", *args), tolerance("paged_attention", dtype))


@pytest.mark.slow
def test_a_sequence_does_not_see_its_neighbours(kernel):
    """Bits stay what they are whatever the others hold and however long they are."""
    args = mixed(torch.bfloat16)
    got = kernel("paged_attention", *args)[0]
    for kept, rows in ((1, slice(1, 21)), (3, slice(22, 27))):
        changed = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        others = [i for i in range(len(SIZES)) if i != kept]
        for pool in changed[1:3]:
            blocks = [block for i in others for block in args[3][i].tolist() if block >= 0]
            pool[blocks] = torch.nan
        changed[5][others] = ints(98, 20, 3, 60, 0, 1)[others]
        assert torch.equal(kernel("paged_attention", *changed)[0][rows], got[rows])


def test_rows_behind_the_last_sequence_are_zeros(kernel):
    args = mixed(torch.bfloat16)
    args[0] = torch.cat((args[0], torch.full((25, 8, 64), torch.nan, dtype=torch.bfloat16)))
    got = kernel("paged_attention", *args)[0]
    assert got[28:].eq(0).all()
    assert torch.equal(got[:28], kernel("paged_attention", args[0][:28], *args[1:])[0])
    empty = [*args[:3], args[3][:0], ints(0), args[5][:0], *args[6:]]
    assert kernel("paged_attention", *empty)[0].eq(0).all()


@pytest.mark.parametrize("outside", OUTSIDE, ids=str)
@pytest.mark.parametrize("tokens", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_keys_of_blocks_outside_the_pool_are_not_seen(tokens, outside, kernel):
    q, k, v = random_sequence(tokens, 200)
    name, *args = arguments(PAGES, q, k, v, 0.2, False)
    args[3][0, 2], args[3][0, 12] = outside
    left = [key for key in range(200) if key // 16 not in (2, 12)]
    assert_close(name, kernel(name, *args)[0], oracle(q, k[left], v[left], 0.2, False))
    args[3][0, ::2], args[3][0, 1::2] = outside
    assert kernel(name, *args)[0].eq(0).all()


@pytest.mark.parametrize("tokens", [1, 20])
def test_of_a_causal_prefill_only_rows_without_a_block_are_zeros(tokens, kernel):
    q, k, v = random_sequence(tokens, 20)
    name, *args = arguments(PAGES, q, k, v, 0.2)
    args[3][0, 0] = -1
    expected = torch.zeros(tokens, 4, 64, dtype=torch.float64)
    late = slice(max(0, tokens - 4), None)  # the tokens that see the keys of the second block
    expected[late] = oracle(q[late], k[16:], v[16:], 0.2)
    assert_close(name, kernel(name, *args)[0], expected)


@pytest.mark.parametrize(
    "causal, window",
    [(True, 0), (False, 9), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((True, 9), (False, 0)))],
)
def test_lengths_that_do_not_fit(causal, window, kernel):
    lens = (-3, 2, 70, 73, 90, 2**31 - 1, -(2**31))
    q = torch.randn(len(lens), 5, 4, 16)
    k, v = torch.randn(2, len(lens), 2, 70, 16).unbind()
    got = kernel("attention", q, k, v, ints(*lens), 0.3, causal, window)[0]
    for b, kv_len in enumerate(lens):
        visible = ops._visible(5, kv_len, q.device, causal, window)
        keys, values = (t[b].transpose(0, 1).double() for t in (k, v))
        assert_close("attention", got[b], ops._attend(q[b].double(), keys, values, *visible, 0.3))
    pools = [t.transpose(1, 2).reshape(-1, 10, 2, 16) for t in (k, v)]
    tables = torch.arange(49, dtype=torch.int32).view(7, 7)
    starts = starts_of([5] * len(lens))
    page = kernel("paged_attention", q.flatten(0, 1), *pools, tables, starts, ints(*lens), 0.3, causal, window)[0]
    torch.testing.assert_close(page.view_as(got), got)


@pytest.mark.parametrize(
    "starts", [(0, 7, 3, 50), (0, -9, 2**31 - 1, 4), (5, 9, 12, 50), (0, 60, 70, 80), (9, 9, 9, 9)]
)
def test_starts_that_do_not_ascend_read_and_write_nothing_else(starts, kernel):
    args = mixed(torch.bfloat16)
    args[3], args[4], args[5] = args[3][:3], ints(*starts), args[5][:3]
    assert kernel("paged_attention", *args)[0].shape == args[0].shape


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[2]])
@pytest.mark.parametrize("bad", [float("nan"), pytest.param(float("-inf"), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("what", ["query", "key", "value", "k_scale", "v_scale"])
@pytest.mark.parametrize("tokens, window", [pytest.param(1, 0, marks=pytest.mark.slow), (24, 30)])
def test_what_is_not_finite_reaches_those_that_see_it(tokens, window, what, bad, dtype, kernel):
    source = INT8_PAGES if what.endswith("scale") else PAGES
    name, q, k_cache, v_cache, tables, *rest = arguments(source, *random_sequence(tokens, 90, dtype=dtype))
    rest[4] = window
    for key in (3, 45, 81):  # with the window, each seen by other tokens
        block, position = tables[0, key // 16], key % 16
        if what == "query":
            q[min(key, tokens - 1), 1, 7] = bad
        elif source == INT8_PAGES:
            rest[5 if what == "k_scale" else 6][block, position, 1] = bad
        else:
            (k_cache if what == "key" else v_cache)[block, position, 1, key % 64] = bad
    args = (q, k_cache, v_cache, tables, *rest)
    assert_close(name, kernel(name, *args)[0], reference(name, *args), tolerance(name, dtype))


@pytest.mark.parametrize("source", [CONTIGUOUS, PAGES], ids=("contiguous", "pages"))
def test_keys_of_minus_infinity(source, kernel):
    q, k, v = random_sequence(2, 200, 2, 1)
    q, k[:130] = q.abs(), -torch.inf  # more than a tile of them
    name, *args = arguments(source, q, k, v, 0.125)
    assert_close(name, kernel(name, *args)[0], reference(name, *args))
    name, *args = arguments(source, q, k[:100], v[:100], 0.125)
    assert kernel(name, *args)[0].isnan().all()


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[2]])
@pytest.mark.parametrize("source", attention.SOURCES, ids=("contiguous", "pages", "int8"))
def test_splits(source, dtype, interpreter):
    """Of 400 keys, of few that leave splits without any, of none; and a value that is not finite in one of them."""
    for keys, bad in ((400, False), (400, True), (40, False), (0, False)):
        name, *args = arguments(source, *random_sequence(1, 400, 4, 1, dtype=dtype))
        lens = args[3 if source == CONTIGUOUS else 5]
        lens.fill_(keys)
        if bad and source == CONTIGUOUS:
            args[2][0, 0, 300, 7] = torch.nan
        elif bad:
            block = args[3][0, 300 // 16]
            (args[2] if source == PAGES else args[10])[block, 300 % 16, 0] = torch.nan
        with interpreter(132) as asked:
            got = getattr(attention, name)(*args)
        assert len(asked) == 2 and "merge" in asked[1]
        assert_close(name, got, reference(name, *args), tolerance(name, dtype))


@pytest.mark.slow
def test_splits_of_many_rows_and_of_a_mixed_call(interpreter):
    sizes = [(20, 1100), (1, 700), (2, 90)]
    args = mixed(torch.bfloat16, PAGES, sizes)
    with interpreter(132) as asked:
        got = attention.paged_attention(*args)
    assert [binary.split("-")[0] for binary in asked] == ["attention_kernel", "attention_merge_kernel"] * 2
    assert_close("paged_attention", got, reference("paged_attention", *args), tolerance("paged_attention", got.dtype))


def test_pools_of_more_than_two_to_the_31_elements(interpreter):
    blocks = (1 << 20) + 3  # of 2048 elements; memory that is not touched takes none
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, blocks * 4096, flags=flags)
    pool = torch.frombuffer(memory, dtype=torch.bfloat16).view(blocks, 16, 2, 64)
    q, k, _ = random_sequence(1, 20, dtype=torch.bfloat16)
    tables = ints(blocks - 1, blocks - 2)[None]
    pool[blocks - 1], pool[blocks - 2, :4] = k[:16], k[16:]
    with interpreter():
        got = attention.paged_attention(q, pool, pool, tables, ints(0, 1), ints(20), 0.2)
    assert_close("paged_attention", got, oracle(q, k, k, 0.2), tolerance("paged_attention", torch.bfloat16))


@pytest.mark.parametrize("name", ["attention", "paged_attention"])
def test_the_host_reads_nothing(name, monkeypatch):
    """Tensors without values are enough to launch. What depends on sizes is the same for every call of these sizes."""
    monkeypatch.setattr(launch, "target_of", lambda tensor: H200)
    launches = []
    monkeypatch.setattr(launch, "run", lambda *args: launches.append(args))
    for args in ferrum_ops.OPS[name].inputs("cpu", torch.bfloat16):
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        assert getattr(attention, name)(*meta).shape == args[0].shape
    assert len(launches) >= 6


def pick(sequences, tokens, capacity, source=PAGES, group=8, kv_heads=4, head_dim=128, dtype=torch.bfloat16):
    sizes = Sizes(sequences, tokens, group, kv_heads, head_dim, capacity, dtype, source)
    return attention.pick_attention_config(sizes, H200)


def test_decodes_are_split_until_the_device_is_busy():
    for sequences, capacity, splits in ((1, 4096, 32), (1, 32768, 60), (8, 4096, 8), (32, 32768, 2), (64, 4096, 1)):
        for source in (CONTIGUOUS, PAGES):
            (step,) = pick(sequences, 1 if source == CONTIGUOUS else sequences, capacity, source)
            assert (step.tile.block_m, step.splits) == (16, splits)
            assert step.rows_above == 0 and step.rows_up_to == ANY_ROWS
    assert pick(1, 1, 100)[0].splits == pick(1, 1, 0)[0].splits == 1


def test_prefills_have_many_rows_and_no_splits():
    for source in (CONTIGUOUS, PAGES):
        (step,) = pick(1, 2048, 2048, source)
        assert (step.tile.block_m, step.splits) == (128, 1)
    (chunk,) = pick(1, 16, 32768)
    assert (chunk.tile.block_m, chunk.splits) == (128, 30)


def test_where_both_kinds_may_be_mixed_each_sequence_is_served_once():
    many, few = pick(32, 2048 + 31, 4096)
    assert (many.rows_above, many.rows_up_to) == (16, ANY_ROWS) and (few.rows_above, few.rows_up_to) == (0, 16)
    assert many.tile.block_m == 128 and few.tile.block_m == 16
    assert few.slots == 33 and few.tiles == 1


def test_slots_are_enough_and_every_choice_is_listed():
    listed = set(attention.binaries(90))
    generator = random.Random(0)
    for _ in range(500):
        counts = [generator.choice((0, 1, 2, 5, 40, 700)) for _ in range(generator.randrange(0, 40))]
        source, dtype = generator.choice(attention.SOURCES), generator.choice(FLOATS)
        tokens = (counts or [0])[0] if source == CONTIGUOUS else sum(counts)
        group, head_dim = generator.randrange(1, 40), generator.randrange(1, 257)
        sizes = Sizes(len(counts), tokens, group, 2, head_dim, generator.randrange(1, 10**5), dtype, source)
        steps = attention.pick_attention_config(sizes, H200)
        for step in steps:
            assert 1 <= step.splits <= MAX_SPLITS
            assert attention._binary(step.tile, source, attention._block_d(head_dim, dtype, H200), dtype) in listed
            assert attention._merge_binary(source, dtype) in listed
            if step.tiles == 0 and source != CONTIGUOUS:
                firsts = [s * group // step.tile.block_m + i for i, s in enumerate(starts_of(counts).tolist())]
                slots = [b - a for a, b in itertools.pairwise([*firsts, step.slots])]
                assert all(n * step.tile.block_m >= c * group for n, c in zip(slots, counts)) and slots[-1] >= 1
        for count in counts if source != CONTIGUOUS else []:
            assert sum(step.rows_above < count * group <= step.rows_up_to for step in steps) == (count > 0)


def test_reciprocals_divide():
    generator = random.Random(0)
    divisors = [*range(1, 130), 1000, 4096, MAX_KEYS // 3, MAX_KEYS - 1, MAX_KEYS]
    for divisor in divisors:
        multiplier, shift = attention.reciprocal(divisor)
        assert 0 < multiplier < 2**31 and shift < 64
        edges = [k * divisor + d for k in (1, MAX_KEYS // divisor) for d in (-1, 0, 1)]
        for i in (0, MAX_KEYS, *edges, *(generator.randrange(MAX_KEYS) for _ in range(50))):
            assert not 0 <= i <= MAX_KEYS or (i * multiplier) >> shift == i // divisor


Q, CACHE, LENS = torch.ones(2, 3, 4, 16), torch.zeros(2, 2, 8, 16), ints(3, 8)
UNFIT = {
    "float64": (
        (Q.double(), CACHE.double(), CACHE.double(), LENS, 1.0),
        "q: expected float32, float16 or bfloat16, got torch.float64",
    ),
    "head size": (
        (torch.ones(1, 1, 1, 257), torch.ones(1, 1, 1, 257), torch.ones(1, 1, 1, 257), LENS[:1], 1.0),
        "q: expected a head size of at most 256 on CUDA, got 257",
    ),
    "capacity": (
        (*(torch.empty(1, 1, n, 1, device="meta") for n in (1, 1 << 30, 1 << 30)), LENS[:1], 1.0),
        "k_cache: expected room for at most 1073741823 keys of a sequence on CUDA, got 1073741824",
    ),
}


@pytest.mark.parametrize("op, args, message", SHAPES.values(), ids=SHAPES.keys())
def test_bad_arguments_are_refused_as_on_the_cpu(op, args, message):
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        getattr(attention, op)(*args)


@pytest.mark.parametrize("args, message", UNFIT.values(), ids=UNFIT.keys())
def test_what_the_kernel_does_not_take_is_refused(args, message):
    with pytest.raises(RuntimeError, match=rf"\[attention\] {message}"):
        attention.attention(*args)
