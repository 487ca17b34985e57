"""The few functions of ggml's C interface that the benchmarks call, from the libraries inside llama-cpp-python."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

# enum ggml_type; the values are part of the GGUF format.
F32, Q4_0, Q8_0, Q4_K, Q6_K, I32 = 0, 2, 8, 12, 14, 26
TYPES = {"Q4_0": Q4_0, "Q8_0": Q8_0, "Q4_K": Q4_K, "Q6_K": Q6_K}

#: Nodes and leaves a graph has room for.
GRAPH_SIZE = 128

_pointer, _int, _int64, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t


class _InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [("mem_size", _size), ("mem_buffer", _pointer), ("no_alloc", ctypes.c_bool)]


_LogCallback = ctypes.CFUNCTYPE(None, _int, ctypes.c_char_p, _pointer)
_silent = _LogCallback(lambda level, text, data: None)  # kept here: ggml calls it for as long as the process lives

_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "ggml_init": (_pointer, [_InitParams]),
    "ggml_free": (None, [_pointer]),
    "ggml_log_set": (None, [_LogCallback, _pointer]),
    "ggml_tensor_overhead": (_size, []),
    "ggml_graph_overhead_custom": (_size, [_size, ctypes.c_bool]),
    "ggml_new_graph_custom": (_pointer, [_pointer, _size, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_pointer, _pointer]),
    "ggml_new_tensor": (_pointer, [_pointer, _int, _int, ctypes.POINTER(_int64)]),
    "ggml_set_input": (None, [_pointer]),
    "ggml_set_output": (None, [_pointer]),
    "ggml_nbytes": (_size, [_pointer]),
    "ggml_row_size": (_size, [_int, _int64]),
    "ggml_quantize_chunk": (_size, [_int, _pointer, _pointer, _int64, _int64, _int64, _pointer]),
    "ggml_mul_mat": (_pointer, [_pointer] * 3),
    "ggml_mul_mat_id": (_pointer, [_pointer] * 4),
    "ggml_swiglu_split": (_pointer, [_pointer] * 3),
    "ggml_mul": (_pointer, [_pointer] * 3),
    "ggml_add": (_pointer, [_pointer] * 3),
    "ggml_view_2d": (_pointer, [_pointer, _pointer, _int64, _int64, _size, _size]),
    "ggml_cont": (_pointer, [_pointer, _pointer]),
    "ggml_backend_cpu_init": (_pointer, []),
    "ggml_backend_cpu_set_n_threads": (None, [_pointer, _int]),
    "ggml_backend_cpu_buffer_type": (_pointer, []),
    "ggml_backend_get_device": (_pointer, [_pointer]),
    "ggml_backend_dev_backend_reg": (_pointer, [_pointer]),
    "ggml_backend_reg_get_proc_address": (_pointer, [_pointer, ctypes.c_char_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_pointer, [_pointer, _pointer]),
    "ggml_backend_buffer_free": (None, [_pointer]),
    "ggml_backend_tensor_set": (None, [_pointer, _pointer, _size, _size]),
    "ggml_backend_tensor_get": (None, [_pointer, _pointer, _size, _size]),
    "ggml_backend_graph_compute": (_int, [_pointer, _pointer]),
    "ggml_gallocr_new": (_pointer, [_pointer]),
    "ggml_gallocr_free": (None, [_pointer]),
    "ggml_gallocr_alloc_graph": (ctypes.c_bool, [_pointer, _pointer]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Every function above by name, from whichever of the libraries has it, loaded once per process."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    # By the names they know each other by: under another the loader would take them for other libraries.
    parts = [ctypes.CDLL(str(folder / f"lib{name}.so.0")) for name in ("ggml-base", "ggml-cpu", "ggml")]
    for name, (result, arguments) in _SIGNATURES.items():
        function = next(getattr(part, name) for part in parts if hasattr(part, name))
        function.restype, function.argtypes = result, arguments
        setattr(parts[-1], name, function)
    parts[-1].ggml_log_set(_silent, None)
    return parts[-1]


@functools.cache
def backend() -> int:
    cpu = library().ggml_backend_cpu_init()
    library().ggml_backend_cpu_set_n_threads(cpu, torch.get_num_threads())
    return cpu


@functools.cache
def repack_buffer_type() -> int | None:
    """The buffer that llama.cpp puts weights into by default, where they are laid out anew; None in builds without."""
    lib = library()
    device = lib.ggml_backend_get_device(backend())
    register = lib.ggml_backend_dev_backend_reg(device)
    address = lib.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_pointer), _pointer)(address)(device)
    return kinds[0] if kinds else None


def quantize(weight: torch.Tensor, kind: int) -> np.ndarray:
    """float `[..., N, K]` -> uint8 `[..., N, bytes of a row]`."""
    lib = library()
    rows = np.ascontiguousarray(weight.float().numpy())
    count, width = rows.size // rows.shape[-1], rows.shape[-1]
    out = np.empty((*rows.shape[:-1], lib.ggml_row_size(kind, width)), np.uint8)
    lib.ggml_quantize_chunk(kind, rows.ctypes.data, out.ctypes.data, 0, count, width, None)
    return out


def dequantize(packed: np.ndarray, kind: int) -> torch.Tensor:
    """Inverse of `quantize`, float64, by the gguf package's formulas."""
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType(kind))).double()


