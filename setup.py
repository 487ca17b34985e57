"""Build of `ferrum_ops._C`: one shared library on PyTorch's stable ABI, for every torch >= 2.10 and Python >= 3.10.

FERRUM_NATIVE_DEBUG=1 builds with -O0 -g.
"""

import os
import platform
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
DEBUG = os.environ.get("FERRUM_NATIVE_DEBUG", "0") == "1"
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


def extension() -> CppExtension:
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    link = [] if platform.system() == "Darwin" else ["-Wl,--no-as-needed", "-Wl,--exclude-libs,ALL"]
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
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
