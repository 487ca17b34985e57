"""A checkpoint that is wrong in any way raises one exception that names file, tensor, expected and found."""

import json

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import load_file, save_file

from ferrum_models import CheckpointError, Qwen3MoeForCausalLM
from tests.models.make_checkpoint import Recipe, make_checkpoint

FILE = "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture
def checkpoint(tmp_path):
    make_checkpoint(tmp_path, Recipe())
    return tmp_path


def edit_tensors(directory, change, file=FILE):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def edit_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def message(directory, **kwargs):
    with pytest.raises(CheckpointError) as raised:
        Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs)
    error = raised.value
    assert error.file and error.expected and error.found
    return str(error).replace(directory.name, "DIR")


def test_missing_tensor(checkpoint):
    edit_tensors(checkpoint, lambda t: t.pop(f"{EXPERT}.scales"))
    assert_expected_inline(
        message(checkpoint),
        """[load] DIR: model.layers.1.mlp.experts.2.up_proj.scales: expected float16 or bfloat16 or float32 (2, 40), found no such tensor""",
    )


def test_missing_linear(checkpoint):
    edit_tensors(checkpoint, lambda t: [t.pop(f"{EXPERT}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")])
    assert_expected_inline(
        message(checkpoint),
        """[load] DIR: model.layers.1.mlp.experts.2.up_proj: expected model.layers.1.mlp.experts.2.up_proj.weight or model.layers.1.mlp.experts.2.up_proj.qweight, found no such tensor""",
    )


def test_missing_dense_tensor(checkpoint):
    edit_tensors(checkpoint, lambda t: t.pop("model.layers.0.self_attn.q_norm.weight"))
    assert_expected_inline(
        message(checkpoint),
        """[load] DIR: model.layers.0.self_attn.q_norm.weight: expected float16 or bfloat16 or float32 (32,), found no such tensor""",
    )


def test_extra_tensor(checkpoint):
    edit_tensors(checkpoint, lambda t: t.update({"model.layers.0.mlp.surprise": torch.zeros(3)}))
    assert_expected_inline(
        message(checkpoint),
        """[load] model.safetensors: model.layers.0.mlp.surprise: expected only tensors that the configuration has a place for, found this one too""",
    )


def test_extra_layer(checkpoint):
    edit_config(checkpoint, lambda c: c.update(num_hidden_layers=1))
    assert "only tensors that the configuration has a place for" in message(checkpoint)


def test_wrong_shape(checkpoint):
    edit_tensors(checkpoint, lambda t: t.update({f"{EXPERT}.qweight": torch.zeros(8, 48, dtype=torch.int32)}))
    assert_expected_inline(
        message(checkpoint),
        """[load] model.safetensors: model.layers.1.mlp.experts.2.up_proj.qweight: expected int32 (8, 40), found int32 (8, 48)""",
    )


def test_wrong_dtype(checkpoint):
    edit_tensors(checkpoint, lambda t: t.update({f"{EXPERT}.qzeros": t[f"{EXPERT}.qzeros"].long()}))
    assert_expected_inline(
        message(checkpoint),
        """[load] model.safetensors: model.layers.1.mlp.experts.2.up_proj.qzeros: expected int32 (2, 5), found int64 (2, 5)""",
    )


