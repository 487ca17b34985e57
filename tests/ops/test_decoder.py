import re

import pytest
import torch

import ferrum_ops
from ferrum_ops.ops.gguf import moe_experts_gguf_ref
from ferrum_ops.ops.moe_gemm import moe_experts_int4_ref
from ferrum_ops.ops.moe_routing import router_topk_softmax_ref
from ferrum_ops.ops.norm import fused_add_rms_norm_ref
from tests.ops.test_every_op import copy_args

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum
ATTENTION = ("decoder_attention_gguf_", "decoder_attention_int4_")
EXPERTS = ("decoder_experts_gguf", "decoder_experts_int4")


def samples(name, dtype):
    return list(ferrum_ops.OPS[name].inputs("cpu", dtype))


def attention_by_parts(hidden, norm_weight, eps, multiply_qkv, heads, multiply_o, num_heads):
    q_weight, k_weight, cos, sin, positions, k_cache, v_cache, cache_lens, scale = heads
    batch, kv_heads, _, head_dim = k_cache.shape
    rows = multiply_qkv(OPS.rms_norm(hidden, norm_weight, eps), (num_heads + 2 * kv_heads) * head_dim)
    tables = (cos, sin, positions)
    split = OPS.split_qkv_norm_rope(rows, q_weight, k_weight, *tables, num_heads, kv_heads, head_dim, eps)
    tokens = hidden.shape[0] // batch
    q, k, v = (t.view(batch, tokens, t.shape[1], head_dim) for t in split)
    OPS.kv_append_(k_cache, v_cache, k, v, cache_lens)
    attended = OPS.attention(q, k_cache, v_cache, cache_lens + tokens, scale)
    return multiply_o(attended.view(hidden.shape[0], num_heads * head_dim), hidden.shape[1])


def gguf_attention_by_parts(hidden, norm_weight, eps, qkv, qkv_types, *rest):
    heads, (o, o_types, num_heads, activation) = rest[:9], rest[9:]

    def multiply_qkv(rows, columns):
        return OPS.gguf_linear(rows, qkv, qkv_types, None, activation)

    def multiply_o(rows, columns):
        return OPS.gguf_linear(rows, o, o_types, None, activation)

    return attention_by_parts(hidden, norm_weight, eps, multiply_qkv, heads, multiply_o, num_heads)


def int4_attention_by_parts(hidden, norm_weight, eps, *rest):
    qkv, qkv_group_size, heads = rest[:5], rest[5], rest[6:15]
    o, (o_group_size, num_heads, activation) = rest[15:20], rest[20:]

    def multiply_qkv(rows, columns):
        return OPS.int4_linear(rows, *qkv, columns, qkv_group_size, activation)

    def multiply_o(rows, columns):
        return OPS.int4_linear(rows, *o, columns, o_group_size, activation)

    return attention_by_parts(hidden, norm_weight, eps, multiply_qkv, heads, multiply_o, num_heads)


def experts_by_parts(run, attended, residual, norm_weight, eps, router_weight, top_k, renormalize, *experts):
    normed, total = OPS.fused_add_rms_norm(attended, residual, norm_weight, eps)
    _, ids, weights = OPS.router_topk_softmax(normed, router_weight, top_k, renormalize)
    return total + run(normed, ids, weights, *experts)


#: Every op as calls of its parts.
BY_PARTS = {
    "decoder_attention_gguf_": gguf_attention_by_parts,
    "decoder_attention_int4_": int4_attention_by_parts,
    "decoder_experts_gguf": lambda *args: experts_by_parts(OPS.moe_experts_gguf, *args),
    "decoder_experts_int4": lambda *args: experts_by_parts(OPS.moe_experts_int4, *args),
}


def names_of(name):
    return [argument.name for argument in getattr(OPS, name).default._schema.arguments]