class Context:
    """A ggml context whose tensors get their memory later. Freed with the object, and their buffer with it."""

    def __init__(self) -> None:
        lib = library()
        size = GRAPH_SIZE * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(GRAPH_SIZE, False)
        self.pointer = lib.ggml_init(_InitParams(size, None, True))
        self.buffer: int | None = None

    def tensor(self, kind: int, *shape: int) -> int:
        """Sizes in ggml's order: the contiguous dimension first."""
        return library().ggml_new_tensor(self.pointer, kind, len(shape), (_int64 * len(shape))(*shape))

    def allocate(self, buffer_type: int) -> None:
        self.buffer = library().ggml_backend_alloc_ctx_tensors_from_buft(self.pointer, buffer_type)
        if not self.buffer:
            raise MemoryError("ggml: no buffer for the tensors")

    def __del__(self) -> None:
        if self.buffer:
            library().ggml_backend_buffer_free(self.buffer)
        library().ggml_free(self.pointer)


def weights(arrays: Sequence[tuple[np.ndarray, int, int]], repack: bool) -> tuple[Context, list[int]]:
    """Tensors of packed rows, given as (uint8 `[..., N, bytes]`, type, K), in one buffer."""
    lib, context = library(), Context()
    tensors = [context.tensor(kind, width, *packed.shape[-2::-1]) for packed, kind, width in arrays]
    buffer_type = repack_buffer_type() if repack else lib.ggml_backend_cpu_buffer_type()
    context.allocate(buffer_type)
    for tensor, (packed, _, _) in zip(tensors, arrays):
        contiguous = np.ascontiguousarray(packed)
        lib.ggml_backend_tensor_set(tensor, contiguous.ctypes.data, 0, contiguous.nbytes)
    return context, tensors


class Graph(Context):
    """One computation with inputs and a result `[rows, columns]` in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = library().ggml_new_graph_custom(self.pointer, GRAPH_SIZE, False)
        self.allocator = library().ggml_gallocr_new(library().ggml_backend_cpu_buffer_type())
        self.result: int | None = None

    def input(self, kind: int, *shape: int) -> int:
        tensor = self.tensor(kind, *shape)
        library().ggml_set_input(tensor)
        return tensor

    def finish(self, result: int, rows: int, columns: int) -> None:
        lib = library()
        self.result, self.shape = result, (rows, columns)
        lib.ggml_set_output(result)
        lib.ggml_build_forward_expand(self.graph, result)
        if not lib.ggml_gallocr_alloc_graph(self.allocator, self.graph):
            raise MemoryError("ggml: no buffer for the graph")

    def compute(self, inputs: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
        lib = library()
        for tensor, values in inputs:
            lib.ggml_backend_tensor_set(tensor, values.data_ptr(), 0, values.nbytes)
        status = lib.ggml_backend_graph_compute(backend(), self.graph)
        if status:
            raise RuntimeError(f"ggml: computing the graph failed with status {status}")
        out = torch.empty(self.shape)
        lib.ggml_backend_tensor_get(self.result, out.data_ptr(), 0, out.nbytes)
        return out

    def __del__(self) -> None:
        library().ggml_gallocr_free(self.allocator)
        super().__del__()
