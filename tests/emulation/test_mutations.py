"""The emulator finds bugs: kernels that pass as they stand fail once a line is broken."""

from dataclasses import dataclass

import pytest
import torch

import ferrum_ops
from ferrum_ops.testing.compare import assert_close, tolerance
from tests.emulation.emulator import CSRC, HERE, SCHEDULES, Emulated, kernel_sources, registered_names
from tests.emulation.mutations import SHIPPED, family, replacement
from tests.ops.test_every_op import copy_args, outputs, to_float64

BLOCK, TILE = HERE / "kernels" / "block.cu", HERE / "kernels" / "tile.cu"
NORM = CSRC / "cuda" / "norm.cu"


def row_sums():
    x = torch.randn(3, 300)
    return (x,), lambda x: x.double().sum(1)


def transpose():
    return (torch.randn(45, 70),), lambda x: x.T


def histogram_():
    x = torch.randint(-2, 12, (300,), dtype=torch.int32)
    x[0] = 0  # counted: test mutations look before it
    return (x, torch.zeros(10, dtype=torch.int32)), lambda x, _: torch.stack([(x == i).sum() for i in range(10)])


def reversed_sums():
    x = torch.randint(-9, 9, (128,), dtype=torch.int32)
    return (x,), lambda x: x.view(4, 32).flip(1).flatten().cumsum(0)


def total():
    return (torch.randn(500), torch.zeros(1, dtype=torch.int32)), lambda x, _: x.double().sum(0, keepdim=True)


def reversed_tiles():
    def reverse(x):
        padded = torch.nn.functional.pad(x, (0, -len(x) % 256))
        return padded.view(-1, 256).flip(1).flatten()[: len(x)]

    return (torch.randn(1001),), reverse


def matmul_nt(dtype=torch.float16):
    a, b = torch.randn(16, 128).to(dtype), torch.randn(48, 128).to(dtype)
    return (a, b), lambda a, b: a.double() @ b.double().T