def test_truncated_file(checkpoint):
    data = (checkpoint / FILE).read_bytes()
    (checkpoint / FILE).write_bytes(data[: len(data) // 2])
    assert message(checkpoint).startswith(f"[load] {FILE}: expected a complete safetensors file, found ")


def test_file_cut_inside_the_header(checkpoint):
    (checkpoint / FILE).write_bytes((checkpoint / FILE).read_bytes()[:20])
    assert message(checkpoint).startswith(f"[load] {FILE}: expected a complete safetensors file, found ")


def test_empty_file(checkpoint):
    (checkpoint / FILE).write_bytes(b"")
    assert message(checkpoint).startswith(f"[load] {FILE}: expected a complete safetensors file, found ")


def test_unsupported_bits(checkpoint):
    edit_config(checkpoint, lambda c: c["quantization_config"].update(bits=5))
    assert_expected_inline(message(checkpoint), """[load] config.json: expected bits among 2, 3, 4, 8, found 5""")


def test_bits_that_contradict_the_tensors(checkpoint):
    edit_config(checkpoint, lambda c: c["quantization_config"].update(bits=8))
    assert "qweight: expected int32 (16, 128), found int32 (8, 128)" in message(checkpoint)


def test_unsupported_method(checkpoint):
    edit_config(checkpoint, lambda c: c["quantization_config"].update(quant_method="awq"))
    assert_expected_inline(message(checkpoint), """[load] config.json: expected quant_method 'gptq', found 'awq'""")


def test_unsupported_format(checkpoint):
    edit_config(checkpoint, lambda c: c["quantization_config"].update(checkpoint_format="marlin"))
    assert_expected_inline(
        message(checkpoint), """[load] config.json: expected checkpoint_format among gptq, gptq_v2, found 'marlin'"""
    )


@pytest.mark.parametrize("group_size", [0, -2, "128"])
def test_group_size_out_of_range(checkpoint, group_size):
    edit_config(checkpoint, lambda c: c["quantization_config"].update(group_size=group_size))
    assert f"expected group_size of -1 or at least 1, found {group_size!r}" in message(checkpoint)


def test_group_size_that_contradicts_the_tensors(checkpoint):
    edit_config(checkpoint, lambda c: c["quantization_config"].update(group_size=16))
    assert "qzeros: expected int32 (4, 16), found int32 (2, 16)" in message(checkpoint)


def test_quantised_tensors_without_settings(checkpoint):
    edit_config(checkpoint, lambda c: c.pop("quantization_config"))
    assert_expected_inline(
        message(checkpoint),
        """[load] model.safetensors: model.layers.0.self_attn.q_proj.qweight: expected a quantization_config in config.json or quantize_config.json, found neither""",
    )


def test_broken_quantize_config(checkpoint):
    edit_config(checkpoint, lambda c: c.pop("quantization_config"))
    (checkpoint / "quantize_config.json").write_text("{not json")
    assert message(checkpoint).startswith("[load] quantize_config.json: expected JSON, found ")


@pytest.mark.parametrize("value", [-1, 2])
def test_g_idx_out_of_range(checkpoint, value):
    edit_tensors(checkpoint, lambda t: t[f"{EXPERT}.g_idx"].__setitem__(5, value))
    expected = f"{EXPERT}.g_idx: expected groups in [0, 2), found [{min(value, 0)}, {max(value, 1)}]"
    assert expected in message(checkpoint)


def test_g_idx_of_another_length(checkpoint):
    edit_tensors(checkpoint, lambda t: t.update({f"{EXPERT}.g_idx": t[f"{EXPERT}.g_idx"][:-8].clone()}))
    assert_expected_inline(
        message(checkpoint),
        """[load] model.safetensors: model.layers.1.mlp.experts.2.up_proj.g_idx: expected int32 (64,), found int32 (56,)""",
    )


def test_fewer_experts_than_configured(checkpoint):
    edit_config(checkpoint, lambda c: c.update({k: 6 for k in ("num_experts", "num_local_experts") if k in c}))
    assert "experts: expected experts 0 to 5 (config num_experts), found 5 experts, 0 to 4" in message(checkpoint)


def test_an_expert_is_missing(checkpoint):
    edit_tensors(checkpoint, lambda t: [t.pop(k) for k in list(t) if ".layers.0.mlp.experts.4." in k])
    assert_expected_inline(
        message(checkpoint),
        """[load] DIR: model.layers.0.mlp.experts: expected experts 0 to 4 (config num_experts), found 4 experts, 0 to 3""",
    )


def test_experts_with_bias(checkpoint):
    edit_tensors(checkpoint, lambda t: t.update({f"{EXPERT}.bias": torch.ones(40)}))
    assert_expected_inline(
        message(checkpoint),
        """[load] model.safetensors: model.layers.1.mlp.experts.2.up_proj.bias: expected experts without bias, found a bias""",
    )


def test_quantised_lm_head_that_is_tied(tmp_path):
    make_checkpoint(tmp_path, Recipe(lm_head=True))
    edit_config(tmp_path, lambda c: c.update(tie_word_embeddings=True))
    assert_expected_inline(
        message(tmp_path),
        """[load] model.safetensors: lm_head.qweight: expected no quantised lm_head in a model with tie_word_embeddings, found one""",
    )


def test_scales_that_float16_cannot_hold(checkpoint):
    edit_tensors(checkpoint, lambda t: t.update({f"{EXPERT}.scales": t[f"{EXPERT}.scales"].float() * 1.0001}))
    assert_expected_inline(
        message(checkpoint),
        """[load] model.safetensors: model.layers.1.mlp.experts.2.up_proj.scales: expected scales that float16 can hold, found float32 scales that it cannot""",
    )


def test_no_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a config\.json, found none"):
        Qwen3MoeForCausalLM.from_pretrained(tmp_path)


def test_no_weights(checkpoint):
    (checkpoint / FILE).unlink()
    assert_expected_inline(
        message(checkpoint),
        """[load] DIR: expected model.safetensors, model.safetensors.index.json or exactly one .safetensors file, found 0 .safetensors files""",
    )


def test_directory_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match="expected a directory, found nothing"):
        Qwen3MoeForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_another_architecture(checkpoint):
    edit_config(checkpoint, lambda c: c.update(model_type="llama", architectures=["LlamaForCausalLM"]))
    assert_expected_inline(
        message(checkpoint), """[load] config.json: expected model_type 'qwen3_moe', found 'llama'"""
    )


class TestIndex:
    INDEX = "model.safetensors.index.json"

    @pytest.fixture
    def sharded(self, tmp_path):
        make_checkpoint(tmp_path, Recipe(shards=2))
        return tmp_path

    def edit(self, directory, change):
        index = json.loads((directory / self.INDEX).read_text())
        change(index)
        (directory / self.INDEX).write_text(json.dumps(index))

    @pytest.mark.parametrize("path", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors"])
    def test_path_outside_the_directory(self, sharded, path):
        (sharded.parent / "outside.safetensors").write_bytes(
            (sharded / "model-00001-of-00002.safetensors").read_bytes()
        )
        self.edit(sharded, lambda i: i["weight_map"].update({"lm_head.weight": path}))
        expected = (
            f"[load] {self.INDEX}: lm_head.weight: expected a file inside the checkpoint's directory, found '{path}'"
        )
        assert message(sharded) == expected

    def test_missing_shard(self, sharded):
        (sharded / "model-00002-of-00002.safetensors").unlink()
        assert "expected the file model-00002-of-00002.safetensors, found no such file" in message(sharded)

    def test_tensor_that_its_shard_lacks(self, sharded):
        edit_tensors(sharded, lambda t: t.pop(sorted(t)[0]), "model-00002-of-00002.safetensors")
        assert "expected the tensor that model.safetensors.index.json places here, found no such tensor" in message(
            sharded
        )

    def test_tensor_that_the_index_lacks(self, sharded):
        self.edit(sharded, lambda i: i["weight_map"].pop("lm_head.weight"))
        assert "lm_head.weight: expected only tensors that model.safetensors.index.json places here" in message(sharded)

    def test_broken_index(self, sharded):
        (sharded / self.INDEX).write_text('{"weight_map": [1, 2]}')
        assert f"[load] {self.INDEX}: expected JSON with a weight_map of names to files" in message(sharded)


def test_names_of_arguments(checkpoint):
    names = {"moe_implementation": "magic", "activation": "int3", "quantize": "int2", "lm_head": "int5"}
    for argument, value in names.items():
        with pytest.raises(ValueError, match=rf"\[{argument}\] expected one of .*, got '{value}'"):
            Qwen3MoeForCausalLM.from_pretrained(checkpoint, **{argument: value})
    with pytest.raises(ValueError, match=r"\[quantize\] expected None for a checkpoint that is quantised already"):
        Qwen3MoeForCausalLM.from_pretrained(checkpoint, quantize="int4")
    with pytest.raises(ValueError, match=r"\[dtype\] expected float32, float16 or bfloat16"):
        Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.int8)
