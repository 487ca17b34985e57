"""Modules that hold quantised weights: linears in their layouts, a concatenation of linears, and packed experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ferrum_ops
from ferrum_models.moe.weights import ExpertWeights
from ferrum_models.quantization.marlin import MarlinShape
from ferrum_ops.formats import int4, int8


class _FormatModule(nn.Module):
    """Buffers are a storage format: `.to(dtype)`, `.half()` and friends move them but never convert them."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class _KernelModule(_FormatModule):
    """Also holds constants of its kernels, such as a workspace: buffers that no checkpoint has, made for a device."""

    def make_constants(self, device: torch.device) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def prepare(self) -> None:
        """Make the constants for the device of the other buffers. Called after loading and after every move."""
        device = next(t.device for name, t in self.named_buffers() if name not in self._non_persistent_buffers_set)
        for name, tensor in self.make_constants(device).items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if any(self._buffers[name] is not None for name in self._non_persistent_buffers_set):
            self.prepare()
        return self

    def constant(self, name: str) -> torch.Tensor:
        if self._buffers[name] is None:
            self.prepare()
        tensor = self._buffers[name]
        assert tensor is not None
        return tensor


class MarlinLinear(_KernelModule):
    """`x @ W + bias` with W in the Marlin layout, sizes padded to whole tiles.

    `packed` int32 [R/16, C*bits/2], `scales` [G, C], `zeros` int32 [G, C*bits/32] or None (zero point 2**(bits-1)),
    `perm` int32 [R] or None, `bias` [N] or None; R >= K packed rows, C >= N columns.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    bias: torch.Tensor | None

    layout = "marlin"

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        *,
        shape: MarlinShape,
        out_features: int,
        reduction: str,
        max_sms: int,
    ) -> None:
        super().__init__()
        for name in ("packed", "scales", "zeros", "perm", "bias"):
            self.register_buffer(name, tensors.get(name))
        self.register_buffer("workspace", None, persistent=False)
        self.shape, self.out_features = shape, out_features
        self.reduction, self.max_sms = reduction, max_sms

    def make_constants(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {"workspace": ferrum_ops.marlin_workspace(device)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ferrum_ops.marlin_gemm(
            x,
            self.packed,
            self.scales,
            self.zeros,
            self.perm,
            self.bias,
            self.constant("workspace"),
            self.out_features,
            self.shape.group_size,
            self.shape.bits,
            self.reduction,
            self.max_sms,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.shape.in_features}, out_features={self.out_features}, bits={self.shape.bits}, "
            f"group_size={self.shape.group_size}, zeros={self.zeros is not None}, perm={self.perm is not None}"
        )


class Int4Linear(_FormatModule):
    """`x @ W + bias` with W in the CPU layout of `ferrum_ops.int4_pack`.

    `packed` uint8 [N_pad/16, K_packed/8, 64], `scales` float16 [N_pad/16, G, 16], `zeros` uint8 like the scales or None
    (zero point 8), `perm` int32 [K_packed] or None, `bias` [N] or None.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    bias: torch.Tensor | None

    layout = "int4_cpu"
    op = "int4_linear"

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        perm: torch.Tensor | None,
        bias: torch.Tensor | None,
        *,
        in_features: int,
        out_features: int,
        group_size: int,
        activation: str,
    ) -> None:
        super().__init__()
        for name, tensor in (
            ("packed", packed),
            ("scales", scales),
            ("zeros", zeros),
            ("perm", perm),
            ("bias", bias),
        ):
            self.register_buffer(name, tensor)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.activation = activation

    @property
    def tensors(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """packed, scales, zeros, perm and bias."""
        buffers: dict[str, Any] = self._buffers  # attributes of a module are looked up in three places
        return buffers["packed"], buffers["scales"], buffers["zeros"], buffers["perm"], buffers["bias"]

    @property
    def op_weights(self) -> tuple[Any, ...]:
        """What an op that knows the number of columns takes of this matrix."""
        return *self.tensors, self.group_size

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """What the op takes behind x."""
        return *self.tensors, self.out_features, self.group_size, self.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()  # the last rows of a batch are a slice
        return ferrum_ops.int4_linear(x, *self.op_arguments)

    def set_activation(self, name: str) -> None:
        self.activation = name

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"zeros={self.zeros is not None}, perm={self.perm is not None}, activation={self.activation}"
        )


