"""The emulator finds bugs in marlin_gemm and marlin_moe_gemm: the kernel fails once a line is broken."""

import re
from dataclasses import dataclass

import pytest
import torch

import ferrum_ops
from ferrum_ops.ops.marlin import random_marlin, random_marlin_experts
from ferrum_ops.ops.moe_routing import moe_align_block_size_ref
from ferrum_ops.testing.compare import assert_close
from tests.emulation.emulator import CSRC, SCHEDULES, Emulated

SOURCE = CSRC / "cuda" / "marlin.cu"
SOURCES = [SOURCE, CSRC / "cuda" / "moe_gemm.cu"]
HEADER = re.compile(r'#include "(cuda/marlin_\w+\.cuh)"\n')


def in_one_file():
    """The op with its headers, and of all instances the one for 32 tokens, 4 bits and float16; none on wgmma."""
    seen = set()

    def text_of(match):
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return HEADER.sub(text_of, (CSRC / name).read_text().replace("#pragma once", ""))

    source = SOURCE.read_text().replace('#include "cuda/marlin_wgmma.h"\n', "")
    source = source.replace("marlin_wgmma_asked_for()", "false")
    source = source.replace("launch_marlin_wgmma(stream, config, p, call.bits);", "")
    text = HEADER.sub(text_of, '#include "cuda/marlin_kernel.cuh"\n' + source)
    text = re.sub(r"launch_tiles<T, Bits, MarlinTile(8|16|64)>", "launch_tiles<T, Bits, MarlinTile32>", text)
    return text.replace("launch_marlin<T, 8>", "launch_marlin<T, 4>").replace(
        "run_typed<__nv_bfloat16>", "run_typed<__half>"
    )


def compare(library, op, args, workspace):
    """Raises unless the result is right, and args[workspace] zero again, under every order."""
    expected = ferrum_ops.OPS[op].ref(args[0].double(), *args[1:])
    for schedule in SCHEDULES:
        for side in ("behind", "before"):
            with library.guard_pages(side), library.schedule(schedule, seed=3):
                copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
                out = library.op(op)(*copies)
                assert_close(op, out, expected, 1e-3)
                assert (copies[workspace] == 0).all(), "the workspace is not zero"


def run(library):
    """Raises unless products of every kind are right: split, and all tiles by one block."""
    torch.manual_seed(0)
    for tokens, in_features, out_features, group_size, max_sms, counters in (
        (20, 784, 192, 16, 0, 8),
        (40, 464, 64, 48, 1, 0),
    ):
        tensors = random_marlin(
            in_features, out_features, group_size, 4, "cpu", asymmetric=True, act_order=max_sms == 1
        )
        x, workspace = torch.randn(tokens, in_features).half(), torch.zeros(counters, dtype=torch.int32)
        bias = torch.randn(out_features)
        args = (*tensors, bias, workspace, out_features, group_size, 4, "fp32", max_sms)
        compare(library, "marlin_gemm", (x, *args), 6)


def lists():
    """Rows, slots and blocks of 32: an expert with two blocks and pairs of none; more rows than a block of threads looks
    for at a time; a block without an expert; an empty list."""
    many, few = torch.full((700, 3), -1).int(), torch.tensor([[0, 1], [0, -1], [2, 0]] * 12).int()
    many[::40, 1] = 1
    entries = torch.cat([torch.arange(6), torch.full((58,), 6)]).int()
    yield 72, 2, moe_align_block_size_ref(few, 3, 32, True, None)
    yield 2100, 3, moe_align_block_size_ref(many, 3, 32, True, None)
    yield 6, 3, (entries.roll(32), torch.tensor([-1, 2]).int(), torch.tensor([64]).int())
    yield 6, 3, (entries, torch.tensor([0, 1]).int(), torch.tensor([0]).int())


def run_grouped(library):
    """Raises unless sums over slots are right: of split products, and with all tiles walked by one block."""
    torch.manual_seed(0)
    for rows, slots, blocks in lists():
        for in_features, max_sms in ((16, 1),) if rows > 100 else ((544, 0), (160, 1)):
            stack = random_marlin_experts(3, in_features, 192, 16, 4, "cpu")
            x, workspace = torch.randn(rows, in_features).half(), torch.zeros(20, dtype=torch.int32)
            shape = (1, 32, 190, 16, 4, "none", "fp32", max_sms, slots)
            compare(library, "marlin_moe_gemm", (x, *stack, None, *blocks, torch.rand(rows), workspace, *shape), 10)


WRONG = "relative error|finite elements|largest error"


@dataclass(frozen=True)
class Mutation:
    name: str
    old: str
    new: str
    finding: str = WRONG

    def __str__(self):
        return self.name


