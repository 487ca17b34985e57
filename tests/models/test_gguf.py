"""GGUF files loaded, against transformers holding the dequantised weights and, where they are, llama.cpp's logits."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

pytest.importorskip("gguf")

import ferrum_ops
from ferrum_models import CheckpointError, Qwen3MoeForCausalLM
from ferrum_models.qwen3_moe import cache as cache_module
from ferrum_models.qwen3_moe.gguf_config import qwen3_moe_config
from ferrum_models.qwen3_moe.gguf_file import GgufCheckpoint
from ferrum_models.qwen3_moe.gguf_modules import GgufEmbedding, GgufLinear
from ferrum_models.qwen3_moe.gguf_planner import GgufPlanner
from ferrum_ops.formats.gguf import GGMLType
from ferrum_ops.formats.gguf_tiles import TILED
from ferrum_ops.testing.compare import relative_error
from tests.conftest import isa_levels
from tests.models.example import assert_steps_are_forward, hooked
from tests.models.make_gguf import Tiny, read, transformers_model, write
from tests.models.test_direct import Ops

DATA = Path(__file__).parents[3] / "shared" / "data" / "gguf"
IMPLEMENTATIONS = ("fused", "bucketed", "per_pair")

#: What llama.cpp's Q4_K_M, Q5_K_M and others mix, and types that stay dense beside packed ones.
MIXTURES = {
    "Q4_K_M": {"": GGMLType.Q4_K, "attn_v": GGMLType.Q6_K, "ffn_down_exps": GGMLType.Q6_K, "output": GGMLType.Q6_K},
    "Q5_K_M": {"": GGMLType.Q5_K, "attn_v": GGMLType.Q8_0, "ffn_down_exps": GGMLType.Q8_0},
    "Q8_0": {"": GGMLType.Q8_0},
    "Q4_0": {"": GGMLType.Q4_0, "output": GGMLType.Q6_K},
    "Q3_K": {"": GGMLType.Q3_K, "attn_v": GGMLType.Q5_0, "ffn_down_exps": GGMLType.Q5_1},
    "Q2_K": {"": GGMLType.Q2_K, "attn_v": GGMLType.Q4_1, "output": GGMLType.Q6_K},
    "IQ4": {"": GGMLType.IQ4_XS, "ffn_down_exps": GGMLType.IQ4_NL, "attn_output": GGMLType.MXFP4},
    "dense": {"": GGMLType.F16, "attn_v": GGMLType.BF16, "ffn_gate_inp": GGMLType.F16},
    "partly dense": {"": GGMLType.Q4_K, "attn_v": GGMLType.F16, "token_embd": GGMLType.F16, "output": GGMLType.F32},
}
IDS = torch.tensor([[5, 17, 99, 0, 23, 42, 8, 61], [7, 7, 3, 1, 88, 12, 30, 2]])


@pytest.fixture(scope="module")
def q4_k_m(tmp_path_factory):
    tiny = Tiny(types=MIXTURES["Q4_K_M"])
    return tiny, write(tmp_path_factory.mktemp("gguf") / "model.gguf", tiny)


def load(path, **kwargs):
    return Qwen3MoeForCausalLM.from_pretrained(path, **kwargs)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_logits_are_transformers(tmp_path, mixture):
    tiny = Tiny(types=MIXTURES[mixture])
    path = write(tmp_path / "model.gguf", tiny)
    expected = transformers_model(tiny, read(path))(IDS).logits
    tiled = load(path, gguf_repack=True)
    model = load(path, activation="full", gguf_repack=False)
    for implementation in IMPLEMENTATIONS:
        model.set_moe_implementation(implementation)
        assert relative_error(model(IDS).logits, expected) < 1e-4
    model.set_activation("int8")
    for implementation in IMPLEMENTATIONS:
        for m in (model, tiled):
            m.set_moe_implementation(implementation)
        assert torch.equal(tiled(IDS).logits, model(IDS).logits)
    cosine = torch.cosine_similarity(model(IDS).logits.flatten(), expected.flatten(), dim=0)
    assert cosine > 0.99  # tokens whose routing is close go to other experts


DENSE_MODELS = {
    "Q4_K_M": {"": GGMLType.Q4_K, "attn_v": GGMLType.Q6_K, "ffn_down": GGMLType.Q6_K, "output": GGMLType.Q6_K},
    "Q8_0": {"": GGMLType.Q8_0},
    "partly dense": {"": GGMLType.Q4_K, "ffn_up": GGMLType.F16},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("mixture", DENSE_MODELS)
def test_dense_qwen3_is_transformers(tmp_path, mixture, tied):
    tiny = Tiny(types=DENSE_MODELS[mixture], experts=0, tied=tied)
    path = write(tmp_path / "model.gguf", tiny)
    oracle = transformers_model(tiny, read(path))
    model = load(path, activation="full", gguf_repack=False)
    assert relative_error(model(IDS).logits, oracle(IDS).logits) < 1e-4
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(IDS, **options), oracle.generate(IDS, **options))
    model.set_activation("int8")
    assert torch.equal(load(path, gguf_repack=True)(IDS).logits, model(IDS).logits)
    assert torch.cosine_similarity(model(IDS).logits.flatten(), oracle(IDS).logits.flatten(), dim=0) > 0.99
    model.save_pretrained(tmp_path / "saved")
    assert relative_error(load(tmp_path / "saved", dtype=torch.float32)(IDS).logits, oracle(IDS).logits) < 1e-4


@pytest.mark.parametrize("file", ["Q4_K_M", "Q8_0"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("repack", [False, True], ids=["mapped", "tiles"])
def test_shared_files(file, implementation, repack):
    if not DATA.exists():
        pytest.skip(f"needs {DATA}")
    ids = torch.tensor([[int(i) for i in (DATA / "ids.txt").read_text().split()]])
    oracle, llama_cpp = (
        torch.from_numpy(np.fromfile(DATA / f"{file}{kind}.logits", dtype="<f4").reshape(24, 512))
        for kind in (".fp32", "")
    )
    model = load(DATA / f"{file}.gguf", activation="full", moe_implementation=implementation, gguf_repack=repack)
    logits = model(ids).logits[0]
    assert relative_error(logits, oracle) < 1e-4
    assert torch.equal(logits.argmax(-1), oracle.argmax(-1))
    model.set_activation("int8")
    logits = model(ids).logits[0]
    for other in (oracle, llama_cpp):
        assert torch.cosine_similarity(logits.flatten(), other.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("repack", [False, True], ids=["mapped", "tiles"])
def test_weights_are_the_files(q4_k_m, repack):
    tiny, path = q4_k_m
    model, weights = load(path, gguf_repack=repack), read(path)
    saved = model.state_dict_to_save()
    assert torch.equal(saved["model.embed_tokens.weight"], weights["token_embd.weight"])
    assert torch.equal(saved["lm_head.weight"], weights["output.weight"])
    for i in range(tiny.layers):
        for ours, theirs in (
            ("q_proj", "attn_q"),
            ("k_proj", "attn_k"),
            ("v_proj", "attn_v"),
            ("o_proj", "attn_output"),
        ):
            name = f"model.layers.{i}.self_attn.{ours}.weight"
            assert torch.equal(saved[name], weights[f"blk.{i}.{theirs}.weight"])
        for e in range(tiny.experts):
            for part in ("gate", "up", "down"):
                name = f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight"
                assert torch.equal(saved[name], weights[f"blk.{i}.ffn_{part}_exps.weight"][e])


def test_blocks_stay_in_the_mapped_file(q4_k_m):
    """No second copy: every packed buffer lies in a mapping of the file."""
    _, path = q4_k_m
    model = load(path, gguf_repack=False)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    if not maps:
        pytest.skip("needs /proc/self/maps")
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    packed = [b for b in model.buffers() if b.dtype == torch.uint8]
    assert len(packed) == 2 + 2 * (3 + 1 + 3)
    for buffer in packed:
        assert any(first <= buffer.data_ptr() and buffer.data_ptr() + buffer.nbytes <= last for first, last in ranges)
    on_disk = sum(b.nbytes for b in packed)
    assert sum(m.nbytes for m in model.load_report.modules) == on_disk
    assert model.memory_footprint() < on_disk * 1.05


def test_tiles_are_all_that_is_in_memory(q4_k_m):
    """Every matrix that divides into tiles stands in them, about as large; the others and the embedding stay mapped."""
    _, path = q4_k_m
    model, mapped = load(path, gguf_repack=True), load(path, gguf_repack=False)
    layer = model.model.layers[0]
    assert all(t >= TILED for t in layer.self_attn.qkv_proj.types)
    assert layer.mlp.experts.weights.down_type == GGMLType.Q6_K + TILED
    assert model.lm_head.types == (GGMLType.Q6_K,)  # 100 rows
    assert model.model.embed_tokens.blocks.shape == mapped.model.embed_tokens.blocks.shape
    assert model.memory_footprint() < mapped.memory_footprint() * 1.03
    packed = sum(b.nbytes for b in model.buffers() if b.dtype == torch.uint8)
    assert sum(m.nbytes for m in model.load_report.modules) == packed
    assert "Q4_K tiles" in repr(layer.self_attn.qkv_proj)


def test_repacking_is_the_default_where_there_are_kernels_for_it(q4_k_m):
    _, path = q4_k_m
    for level in isa_levels():
        with ferrum_ops.use_cpu_isa(level):
            types = load(path).model.layers[0].self_attn.o_proj.types
        assert types == (GGMLType.Q4_K + (TILED if level == "avx512" else 0),)


def test_repacking_is_refused_without_a_gguf_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"\[gguf_repack\] expected None for a checkpoint that is not GGUF, got True"):
        load(tmp_path, gguf_repack=True)


def test_fused_projection_is_one_module(q4_k_m):
    _, path = q4_k_m
    model = load(path, gguf_repack=False)
    qkv = model.model.layers[0].self_attn.qkv_proj
    assert isinstance(qkv, GgufLinear) and qkv.types == (GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q6_K)
    assert isinstance(model.model.embed_tokens, GgufEmbedding)
    assert "gguf" in model.load_report.layouts()


@pytest.mark.parametrize("type", [GGMLType.Q6_K, GGMLType.F16], ids=lambda t: t.name)
def test_tied_output(tmp_path, type):
    tiny = Tiny(types={"": GGMLType.Q4_K, "token_embd": type}, tied=True)
    path = write(tmp_path / "tied.gguf", tiny)
    model = load(path, activation="full")
    assert relative_error(model(IDS).logits, transformers_model(tiny, read(path))(IDS).logits) < 1e-4
    if type == GGMLType.Q6_K:
        assert model.lm_head.blocks()[0].data_ptr() == model.model.embed_tokens.blocks.data_ptr()
    else:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_odd_expert_width(tmp_path):
    """Any width: transformers' own reader takes only 768."""
    tiny = Tiny(width=160, types={"": GGMLType.Q8_0, "ffn_gate_exps": GGMLType.Q4_K})
    path = write(tmp_path / "odd.gguf", tiny)
    model = load(path, activation="full")
    assert model.config.moe_intermediate_size == 160
    assert relative_error(model(IDS).logits, transformers_model(tiny, read(path))(IDS).logits) < 1e-4


