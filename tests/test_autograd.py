"""The ops that have a backward: its formula against numerical derivatives in float64, then as users meet it."""

import pytest
import torch

import ferrum_ops
from ferrum_ops._library import differentiable
from ferrum_ops.ops import activation, gptq, int4, marlin, norm, rope
from ferrum_ops.testing.compare import assert_close, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tables(dim):
    return rope.rotary_tables(20, dim)


def int4_arguments(act_order, asymmetric, activation_name="full", in_features=72):
    packed, scales, zeros, perm = int4.random_matrix(in_features, 17, 8, act_order=act_order, asymmetric=asymmetric)
    return packed, scales, zeros, perm, randn(17), 17, 8, activation_name


AT = torch.tensor([3, 19, 0, 7])


def marlin_arguments(act_order, asymmetric):
    tensors = marlin.random_marlin(16, 64, 8, 4, "cpu", act_order=act_order, asymmetric=asymmetric)
    return *tensors, randn(9), marlin.marlin_workspace("cpu"), 9, 8, 4, "fp32", 0


#: name -> (public function, reference, backward, arguments in float64, indices of those with a gradient)
CASES = {
    "rms_norm": (
        ferrum_ops.rms_norm,
        norm.rms_norm_ref,
        norm.rms_norm_backward,
        (randn(3, 2, 9), randn(9), 1e-3),
        (0, 1),
    ),
    "rms_norm of a vector": (
        ferrum_ops.rms_norm,
        norm.rms_norm_ref,
        norm.rms_norm_backward,
        (randn(9), randn(9), 1e-3),
        (0, 1),
    ),
    "rms_norm of columns": (
        ferrum_ops.rms_norm,
        norm.rms_norm_ref,
        norm.rms_norm_backward,
        (randn(4, 20)[:, 3:12], randn(9), 1e-3),
        (0, 1),
    ),
    "fused_add_rms_norm": (
        ferrum_ops.fused_add_rms_norm,
        norm.fused_add_rms_norm_ref,
        norm.fused_add_rms_norm_backward,
        (randn(4, 9), randn(4, 9), randn(9), 1e-3),
        (0, 1, 2),
    ),
    "silu_mul": (
        ferrum_ops.silu_mul,
        activation.silu_mul_ref,
        activation.silu_mul_backward,
        (2 * randn(3, 2, 10),),
        (0,),
    ),
    "silu_mul.gate_up": (
        ferrum_ops.silu_mul,
        activation.silu_mul_gate_up_ref,
        activation.silu_mul_gate_up_backward,
        (2 * randn(3, 5), randn(3, 5)),
        (0, 1),
    ),
    "gelu_tanh_mul": (
        ferrum_ops.gelu_tanh_mul,
        activation.gelu_tanh_mul_ref,
        activation.gelu_tanh_mul_backward,
        (2 * randn(3, 2, 10),),
        (0,),
    ),
    **{
        f"qk_norm_rope {label}": (
            ferrum_ops.qk_norm_rope,
            rope.qk_norm_rope_ref,
            rope.qk_norm_rope_backward,
            (randn(4, 3, 10), weight, *tables(rotary_dim), positions, 1e-3, interleaved),
            (0,) if weight is None else (0, 1),
        )
        for label, weight, rotary_dim, positions, interleaved in (
            ("with norm", randn(10), 10, AT, False),
            ("without norm", None, 10, AT, False),
            ("partial", randn(10), 6, AT, False),
            ("interleaved", randn(10), 10, AT, True),
            ("interleaved partial without norm", None, 6, None, True),
        )
    },
    **{
        f"int4_linear {label}": (
            ferrum_ops.int4_linear,
            int4.int4_linear_ref,
            int4.int4_linear_backward,
            (randn(2, 2, 72), *int4_arguments(act_order, asymmetric)),
            (0, 5),
        )
        for label, act_order, asymmetric in (
            ("plain", False, False),
            ("asymmetric", False, True),
            ("act-order", True, True),
        )
    },
    **{
        f"marlin_gemm {label}": (
            ferrum_ops.marlin_gemm,
            marlin.marlin_gemm_ref,
            marlin.marlin_gemm_backward,
            (randn(1, in_features), *marlin_arguments(act_order, asymmetric)),
            (0, 5),
        )
        for label, in_features, act_order, asymmetric in (
            ("padded", 12, False, False),
            ("act-order", 16, True, True),
        )
    },
    "gptq_gemm": (
        ferrum_ops.gptq_gemm,
        gptq.gptq_gemm_ref,
        gptq.gptq_gemm_backward,
        (randn(2, 8), *gptq.random_projection(8, 9, 2, 4, "cpu"), torch.randperm(8).int() % 2, randn(9), 4, 1),
        (0, 5),
    ),
}


