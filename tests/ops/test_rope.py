import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

import ferrum_ops
from ferrum_ops.ops import rope
from ferrum_ops.testing.compare import assert_close, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum
COS, SIN = rope.rotary_tables(50, 64)


def positions(tokens, dtype=torch.int32):
    return torch.randint(0, 50, (tokens,)).to(dtype)


def test_tables_equal_transformers():
    config = Qwen3MoeConfig(head_dim=64, hidden_size=128, num_attention_heads=2, max_position_embeddings=50)
    module = hf.Qwen3MoeRotaryEmbedding(config)
    cos, sin = module(torch.zeros(1), torch.arange(50)[None])
    theta = config.rope_parameters["rope_theta"]
    own_cos, own_sin = rope.rotary_tables(50, 64, theta=theta)
    assert_close("tables", own_cos, cos[0, :, :32], 1e-5)
    assert_close("tables", own_sin, sin[0, :, :32], 1e-5)


def test_reference_equals_transformers_in_float64():
    x, weight = torch.randn(7, 3, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    at = positions(7).long()
    cos, sin = (torch.cat((t, t), -1)[at].double()[None] for t in (COS, SIN))
    normed = F.rms_norm(x, (64,), weight, 1e-6).transpose(0, 1)[None]
    expected, _ = hf.apply_rotary_pos_emb(normed, normed, cos, sin)
    got = rope.qk_norm_rope_ref(x, weight, COS, SIN, at, 1e-6)
    assert_close("qk_norm_rope", got, expected[0].transpose(0, 1), 1e-13)


def test_interleaved_reference_is_a_complex_rotation():
    x = torch.randn(6, 2, 64, dtype=torch.float64)
    rotation = torch.complex(COS[:6].double(), SIN[:6].double())[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (32, 2))) * rotation).flatten(-2)
    assert_close("qk_norm_rope", rope.qk_norm_rope_ref(x, None, COS, SIN, None, 1e-6, True), expected, 1e-14)


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotary_leaves_the_rest_of_the_head(interleaved, isa):
    x = torch.randn(5, 2, 100)
    got = OPS.qk_norm_rope(x, None, COS, SIN, None, 1e-6, interleaved)
    assert torch.equal(got[..., 64:], x[..., 64:])
    assert_close(
        "qk_norm_rope", got[..., :64], OPS.qk_norm_rope(x[..., :64], None, COS, SIN, None, 1e-6, interleaved), 0.0
    )


