"""The gate on compiled kernels: nothing spills, on any architecture the library is built for."""

import re

import pytest

from tests.cuda import resources

pytestmark = pytest.mark.skipif(not resources.reports(), reason="the library was built without CUDA")


def test_every_source_is_compiled():
    assert set(resources.reports()) == {path.stem for path in resources.SOURCES.glob("*.cu")}
    compiled = sum(text.count("Compiling entry function") for text in resources.reports().values())
    assert len(resources.kernels()) == compiled > 0


def test_nothing_spills():
    spilling = [k for k in resources.kernels() if k.spilled_bytes or k.stack_bytes]
    assert not spilling, "\n".join(map(str, spilling))


def test_no_product_waits_for_the_one_before():
    """ptxas says so where it cannot let wgmma run beside the threads."""
    warnings = [
        f"{source}: {line}"
        for source, text in resources.reports().items()
        for line in text.splitlines()
        if re.search(r"C75\d\d|serialized|warning", line)
    ]
    assert not warnings, "\n".join(warnings)


def test_a_block_of_every_kernel_fits():
    """64 K registers an SM: a kernel that allows 1024 threads has at most 64 each; 48 KB of static shared memory."""
    assert all(k.registers <= 255 and k.shared_bytes <= 48 * 1024 for k in resources.kernels())


def test_a_spill_is_seen(monkeypatch, tmp_path):
    (tmp_path / "norm.o.log").write_text(
        "ptxas info    : Compiling entry function '_Z3foov' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z3foov\n"
        "    40 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]\n"
    )
    monkeypatch.setattr(resources, "BUILD", tmp_path)
    assert resources.kernels() == [resources.Kernel("norm", "_Z3foov", "sm_80", 64, 40, 20, 128)]
