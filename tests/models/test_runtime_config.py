"""The knobs of a model: where they come from, that two models keep their own, and what they do on a CPU."""

import re
import warnings

import pytest
import torch

from ferrum_models import Qwen3MoeForCausalLM
from ferrum_ops import RuntimeConfig
from tests.models.make_checkpoint import Recipe, make_checkpoint

PROMPT = torch.tensor([[5, 7, 11]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(directory, Recipe())
    return directory


def load(directory, **kwargs):
    return Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs)


def generate(model):
    return model.generate(PROMPT, max_new_tokens=4, do_sample=False, pad_token_id=0)


def test_two_models_keep_their_own_knobs(checkpoint, monkeypatch):
    monkeypatch.setenv("FERRUM_MOE_BLOCK_SIZE", "32")
    first, second = load(checkpoint), load(checkpoint, runtime_config=RuntimeConfig(moe_block_size=64))
    monkeypatch.setenv("FERRUM_MOE_BLOCK_SIZE", "48")
    sizes = [model.runtime_config.moe_block_size for model in (first, second, load(checkpoint))]
    assert sizes == [32, 64, 48]


def test_a_malformed_variable_stops_loading(checkpoint, monkeypatch):
    monkeypatch.setenv("FERRUM_MOE_PROFILE", "yes")
    with pytest.raises(
        ValueError, match=r"\[RuntimeConfig\] FERRUM_MOE_PROFILE: expected 1, true, on, 0, false or off"
    ):
        load(checkpoint)


def test_knobs_without_effect_are_named_once_per_model(checkpoint, monkeypatch):
    monkeypatch.setenv("FERRUM_KV_DTYPE", "int8")
    with pytest.warns(UserWarning, match="RuntimeConfig") as caught:
        model = load(checkpoint, runtime_config=RuntimeConfig(cuda_graph=True))
        generate(model)
    messages = [str(w.message) for w in caught if "RuntimeConfig" in str(w.message)]
    assert messages == ["[RuntimeConfig] without effect on cpu: cuda_graph, kv_dtype"]
    monkeypatch.delenv("FERRUM_KV_DTYPE")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*RuntimeConfig.*")
        load(checkpoint)


def test_profile_is_printed_and_changes_nothing(checkpoint, capfd):
    expected = generate(load(checkpoint))
    assert "phase" not in capfd.readouterr().err
    assert torch.equal(generate(load(checkpoint, runtime_config=RuntimeConfig(moe_profile=True))), expected)
    err = capfd.readouterr().err
    assert all(word in err for word in ("phase", "calls", "route", "fused"))


def test_load_trace_has_a_line_for_each_module(checkpoint, capfd):
    load(checkpoint)
    assert "[load]" not in capfd.readouterr().err
    model = load(checkpoint, runtime_config=RuntimeConfig(moe_load_trace=True))
    # Anywhere in a line: transformers' progress bar writes to stderr too.
    told = re.findall(r"\[load\] ([\w.]+): ([\d,]+) bytes in [\d.]+ ms\n", capfd.readouterr().err)
    assert sorted((name, int(nbytes.replace(",", ""))) for name, nbytes in told) == sorted(
        (module.name, module.nbytes) for module in model.load_report.modules
    )


def test_a_configuration_is_enough():
    """A model that is built rather than loaded takes the variables too, or what it is given."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
    )
    assert Qwen3MoeForCausalLM(config).runtime_config == RuntimeConfig()
    given = RuntimeConfig(moe_streams=2)
    assert Qwen3MoeForCausalLM(config, runtime_config=given).runtime_config is given
