"""onnxruntime's CPU kernels: QMoE and MatMulNBits, int4 with one scale per 128 channels, int8 accumulation.

Operator definitions: onnxruntime's ContribOperators (domain com.microsoft). All sessions share one thread pool.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np
import torch

from benchmarks.peers.interface import Call, Int4Matrix, MoeWeights

#: MatMulNBits' and QMoE's: 4 allows int8 activations, 0 keeps them.
ACCURACY_LEVEL = 4

#: Router logit of an expert that must not be chosen.
NOT_CHOSEN = -1e4


@functools.cache
def _shared_pool() -> None:
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)


def _serialize(op: str, inputs: list[str], initializers: dict[str, np.ndarray], attributes: dict[str, Any]) -> bytes:
    """A model of one node with float32 inputs, those of `inputs` that are no initializers, and the output "y"."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)
    free = [name for name in inputs if name and name not in initializers]
    graph = helper.make_graph(
        [node],
        "block",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", None]) for name in free],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", None])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _session(model: bytes) -> Any:
    import onnxruntime

    _shared_pool()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _bind(session: Any, feeds: dict[str, torch.Tensor]) -> Call:
    arrays = {name: np.ascontiguousarray(t.numpy()) for name, t in feeds.items()}
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


class QMoe:
    """Gate and up as one matrix with their rows in turns ("swiglu_fusion" 1)."""

    def __init__(self, weights: MoeWeights) -> None:
        shape = weights.shape
        self.weights = weights

        def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return torch.stack([gate, up], dim=1).flatten(0, 1)

        pairs = list(zip(weights.gate, weights.up))
        initializers = {
            "w13": [interleave(g.two_per_byte(), u.two_per_byte()) for g, u in pairs],
            "w13_scales": [interleave(g.scales.float(), u.scales.float()) for g, u in pairs],
            "w2": [d.two_per_byte() for d in weights.down],
            "w2_scales": [d.scales.float() for d in weights.down],
        }
        self.expert_nbytes = sum(tensors[0].nbytes for tensors in initializers.values())
        attributes = dict(
            k=shape.top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=1,
            expert_weight_bits=4,
            block_size=shape.group_size,
            accuracy_level=ACCURACY_LEVEL,
        )
        stacked = {name: weights.stack(tensors).numpy() for name, tensors in initializers.items()}
        inputs = ["hidden", "router", "w13", "w13_scales", "", "w2", "w2_scales"]
        self.session = _session(_serialize("QMoE", inputs, stacked, attributes))

    def bind(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        # The op routes for itself: with these logits its softmax over the chosen gives the weights.
        router = torch.full((hidden.shape[0], self.weights.shape.experts), NOT_CHOSEN)
        router.scatter_(1, ids.long(), weights.log())
        return _bind(self.session, {"hidden": hidden, "router": router})

    def expert(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        i = index % len(self.weights.gate)
        return self.weights.gate[i].dense(), self.weights.up[i].dense(), self.weights.down[i].dense()


class MatMulNBits:
    def __init__(self, matrix: Int4Matrix) -> None:
        self.matrix = matrix
        out_features, in_features = matrix.codes.shape
        blocks = matrix.two_per_byte().view(out_features, -1, matrix.group_size // 2)
        initializers = {"w": blocks.numpy(), "scales": matrix.scales.float().numpy()}
        self.nbytes = sum(array.nbytes for array in initializers.values())
        attributes = dict(
            K=in_features, N=out_features, bits=4, block_size=matrix.group_size, accuracy_level=ACCURACY_LEVEL
        )
        self.session = _session(_serialize("MatMulNBits", ["x", "w", "scales"], initializers, attributes))

    def bind(self, x: torch.Tensor) -> Call:
        return _bind(self.session, {"x": x})

    def dense(self) -> torch.Tensor:
        return self.matrix.dense()


class OnnxRuntime:
    name = "onnxruntime"
    bound = 3e-2

    def available(self) -> str | None:
        missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    moe_block = QMoe
    linear = MatMulNBits


PEERS = (OnnxRuntime(),)
