"""Safetensors checkpoints as one memory-mapped mapping from tensor names to tensors.

Everything a damaged or foreign checkpoint can get wrong about its *files* is found here, before a model exists: missing
or truncated files, broken headers, an index that points outside the directory or at tensors that are not there.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

#: Safetensors' dtype names (https://huggingface.co/docs/safetensors, "Format").
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

#: Bytes of one call for advice, and bytes that are to wait in the system's cache: about two layers of a large model.
ADVICE_BYTES = 512 << 10
READ_AHEAD_BYTES = 768 << 20

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded. Names the file, the tensor, what was expected and what was found."""

    def __init__(self, file: str | Path, tensor: str | None, expected: str, found: str) -> None:
        self.file, self.tensor, self.expected, self.found = str(file), tensor, expected, found
        where = Path(file).name if tensor is None else f"{Path(file).name}: {tensor}"
        super().__init__(f"[load] {where}: expected {expected}, found {found}")


class Entry(NamedTuple):
    """Where one tensor lies in its file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset from the beginning of the file
    nbytes: int


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


class Checkpoint:
    """The safetensors files of one directory.

    `entries` maps every tensor name to its `Entry`; `mapped(name)` gives the tensor itself, a view of the memory-mapped
    file that is valid inside the `with` block; its pages leave memory afterwards.

    Raises CheckpointError for any file that is missing, truncated or malformed.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, Entry] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file, names in self._files().items():
            entries = _read_header(file)
            for name in entries if names is None else names:
                if name not in entries:
                    raise CheckpointError(file, name, f"the tensor that {INDEX_FILE} places here", "no such tensor")
                self.entries[name] = entries[name]
            if names is not None:
                for name in entries.keys() - names:
                    raise CheckpointError(file, name, f"only tensors that {INDEX_FILE} places here", "this one too")

    def _files(self) -> dict[Path, set[str] | None]:
        """Each file with the tensors the index places in it, or None where there is no index."""
        if (single := self.directory / SINGLE_FILE).exists():
            return {single: None}
        if (index := self.directory / INDEX_FILE).exists():
            return self._indexed_files(index)
        candidates = sorted(self.directory.glob("*.safetensors"))
        if len(candidates) == 1:  # older writers name the file after the format, e.g. gptq_model-4bit-128g.safetensors
            return {candidates[0]: None}
        raise CheckpointError(
            self.directory,
            None,
            f"{SINGLE_FILE}, {INDEX_FILE} or exactly one .safetensors file",
            f"{len(candidates)} .safetensors files",
        )

    def _indexed_files(self, index: Path) -> dict[Path, set[str] | None]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = {str(name): str(file) for name, file in weight_map.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(index, None, "JSON with a weight_map of names to files", repr(error)) from error
        shards: dict[str, set[str]] = {}
        for name, file in names.items():
            if file not in shards:
                self._check_shard(index, name, file)
                shards[file] = set()
            shards[file].add(name)
        files: dict[Path, set[str] | None] = {}
        for file, content in shards.items():  # "a" and "./a" are one file
            files[self.directory / file] = content | (files.get(self.directory / file) or set())
        return files

    def _check_shard(self, index: Path, name: str, file: str) -> None:
        relative, root = Path(file), self.directory.resolve()
        # Compared without following links in the last step: shared caches link the files themselves elsewhere.
        if relative.is_absolute() or ".." in relative.parts or not (root / relative).parent.is_relative_to(root):
            raise CheckpointError(index, name, "a file inside the checkpoint's directory", repr(file))
        if not (self.directory / relative).exists():
            raise CheckpointError(index, name, f"the file {file}", "no such file")

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def file_of(self, name: str) -> Path:
        return self.entries[name].file if name in self.entries else self.directory

    def expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Entry:
        """The entry of `name`; raises unless it exists with this shape and one of these dtypes."""
        expected = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {tuple(shape)}"
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(self.directory, name, expected, "no such tensor")
        if entry.shape != tuple(shape) or entry.dtype not in dtypes:
            raise CheckpointError(entry.file, name, expected, _describe(entry.dtype, entry.shape))
        return entry

    @contextmanager
    def mapped(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor as a view of the mapped file. Not valid after the block: copy what must last."""
        entry = self.entries[name]
        if entry.nbytes == 0:
            yield torch.empty(entry.shape, dtype=entry.dtype)
            return
        mapping = self._map(entry.file)
        aligned = entry.start % entry.dtype.itemsize == 0
        if aligned:
            flat = torch.frombuffer(mapping, dtype=entry.dtype, count=prod(entry.shape), offset=entry.start)
        else:
            data = bytearray(mapping[entry.start : entry.start + entry.nbytes])
            flat = torch.frombuffer(data, dtype=entry.dtype)
        try:
            yield flat.view(entry.shape)
        finally:
            _give_back(mapping, entry)

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor in ordinary memory."""
        with self.mapped(name) as tensor:
            return tensor.clone()

    def holds(self, name: str, content: bytes) -> bool:
        """Whether the tensor's bytes are `content`: far cheaper than a tensor, for a test of many small ones."""
        entry = self.entries[name]
        if entry.nbytes == 0 or entry.nbytes != len(content):
            return entry.nbytes == len(content)
        mapping = self._map(entry.file)
        same = mapping[entry.start : entry.start + entry.nbytes] == content
        _give_back(mapping, entry)
        return same

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors into its cache, many at a time, without waiting for them."""
        self._advise(names, "POSIX_FADV_WILLNEED")

    def forget(self, names: Iterable[str]) -> None:
        """Let these tensors leave the system's cache, where it cannot hold the files beside the model anyway.

        Otherwise every page of the model would first have to be won back from a full cache, and huge pages, which
        must be whole, would be hard to find.
        """
        if not self._cacheable:
            self._advise(names, "POSIX_FADV_DONTNEED")

    @cached_property
    def _cacheable(self) -> bool:
        """Whether memory holds the files and a model of about their size."""
        nbytes = sum(entry.nbytes for entry in self.entries.values())
        return 2 * nbytes < os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE

    def _advise(self, names: Iterable[str], advice: str) -> None:
        if not hasattr(os, advice):
            return
        by_file: dict[Path, list[Entry]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(self.entries[name])
        for file, entries in by_file.items():
            with file.open("rb") as handle:
                for start, stop in _runs(entries):
                    # Linux reads at most a device's request per call.
                    for first in range(start, stop, ADVICE_BYTES):
                        size = min(ADVICE_BYTES, stop - first)
                        os.posix_fadvise(handle.fileno(), first, size, getattr(os, advice))

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                # A private mapping: torch wants a writable buffer, nothing is ever written.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def _give_back(mapping: mmap.mmap, entry: Entry) -> None:
    """Drop the pages that belong to this tensor alone, so that loading holds one copy of a model, not two."""
    page = mmap.PAGESIZE
    first, last = -(-entry.start // page) * page, (entry.start + entry.nbytes) // page * page
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _runs(entries: list[Entry]) -> Iterator[tuple[int, int]]:
    """First byte and the byte behind the last of each run of tensors without a gap of a page."""
    start = stop = -1
    for entry in sorted(entries, key=lambda entry: entry.start):
        if start < 0 or entry.start > stop + mmap.PAGESIZE:
            if start >= 0:
                yield start, stop
            start = entry.start
        stop = entry.start + entry.nbytes
    if start >= 0:
        yield start, stop


class ReadAhead:
    """Keeps the disk busy while weights are packed: when one module's turn comes, the next ones' files are read.

    Modules are built about in the order in which they were added; in another order nothing is lost but the time.
    """

    def __init__(self, checkpoint: Checkpoint, ahead: int = READ_AHEAD_BYTES) -> None:
        self._checkpoint, self._ahead = checkpoint, ahead
        self._modules: list[tuple[list[str], int]] = []  # names of the tensors of each, and their bytes
        self._asked: set[int] = set()  # modules that are on their way
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(max_workers=1)

    def before(self, names: list[str], build: Callable[[], Any]) -> Callable[[], Any]:
        """`build`, which reads the tensors `names`, made to read ahead for those that follow."""
        index = len(self._modules)
        self._modules.append((names, sum(self._checkpoint.entries[name].nbytes for name in names)))
        if len(self._asked) == index:  # the first ones are read while the rest is planned
            self._ask(0)

        def build_and_read_ahead() -> Any:
            self._ask(index)
            built = build()
            self._checkpoint.forget(names)
            return built

        return build_and_read_ahead

    def _ask(self, index: int) -> None:
        """Have module `index` and as many after it as fill `ahead` bytes read, unless they have been."""
        with self._lock:
            nbytes = 0
            for i in range(index, len(self._modules)):
                if i > index and nbytes >= self._ahead:
                    return
                nbytes += self._modules[i][1]
                if i not in self._asked:
                    self._asked.add(i)
                    self._reader.submit(self._checkpoint.read_ahead, self._modules[i][0])


def _read_header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt"):  # the library's own validation of header, offsets and file size
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(file, None, "a complete safetensors file", str(error)) from error
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header: dict[str, Any] = json.loads(handle.read(length))
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        dtype = SAFETENSORS_DTYPES.get(info["dtype"])
        if dtype is None:
            raise CheckpointError(file, name, f"a dtype among {', '.join(SAFETENSORS_DTYPES)}", info["dtype"])
        begin, end = info["data_offsets"]
        entries[name] = Entry(file, dtype, tuple(info["shape"]), 8 + length + begin, end - begin)
    return entries


class LazyTensor:
    """A tensor that is read, converted or packed when it is asked for.

    Stands in a state dict where transformers expects a slice of a safetensors file: the same three methods.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, build: Any) -> None:
        self.shape, self.dtype, self._build = tuple(shape), dtype, build

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self.dtype]

    def __getitem__(self, _index: Any) -> torch.Tensor:
        tensor = self._build()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise RuntimeError(
                f"[load] lazy tensor: expected {_describe(self.dtype, self.shape)}, "
                f"built {_describe(tensor.dtype, tuple(tensor.shape))}"
            )
        return tensor

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class LazyGroup:
    """Tensors that come out of one piece of work: built together when the first is asked for."""

    def __init__(
        self,
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
        build: Callable[[], dict[str, torch.Tensor]],
    ) -> None:
        self._shapes, self._build = shapes, build
        self._lock = threading.Lock()
        self._built: dict[str, torch.Tensor] = {}

    def tensors(self) -> dict[str, LazyTensor]:
        return {
            name: LazyTensor(shape, dtype, lambda name=name: self._take(name))
            for name, (shape, dtype) in self._shapes.items()
        }

    def _take(self, name: str) -> torch.Tensor:
        with self._lock:
            if name not in self._built:
                self._built.update(self._build())
            return self._built.pop(name)
