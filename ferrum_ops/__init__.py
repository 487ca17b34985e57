"""Ferrum's ops: `torch.ops.ferrum.*` and the functions that document them."""

from ferrum_ops._library import CPU_ISA_LEVELS, OPS, backends, cpu_isa, use_cpu_isa

__all__ = ["CPU_ISA_LEVELS", "OPS", "backends", "cpu_isa", "use_cpu_isa"]
