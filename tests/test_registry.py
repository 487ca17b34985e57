"""The rules of the house: what every op has, where its parts lie, and what no file may do."""

import ast
import re
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

import ferrum_ops
from ferrum_ops import table
from ferrum_ops.testing.compare import TOLERANCES
from ferrum_ops.testing.timing import torch_op

ROOT = Path(__file__).parents[1]
SCHEMA_FILE = ROOT / "csrc" / "schema.cpp"
# Files whose stem is not a family, by folder.
INFRASTRUCTURE = {
    "csrc/cpu": {"allocate", "isa", "simd", "tensor"},
    "ferrum_ops/ops": {"__init__"},
    "tests/ops": {"__init__", "test_every_op"},
    "benchmarks/ops": {"__init__"},
}
#: Ops without a kernel of their own on CPU, and why they need none.
NO_CPU_KERNEL = {
    "gptq_moe_gemm": "experts on the CPU are re-packed at load for moe_experts_int4",
    "marlin_dequantize_out": "a layout for tensor cores; the reference is its meaning",
    "marlin_gemm": "a layout for tensor cores; the reference is its meaning",
    "marlin_moe_gemm": "a layout for tensor cores; the reference is its meaning",
    "marlin_permute_scales": "data movement at load",
    "marlin_repack": "data movement at load",
    "marlin_repack_zeros": "data movement at load",
    "marlin_unpack": "data movement at save",
    "marlin_unpermute_scales": "data movement at save",
    "route_topk_align": "blocks for the products of a layout for tensor cores; the reference is two ops' meaning",
}
#: Ops whose samples need no empty tensor, and why.
NO_EMPTY_INPUT = {
    "int4_pack": "a weight matrix has rows and columns",
    "int4_unpack": "a weight matrix has rows and columns",
}
#: Ops that mutate one argument and return something else, and why.
WRITES_AND_RETURNS = {
    "decoder_attention_gguf_": "half a layer, which appends keys and values on its way",
    "decoder_attention_int4_": "half a layer, which appends keys and values on its way",
    "split_qkv_norm_rope_paged_": "one pass makes q and writes k and v",
}
LEVELS = ("_generic", "_avx2", "_avx512")

# With room above ARCHITECTURE's figures (400 and 60): a limit is for noticing, not for splitting a sentence.
MAX_FILE_LINES = {".cpp": 480, ".h": 480, ".py": 620}
MAX_FUNCTION_LINES = 90


def schema_lines():
    """The schemas of csrc/schema.cpp in order; string literals that follow each other are one string."""
    definitions = re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", SCHEMA_FILE.read_text())
    return ["".join(re.findall(r'"([^"]*)"', literals)) for literals in definitions]


def op_name(schema):
    return schema.partition("(")[0]


NAMES = [op_name(schema) for schema in schema_lines()]
FAMILIES = sorted({op.family for op in ferrum_ops.OPS.values()})


def sources(*folders, suffixes):
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_the_schema_file_is_the_only_list():
    assert len(NAMES) > 20
    defined = {n.removeprefix("ferrum::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("ferrum::")}
    # A model may wrap a module as an op of its own, in its own namespace.
    assert defined == set(NAMES)


def test_schemas_are_alphabetical():
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_schema_is_registered(name):
    op = ferrum_ops.OPS.get(name)
    assert op is not None, f"{name}: no reference; call register() in ferrum_ops/ops/<family>.py"
    returns = len(torch_op(name)._schema.returns) > 0
    assert op.fake is not None or op.composite or not returns, f"{name}: an op that returns something needs a fake"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"ferrum::{name}", "CompositeImplicitAutograd") == op.composite
    if op.composite:
        kernels = [key for key in ("CPU", "CUDA", "MPS", "Meta") if has(f"ferrum::{name}", key)]
        opaque = [key for key in kernels if not has(f"ferrum::{name}", f"Autograd{key}")]
        assert op.fake is None and not opaque, f"{name}: autograd sees through a composite op, not through {opaque}"


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_sample_inputs(name):
    cases = list(ferrum_ops.OPS[name].inputs("cpu", torch.float32))
    assert cases, f"{name}: no sample inputs"
    tensors = [[a for a in case if isinstance(a, torch.Tensor)] for case in cases]
    some_empty = any(t.numel() == 0 for case in tensors for t in case)
    assert some_empty != (name in NO_EMPTY_INPUT), f"{name}: expected an empty sample, or a reason in NO_EMPTY_INPUT"
    arguments = torch_op(name)._schema.arguments
    for case in cases:
        assert len(case) <= len(arguments), f"{name}: {len(arguments)} arguments, a sample has {len(case)}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder, prefix", [("tests/ops", "test_"), ("benchmarks/ops", "bench_")])
