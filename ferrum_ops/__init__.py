"""Ferrum's ops: `torch.ops.ferrum.*` and the functions that document them."""

from ferrum_ops._library import CPU_ISA_LEVELS, OPS, backends, cpu_isa, use_cpu_isa
from ferrum_ops.ops.gptq import gptq_dequantize

__all__ = ["CPU_ISA_LEVELS", "OPS", "backends", "cpu_isa", "gptq_dequantize", "use_cpu_isa"]
