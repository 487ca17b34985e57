"""`benchmarks/cpu`: turns, rows held against limits, verdicts on goals, saved results. No times are asserted."""

import argparse
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cpu import experts, gguf, levels, limits, model, report, rounds, scaling
from benchmarks.cpu.limits import Limits
from benchmarks.cpu.rounds import Spread, take_turns
from benchmarks.peers.interface import MoeShape

SHAPE = MoeShape(hidden=128, width=128, experts=4, top_k=2, group_size=128)


def row(peer, us, **more):
    return {"tokens": 1, "peer": peer, "us": us, "us_lower": us, "us_upper": us, "foreign_cpu": None, **more}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(rounds, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "WARM_SECONDS", 0.0)


def test_contenders_get_the_same_calls_in_turns():
    seen = {"a": [], "b": []}
    turns = take_turns({name: lambda n, name=name: lambda: seen[name].append(n) for name in seen}, budget=0.0)
    assert turns.spreads.keys() == seen.keys()
    counted = {name: set(numbers) for name, numbers in seen.items()}
    assert {0, 1, 2} <= counted["a"] & counted["b"]


def test_spread_is_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_rows_are_held_against_the_best_limits_of_the_run():
    rows = [row("ferrum int8", 10.0, bytes=100.0, operations=50.0)]
    report.hold_against(rows, Limits(2, read=20e6, int8=1e6))
    assert rows[0]["of_read_bandwidth"] == pytest.approx(0.5)
    assert rows[0]["of_int8_peak"] == pytest.approx(5.0)
    assert rows[0]["floor_us"] == pytest.approx(50.0)
    report.hold_against(rows, Limits(2, read=10e6, int8=10e6))  # slower reads: a disturbance
    assert (rows[0]["read_gb_per_s"], rows[0]["int8_gop_per_s"]) == pytest.approx((0.02, 0.01))
    report.hold_against(rows, Limits(2, read=10e6, int8=0.0))
    assert rows[0]["of_int8_peak"] == pytest.approx(0.5)


def test_reads_are_timed_on_both_kinds_of_pages_and_the_faster_count(monkeypatch):
    with limits.compiled() as functions:
        if functions is None:
            pytest.skip("no C compiler")
        ordinary, huge = limits.read_rates(functions, 1, num_bytes=8 << 20)
    assert ordinary > 0
    assert (huge > 0) == limits.huge_pages_offered()
    functions = SimpleNamespace(int8_ops_per_second=lambda *_: 1.0)
    monkeypatch.setattr(limits, "compiled", lambda: nullcontext(functions))
    for rates in ((2e9, 3e9), (3e9, 0.0)):
        monkeypatch.setattr(limits, "read_rates", lambda *_, rates=rates: rates)
        assert limits.measure_limits(1).read == 3e9


def test_a_row_has_what_was_measured_after_its_own_turns():
    class Fake:
        def generate(self, ids, tokens):
            return [float(t) for t in range(tokens)]

    loaded = [model.Loaded(SimpleNamespace(name=name), Fake(), 0.0, 0.0) for name in ("ferrum", "llama.cpp")]
    rates = iter([9.0, 9.0, 1.0, 2.0, 5.0, 6.0, 3.0, 4.0])  # the first round is not counted
    rows = model.measure(loaded, "decode 1", 10, 3, lambda: next(rates))
    assert [row["beside"] for row in rows] == [3.0, 4.0]
    assert "beside" not in model.measure(loaded, "decode 1", 10, 3)[0]
    rows[0] |= {"floor_seconds": 8.0, "read_gb_per_s": 30.2}
    assert gguf.of_read_table(rows).splitlines()[-1].split("|")[1:3] == [" decode 1 ", " 0.25 (30) "]


def test_huge_pages_are_asked_for_where_the_system_gives_them(tmp_path):
    setting = tmp_path / "enabled"
    assert not limits.huge_pages_offered(setting)
    for text, offered in (("always [madvise] never", True), ("always madvise [never]", False)):
        setting.write_text(text)
        assert limits.huge_pages_offered(setting) == offered


