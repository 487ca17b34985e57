"""CUDA kernels in Triton, compiled where and when they first run. Importing this imports no Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from ferrum_ops._library import register_kernel

#: The module of each op's launcher, which is the function of the op's name there.
KERNELS = {
    "attention": "ferrum_ops.triton.attention",
    "gptq_dequantize": "ferrum_ops.triton.gptq",
    "gptq_gemm": "ferrum_ops.triton.gptq",
    "gptq_moe_gemm": "ferrum_ops.triton.moe_gemm",
    "paged_attention": "ferrum_ops.triton.attention",
}


def attach() -> None:
    """Register the launchers for CUDA tensors where Triton is installed; elsewhere the references serve the ops."""
    if importlib.util.find_spec("triton") is not None:
        for op, module in KERNELS.items():
            register_kernel(op, "CUDA", _imported_when_called(op, module))


def _imported_when_called(op: str, module: str) -> Callable[..., Any]:
    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), op)

    def kernel(*args: Any) -> Any:
        return launcher()(*args)

    return kernel
