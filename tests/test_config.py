"""RuntimeConfig: one rule for every variable, arguments before variables, nothing kept between two of them."""

import dataclasses
import warnings

import pytest
import torch

from ferrum_models.moe import pick_moe_block_size
from ferrum_ops import RuntimeConfig
from ferrum_ops.config import BUILD_VARIABLES, Integer, Name, Switch, knobs, table

#: The knobs and defaults that are promised to users.
DEFAULTS = {
    "triton_int4": False,
    "vllm_marlin": False,
    "vllm_marlin_sms": None,
    "vllm_atomic_add": False,
    "vllm_fp32_reduce": True,
    "vllm_moe": True,
    "vllm_moe_pair_ids": True,
    "vllm_moe_zero_ws": False,
    "moe_fused": True,
    "moe_streams": 4,
    "moe_block_size": None,
    "moe_large_m_block_size": None,
    "moe_large_m_min_pairs": 1024,
    "moe_host_route": False,
    "moe_profile": False,
    "decode_op_profile": False,
    "moe_load_trace": False,
    "cuda_max_kv": None,
    "cuda_device": 0,
    "cuda_graph": False,
    "kv_dtype": "auto",
    "paged_block_size": 16,
}
SWITCHES = [knob for knob in knobs() if isinstance(knob.values, Switch)]
INTEGERS = [knob for knob in knobs() if isinstance(knob.values, Integer)]
NAMES = [knob for knob in knobs() if isinstance(knob.values, Name)]


def by_name(knob):
    return knob.name


def test_defaults():
    assert dataclasses.asdict(RuntimeConfig()) == DEFAULTS


def test_each_field_has_the_knob_of_its_name():
    assert [knob.name for knob in knobs()] == [f.name for f in dataclasses.fields(RuntimeConfig)]
    assert [knob.variable for knob in knobs()] == [f"FERRUM_{name.upper()}" for name in DEFAULTS]
    assert len(SWITCHES) + len(INTEGERS) + len(NAMES) == len(DEFAULTS)


@pytest.mark.parametrize("knob", SWITCHES, ids=by_name)
def test_switches(knob, monkeypatch):
    for texts, value in ((("1", "true", "on", "True", "ON"), True), (("0", "false", "off", "OFF"), False)):
        for text in texts:
            monkeypatch.setenv(knob.variable, text)
            assert getattr(RuntimeConfig(), knob.name) is value


@pytest.mark.parametrize("text", ["", "2", "yes", "no", " 1", "1 ", "-1", "enabled", "01"])
@pytest.mark.parametrize("knob", SWITCHES, ids=by_name)
def test_malformed_switches(knob, text, monkeypatch):
    monkeypatch.setenv(knob.variable, text)
    with pytest.raises(ValueError, match=rf"\[RuntimeConfig\] {knob.variable}: expected 1, true, on, 0, false or off,"):
        RuntimeConfig()


@pytest.mark.parametrize("knob", INTEGERS, ids=by_name)
def test_integers(knob, monkeypatch):
    lowest = min(knob.values.choices) if knob.values.choices else knob.values.lowest
    for value in (lowest, 16, 64):
        monkeypatch.setenv(knob.variable, str(value))
        assert getattr(RuntimeConfig(), knob.name) == value
    outside = (24, 0, 128) if knob.values.choices else (lowest - 1,)
    for text in (*map(str, outside), "", "x", "4.0", "0x10", " 4", "+4", "1_6", "true", "٤"):
        monkeypatch.setenv(knob.variable, text)
        with pytest.raises(ValueError, match=rf"\[RuntimeConfig\] {knob.variable}: expected (an integer of at|one of)"):
            RuntimeConfig()


def test_moe_streams_is_at_least_one():
    with pytest.raises(ValueError, match=r"\[RuntimeConfig\] moe_streams: expected an integer of at least 1, got 0"):
        RuntimeConfig(moe_streams=0)


def test_names(monkeypatch):
    assert [knob.name for knob in NAMES] == ["kv_dtype"]
    monkeypatch.setenv("FERRUM_KV_DTYPE", "int8")
    assert RuntimeConfig().kv_dtype == "int8"
    for text in ("INT8", "fp8", ""):
        monkeypatch.setenv("FERRUM_KV_DTYPE", text)
        with pytest.raises(ValueError, match=r"\[RuntimeConfig\] FERRUM_KV_DTYPE: expected one of \('auto', 'int8'\)"):
            RuntimeConfig()