def test_a_missed_goal_names_the_fastest_peer_and_the_floor():
    own = row("ferrum int8", 100.0, of_read_bandwidth=0.8, floor_us=60.0)
    peers = [row("onnxruntime", 140.0), row("llama.cpp Q4_K", 150.0), row("llama.cpp Q4_K repacked", 100.0)]
    assert experts.verdicts([own, *peers]) == [
        "M=1: 0.80 of the read bandwidth, goal 0.85",
        "M=1: 1.40x onnxruntime, goal 1.5x (93 us, floor 60 us)",
        "M=1: 1.00x llama.cpp Q4_K repacked, goal 2.0x (50 us, below the floor of 60 us)",
    ]
    own["us"] = own["floor_us"] = 50.0
    own["of_read_bandwidth"] = 1.0
    assert experts.verdicts([own, *peers]) == []


def test_measure_checks_times_and_describes():
    contenders = experts.prepare(["ferrum int8"], SHAPE, layers=2)
    with torch.inference_mode():
        (result,) = experts.measure(contenders, 3, SHAPE, budget=0.0)
    report.hold_against([result], Limits(1, 1e9, 1e9))
    assert 2 <= result["active_experts"] <= 4
    assert 0 < result["error"] < 3e-2
    assert result["us_lower"] <= result["us"] <= result["us_upper"]
    assert "| 3 |" in report.table([result], "tokens")


def test_zipf_routing_prefers_the_first_experts_and_repeats_none():
    torch.manual_seed(0)
    shape = MoeShape(experts=32, top_k=4)
    ids, weights = scaling.zipf_routing(2.0)(500, shape)
    assert all(row.unique().numel() == 4 for row in ids)
    assert torch.allclose(weights.sum(-1), torch.ones(500))
    assert (ids == 0).any(-1).float().mean() > 0.9
    assert (ids == 31).any(-1).float().mean() < 0.1
    ids, _ = scaling.zipf_routing(0.0)(2000, shape)
    assert ids.flatten().bincount(minlength=32).min() > 150  # 250 each


def test_saving_replaces_rows_of_the_same_sizes(tmp_path):
    report.save("experts", ("tokens", "peer"), [row("a", 1.0), row("b", 2.0)], tmp_path)
    path = report.save("experts", ("tokens", "peer"), [row("b", 3.0)], tmp_path)
    saved = json.loads(path.read_text())
    assert [(r["peer"], r["us"]) for r in saved["rows"]] == [("a", 1.0), ("b", 3.0)]
    assert saved["command"] == "python -m benchmarks.cpu experts"


def test_levels_below_the_goal_are_named():
    rows = [
        {"op": "rms_norm", "sizes": "T=1", "reference_us": 30.0, "generic_us": 5.0, "avx2_us": 10.0},
        {"op": "rms_norm", "sizes": "T=8", "reference_us": 30.0, "generic_us": 20.0, "avx2_us": 4.0},
    ]
    assert levels.verdict(rows, "generic") == "generic: 1 of 2 lines reach 3x. Others: rms_norm T=8 (1.50)"
    assert levels.verdict(rows, "avx2") == "avx2: 2 of 2 lines reach 3x. Others: none"
    assert "| rms_norm | T=8 | 30 | 1.50 | 7.5 |  |" in levels.table(rows)


def test_levels_are_timed_beside_the_reference_and_saved(tmp_path, capsys):
    arguments = argparse.Namespace(families=["moe_combine"], tokens=[1], save=True)
    levels.main(arguments, tmp_path)
    rows = report.load("levels", tmp_path)["rows"]
    assert {row["op"] for row in rows} >= {"weighted_sum", "weighted_sum_residual_"}
    assert all(row["reference_us"] > 0 and row["generic_us"] > 0 for row in rows)
    written = (tmp_path / "cpu_levels.md").read_text()
    assert levels.table(rows) in written and "- generic: " in written
    assert "weighted_sum" in capsys.readouterr().out
