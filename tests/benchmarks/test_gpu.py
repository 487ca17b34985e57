"""`make gpu-check` with the GPU's part replaced: what it would run, time and write."""

import json
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu as benchmark
from benchmarks import gpu_check
from ferrum_ops.testing import gpu

LIMITS = {"device": "a GPU", "torch": "2", "cuda": "13"}


class Graph:
    def __init__(self, calls):
        self.calls = calls

    def replay(self):
        for call in self.calls:
            call()


def test_wgmma_is_asked_for_inside_a_block(monkeypatch):
    told = []
    monkeypatch.setattr(gpu, "_c", SimpleNamespace(ferrum_marlin_wgmma=told.append))
    with pytest.raises(KeyError), gpu.wgmma():
        assert told == [1]
        raise KeyError
    assert told == [1, 0]
    monkeypatch.setattr(gpu, "_c", SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"\[wgmma\] library: expected one built with CUDA"), gpu.wgmma():
        pass


@pytest.fixture
def replaced(monkeypatch):
    """Everything on the CPU, where every graph takes 0.1 ms; gives the replays of each sample."""
    replays = []
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "describe", lambda: dict(LIMITS))
    monkeypatch.setattr(gpu, "copies_outside_cache", lambda num_bytes: 2)
    monkeypatch.setattr(gpu, "capture", lambda calls: (Graph(calls).replay(), Graph(calls))[1])
    monkeypatch.setattr(gpu, "_seconds", lambda graph, count: (graph.replay(), replays.append(count), 1e-4)[2])
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(gpu, "matrix_rate", lambda: 1e12)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(benchmark, "has_kernel", lambda op: op != "split_qkv")
    return replays


def run(monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), *arguments])
    benchmark.main()


def test_a_benchmark_times_every_case_beside_its_peers(replaced, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--family", "norm", "moe_routing", "--tokens", "1", "8", "--commit", "abc")
    found = json.loads((tmp_path / "ops.json").read_text())
    assert (found["commit"], found["device"], found["dtype"]) == ("abc", "a GPU", "bfloat16")
    rows = {(row["op"], row["sizes"]): row for row in found["rows"]}
    assert len(rows) == 2 * (3 + 6) and all(row["sets"] == 2 for row in rows.values())
    row = rows["rms_norm", "T=8 D=2048"]
    assert row["us"] == pytest.approx(100 / gpu.CALLS) and row["eager"] == row["inductor"] == row["copy"] == 1
    assert row["gb_per_s"] == pytest.approx(2 * 8 * 2048 * 2 * gpu.CALLS / 1e-4 / 1e9)
    assert row["of_copy_bandwidth"] == pytest.approx(row["gb_per_s"])
    table = (tmp_path / "ops.md").read_text()
    assert "| rms_norm | T=8 D=2048 | 8.33 |" in table and "moe_align_block_size" in table


def test_a_wrong_op_is_not_timed_and_fails_the_run(replaced, monkeypatch, tmp_path):
    def wrong(case):
        if case.op == "rms_norm":
            raise AssertionError("relative error")

    monkeypatch.setattr(benchmark, "check_case", wrong)
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, tmp_path, "--family", "norm", "--tokens", "1")
    found = json.loads((tmp_path / "ops.json").read_text())
    assert {row["op"] for row in found["rows"]} == {"fused_add_rms_norm", "fused_add_rms_norm_"}
    assert found["notes"] == ["rms_norm T=1 D=2048: wrong, not timed: relative error"]


def test_a_peer_that_cannot_be_captured_is_a_note(replaced, monkeypatch):
    (cases,) = [c for c in benchmark.case_sets("norm", torch.bfloat16, 1) if c[0].op == "rms_norm"]

    def capture(calls):
        if len(calls) == 1:
            raise RuntimeError("operation not permitted\nwhen capturing")
        return Graph(calls)

    monkeypatch.setattr(gpu, "capture", capture)
    row, notes = benchmark.measure(cases, 1e9, benchmark.Compiled())
    assert "eager" not in row and "inductor" not in row and len(notes) == 3
    assert notes[0] == "rms_norm T=1 D=2048: eager: operation not permitted"