def test_every_op_is_tested_and_timed_in_its_familys_file(name, folder, prefix):
    file = ROOT / folder / f"{prefix}{ferrum_ops.OPS[name].family}.py"
    assert file.exists(), f"{name}: expected {relative(file)}"
    packet = name.partition(".")[0]
    assert re.search(rf"\b{packet}\b", file.read_text()), f"{name}: not mentioned in {relative(file)}"


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_a_public_function_with_a_docstring(name):
    packet = name.partition(".")[0]
    function = getattr(ferrum_ops, packet)
    assert packet in ferrum_ops.__all__
    assert function.__doc__ and len(function.__doc__) > 40, f"{packet}: expected a docstring"


def test_mutating_ops_return_nothing_and_say_so_in_their_name():
    """A workspace is scratch, the same after a call as before it: an op that has one may return new tensors."""
    for name in NAMES:
        schema = torch_op(name)._schema
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        mutates = any(argument != "workspace" for argument in written)
        assert all(r.alias_info is None for r in schema.returns) or not written, f"{name}: returns what it mutates"
        packet = name.partition(".")[0]
        assert mutates == packet.endswith(("_", "_out")), f"{name}: only a mutating op ends in _ or _out"
        returns = len(schema.returns) > 0 and name not in WRITES_AND_RETURNS
        assert not mutates or not returns, f"{name}: a mutating op returns (), or has a reason in WRITES_AND_RETURNS"
        assert all(r.alias_info is None for r in schema.returns) or not mutates, f"{name}: returns what it mutated"


@pytest.mark.parametrize("folder", INFRASTRUCTURE)
def test_files_are_named_after_their_family(folder):
    prefixes = {"tests/ops": "test_", "benchmarks/ops": "bench_"}
    for path in sources(folder, suffixes={".cpp", ".h", ".py"}):
        stem = path.stem
        for level in LEVELS:
            stem = stem.removesuffix(level)
        if stem in INFRASTRUCTURE[folder]:
            continue
        stem = stem.removeprefix(prefixes.get(folder, ""))
        # A family may have several files, csrc/cpu/<family>_<part>.cpp.
        assert any(stem == f or (folder == "csrc/cpu" and stem.startswith(f"{f}_")) for f in FAMILIES), (
            f"{relative(path)}: expected one of {FAMILIES}"
        )


def test_every_family_registers_its_cpu_kernels_in_one_file():
    for family in FAMILIES:
        ops = [op for op in ferrum_ops.OPS.values() if op.family == family]
        names = [op.name for op in ops if not op.composite and op.name not in NO_CPU_KERNEL]
        assert not names or (ROOT / "csrc" / "cpu" / f"{family}.cpp").exists(), f"expected csrc/cpu/{family}.cpp"


def test_missing_cpu_kernels_are_listed():
    missing = {name for name, devices in ferrum_ops.backends().items() if devices["cpu"] == "reference"}
    assert missing == set(NO_CPU_KERNEL)


def test_the_tolerance_table_names_ops():
    assert {name for name, _ in TOLERANCES} <= set(NAMES)


def test_kernels_of_one_level_include_no_torch_header():
    for path in sources("csrc/common", "csrc/cpu", suffixes={".cpp", ".h"}):
        if path.parent.name == "common" or path.stem.endswith(LEVELS):
            assert "<torch/" not in path.read_text(), f"{relative(path)}: expected no torch header"


def test_readme_has_the_table_of_ops():
    assert table.main(["--check", str(ROOT / "README.md")]) == 0, "run `make table`"


def test_table_check_sees_a_difference(tmp_path, capsys):
    file = tmp_path / "page.md"
    file.write_text(f"a\n{table.BEGIN}\n{table.END}\nb\n")
    assert table.main(["--check", str(file)]) == 1
    assert table.main(["--write", str(file)]) == 0
    assert table.main(["--check", str(file)]) == 0
    text = file.read_text()
    assert text.startswith("a\n") and text.endswith("b\n") and "| marlin | `marlin_repack` |" in text
    file.write_text(text.replace("`marlin_repack`", "`marlin_pack`"))
    assert table.main(["--check", str(file)]) == 1
    file.write_text("no markers")
    assert table.main(["--check", str(file)]) == 1
    assert "expected <!-- ops:begin -->" in capsys.readouterr().err