@pytest.mark.parametrize(
    "keys, parameters",
    [
        ({"rope.freq_base": 1e6}, {"rope_type": "default", "rope_theta": 1e6}),
        ({"rope.freq_base": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
    ],
)
def test_rope_keys(tmp_path, keys, parameters):
    tiny = Tiny()
    path = write(tmp_path / "rope.gguf", tiny, keys=keys)
    model = load(path, activation="full")
    assert {name: model.config.rope_parameters[name] for name in parameters} == parameters
    expected = transformers_model(tiny, read(path), rope_parameters=parameters)
    assert relative_error(model(IDS).logits, expected(IDS).logits) < 1e-4


def test_metadata(tmp_path):
    keys = {"expert_weights_norm": False, "tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.bos_token_id": 3}
    keys |= {"tokenizer.ggml.padding_token_id": 9, "attention.key_length": None, "attention.value_length": None}
    tiny = Tiny()
    config = load(write(tmp_path / "m.gguf", tiny, keys=keys)).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, 7, 9)
    assert config.norm_topk_prob is False and config.head_dim == 64
    assert config.max_position_embeddings == 512 and config.vocab_size == 100
    again = load(write(tmp_path / "n.gguf", tiny), num_experts_per_tok=1)
    assert again.config.num_experts_per_tok == 1 and again.config.norm_topk_prob is True


def test_ways_to_name_a_file(q4_k_m):
    _, path = q4_k_m
    expected = load(path)(IDS).logits
    for model in (load(str(path)), load(path.parent), load(path.parent, gguf_file=path.name)):
        assert torch.equal(model(IDS).logits, expected)


def test_split_files(tmp_path, q4_k_m):
    tiny, path = q4_k_m
    for number in range(3):
        write(tmp_path / f"m-0000{number + 1}-of-00003.gguf", tiny, split=(number, 3))
    expected = load(path)(IDS).logits
    assert torch.equal(load(tmp_path)(IDS).logits, expected)
    assert torch.equal(load(tmp_path / "m-00001-of-00003.gguf")(IDS).logits, expected)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf: expected one of the 3 files of a split"):
        load(tmp_path)


def test_generate_is_transformers(q4_k_m):
    tiny, path = q4_k_m
    expected = transformers_model(tiny, read(path)).generate(IDS, max_new_tokens=6, do_sample=False)
    model = load(path, activation="full")
    for implementation in IMPLEMENTATIONS:
        model.set_moe_implementation(implementation)
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_halves_are_one_op_with_the_bits_of_the_modules(q4_k_m, dtype):
    tiny, path = q4_k_m
    model = load(path, dtype=dtype)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for part in IDS.split((5, 1, 2), 1):
        with torch.no_grad(), Ops(tiny.hidden) as ops:
            got = model(part, past_key_values=caches[0])
        assert {"ferrum::decoder_attention_gguf_", "ferrum::decoder_experts_gguf"} <= ops.names
        assert not {"ferrum::fused_add_rms_norm", "ferrum::moe_experts_gguf"} & ops.names
        with hooked(model):
            assert torch.equal(got.logits, model(part, past_key_values=caches[1]).logits)
    for own, other in zip(caches[0].layers, caches[1].layers):
        assert torch.equal(own.keys, other.keys) and torch.equal(own.values, other.values)


@pytest.mark.parametrize("repack", [False, True], ids=["mapped", "tiles"])
def test_bound_model_is_the_model(q4_k_m, repack, monkeypatch):
    """Steps with the ops' arguments looked up beforehand: the same bits, when buffers grow as well."""
    monkeypatch.setattr(cache_module, "LEAST_GROWTH", 2)
    model = load(q4_k_m[1], gguf_repack=repack)
    steps = assert_steps_are_forward(model, IDS, IDS)
    assert steps._bound is not None


def test_generate_dequantises_no_table(q4_k_m, monkeypatch):
    """The dense table of a packed embedding or head, asked for once a token, costs more than the token."""
    model = load(q4_k_m[1])
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)

    def refuse(module):
        raise AssertionError(f"{type(module).__name__} was dequantised")

    for module_type in (GgufEmbedding, GgufLinear):
        monkeypatch.setattr(module_type, "weight", property(refuse))
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("repack", [False, True], ids=["mapped", "tiles"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_in_one_graph(q4_k_m, implementation, repack):
    torch.compiler.reset()
    _, path = q4_k_m
    model = load(path, moe_implementation=implementation, gguf_repack=repack)
    expected = model(IDS).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(IDS).logits, expected)


def test_bfloat16(q4_k_m):
    tiny, path = q4_k_m
    model = load(path, dtype=torch.bfloat16, activation="full")
    assert model.dtype == torch.bfloat16 and model.model.embed_tokens(IDS).dtype == torch.bfloat16
    expected = transformers_model(tiny, read(path))(IDS).logits
    assert torch.cosine_similarity(model(IDS).logits.float().flatten(), expected.flatten(), dim=0) > 0.99
    assert model.float()(IDS).logits.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.float32


def test_saved_dense_and_loaded_again(q4_k_m, tmp_path):
    _, path = q4_k_m
    model = load(path, activation="full")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert getattr(again.config, "quantization_config", None) is None
    assert relative_error(again(IDS).logits, model(IDS).logits) < 1e-5


def test_a_type_without_a_kernel_is_dequantised_with_a_warning(tmp_path):
    """IQ2_S: only the package gguf decodes it."""
    tiny = Tiny()
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (4, 256, 82), dtype=np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(0.001).tobytes(), dtype=np.uint8)
    path = write(tmp_path / "m.gguf", tiny, tensors=[("blk.1.ffn_up_exps.weight", blocks, 22)])
    with pytest.warns(
        UserWarning,
        match=r"type IQ2_S \(blk.1.ffn_up_exps.weight, .*\) have no packed kernel on cpu .* "
        r"dequantised to float32, 1.0 MB instead of 0.1 MB",
    ):
        model = load(path, activation="full")
    assert relative_error(model(IDS).logits, transformers_model(tiny, read(path))(IDS).logits) < 1e-4