def caches(name, args):
    return [args[names_of(name).index(cache)] for cache in ("k_cache", "v_cache")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_has_the_bits_of_its_parts(name, dtype, isa):
    for args in samples(name, dtype):
        own, parts = copy_args(args), copy_args(args)
        assert torch.equal(getattr(OPS, name)(*own), BY_PARTS[name](*parts))
        for got, expected, before in zip(caches(name, own), caches(name, parts), caches(name, args)):
            assert torch.equal(got, expected) and (args[0].numel() == 0 or not torch.equal(got, before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_have_the_bits_of_their_parts(name, dtype, isa):
    for args in samples(name, dtype):
        assert torch.equal(getattr(OPS, name)(*args), BY_PARTS[name](*args))


def test_a_long_sum_is_rounded_as_torch_rounds_it(isa):
    """Rows enough for several threads, and an odd width."""
    args = list(samples("decoder_experts_int4", torch.bfloat16)[2])
    args[0], args[1] = (torch.randn(999, 72).bfloat16() for _ in range(2))
    assert torch.equal(OPS.decoder_experts_int4(*args), BY_PARTS["decoder_experts_int4"](*args))


@pytest.mark.parametrize("name", EXPERTS)
def test_no_sample_leaves_the_choice_of_experts_to_rounding(name):
    for args in samples(name, torch.float32):
        normed, _ = fused_add_rms_norm_ref(*args[:4])
        logits = router_topk_softmax_ref(normed, *args[4:7])[0].sort(-1, descending=True).values
        assert (logits[:, args[5] - 1] > 1.05 * logits[:, args[5]]).all()


@pytest.mark.parametrize("name", BY_PARTS)
def test_a_compiler_sees_one_op_and_no_break(name):
    torch.compiler.reset()
    for args in samples(name, torch.float32)[:3]:
        function = torch.compile(getattr(OPS, name), backend="aot_eager", fullgraph=True)
        own, expected = copy_args(args), copy_args(args)
        assert torch.equal(function(*own), getattr(OPS, name)(*expected))
        assert all(torch.equal(a, b) for a, b in zip(own, expected) if isinstance(a, torch.Tensor))


def changed(name, args, changes):
    return [changes.get(argument, value) for argument, value in zip(names_of(name), copy_args(args))]


GGUF = samples("decoder_attention_gguf_", torch.float32)[0]
BAD = {
    "hidden shape": (ATTENTION, 0, {"hidden": torch.ones(64)}, "hidden: expected shape (*, *)"),
    "no cache": (ATTENTION, 0, {"k_cache": torch.ones(2, 3)}, "k_cache: expected shape (batch"),
    "no sequence": (ATTENTION, 0, {"k_cache": torch.ones(0, 2, 9, 16)}, "k_cache: expected shape"),
    "uneven": (ATTENTION, 2, {"hidden": torch.ones(5, 72)}, "hidden: expected as many tokens for each of 2"),
    "no heads": (ATTENTION, 0, {"num_heads": 0}, "num_heads: expected at least 1, got 0"),
    "rows of qkv": (ATTENTION[:1], 0, {"num_heads": 3}, "qkv: expected 448 rows of weights, got 512"),
    "rows of o": (
        ATTENTION[:1],
        0,
        {"o": GGUF[14] * 2, "o_types": GGUF[15] * 2},
        "o: expected 256 rows of weights, got 512",
    ),
    "attended shape": (EXPERTS, 0, {"attended": torch.ones(128)}, "attended: expected shape (*, *)"),
}
OF_PARTS = {
    "norm": (ATTENTION, {"norm_weight": torch.ones(9)}, "rms_norm", "weight: expected shape"),
    "lengths": (
        ATTENTION,
        {"cache_lens": torch.tensor([9]).int()},
        "kv_append_",
        "cache_lens: expected 0 <= length <= 8",
    ),
    "qkv": (ATTENTION[1:], {"qkv": torch.zeros(9, 8, 64)}, "int4_linear", "packed: expected Byte"),
    "o": (ATTENTION[1:], {"o_scales": torch.ones(1, 1, 16).half()}, "int4_linear", "scales: expected shape"),
    "qkv types": (ATTENTION[:1], {"qkv_types": GGUF[4][:2]}, "gguf_linear", "types: expected one for each of 3"),
    "o blocks": (ATTENTION[:1], {"o": []}, "gguf_linear", "blocks: expected at least 1 tensor"),
    "residual": (EXPERTS, {"residual": torch.ones(2, 128)}, "fused_add_rms_norm", "residual: expected shape"),
    "router": (EXPERTS, {"router_weight": torch.ones(4, 9)}, "router_topk_softmax", "weight: expected shape"),
    "w13": (EXPERTS[1:], {"w13": torch.zeros(4, 9)}, "moe_experts_int4", "w13"),
    "up": (EXPERTS[:1], {"up": torch.zeros(4, 9)}, "moe_experts_gguf", "up"),
}


def of_each_op(cases):
    return [pytest.param(name, *case[1:], id=f"{key}-{name}") for key, case in cases.items() for name in case[0]]


@pytest.mark.parametrize("form", ["kernel", "reference", "fake"])
@pytest.mark.parametrize("name, sample, changes, message", of_each_op(BAD))
def test_bad_input_is_named(name, sample, changes, message, form):
    op = ferrum_ops.OPS[name]
    function = {"kernel": getattr(OPS, name), "reference": op.ref, "fake": op.fake}[form]
    with pytest.raises(RuntimeError, match=re.escape(f"[{name}] {message}")):
        function(*changed(name, samples(name, torch.float32)[sample], changes))


@pytest.mark.parametrize("name, changes, part, message", of_each_op(OF_PARTS))
def test_bad_input_of_a_part_is_named_by_the_part(name, changes, part, message):
    with pytest.raises(RuntimeError, match=re.escape(f"[{part}] {message}")):
        getattr(OPS, name)(*changed(name, samples(name, torch.float32)[0], changes))


@pytest.mark.parametrize("name", BY_PARTS)
def test_gradients_are_refused(name):
    args = samples(name, torch.float32)[0]
    with pytest.raises(RuntimeError, match=re.escape(f"[{name}] has no backward")):
        getattr(ferrum_ops, name)(args[0].clone().requires_grad_(), *args[1:])


@pytest.mark.parametrize("name, run", list(zip(EXPERTS, (moe_experts_gguf_ref, moe_experts_int4_ref))))
def test_references_are_right_in_float64(name, run):
    """The samples' kernels are held against them; here they are held against single experts."""
    args = samples(name, torch.float32)[1]  # activation "full"
    doubled = [a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args]
    out = ferrum_ops.OPS[name].ref(*doubled)
    total = (args[0] + args[1]).double()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + args[3])
    probabilities = (normed @ args[4].double().T).softmax(-1)
    weights, ids = probabilities.topk(args[5])
    expected = total.clone()
    for expert, weight in zip(ids[0].int(), weights[0] / weights.sum()):
        alone = run(normed, expert.view(1, 1), torch.ones(1, 1), *args[7:])
        expected += weight * alone
    torch.testing.assert_close(out, expected)
