"""Every form of GPTQ and dense checkpoint loads to transformers' logits, and saves back to the same bits."""

import sys
import warnings

import pytest
import torch

from ferrum_models import Qwen3MoeForCausalLM
from ferrum_ops.testing.compare import relative_error
from tests.models.make_checkpoint import Recipe, make_checkpoint, read_tensors

PACKED = {
    "plain": Recipe(),
    "bf16-dense-tensors": Recipe(dtype=torch.bfloat16),
    "asymmetric": Recipe(sym=False),
    "asymmetric-v2": Recipe(sym=False, checkpoint_format="gptq_v2"),
    "v2": Recipe(checkpoint_format="gptq_v2"),
    "group-8": Recipe(group_size=8),
    "group-128-of-64": Recipe(group_size=128),
    "group-minus-1": Recipe(group_size=-1),
    "long-rows-group-minus-1": Recipe(group_size=-1, config={"hidden_size": 272, "head_dim": 32}),
    "no-g_idx": Recipe(write_g_idx=False),
    "act-order-attention": Recipe(act_order="attention"),
    "act-order-all": Recipe(act_order="all", sym=False),
    "act-order-shared": Recipe(act_order="shared"),
    "act-order-group-minus-1": Recipe(act_order="all", group_size=-1),
    "sharded": Recipe(shards=3),
    "quantize_config.json": Recipe(settings_file="quantize_config.json"),
    "quantised-lm_head": Recipe(lm_head=True),
    "tied": Recipe(config={"tie_word_embeddings": True}),
    "attention-bias": Recipe(config={"attention_bias": True}),
    "zero-bias": Recipe(zero_bias=True),
    "dense-layer": Recipe(config={"mlp_only_layers": [0]}),
    "sparse-step": Recipe(config={"decoder_sparse_step": 2}),
    "no-renormalisation": Recipe(config={"norm_topk_prob": False}),
    "dynamic-group": Recipe(
        overrides={"down_proj": (4, 8), "q_proj": (4, 16)},
        dynamic={r"+:.*\.down_proj": {"group_size": 8}, r".*\.q_proj$": {"group_size": 16}},
    ),
    "dynamic-skip-attention": Recipe(skip=("k_proj",), dynamic={r"-:.*k_proj": {}}),
}
DENSE = {
    "2-bit": Recipe(bits=2, config={"moe_intermediate_size": 48}),
    "3-bit": Recipe(bits=3, sym=False, config={"moe_intermediate_size": 64}),
    "8-bit": Recipe(bits=8, sym=False),
    "8-bit-act-order-v2": Recipe(bits=8, act_order="all", checkpoint_format="gptq_v2"),
    "dynamic-8-bit-layer": Recipe(
        overrides={"layers.1.": (8, 32)}, dynamic={r".*layers\.1\..*": {"bits": 8, "group_size": 32}}
    ),
    "dynamic-skip-an-expert": Recipe(skip=("experts.3.up_proj",), dynamic={r"-:.*experts\.3\.up_proj": {}}),
}
#: One of each kind, for what `make test-fast` saves again.
SAVED_FAST = (
    "asymmetric",
    "group-minus-1",
    "no-g_idx",
    "act-order-all",
    "sharded",
    "quantised-lm_head",
    "dynamic-group",
)
UNQUANTISED = {"fp32": Recipe(quantized=False), "bf16": Recipe(quantized=False, dtype=torch.bfloat16)}
IDS = torch.arange(2 * 11).view(2, 11) * 7 % 95 + 1  # not 0, the padding token, whose logits are all zero


def load(directory, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs)


def check_logits(model, oracle):
    with torch.no_grad():
        got, expected = model(IDS).logits, oracle(IDS).logits
    worst = ((got - expected).abs().amax(-1) / expected.abs().amax(-1)).max().item()
    assert worst <= 1e-4, f"largest relative error of a row: expected at most 1e-4, got {worst:.1e}"


@pytest.mark.parametrize("name", PACKED | DENSE | UNQUANTISED)
def test_logits_equal_transformers(name, tmp_path):
    recipe = (PACKED | DENSE | UNQUANTISED)[name]
    oracle = make_checkpoint(tmp_path, recipe)
    model = load(tmp_path, activation="full")
    check_logits(model, oracle)
    layouts = {m.layout for m in model.load_report.modules}
    if name in PACKED:
        assert layouts == {"int4_cpu"}
    if name in UNQUANTISED:
        assert not layouts


