import re

import pytest
import torch

import ferrum_ops
from ferrum_ops.ops import decoder
from ferrum_ops.ops.moe_routing import router_topk_softmax_ref
from ferrum_ops.ops.norm import fused_add_rms_norm_ref
from tests.ops.test_every_op import copy_args

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum


def samples(name, dtype):
    return list(ferrum_ops.OPS[name].inputs("cpu", dtype))


def attention_by_parts(hidden, norm_weight, eps, *qkv_and_rest):
    """`decoder_attention_int4_` as calls of its parts."""
    qkv, group_size, rest = qkv_and_rest[:5], qkv_and_rest[5], qkv_and_rest[6:]
    (
        q_weight,
        k_weight,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        cache_lens,
        scale,
        *o,
        o_group_size,
        heads,
        activation,
    ) = rest
    batch, kv_heads, _, head_dim = k_cache.shape
    width = (heads + 2 * kv_heads) * head_dim
    rows = OPS.int4_linear(OPS.rms_norm(hidden, norm_weight, eps), *qkv, width, group_size, activation)
    tables = (cos, sin, positions)
    split = OPS.split_qkv_norm_rope(rows, q_weight, k_weight, *tables, heads, kv_heads, head_dim, eps)
    tokens = hidden.shape[0] // batch
    q, k, v = (t.view(batch, tokens, t.shape[1], head_dim) for t in split)
    OPS.kv_append_(k_cache, v_cache, k, v, cache_lens)
    attended = OPS.attention(q, k_cache, v_cache, cache_lens + tokens, scale)
    attended = attended.view(hidden.shape[0], heads * head_dim)
    return OPS.int4_linear(attended, *o, hidden.shape[1], o_group_size, activation)