def test_environment_variables_are_read_in_one_place():
    readers = re.compile(r"\bos\.(environ|getenv)|\bfrom os import\b|\bgetenv\s*\(")
    for path in sources("ferrum_ops", "ferrum_models", "csrc", suffixes={".py", ".cpp", ".h"}):
        if relative(path) != "ferrum_ops/config.py":
            match = readers.search(path.read_text())
            assert match is None, f"{relative(path)}: {match[0]}; expected only ferrum_ops/config.py to read variables"


def test_nothing_is_imported_from_another_layer():
    """Ops know nothing of models."""
    for path in sources("ferrum_ops", suffixes={".py"}):
        assert "ferrum_models" not in path.read_text(), f"{relative(path)}: expected no ferrum_models"


@pytest.mark.parametrize("suffix", MAX_FILE_LINES)
def test_files_stay_readable_in_one_sitting(suffix):
    for path in sources("csrc", "ferrum_ops", "ferrum_models", suffixes={suffix}):
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_FILE_LINES[suffix], (
            f"{relative(path)}: expected at most {MAX_FILE_LINES[suffix]} lines, got {lines}"
        )


def test_functions_stay_readable_in_one_sitting():
    for path in sources("ferrum_ops", "ferrum_models", suffixes={".py"}):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.body[0].lineno - docstring.count("\n")
                assert lines <= MAX_FUNCTION_LINES, (
                    f"{relative(path)}: {node.name}: expected at most {MAX_FUNCTION_LINES} lines, got {lines}"
                )


