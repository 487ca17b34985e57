"""Build of `ferrum_ops._C`: one shared library on PyTorch's stable ABI, for every torch >= 2.10 and Python >= 3.10.

CUDA kernels are compiled where a CUDA toolkit is found (CUDA_HOME, nvcc on PATH, /usr/local/cuda), whatever the torch:
the library with CUDA in it loads in a torch without. In the environment:
  FERRUM_CUDA          0 leaves CUDA out, 1 insists on it
  FERRUM_CUDA_ARCHS    compute capabilities, e.g. "90a" or "80 90a" (default: all of CUDA_ARCHS, and PTX for later ones)
  FERRUM_NATIVE_DEBUG  1 builds with -O0 -g
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).parent
DEBUG = os.environ.get("FERRUM_NATIVE_DEBUG", "0") == "1"
CUDA_ARCHS = ("80", "89", "90a", "100")
# The oldest torch whose stable ABI is used: 2.10. (py_limited_api below states the oldest Python, 3.10.)
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]


def compile_flags() -> list[str]:
    flags = [
        "-std=c++17",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-unused-parameter",
        *ABI_FLAGS,
    ]
    flags += ["-O0", "-g"] if DEBUG else ["-O3", "-g0"]
    # Kernels state their own fused multiply-adds; contraction by the compiler would make the levels differ.
    flags += ["-ffp-contract=off"]
    return flags


def cuda_home() -> Path | None:
    """The CUDA toolkit to build with, or None for a build without."""
    wanted = os.environ.get("FERRUM_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"[setup] FERRUM_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0" or platform.system() != "Linux":
        return None
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parent.parent, "/usr/local/cuda"]
    for home in map(Path, filter(None, homes)):
        if (home / "bin" / "nvcc").exists() and static_runtime(home) is not None:
            return home.resolve()
    if wanted == "1":
        raise RuntimeError("[setup] FERRUM_CUDA=1: expected a CUDA toolkit (CUDA_HOME, or nvcc on PATH), found none")
    return None


def static_runtime(home: Path) -> Path | None:
    candidates = (home / folder / "libcudart_static.a" for folder in ("lib64", "lib", "targets/x86_64-linux/lib"))
    return next((path for path in candidates if path.exists()), None)


def cuda_flags(archs: list[str], ptx: bool) -> list[str]:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"] if ptx else []
    optimise = ["-O0", "-g", "-G"] if DEBUG else ["-O3"]
    # The report of registers and spills is kept beside the object: tests/cuda reads it.
    report = ["-Xptxas=-v"]
    host = ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "--diag-suppress=20012"]
    return ["-std=c++17", "-DUSE_CUDA", *ABI_FLAGS, *optimise, *report, *targets, *host]


class Build(BuildExtension):
    """torch's build of C++, with the CUDA sources compiled before it.

    torch's own rules for .cu files want a torch with CUDA; ours do not.
    """

    def build_extension(self, ext):
        home = cuda_home()
        if home is not None:
            ext.extra_objects += self.cuda_objects(home)
            ext.extra_link_args += [str(static_runtime(home)), "-ldl", "-lrt", "-lpthread"]
        super().build_extension(ext)

    def cuda_objects(self, home: Path) -> list[str]:
        folder = ROOT / "build" / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        chosen = os.environ.get("FERRUM_CUDA_ARCHS", "").split()
        includes = [f"-I{path}" for path in ("csrc", *include_paths())]
        flags = [*cuda_flags(chosen or list(CUDA_ARCHS), ptx=not chosen), *includes]
        ccache = "ccache " if shutil.which("ccache") else ""
        lines = [
            f"builddir = {folder}",
            "rule nvcc",
            f"  command = {ccache}{home}/bin/nvcc {' '.join(flags)} -MD -MF $out.d -c $in -o $out > $out.log 2>&1"
            " || (cat $out.log; exit 1)",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = []
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            objects.append(str(folder / f"{source.stem}.o"))
            lines.append(f"build {objects[-1]}: nvcc {source.relative_to(ROOT)}")
        rules = folder / "build.ninja"
        rules.write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(["ninja", "--quiet", "-f", str(rules), *jobs], cwd=ROOT, check=True)
        return objects


def extension() -> CppExtension:
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    # A torch with CUDA has its CUDA symbols (the weak one of csrc/cuda/launch.h) behind libtorch.so, which nothing else
    # asks for: many linkers leave such a library out unless told not to before its name.
    needed = "-Wl,--push-state,--no-as-needed,-ltorch,--pop-state"
    link = [] if platform.system() == "Darwin" else [needed, "-Wl,--exclude-libs,ALL"]
    return CppExtension(
        "ferrum_ops._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=link,
        py_limited_api=True,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
