"""Builds CUDA sources as plain C++ and runs them on the CPU."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"
UNUSED_SECONDS = 24 * 3600
SCHEDULES = ("forward", "reverse", "random")
RUNTIME = sorted(HERE.glob("*.cpp"))
#: Objects of all libraries of a process are named apart by `-Bsymbolic`, and `-fno-gnu-unique` keeps their static and
#: thread-local variables apart. The sanitizer's findings are reported by sanitizer.cpp.
FLAGS = [
    *("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-w"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"),
    "-fstack-clash-protection",  # large locals, too, meet the guard page of a stack
    *(
        "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero,float-cast-overflow",
        "-fno-sanitize-recover=all",
    ),
]
#: Of kernels; memory.cpp uses what lies beyond the stable ABI.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


@cache
def cuda_headers() -> Path | None:
    """The folder of cuda_fp16.h and what it includes, of NVIDIA's wheels or of a CUDA toolkit; None without either."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(p) / "cu13" / "include" for p in (spec.submodule_search_locations or [])] if spec else []
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    needed = ("cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h", "nv/target")
    folders = (*wheels, *(Path(home) / "include" for home in homes if home))
    return next((f for f in folders if all((f / name).exists() for name in needed)), None)


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if platform.system() != "Linux":
        return "Linux only"
    if shutil.which(_compiler()[-1]) is None:
        return f"no {_compiler()[-1]}"
    if cuda_headers() is None:
        return "no CUDA headers: pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl, or set CUDA_HOME"
    return None


@cache
def _headers_digest() -> str:
    """Changes with every header that a source may include."""
    digest = hashlib.sha256()
    for path in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.rglob("*.h")]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    digest.update(torch.__version__.encode())
    return digest.hexdigest()


def _compiler() -> list[str]:
    ccache = ["ccache"] if shutil.which("ccache") else []
    return [*ccache, os.environ.get("CXX", "g++")]


def _compile(source: Path, text: str, defines: Sequence[str]) -> Path:
    """The object file of `text`, which stands in for `source`."""
    includes = [f"-I{HERE / 'include'}", f"-I{CSRC}", f"-I{source.parent}"]
    includes += [f"-isystem{path}" for path in (cuda_headers(), *include_paths())]
    command = [*_compiler(), *FLAGS, *defines, *includes]
    key = hashlib.sha256("\0".join([*command, text, _headers_digest()]).encode()).hexdigest()[:16]
    result = BUILD / f"{source.stem}-{key}.o"
    if not result.exists():
        partial = result.with_suffix(f".{os.getpid()}")
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / source.name  # the name that messages show
            written.write_text(text)
            run = subprocess.run([*command, "-c", str(written), "-o", str(partial)], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"[emulator] {source.name}: expected to compile, got\n{run.stderr[-4000:]}")
        partial.rename(result)
    result.touch()
    return result


def _link(objects: Sequence[Path], name: str) -> Path:
    key = hashlib.sha256("\0".join(map(str, objects)).encode()).hexdigest()[:16]
    result = BUILD / f"{name}-{key}.so"
    if not result.exists():
        partial = result.with_suffix(f".{os.getpid()}")
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
        flags = ["-shared", "-Wl,-Bsymbolic", "-Wl,--no-as-needed", "-o", str(partial)]
        subprocess.run([_compiler()[-1], *flags, *map(str, objects), *libraries], check=True, capture_output=True)
        partial.rename(result)
    result.touch()
    return result


def _remove_unused() -> None:
    """Objects carry a digest of all they depend on: those of other states of the sources pile up.

    Once a day, by whoever builds first: others may link what has lain unused until now.
    """
    done = BUILD / "unused-removed"
    if done.exists() and time.time() - done.stat().st_mtime < UNUSED_SECONDS:
        return
    for path in BUILD.glob("*.*o"):
        if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
            path.unlink(missing_ok=True)
    done.touch()


@contextmanager
def _build_lock(name: str) -> Iterator[None]:
    """One process builds what all of them load."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Emulated:
    """CUDA sources in a shared library.

    Args:
        sources: `.cu` files.
        namespace: of `torch.ops`, where the ops they register appear.
        replace: text of a source instead of the file's own.
    """

    def __init__(self, sources: Sequence[Path], namespace: str, replace: dict[Path, str] | None = None) -> None:
        texts = {path: path.read_text() for path in (*RUNTIME, *sources)} | (replace or {})
        defines = [STABLE_ABI, f"-DFERRUM_NAMESPACE={namespace}", "-DFERRUM_CUDA_KEY=CPU"]

        def compile_all(paths: Sequence[Path], defines: Sequence[str]) -> list[Path]:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # compilers of 300 MB each
                return list(pool.map(lambda path: _compile(path, texts[path], defines), paths))

        with _build_lock("runtime"):
            _remove_unused()
            objects = compile_all(RUNTIME, [])
        with nullcontext() if replace else _build_lock(namespace):  # a mutant is one process's
            library = _link([*objects, *compile_all(sources, defines)], namespace)
        self.namespace = namespace
        self._definitions = torch.library.Library(namespace, "DEF")
        for name in sorted({name for text in texts.values() for name in registered_names(text) - defined_names(text)}):
            packet, _, overload = name.partition(".")
            schema = getattr(getattr(torch.ops.ferrum, packet), overload or "default")._schema
            self._definitions.define(str(schema).removeprefix("ferrum::"))
        torch.ops.load_library(library)
        self.c = ctypes.CDLL(str(library))
        for counter in ("launches", "collectives"):
            getattr(self.c, f"ferrum_emulation_{counter}").restype = ctypes.c_uint64

    def op(self, name: str) -> Callable[..., Any]:
        packet, _, overload = name.partition(".")
        return getattr(getattr(getattr(torch.ops, self.namespace), packet), overload or "default")

    @contextmanager
    def schedule(self, schedule: str, seed: int = 0) -> Iterator[None]:
        """Runs kernels under this order of their threads."""
        self.c.ferrum_emulation_schedule(SCHEDULES.index(schedule), seed)
        try:
            yield
        finally:
            self.c.ferrum_emulation_schedule(0, 0)

    @contextmanager
    def guard_pages(self, side: str) -> Iterator[None]:
        """Every CPU tensor made inside has a guard page "behind" or "before" it."""
        self.c.ferrum_emulation_guard({"behind": 1, "before": 2}[side])
        try:
            yield
        finally:
            self.c.ferrum_emulation_guard(0)

    def launches(self) -> int:
        return self.c.ferrum_emulation_launches()

    def collectives(self) -> int:
        return self.c.ferrum_emulation_collectives()


def registered_names(source: str) -> set[str]:
    """The ops that a source registers."""
    return set(re.findall(r'\bm\.impl\(\s*"([\w.]+)"', source))


def defined_names(source: str) -> set[str]:
    """The ops whose schemas a source brings itself, as the kernels of the tests do."""
    return set(re.findall(r'\bm\.def\(\s*"([\w.]+)\(', source))


def kernel_sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def emulated_op_names() -> list[str]:
    """Every op with a CUDA kernel in csrc/cuda."""
    return sorted(name for path in kernel_sources() for name in registered_names(path.read_text()))


def shipped(replace: dict[Path, str] | None = None) -> Emulated:
    """All of csrc/cuda, as `torch.ops.ferrum_emulated`: once in a process."""
    return Emulated(kernel_sources(), "ferrum_emulated", replace)