def prepared(args, indices, dtype=torch.float64):
    """A copy of the arguments whose floating-point ones of float64 are of `dtype`; those at `indices` want gradients."""

    def prepare(i, a):
        if not isinstance(a, torch.Tensor) or a.dtype != torch.float64:
            return a
        return a.detach().to(dtype).requires_grad_(i in indices)

    return [prepare(i, a) for i, a in enumerate(args)]


def gradients(function, args, indices, seed=1):
    torch.manual_seed(seed)
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o.double() * torch.randn(o.shape, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(total, [args[i] for i in indices])


@pytest.mark.parametrize("case", CASES)
def test_formula_equals_numerical_derivatives(case):
    _, ref, backward, args, indices = CASES[case]
    assert torch.autograd.gradcheck(differentiable(ref, backward), prepared(args, indices))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_kernels_are_those_of_the_reference(case, dtype):
    function, ref, _, args, indices = CASES[case]
    rounded = prepared(args, indices, dtype)
    widened = [r.detach().double() if r is not a else a for r, a in zip(rounded, args)]
    got = gradients(function, rounded, indices)
    expected = gradients(ref, prepared(widened, indices), indices)
    op = case.partition(" ")[0]
    for g, e in zip(got, expected):
        assert g.dtype == dtype
        assert_close(op, g, e, 4 * tolerance(op, dtype))


@pytest.mark.parametrize("case", CASES)
def test_results_are_the_same_bits_with_and_without_gradients(case):
    function, _, _, args, indices = CASES[case]
    args = prepared(args, indices, torch.float32)
    with_grad = function(*args)
    with torch.no_grad():
        without = function(*args)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (with_grad, without))):
        assert torch.equal(a, b) and a.requires_grad and not b.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "rms_norm",
        "fused_add_rms_norm",
        "silu_mul",
        "qk_norm_rope with norm",
        "int4_linear act-order",
        "gptq_gemm",
        "marlin_gemm act-order",
    ],
)
def test_gradients_compile_whole(case):
    function, _, _, args, indices = CASES[case]
    args = prepared(args, indices, torch.float32)
    expected = gradients(function, args, indices)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, e in zip(gradients(compiled, args, indices), expected):
        assert torch.equal(got, e)


def test_only_what_is_asked_for_is_computed():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    ferrum_ops.rms_norm(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None
    bias = torch.randn(17, requires_grad=True)
    packed, scales, zeros, perm, _, *rest = int4_arguments(False, True)
    ferrum_ops.int4_linear(torch.randn(5, 72), packed, scales, zeros, perm, bias, *rest).sum().backward()
    assert torch.equal(bias.grad, torch.full((17,), 5.0))


def test_int8_activations_have_the_straight_through_gradient():
    x = torch.randn(3, 72)
    grads = []
    for name in ("full", "int8"):
        leaf = x.clone().requires_grad_()
        arguments = (a.float() if i == 4 else a for i, a in enumerate(int4_arguments(True, True, name)))
        ferrum_ops.int4_linear(leaf, *arguments).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_padding_rows_give_no_channel_a_gradient():
    packed, scales, zeros, perm, *_ = int4_arguments(True, False)
    x = torch.randn(2, 72, requires_grad=True)

    def gradient(perm):
        out = ferrum_ops.int4_linear(x, packed, scales, zeros, perm, None, 17, 8, "full")
        return torch.autograd.grad(out.sum(), x)[0]

    expected = gradient(perm)
    expected[:, 5] = 0
    assert torch.equal(gradient(torch.where(perm == 5, -1, perm)), expected)


def test_empty_batches_have_empty_gradients():
    x, weight = torch.empty(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    ferrum_ops.rms_norm(x, weight).sum().backward()
    assert x.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(8))


def test_the_op_itself_warns_by_name_where_backward_reaches_it():
    x = torch.randn(3, 8, requires_grad=True)
    out = torch.ops.ferrum.rms_norm(x, torch.randn(8), 1e-6)
    with pytest.warns(UserWarning, match="ferrum::rms_norm: an autograd kernel was not registered"):
        out.sum().backward()
