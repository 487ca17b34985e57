"""Damaged and foreign GGUF files: one error that names file, tensor, expected and found, whatever sizes they claim."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from ferrum_models import CheckpointError, Qwen3MoeForCausalLM
from ferrum_models.qwen3_moe.gguf_file import GgufCheckpoint, GgufFile
from ferrum_ops.formats import gguf as formats
from ferrum_ops.formats.gguf import GGMLType
from tests.models.make_gguf import Tiny, write

TINY = Tiny(hidden=64, heads=2, kv_heads=1, head_dim=32, layers=1, experts=2, top_k=1, width=32, vocabulary=40)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("good") / "good.gguf", TINY).read_bytes()


def load(path):
    return Qwen3MoeForCausalLM.from_pretrained(path)


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert Path(error.value.file).name in str(error.value) and Path(error.value.file).parent == path.parent
    return error.value


def header(version=3, tensors=0, keys=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def key(name, type, data):
    return text(name) + struct.pack("<I", type) + data


def tensor(name, sizes, type=0, offset=0):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, type, offset)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "expected a GGUF file, found cannot mmap an empty file"),
        (b"GGUF", "expected 4 bytes of version at byte 4, found a file of 4 bytes"),
        (b"GGML" + bytes(100), r"expected the magic b'GGUF', found b'GGML'"),
        (header(version=1), "expected version 2 or 3, found 1"),
        (header(version=3 << 24), r"expected version 2 or 3, found 50331648 \(big-endian\?\)"),
        (header(keys=1 << 60), "expected 8 bytes of a key at byte 24, found a file of 24 bytes"),
        (header(tensors=1 << 60), "expected 8 bytes of a tensor's name at byte 24"),
        (header(keys=1, body=struct.pack("<Q", 1 << 62)), f"expected {1 << 62} bytes of a key at byte 32"),
        (header(keys=1, body=key("a", 99, b"")), "expected a value type from 0 to 12 for a, found 99"),
        (header(keys=2, body=key("a", 7, b"\1") * 2), "expected each key once, found a twice"),
        (header(keys=1, body=struct.pack("<Q", 1) + b"\xff"), "expected UTF-8 in a key, found"),
        (header(keys=1, body=key("a", 9, struct.pack("<IQ", 4, 1 << 60))), f"expected {1 << 62} bytes of a at byte"),
        (header(keys=1, body=key("a", 9, struct.pack("<IQ", 8, 1 << 60))), "expected 8 bytes of a at byte"),
        (header(keys=1, body=key("a", 9, struct.pack("<IQ", 9, 1))), "expected an array of scalars or strings for a"),
        (
            header(keys=1, body=key("general.alignment", 4, struct.pack("<I", 24))),
            "general.alignment of a power of two",
        ),
        (header(tensors=1, body=tensor("t", [])), "t: expected 1 to 4 dimensions, found 0"),
        (header(tensors=1, body=tensor("t", [1] * 5)), "t: expected 1 to 4 dimensions, found 5"),
        (header(tensors=1, body=tensor("t", [32], 77)), "t: expected a type among F32, .* found type 77"),
        (header(tensors=1, body=tensor("t", [32], 24)), "t: expected a type among F32, .* found I8"),
        (
            header(tensors=1, body=tensor("t", [48], 8)),
            "t: expected rows of a multiple of 32 for Q8_0, found rows of 48",
        ),
        (
            header(tensors=1, body=tensor("t", [1 << 60])),
            rf"t: expected {1 << 62} bytes of F32 .* found 0 bytes of data",
        ),
        (header(tensors=1, body=tensor("t", [1 << 20] * 4)), "t: expected .* bytes of F32 .* found 0 bytes of data"),
        (header(tensors=1, body=tensor("t", [1], 0, 1 << 63)), "t: expected 4 bytes of F32 .* at offset"),
        (header(tensors=1, body=tensor("t", [1], 0, 4)), "t: expected an offset that is a multiple of 32, found 4"),
        (
            header(tensors=1, body=tensor("t", [32, 1 << 63, 0])),
            r"t: expected sizes with a product below 2\^63, found \(0, 9223372036854775808, 32\)",
        ),
        (header(tensors=2, body=tensor("t", [0]) * 2), "t: expected each tensor once, found it twice"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_header(tmp_path, data, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    refused(path, message)


def test_truncated_file(tmp_path, good):
    path = tmp_path / "short.gguf"
    for length in (1, 23, 24, 100, len(good) // 3, len(good) - 1):
        path.write_bytes(good[:length])
        refused(path, "expected")


@pytest.mark.parametrize(
    "name, message",
    [
        ("blk.0.attn_q.weight", r"blk.0.attn_q.weight: expected a tensor of shape \(64, 64\), found no such tensor"),
        ("token_embd.weight", "token_embd.weight: expected a tensor of shape .*, found no such tensor"),
        ("blk.0.ffn_down_exps.weight", r"expected a tensor of shape \(2, 64, 32\), found no such tensor"),
    ],
)
def test_missing_tensor(tmp_path, name, message):
    refused(write(tmp_path / "m.gguf", TINY, drop=[name]), message)


def test_wrong_shape_and_unexpected_tensor(tmp_path):
    q8 = formats.random_blocks(GGMLType.Q8_0, 32, 64).numpy()
    path = write(tmp_path / "m.gguf", TINY, tensors=[("blk.0.attn_q.weight", q8, GGMLType.Q8_0)])
    refused(path, r"blk.0.attn_q.weight: expected a tensor of shape \(64, 64\), found Q8_0 \(32, 64\)")
    path = write(tmp_path / "n.gguf", TINY, tensors=[("blk.0.attn_q.bias", q8, GGMLType.Q8_0)])
    refused(path, "blk.0.attn_q.bias: expected only tensors that the configuration has a place for, found this one too")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"block_count": None}, r"expected the key qwen3moe.block_count \(int\), found no such key"),
        ({"block_count": "2"}, r"expected the key qwen3moe.block_count \(int\), found '2'"),
        ({"block_count": 0}, "qwen3moe.block_count from 1 to 1048575, found 0"),
        ({"expert_count": 4000000000}, "qwen3moe.expert_count from 1 to 1048575, found 4000000000"),
        ({"expert_count": True}, r"expected the key qwen3moe.expert_count \(int\), found True"),
        ({"context_length": None}, "expected the key qwen3moe.context_length"),
        ({"attention.layer_norm_rms_epsilon": None}, "expected the key qwen3moe.attention.layer_norm_rms_epsilon"),
        ({"attention.value_length": 16}, "expected qwen3moe.attention.value_length 32, the key length, found 16"),
        ({"attention.head_count_kv": 0}, "qwen3moe.attention.head_count_kv from 1 to 1048575, found 0"),
        (
            {"attention.head_count": 3, "attention.head_count_kv": 2},
            "a divisor of 3 query heads as head_count_kv, found 2",
        ),
        ({"expert_used_count": 3}, "expected qwen3moe.expert_used_count of at most 2, found 3"),
        ({"attention.sliding_window": 128}, "expected qwen3moe.attention.sliding_window 0, found 128"),
        ({"expert_gating_func": 2}, "expected qwen3moe.expert_gating_func 0, found 2"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type none, linear or yarn, found 'longrope'"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "rope.scaling.original_context_length"),
        ({"block_count": 2}, r"blk.1.attn_norm.weight: expected a tensor of shape \(64,\), found no such tensor"),
        ({"expert_feed_forward_length": 64}, r"blk.0.ffn_gate_exps.weight: expected a tensor of shape \(2, 64, 64\)"),
    ],
)
def test_bad_metadata(tmp_path, keys, message):
    refused(write(tmp_path / "m.gguf", TINY, keys=keys), message)


def test_other_architecture(tmp_path):
    path = write(tmp_path / "m.gguf", TINY, architecture="llama")
    refused(path, "expected general.architecture 'qwen3moe' or 'qwen3', found 'llama'")


def test_a_dense_model_without_its_width(tmp_path):
    dense = replace(TINY, experts=0)
    refused(write(tmp_path / "m.gguf", dense, keys={"feed_forward_length": None}), "the key qwen3.feed_forward_length")
    path = write(tmp_path / "n.gguf", dense, drop=("blk.0.ffn_up.weight",))
    refused(path, r"blk\.0\.ffn_up\.weight.*found no such tensor")


def test_several_models_in_a_directory(tmp_path, good):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(good)
    with pytest.raises(CheckpointError, match=r"expected one GGUF model, or gguf_file=, found a\.gguf, b\.gguf"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"c.gguf: expected a GGUF file \(gguf_file=\), found no such file"):
        Qwen3MoeForCausalLM.from_pretrained(tmp_path, gguf_file="c.gguf")
    Qwen3MoeForCausalLM.from_pretrained(tmp_path, gguf_file="b.gguf")


def test_bad_splits(tmp_path):
    for number in range(2):
        write(tmp_path / f"m-0000{number + 1}-of-00002.gguf", TINY, split=(number, 2))
    second = tmp_path / "m-00002-of-00002.gguf"
    (tmp_path / "m.gguf").write_bytes(second.read_bytes())
    refused(tmp_path / "m.gguf", r"expected a name that ends in -NNNNN-of-00002.gguf for a split file, found m.gguf")
    second.write_bytes((tmp_path / "m-00001-of-00002.gguf").read_bytes())
    refused(tmp_path / "m-00001-of-00002.gguf", "expected split.no 1, found 0")
    write(second, TINY, split=(1, 2), drop=["output.weight"])
    refused(tmp_path / "m-00001-of-00002.gguf", "expected each tensor in one file of a split, found it in two")
    write(second, TINY, split=(1, 2), drop=["blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"])
    refused(tmp_path / "m-00001-of-00002.gguf", r"expected 15 tensors \(split.tensors.count\), found 14")


# Fuzzing: whatever the bytes say, a file either reads or is refused.

SEED = seed(20240229)
# No limits of time: a busy machine passes any.
LIMITS = settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_or_refuse(path, data):
    path.write_bytes(data)
    try:
        for found in GgufCheckpoint(path).tensors.values():
            blocks = found.blocks()
            assert blocks.numel() == found.nbytes <= len(data)
            blocks.sum()  # every byte can be read
    except CheckpointError as error:
        assert path.name in str(error)


@SEED
@LIMITS
@given(positions=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes(tmp_path, good, positions):
    """The header is a few kilobytes of the file: half of the changes go there."""
    data = bytearray(good)
    for i, (where, value) in enumerate(positions):
        data[int(where * (min(len(data), 3000 if i % 2 == 0 else len(data)) - 1))] = value
    read_or_refuse(tmp_path / "changed.gguf", bytes(data))


@SEED
@LIMITS
@given(
    at=st.integers(0, 3000),
    value=st.sampled_from([0, 1, 31, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 62) + 1, (1 << 63) - 1, (1 << 64) - 1]),
)
def test_changed_counts(tmp_path, good, at, value):
    data = bytearray(good)
    data[at : at + 8] = struct.pack("<Q", value)
    read_or_refuse(tmp_path / "counts.gguf", bytes(data))


@SEED
@LIMITS
@given(body=st.binary(max_size=200), tensors=st.integers(0, 4), keys=st.integers(0, 4))
def test_random_bodies(tmp_path, body, tensors, keys):
    read_or_refuse(tmp_path / "random.gguf", header(tensors=tensors, keys=keys, body=body))


@SEED
@LIMITS
@given(data=st.data())
def test_random_blocks_decode_and_multiply(data):
    """Any bytes are weights: NaN and infinite ones too, but nothing is read or written outside."""
    type = data.draw(st.sampled_from(formats.QUANTIZED_TYPES))
    elements, nbytes = formats.BLOCK_SIZES[type]
    count = 256 // elements
    raw = data.draw(st.binary(min_size=3 * count * nbytes, max_size=3 * count * nbytes))
    blocks = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy()).view(3, -1)
    weight = torch.ops.ferrum.gguf_dequantize(blocks, type, torch.float32)
    assert torch.equal(weight.isnan(), formats.dequantize(blocks, type).isnan())
    x = torch.ones(2, 256)
    for activation in ("int8", "full"):
        out = torch.ops.ferrum.gguf_linear(x, [blocks], [type], None, activation)
        finite = weight.isfinite().all(1) & (weight.abs().amax(1) < 1e30)
        assert out[:, finite].isfinite().all() and out.shape == (2, 3)


def test_a_view_outlives_its_file_object(tmp_path, good):
    path = tmp_path / "good.gguf"
    path.write_bytes(good)
    blocks = GgufFile(path).tensors["output.weight"].blocks()
    path.unlink()
    assert torch.equal(blocks, formats.random_blocks(GGMLType.Q8_0, 40, 64, seed=2, scale=0.05))
