"""Compiles ahead of time, without a GPU, every binary that the launchers can ask for, and holds it to what a GPU has.

python -m tests.triton.compile_gate                 # all capabilities: a table, exit status 1 where something is over
python -m tests.triton.compile_gate --capability 90
"""

import argparse
import functools
import importlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ferrum_ops.triton import KERNELS

#: Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, technical
#: specifications). Triton compiles kernels that want more; their launch fails.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTER_LIMIT = 255
#: Below the limit of registers ptxas may spill two of them by its own choice, so that another block fits: not a kernel
#: that is too large. So does Triton 3.6's for 9.x and later with the experts' 4-bit tiles of few rows, at 128 registers.
CHOSEN_SPILLS = 8


@dataclass(frozen=True)
class Resources:
    """Of one binary, in registers of a thread and in bytes. Spilled registers are on the stack, in local memory."""

    registers: int
    stack: int
    local: int
    shared: int

    def problems(self, capability):
        found = []
        if not 0 < self.registers <= REGISTER_LIMIT:
            found.append(f"registers: expected 1 to {REGISTER_LIMIT}, got {self.registers}")
        chosen = self.registers < REGISTER_LIMIT and self.stack <= CHOSEN_SPILLS
        if self.local or (self.stack and not chosen):
            found.append(f"spills: expected none, got {self.stack} bytes of stack and {self.local} of local memory")
        if self.shared > SHARED_LIMIT[capability]:
            found.append(f"shared memory: expected at most {SHARED_LIMIT[capability]} bytes, got {self.shared}")
        return found


@functools.cache
def binaries(module, capability):
    return list(importlib.import_module(module).binaries(capability).items())


def all_binaries(capability):
    """(module, index in its list, name) of every binary."""
    for module in sorted(set(KERNELS.values())):
        for index, (binary, _) in enumerate(binaries(module, capability)):
            yield module, index, str(binary)


def compiled(binary, types, capability):
    """Triton's compilation of `binary` for sizes of real models: what Triton specialises is a multiple of 16."""
    constants = dict(binary.constants)
    signature, attributes = {}, {}
    for parameter in binary.kernel.params:
        name = parameter.name
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if name not in constants and not parameter.do_not_specialize:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    options = {"num_warps": binary.num_warps, "num_stages": binary.num_stages}
    source = ASTSource(binary.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(rf"Function {kernel.metadata.name}:\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", report)
    assert found, f"expected the resources of {kernel.metadata.name}, got {report}"
    return Resources(*map(int, found.groups()), kernel.metadata.shared)


def examine(module, index, capability):
    return resources(compiled(*binaries(module, capability)[index], capability))


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.triton.compile_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, action="append", choices=sorted(SHARED_LIMIT))
    capabilities = parser.parse_args(arguments).capability or sorted(SHARED_LIMIT)
    failures = 0
    print(f"{'sm':>4}{'registers':>10}{'shared':>8}  binary")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = [(capability, *job) for capability in capabilities for job in all_binaries(capability)]
        futures = [pool.submit(examine, module, index, capability) for capability, module, index, _ in jobs]
        for (capability, _, _, name), future in zip(jobs, futures):
            found = future.result()
            print(f"{capability:>4}{found.registers:>10}{found.shared:>8}  {name}", flush=True)
            for problem in found.problems(capability):
                failures += 1
                print(f"{'':>24}{problem}")
    print(f"{len(jobs)} binaries, {failures} problems")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