def test_partial_rotary_norm_covers_the_whole_head(isa):
    x, weight = torch.randn(5, 2, 100), torch.randn(100)
    got = OPS.qk_norm_rope(x, weight, COS, SIN, None, 1e-6)
    expected = F.rms_norm(x.double(), (100,), weight.double(), 1e-6)
    assert_close("qk_norm_rope", got[..., 64:], expected[..., 64:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_position_zero_without_norm_x_is_unchanged(dtype, isa):
    x = torch.randn(1, 3, 64).to(dtype)
    assert torch.equal(OPS.qk_norm_rope(x, None, COS, SIN, None, 1e-6), x)


def test_positions_none_int32_and_int64_agree(isa):
    x = torch.randn(20, 3, 64)
    by_row = OPS.qk_norm_rope(x, None, COS, SIN, None, 1e-6)
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(OPS.qk_norm_rope(x, None, COS, SIN, torch.arange(20).to(dtype), 1e-6), by_row)


@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
def test_position_outside_the_table_raises(form, dtype, bad):
    at = torch.tensor([0, 49, bad]).to(dtype)
    op = OPS.qk_norm_rope if form == "kernel" else rope.qk_norm_rope_ref
    with pytest.raises(RuntimeError, match=rf"\[qk_norm_rope\] positions: expected 0 <= position < 50, got {bad}"):
        op(torch.randn(3, 2, 64), None, COS, SIN, at, 1e-6)
    op = OPS.split_qkv_norm_rope if form == "kernel" else rope.split_qkv_norm_rope_ref
    with pytest.raises(RuntimeError, match=r"\[split_qkv_norm_rope\] positions: expected 0 <= position < 50"):
        op(torch.randn(3, 4 * 64), None, None, COS, SIN, at, 2, 1, 64, 1e-6)


def test_position_outside_the_table_is_nan_where_the_host_cannot_see_it():
    # A traced reference stands for a device without a kernel: it must not read the positions on the host.
    compiled = torch.compile(rope.qk_norm_rope_ref, backend="eager", fullgraph=True)
    got = compiled(torch.randn(3, 2, 64), None, COS, SIN, torch.tensor([-1, 49, 50]), 1e-6)
    assert got[0].isnan().all() and got[2].isnan().all() and got[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["both", "q only", "none"])
def test_split_is_its_parts(dtype, weights, isa):
    qkv = torch.randn(9, 700).to(dtype)[:, 30:606]  # 5 + 2 * 2 heads of 64
    q_weight, k_weight = torch.randn(2, 64).to(dtype).unbind()
    q_weight = None if weights == "none" else q_weight
    k_weight = k_weight if weights == "both" else None
    at = positions(9)
    q, k, v = OPS.split_qkv_norm_rope(qkv, q_weight, k_weight, COS, SIN, at, 5, 2, 64, 1e-6)
    heads = qkv.unflatten(1, (9, 64))
    assert torch.equal(q, OPS.qk_norm_rope(heads[:, :5], q_weight, COS, SIN, at, 1e-6))
    assert torch.equal(k, OPS.qk_norm_rope(heads[:, 5:7], k_weight, COS, SIN, at, 1e-6))
    assert torch.equal(v, heads[:, 7:])
    assert all(t.is_contiguous() for t in (q, k, v))


def test_v_is_moved_bit_for_bit(isa):
    bits = torch.randint(-(2**31), 2**31, (4, 4 * 64)).int()
    v = OPS.split_qkv_norm_rope(bits.view(torch.float32), None, None, COS, SIN, None, 2, 1, 64, 1e-6)[2]
    assert torch.equal(v.view(torch.int32).flatten(1), bits[:, 3 * 64 :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("with_positions", [True, False])
def test_paged_is_split_and_write(with_positions, form, dtype, isa):
    qkv, weights = torch.randn(5, 700).to(dtype)[:, 30:606], torch.randn(2, 64).to(dtype).unbind()
    at, slots = positions(5) if with_positions else None, torch.tensor([7, -1, 0, 11, 3])
    function = OPS.split_qkv_norm_rope_paged_ if form == "kernel" else rope.split_qkv_norm_rope_paged__ref
    split = OPS.split_qkv_norm_rope if form == "kernel" else rope.split_qkv_norm_rope_ref
    caches = torch.randn(2, 3, 4, 2, 64).to(dtype)
    expected = caches.clone()
    q, k, v = split(qkv, *weights, COS, SIN, at, 5, 2, 64, 1e-6)
    OPS.paged_kv_write_(*expected.unbind(), k, v, slots)
    got = function(qkv, *weights, COS, SIN, at, 5, 2, 64, 1e-6, *caches.unbind(), slots)
    assert torch.equal(got, q) and torch.equal(caches, expected)


@pytest.mark.parametrize("form", ["kernel", "reference"])
@pytest.mark.parametrize("bad", ["slot", "position"])
def test_paged_raises_before_it_writes(bad, form):
    function = OPS.split_qkv_norm_rope_paged_ if form == "kernel" else rope.split_qkv_norm_rope_paged__ref
    at = torch.tensor([0, 50 if bad == "position" else 1], dtype=torch.int32)
    slots = torch.tensor([0, 12 if bad == "slot" else 1])
    caches = torch.zeros(2, 3, 4, 1, 64)
    message = {
        "slot": "slot_mapping: expected -1 <= slot < 12, got 12",
        "position": "positions: expected 0 <= position < 50",
    }
    with pytest.raises(RuntimeError, match=rf"\[split_qkv_norm_rope_paged_\] {message[bad]}"):
        function(torch.ones(2, 256), None, None, COS, SIN, at, 2, 1, 64, 1e-6, *caches.unbind(), slots)
    assert not caches.any()


def test_no_tokens(isa):
    none = torch.empty(0, dtype=torch.int32)
    assert OPS.qk_norm_rope(torch.empty(0, 3, 64), None, COS, SIN, none, 1e-6).shape == (0, 3, 64)
    shapes = [t.shape for t in OPS.split_qkv_norm_rope(torch.empty(0, 320), None, None, COS, SIN, none, 3, 1, 64, 1e-6)]
    assert shapes == [(0, 3, 64), (0, 1, 64), (0, 1, 64)]


def test_nan_stays_in_its_head(isa):
    x = torch.randn(3, 2, 64)
    x[1, 1, 7] = torch.nan
    nan = OPS.qk_norm_rope(x, torch.ones(64), COS, SIN, None, 1e-6).isnan()
    assert nan[1, 1].all() and nan.sum() == 64
    nan = OPS.qk_norm_rope(x, None, COS, SIN, None, 1e-6).isnan()
    assert nan[1, 1, 7] and nan[1, 1, 39] and nan.sum() == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_depends_on_neither_threads_nor_neighbours(dtype, isa):
    qkv, weight = torch.randn(200, 8 * 64).to(dtype), torch.randn(64).to(dtype)
    at = positions(200)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS.split_qkv_norm_rope(qkv, weight, weight, COS, SIN, at, 4, 2, 64, 1e-6))
    finally:
        torch.set_num_threads(threads)
    alone = OPS.split_qkv_norm_rope(qkv[77:78], weight, weight, COS, SIN, at[77:78], 4, 2, 64, 1e-6)
    for result in results:
        for t, first, one in zip(result, results[0], alone):
            assert torch.equal(t, first) and torch.equal(t[77:78], one)
    expected = rope.qk_norm_rope_ref(qkv.unflatten(1, (8, 64))[:, :4].double(), weight.double(), COS, SIN, at, 1e-6)
    assert_close("split_qkv_norm_rope", results[0][0], expected, tolerance("split_qkv_norm_rope", dtype))


X, W, QKV = torch.ones(4, 2, 64), torch.ones(64), torch.ones(4, 4 * 64)
AT, POOL = torch.zeros(4, dtype=torch.int32), torch.zeros(3, 4, 1, 64)
BAD = {
    "integers": ("qk_norm_rope", (X.int(), None, COS, SIN, AT, 1e-6), r"x: expected float32, float16 or bfloat16"),
    "2 dimensions": ("qk_norm_rope", (X[0], None, COS, SIN, AT, 1e-6), r"x: expected shape \(tokens, heads, head"),
    "head stride": (
        "qk_norm_rope",
        (torch.ones(4, 2, 128)[..., ::2], None, COS, SIN, AT, 1e-6),
        r"x: expected a contiguous last dimension, got",
    ),
    "weight size": ("qk_norm_rope", (X, W[:63], COS, SIN, AT, 1e-6), r"norm_weight: expected shape \(64,?\), got"),
    "cos dtype": ("qk_norm_rope", (X, W, COS.half(), SIN, AT, 1e-6), r"cos: expected [fF]loat(32)?, got"),
    "cos too wide": (
        "qk_norm_rope",
        (X[..., :62], None, COS, SIN, AT, 1e-6),
        r"cos: expected shape \(max_pos, rotary_dim / 2\) with rotary_dim <= 62, got \(50, 32\)",
    ),
    "sin shape": ("qk_norm_rope", (X, W, COS, SIN[:49], AT, 1e-6), r"sin: expected shape \(50, 32\), got \(49, 32\)"),
    "cos transposed": (
        "qk_norm_rope",
        (X, W, COS.t().contiguous().t(), SIN, AT, 1e-6),
        r"cos: expected a contiguous last dimension, got",
    ),
    "table too short": ("qk_norm_rope", (X, W, COS[:3], SIN[:3], None, 1e-6), r"cos: expected at least 4 rows"),
    "table empty": ("qk_norm_rope", (X, W, COS[:0], SIN[:0], AT, 1e-6), r"cos: expected at least 1 row, got 0"),
    "positions dtype": ("qk_norm_rope", (X, W, COS, SIN, AT.float(), 1e-6), r"positions: expected int32 or int64"),
    "positions shape": ("qk_norm_rope", (X, W, COS, SIN, AT[:3], 1e-6), r"positions: expected shape \(4,?\), got"),
    "positions stride": (
        "qk_norm_rope",
        (X, W, COS, SIN, torch.zeros(8, dtype=torch.int32)[::2], 1e-6),
        r"positions: expected a contiguous tensor, got",
    ),
    "qkv width": (
        "split_qkv_norm_rope",
        (QKV, None, None, COS, SIN, AT, 3, 1, 64, 1e-6),
        r"qkv: expected shape \(\*, 320\), got \(4, 256\)",
    ),
    "no heads": (
        "split_qkv_norm_rope",
        (QKV, None, None, COS, SIN, AT, 0, 2, 64, 1e-6),
        r"num_heads: expected at least 1, got 0",
    ),
    "k_weight size": (
        "split_qkv_norm_rope",
        (QKV, W, W[:32], COS, SIN, AT, 2, 1, 64, 1e-6),
        r"k_weight: expected shape \(64,?\), got \(32,?\)",
    ),
    "pool heads": (
        "split_qkv_norm_rope_paged_",
        (QKV, None, None, COS, SIN, AT, 2, 1, 64, 1e-6, torch.ones(3, 4, 2, 64), torch.ones(3, 4, 2, 64), AT),
        r"k_cache: expected shape \(\*, \*, 1, 64\), got \(3, 4, 2, 64\)",
    ),
    "pool dtype": (
        "split_qkv_norm_rope_paged_",
        (QKV, None, None, COS, SIN, AT, 2, 1, 64, 1e-6, POOL.half(), POOL.half(), AT),
        r"k_cache: expected (Float|torch.float32), got",
    ),
    "slots shape": (
        "split_qkv_norm_rope_paged_",
        (QKV, None, None, COS, SIN, AT, 2, 1, 64, 1e-6, POOL, POOL, AT[:3]),
        r"slot_mapping: expected shape \(4,?\), got",
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
    with pytest.raises(RuntimeError, match="has no backward"):
        ferrum_ops.qk_norm_rope(X, None, COS.clone().requires_grad_(), SIN)
    with pytest.raises(RuntimeError, match="has no backward"):
        ferrum_ops.split_qkv_norm_rope(QKV, W.clone().requires_grad_(), None, COS, SIN, AT, 2, 1, 64)
