"""Models in the Marlin layout: the layout of CUDA, run here by its exact reference ops."""

import pytest
import torch
from safetensors.torch import load_file

from ferrum_models import Qwen3MoeForCausalLM
from ferrum_models.moe.marlin import MarlinExpertWeights
from ferrum_models.quantization.modules import MarlinLinear, PackedExperts
from ferrum_models.qwen3_moe.loading import plan_safetensors
from ferrum_ops import RuntimeConfig
from tests.models.example import EXAMPLE
from tests.models.make_checkpoint import Recipe, make_checkpoint, read_tensors
from tests.models.test_loading import IDS, check_logits
from tests.models.test_shared_data import DATA

IMPLEMENTATIONS = ("fused", "bucketed", "per_pair")
# hidden 64, expert width 40: a K that is no multiple of 64, an N that is none, and both with padding behind groups.
PACKED = {
    "symmetric": Recipe(),
    "asymmetric-v1": Recipe(sym=False),
    "asymmetric-v2": Recipe(sym=False, checkpoint_format="gptq_v2"),
    "no-g_idx": Recipe(write_g_idx=False),
    "group-16": Recipe(group_size=16, sym=False),
    "one-group": Recipe(group_size=-1),
    "group-128": Recipe(group_size=128, config={"hidden_size": 272, "head_dim": 32}),
    "act-order-own": Recipe(act_order="all", sym=False),
    "act-order-shared": Recipe(act_order="shared"),
    "act-order-attention": Recipe(act_order="attention"),
    "8-bit": Recipe(bits=8, sym=False),
    "8-bit-act-order": Recipe(bits=8, act_order="all", checkpoint_format="gptq_v2"),
    "mixed-groups": Recipe(
        overrides={"down_proj": (4, -1), "q_proj": (4, 64), "experts.1.gate": (4, 64)},
        dynamic={
            r".*down_proj$": {"group_size": -1},
            r".*q_proj$": {"group_size": 64},
            r".*experts\.1\.gate_proj$": {"group_size": 64},
        },
    ),
    "mixed-bits": Recipe(overrides={"down_proj": (8, 32)}, dynamic={r".*down_proj$": {"bits": 8}}),
    "lm_head-and-biases": Recipe(lm_head=True, zero_bias=True, config={"attention_bias": True}),
    "dense-layer": Recipe(config={"mlp_only_layers": [0]}),
    "whole-tiles": Recipe(config={"moe_intermediate_size": 64}),
}
#: Widths with padding, zero points, two orders, both numbers of bits: what `make test-fast` has of them.
FAST = ("asymmetric-v1", "act-order-own", "8-bit", "mixed-groups")


def load(directory, dtype=torch.float32, **kwargs):
    return Qwen3MoeForCausalLM.from_pretrained(directory, dtype=dtype, layout="marlin", **kwargs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in PACKED]
)
def test_logits_and_saved_bits(name, tmp_path):
    oracle = make_checkpoint(tmp_path / "original", PACKED[name])
    model = load(tmp_path / "original")
    assert {m.layout for m in model.load_report.modules} == {"marlin"}
    for implementation in IMPLEMENTATIONS:
        model.set_moe_implementation(implementation)
        check_logits(model, oracle)
    model.save_pretrained(tmp_path / "saved")
    original, saved = read_tensors(tmp_path / "original"), read_tensors(tmp_path / "saved")
    assert original.keys() == saved.keys()
    for key, tensor in original.items():
        # Biases are the activations' dtype, whatever GPTQ's are.
        assert torch.equal(saved[key].to(tensor.dtype), tensor), key
        assert saved[key].dtype == tensor.dtype, key


def test_gate_and_up_with_one_order_are_one_matrix(tmp_path):
    parts = {}
    for order in ("shared", "all"):
        make_checkpoint(tmp_path / order, Recipe(act_order=order))
        model = load(tmp_path / order)
        weights = model.model.layers[0].mlp.experts.weights
        assert isinstance(weights, MarlinExpertWeights)
        parts[order] = weights.w13.shape[0]
    assert parts == {"shared": 1, "all": 2}


@pytest.mark.parametrize(
    "recipe, layouts, warning",
    [
        (Recipe(group_size=8), {"gptq"}, "gptq layout: Marlin has groups of 128 or 64 or 32 or 16 rows or one group"),
        (Recipe(bits=2, config={"moe_intermediate_size": 48}), {"gptq"}, "Marlin has 4 or 8 bits, not 2"),
        (Recipe(overrides={"o_proj": (3, 32)}, dynamic={".*o_proj": {"bits": 3}}), {"gptq", "marlin"}, "not 3"),
    ],
)
def test_what_marlin_has_no_form_for_stays_as_on_disk(recipe, layouts, warning, tmp_path):
    oracle = make_checkpoint(tmp_path, recipe)
    with pytest.warns(UserWarning, match=warning):
        model = load(tmp_path)
    assert {m.layout for m in model.load_report.modules} == layouts
    check_logits(model, oracle)


