"""The products of warpgroups: what they are, and what is found where their rules are broken."""

from dataclasses import dataclass

import pytest
import torch

from ferrum_ops.testing.compare import assert_close
from tests.emulation.emulator import HERE, SCHEDULES, Emulated

#: Of the emulator itself, with a library of its own to compile.
pytestmark = pytest.mark.slow

SOURCE = HERE / "kernels" / "wgmma.cu"
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def unmutated(emulation):
    return Emulated([SOURCE], "ferrum_wgmma")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fragments(dtype, step, keep, unmutated):
    # PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16": thread t of a warpgroup, warp t // 32, lane t % 32.
    a, x, d = torch.randn(64, 16).to(dtype), torch.randn(64, 64).to(dtype), torch.randn(64, 64)
    threads = [(t // 32, t % 32 // 4, t % 4) for t in range(128)]
    a_place = [
        (16 * w + g + 8 * (r % 2), 2 * c + 8 * (r // 2) + i) for w, g, c in threads for r in range(4) for i in (0, 1)
    ]
    d_place = [(16 * w + g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * c + i % 2) for w, g, c in threads for i in range(32)]
    assert len(set(a_place)) == a.numel() and len(set(d_place)) == d.numel()
    rows, columns = map(list, zip(*a_place))
    registers = a[rows, columns].view(torch.int32).view(128, 4)
    rows, columns = map(list, zip(*d_place))
    got = d[rows, columns].view(128, 32)
    unmutated.op("multiply_registers_")(registers, x, got, step, keep)
    product = a.double() @ x[:, 16 * step : 16 * step + 16].double().T + (d.double() if keep else 0)
    assert torch.allclose(got.double().flatten(), product[rows, columns], rtol=1e-6, atol=1e-5)


def run(library, dtype=torch.float16):
    torch.manual_seed(0)
    a, b = torch.randn(128, 256).to(dtype), torch.randn(64, 256).to(dtype)
    for schedule in SCHEDULES:
        with library.guard_pages("behind"), library.schedule(schedule, seed=3):
            out = library.op("matmul_wgmma")(a.clone(), b.clone())
        assert_close("matmul_wgmma", out, a.double() @ b.double().T, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_passes_as_it_stands(dtype, unmutated):
    run(unmutated, dtype)


@dataclass(frozen=True)
class Mutation:
    name: str
    old: str
    new: str
    finding: str  # part of the error

    def __str__(self):
        return self.name


WRONG = "relative error|finite elements|largest error"
MUTATIONS = [
    Mutation("publish-missing", "    cp_async_wait<0>();\n    publish_to_wgmma();\n", "    cp_async_wait<0>();\n",
             "a copy has written and its thread not published"),
    Mutation("publish-in-one-warp", "    cp_async_wait<0>();\n    publish_to_wgmma();\n",
             "    cp_async_wait<0>();\n    if (thread < 32) { publish_to_wgmma(); }\n",
             "a copy has written and its thread not published"),
    Mutation("publish-before-stores", "*reinterpret_cast<uint4*>(b + swizzled(i / 8, i % 8)) = x[i];\n  }\n  publish_to_wgmma();",
             "*reinterpret_cast<uint4*>(b + swizzled(i / 8, i % 8)) = x[i];\n  }\n", "stored since it was published"),
    Mutation("copies-not-waited-for", "    cp_async_wait<0>();\n    publish", "    publish",
             "a copy writes that has not been waited for"),
    Mutation("stage-barrier", "    __syncthreads();  // this stage", "    // this stage",
             f"a copy writes that|a copy has written|changed under a product|{WRONG}"),
    Mutation("stage-too-few", "kStages = 3, kSteps", "kStages = 2, kSteps",
             "shared memory changed under a product that was not waited for"),
    Mutation("wait-weak", "wgmma_wait<1>();", "wgmma_wait<2>();", "A changed under a product"),
    Mutation("wait-missing", "  wgmma_wait<0>(sum);\n  for (int i = 0; i < 32; ++i) {\n    out",
             "  for (int i = 0; i < 32; ++i) {\n    out", f"under way at its end|{WRONG}"),
    Mutation("fence-missing", "      wgmma_fence();\n", "", "no wgmma.fence"),
    Mutation("result-written-under-way", "      wgmma_wait<1>();  //", "      sum[0] = 0.0f;\n      wgmma_wait<1>();  //",
             "D was written under a product"),
    Mutation("result-read-under-way", "      wgmma_wait<1>();  //", "      out[row] = sum[1];\n      wgmma_wait<1>();  //",
             WRONG),
    Mutation("warp-left-out", "      wgmma_m64n64k16<T>(sum", "      if (thread >= 32) wgmma_m64n64k16<T>(sum",
             "diverged"),
    Mutation("lane-left-out", "      wgmma_commit();\n      wgmma_wait<1>", "      if (lane > 0) { wgmma_commit(); }\n      wgmma_wait<1>",
             "takes no part|diverged|deadlock"),
    Mutation("descriptors-differ", "wgmma_descriptor(at), step", "wgmma_descriptor(at + thread / 128 * 0 + thread % 128 / 32 * 32), step",
             "warps of a warpgroup have different products"),
    Mutation("swizzle-missing", "(piece ^ row % 8) * 16", "piece * 16", WRONG),
    Mutation("not-aligned", "return shared + (kSwizzleBytes - shared_address(shared) % kSwizzleBytes) % kSwizzleBytes",
             "return shared + (kSwizzleBytes - shared_address(shared) % kSwizzleBytes) % kSwizzleBytes + 128",
             f"{WRONG}|not been waited|not published|dynamic shared memory"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_caught(mutation, emulation):
    text = SOURCE.read_text()
    assert text.count(mutation.old) == 1
    namespace = "ferrum_wgmma_" + mutation.name.replace("-", "_")
    library = Emulated([SOURCE], namespace, replace={SOURCE: text.replace(mutation.old, mutation.new)})
    with pytest.raises((RuntimeError, AssertionError), match=mutation.finding):
        zeros = torch.zeros(128, 4, dtype=torch.int32)
        library.op("multiply_registers_")(zeros, torch.zeros(64, 64).half(), torch.zeros(128, 32), 0, True)
        run(library)
