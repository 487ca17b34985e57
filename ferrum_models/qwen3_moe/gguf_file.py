"""GGUF files: metadata and tensors as views of the mapped file.

Reads the header itself rather than through the package gguf, whose reader trusts every count in it: here the time and
the memory a header can cost are bounded by the size of the file. The layout is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

import ferrum_ops
from ferrum_models import huge_pages
from ferrum_models.checkpoint import CheckpointError
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats import gguf_tiles

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

#: struct's codes of the scalar value types by gguf's numbers.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Array:
    """An array of the metadata: where it lies, and how long it is. Its elements are not read."""

    type: int
    length: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file. `shape` is torch's order: rows of `shape[-1]` weights."""

    file: GgufFile
    name: str
    type: int
    shape: tuple[int, ...]
    start: int  # byte offset from the beginning of the file
    nbytes: int

    @property
    def type_name(self) -> str:
        return type_name(self.type)

    def blocks(self) -> torch.Tensor:
        """uint8 `[..., bytes of a row]`: a view of the mapped file, which lives as long as the view."""
        if self.nbytes == 0:
            return torch.empty(*self.shape[:-1], 0, dtype=torch.uint8)
        flat = torch.frombuffer(self.file.mapping, dtype=torch.uint8, count=self.nbytes, offset=self.start)
        return flat.view(*self.shape[:-1], -1)

    def tiles(self) -> torch.Tensor:
        """`ferrum_ops.gguf_pack` of the blocks, on huge pages; the file's pages leave the process again."""
        *outer, rows, in_features = self.shape
        shape = (*outer, rows // gguf_tiles.ROWS, gguf_tiles.tile_bytes(self.type, in_features))
        packed = huge_pages.empty(shape, torch.uint8)
        # By experts, or by runs of tiles: what gguf_pack returns stays in the cache until it is copied.
        count = 1 if outer else 1024
        for part, to in zip(self.blocks().split(count), packed.split(1 if outer else count // gguf_tiles.ROWS)):
            to.copy_(ferrum_ops.gguf_pack(part, self.type))
        page = self.start // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.mapping.madvise(mmap.MADV_DONTNEED, page, self.start + self.nbytes - page)
        return packed

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights in ordinary memory."""
        if self.type in formats.BLOCK_SIZES:
            return torch.ops.ferrum.gguf_dequantize(self.blocks(), self.type, dtype)
        import gguf

        kind = gguf.GGMLQuantizationType(self.type)
        return torch.from_numpy(gguf.quants.dequantize(self.blocks().numpy(), kind)).to(dtype)


def type_name(type: int) -> str:
    """ggml's name of a type, or its number."""
    if type in formats.BLOCK_SIZES:
        return formats.GGMLType(type).name
    import gguf

    known = {int(t): t.name for t in gguf.GGMLQuantizationType}
    return known.get(type, f"type {type}")


def block_size(type: int) -> tuple[int, int] | None:
    """Elements and bytes of a block; None for a type that nobody decodes."""
    if type in formats.BLOCK_SIZES:
        return formats.BLOCK_SIZES[type]
    import gguf

    decoded = {int(t): size for t, size in gguf.GGML_QUANT_SIZES.items() if t.name.startswith(("IQ", "TQ", "NVFP4"))}
    return decoded.get(type)


class GgufFile:
    """One file: `metadata` by key, `tensors` by name.

    Raises CheckpointError for anything that is not a complete little-endian GGUF file of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with path.open("rb") as handle:
                # A private mapping: torch wants a writable buffer, nothing is ever written.
                self.mapping = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(path, None, "a GGUF file", str(error)) from error
        self._at = 0
        self._read_header()

    def _fail(self, expected: str, found: object, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(self.path, tensor, expected, str(found))

    # Values.

    def _take(self, nbytes: int, what: str) -> int:
        """The offset of the next `nbytes` bytes."""
        at = self._at
        if nbytes > len(self.mapping) - at:
            raise self._fail(f"{nbytes} bytes of {what} at byte {at}", f"a file of {len(self.mapping)} bytes")
        self._at += nbytes
        return at

    def _scalar(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.mapping, self._take(struct.calcsize("<" + code), what))[0]

    def _string(self, what: str) -> str:
        length = self._scalar("Q", what)
        at = self._take(length, what)
        try:
            return self.mapping[at : at + length].decode()
        except UnicodeDecodeError as error:
            raise self._fail(f"UTF-8 in {what}", error) from error

    def _value(self, type: int, key: str) -> Any:
        if type in SCALARS:
            return self._scalar(SCALARS[type], key)
        if type == STRING:
            return self._string(key)
        if type != ARRAY:
            raise self._fail(f"a value type from 0 to 12 for {key}", type)
        element, length = self._scalar("I", key), self._scalar("Q", key)
        if element in SCALARS:
            self._take(length * struct.calcsize("<" + SCALARS[element]), key)
        elif element == STRING:
            for _ in range(length):  # each takes 8 bytes at least: the end of the file ends this
                self._take(self._scalar("Q", key), key)
        else:
            raise self._fail(f"an array of scalars or strings for {key}", f"elements of type {element}")
        return Array(element, length)

    # Header.

    def _read_header(self) -> None:
        if (found := self.mapping[:4]) != MAGIC:
            raise self._fail(f"the magic {MAGIC!r}", repr(found))
        self._at = 4
        version = self._scalar("I", "version")
        if version not in VERSIONS:
            big = " (big-endian?)" if version & 0xFFFF == 0 else ""
            raise self._fail(f"version {' or '.join(map(str, VERSIONS))}", f"{version}{big}")
        tensors, keys = self._scalar("Q", "tensor count"), self._scalar("Q", "key count")
        for _ in range(keys):
            key = self._string("a key")
            if key in self.metadata:
                raise self._fail("each key once", f"{key} twice")
            self.metadata[key] = self._value(self._scalar("I", key), key)
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._fail("general.alignment of a power of two", alignment)
        found_tensors = []
        for _ in range(tensors):
            name = self._string("a tensor's name")
            dimensions = self._scalar("I", name)
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise self._fail(f"1 to {MAX_DIMENSIONS} dimensions", dimensions, name)
            sizes = [self._scalar("Q", name) for _ in range(dimensions)]
            found_tensors.append((name, tuple(reversed(sizes)), self._scalar("I", name), self._scalar("Q", name)))
        data = -(-self._at // alignment) * alignment
        for name, shape, type, offset in found_tensors:
            if name in self.tensors:
                raise self._fail("each tensor once", "it twice", name)
            self.tensors[name] = self._tensor(name, shape, type, data, offset, alignment)

    def _tensor(
        self, name: str, shape: tuple[int, ...], type: int, data: int, offset: int, alignment: int
    ) -> GgufTensor:
        size = block_size(type)
        if size is None:
            known = ", ".join(t.name for t in formats.GGMLType)
            raise self._fail(f"a type among {known} (or that the package gguf dequantises)", type_name(type), name)
        elements, nbytes = size
        if shape[-1] % elements:
            raise self._fail(f"rows of a multiple of {elements} for {type_name(type)}", f"rows of {shape[-1]}", name)
        total = prod(shape) // elements * nbytes
        if offset % alignment:
            raise self._fail(f"an offset that is a multiple of {alignment}", offset, name)
        available = max(len(self.mapping) - data, 0)
        if offset + total > available:
            raise self._fail(
                f"{total} bytes of {type_name(type)} {shape} at offset {offset}", f"{available} bytes of data", name
            )
        if prod(filter(None, shape)) >= 1 << 63:  # beside a size of 0, which needs no bytes
            raise self._fail("sizes with a product below 2^63", shape, name)
        return GgufTensor(self, name, type, shape, data + offset, total)


class GgufCheckpoint:
    """A model in one file or several: the metadata of the first, the tensors of all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        first = GgufFile(path)
        count = first.metadata.get("split.count", 1)
        files = [first]
        if isinstance(count, int) and count > 1:
            files = [first if other == path else GgufFile(other) for other in self._split_paths(count)]
        self.metadata = files[0].metadata
        self.tensors: dict[str, GgufTensor] = {}
        for number, file in enumerate(files):
            if len(files) > 1 and file.metadata.get("split.no") != number:
                raise CheckpointError(file.path, None, f"split.no {number}", str(file.metadata.get("split.no")))
            for name, tensor in file.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(file.path, name, "each tensor in one file of a split", "it in two")
                self.tensors[name] = tensor
        total = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(files) > 1 and total != len(self.tensors):
            raise CheckpointError(path, None, f"{total} tensors (split.tensors.count)", str(len(self.tensors)))

    def _split_paths(self, count: int) -> list[Path]:
        match = SPLIT_NAME.fullmatch(self.path.name)
        if match is None or int(match["count"]) != count:
            raise CheckpointError(
                self.path, None, f"a name that ends in -NNNNN-of-{count:05}.gguf for a split file", self.path.name
            )
        paths = [self.path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
        for path in paths:
            if not path.exists():
                raise CheckpointError(path, None, f"one of the {count} files of a split", "no such file")
        return paths

    def value(self, key: str, types: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata. Raises CheckpointError if it is missing without a default, or of another type."""
        found = self.metadata.get(key, default)
        wanted = types if isinstance(types, tuple) else (types,)
        if not isinstance(found, wanted) or (isinstance(found, bool) and bool not in wanted):
            names = " or ".join(t.__name__ for t in wanted)
            missing = "no such key" if found is None else repr(found)
            raise CheckpointError(self.path, None, f"the key {key} ({names})", missing)
        return found

    def expect(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        """The tensor `name`; raises unless it exists with this shape."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(self.path, name, f"a tensor of shape {shape}", "no such tensor")
        if tensor.shape != shape:
            raise CheckpointError(
                tensor.file.path, name, f"a tensor of shape {shape}", f"{tensor.type_name} {tensor.shape}"
            )
        return tensor


def find_gguf(path: Path) -> Path | None:
    """The file to load at `path`: the file itself, or the one model (or first part) in a directory without another
    checkpoint. None where there is no GGUF file.

    Raises CheckpointError for a directory with several models.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    models = [f for f in files if (m := SPLIT_NAME.fullmatch(f.name)) is None or int(m["number"]) == 1]
    if len(models) > 1:
        raise CheckpointError(path, None, "one GGUF model, or gguf_file=", ", ".join(f.name for f in models))
    return models[0] if models else None
