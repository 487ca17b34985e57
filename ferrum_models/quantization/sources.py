"""One linear layer as a checkpoint stores it: dense, GPTQ, or dense to be rounded to int4 while loading.

A source validates its tensors when it is made and reads their data only when asked.
K in features, N out features, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

import ferrum_ops
from ferrum_models import huge_pages
from ferrum_models.checkpoint import Checkpoint, CheckpointError
from ferrum_models.quantization.layout import cpu_group_size
from ferrum_models.quantization.settings import GptqSettings
from ferrum_ops.formats import gptq, int4, int8

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class SavedLinear:
    """What must be known, beside the packed tensors, to write a linear back as it was."""

    name: str
    in_features: int
    out_features: int
    group_size: int  # of packed rows: the longest group
    groups: int
    checkpoint_format: str
    has_g_idx: bool
    scales_dtype: torch.dtype
    zero_bias: torch.dtype | None  # a bias of zeros that was on disk and is not kept in memory


@dataclass(frozen=True)
class Int4Tensors:
    packed: torch.Tensor  # uint8 [N_pad/16, K_packed/8, 64]
    scales: torch.Tensor  # float16 [N_pad/16, G, 16]
    zeros: torch.Tensor | None  # uint8 like the scales


class LinearSource(ABC):
    """A linear `name` of K in and N out features."""

    def __init__(self, checkpoint: Checkpoint, name: str, in_features: int, out_features: int) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.in_features, self.out_features = in_features, out_features
        self.tensor_names: list[str] = []
        self.bias_name: str | None = None
        self.zero_bias: torch.dtype | None = None
        if (bias := f"{name}.bias") in checkpoint:
            checkpoint.expect(bias, (out_features,), FLOATS)
            self.tensor_names.append(bias)
            # Some GPTQ writers store a bias of zeros for layers that have none.
            with checkpoint.mapped(bias) as values:
                if bool(values.any()):
                    self.bias_name = bias
                else:
                    self.zero_bias = values.dtype

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias_name is None else self.checkpoint.read(self.bias_name).to(dtype)

    @abstractmethod
    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight `[N, K]`."""


