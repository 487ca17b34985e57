"""How files reach memory: comparisons by bytes, reading ahead, huge pages. What is read, other tests check."""

import mmap
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ferrum_models import huge_pages
from ferrum_models.checkpoint import ADVICE_BYTES, Checkpoint, ReadAhead

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def checkpoint(tmp_path):
    tensors = {
        "a": torch.arange(1000, dtype=torch.int32),
        "b": torch.ones(3, 5, dtype=torch.int32),
        "c": torch.zeros(3 * ADVICE_BYTES // 8 + 100, dtype=torch.int32),
        "d": torch.full((100,), 7, dtype=torch.int32),
        "empty": torch.empty(0, 4, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


@pytest.fixture
def advised(monkeypatch):
    """(first byte, byte behind the last, advice) of every call."""
    calls = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, size, advice: calls.append((start, start + size, advice))
    )
    return calls


def test_holds_compares_bytes(checkpoint):
    values = bytes(torch.arange(1000, dtype=torch.int32).view(torch.uint8).tolist())
    assert checkpoint.holds("a", values)
    assert not checkpoint.holds("a", values[:-1] + b"\1")
    assert not checkpoint.holds("a", values[:-4])
    assert checkpoint.holds("empty", b"") and not checkpoint.holds("empty", b"\0")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise")
def test_read_ahead_asks_for_runs_of_neighbours_in_pieces(checkpoint, advised):
    checkpoint.read_ahead(["d", "a", "b"])  # c lies between them and is longer than a page
    first, last = checkpoint.entries["a"], checkpoint.entries["b"]
    d = checkpoint.entries["d"]
    assert [(start, stop) for start, stop, _ in advised] == [
        (first.start, last.start + last.nbytes),
        (d.start, d.start + d.nbytes),
    ]
    assert {advice for _, _, advice in advised} == {os.POSIX_FADV_WILLNEED}
    advised.clear()
    checkpoint.read_ahead(["c"])
    c = checkpoint.entries["c"]
    assert len(advised) == 2 and max(stop - start for start, stop, _ in advised) == ADVICE_BYTES
    assert advised[0][0] == c.start and advised[0][1] == advised[1][0] and advised[1][1] == c.start + c.nbytes


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise")
@pytest.mark.parametrize("fits", [True, False])
def test_only_files_that_memory_cannot_hold_are_forgotten(checkpoint, advised, monkeypatch, fits):
    nbytes = sum(entry.nbytes for entry in checkpoint.entries.values())
    pages = (2 * nbytes) // mmap.PAGESIZE + (1 if fits else 0)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": pages}.__getitem__)
    checkpoint.forget(["c"])
    assert [advice for _, _, advice in advised] == ([] if fits else [os.POSIX_FADV_DONTNEED] * 2)


class Shelf:
    """A checkpoint of tensors of ten bytes each that remembers what it was asked for."""

    def __init__(self, names):
        self.entries = {name: type("Entry", (), {"nbytes": 10}) for name in names}
        self.asked, self.forgotten = [], []

    def read_ahead(self, names):
        self.asked += names

    def forget(self, names):
        self.forgotten += names


def test_modules_are_read_ahead_in_order_and_forgotten_when_built():
    shelf = Shelf("abcdef")
    ahead = ReadAhead(shelf, 20)
    builds = [ahead.before([name], lambda name=name: name.upper()) for name in "abcdef"]

    def asked():
        ahead._reader.submit(lambda: None).result()  # the one before it is done
        return "".join(shelf.asked)

    assert asked() == "ab"  # while planning
    assert builds[5]() == "F" and asked() == "abf"  # out of order
    assert builds[0]() == "A" and asked() == "abf"
    assert builds[1]() == "B" and asked() == "abfc"
    assert builds[3]() == "D" and asked() == "abfcde"
    assert shelf.forgotten == ["f", "a", "b", "d"]


@pytest.mark.parametrize("shape", [(3, 5), (1 << 20,), (3, 1 << 20)], ids=["small", "one-page", "pages"])
def test_memory_for_packed_weights(shape):
    tensor = huge_pages.empty(shape, torch.int16)
    assert tensor.shape == shape and tensor.dtype == torch.int16 and tensor.is_contiguous()
    values = torch.arange(tensor.numel(), dtype=torch.int32).to(torch.int16).view(shape)
    tensor.copy_(values)
    assert torch.equal(tensor, values)
    assert torch.equal(huge_pages.cat([tensor, tensor]), torch.cat([values, values]))
    assert torch.equal(huge_pages.zeros(shape, torch.int16, torch.device("cpu")), torch.zeros_like(values))
    assert huge_pages.zeros(shape, torch.int16, torch.device("meta")).shape == shape


@pytest.mark.skipif(sys.platform != "linux" or not THP.exists(), reason="no transparent huge pages")
def test_large_tensors_ask_for_huge_pages():
    tensor = huge_pages.empty((2, huge_pages.HUGE_PAGE_BYTES), torch.uint8)
    assert tensor.data_ptr() % huge_pages.HUGE_PAGE_BYTES == 0
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= tensor.data_ptr() < int(match[2], 16)
        elif line.startswith("VmFlags") and inside:
            flags = line
    assert "hg" in flags.split()