def test_schemas_are_frozen():
    """Exported programs carry these. To accept a deliberate change: EXPECTTEST_ACCEPT=1 and a line in CHANGELOG.md."""
    schemas = "\n".join(str(torch_op(name)._schema).removeprefix("ferrum::") for name in NAMES)
    assert_expected_inline(
        schemas,
        """\
add_bias_(Tensor(a!) x, Tensor bias) -> ()
argmax_rows(Tensor logits, Tensor? mask=None) -> Tensor
attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_lens, float scale, bool causal=True, int window=0) -> Tensor
decoder_attention_gguf_(Tensor hidden, Tensor norm_weight, float eps, Tensor[] qkv, int[] qkv_types, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, float scale, Tensor[] o, int[] o_types, int num_heads, str activation) -> Tensor
decoder_attention_int4_(Tensor hidden, Tensor norm_weight, float eps, Tensor qkv, Tensor qkv_scales, Tensor? qkv_zeros, Tensor? qkv_perm, Tensor? qkv_bias, int qkv_group_size, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, float scale, Tensor o, Tensor o_scales, Tensor? o_zeros, Tensor? o_perm, Tensor? o_bias, int o_group_size, int num_heads, str activation) -> Tensor
decoder_experts_gguf(Tensor attended, Tensor residual, Tensor norm_weight, float eps, Tensor router_weight, int top_k, bool renormalize, Tensor gate, Tensor up, Tensor down, int[] types, str activation) -> Tensor
decoder_experts_int4(Tensor attended, Tensor residual, Tensor norm_weight, float eps, Tensor router_weight, int top_k, bool renormalize, Tensor w13, Tensor w13_scales, Tensor? w13_zeros, Tensor? w13_perm, int w13_group_size, Tensor w2, Tensor w2_scales, Tensor? w2_zeros, Tensor? w2_perm, int w2_group_size, int intermediate_size, str activation) -> Tensor
embedding_lookup(Tensor table, Tensor ids) -> Tensor
fused_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)
fused_add_rms_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()
gather_columns(Tensor x, Tensor perm) -> Tensor
gelu(Tensor x) -> Tensor
gelu_tanh_mul(Tensor gate_up) -> Tensor
gguf_dequantize(Tensor blocks, int type, ScalarType dtype) -> Tensor
gguf_linear(Tensor x, Tensor[] blocks, int[] types, Tensor? bias, str activation) -> Tensor
gguf_moe_linear(Tensor x, Tensor blocks, int type, Tensor topk_ids, str activation) -> Tensor
gguf_pack(Tensor blocks, int type) -> Tensor
gptq_dequantize(Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, int bits, int zero_offset, ScalarType dtype) -> Tensor
gptq_gemm(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, Tensor? bias, int bits, int zero_offset) -> Tensor
gptq_moe_gemm(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor? g_idx, Tensor? bias, Tensor sorted_token_ids, Tensor block_ids, Tensor total_post_pad, Tensor? topk_weights, int top_k, int block_size, int bits, int zero_offset) -> Tensor
int4_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, int out_features, int group_size, str activation) -> Tensor
int4_pack(Tensor qweight, Tensor? perm, int in_features) -> Tensor
int4_unpack(Tensor packed, Tensor? perm, int in_features, int out_features) -> Tensor
int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int out_features, int group_size, str activation) -> Tensor
kv_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_lens) -> ()
layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor
marlin_dequantize_out(Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? expert_offsets, int group_size, int bits, bool interleaved, Tensor(a!) out) -> ()
marlin_gemm(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, Tensor(a!) workspace, int out_features, int group_size, int bits, str reduction, int max_sms) -> Tensor
marlin_moe_gemm(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, Tensor sorted_token_ids, Tensor block_ids, Tensor total_post_pad, Tensor? topk_weights, Tensor(a!) workspace, int top_k, int block_size, int out_features, int group_size, int bits, str epilogue, str reduction, int max_sms, int slots) -> Tensor
marlin_permute_scales(Tensor scales, int in_features, int group_size) -> Tensor
marlin_repack(Tensor qweight, Tensor? perm, int in_features, int out_features, int bits) -> Tensor
marlin_repack_zeros(Tensor qzeros, int out_features, int bits, int zero_offset) -> Tensor
marlin_unpack(Tensor packed, Tensor? perm, int in_features, int out_features, int bits) -> Tensor
marlin_unpermute_scales(Tensor scales, int in_features, int group_size) -> Tensor
moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, bool pair_ids, Tensor? expert_map) -> (Tensor, Tensor, Tensor)
moe_build_pairs_by_token(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)
moe_combine(Tensor packed, Tensor pairs_by_token, Tensor topk_weights) -> Tensor
moe_compute_ids_tpe(Tensor topk_ids, int num_experts, int[] out_features) -> (Tensor, Tensor, Tensor)
moe_experts_gguf(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor gate, Tensor up, Tensor down, int[] types, str activation) -> Tensor
moe_experts_int4(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor w13, Tensor w13_scales, Tensor? w13_zeros, Tensor? w13_perm, int w13_group_size, Tensor w2, Tensor w2_scales, Tensor? w2_zeros, Tensor? w2_perm, int w2_group_size, int intermediate_size, str activation) -> Tensor
paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cu_seqlens_q, Tensor kv_lens, float scale, bool causal=True, int window=0, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor
paged_kv_write_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slot_mapping) -> ()
paged_kv_write_int8_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scale, Tensor(d!) v_scale, Tensor k, Tensor v, Tensor slot_mapping) -> ()
qk_norm_rope(Tensor x, Tensor? norm_weight, Tensor cos, Tensor sin, Tensor? positions, float eps, bool interleaved=False) -> Tensor
repetition_penalty_(Tensor(a!) logits, Tensor ids, Tensor offsets, Tensor penalty) -> ()
rms_norm(Tensor x, Tensor weight, float eps) -> Tensor
route_topk_align(Tensor logits, int top_k, bool renormalize, int block_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)
route_topk_softmax(Tensor logits, int top_k, bool renormalize) -> (Tensor, Tensor)
router_topk_softmax(Tensor x, Tensor weight, int top_k, bool renormalize) -> (Tensor, Tensor, Tensor)
scaled_add_(Tensor(a!) dst, Tensor src, float scale) -> ()
silu_mul(Tensor gate_up) -> Tensor
silu_mul.gate_up(Tensor gate, Tensor up) -> Tensor
silu_mul_out(Tensor gate_up, int in_row, Tensor(a!) out, int out_row, int rows) -> ()
split_qkv(Tensor(a) qkv, int num_heads, int num_kv_heads, int head_dim) -> (Tensor(a), Tensor(a), Tensor(a))
split_qkv_norm_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? positions, int num_heads, int num_kv_heads, int head_dim, float eps) -> (Tensor, Tensor, Tensor)
split_qkv_norm_rope_paged_(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? positions, int num_heads, int num_kv_heads, int head_dim, float eps, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> Tensor
transpose_head_to_token(Tensor(a) x) -> Tensor(a)
transpose_token_to_head(Tensor(a) x) -> Tensor(a)
weighted_sum(Tensor slots, Tensor weights) -> Tensor
weighted_sum_residual_(Tensor(a!) residual, Tensor slots, Tensor weights) -> ()
weighted_sum_residual_norm_(Tensor(a!) residual, Tensor slots, Tensor weights, Tensor norm_weight, Tensor(b!) out, float eps) -> ()""",
    )