class DenseSource(LinearSource):
    def __init__(self, checkpoint: Checkpoint, name: str, in_features: int, out_features: int) -> None:
        super().__init__(checkpoint, name, in_features, out_features)
        checkpoint.expect(f"{name}.weight", (out_features, in_features), FLOATS)
        self.tensor_names.append(f"{name}.weight")

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self.checkpoint.read(f"{self.name}.weight").to(dtype)

    def rounded(self, bits: int, group_size: int) -> dict[str, torch.Tensor]:
        """`packed` and `scales` of `RoundedLinear`. Rounded a run of columns at a time: a head is large."""
        columns = max(16, (1 << 20) // self.in_features // 16 * 16)  # 4 MB in fp32, which malloc uses again
        parts = []
        with self.checkpoint.mapped(f"{self.name}.weight") as weight:
            for part in weight.split(columns):
                if bits == 8:
                    codes, scales = int8.quantize_rtn(part, group_size)
                    packed = int8.pack(codes)
                else:
                    codes, scales = int4.quantize_rtn(part, group_size)
                    words = gptq.pack_rows(F.pad(codes, (0, 0, 0, -self.in_features % 8)), 4)
                    packed = ferrum_ops.int4_pack(words, None, self.in_features)
                parts.append((packed, int4.pack_groups(scales)))
        return {"packed": huge_pages.cat([p for p, _ in parts]), "scales": torch.cat([s for _, s in parts])}


class QuantizedSource(LinearSource):
    """What GPTQ weights and weights rounded at load have in common."""

    bits: int
    group_size: int  # rows of packed order per group
    groups: int
    asymmetric: bool
    perm: torch.Tensor | None  # int32 [G * group_size]: the input channel of each packed row, -1 for padding
    scales_dtype: torch.dtype
    zero_offset: int  # 1: qzeros hold zero - 1

    @property
    def grouping(self) -> int:
        """Rows of a full group in packed order; -1 for a single group."""
        return self.group_size if self.groups > 1 else -1

    @property
    @abstractmethod
    def saved(self) -> SavedLinear: ...

    @abstractmethod
    def shapes(self) -> Shapes:
        """Shape and dtype of each tensor of the on-disk layout; g_idx always among them."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the tensors that `shapes` describes."""

    @abstractmethod
    def codes(self, device: torch.device, with_zeros: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Copies on `device`: qweight int32 `[K*bits/32, N]`, scales `[G, N]`, and zero points uint8 `[G, N]`."""

    @abstractmethod
    def int4(self, perm: torch.Tensor | None, group_size: int, with_zeros: bool) -> Int4Tensors:
        """Packed for the CPU in the row order `perm`, one scale for `group_size` rows."""

    def tile(self, per_group: torch.Tensor, group_size: int, perm: torch.Tensor | None) -> torch.Tensor:
        """`[G, N]` of the checkpoint's groups -> `[N_pad/16, G', 16]` of the kernel's."""
        rows = self.in_features if perm is None else perm.shape[0]
        return int4.pack_groups(int4.repeat_groups(per_group, self.group_size, group_size, rows))


class GptqSource(QuantizedSource):
    """GPTQ tensors on disk; layouts and the meaning of every tensor in `ferrum_ops.formats.gptq`."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, in_features: int, out_features: int, settings: GptqSettings
    ) -> None:
        super().__init__(checkpoint, name, in_features, out_features)
        module = settings.for_module(name)
        self.bits, self.checkpoint_format = module.bits, module.checkpoint_format
        self.zero_offset = gptq.zero_offset_of(module.checkpoint_format)
        self.group_size = gptq.effective_group_size(in_features, module.group_size)
        self.groups = gptq.num_groups(in_features, module.group_size)
        if in_features % (32 if self.bits == 3 else 32 // self.bits):
            raise CheckpointError(
                checkpoint.file_of(f"{name}.qweight"),
                f"{name}.qweight",
                f"in-features that fill whole 32-bit words of {self.bits}-bit values",
                str(in_features),
            )
        int32 = (torch.int32,)
        checkpoint.expect(f"{name}.qweight", (in_features * self.bits // 32, out_features), int32)
        checkpoint.expect(f"{name}.qzeros", (self.groups, gptq.packed_columns(out_features, self.bits)), int32)
        self.scales_dtype = checkpoint.expect(f"{name}.scales", (self.groups, out_features), FLOATS).dtype
        self.tensor_names += [f"{name}.{part}" for part in ("qweight", "qzeros", "scales")]
        self.has_g_idx = f"{name}.g_idx" in checkpoint
        self.perm = self._read_perm()
        self.asymmetric = not self._usual_zeros() and bool((self.zeros() != 1 << (self.bits - 1)).any())

    def g_idx(self) -> torch.Tensor:
        """int32 [K]: the group of each row, as on disk or in order."""
        if self.has_g_idx:
            return self.checkpoint.read(f"{self.name}.g_idx")
        return torch.arange(self.in_features, dtype=torch.int32) // self.group_size

    def _read_perm(self) -> torch.Tensor | None:
        if not self.has_g_idx:
            return None
        tensor = f"{self.name}.g_idx"
        entry = self.checkpoint.expect(tensor, (self.in_features,), (torch.int32,))
        self.tensor_names.append(tensor)
        if self.checkpoint.holds(tensor, _rows_in_order(self.in_features, self.group_size)):
            return None
        g_idx = self.g_idx()
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= self.groups:
            raise CheckpointError(entry.file, tensor, f"groups in [0, {self.groups})", f"[{low}, {high}]")
        perm = gptq.sort_groups(g_idx, self.in_features, self.group_size)
        if perm is not None:  # groups of unequal length are padded to the longest
            self.group_size = perm.shape[0] // self.groups
        return perm

    def _usual_zeros(self) -> bool:
        """Whether qzeros are what writers store for symmetric weights. False says nothing: padding may differ."""
        usual = _symmetric_zeros(self.groups, self.out_features, self.bits, self.checkpoint_format)
        return self.checkpoint.holds(f"{self.name}.qzeros", usual)

    def zeros(self) -> torch.Tensor:
        """uint8 [G, N]: the zero points."""
        with self.checkpoint.mapped(f"{self.name}.qzeros") as qzeros:
            return gptq.decode_zeros(qzeros, self.bits, self.out_features, self.checkpoint_format)

    def scales(self) -> torch.Tensor:
        return self.checkpoint.read(f"{self.name}.scales")

    def shapes(self) -> Shapes:
        parts = {part: self.checkpoint.entries[f"{self.name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        shapes = {part: (entry.shape, entry.dtype) for part, entry in parts.items()}
        return shapes | {"g_idx": ((self.in_features,), torch.int32)}

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {part: self.checkpoint.read(f"{self.name}.{part}") for part in ("qweight", "qzeros", "scales")}
        return parts | {"g_idx": self.g_idx()}

    def codes(self, device: torch.device, with_zeros: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with self.checkpoint.mapped(f"{self.name}.qweight") as words:
            qweight = words.to(device, copy=True)
        with self.checkpoint.mapped(f"{self.name}.scales") as values:
            scales = values.to(device, copy=True)
        return qweight, scales, self.zeros().to(device) if with_zeros else None

    @property
    def nbytes(self) -> int:
        return sum(self.checkpoint.entries[name].nbytes for name in self.tensor_names)

    @property
    def saved(self) -> SavedLinear:
        return SavedLinear(
            self.name,
            self.in_features,
            self.out_features,
            self.group_size,
            self.groups,
            self.checkpoint_format,
            self.has_g_idx,
            self.scales_dtype,
            self.zero_bias,
        )

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        with (
            self.checkpoint.mapped(f"{self.name}.qweight") as qweight,
            self.checkpoint.mapped(f"{self.name}.qzeros") as qzeros,
        ):
            dense = ferrum_ops.gptq_dequantize(
                qweight, qzeros, self.scales(), self.g_idx(), self.bits, self.zero_offset, dtype
            )
        return dense.T.contiguous()

    def int4(self, perm: torch.Tensor | None, group_size: int, with_zeros: bool) -> Int4Tensors:
        with self.checkpoint.mapped(f"{self.name}.qweight") as qweight:
            packed = ferrum_ops.int4_pack(qweight, perm, self.in_features)
        scales = self.tile(self._half_scales(), group_size, perm)
        return Int4Tensors(packed, scales, self.tile(self.zeros(), group_size, perm) if with_zeros else None)

    def _half_scales(self) -> torch.Tensor:
        scales = self.scales()
        half = scales.to(torch.float16)
        if not torch.equal(half.to(scales.dtype), scales):
            raise CheckpointError(
                self.checkpoint.file_of(f"{self.name}.scales"),
                f"{self.name}.scales",
                "scales that float16 can hold",
                f"{str(scales.dtype).removeprefix('torch.')} scales that it cannot",
            )
        return half


class RoundedSource(QuantizedSource):
    """Dense weights, rounded to symmetric int4 in groups of 128 while loading."""

    bits = 4
    group_size = 128
    asymmetric = False
    perm = None
    scales_dtype = torch.float16
    zero_offset = 1

    def __init__(self, checkpoint: Checkpoint, name: str, in_features: int, out_features: int) -> None:
        super().__init__(checkpoint, name, in_features, out_features)
        checkpoint.expect(f"{name}.weight", (out_features, in_features), FLOATS)
        self.tensor_names.append(f"{name}.weight")
        self.group_size = min(RoundedSource.group_size, in_features)
        self.groups = gptq.num_groups(in_features, self.group_size)

    @staticmethod
    def fits(in_features: int, out_features: int) -> bool:
        """Whether GPTQ's packing (and so saving) has room for these sizes: whole 32-bit words."""
        return in_features % 8 == 0 and out_features % 8 == 0

    @property
    def saved(self) -> SavedLinear:
        return SavedLinear(
            self.name,
            self.in_features,
            self.out_features,
            self.group_size,
            self.groups,
            checkpoint_format="gptq",
            has_g_idx=True,
            scales_dtype=self.scales_dtype,
            zero_bias=self.zero_bias,
        )

    def _codes_and_scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        with self.checkpoint.mapped(f"{self.name}.weight") as weight:
            return int4.quantize_rtn(weight, self.group_size)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        codes, scales = self._codes_and_scales()
        rows = torch.arange(self.in_features) // self.group_size
        return ((codes.float() - int4.SYMMETRIC_ZERO) * scales.float()[rows]).T.to(dtype).contiguous()

    def shapes(self) -> Shapes:
        columns, groups = self.out_features, self.groups
        return {
            "qweight": ((self.in_features * self.bits // 32, columns), torch.int32),
            "qzeros": ((groups, gptq.packed_columns(columns, self.bits)), torch.int32),
            "scales": ((groups, columns), self.scales_dtype),
            "g_idx": ((self.in_features,), torch.int32),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        qweight, scales, zeros = self.codes(torch.device("cpu"), True)
        assert zeros is not None
        g_idx = torch.arange(self.in_features, dtype=torch.int32) // self.group_size
        return {
            "qweight": qweight,
            "qzeros": gptq.encode_zeros(zeros, self.bits, "gptq"),
            "scales": scales,
            "g_idx": g_idx,
        }

    def codes(self, device: torch.device, with_zeros: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        codes, scales = self._codes_and_scales()
        zeros = torch.full(scales.shape, int4.SYMMETRIC_ZERO, dtype=torch.uint8) if with_zeros else None
        return (
            gptq.pack_rows(codes, self.bits).to(device),
            scales.to(device),
            None if zeros is None else zeros.to(device),
        )

    def int4(self, perm: torch.Tensor | None, group_size: int, with_zeros: bool) -> Int4Tensors:
        codes, scales = self._codes_and_scales()
        packed = ferrum_ops.int4_pack(gptq.pack_rows(codes, 4), perm, self.in_features)
        zeros = torch.full(scales.shape, int4.SYMMETRIC_ZERO, dtype=torch.uint8) if with_zeros else None
        return Int4Tensors(
            packed,
            self.tile(scales, group_size, perm),
            None if zeros is None else self.tile(zeros, group_size, perm),
        )


# Nearly every projection of a checkpoint has the same g_idx and qzeros, and there are tens of thousands: compared as
# bytes, so that only the others are decoded.


@lru_cache(maxsize=16)
def _rows_in_order(in_features: int, group_size: int) -> bytes:
    return _bytes(torch.arange(in_features, dtype=torch.int32) // group_size)


@lru_cache(maxsize=16)
def _symmetric_zeros(groups: int, out_features: int, bits: int, checkpoint_format: str) -> bytes:
    zeros = torch.full((groups, out_features), 1 << (bits - 1), dtype=torch.uint8)
    return _bytes(gptq.encode_zeros(zeros, bits, checkpoint_format))


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def find_source(
    checkpoint: Checkpoint,
    name: str,
    in_features: int,
    out_features: int,
    settings: GptqSettings | None,
    round_to_int4: bool,
) -> LinearSource:
    """The linear `name` by the tensors that exist.

    Raises CheckpointError when neither `name.qweight` nor `name.weight` exists, or when its tensors are wrong.
    """
    if f"{name}.qweight" in checkpoint:
        if settings is None:
            raise CheckpointError(
                checkpoint.file_of(f"{name}.qweight"),
                f"{name}.qweight",
                "a quantization_config in config.json or quantize_config.json",
                "neither",
            )
        return GptqSource(checkpoint, name, in_features, out_features, settings)
    if f"{name}.weight" not in checkpoint:
        raise CheckpointError(checkpoint.directory, name, f"{name}.weight or {name}.qweight", "no such tensor")
    if round_to_int4 and RoundedSource.fits(in_features, out_features):
        return RoundedSource(checkpoint, name, in_features, out_features)
    return DenseSource(checkpoint, name, in_features, out_features)


def common_group_size(sources: list[QuantizedSource]) -> int | None:
    """One group size of the CPU layout for linears packed together, or None if there is none."""
    return cpu_group_size(tuple({source.grouping for source in sources}), sources[0].in_features)


def int4_shapes(prefix: str, lead: tuple[int, ...], tiles: int, rows: int, group_size: int, with_zeros: bool) -> Shapes:
    """Of matrices packed for the CPU: of one, or with a prefix of a stack `lead` of them."""
    groups = -(-rows // group_size)
    names = ("packed", "scales", "zeros") if not prefix else (prefix, f"{prefix}_scales", f"{prefix}_zeros")
    shapes: Shapes = {
        names[0]: ((*lead, tiles, -(-rows // 8), 64), torch.uint8),
        names[1]: ((*lead, tiles, groups, 16), torch.float16),
    }
    if with_zeros:
        shapes[names[2]] = ((*lead, tiles, groups, 16), torch.uint8)
    return shapes


def unpack_int4(
    part: Int4Tensors, perm: torch.Tensor | None, saved: SavedLinear, group_size: int
) -> dict[str, torch.Tensor]:
    """The on-disk tensors (qweight, qzeros, scales, g_idx) of a packed linear: the exact inverse of `GptqSource.int4`.

    `group_size` is the kernel's, which divides `saved.group_size`.
    """
    repeat = saved.group_size // group_size
    scales = int4.unpack_groups(part.scales, saved.out_features)[::repeat]
    if part.zeros is None:
        zeros = torch.full(scales.shape, int4.SYMMETRIC_ZERO, dtype=torch.uint8)
    else:
        zeros = int4.unpack_groups(part.zeros, saved.out_features)[::repeat]
    return {
        "qweight": ferrum_ops.int4_unpack(part.packed, perm, saved.in_features, saved.out_features),
        "qzeros": gptq.encode_zeros(zeros, 4, saved.checkpoint_format),
        "scales": scales.to(saved.scales_dtype),
        "g_idx": gptq.g_idx_from_perm(perm, saved.group_size, saved.in_features),
    }


def same_order(sources: Sequence[QuantizedSource]) -> bool:
    """Whether linears read their rows in one order, so that they can stand side by side."""
    first = sources[0].perm
    for source in sources[1:]:
        if (source.perm is None) != (first is None):
            return False
        if source.perm is not None and first is not None and not torch.equal(source.perm, first):
            return False
    return True


def bias_of(sources: Sequence[LinearSource], dtype: torch.dtype) -> torch.Tensor:
    """The biases of linears side by side, zeros for one without."""
    biases = [s.bias(dtype) for s in sources]
    return torch.cat([torch.zeros(s.out_features, dtype=dtype) if b is None else b for s, b in zip(sources, biases)])


def in_parallel(work: Callable[[int], None], count: int) -> None:
    """`work(0) ... work(count - 1)` on as many threads as torch computes with; the first exception is raised."""
    with ThreadPoolExecutor(max_workers=max(1, min(torch.get_num_threads(), count))) as pool:
        for _ in pool.map(work, range(count)):
            pass
