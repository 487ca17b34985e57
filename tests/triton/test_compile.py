"""The compile gate for one capability and dtype. `python -m tests.triton.compile_gate`, in .ci/run, is for all."""

import pytest

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from ferrum_ops.triton.launch import Binary  # noqa: E402
from tests.triton import compile_gate  # noqa: E402
from tests.triton.compile_gate import Resources  # noqa: E402


def of_one_dtype():
    return [pytest.param(m, i, id=name) for m, i, name in compile_gate.all_binaries(90) if "bf16" in name]


@pytest.mark.slow
@pytest.mark.parametrize("module, index", of_one_dtype())
def test_bfloat16_binaries_fit_sm_90(module, index):
    assert compile_gate.examine(module, index, 90).problems(90) == []


@triton.jit
def outer_product(x_ptr, out_ptr, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """Too much of everything, by choice of SIZE and STAGES."""
    place = tl.arange(0, SIZE)
    sums = tl.zeros((SIZE, SIZE), tl.float32)
    for k in tl.range(0, 1024, num_stages=STAGES):
        x = tl.load(x_ptr + k * SIZE * SIZE + place[:, None] * SIZE + place[None, :])
        sums = tl.dot(x, x, sums)
    tl.store(out_ptr + place[:, None] * SIZE + place[None, :], sums)


def examined(size, stages):
    binary = Binary.of(outer_product, 4, 1, SIZE=size, STAGES=stages)
    return compile_gate.resources(compile_gate.compiled(binary, {"x_ptr": "*fp16", "out_ptr": "*fp32"}, 80))


def test_the_gate_reads_resources():
    fitting = examined(32, 2)
    assert fitting.problems(80) == [] and fitting.registers > 20 and fitting.shared > 0


@pytest.mark.slow
def test_the_gate_sees_spills_and_shared_memory():
    problems = examined(256, 2).problems(80)
    assert any(problem.startswith("spills: expected none, got") for problem in problems)
    assert any("shared memory: expected at most 166912 bytes" in problem for problem in examined(128, 8).problems(80))
    assert Resources(128, 8, 0, 0).problems(90) == [], "the compiler's choice"
    assert Resources(128, 16, 0, 0).problems(90) and Resources(255, 8, 0, 0).problems(90)
    assert Resources(256, 0, 0, 0).problems(90) == ["registers: expected 1 to 255, got 256"]
