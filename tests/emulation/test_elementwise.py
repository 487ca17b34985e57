"""gather_columns: every size of element, rows and columns of many blocks, and a composite op all the same."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import ferrum_ops
from ferrum_ops._library import keep_composite

REF = ferrum_ops.OPS["gather_columns"].ref


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128], ids=str
)
@pytest.mark.parametrize("rows, columns, chosen", [(3, 70, 41), (3, 64, 64), (1100, 16, 6), (2, 5, 0), (0, 5, 3)])
def test_any_element(kernel, rows, columns, chosen, dtype):
    x = torch.randint(0, 100, (rows, columns)).to(dtype)
    perm = torch.randint(0, columns, (chosen,))
    assert torch.equal(kernel("gather_columns", x, perm)[0], REF(x, perm))
    assert torch.equal(kernel("gather_columns", x, perm.int())[0], REF(x, perm))


@pytest.mark.parametrize("rows, columns", [(1, 2048), (133, 1030), (1053, 8), (2109, 7), (1, 50001)])
def test_rows_together_columns_apart_and_rows_too_long_to_stage(kernel, rows, columns):
    """Blocks of 1, 2 and 4 rows, of which the last has fewer; a row cut in chunks, or read in steps; 100 KB rows."""
    x = torch.arange(rows * columns).view(rows, columns).to(torch.int16)
    perm = torch.randperm(columns)
    assert torch.equal(kernel("gather_columns", x, perm)[0], x[:, perm])


@pytest.mark.parametrize("first", [0, 1, 8])
def test_any_strides(kernel, first):
    wide = torch.randn(6, 5, 80).half()
    perm = torch.randperm(64)
    for x in (wide[..., first : first + 64], wide[::2, ::2, first : first + 64], wide[0, 0, first : first + 64]):
        assert torch.equal(kernel("gather_columns", x, perm)[0], x[..., perm])
    x = wide[:, :, first : first + 64].transpose(0, 2)
    order = torch.tensor([5, 9, 0, 9, 4, 9, 3])[::2]
    assert torch.equal(kernel("gather_columns", x, order)[0], x[..., order])


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_outside_is_not_read(emulated, index):
    with pytest.raises(RuntimeError, match="__trap"):
        emulated.op("gather_columns")(torch.randn(3, 7), torch.tensor([3, index, 2]))


def test_bad_input_is_named(emulated):
    x, perm = torch.randn(3, 7), torch.arange(7)
    for args, message in (
        ((torch.ones(()), perm), r"x: expected at least 1 dimension, got 0"),
        ((x, perm.float()), r"perm: expected int32 or int64, got Float"),
        ((x, perm[None]), r"perm: expected shape \(columns,\), got \(1, 7\)"),
    ):
        with pytest.raises(RuntimeError, match=rf"\[gather_columns\] {message}"):
            emulated.op("gather_columns")(*args)


@pytest.fixture(scope="module")
def composite(emulated):
    """The emulated op with what `register` gives the CUDA one."""
    with torch.library._scoped_library(emulated.namespace, "IMPL") as library:
        library.impl("gather_columns", REF, "CompositeImplicitAutograd")
        keep_composite(library, "gather_columns", REF, "CPU")
        yield emulated.op("gather_columns")


def test_a_plain_call_runs_the_kernel(composite, emulated):
    x, perm = torch.randn(4, 9), torch.randperm(9)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        launches = emulated.launches()
        with mode():
            assert torch.equal(composite(x, perm), x[:, perm])
        assert emulated.launches() == launches + 1, mode


def test_the_gradient_is_the_references(composite, emulated):
    x, perm = torch.randn(4, 9, requires_grad=True), torch.tensor([8, 0, 0])
    launches = emulated.launches()
    composite(x, perm).sum().backward()
    assert emulated.launches() == launches
    assert torch.equal(x.grad, torch.tensor([2.0, 0, 0, 0, 0, 0, 0, 0, 1]).expand(4, 9))
    with torch.no_grad():
        composite(x, perm)
    assert emulated.launches() == launches + 1


class Gather(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x, perm):
        return self.op(x, perm) * 2


def test_tracing_sees_the_line_of_aten(composite, emulated):
    x, perm = torch.randn(4, 9), torch.randperm(9)
    launches = emulated.launches()
    module = Gather(composite)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(module, tracing_mode=mode)(x, perm).graph
        called = [node.target for node in graph.nodes if node.op == "call_function"]
        assert torch.ops.aten.index_select.default in called and composite not in called
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, perm), 2 * x[:, perm])
    assert emulated.launches() == launches


def test_an_exported_program_may_keep_the_op(composite):
    x, perm = torch.randn(4, 9), torch.randperm(9)
    program = torch.export.export(Gather(composite), (x, perm))
    for exported in (program, program.run_decompositions()):
        assert torch.equal(exported.module()(x, perm), 2 * x[:, perm])
