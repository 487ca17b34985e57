"""The tests of tests/emulation and tests/triton that take the `kernel` fixture, on the device."""

import importlib
import importlib.util
import inspect

EMULATED = (
    "activation",
    "elementwise",
    "kv_cache",
    "marlin",
    "marlin_layout",
    "marlin_wgmma",
    "moe_gemm",
    "norm",
    "rope",
)
MODULES = {family: f"tests.emulation.test_{family}" for family in EMULATED}
if importlib.util.find_spec("triton") is not None:
    MODULES["attention"] = "tests.triton.test_attention"

for family, module in MODULES.items():
    for name, function in vars(importlib.import_module(module)).items():
        if name.startswith("test_") and "kernel" in inspect.signature(function).parameters:
            globals()[f"{name}_of_{family}"] = function