def test_what_no_time_is_left_for_is_named(replaced, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--family", "norm", "--tokens", "1", "--seconds", "0")
    found = json.loads((tmp_path / "ops.json").read_text())
    assert found["rows"] == [] and len(found["notes"]) == 3 and "not reached in 0 s" in found["notes"][0]


@pytest.mark.parametrize("family", benchmark.FAMILIES)
def test_every_family_has_cases_of_any_number_of_tokens(family, replaced):
    for cases in benchmark.case_sets(family, torch.bfloat16, 3):
        assert len(cases) == 2


def row(of_copy, copy):
    return {"op": "op", "sizes": f"{of_copy}", "of_copy_bandwidth": of_copy, "copy_of_copy_bandwidth": copy}


def test_the_goal_counts_where_a_copy_reaches_it():
    rows = [row(0.9, 0.95), row(0.7, 0.9), row(0.1, 0.3), row(1.4, 0.86)]
    assert benchmark.verdict(rows) == (
        "2 of the 3 sizes that allow it reach 85% of the copy bandwidth; below: op 0.7 (0.70)."
    )
    assert benchmark.verdict(rows[2:3]) == "0 of the 0 sizes that allow it reach 85% of the copy bandwidth."


def test_graphs_rotate_through_the_operands(replaced):
    seen = []
    timings = gpu.compare({"a": [lambda i=i: seen.append(i) for i in range(3)]}, repeats=2)
    assert seen[: gpu.CALLS] == [0, 1, 2] * (gpu.CALLS // 3)
    assert timings["a"].median == pytest.approx(1e-4 / gpu.CALLS)
    assert replaced == [3, 5, 5]  # to find how many replays last SAMPLE_SECONDS, then the samples


# ---- the steps


def python(code):
    return [sys.executable, "-c", code]


def test_a_step_passes_fails_or_runs_out_of_time(tmp_path, monkeypatch):
    check = gpu_check.Check(tmp_path, 100)
    assert check.run("build", python("import os; print('flag', os.environ['FLAG'], '====')"), FLAG="7")
    assert not check.run("tests", python("print('two failed'); raise SystemExit(3)"))
    monkeypatch.setitem(gpu_check.LIMITS, "benchmarks", 6)
    monkeypatch.setattr(gpu_check.subprocess.Popen, "wait", timing_out(gpu_check.subprocess.Popen.wait))
    assert not check.run("benchmarks", python("import time; time.sleep(60)"))
    check.end = time.monotonic()
    assert not check.run("memcheck", python(""))
    assert [step.status for step in check.steps] == [
        "passed: flag 7",
        "FAILED (exit status 3): two failed",
        "FAILED (not done in 6 s): no output",
        "not run: out of time",
    ]
    assert "tests" in check.summary() and "two failed" in check.summary()


def timing_out(wait):
    def impatient(process, timeout=None):
        return wait(process, None if timeout is None else 0.2)

    return impatient


@pytest.mark.parametrize(
    "says, code, passed, status",
    [
        ("ERROR SUMMARY: 0 errors", 0, True, "passed"),
        ("Invalid __global__ read", 7, False, "FAILED (exit status 7)"),
        ("Error: Device not supported", 1, True, "not run: compute-sanitizer does not work on this machine"),
    ],
    ids=["clean", "finding", "unsupported"],
)
def test_the_sanitizer_counts_where_it_works(says, code, passed, status, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check, "tools_path", lambda: str(tmp_path))
    check = gpu_check.Check(tmp_path, 100)
    assert check.sanitize("memcheck") == passed
    assert check.steps[0].status.startswith(status)
    check.end = time.monotonic() + gpu_check.OVERHEAD
    assert check.sanitize("racecheck") and check.steps[1].status == "not run: out of time"


def test_the_whole_check_runs_its_steps_in_order(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu_check, "architecture", lambda: "90a")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/cuda/bin/{name}")
    monkeypatch.setattr(
        gpu_check.Check,
        "run",
        lambda self, name, command, **variables: (
            ran.append((name, " ".join(command), variables)) or name != "benchmarks"
        ),
    )
    assert not gpu_check.check_all(gpu_check.Check(tmp_path, 480), "abc")
    assert [name for name, *_ in ran] == ["build", "tests", "benchmarks", "moe", "model", "memcheck", "racecheck"]
    assert ran[0][2] == {"FERRUM_CUDA": "1", "FERRUM_CUDA_ARCHS": "90a"}
    assert "pytest -q" in ran[1][1] and ran[1][1].endswith("tests/cuda")
    assert f"benchmarks.gpu --out {tmp_path} --seconds 120 --commit abc" in ran[2][1]
    assert ran[5][1].startswith("/cuda/bin/compute-sanitizer --tool memcheck --error-exitcode 7")
    assert ran[5][1].endswith("-m tests.cuda.sanitize --seconds 30")


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a GPU"):
        gpu_check.main()
