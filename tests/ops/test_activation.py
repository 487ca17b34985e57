import pytest
import torch
import torch.nn.functional as F

import ferrum_ops
from ferrum_ops.ops import activation
from ferrum_ops.testing.compare import assert_close, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.ferrum


def test_reference_equals_the_definition_in_float64():
    gate, up = torch.randn(2, 5, 100, dtype=torch.float64).unbind()
    expected = gate / (1 + torch.exp(-gate)) * up
    assert_close("silu_mul", activation.silu_mul_ref(torch.cat((gate, up), -1)), expected, 1e-14)
    assert_close("silu_mul", activation.silu_mul_gate_up_ref(gate, up), expected, 1e-14)


def test_gate_is_the_first_half(isa):
    gate_up = torch.cat((torch.full((1, 63), 50.0), torch.full((1, 63), 2.0)), -1)
    assert torch.equal(OPS.silu_mul(gate_up), torch.full((1, 63), 100.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_gives_the_same_bits(dtype, isa):
    gate, up = torch.randn(2, 9, 127).to(dtype).unbind()
    gate_up, out = torch.cat((gate, up), -1), torch.zeros(9, 127, dtype=dtype)
    OPS.silu_mul_out(gate_up, 0, out, 0, 9)
    assert torch.equal(OPS.silu_mul(gate_up), OPS.silu_mul.gate_up(gate, up))
    assert torch.equal(OPS.silu_mul(gate_up), out)
    assert torch.equal(ferrum_ops.silu_mul(gate_up), ferrum_ops.silu_mul(gate, up))


def test_error_is_below_three_units_in_the_last_place(isa):
    gate = torch.linspace(-87, 100, 200_001)
    got = OPS.silu_mul.gate_up(gate, torch.ones_like(gate)).double()
    error = (got - F.silu(gate.double())).abs() / F.silu(gate.double()).abs().clamp_min(1e-37)
    assert error.max() < 2 * 2**-23


def test_saturated_gates(isa):
    gate = torch.tensor([-1e30, -1000.0, -104.5, -90.0, 90.0, 1000.0, 1e30])
    got = OPS.silu_mul.gate_up(gate, torch.ones(7))
    assert torch.equal(got[4:], gate[4:])
    assert (got[:4].abs() < 1e-36).all()
    ends = OPS.silu_mul.gate_up(torch.tensor([torch.inf, -torch.inf]), torch.ones(2))
    assert ends[0] == torch.inf and ends[1].isnan()  # as torch: -inf * 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_its_element_and_no_other(dtype, isa):
    gate_up = torch.randn(2, 254).to(dtype)
    gate_up[0, 5] = gate_up[0, 127 + 9] = gate_up[1, 126] = torch.nan
    expected = torch.zeros(2, 127, dtype=torch.bool)
    expected[0, 5] = expected[0, 9] = expected[1, 126] = True
    assert torch.equal(OPS.silu_mul(gate_up).isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_writes_its_rows_and_nothing_else(dtype, isa):
    gate_up, storage = torch.randn(8, 126).to(dtype), torch.randn(10, 200).to(dtype)
    before = storage.clone()
    OPS.silu_mul_out(gate_up, 2, storage[:, 30:93], 4, 5)
    before[4:9, 30:93] = OPS.silu_mul(gate_up[2:7])
    assert torch.equal(storage, before)


def test_no_rows(isa):
    assert OPS.silu_mul(torch.empty(0, 8)).shape == (0, 4)
    assert OPS.silu_mul.gate_up(torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 4)
    out = torch.ones(2, 4)
    OPS.silu_mul_out(torch.empty(0, 8), 0, out, 2, 0)
    assert torch.equal(out, torch.ones(2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_depends_on_neither_threads_nor_neighbours(dtype, isa):
    gate_up = torch.randn(400, 512).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(OPS.silu_mul(gate_up))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(OPS.silu_mul(gate_up[300:301]), results[0][300:301])
    expected = activation.silu_mul_ref(gate_up.double())
    assert_close("silu_mul", results[0], expected, tolerance("silu_mul", dtype))


def test_gelu_tanh_mul_is_its_definition(isa):
    gate, up = torch.randn(2, 9, 127, dtype=torch.float64).unbind()
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    expected = gate * (1 + torch.tanh(inner)) / 2 * up
    gate_up = torch.cat((gate, up), -1)
    assert_close("gelu_tanh_mul", activation.gelu_tanh_mul_ref(gate_up), expected, 1e-14)
    for dtype in DTYPES:
        rounded = gate_up.to(dtype)
        expected = activation.gelu_tanh_mul_ref(rounded.double())
        assert_close("gelu_tanh_mul", ferrum_ops.gelu_tanh_mul(rounded), expected, tolerance("gelu_tanh_mul", dtype))


def test_gelu_tanh_mul_at_its_ends(isa):
    gate = torch.tensor([[-1e30, -1000.0, -20.0, -0.0, 0.0, 20.0, 1000.0, 1e30, torch.inf, torch.nan]])
    got = OPS.gelu_tanh_mul(torch.cat((gate, torch.ones_like(gate)), -1))
    assert (got[0, :5] == 0).all() and torch.equal(got[0, 5:9], gate[0, 5:9]) and got[0, 9].isnan()


def test_gelu_tanh_mul_of_no_rows_and_of_strided_rows(isa):
    assert OPS.gelu_tanh_mul(torch.empty(0, 8)).shape == (0, 4)
    wide = torch.randn(5, 300)
    assert torch.equal(OPS.gelu_tanh_mul(wide[:, 7:261]), OPS.gelu_tanh_mul(wide[:, 7:261].contiguous()))


X = torch.ones(4, 64)
ROWS = torch.ones(6, 32)
BAD = {
    "integers": ("silu_mul", (X.int(),), r"gate_up: expected float32, float16 or bfloat16, got"),
    "odd width": ("silu_mul", (X[:, :63],), r"gate_up: expected an even last dimension, got 63"),
    "transposed": ("silu_mul", (torch.ones(64, 4).t(),), r"gate_up: expected contiguous rows with one row stride"),
    "gelu integers": ("gelu_tanh_mul", (X.int(),), r"gate_up: expected float32, float16 or bfloat16, got"),
    "gelu odd width": ("gelu_tanh_mul", (X[:, :63],), r"gate_up: expected an even last dimension, got 63"),
    "gelu transposed": ("gelu_tanh_mul", (torch.ones(64, 4).t(),), r"gate_up: expected contiguous rows with one row"),
    "up shape": ("silu_mul.gate_up", (X, X[:, :63]), r"up: expected shape \(4, 64\), got \(4, 63\)"),
    "up dtype": ("silu_mul.gate_up", (X, X.half()), r"up: expected .*[fF]loat.*, got"),
    "out shape": ("silu_mul_out", (X, 0, X, 0, 1), r"out: expected shape \(\*, 32\), got \(4, 64\)"),
    "out dtype": ("silu_mul_out", (X, 0, ROWS.half(), 0, 1), r"out: expected .*[fF]loat.*, got"),
    "out rows overlap": ("silu_mul_out", (X, 0, ROWS[:1].expand(6, 32), 0, 1), r"out: expected rows that do not"),
    "rows negative": ("silu_mul_out", (X, 0, ROWS, 0, -1), r"rows: expected at least 0, got -1"),
    "in_row negative": ("silu_mul_out", (X, -1, ROWS, 0, 2), r"in_row: expected 0 <= in_row and .*, got -1"),
    "in_row past the end": ("silu_mul_out", (X, 2, ROWS, 0, 3), r"in_row: expected .*in_row \+ 3 <= 4, got 2"),
    "out_row past the end": ("silu_mul_out", (X, 0, ROWS, 4, 3), r"out_row: expected .*out_row \+ 3 <= 6, got 4"),
}


@pytest.mark.parametrize("form", ["kernel", "reference", "fake"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, form):
    op, args, message = BAD[case]
    packet, _, overload = op.partition(".")
    kernel = getattr(getattr(OPS, packet), overload or "default")
    function = {"kernel": kernel, "reference": ferrum_ops.OPS[op].ref, "fake": ferrum_ops.OPS[op].fake}
    with pytest.raises(RuntimeError, match=rf"\[{packet}\] {message}"):
        function[form](*args)


def test_gradients_are_refused_in_place():
    with pytest.raises(RuntimeError, match=r"\[silu_mul_out\] has no backward"):
        ferrum_ops.silu_mul_out(torch.ones(4, 64, requires_grad=True), 0, ROWS.clone(), 0, 1)


def test_references_trace_whole():
    compiled = torch.compile(activation.silu_mul_ref, backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), activation.silu_mul_ref(x))