@pytest.mark.parametrize("implementation", ["fused", "bucketed", "per_pair"])
@pytest.mark.parametrize("name", ["act-order-all", "asymmetric", "3-bit", "fp32"])
def test_every_implementation_generates_what_transformers_does(name, implementation, tmp_path):
    oracle = make_checkpoint(tmp_path, (PACKED | DENSE | UNQUANTISED)[name])
    model = load(tmp_path, activation="full", moe_implementation=implementation)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = oracle.generate(IDS[:1], **options)
    assert torch.equal(model.generate(IDS[:1], **options), expected)
    model.set_moe_implementation("fused")
    assert torch.equal(model.generate(IDS[:1], **options), expected)


def test_int8_activations_stay_close(tmp_path):
    oracle = make_checkpoint(tmp_path, Recipe(act_order="shared"))
    model = load(tmp_path, activation="int8")
    with torch.no_grad():
        assert relative_error(model(IDS).logits, oracle(IDS).logits) < 0.1
    model.set_activation("full")
    check_logits(model, oracle)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAVED_FAST else pytest.mark.slow) for name in PACKED]
)
def test_saving_writes_the_original_bits(name, tmp_path):
    make_checkpoint(tmp_path / "original", PACKED[name])
    model = load(tmp_path / "original")
    model.save_pretrained(tmp_path / "saved")
    original, saved = read_tensors(tmp_path / "original"), read_tensors(tmp_path / "saved")
    assert original.keys() == saved.keys()
    for key, tensor in original.items():
        packed = key.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))
        assert (
            saved[key].dtype == (tensor.dtype if packed or key.endswith("proj.bias") else torch.float32) or not packed
        )
        assert torch.equal(saved[key].to(tensor.dtype), tensor), key
    again = load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", DENSE | UNQUANTISED)
def test_dequantised_and_dense_models_reload_after_saving(name, tmp_path):
    oracle = make_checkpoint(tmp_path / "original", (DENSE | UNQUANTISED)[name])
    load(tmp_path / "original", activation="full").save_pretrained(tmp_path / "saved")
    check_logits(load(tmp_path / "saved", activation="full"), oracle)


def test_sharded_saving(tmp_path):
    make_checkpoint(tmp_path / "original", Recipe())
    load(tmp_path / "original").save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    original, saved = read_tensors(tmp_path / "original"), read_tensors(tmp_path / "saved")
    assert original.keys() == saved.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in original.items())