BOUNDS = "out of bounds|not in shared memory|dynamic shared memory|relative error|finite elements"
MUTATIONS = [
    Mutation("stage-barrier", "    __syncthreads();  // this stage is here", "    // this stage is here"),
    Mutation("stage-wait", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
    Mutation("stage-count", "stage_ % Stage::kStages * p_.stage_bytes", "stage_ % 3 * p_.stage_bytes"),
    Mutation("sums-over-stages", "    __syncthreads();  // the sums take", "    // the sums take"),
    Mutation(
        "sums-barrier",
        "multiplier.store_sums(reinterpret_cast<float*>(shared), total);\n    __syncthreads();",
        "multiplier.store_sums(reinterpret_cast<float*>(shared), total);",
    ),
    Mutation("next-tile-barrier", "    __syncthreads();  // the next tile's", "    // the next tile's"),
    Mutation(
        "rows-barrier",
        "return __syncthreads_or(row >= 0) != 0 ? expert : -1;",
        "return expert;",
        "relative error|finite elements|largest error|out of bounds",
    ),
    Mutation(
        "swizzle-of-one-side",
        "ldmatrix(r, at + Stage::x_place(token + 8 * t + lane / 16 * 8, piece))",
        "ldmatrix(r, at + ((token + 8 * t + lane / 16 * 8) * Shape::kRowPieces + piece) * 16)",
    ),
    Mutation("fragment-order", "a[nibble / 2 + 2 * (nibble % 2)] = subtract", "a[nibble] = subtract"),
    Mutation("zeros-order", "16 * (i % 2) + 4 * (i / 2)", "4 * i"),
    Mutation("scales-order", "+= scale[column] * sum", "+= scale[tile + 4 * (i % 4 / 2)] * sum"),
    Mutation("groups-merged", "min(end, (group + 1) * p_.group_steps - first)", "end"),
    Mutation("groups-bytes", "Stage::kScales + groups * group_bytes", "Stage::kScales + group_bytes", BOUNDS),
    Mutation("bound-of-k", "if (i * kStepsAtOnce < packed_left_) {", "if (true) {", "out of bounds"),
    Mutation("bound-of-columns", "if (piece < inside) {", "if (true) {", "out of bounds"),
    Mutation(
        "last-split",
        "count_arrival(p.counters + tile) == p.splits - 1",
        "count_arrival(p.counters + tile) == p.splits - 2",
    ),
    Mutation("counter-left", "    p.counters[tile] = 0;", "", "the workspace is not zero"),
    Mutation(
        "wait-for-the-previous-kernel",
        "  wait_for_previous_kernel();\n  start_next_kernel();\n  if (block < 0) {",
        "  if (block < 0) {",
        "exited without a wait|access before the wait",
    ),
    Mutation(
        "prefetch-of-k",
        "min((Stage::kStages - 1) * Shape::kSteps, p.steps - first)",
        "(Stage::kStages - 1) * Shape::kSteps",
        "prefetch out of bounds",
    ),
    Mutation(
        "prefetch-of-columns",
        "min(Shape::kColumnWarps, p.units - place.column_tile * Shape::kColumnWarps)",
        "Shape::kColumnWarps",
        "prefetch out of bounds",
    ),
]
GROUPED = [
    Mutation("read-before-the-wait", "  wait_for_previous_kernel();\n  start_next_kernel();\n  if (block < 0) {",
             "  const int token_tiles_now = used_token_tiles(p);\n  wait_for_previous_kernel();\n"
             "  if (block < 0 || token_tiles_now < 0) {", "access before the wait for the previous launch"),
    Mutation("guess-taken-for-the-expert", "place.expert < 0 || place.expert >= p.rows.experts", "false",
             "prefetch out of bounds"),
    Mutation("slots-last-tile", "== token_tiles - 1;", "== token_tiles - 2;"),
    Mutation("slots-counter-left", "      p.slot_counters[column_tile] = 0;", "", "the workspace is not zero"),
    Mutation("slots-flag-barrier", "  __syncthreads();  // the block's rows are written, its flag has been read\n", "",
             f"{WRONG}|diverged|deadlock"),
    Mutation("slots-last-barrier", "== token_tiles - 1;\n  }\n  __syncthreads();", "== token_tiles - 1;\n  }",
             f"{WRONG}|diverged|deadlock"),
    Mutation("slots-of-rows-without-expert", "first + j < p.slots && named[first + j] != 0", "first + j < p.slots"),
    Mutation("slots-next-tokens-barrier", "  __syncthreads();  // nobody still reads what lay there\n", ""),
    Mutation("slots-named-barrier", "    named[i] = 0;\n  }\n  __syncthreads();", "    named[i] = 0;\n  }"),
    Mutation("slots-tiles-without-rows", "bool finished = place.split == 0;", "bool finished = false;"),
    Mutation("slots-each-split", "finished = finish_tile<T, Shape>(", "finished = true; finish_tile<T, Shape>(",
             f"{WRONG}|the workspace is not zero"),
    Mutation("slots-empty-list", "max(blocks * p.tiles_of_block, 1)", "blocks * p.tiles_of_block"),
    Mutation("slots-counters-of-splits", "p.counters += reserved;", "", f"{WRONG}|the workspace is not zero"),
]  # fmt: skip


@pytest.mark.slow
def test_the_kernel_passes_as_it_stands(emulation):
    library = Emulated(SOURCES, "ferrum_marlin_unmutated", replace={SOURCE: in_one_file()})
    run(library)
    run_grouped(library)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS + GROUPED, ids=str)
def test_a_mutation_is_caught(mutation, emulation):
    text = in_one_file()
    assert text.count(mutation.old) == 1
    namespace = "ferrum_marlin_" + mutation.name.replace("-", "_")
    sources, check = ([SOURCE], run) if mutation in MUTATIONS else (SOURCES, run_grouped)
    library = Emulated(sources, namespace, replace={SOURCE: text.replace(mutation.old, mutation.new)})
    with pytest.raises((RuntimeError, AssertionError), match=mutation.finding):
        check(library)
