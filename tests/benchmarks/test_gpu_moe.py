"""The GPU benchmark of the expert block, as far as it runs without one: its weights, its check, its arithmetic."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline

from benchmarks import gpu_moe
from benchmarks.gpu_moe import bytes_of, check, markdown, random_inputs, random_layer, row_of
from benchmarks.peers.interface import MoeShape
from ferrum_models.moe import run_experts
from ferrum_ops.testing import gpu
from ferrum_ops.testing.timing import timing_of

SMALL = MoeShape(hidden=256, width=64, experts=6, top_k=2)


@pytest.mark.parametrize("name", ["fused", "bucketed"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_right_block_passes_the_check_and_a_wrong_one_does_not(name, tokens, monkeypatch):
    torch.manual_seed(0)
    weights, inputs = random_layer(SMALL, "cpu"), random_inputs(SMALL, tokens, "cpu")
    check(name, weights, inputs)
    monkeypatch.setattr(gpu_moe, "run_experts", lambda *args: run_experts(*args).roll(1, -1))
    with pytest.raises(AssertionError):
        check(name, weights, inputs)


def test_what_competes_where_products_are_bound_by_computing(monkeypatch):
    """Each way is one call of the block per layer, and wgmma is asked for inside its own alone."""
    inside, ran = [], {}

    @contextmanager
    def wgmma():
        inside.append(True)
        yield
        inside.pop()

    def run(name, hidden, ids, topk_weights, weights):
        ran.setdefault((name, getattr(weights, "block_size", 0), getattr(weights, "grouped", True), bool(inside)), 0)
        return run_experts(name, hidden, ids, topk_weights, weights)

    def compare(candidates):
        ran.clear()  # what was checked
        return {name: timing_of([call() is not None and 1e-6 for call in calls]) for name, calls in candidates.items()}

    monkeypatch.setattr(gpu_moe, "LEAST_COMPUTE_BOUND", 9)
    monkeypatch.setattr(gpu_moe, "random_inputs", lambda block, tokens, device: random_inputs(block, tokens, "cpu"))
    monkeypatch.setattr(gpu_moe, "has_grouped_product", lambda device: True)
    monkeypatch.setattr(gpu_moe, "run_experts", run)
    for name, function in {"wgmma": wgmma, "has_wgmma": lambda: True, "compare": compare}.items():
        monkeypatch.setattr(gpu, name, function)
    layers = [random_layer(SMALL, "cpu") for _ in range(2)]
    row = gpu_moe.measure(SMALL, layers, [], 9, 1e12)
    assert {"bucketed", "dequantise", "wgmma"} <= row.keys() and not inside
    assert set(ran) == {
        ("fused", 0, True, False),
        ("bucketed", 0, True, False),
        ("fused", 0, False, False),
        ("fused", 64, True, True),
    }


def test_bytes_are_those_of_the_active_experts():
    # 19.5 MB for one token's eight experts: 2 359 296 bytes of codes and 73 728 of scales each.
    assert bytes_of(MoeShape(), 1, 8) == 8 * (2359296 + 73728) + 4 * 2048


def test_table():
    rows = [
        row_of(MoeShape(), 1, 8.0, {"fused": 13e-6, "bucketed": 39e-6, "grouped_mm": 26e-6}, 4.3e12),
        row_of(MoeShape(), 512, 128.0, {"fused": 200e-6, "wgmma": 160e-6}, 4.3e12),
    ]
    head = {"device": "GPU", "torch": "2", "cuda": "13", "commit": "abc", "copy_bandwidth": 4.3e12}
    assert_expected_inline(
        markdown(head, rows, ["a note"]),
        """\
GPU, torch 2, CUDA 13, commit abc: copy 4.30 TB/s. Goals are for an H200. bucketed and grouped_mm (bfloat16 weights): their time over that of fused; so with dequantise (fused by that product) and wgmma (fused by that kernel).

| tokens | active experts | MB | us | GB/s | of copy | floor us | goal us | met | bucketed | grouped_mm | dequantise | wgmma |
|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|
| 1 | 8 | 19.5 | 13.0 | 1498 | 0.35 | 4.5 | 14 | yes | 3.00 | 2.00 |  |  |
| 512 | 128 | 315.6 | 200.0 | 1578 | 0.37 | 73.4 | 150 | no |  |  |  | 0.80 |

a note
""",
    )


def test_crossover():
    def prompt(rows, blocks, dense):
        return {"tokens": rows * 16, "rows": rows, "blocks_us": blocks, "dense_us": dense}

    slow, fast = prompt(100, 50.0, 90.0), prompt(300, 160.0, 140.0)
    assert gpu_moe.crossover([fast, slow]) == pytest.approx(100 + 200 * 40 / 60)
    assert (
        gpu_moe.crossover([slow]) is gpu_moe.crossover([]) is gpu_moe.crossover([fast, prompt(400, 9.0, 10.0)]) is None
    )
    assert gpu_moe.crossover([fast]) == 300
    assert_expected_inline(
        gpu_moe.prompt_table([slow, fast]),
        """\
| tokens | rows per expert | blocks us | dequantised us | blocks / dequantised |
|--:|--:|--:|--:|--:|
| 1600 | 100 | 50 | 90 | 0.56 |
| 4800 | 300 | 160 | 140 | 1.14 |

Dequantising pays from 233 rows per expert; it is taken from 400.
""",
    )


def test_both_paths_of_a_prompt_pass_the_check():
    torch.manual_seed(0)
    weights, inputs = random_layer(SMALL, "cpu"), random_inputs(SMALL, 9, "cpu")
    for rows in (0, 1):
        check("fused", replace(weights, dequantize_min_rows=rows), inputs)