def test_weights_rounded_while_loading(tmp_path):
    make_checkpoint(tmp_path, Recipe(quantized=False))
    expected = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantize="int4", activation="full")
    check_logits(load(tmp_path, quantize="int4"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_example_equals_the_cpu_layout(dtype):
    ids = torch.arange(1, 20).unsqueeze(0)
    expected = Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32, activation="full")(ids).logits
    model = load(EXAMPLE, dtype)
    for implementation in IMPLEMENTATIONS:
        model.set_moe_implementation(implementation)
        logits = model(ids).logits.float()
        if dtype == torch.float32:
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
        else:  # bfloat16 may move a token to another expert: what counts is that nothing goes astray
            assert torch.cosine_similarity(logits, expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("name", ["gptq-b4-g128-sym-act0", "gptq-b4-g128-sym-act1"])
def test_shared_data(name, tmp_path):
    directory = DATA / name
    if not directory.exists():
        pytest.skip(f"no shared data: {name}")
    reference = load_file(directory / "reference" / "reference.safetensors")
    model = load(directory)
    for implementation in IMPLEMENTATIONS:
        model.set_moe_implementation(implementation)
        logits, expected = model(reference["input_ids"]).logits, reference["logits"]
        assert ((logits - expected).abs().amax(-1) / expected.abs().amax(-1)).max() <= 1e-4
    model.save_pretrained(tmp_path)
    original, saved = read_tensors(directory), read_tensors(tmp_path)
    assert original.keys() == saved.keys()
    assert all(
        torch.equal(saved[k], v) for k, v in original.items() if k.endswith(("qweight", "qzeros", "scales", "g_idx"))
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, make_checkpoint(directory, Recipe(act_order="shared", sym=False))


@pytest.mark.filterwarnings("ignore:.RuntimeConfig. without effect")
@pytest.mark.parametrize(
    "knob",
    [
        {"moe_block_size": 32},
        {"vllm_moe_pair_ids": False},
        {"vllm_moe": False},
        {"moe_fused": False},
        {"vllm_moe_zero_ws": True},
        {"moe_host_route": True, "moe_fused": False},
        {"vllm_atomic_add": True, "vllm_marlin_sms": 3},
    ],
    ids=str,
)
def test_knobs_change_how_and_not_what(knob, checkpoint):
    directory, oracle = checkpoint
    model = load(directory, runtime_config=RuntimeConfig(**knob))
    check_logits(model, oracle)
    weights = model.model.layers[0].mlp.experts.weights
    assert {name: getattr(weights, name) for name in MarlinExpertWeights.settings(RuntimeConfig(**knob))} == (
        MarlinExpertWeights.settings(RuntimeConfig(**knob))
    )
    linear = model.model.layers[0].self_attn.o_proj
    assert (linear.reduction, linear.max_sms) == (weights.reduction, weights.max_sms)


@pytest.mark.slow
def test_generates_and_compiles(checkpoint):
    directory, oracle = checkpoint
    model = load(directory)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(IDS[:1], **options), oracle.generate(IDS[:1], **options))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_logits(compiled, oracle)


def test_moving_and_casting_a_model_keeps_formats_and_makes_constants_anew(checkpoint):
    directory, oracle = checkpoint
    model = load(directory)
    modules = [m for m in model.modules() if isinstance(m, (MarlinLinear, PackedExperts))]
    before = [m.workspace for m in modules]
    expected = {name: t.dtype for name, t in model.named_buffers()}
    for cast in (torch.nn.Module.double, torch.nn.Module.float):  # transformers' own refuse to
        cast(model.to("cpu"))
    assert {name: t.dtype for name, t in model.named_buffers()} == expected
    assert all(m.workspace is not old for m, old in zip(modules, before))
    assert not any("workspace" in name or "token_blocks" in name for name in model.state_dict())
    check_logits(model, oracle)


@pytest.mark.parametrize("name", ["act-order-own", "act-order-shared", "8-bit", "mixed-groups", "lm_head-and-biases"])
def test_packing_happens_on_the_device(name, tmp_path):
    """On a device without data: what is built there is what modules expect, and reading a value would raise."""
    make_checkpoint(tmp_path, PACKED[name])
    planned = plan_safetensors(
        tmp_path,
        None,
        {},
        (None, torch.bfloat16),
        device=torch.device("meta"),
        activation="full",
        quantize=None,
        lm_head=None,
        layout="marlin",
        runtime=RuntimeConfig(),
    )
    packed = {path: module() for path, module in planned.plan.modules.items()}
    for path, module in packed.items():
        if not isinstance(module, (MarlinLinear, PackedExperts)):
            continue
        for key, buffer in module.state_dict().items():
            tensor = planned.plan.tensors[f"{path}.{key}"][...]
            assert (tensor.shape, tensor.dtype) == (buffer.shape, buffer.dtype)
            assert tensor.device.type == "meta" or key == "bias"
