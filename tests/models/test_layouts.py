"""The layout is one pure choice; the on-disk layout runs everywhere; the load report says what was chosen."""

import pytest
import torch
from expecttest import assert_expected_inline

from ferrum_models import LoadReport, Qwen3MoeForCausalLM
from ferrum_models.quantization.layout import pick_layout
from ferrum_models.quantization.modules import DENSE_BFLOAT16_ROWS, GptqLinear
from ferrum_models.qwen3_moe import planner
from ferrum_models.report import ModuleReport
from ferrum_ops.formats import gptq
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.testing.compare import assert_close, tolerance
from tests.models.make_checkpoint import Recipe, make_checkpoint, read_tensors
from tests.models.test_loading import IDS, check_logits

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "bits, group_size, device, layout",
    [
        (4, 128, CPU, "int4_cpu"),
        (4, 8, CPU, "int4_cpu"),
        (4, None, CPU, "dense"),
        (4, 128, CUDA, "gptq"),
        (4, None, CUDA, "gptq"),
        (8, 128, CPU, "dense"),
        (3, 128, CUDA, "dense"),
    ],
)
def test_pick_layout(bits, group_size, device, layout):
    assert pick_layout(bits, group_size, device) == layout


@pytest.fixture
def gptq_everywhere(monkeypatch):
    """What a device without packed kernels gets, on the CPU so that it can run here."""
    monkeypatch.setattr(planner, "pick_layout", lambda bits, group_size, device: pick_layout(bits, group_size, CUDA))


@pytest.mark.parametrize("implementation", ["fused", "bucketed", "per_pair"])
def test_gptq_layout(implementation, gptq_everywhere, tmp_path):
    oracle = make_checkpoint(tmp_path, Recipe(sym=False, act_order="all", config={"attention_bias": True}))
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, moe_implementation=implementation)
    assert {m.layout for m in model.load_report.modules} == {"gptq"}
    check_logits(model, oracle)


@pytest.mark.parametrize("recipe", [Recipe(write_g_idx=False), Recipe(act_order="all"), Recipe(zero_bias=True)])
def test_gptq_layout_saves_the_original_bits(recipe, gptq_everywhere, tmp_path):
    make_checkpoint(tmp_path / "original", recipe)
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    original, saved = read_tensors(tmp_path / "original"), read_tensors(tmp_path / "saved")
    assert original.keys() == saved.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in original.items())
    assert torch.equal(
        Qwen3MoeForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)(IDS).logits, model(IDS).logits
    )


def test_load_report(tmp_path):
    make_checkpoint(tmp_path, Recipe(overrides={"o_proj": (8, 32)}, dynamic={".*o_proj": {"bits": 8}}))
    with pytest.warns(UserWarning, match="8-bit"):
        report = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).load_report
    assert report.seconds > 0 and report.peak_nbytes > report.baseline_nbytes > 0
    assert report.model_nbytes < report.dense_nbytes
    assert_expected_inline(
        report.layouts(),
        """\
dense: 1 modules, 65,536 bytes (dense 65,536)
int4_cpu: 4 modules, 68,352 bytes (dense 438,272)""",
    )
    assert_expected_inline(
        "\n".join(report.warnings),
        """[load] 2 8-bit linears (model.layers.0.self_attn.o_proj, ...) have no packed kernel for their bits or groups: dequantised to float32, 0.1 MB instead of 0.0 MB""",
    )


def test_load_report_is_readable():
    report = LoadReport(
        [ModuleReport("a", "int4_cpu", 100, 800), ModuleReport("b", "int4_cpu", 50, 400)],
        ["careful"],
        1.5,
        1000,
        4000,
        3000,
    )
    assert_expected_inline(
        str(report),
        """\
loaded in 1.50 s, 1,000 bytes (dense 2,050), peak resident 4,000 bytes
int4_cpu: 2 modules, 150 bytes (dense 1,200)
careful""",
    )


def test_memory_footprint_counts_what_is_held(tmp_path):
    make_checkpoint(tmp_path, Recipe(config={"tie_word_embeddings": True}))
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert model.memory_footprint() == sum(held.values()) == model.load_report.model_nbytes


def test_a_fresh_model_runs_without_a_checkpoint():
    from tests.models.make_checkpoint import tiny_config

    model = Qwen3MoeForCausalLM(tiny_config(), moe_implementation="bucketed")
    assert model(IDS).logits.isfinite().all()  # without torch.no_grad(): nothing in it requires grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, DENSE_BFLOAT16_ROWS - 1, DENSE_BFLOAT16_ROWS, 128])
def test_gptq_linear_is_right_whichever_way_it_multiplies(dtype, rows):
    tensors = random_projection(96, 40, 3, 4, "cpu")
    g_idx, bias = torch.randperm(96).int() % 3, torch.randn(40).to(dtype)
    linear = GptqLinear(*tensors, g_idx, bias, bits=4, zero_offset=1)
    x = torch.randn(1, rows, 96).to(dtype)
    weight = gptq.dequantize(tensors[0], tensors[1], tensors[2].double(), g_idx, 4, 1)
    # Dequantised weights are rounded to bfloat16 once more.
    assert_close("gptq_gemm", linear(x), x.double() @ weight + bias.double(), 2 * tolerance("gptq_gemm", dtype))
