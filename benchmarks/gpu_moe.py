"""The routed expert block of Qwen3-30B-A3B on this machine's GPU, weights cold.

`python -m benchmarks.gpu_moe [--out FOLDER] [--tokens 1 8 ...] [--seconds 60]`

Hidden 2048, width 768, 128 experts, top 8; int4 in groups of 128 in the Marlin layout, bfloat16 activations, random
weights and routing. Calls rotate through four layers, 1.2 GB, far more than any L2 cache. Beside `fused` (the whole
block: align, two products, the sum over a token's slots): `bucketed`, and PyTorch's grouped product of the same weights
in bfloat16. From 512 tokens on also what else `fused` could do there: dequantise the experts for that grouped product
(`dequantise`), and take the wgmma kernel in blocks of 64 rows (`wgmma`, on Hopper), which nothing picks by itself. Then
prompts, by blocks and by dequantising, for the number of rows from which the latter pays (`DEQUANTIZE_MIN_ROWS`). A
block that differs from float64 is not timed. Writes FOLDER/moe.json and FOLDER/moe.md.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ferrum_ops
from benchmarks.gpu import commit
from benchmarks.peers.interface import MoeShape
from ferrum_models.moe import DenseExpertWeights, MarlinExpertWeights, run_experts
from ferrum_models.moe.dequantized import has_grouped_product
from ferrum_models.moe.plan import DEQUANTIZE_MIN_ROWS
from ferrum_ops.config import RuntimeConfig
from ferrum_ops.formats.marlin import TILE_ROWS
from ferrum_ops.testing import gpu
from ferrum_ops.testing.compare import assert_close, tolerance

TOKENS = (1, 8, 32, 128, 512, 2048, 4096)
#: Microseconds of the whole block at which it is as fast as it should be on an H200.
GOALS = {1: 14, 8: 45, 32: 85, 128: 100, 512: 150}
LAYERS = 4
#: Of prompts: 128 to 1024 rows of every expert.
PROMPTS = (2048, 4096, 6400, 8192, 16384)
#: Rows above which launches for single buckets are too many to be of interest.
MOST_BUCKETED = 32
#: Rows from which products may be bound by computing, and the block size of wgmma's tiles.
LEAST_COMPUTE_BOUND, WGMMA_BLOCK = 512, 64
#: Columns of the table after the block's own: other ways, by their time over its.
OTHERS = ("bucketed", "grouped_mm", "dequantise", "wgmma")


def random_layer(block: MoeShape, device: str) -> MarlinExpertWeights:
    """Every bit pattern is a weight, so that nothing has to be packed."""

    def matrix(in_features: int, out_features: int, *lead: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*lead, block.experts, in_features // TILE_ROWS, out_features * 2)
        words = torch.randint(-(2**31), 2**31, shape, device=device, dtype=torch.int32)
        groups = -(-in_features // block.group_size)
        scales = torch.rand(*lead, block.experts, groups, out_features, device=device) + 0.5
        return words, (scales / (4 * in_features**0.5)).half()

    settings = MarlinExpertWeights.settings(RuntimeConfig()) | {
        "w13_bits": 4,
        "w2_bits": 4,
        "hidden_size": block.hidden,
        "intermediate_size": block.width,
        "top_k": block.top_k,
        "w13_group_size": block.group_size if block.hidden > block.group_size else -1,
        "w2_group_size": block.group_size if block.width > block.group_size else -1,
    }
    constants = MarlinExpertWeights.make_constants(settings, torch.device(device))
    w13, w13_scales = matrix(block.hidden, 2 * block.width, 1)
    w2, w2_scales = matrix(block.width, block.hidden)
    return MarlinExpertWeights(
        w13=w13, w13_scales=w13_scales, w13_zeros=None, w13_perm=None,
        w2=w2, w2_scales=w2_scales, w2_zeros=None, w2_perm=None, **constants, **settings,
    )  # fmt: skip


def random_inputs(block: MoeShape, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(tokens, block.hidden, device=device).bfloat16()
    logits = torch.randn(tokens, block.experts, device=device)
    return hidden, *ferrum_ops.route_topk_softmax(logits, block.top_k)


def check(
    name: str, weights: MarlinExpertWeights, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], most: int = 16
) -> None:
    """Raise AssertionError unless `name` agrees with float64, on the first `most` tokens."""
    got = run_experts(name, *inputs, weights)[:most]
    hidden, ids, topk_weights = (t[:most] for t in inputs)
    expected = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for e in ids[(ids >= 0) & (ids < weights.num_experts)].unique().tolist():
        one = {name: getattr(weights, name)[..., e : e + 1, :, :] for name in ("w13", "w13_scales", "w2", "w2_scales")}
        gate_up, down = MarlinExpertWeights.rebuild(
            [one.get(name, tensor) for name, tensor in zip(weights.tensor_fields, weights.tensors())], weights.spec()
        ).dense(torch.float32)  # exact: differences of codes times scales of 11 bits
        tokens, slots = torch.where(ids == e)
        gate, up = (hidden[tokens].double() @ gate_up[0].double().T).chunk(2, -1)
        rows = (torch.nn.functional.silu(gate) * up) @ down[0].double().T
        expected[tokens] += topk_weights[tokens, slots, None].double() * rows
    # The activation is rounded between the products, and so is each slot before the sum.
    assert_close("marlin_moe_gemm", got, expected, 3 * tolerance("marlin_moe_gemm", torch.bfloat16))


def bytes_of(block: MoeShape, tokens: int, active: int) -> int:
    """Read and written at least once: the weights and scales of the active experts, hidden and the result."""
    weights = 3 * block.hidden * block.width
    scales = 2 * (
        2 * block.width * -(-block.hidden // block.group_size) + block.hidden * -(-block.width // block.group_size)
    )
    return active * (weights // 2 + scales) + 2 * 2 * tokens * block.hidden


def measure(
    block: MoeShape, layers: list[MarlinExpertWeights], dense: list[DenseExpertWeights], tokens: int, bandwidth: float
) -> dict[str, Any]:
    sets = [random_inputs(block, tokens, "cuda") for _ in layers]
    names = ["fused"] + (["bucketed"] if tokens <= MOST_BUCKETED else [])
    for name in names:
        check(name, layers[0], sets[0])

    def calls(name: str, weights: Any) -> list[Any]:
        return [lambda w=w, s=s: run_experts(name, *s, w) for w, s in zip(weights, sets)]

    candidates = {name: calls(name, layers) for name in names}
    if dense:
        candidates["grouped_mm"] = calls("fused", dense)
    if tokens >= LEAST_COMPUTE_BOUND and has_grouped_product(torch.device(gpu.DEVICE)):
        candidates["dequantise"] = calls("fused", [replace(layer, grouped=False) for layer in layers])
    if tokens >= LEAST_COMPUTE_BOUND and gpu.has_wgmma():
        wide = [replace(layer, block_size=WGMMA_BLOCK) for layer in layers]
        with gpu.wgmma():
            check("fused", wide[0], sets[0])
        candidates["wgmma"] = [gpu.wgmma()(call) for call in calls("fused", wide)]
    with torch.no_grad():
        timings = gpu.compare(candidates)
    active = sum(ids.unique().numel() for _, ids, _ in sets) / len(sets)
    return row_of(block, tokens, active, {name: t.median for name, t in timings.items()}, bandwidth)


def measure_prompt(block: MoeShape, layers: list[MarlinExpertWeights], tokens: int) -> dict[str, Any]:
    """Both paths of `fused` at one number of rows per expert."""
    sets = [random_inputs(block, tokens, "cuda") for _ in layers]
    paths = {
        "blocks": [replace(layer, dequantize_min_rows=0) for layer in layers],
        "dense": [replace(layer, dequantize_min_rows=1) for layer in layers],
    }
    for weights in paths.values():
        check("fused", weights[0], sets[0])
    calls = {
        name: [lambda w=w, s=s: run_experts("fused", *s, w) for w, s in zip(weights, sets)]
        for name, weights in paths.items()
    }
    with torch.no_grad():
        timings = gpu.compare(calls)
    seconds = {f"{name}_us": timing.median * 1e6 for name, timing in timings.items()}
    return {"tokens": tokens, "rows": tokens * block.top_k / block.experts, **seconds}


def crossover(prompts: list[dict[str, Any]]) -> float | None:
    """Rows per expert from which on dequantising pays, on a line between the sizes measured; None: at none of them."""
    gains = [(row["rows"], row["blocks_us"] - row["dense_us"]) for row in sorted(prompts, key=lambda row: row["rows"])]
    lost = [i for i, (_, gain) in enumerate(gains) if gain < 0]
    if not gains or lost[-1:] == [len(gains) - 1]:
        return None
    if not lost:
        return gains[0][0]
    (rows, loss), (next_rows, gain) = gains[lost[-1]], gains[lost[-1] + 1]
    return rows + (next_rows - rows) * loss / (loss - gain)


def prompt_table(prompts: list[dict[str, Any]]) -> str:
    lines = [
        "| tokens | rows per expert | blocks us | dequantised us | blocks / dequantised |",
        "|--:|--:|--:|--:|--:|",
    ]
    for row in prompts:
        ratio = row["blocks_us"] / row["dense_us"]
        lines.append(
            f"| {row['tokens']} | {row['rows']:.0f} | {row['blocks_us']:.0f} | {row['dense_us']:.0f} | {ratio:.2f} |"
        )
    from_rows = crossover(prompts)
    pays = "at no size measured" if from_rows is None else f"from {from_rows:.0f} rows per expert"
    return "\n".join([*lines, "", f"Dequantising pays {pays}; it is taken from {DEQUANTIZE_MIN_ROWS}.", ""])


def row_of(block: MoeShape, tokens: int, active: float, seconds: dict[str, float], bandwidth: float) -> dict[str, Any]:
    num_bytes, own = bytes_of(block, tokens, round(active)), seconds["fused"]
    return {
        "tokens": tokens,
        "active": active,
        "mb": num_bytes / 1e6,
        "us": own * 1e6,
        "gb_per_s": num_bytes / own / 1e9,
        "of_copy_bandwidth": num_bytes / own / bandwidth,
        "floor_us": num_bytes / bandwidth * 1e6,
        "goal_us": GOALS.get(tokens),
        **{name: value / own for name, value in seconds.items() if name != "fused"},
    }


def markdown(head: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> str:
    lines = [
        f"{head['device']}, torch {head['torch']}, CUDA {head['cuda']}, commit {head['commit']}: copy "
        f"{head['copy_bandwidth'] / 1e12:.2f} TB/s. Goals are for an H200. bucketed and grouped_mm (bfloat16 weights): "
        "their time over that of fused; so with dequantise (fused by that product) and wgmma (fused by that kernel).",
        "",
        f"| tokens | active experts | MB | us | GB/s | of copy | floor us | goal us | met | {' | '.join(OTHERS)} |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|---|" + "--:|" * len(OTHERS),
    ]
    for row in rows:
        goal = row["goal_us"]
        peers = (f"{row[name]:.2f}" if name in row else "" for name in OTHERS)
        met = "" if goal is None else "yes" if row["us"] <= goal else "no"
        lines.append(
            f"| {row['tokens']} | {row['active']:.0f} | {row['mb']:.1f} | {row['us']:.1f} | {row['gb_per_s']:.0f} | "
            f"{row['of_copy_bandwidth']:.2f} | {row['floor_us']:.1f} | {goal or ''} | {met} | {' | '.join(peers)} |"
        )
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=60, help="start no further size after this time")
    args = parser.parse_args()
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    block = MoeShape()
    head = gpu.describe() | {"commit": commit(), "copy_bandwidth": gpu.copy_bandwidth()}
    layers = [random_layer(block, "cuda") for _ in range(LAYERS)]
    dense = [DenseExpertWeights(*layer.dense(torch.bfloat16)) for layer in layers]
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for tokens in args.tokens:
        if time.monotonic() - started > args.seconds:
            notes.append(f"{tokens} tokens: not reached in {args.seconds:.0f} s")
            continue
        try:
            rows.append(measure(block, layers, dense, tokens, head["copy_bandwidth"]))
        except AssertionError as error:
            notes.append(f"{tokens} tokens: wrong, not timed: {error}")
        # What is finished is on disk, should the machine be taken away.
        (args.out / "moe.json").write_text(json.dumps(head | {"rows": rows, "notes": notes}, indent=1))
        (args.out / "moe.md").write_text(markdown(head, rows, notes))
    table, prompts = markdown(head, rows, notes), list[dict[str, Any]]()
    for tokens in PROMPTS if has_grouped_product(torch.device(gpu.DEVICE)) else ():
        if time.monotonic() - started > args.seconds:
            notes.append(f"prompt of {tokens} tokens: not reached in {args.seconds:.0f} s")
            continue
        try:
            prompts.append(measure_prompt(block, layers, tokens))
        except AssertionError as error:
            notes.append(f"prompt of {tokens} tokens: wrong, not timed: {error}")
        table = markdown(head, rows, notes) + "\n" + prompt_table(prompts)
        (args.out / "moe.json").write_text(
            json.dumps(head | {"rows": rows, "prompts": prompts, "notes": notes}, indent=1)
        )
        (args.out / "moe.md").write_text(table)
    print(table)
    if any("wrong, not timed" in note for note in notes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