def experts_by_parts(attended, residual, norm_weight, eps, router_weight, top_k, renormalize, *experts):
    """`decoder_experts_int4` as calls of its parts."""
    normed, total = OPS.fused_add_rms_norm(attended, residual, norm_weight, eps)
    _, ids, weights = OPS.router_topk_softmax(normed, router_weight, top_k, renormalize)
    return total + OPS.moe_experts_int4(normed, ids, weights, *experts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_has_the_bits_of_its_parts(dtype, isa):
    for args in samples("decoder_attention_int4_", dtype):
        own, parts = copy_args(args), copy_args(args)
        assert torch.equal(OPS.decoder_attention_int4_(*own), attention_by_parts(*parts))
        for got, expected, before in zip(own[14:16], parts[14:16], args[14:16]):
            assert torch.equal(got, expected) and (args[0].numel() == 0 or not torch.equal(got, before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_have_the_bits_of_their_parts(dtype, isa):
    for args in samples("decoder_experts_int4", dtype):
        assert torch.equal(OPS.decoder_experts_int4(*args), experts_by_parts(*args))


def test_a_long_sum_is_rounded_as_torch_rounds_it(isa):
    """Rows enough for several threads, and an odd width."""
    args = list(samples("decoder_experts_int4", torch.bfloat16)[2])
    args[0], args[1] = (torch.randn(999, 72).bfloat16() for _ in range(2))
    assert torch.equal(OPS.decoder_experts_int4(*args), experts_by_parts(*args))


def test_no_sample_leaves_the_choice_of_experts_to_rounding():
    for args in samples("decoder_experts_int4", torch.float32):
        normed, _ = fused_add_rms_norm_ref(*args[:4])
        logits = router_topk_softmax_ref(normed, *args[4:7])[0].sort(-1, descending=True).values
        assert (logits[:, args[5] - 1] > 1.05 * logits[:, args[5]]).all()


@pytest.mark.parametrize("name", ["decoder_attention_int4_", "decoder_experts_int4"])
def test_a_compiler_sees_one_op_and_no_break(name):
    for args in samples(name, torch.float32)[:3]:
        function = torch.compile(getattr(OPS, name), backend="aot_eager", fullgraph=True)
        own, expected = copy_args(args), copy_args(args)
        assert torch.equal(function(*own), getattr(OPS, name)(*expected))
        assert all(torch.equal(a, b) for a, b in zip(own, expected) if isinstance(a, torch.Tensor))


ATTENTION, EXPERTS = samples("decoder_attention_int4_", torch.float32), samples("decoder_experts_int4", torch.float32)


def changed(args, **at):
    args = list(copy_args(args))
    for index, value in at.items():
        args[int(index[1:])] = value
    return args


BAD = {
    "hidden shape": (ATTENTION[0], {"_0": torch.ones(64)}, "decoder_attention_int4_", "hidden: expected shape (*, *)"),
    "no cache": (ATTENTION[0], {"_14": torch.ones(2, 3)}, "decoder_attention_int4_", "k_cache: expected shape (batch"),
    "no sequence": (
        ATTENTION[0],
        {"_14": torch.ones(0, 2, 9, 16)},
        "decoder_attention_int4_",
        "k_cache: expected shape",
    ),
    "uneven": (
        ATTENTION[2],
        {"_0": torch.ones(5, 72)},
        "decoder_attention_int4_",
        "hidden: expected as many tokens for",
    ),
    "no heads": (ATTENTION[0], {"_24": 0}, "decoder_attention_int4_", "num_heads: expected at least 1, got 0"),
    "attended shape": (EXPERTS[0], {"_0": torch.ones(128)}, "decoder_experts_int4", "attended: expected shape (*, *)"),
}
OF_PARTS = {
    "norm": (ATTENTION[0], {"_1": torch.ones(9)}, "rms_norm", "weight: expected shape"),
    "qkv": (ATTENTION[0], {"_3": torch.zeros(9, 8, 64)}, "int4_linear", "packed: expected Byte"),
    "lengths": (ATTENTION[0], {"_16": torch.tensor([9]).int()}, "kv_append_", "cache_lens: expected 0 <= length <= 8"),
    "o": (ATTENTION[0], {"_19": torch.ones(1, 1, 16).half()}, "int4_linear", "scales: expected shape"),
    "residual": (EXPERTS[0], {"_1": torch.ones(2, 128)}, "fused_add_rms_norm", "residual: expected shape"),
    "router": (EXPERTS[0], {"_4": torch.ones(4, 9)}, "router_topk_softmax", "weight: expected shape"),
    "w13": (EXPERTS[0], {"_7": torch.zeros(4, 9)}, "moe_experts_int4", "w13"),
}


def function_of(args, form):
    name = "decoder_experts_int4" if len(args) == len(EXPERTS[0]) else "decoder_attention_int4_"
    op = ferrum_ops.OPS[name]
    return {"kernel": getattr(OPS, name), "reference": op.ref, "fake": op.fake}[form]


@pytest.mark.parametrize("form", ["kernel", "reference", "fake"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    args, change, op, message = BAD[case]
    with pytest.raises(RuntimeError, match=re.escape(f"[{op}] {message}")):
        function_of(args, form)(*changed(args, **change))


@pytest.mark.parametrize("case", OF_PARTS)
def test_bad_input_of_a_part_is_named_by_the_part(case):
    args, change, op, message = OF_PARTS[case]
    with pytest.raises(RuntimeError, match=re.escape(f"[{op}] {message}")):
        function_of(args, "kernel")(*changed(args, **change))


def test_gradients_are_refused():
    for function, args in (
        (ferrum_ops.decoder_attention_int4_, ATTENTION[0]), (ferrum_ops.decoder_experts_int4, EXPERTS[0])
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="has no backward"):
            function(args[0].clone().requires_grad_(), *args[1:])


def test_references_are_right_in_float64():
    """The samples' kernels are held against them; here they are held against dense matrices."""
    args = samples("decoder_experts_int4", torch.float32)[1]  # activation "full"
    doubled = [a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args]
    out = decoder.decoder_experts_int4_ref(*doubled)
    total = (args[0] + args[1]).double()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + args[3])
    probabilities = (normed @ args[4].double().T).softmax(-1)
    weights, ids = probabilities.topk(args[5])
    expected = total.clone()
    for expert, weight in zip(ids[0].int(), weights[0] / weights.sum()):
        alone = decoder.moe_experts_int4_ref(normed, expert.view(1, 1), torch.ones(1, 1), *args[7:])
        expected += weight * alone
    torch.testing.assert_close(out, expected)