def test_saved_configuration_is_the_original(tmp_path):
    import json

    make_checkpoint(tmp_path / "original", Recipe(sym=False, act_order="all"))
    load(tmp_path / "original").save_pretrained(tmp_path / "saved")
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("original", "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_quantize_int4_packs_a_dense_checkpoint(tmp_path):
    oracle = make_checkpoint(tmp_path / "dense", Recipe(quantized=False, dtype=torch.bfloat16))
    model = load(tmp_path / "dense", quantize="int4", activation="full")
    assert {m.layout for m in model.load_report.modules} == {"int4_cpu"}
    with torch.no_grad():
        assert relative_error(model(IDS).logits, oracle(IDS).logits) < 0.5  # rounding random weights to 4 bits
    model.save_pretrained(tmp_path / "gptq")  # a GPTQ checkpoint now
    again = load(tmp_path / "gptq", activation="full")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert any(key.endswith(".qweight") for key in read_tensors(tmp_path / "gptq"))


@pytest.mark.parametrize("quantized", [True, False], ids=["gptq", "dense"])
@pytest.mark.parametrize("lm_head, bound", [("int8", 1e-2), ("int4", 0.2)])
def test_lm_head_is_rounded_while_loading(lm_head, bound, quantized, tmp_path):
    oracle = make_checkpoint(tmp_path / "original", Recipe(quantized=quantized))
    model = load(tmp_path / "original", lm_head=lm_head, activation="full")
    head = model.lm_head
    assert head.layout == f"{lm_head}_cpu" and head.packed.dtype == torch.uint8
    assert 0 < relative_error(head.weight, oracle.lm_head.weight) < bound
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        assert relative_error(model(IDS).logits, hidden @ head.weight.T) < 1e-5

    model.save_pretrained(tmp_path / "saved")  # the original format, with the rounded values
    original, saved = read_tensors(tmp_path / "original"), read_tensors(tmp_path / "saved")
    assert {name: (t.shape, t.dtype) for name, t in saved.items()} == {
        name: (t.shape, t.dtype) for name, t in original.items()
    }
    assert [name for name in saved if not torch.equal(saved[name], original[name])] == ["lm_head.weight"]
    again = load(tmp_path / "saved", activation="full")
    with torch.no_grad():
        assert relative_error(again(IDS).logits, model(IDS).logits) < 1e-5


def test_lm_head_cannot_be_rounded_twice_or_tied(tmp_path):
    make_checkpoint(tmp_path / "quantised", Recipe(lm_head=True))
    with pytest.raises(ValueError, match=r"\[lm_head\] expected None for a checkpoint whose lm_head is quantised"):
        load(tmp_path / "quantised", lm_head="int8")
    make_checkpoint(tmp_path / "tied", Recipe(config={"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"\[lm_head\] expected None for a model with tie_word_embeddings"):
        load(tmp_path / "tied", lm_head="int4")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations(dtype, tmp_path):
    oracle = make_checkpoint(tmp_path, Recipe())
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=dtype, activation="full")
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.dtype == dtype
    # A few tokens may pick other experts in low precision: the bound is on the bulk, the ops have their own tests.
    cosine = torch.cosine_similarity(logits.float(), oracle(IDS).logits, dim=-1)
    assert cosine.median() > 0.99


def test_default_dtype_is_the_configuration_s(tmp_path):
    make_checkpoint(tmp_path, Recipe(config={"dtype": "bfloat16"}))
    assert Qwen3MoeForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_casting_the_model_does_not_touch_packed_tensors(tmp_path):
    make_checkpoint(tmp_path, Recipe())
    model = load(tmp_path)
    expected = model.model.layers[0].mlp.experts.w13_scales.clone()
    model.to(torch.bfloat16)
    scales = model.model.layers[0].mlp.experts.w13_scales
    assert scales.dtype == torch.float16 and torch.equal(scales, expected)
    with torch.no_grad():
        assert model(IDS).logits.dtype == torch.bfloat16


def test_many_bits_warn_of_the_memory(tmp_path):
    make_checkpoint(tmp_path, Recipe(bits=8))
    with pytest.warns(UserWarning, match=r"8-bit linears .* dequantised to float32, .* MB instead of .* MB"):
        Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def test_arguments_are_those_of_transformers(tmp_path):
    from transformers import AutoConfig

    make_checkpoint(tmp_path, Recipe())
    config = AutoConfig.from_pretrained(tmp_path)
    before = config.to_dict()
    model, info = load(tmp_path, config=config, attn_implementation="eager", output_loading_info=True)
    assert config.to_dict() == before  # the caller's configuration is not touched
    assert model.config._attn_implementation == "eager"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = load(tmp_path, device_map="cpu", rms_norm_eps=1e-3)
    assert model.config.rms_norm_eps == model.model.norm.variance_epsilon == 1e-3
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="surprise"):
        load(tmp_path, surprise=1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_closed_after_loading(tmp_path):
    import gc

    make_checkpoint(tmp_path, Recipe(shards=2))
    model = load(tmp_path)
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read(), "a checkpoint file is still mapped"
    assert model.load_report.modules


@pytest.mark.parametrize("head", ["quantised", "int8", "int4"])
def test_batches_keep_the_last_row_of_each_sequence_for_a_packed_head(head, tmp_path):
    make_checkpoint(tmp_path, Recipe(lm_head=head == "quantised"))
    model = load(tmp_path, activation="full", **({} if head == "quantised" else {"lm_head": head}))
    ids = torch.arange(1, 13).view(2, 6)
    kept = model(ids, logits_to_keep=1).logits
    assert torch.equal(kept, model(ids).logits[:, -1:])
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)  # transformers' own forward pass
    assert torch.equal(model(ids, logits_to_keep=1).logits, kept)
    hook.remove()
