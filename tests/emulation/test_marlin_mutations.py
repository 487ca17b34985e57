"""The emulator finds bugs in marlin_gemm: the kernel fails once a line is broken."""

import re
from dataclasses import dataclass

import pytest
import torch

import ferrum_ops
from ferrum_ops.ops.marlin import random_marlin
from ferrum_ops.testing.compare import assert_close
from tests.emulation.emulator import CSRC, SCHEDULES, Emulated

SOURCE = CSRC / "cuda" / "marlin.cu"
HEADER = re.compile(r'#include "(cuda/marlin_\w+\.cuh)"\n')


def in_one_file():
    """The op with its headers, and of all instances the one for 32 tokens, 4 bits and float16."""
    seen = set()

    def text_of(match):
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return HEADER.sub(text_of, (CSRC / name).read_text().replace("#pragma once", ""))

    text = HEADER.sub(text_of, '#include "cuda/marlin_kernel.cuh"\n' + SOURCE.read_text())
    text = re.sub(r"launch_tiles<T, Bits, MarlinTile(8|16|64)>", "launch_tiles<T, Bits, MarlinTile32>", text)
    return text.replace("launch_marlin<T, 8>", "launch_marlin<T, 4>").replace(
        "run_typed<__nv_bfloat16>", "run_typed<__half>"
    )


def run(library):
    """Raises unless products of every kind are right under every order: split, and all tiles by one block."""
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
        expected = ferrum_ops.OPS["marlin_gemm"].ref(x.double(), *args)
        for schedule in SCHEDULES:
            for side in ("behind", "before"):
                with library.guard_pages(side), library.schedule(schedule, seed=3):
                    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in (x, *args)]
                    out = library.op("marlin_gemm")(*copies)
                    assert_close("marlin_gemm", out, expected, 1e-3)
                    assert (copies[6] == 0).all(), "the workspace is not zero"


@dataclass(frozen=True)
class Mutation:
    name: str
    old: str
    new: str
    finding: str = "relative error|finite elements|largest error"

    def __str__(self):
        return self.name


BOUNDS = "out of bounds|not in shared memory|dynamic shared memory|relative error|finite elements"
MUTATIONS = [
    Mutation("stage-barrier", "    __syncthreads();  // this stage is here", "    // this stage is here"),
    Mutation("stage-wait", "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
    Mutation("stage-count", "stage_ % Stage::kStages * p_.stage_bytes", "stage_ % 3 * p_.stage_bytes"),
    Mutation("sums-over-stages", "    __syncthreads();  // the sums take", "    // the sums take"),
    Mutation("sums-barrier", "multiplier.store_sums(sums, total);\n    __syncthreads();",
             "multiplier.store_sums(sums, total);"),
    Mutation("next-tile-barrier", "    __syncthreads();  // the next tile's", "    // the next tile's"),
    Mutation("rows-barrier", "return __syncthreads_or(row >= 0) != 0 ? expert : -1;", "return expert;",
             "relative error|finite elements|largest error|out of bounds"),
    Mutation("swizzle-of-one-side", "ldmatrix(r, at + Stage::x_place(token + 8 * t + lane / 16 * 8, piece))",
             "ldmatrix(r, at + ((token + 8 * t + lane / 16 * 8) * Shape::kRowPieces + piece) * 16)"),
    Mutation("fragment-order", "a[nibble / 2 + 2 * (nibble % 2)] = subtract", "a[nibble] = subtract"),
    Mutation("zeros-order", "16 * (i % 2) + 4 * (i / 2)", "4 * i"),
    Mutation("scales-order", "+= scale[column] * sum", "+= scale[tile + 4 * (i % 4 / 2)] * sum"),
    Mutation("groups-merged", "min(end, (group + 1) * p_.group_steps - first)", "end"),
    Mutation("groups-bytes", "Stage::kScales + groups * group_bytes", "Stage::kScales + group_bytes", BOUNDS),
    Mutation("bound-of-k", "if (i * kStepsAtOnce < packed_left_) {", "if (true) {", "out of bounds"),
    Mutation("bound-of-columns", "if (piece < inside) {", "if (true) {", "out of bounds"),
    Mutation("last-split", "count_arrival(p.counters + tile) == p.splits - 1", "count_arrival(p.counters + tile) == p.splits - 2"),
    Mutation("counter-left", "    p.counters[tile] = 0;", "", "the workspace is not zero"),
]  # fmt: skip


def test_the_kernel_passes_as_it_stands(emulation):
    run(Emulated([SOURCE], "ferrum_marlin_unmutated", replace={SOURCE: in_one_file()}))


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_caught(mutation, emulation):
    text = in_one_file()
    assert text.count(mutation.old) == 1
    namespace = "ferrum_marlin_" + mutation.name.replace("-", "_")
    library = Emulated([SOURCE], namespace, replace={SOURCE: text.replace(mutation.old, mutation.new)})
    with pytest.raises((RuntimeError, AssertionError), match=mutation.finding):
        run(library)