@pytest.mark.parametrize(
    "argument, value, accepted",
    [
        ("moe_fused", 1, "True or False"),
        ("moe_fused", "on", "True or False"),
        ("moe_fused", None, "True or False"),
        ("moe_streams", True, "an integer of at least 1"),
        ("moe_streams", "4", "an integer of at least 1"),
        ("moe_block_size", 24, r"one of \(8, 16, 32, 48, 64\) or None"),
        ("cuda_device", -1, "an integer of at least 0"),
        ("kv_dtype", "fp8", r"one of \('auto', 'int8'\)"),
    ],
)
def test_malformed_arguments(argument, value, accepted):
    with pytest.raises(ValueError, match=rf"\[RuntimeConfig\] {argument}: expected {accepted}, got "):
        RuntimeConfig(**{argument: value})


def test_unknown_variables_are_named_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("FERRUM_MOE_STREAM", "2")
    monkeypatch.setenv("FERRUM_BLOCK", "2")
    with pytest.raises(
        ValueError, match=r"\[RuntimeConfig\] FERRUM_BLOCK, FERRUM_MOE_STREAM: expected one of "
    ) as info:
        RuntimeConfig()
    assert all(knob.variable in str(info.value) for knob in knobs())


@pytest.mark.parametrize("variable", BUILD_VARIABLES)
def test_variables_of_the_build_are_no_knobs(variable, monkeypatch):
    monkeypatch.setenv(variable, "anything")
    assert dataclasses.asdict(RuntimeConfig()) == DEFAULTS


def test_arguments_beat_variables(monkeypatch):
    monkeypatch.setenv("FERRUM_MOE_STREAMS", "2")
    monkeypatch.setenv("FERRUM_MOE_FUSED", "off")
    config = RuntimeConfig(moe_streams=3)
    assert (config.moe_streams, config.moe_fused) == (3, False)


def test_nothing_is_kept_between_configurations(monkeypatch):
    first = RuntimeConfig()
    monkeypatch.setenv("FERRUM_MOE_STREAMS", "2")
    second = RuntimeConfig()
    monkeypatch.setenv("FERRUM_MOE_STREAMS", "7")
    assert [c.moe_streams for c in (first, second, RuntimeConfig(), RuntimeConfig(moe_streams=1))] == [4, 2, 7, 1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.moe_streams = 5


def test_block_size_reaches_the_policy():
    assert pick_moe_block_size(2000, **RuntimeConfig().moe_block_size_arguments()) == 16
    assert pick_moe_block_size(2000, **RuntimeConfig(moe_block_size=48).moe_block_size_arguments()) == 48
    large = RuntimeConfig(moe_large_m_block_size=64, moe_large_m_min_pairs=500).moe_block_size_arguments()
    assert [pick_moe_block_size(pairs, **large) for pairs in (499, 500)] == [16, 64]


def test_knobs_without_effect_are_named_once():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RuntimeConfig().warn_without_effect("cpu")
        RuntimeConfig(moe_block_size=32, moe_profile=True).warn_without_effect("cpu")
        RuntimeConfig(cuda_graph=True, kv_dtype="int8").warn_without_effect(torch.device("cuda:1"))
    with pytest.warns(UserWarning) as caught:
        RuntimeConfig(cuda_graph=True, kv_dtype="int8", moe_streams=4).warn_without_effect("cpu")
    assert [str(w.message) for w in caught] == ["[RuntimeConfig] without effect on cpu: cuda_graph, kv_dtype"]


def test_table_says_what_each_knob_does():
    text = table(RuntimeConfig(moe_streams=9))
    assert all(f"`{knob.variable}`" in text and knob.effect in text for knob in knobs())
    assert all(f"{knob.name}: {knob.effect}." in RuntimeConfig.__doc__ for knob in knobs())
    assert "| `FERRUM_MOE_STREAMS` | an integer of at least 1 | 4 | 9 | cuda | streams" in text
