"""The layout is one pure choice; the on-disk layout runs everywhere; the load report says what was chosen."""

import pytest
import torch
from expecttest import assert_expected_inline

from ferrum_models import LoadReport, Qwen3MoeForCausalLM
from ferrum_models.quantization.layout import WeightFormat, marlin_group_size, pick_layout
from ferrum_models.quantization.modules import DENSE_BFLOAT16_ROWS, DENSE_CUDA_ROWS, GptqLinear, multiplies_words
from ferrum_models.report import ModuleReport
from ferrum_ops.formats import gptq
from ferrum_ops.ops.gptq import random_projection
from ferrum_ops.testing.compare import assert_close, tolerance
from tests.models.make_checkpoint import Recipe, make_checkpoint, read_tensors
from tests.models.test_loading import IDS, check_logits

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOAT, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "bits, group_sizes, device, dtype, requested, expected",
    [
        # The CPU's own layout, or dense.
        ((4,), (128,), CPU, FLOAT, None, "int4_cpu"),
        ((4,), (8,), CPU, FLOAT, None, "int4_cpu"),
        ((4,), (-1,), CPU, FLOAT, None, "int4_cpu"),
        ((4,), (32, 64), CPU, FLOAT, None, "int4_cpu"),
        ((4,), (12,), CPU, FLOAT, None, "dense: groups of 12 rows"),
        ((8,), (128,), CPU, FLOAT, None, "dense: 8-bit codes"),
        # Marlin on CUDA, or the layout on disk.
        ((4,), (128,), CUDA, BF16, None, "marlin"),
        ((8,), (32,), CUDA, torch.float16, None, "marlin"),
        ((4,), (-1,), CUDA, BF16, None, "marlin"),
        ((4,), (256,), CUDA, BF16, None, "marlin"),
        ((4,), (32, 64, -1), CUDA, BF16, None, "marlin"),
        (
            (4,),
            (24,),
            CUDA,
            BF16,
            None,
            "gptq: Marlin has groups of 128 or 64 or 32 or 16 rows or one group, not of 24",
        ),
        ((3,), (128,), CUDA, BF16, None, "gptq: Marlin has 4 or 8 bits, not 3"),
        ((4,), (128,), CUDA, FLOAT, None, "gptq: Marlin has float16 and bfloat16 activations, not float32"),
        ((4, 8), (128,), CUDA, BF16, None, "dense: 4 or 8 bits side by side"),
        # On request.
        ((4,), (128,), CPU, FLOAT, "marlin", "marlin"),
        ((2,), (128,), CPU, FLOAT, "marlin", "gptq: Marlin has 4 or 8 bits, not 2"),
        ((4,), (128,), CUDA, BF16, "gptq", "gptq"),
        ((2,), (24,), CPU, FLOAT, "gptq", "gptq"),
        ((4,), (128,), CUDA, BF16, "dense", "dense"),
        ((4,), (128,), CUDA, BF16, "int4_cpu", "int4_cpu"),
        # A device without a layout of its own.
        ((4,), (128,), torch.device("mps"), FLOAT, None, "gptq"),
    ],
)
def test_pick_layout(bits, group_sizes, device, dtype, requested, expected):
    choice = pick_layout(WeightFormat(bits, group_sizes, dtype), device, (512, 64), requested)
    assert ": ".join(filter(None, (choice.layout, choice.reason))) == expected


@pytest.mark.parametrize(
    "group_sizes, size",
    [
        ((128,), 128),
        ((256,), 128),
        ((96,), 32),
        ((64, 192), 64),
        ((-1,), -1),
        ((-1, 64), 64),
        ((48,), 16),
        ((24,), None),
    ],
)
def test_marlin_group_size(group_sizes, size):
    assert marlin_group_size(group_sizes) == size


def load(directory, **kwargs):
    return Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs)


def test_unknown_layout(tmp_path):
    with pytest.raises(ValueError, match=r"\[layout\] expected None or one of .*'marlin'.*, got 'awq'"):
        load(tmp_path, layout="awq")


@pytest.mark.parametrize("implementation", ["fused", "bucketed", "per_pair"])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_layout(bits, implementation, tmp_path):
    config = {"attention_bias": True, "moe_intermediate_size": 64}
    oracle = make_checkpoint(tmp_path, Recipe(bits=bits, sym=False, act_order="all", config=config))
    model = load(tmp_path, moe_implementation=implementation, layout="gptq")
    assert {m.layout for m in model.load_report.modules} == {"gptq"}
    check_logits(model, oracle)


@pytest.mark.parametrize(
    "recipe", [Recipe(write_g_idx=False, group_size=-1), Recipe(act_order="all"), Recipe(zero_bias=True)]
)
def test_gptq_layout_saves_the_original_bits(recipe, tmp_path):
    make_checkpoint(tmp_path / "original", recipe)
    model = load(tmp_path / "original", layout="gptq")
    assert {m.layout for m in model.load_report.modules} == {"gptq"}
    model.save_pretrained(tmp_path / "saved")
    original, saved = read_tensors(tmp_path / "original"), read_tensors(tmp_path / "saved")
    assert original.keys() == saved.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in original.items())
    assert torch.equal(load(tmp_path / "saved", layout="gptq")(IDS).logits, model(IDS).logits)


def test_gptq_layout_of_weights_rounded_while_loading(tmp_path):
    make_checkpoint(tmp_path, Recipe(quantized=False))
    packed, on_disk = (load(tmp_path, quantize="int4", activation="full", layout=name) for name in (None, "gptq"))
    assert {m.layout for m in on_disk.load_report.modules} == {"gptq"}
    assert_close("int4_linear", on_disk(IDS).logits, packed(IDS).logits, bound=1e-4)


def test_load_report(tmp_path):
    make_checkpoint(tmp_path, Recipe(overrides={"o_proj": (8, 32)}, dynamic={".*o_proj": {"bits": 8}}))
    with pytest.warns(UserWarning, match="8-bit"):
        report = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).load_report
    assert report.seconds > 0 and report.peak_nbytes >= report.baseline_nbytes > 0
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


@pytest.mark.parametrize(
    "rows, dtype, device, expected",
    [
        (DENSE_BFLOAT16_ROWS, BF16, "cpu", False),
        (DENSE_BFLOAT16_ROWS, FLOAT, "cpu", True),
        (DENSE_CUDA_ROWS - 1, BF16, "cuda", True),
        (DENSE_CUDA_ROWS, BF16, "cuda", False),
        (1, BF16, "mps", False),
    ],
)
def test_the_faster_way_to_multiply(rows, dtype, device, expected):
    assert multiplies_words(rows, dtype, device) is expected
