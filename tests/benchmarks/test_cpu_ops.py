"""`benchmarks/cpu_ops`: every op is in some section, and the verdict names what is slower. No times are asserted."""

import pytest
import torch

import ferrum_ops
from benchmarks import cpu_ops
from benchmarks.ops import bench_attention
from ferrum_ops.testing import timing
from ferrum_ops.testing.compare import assert_close


def row(op, sizes, **more):
    return {"op": op, "sizes": sizes, **more}


def test_verdict_names_slower_kernels_and_those_not_compared():
    rows = [
        row("rms_norm", "T=1", compiled=2.0),
        row("rms_norm", "T=8", compiled=0.97),
        row("silu_mul", "T=8"),
        row("layer_norm", "T=8", compiled=0.5),  # a composite
    ]
    assert cpu_ops.verdict(rows) == [
        "Slower than inductor's code, of 2 lines of ops with a kernel: rms_norm T=8 (0.97)",
        "Not held against it: silu_mul T=8",
    ]
    assert cpu_ops.verdict(rows[:1]) == [
        "Slower than inductor's code, of 1 lines of ops with a kernel: none",
        "Not held against it: none",
    ]


@pytest.mark.parametrize(("others", "fraction"), [((), 0.25), (((torch.ones(4),),), 0.5)])
def test_calls_beyond_the_caches_are_held_against_reads_in_turns(monkeypatch, others, fraction):
    def compare(functions, *, repeats, calls):
        assert calls == ({"op": 2, "read": 1} if others else None)
        seconds = {"op": 1e-3, "read": timing.EVICTION_BYTES / 2e9}
        return {name: timing.timing_of([seconds[name]]) for name in functions}

    monkeypatch.setattr(timing, "compare", compare)
    case = timing.Case("gelu", "", (torch.ones(4),), num_bytes=1_000_000, others=others)
    row = timing._time_case(case, 4e9, False, 1)
    assert row["of_read_bandwidth"] == pytest.approx(fraction)


@pytest.mark.slow
def test_every_kernel_is_in_a_section():
    timed = {case.op.partition(".")[0] for cases in cpu_ops.sections((1,)).values() for case in cases}
    kernels = {name.partition(".")[0] for name, where in ferrum_ops.backends().items() if where["cpu"] == "kernel"}
    assert kernels <= timed


def test_a_family_is_run_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(timing, "_compiled", lambda case: (lambda: None, "reference"))
    cpu_ops.main(["--out", str(tmp_path / "ops.txt"), "--family", "norm", "--tokens", "1"])
    written = (tmp_path / "ops.txt").read_text()
    assert written == capsys.readouterr().out
    assert "\n== norm\n" in written and "\nrms_norm " in written and "== rope" not in written
    assert "Not held against it: none" in written


@pytest.mark.parametrize("sizes", [(2, 1, 48), (1, 3, 48), (1, 16, 16)])
def test_the_formula_of_attention_is_attention(sizes):
    for case in bench_attention.sized_cases(torch.float32, [sizes]):
        got = timing.torch_op(case.op)(*case.arguments)
        assert_close(case.op, case.formula().reshape(got.shape), got.double(), 1e-4)
