"""The tests of tests/emulation that take the `kernel` fixture, on the device."""

import importlib
import inspect

for family in ("activation", "elementwise", "kv_cache", "marlin", "moe_gemm", "norm", "rope"):
    for name, function in vars(importlib.import_module(f"tests.emulation.test_{family}")).items():
        if name.startswith("test_") and "kernel" in inspect.signature(function).parameters:
            globals()[f"{name}_of_{family}"] = function