class RoundedLinear(_FormatModule):
    """`x @ W + bias` with a dense W that was rounded to int8 or int4 while loading, in groups of 128. Saved dense.

    `packed` uint8 [N_pad/16, K_packed/8, 16 * bits], `scales` float16 [N_pad/16, G, 16], `bias` [N] or None.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    group_size = 128

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        bits: int,
        in_features: int,
        out_features: int,
        activation: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.bits, self.in_features, self.out_features = bits, in_features, out_features
        self.activation, self.dtype = activation, dtype

    @property
    def layout(self) -> str:
        return f"int{self.bits}_cpu"

    @property
    def op(self) -> str:
        return f"int{self.bits}_linear"

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """What the op takes behind x."""
        no_zeros_and_perm = (None, None) if self.bits == 4 else ()
        columns = (self.out_features, self.group_size, self.activation)
        return self.packed, self.scales, *no_zeros_and_perm, self.bias, *columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()  # the last rows of a batch are a slice
        return getattr(ferrum_ops, self.op)(x, *self.op_arguments)

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight `[N, K]`, for saving."""
        sizes = (self.in_features, self.out_features, self.group_size, torch.float32)
        if self.bits == 8:
            weight = int8.dequantize(self.packed, self.scales, *sizes)
        else:
            weight = int4.dequantize(self.packed, self.scales, None, None, *sizes)
        return weight.T.to(self.dtype).contiguous()

    def set_activation(self, name: str) -> None:
        self.activation = name

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"activation={self.activation}"
        )


#: Rows from which a product of dequantised weights beats gptq_gemm. On the CPU that is so for bfloat16 on a processor
#: with bfloat16 dot products. On CUDA, dequantising moves 4.5 bytes per 4-bit weight once more, what a dense product of
#: about 260 rows takes at an H200's rates, and gptq_gemm is slower than a dense product by less than half.
DENSE_BFLOAT16_ROWS = 32
DENSE_CUDA_ROWS = 512


def multiplies_words(rows: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether gptq_gemm is the faster way. Its reference, on a device without a kernel, multiplies in fp32."""
    if device_type == "cuda":
        return rows < DENSE_CUDA_ROWS
    return device_type == "cpu" and (dtype != torch.bfloat16 or rows < DENSE_BFLOAT16_ROWS)


class GptqLinear(_FormatModule):
    """`x @ W + bias` with W as on disk: on request, and where there is no packed kernel.

    Multiplied by `gptq_gemm` where that is faster, else dequantised to x's dtype at every call.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None

    layout = "gptq"

    def __init__(
        self,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        bits: int,
        zero_offset: int,
    ) -> None:
        super().__init__()
        for name, tensor in (
            ("qweight", qweight), ("qzeros", qzeros), ("scales", scales), ("g_idx", g_idx), ("bias", bias)
        ):  # fmt: skip
            self.register_buffer(name, tensor)
        self.in_features, self.out_features = g_idx.shape[0], qweight.shape[1]
        self.bits, self.zero_offset = bits, zero_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if multiplies_words(x.numel() // max(self.in_features, 1), x.dtype, x.device.type):
            return ferrum_ops.gptq_gemm(
                x, self.qweight, self.qzeros, self.scales, self.g_idx, self.bias, self.bits, self.zero_offset
            )
        weight = ferrum_ops.gptq_dequantize(
            self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, self.zero_offset, x.dtype
        )
        y = x @ weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class ConcatLinear(nn.Module):
    """Linears of one input, outputs side by side: a fused projection whose parts cannot share one packing."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class DenseLinear(nn.Linear):
    """nn.Linear, spelt out: what a projection that is not packed becomes (dequantised or never quantised)."""

    layout = "dense"


class PackedExperts(_KernelModule):
    """Any packed layout of `ferrum_models.moe.weights` as a module: its tensors are buffers of the same names."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self._layout_class = type(weights)
        self._values = {name: getattr(weights, name) for name in weights.value_fields}
        for name, tensor in zip(weights.tensor_fields, weights.tensors()):
            constant = name in weights.constant_fields
            self.register_buffer(name, None if constant else tensor, persistent=not constant)

    @property
    def layout(self) -> str:
        return self._layout_class.layout

    def make_constants(self, device: torch.device) -> dict[str, torch.Tensor]:
        return self._layout_class.make_constants(self._values, device)

    @property
    def weights(self) -> ExpertWeights:
        for name in self._layout_class.constant_fields:
            self.constant(name)
        buffers = {name: self._buffers[name] for name in self._layout_class.tensor_fields}
        return self._layout_class(**buffers, **self._values)

    def set_activation(self, name: str) -> None:
        if "activation" in self._values:
            self._values["activation"] = name

    def extra_repr(self) -> str:
        shapes = {name: tuple(t.shape) for name, t in self._buffers.items() if t is not None}
        return f"layout={self.layout}, {self._values}, {shapes}"


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without data, for building a module that is loaded afterwards."""
    return torch.empty(shape, dtype=dtype, device="meta")