def test_a_device_without_kernels_gets_dense_weights_with_a_warning(q4_k_m):
    _, path = q4_k_m
    checkpoint = GgufCheckpoint(path)
    plan = GgufPlanner(
        qwen3_moe_config(checkpoint),
        checkpoint,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        activation="int8",
    ).plan()
    assert plan.packed == 0 and all(t.dtype == torch.bfloat16 for t in plan.tensors.values())
    assert len(plan.report.warnings) == 2
    assert re.match(
        r"\[load\] 11 tensors of type Q4_K \(token_embd.weight, ...\) have no packed kernel on cuda .*: dequantised to "
        r"bfloat16, 2.8 MB instead of 0.8 MB",
        plan.report.warnings[0],
    )
    weights = read(path)
    experts = plan.tensors["model.layers.1.mlp.experts.gate_up_proj"][...]
    expected = torch.cat([weights[f"blk.1.ffn_{name}_exps.weight"] for name in ("gate", "up")], dim=1)
    assert torch.equal(experts, expected.bfloat16())


def test_tokenizer_and_chat_template(tmp_path):
    """transformers' converter reads them from the same file."""
    tokens = [*(chr(c) for c in range(33, 127)), "he", "ll", "hell", "<|endoftext|>", "<|im_end|>"]
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    arrays = {"tokens": tokens, "merges": ["h e", "l l", "he ll"], "token_type": [1] * 97 + [3, 3]}
    keys = {f"tokenizer.ggml.{name}": value for name, value in arrays.items()}
    keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.chat_template": template}
    keys |= {"tokenizer.ggml.eos_token_id": 98, "tokenizer.ggml.padding_token_id": 97}
    write(tmp_path / "m.gguf", Tiny(), keys=keys)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ids = [tokens.index("hell"), tokens.index("o")]
    assert tokenizer("hello").input_ids == ids and tokenizer.decode(ids) == "hello"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_dict=False)
    assert chat == [*ids, 98]  # the tokenizer's own eos_token is the file's in later versions of transformers only
    model = load(tmp_path / "m.gguf")
    assert model.generation_config.eos_token_id == 98
    assert model.generate(torch.tensor([chat]), max_new_tokens=3).shape[1] > 3


def test_quantize_is_refused(q4_k_m):
    with pytest.raises(ValueError, match=r"\[quantize\] expected None for a checkpoint that is quantised already"):
        load(q4_k_m[1], quantize="int4")
