import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum


def test_layer_norm_is_its_definition():
    x, weight, bias = torch.randn(5, 63), torch.randn(63), torch.randn(63)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert_close("layer_norm", ferrum_ops.layer_norm(x, weight), expected)
    assert_close("layer_norm", ferrum_ops.layer_norm(x, weight, bias), expected + bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_the_one_with_erf(dtype):
    x = torch.linspace(-6, 6, 999).to(dtype)
    wide = x.double()
    assert_close(
        "gelu",
        ferrum_ops.gelu(x),
        wide * (1 + torch.erf(wide / 2**0.5)) / 2,
        tolerance("gelu", dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_ops_write_their_rows_and_nothing_else(dtype):
    storage = torch.randn(6, 200).to(dtype)
    expected = storage.clone()
    bias, src = torch.randn(63).to(dtype), torch.randn(6, 63).to(dtype)
    assert ferrum_ops.add_bias_(storage[:, 20:83], bias) is None
    expected[:, 20:83] += bias
    assert torch.equal(storage, expected)
    assert ferrum_ops.scaled_add_(storage[:, 20:83], src, -2.5) is None
    expected[:, 20:83] = (expected[:, 20:83].double() - 2.5 * src.double()).to(dtype)
    assert_close("scaled_add_", storage, expected.double(), tolerance("scaled_add_", dtype))
    assert torch.equal(storage[:, :20], expected[:, :20]) and torch.equal(storage[:, 83:], expected[:, 83:])


def test_gather_columns_picks_columns():
    x = torch.randn(4, 5)
    perm = torch.tensor([4, 0, 0], dtype=torch.int32)
    assert torch.equal(ferrum_ops.gather_columns(x, perm), torch.stack((x[:, 4], x[:, 0], x[:, 0]), 1))


def test_embedding_lookup_picks_rows():
    table = torch.randn(7, 3)
    ids = torch.tensor([[6, 0], [2, 2]])
    assert torch.equal(ferrum_ops.embedding_lookup(table, ids), table[ids])


@pytest.mark.parametrize("index", [-1, 7])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_outside_are_named_and_not_read(index, dtype):
    table, indices = torch.randn(7, 7), torch.tensor([3, index, 2], dtype=dtype)
    message = rf"expected 0 <= index < 7, got \[{index}\]"
    with pytest.raises(RuntimeError, match=rf"\[embedding_lookup\] ids: {message}"):
        ferrum_ops.embedding_lookup(table, indices)
    with pytest.raises(RuntimeError, match=rf"\[gather_columns\] perm: {message}"):
        ferrum_ops.gather_columns(table, indices)


def test_transposes_are_views_and_inverses():
    x = torch.randn(2, 3, 7, 5)
    token_major = ferrum_ops.transpose_head_to_token(x)
    assert token_major.shape == (2, 7, 3, 5) and token_major.data_ptr() == x.data_ptr()
    assert torch.equal(token_major[1, 6, 2], x[1, 2, 6])
    assert torch.equal(ferrum_ops.transpose_token_to_head(token_major), x)


def test_split_qkv_gives_views_of_its_heads():
    qkv = torch.arange(2 * 8 * 3).view(2, 24)
    q, k, v = ferrum_ops.split_qkv(qkv, 4, 2, 3)
    assert [t.shape for t in (q, k, v)] == [(2, 4, 3), (2, 2, 3), (2, 2, 3)]
    assert torch.equal(torch.cat((q, k, v), 1).flatten(1), qkv)
    v[1, 1, 2] = -1
    assert qkv[1, 23] == -1


def test_composites_are_traced_through_and_differentiable():
    weight = torch.randn(24)

    def function(x):
        ferrum_ops.add_bias_(x, weight)
        q, _, v = ferrum_ops.split_qkv(ferrum_ops.gelu(ferrum_ops.layer_norm(x, weight)), 4, 2, 3)
        ferrum_ops.scaled_add_(v, q[:, :2], 0.5)
        return ferrum_ops.transpose_token_to_head(v) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 24)
    assert torch.equal(compiled(x.clone()), function(x.clone()))
    table = torch.randn(5, 24, requires_grad=True)
    ferrum_ops.embedding_lookup(table, torch.tensor([1, 1])).sum().backward()
    assert torch.equal(table.grad, torch.tensor([0.0, 2, 0, 0, 0])[:, None].expand(5, 24))


def test_backends_call_them_composite():
    assert ferrum_ops.backends()["gelu"] == dict.fromkeys(("cpu", "cuda", "mps"), "composite")


X, W = torch.ones(4, 6), torch.ones(6)
HEADS = torch.ones(4, 24)
BAD = {
    "layer_norm integers": ("layer_norm", (X.int(), W, None, 1e-5), r"x: expected float32, float16 or bfloat16, got"),
    "layer_norm scalar": ("layer_norm", (torch.ones(()), W, None, 1e-5), r"x: expected at least 1 dimension, got 0"),
    "layer_norm weight": ("layer_norm", (X, W[:5], None, 1e-5), r"weight: expected shape \(6,\), got \(5,\)"),
    "layer_norm bias": ("layer_norm", (X, W, W.half(), 1e-5), r"bias: expected torch.float32, got torch.float16"),
    "gelu integers": ("gelu", (X.int(),), r"x: expected float32, float16 or bfloat16, got"),
    "bias dtype": ("add_bias_", (X, W.double()), r"bias: expected torch.float32, got torch.float64"),
    "bias shape": ("add_bias_", (X, W[:1]), r"bias: expected shape \(6,\), got \(1,\)"),
    "scaled_add dtype": ("scaled_add_", (X, X.half(), 1.0), r"src: expected torch.float32, got torch.float16"),
    "scaled_add shape": ("scaled_add_", (X, X[:1], 1.0), r"src: expected shape \(4, 6\), got \(1, 6\)"),
    "perm dtype": ("gather_columns", (X, W), r"perm: expected int32 or int64, got torch.float32"),
    "perm shape": ("gather_columns", (X, X.int()), r"perm: expected shape \(columns,\), got \(4, 6\)"),
    "gather scalar": ("gather_columns", (torch.ones(()), W.int()), r"x: expected at least 1 dimension, got 0"),
    "table shape": ("embedding_lookup", (W, W.int()), r"table: expected shape \(vocabulary, hidden\), got \(6,\)"),
    "ids dtype": ("embedding_lookup", (X, W.short()), r"ids: expected int32 or int64, got torch.int16"),
    "head dims": ("transpose_head_to_token", (X,), r"x: expected shape \(..., heads, tokens, head_dim\), got \(4, 6\)"),
    "token dims": (
        "transpose_token_to_head",
        (X,),
        r"x: expected shape \(..., tokens, heads, head_dim\), got \(4, 6\)",
    ),
    "no heads": ("split_qkv", (HEADS, 0, 2, 3), r"num_heads: expected at least 1, got 0"),
    "qkv width": ("split_qkv", (HEADS, 4, 2, 4), r"qkv: expected shape \(\*, 32\), got \(4, 24\)"),
    "qkv dims": ("split_qkv", (HEADS[0], 4, 2, 3), r"qkv: expected shape \(\*, 24\), got \(24,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    op, args, message = BAD[case]
    with pytest.raises(RuntimeError, match=rf"\[{op}\] {message}"):
        getattr(OPS, op)(*args)
