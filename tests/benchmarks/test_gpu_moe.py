"""The GPU benchmark of the expert block, as far as it runs without one: its weights, its check, its arithmetic."""

import pytest
import torch
from expecttest import assert_expected_inline

from benchmarks import gpu_moe
from benchmarks.gpu_moe import bytes_of, check, markdown, random_inputs, random_layer, row_of
from benchmarks.peers.interface import MoeShape
from ferrum_models.moe import run_experts

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
