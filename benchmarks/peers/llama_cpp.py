"""llama.cpp's CPU kernels through ggml: the graph it builds for a routed block, and its matrix product.

Every format is timed in both of the layouts llama.cpp has: as in the file, and repacked, its default where a CPU has
kernels for that.
"""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import torch

from benchmarks.peers import ggml
from benchmarks.peers.interface import Call, Int4Matrix, MoeWeights


@functools.lru_cache(maxsize=64)
def quantized(matrix: Int4Matrix, kind: int) -> np.ndarray:
    """Kept for the next layer of the same weights: the K-quants search for their scales."""
    return ggml.quantize(matrix.dense(torch.float32), kind)


class GgmlMoeBlock:
    """The nodes of llama.cpp's build_moe_ffn behind the router."""

    def __init__(self, weights: MoeWeights, kind: int, repack: bool) -> None:
        self.shape, self.kind = weights.shape, kind
        self.packed = {name: [quantized(m, kind) for m in getattr(weights, name)] for name in ("gate", "up", "down")}
        self.expert_nbytes = sum(arrays[0].nbytes for arrays in self.packed.values())
        inputs = {"gate": self.shape.hidden, "up": self.shape.hidden, "down": self.shape.width}
        arrays = [
            (weights.stack([torch.from_numpy(a) for a in self.packed[name]]).numpy(), kind, width)
            for name, width in inputs.items()
        ]
        self.context, self.tensors = ggml.weights(arrays, repack)
        self.graphs: dict[int, tuple[ggml.Graph, tuple[int, int, int]]] = {}

    def graph(self, rows: int) -> tuple[ggml.Graph, tuple[int, int, int]]:
        """The graph for a number of rows and its inputs. Only the latest is kept: its buffers are large."""
        if rows not in self.graphs:
            self.graphs = {rows: self._build(rows)}
        return self.graphs[rows]

    def _build(self, rows: int) -> tuple[ggml.Graph, tuple[int, int, int]]:
        lib, graph = ggml.library(), ggml.Graph()
        hidden, top_k = self.shape.hidden, self.shape.top_k
        gate, up, down = self.tensors
        x = graph.input(ggml.F32, hidden, 1, rows)
        ids = graph.input(ggml.I32, top_k, rows)
        router = graph.input(ggml.F32, 1, top_k, rows)
        context = graph.pointer
        activated = lib.ggml_swiglu_split(
            context, lib.ggml_mul_mat_id(context, gate, x, ids), lib.ggml_mul_mat_id(context, up, x, ids)
        )
        slots = lib.ggml_mul(context, lib.ggml_mul_mat_id(context, down, activated, ids), router)
        row = 4 * hidden  # bytes
        views = [lib.ggml_view_2d(context, slots, hidden, rows, top_k * row, k * row) for k in range(top_k)]
        total = lib.ggml_cont(context, views[0]) if top_k == 1 else views[0]
        for view in views[1:]:
            total = lib.ggml_add(context, total, view)
        graph.finish(total, rows, hidden)
        return graph, (x, ids, router)

    def bind(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        graph, inputs = self.graph(hidden.shape[0])
        values = list(zip(inputs, (t.contiguous() for t in (hidden, ids, weights))))
        return lambda: graph.compute(values)

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up, down = (
            ggml.dequantize(self.packed[name][index % len(self.packed[name])], self.kind)
            for name in ("gate", "up", "down")
        )
        return gate, up, down


class GgmlLinear:
    def __init__(self, matrix: Int4Matrix, kind: int, repack: bool) -> None:
        self.kind = kind
        self.out_features, self.in_features = matrix.codes.shape
        self.packed = quantized(matrix, kind)
        self.nbytes = self.packed.nbytes
        self.context, (self.tensor,) = ggml.weights([(self.packed, kind, self.in_features)], repack)
        self.graphs: dict[int, tuple[ggml.Graph, int]] = {}

    def graph(self, rows: int) -> tuple[ggml.Graph, int]:
        if rows not in self.graphs:
            graph = ggml.Graph()
            x = graph.input(ggml.F32, self.in_features, rows)
            graph.finish(ggml.library().ggml_mul_mat(graph.pointer, self.tensor, x), rows, self.out_features)
            self.graphs = {rows: (graph, x)}
        return self.graphs[rows]

    def bind(self, x: torch.Tensor) -> Call:
        graph, tensor = self.graph(x.shape[0])
        values = [(tensor, x.contiguous())]
        return lambda: graph.compute(values)

    def dense(self) -> torch.Tensor:
        return ggml.dequantize(self.packed, self.kind)


class LlamaCpp:
    bound = 4e-2

    def __init__(self, kind: str, repack: bool) -> None:
        self.kind, self.repack = ggml.TYPES[kind], repack
        self.name = f"llama.cpp {kind}" + (" repacked" if repack else "")

    def available(self) -> str | None:
        missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.repack and ggml.repack_buffer_type() is None:
            return "this build does not repack"
        return None

    def moe_block(self, weights: MoeWeights) -> GgmlMoeBlock:
        return GgmlMoeBlock(weights, self.kind, self.repack)

    def linear(self, matrix: Int4Matrix) -> GgmlLinear:
        return GgmlLinear(matrix, self.kind, self.repack)


PEERS = tuple(LlamaCpp(kind, repack) for kind in ("Q4_K", "Q4_0") for repack in (True, False))