def matmul_int4():
    codes = torch.randint(0, 16, (64, 24))
    lane = torch.arange(32)
    tiles = codes.view(4, 16, 3, 8)  # [K / 16, row, N / 8, column]
    packed = torch.zeros(4, 3, 32, dtype=torch.int64)
    for offset, bit in ((0, 0), (1, 16), (8, 4), (9, 20)):
        packed |= tiles[:, 2 * (lane % 4) + offset, :, lane // 4].permute(1, 2, 0) << bit
    a = torch.randn(16, 64).half()
    return (a, packed.int()), lambda a, _: a.double() @ (codes - 8).double()


def rms_norm(*shape):
    x = torch.randn(shape or (3, 2048))
    return (x, torch.randn(x.shape[-1]), 1e-6), ferrum_ops.OPS["rms_norm"].ref


def run(library, op, args, oracle):
    """Raises unless the kernel is right under every order, with tensors behind and before a guard page."""
    expected = oracle(*args)
    for schedule in SCHEDULES:
        for side in ("behind", "before"):
            with library.guard_pages(side), library.schedule(schedule, seed=3):
                copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
                out = library.op(op)(*copies)
            assert_close(op, copies[-1] if out is None else out, expected, 1e-5)


@dataclass(frozen=True)
class Mutation:
    name: str
    source: object
    op: str
    case: object  # () -> arguments, oracle
    old: str
    new: str
    finding: str  # part of the error


WRONG = "relative error|finite elements|values differ|largest error"

MUTATIONS = [
    Mutation("barrier-missing", BLOCK, "row_sums", row_sums,
             "  sums[thread] = sum;\n  __syncthreads();", "  sums[thread] = sum;", WRONG),
    Mutation("barrier-missing-in-loop", BLOCK, "row_sums", row_sums,
             "sums[thread + half];\n    }\n    __syncthreads();", "sums[thread + half];\n    }", WRONG),
    Mutation("barrier-diverged", BLOCK, "row_sums", row_sums,
             "sums[thread + half];\n    }\n    __syncthreads();", "sums[thread + half];\n    __syncthreads();\n    }",
             "diverged|deadlock"),
    Mutation("shared-size", BLOCK, "row_sums", row_sums,
             "threads * sizeof(float)};", "threads / 2 * sizeof(float)};", "dynamic shared memory"),
    Mutation("shared-uninitialised", BLOCK, "histogram_", histogram_, "counts[i] = 0;", "", WRONG),
    Mutation("bound-of-row", BLOCK, "row_sums", row_sums, "i < size; i +=", "i <= size; i +=", f"out of bounds|{WRONG}"),
    Mutation("bound-of-tensor", BLOCK, "total", total, "i < size ? x[i]", "i <= size ? x[i]", "out of bounds"),
    Mutation("bound-before-tensor", BLOCK, "histogram_", histogram_,
             "x[i] >= 0 && x[i] < bins", "x[i] >= 0 && x[i] < bins && x[i - 1] > -99", "out of bounds: byte -4 of"),
    Mutation("tail-mask", BLOCK, "transpose", transpose,
             "column + i < columns && row + threadIdx.x < rows", "column + i < columns", f"out of bounds|{WRONG}"),
    Mutation("array-bound", BLOCK, "transpose", transpose,
             "= tile[threadIdx.x][i];", "= tile[threadIdx.x + 1][i];", "index 32 out of bounds"),
    Mutation("transpose-barrier", BLOCK, "transpose", transpose, "  }\n  __syncthreads();\n  for (int i = threadIdx.y",
             "  }\n  for (int i = threadIdx.y", WRONG),
    Mutation("atomic-lost", BLOCK, "histogram_", histogram_,
             "    atomicAdd(&counts[x[i]], 1);", "    counts[x[i]] = counts[x[i]] + __shfl_sync(__activemask(), 1, threadIdx.x) * 0 + 1 - (threadIdx.x % 2);", WRONG),
    Mutation("syncwarp-missing", BLOCK, "reversed_sums", reversed_sums, "  __syncwarp();\n", "", WRONG),
    Mutation("syncwarp-lane-mask", BLOCK, "reversed_sums", reversed_sums,
             "__syncwarp();", "__syncwarp(0x0000ffffu);", "not in its own mask"),
    Mutation("collective-mismatch", BLOCK, "reversed_sums", reversed_sums,
             "__syncwarp();", "if (lane < 16) { __syncwarp(); } else { __any_sync(0xffffffffu, 1); }", "diverged"),
    Mutation("warp-count", BLOCK, "reversed_sums", reversed_sums, "Grid{dim3(1), dim3(128)}", "Grid{dim3(1), dim3(160)}",
             "out of bounds"),
    Mutation("last-block", BLOCK, "total", total, "static_cast<int>(gridDim.x) - 1", "static_cast<int>(gridDim.x) - 2",
             WRONG),
    Mutation("wait-missing", TILE, "reversed_tiles", reversed_tiles, "    cp_async_wait<kStages - 2>();\n", "", WRONG),
    Mutation("wait-weak", TILE, "reversed_tiles", reversed_tiles,
             "cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()", WRONG),
    Mutation("refill-without-barrier", TILE, "reversed_tiles", reversed_tiles,
             "    __syncthreads();  // this tile", "    // this tile", WRONG),
    Mutation("refill-before-barrier", TILE, "reversed_tiles", reversed_tiles,
             "    cp_async_wait<kStages - 2>();\n    __syncthreads();  // this tile is here for all, and nobody still reads the "
             "one whose place the next fetch takes\n    fetch(tile + kStages - 1);",
             "    fetch(tile + kStages - 1);\n    cp_async_wait<kStages - 1>();\n    __syncthreads();", WRONG),
    Mutation("copy-past-the-end", TILE, "reversed_tiles", reversed_tiles,
             "int64_t{0}), int64_t{16})", "int64_t{16}), int64_t{16})", "out of bounds"),
    Mutation("swizzle-of-one-side", TILE, "matmul_nt", matmul_nt,
             "ldmatrix(left, stage + swizzle(lane % 16, half * 2 + lane / 16))",
             "ldmatrix(left, stage + lane % 16 * kStep + (half * 2 + lane / 16) * 8)", WRONG),
    Mutation("ldmatrix-misaligned", TILE, "matmul_nt", matmul_nt,
             "ldmatrix(left, stage + swizzle(", "ldmatrix(left, stage + 4 + swizzle(", "ldmatrix: address needs"),
    Mutation("tile-barrier", TILE, "matmul_nt", matmul_nt, "cp_async_wait<0>();\n    __syncthreads();",
             "cp_async_wait<0>();", WRONG),
    Mutation("tile-shared-size", TILE, "matmul_nt", matmul_nt, "2 * 2 * 16 * kStep * sizeof", "2 * 16 * kStep * sizeof",
             "not in shared memory|dynamic shared memory"),
    Mutation("tile-stage", TILE, "matmul_nt", matmul_nt, "T* const stage = shared + step % 2 * 2 * kMatrix;\n    const int",
             "T* const stage = shared;\n    const int", WRONG),
    Mutation("mma-in-one-warp", TILE, "matmul_nt", matmul_nt,
             "      mma_m16n8k16<T>(sum, left, right);", "      if (lane > 0) { mma_m16n8k16<T>(sum, left, right); }",
             "takes no part|diverged|deadlock"),
    Mutation("fragment-registers", TILE, "matmul_int4", matmul_int4,
             "(g + 8 * (r % 2)) * k + step * 16 + 2 * t + 8 * (r / 2)",
             "(g + 8 * (r / 2)) * k + step * 16 + 2 * t + 8 * (r % 2)", WRONG),
    Mutation("lop3-table", TILE, "matmul_int4", matmul_int4, "(0xf0 & 0xcc) | 0xaa", "(0xf0 | 0xcc) | 0xaa", WRONG),
    Mutation("norm-bound", NORM, "rms_norm", rms_norm,
             "column < rows.size; column += step) {\n    if (column", "column <= rows.size; column += step) {\n    if (column", "out of bounds"),
    Mutation("norm-alignment", NORM, "rms_norm", lambda: rms_norm(3, 66),
             "const bool vectors = all_vectorize<N, T, W>(rows);", "const bool vectors = true;", "misaligned|out of bounds"),
    Mutation("norm-early-return", NORM, "rms_norm", lambda: rms_norm(3, 63),
             "  if (inside && first < rows.size) {", "  if (inside && first < rows.size) {\n    __syncthreads();",
             "diverged|deadlock"),
]  # fmt: skip


@pytest.fixture(scope="module")
def unmutated(emulation):
    return Emulated([BLOCK, TILE, NORM], "ferrum_unmutated")


CASES = [row_sums, transpose, histogram_, reversed_sums, total, reversed_tiles, matmul_nt, matmul_int4, rms_norm]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_pass_as_they_stand(case, unmutated):
    run(unmutated, case.__name__, *case())


@pytest.mark.slow
def test_bfloat16_tiles(unmutated):
    run(unmutated, "matmul_nt", *matmul_nt(torch.bfloat16))


@pytest.mark.slow
def test_the_order_of_threads_changes_an_unordered_sum(unmutated):
    x, sums = torch.randn(1000), []
    for schedule in SCHEDULES:
        with unmutated.schedule(schedule, seed=3):
            sums.append(torch.zeros(1))
            unmutated.op("unordered_total_")(x, sums[-1])
        assert_close("unordered_total_", sums[-1], x.double().sum(0, keepdim=True), 1e-4)
    assert len({s.item() for s in sums}) == 3


@pytest.mark.slow  # each compiles for some seconds
@pytest.mark.parametrize("mutation", [pytest.param(m, id=m.name) for m in MUTATIONS])
def test_a_mutation_is_caught(mutation, emulation):
    text = mutation.source.read_text()
    assert text.count(mutation.old) == 1
    changed = text.replace(mutation.old, mutation.new)
    namespace = "ferrum_mutant_" + mutation.name.replace("-", "_")
    library = Emulated([mutation.source], namespace, replace={mutation.source: changed})
    with pytest.raises((RuntimeError, AssertionError), match=mutation.finding):
        run(library, mutation.op, *mutation.case())


def test_mutations_of_shipped_kernels_apply():
    for mutation in SHIPPED.values():
        assert replacement(mutation)


#: One of each file, to be seen on the registry's samples alone. `python -m tests.emulation.mutations` runs all.
REPRESENTATIVE = (
    "activation-bound",
    "gather-barrier",
    "kv-int8-units",
    "combine-skipped-pair",
    "route-taken",
    "rope-second-of-interleaved",
    "penalty-barrier",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_mutation_of_a_shipped_kernel_is_caught(name, emulation):
    mutant = replacement(SHIPPED[name])
    sources = [source for source in kernel_sources() if source.stem.startswith(family(SHIPPED[name]))]
    library = Emulated(sources, "ferrum_mutant_" + name.replace("-", "_"), replace=mutant)
    names = {op for text in mutant.values() for op in registered_names(text)}
    with pytest.raises((RuntimeError, AssertionError)):
        for op in map(ferrum_ops.OPS.__getitem__, sorted(names)):
            for args in op.inputs("cpu", torch.float32):
                expected = outputs(op, op.ref, copy_args(args, to_float64))
                for schedule in SCHEDULES:
                    with library.guard_pages("behind"), library.schedule(schedule, seed=3):
                        got = outputs(op, library.op(op.name), copy_args(args))
                    for g, e in zip(got, expected):
                        assert_close(op.name, g, e, tolerance(op.name, torch.float32))
