"""Bugs to inject into the shipped kernels: each must fail a test, or a test is missing.

`python -m tests.emulation.mutations [--jobs 2] [NAME ...]` compiles every mutant and runs the family's tests and
test_every_kernel.py on it, some ten seconds each. test_mutations.py runs a few of them in the suite.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.emulation.emulator import CSRC, ROOT, kernel_sources

FOLDER = CSRC / "cuda"
CAUGHT, SURVIVED = 1, 0  # exit statuses of pytest


@dataclass(frozen=True)
class Mutation:
    file: str
    old: str
    new: str


SHIPPED = {
    # activation
    "activation-row-check": Mutation("activation.cu", "  if (row >= rows.count) {\n    return;\n  }\n", ""),
    "activation-bound": Mutation("activation.cu", "column < rows.size;\n", "column <= rows.size;\n"),
    "activation-up-stride": Mutation("activation.cu", "rows.up + row * rows.up_stride", "rows.up + row * rows.gate_stride"),
    "activation-alignment": Mutation("activation.cu", "can_vectorize<N, T>(rows.up, rows.up_stride, rows.size) &&", "true &&"),
    "activation-sign": Mutation("activation.cu", "over_one_plus_exp<T>(x, -x)", "over_one_plus_exp<T>(x, x)"),
    "activation-cubic": Mutation("activation.cu", "0.044715f", "0.0447f"),
    # elementwise
    "gather-bound": Mutation("elementwise.cu", "from[i] >= a.columns", "from[i] > a.columns"),
    "gather-barrier": Mutation("elementwise.cu", "    __syncthreads();\n", ""),
    "gather-last-rows": Mutation("elementwise.cu", "min(a.rows - first, static_cast<int64_t>(a.block_rows))", "static_cast<int64_t>(a.block_rows)"),
    "gather-pairs": Mutation("elementwise.cu", "const bool pairs = chosen % N == 0;", "const bool pairs = true;"),
    "gather-vectors": Mutation("elementwise.cu", "a.vectors = can_vectorize<kVector, T>(a.x, a.stride, a.columns);", "a.vectors = true;"),
    "gather-pitch": Mutation("elementwise.cu", "stage + row * a.pitch,", "stage + row * a.columns,"),
    "gather-chunk": Mutation("elementwise.cu", "step = static_cast<int64_t>(gridDim.y) * blockDim.x * N;", "step = static_cast<int64_t>(blockDim.x) * N * 2;"),
    # kv_cache
    "kv-last-row": Mutation("kv_cache.cu", "row > last", "row > last + 1"),
    "kv-negative-row": Mutation("kv_cache.cu", "if (row < 0 || row > last) {", "if (row > last) {"),
    "kv-capacity": Mutation("kv_cache.cu", "capacity - k.size(1)", "capacity"),
    "kv-sequences": Mutation("kv_cache.cu", "sequence += gridDim.z", "sequence += copy.sequences"),
    "kv-v-stride": Mutation("kv_cache.cu", "copy.v.from + sequence * copy.v.sequence_stride", "copy.v.from + sequence * copy.k.sequence_stride"),
    "kv-alignment": Mutation("kv_cache.cu", "moves_by<Quad>(k_side) && moves_by<Quad>(v_side)", "moves_by<Quad>(k_side)"),
    "kv-one-long-head": Mutation("kv_cache.cu", "&& destination.head_stride == row) {", ") {"),
    "kv-int8-slot": Mutation("kv_cache.cu", "slot >= p.num_slots", "slot > p.num_slots"),
    "kv-int8-units": Mutation("kv_cache.cu", "const bool inside = unit < p.units;", "const bool inside = true;"),
    "kv-int8-infinity": Mutation("kv_cache.cu", "finite ? static_cast<int8_t>(code) : 0", "static_cast<int8_t>(code)"),
    "kv-int8-smallest-scale": Mutation("kv_cache.cu", "__float_as_uint(1e-8f)", "0u"),
    "kv-int8-v-scale": Mutation("kv_cache.cu", "blockIdx.y == 0 ? p.k : p.v", "blockIdx.y == 0 ? p.k : Quantized<T>{p.v.x, p.v.codes, p.k.scales, p.v.token_stride, p.v.head_stride}"),
    # marlin_wgmma
    "wgmma-publish": Mutation("marlin_wgmma.cuh", "    publish_to_wgmma();\n", ""),
    "wgmma-stage-wait": Mutation("marlin_wgmma.cuh", "cp_async_wait<Stage::kStages - 3>", "cp_async_wait<Stage::kStages - 2>"),
    "wgmma-first-wait": Mutation("marlin_wgmma.cuh", "  cp_async_wait<Stage::kStages - 2>();\n", ""),
    "wgmma-stage-barrier": Mutation("marlin_wgmma.cuh", "    __syncthreads();  // this stage and", "    // this stage and"),
    "wgmma-first-barrier": Mutation("marlin_wgmma.cuh", "  __syncthreads();  // the codes of", "  // the codes of"),
    "wgmma-sums-over-stages": Mutation("marlin_wgmma.cuh", "        __syncthreads();  // the sums take", "        // the sums take"),
    "wgmma-sums-barrier": Mutation("marlin_wgmma.cuh", "(shared), total);\n        __syncthreads();\n", "(shared), total);\n"),
    "wgmma-fence": Mutation("marlin_wgmma.cuh", "    wgmma_fence();\n", ""),
    "wgmma-wait": Mutation("marlin_wgmma.cuh", "wgmma_wait<0>(sums)", "wgmma_wait<1>(sums)"),
    "wgmma-codes": Mutation("marlin_wgmma.cuh", "codes[(step + 1) % 2]);", "codes[step % 2]);"),
    "wgmma-words": Mutation("marlin_wgmma.cuh", "lane * 16 + pair_ * 8", "lane * 16"),
    "wgmma-8-bit-words": Mutation("marlin_wgmma.cuh", "place_of(lane * 2 + pair_)", "place_of(lane * 2)"),
    "wgmma-scales": Mutation("marlin_wgmma.cuh", "% 32 / 4 * 8 + pair_ * 4, scale", "% 32 / 4 * 8, scale"),
    "wgmma-scale-order": Mutation("marlin_wgmma.cuh", "scale[i / 32 * 2 + i / 2 % 2]", "scale[i / 32 + i / 2 % 2 * 2]"),
    "wgmma-zeros": Mutation("marlin_wgmma.cuh", "from[0] >> 8 * pair_", "from[0]"),
    "wgmma-8-bit-zeros": Mutation("marlin_wgmma.cuh", "from[pair_ % C::kZeroWords]", "from[0]"),
    "wgmma-zeros-row": Mutation("marlin_wgmma.cuh", "here ? group + 1 - first_group : 0", "0"),
    "wgmma-scales-row": Mutation("marlin_wgmma.cuh", "add_group(at, group - first_group,", "add_group(at, 0,"),
    "wgmma-keep": Mutation("marlin_wgmma.cuh", "      keep = !ends;", "      keep = true;"),
    "wgmma-last-group": Mutation("marlin_wgmma.cuh", "return end < min(last * kSteps, p.steps) ? end : last * kSteps;", "return min(end, last * kSteps);"),
    "wgmma-step-of-x": Mutation("marlin_wgmma.cuh", "step * (2 * kMarlinStep >> 4)", "step * (kMarlinStep >> 4)"),
    "wgmma-stages-aligned": Mutation("marlin_wgmma.cuh", "(config, p, kSwizzleBytes);", "(config, p, 16);"),
    "wgmma-start-aligned": Mutation("marlin_wgmma.cuh", "bytes + (kSwizzleBytes - shared_address(bytes) % kSwizzleBytes) % kSwizzleBytes;", "bytes;"),
    "wgmma-shared-bytes": Mutation("marlin_wgmma.cuh", "grid.shared_bytes += kSwizzleBytes;", "grid.shared_bytes += 0;"),
    # marlin_dequantize, marlin_pack, marlin_runs
    "dense-last-warp": Mutation("marlin_dequantize.cu", "  if (first >= d.row_tiles) {\n    return;\n  }\n", ""),
    "dense-next-span": Mutation("marlin_dequantize.cu", "if (tile + 1 < last) {", "if (true) {"),
    "dense-group": Mutation("marlin_dequantize.cu", "if (tile == first || tile % d.group_tiles == 0) {", "if (tile == first) {"),
    "dense-first-group": Mutation("marlin_dequantize.cu", "if (tile == first || tile % d.group_tiles == 0) {", "if (tile % d.group_tiles == 0) {"),
    "dense-one-group": Mutation("marlin_dequantize.cu", "d.one_group ? run / 4", "false ? run / 4"),
    "dense-zeros": Mutation("marlin_dequantize.cu", "run % 2 * 16 + run / 2 * 4", "run * 4"),
    "dense-zeros-of-8-bits": Mutation("marlin_dequantize.cu", "2 * i + run / 4)]", "2 * i)]"),
    "dense-up": Mutation("marlin_dequantize.cu", "all_runs % 2 * half + first", "all_runs % 2 * kMarlinUnit + first"),
    "dense-columns": Mutation("marlin_dequantize.cu", "d.vectors && place.count == 8 &&", "d.vectors &&"),
    "dense-alignment": Mutation("marlin_dequantize.cu", "&& d.out_row % piece == 0", ""),
    "dense-rows": Mutation("marlin_dequantize.cu", "row >= 0 && row < d.in_features &&", "row >= 0 &&"),
    "dense-negative-row": Mutation("marlin_dequantize.cu", "row >= 0 && row < d.in_features &&", "row < d.in_features &&"),
    "dense-experts": Mutation("marlin_dequantize.cu", "d.offsets[expert + 1] <= d.offsets[expert]", "d.offsets[expert + 1] < d.offsets[expert]"),
    "dense-perm-of-expert": Mutation("marlin_dequantize.cu", "d.perm[expert * d.perm_expert + row", "d.perm[row"),
    "repack-units": Mutation("marlin_pack.cu", "  if (unit >= r.units) {\n    return;\n  }\n", ""),
    "repack-rows": Mutation("marlin_pack.cu", "row >= 0 && row < r.in_features;", "row < r.in_features;"),
    "repack-padding": Mutation("marlin_pack.cu", "inside ? 0 : kMiddle", "0"),
    "repack-strides": Mutation("marlin_pack.cu", "r.vectors = r.column_stride == 1 &&", "r.vectors ="),
    "repack-alignment": Mutation("marlin_pack.cu", "reinterpret_cast<uintptr_t>(r.qweight) % 16 == 0 &&", ""),
    "repack-perm-of-expert": Mutation("marlin_pack.cu", "r.perm[expert * r.perm_expert + row", "r.perm[row"),
    "runs-of-a-lane": Mutation("marlin_runs.cuh", "first_row = low + 8 * (p % 2)", "first_row = low + 8 * (p / 4)"),
    "runs-transposed-once": Mutation("marlin_runs.cuh", "swap_parts_with_pair<4>(words[i], 4);", ""),
    "runs-wrong-lane": Mutation("marlin_runs.cuh", "swap_with_pair(words[kTile + i], words[3 * kTile + i], 2);", "swap_with_pair(words[kTile + i], words[3 * kTile + i], 1);"),
    # moe_combine
    "combine-row-bound": Mutation("moe_combine.cu", "row < sums.num_rows", "row <= sums.num_rows"),
    "combine-skipped-pair": Mutation("moe_combine.cu", "if (row >= 0 && row", "if (row"),
    "combine-last-slots": Mutation("moe_combine.cu", "if (slot < sums.top_k) {", "if (true) {"),
    "combine-residual-stride": Mutation("moe_combine.cu", "sums.residual + token * sums.out_stride", "sums.residual + token * sums.size"),
    "combine-norm-kept": Mutation("moe_combine.cu", "kept[i] = column == first ? total[i] : kept[i];", "kept[i] = total[i];"),
    "combine-norm-first": Mutation("moe_combine.cu", "    if (column == first) {", "    if (true) {"),
    "combine-eps": Mutation("moe_combine.cu", "static_cast<float>(sums.size) + eps)", "static_cast<float>(sums.size))"),
    "combine-alignment": Mutation("moe_combine.cu", "&& s.token_stride % N == 0 &&", "&&"),
    "combine-tile": Mutation("moe_combine.cu", "blockIdx.x % tiles", "blockIdx.x / tiles"),
    # moe_routing
    "route-token-check": Mutation("moe_routing.cu", "if (token >= route.tokens) {", "if (token > route.tokens) {"),
    "route-nan": Mutation("moe_routing_topk.cuh", "fminf(fmaxf(to_float(logits[expert]), -kLargestFloat), kLargestFloat)", "to_float(logits[expert])"),
    "route-tie": Mutation("moe_routing_topk.cuh", "for (int i = kPerLane - 1; i >= 0; --i) {", "for (int i = 0; i < kPerLane; ++i) {"),
    "route-taken": Mutation("moe_routing_topk.cuh", "expert == static_cast<uint32_t>(i * 32 + lane) ? 0 : keys[i]", "keys[i] == best ? 0 : keys[i]"),
    "route-many": Mutation("moe_routing_topk.cuh", "if (j % 32 == 31) {", "if (j % 32 == 30) {"),
    "route-total": Mutation("moe_routing_topk.cuh", "route.renormalize ? selected : sum", "route.renormalize ? sum : selected"),
    "route-experts": Mutation("moe_routing_topk.cuh", "while (per_lane * 32 < num_experts) {", "while (per_lane * 32 < num_experts - 31) {"),
    "route-align-barrier": Mutation("moe_routing_align.cu", "  __syncthreads();\n  for (int i = static_cast<int>(threadIdx.x)", "  for (int i = static_cast<int>(threadIdx.x)"),
    "route-align-wait": Mutation("moe_routing_align.cu", "  wait_for_previous_kernel();\n  start_next_kernel();\n  int32_t* const ids", "  start_next_kernel();\n  int32_t* const ids"),
    "route-align-overlap": Mutation("moe_routing_align.cu", "ids + pairs.count, scratch", "ids, scratch"),
    "route-align-memory": Mutation("moe_routing_align.cu", "    grid.shared_bytes += pairs * sizeof(int32_t);\n", ""),
    "route-align-tokens": Mutation("moe_routing_align.cu", "if (token < route.tokens) {", "if (token <= route.tokens) {"),
    "route-align-ids": Mutation("moe_routing_align.cu", "i < pairs.count; i += static_cast<int>(blockDim.x)", "i < pairs.count; i += 1024"),
    # moe_routing_align, moe_routing_pairs, moe_routing_sort
    "align-blocks-owner": Mutation("moe_routing_align.cu", "if (padded[middle] <= row) {", "if (padded[middle] < row) {"),
    "align-past-the-end": Mutation("moe_routing_align.cu", "row < total ? low - 1 : -1", "low - 1"),
    "align-map-of-rows": Mutation("moe_routing_align.cu", "    by_id.expert_map = nullptr;\n    const Ranked", "    const Ranked"),
    "align-padding": Mutation("moe_routing_align.cu", "  write_padding(pairs, out.sorted_token_ids, out.blocks * out.block_size);\n", ""),
    "align-chunk-starts": Mutation("moe_routing_align.cu", "padded + chunk * pairs.num_experts", "padded"),
    "pairs-chunk-starts": Mutation("moe_routing_pairs.cu", "rows + chunk * pairs.num_experts", "rows"),
    "pairs-top-k": Mutation("moe_routing_pairs.cu", "pair / out.top_k", "pair"),
    "pairs-kept": Mutation("moe_routing_pairs.cu", "pair >= kept", "pair > kept"),
    "pairs-steps": Mutation("moe_routing_pairs.cu", "if (step >= pairs.steps || pair", "if (pair"),
    "sort-map": Mutation("moe_routing_sort.cuh", "      id = id >= 0 && id < num_experts ? id : -1;\n    }", "    }"),
    "sort-first-barrier": Mutation("moe_routing_sort.cuh", "    table[i] = 0;\n  }\n  __syncthreads();", "    table[i] = 0;\n  }"),
    "sort-second-barrier": Mutation("moe_routing_sort.cuh", "    __syncwarp();\n  }\n  __syncthreads();\n", "    __syncwarp();\n  }\n"),
    "sort-third-barrier": Mutation("moe_routing_sort.cuh", "  __syncthreads();\n#pragma unroll\n", "#pragma unroll\n"),
    "sort-first-syncwarp": Mutation("moe_routing_sort.cuh", "__popc(before);\n    __syncwarp();\n", "__popc(before);\n"),
    "sort-stable": Mutation("moe_routing_sort.cuh", "(1u << lane) - 1", "~((2u << lane) - 1)"),
    "sort-tiles-of-experts": Mutation("moe_routing_sort.cuh", "    end += padded.total;\n", "    end = padded.total;\n"),
    "sort-scratch-again": Mutation("moe_routing_sort.cuh", "      *starts.end = end;\n    }\n    __syncthreads();\n", "      *starts.end = end;\n    }\n"),
    # moe_routing_lists
    "lists-tail": Mutation("moe_routing_lists.cu", "i < pairs; i += kListThreads) {\n    list[i] = -1;", "i + 1 < pairs; i += kListThreads) {\n    list[i] = -1;"),
    "lists-share": Mutation("moe_routing_lists.cu", "end = min(begin + share, pairs);", "end = begin + share;"),
    "lists-order": Mutation("moe_routing_lists.cu", "votes & ((1u << lane) - 1)", "votes & ~((2u << lane) - 1)"),
    "lists-empty-grid": Mutation("moe_routing_lists.cu", "kDispatchRows, 1);", "kDispatchRows, 0);"),
    # rope
    "rope-angles-bound": Mutation("rope.cu", "position >= tables.rows", "position > tables.rows"),
    "rope-negative-position": Mutation("rope.cu", "if (position < 0 || position", "if (position"),
    "rope-sign": Mutation("rope.cu", "first = a * c - b * s;", "first = a * c + b * s;"),
    "rope-second-of-interleaved": Mutation("rope.cu", "interleaved ? 2 * i + N : half + i", "interleaved ? 2 * i + 1 : half + i"),
    "rope-partial-squares": Mutation("rope.cu", "for (int i = 2 * half + begin; i < heads.head_dim && weight", "for (int i = heads.head_dim; i < heads.head_dim && weight"),
    "rope-inside": Mutation("rope.cu", "const bool inside = token < heads.tokens;", "const bool inside = true;"),
    "rope-v-normed": Mutation("rope.cu", "part == Part::k ? heads.k_weight : HeadWeight{}", "heads.k_weight"),
    "rope-v-rotated": Mutation("rope.cu", "const int half = part == Part::v ? 0 : static_cast<int>(heads.tables.half);", "const int half = static_cast<int>(heads.tables.half);"),
    "rope-slot": Mutation("rope.cu", "row >= heads.num_slots", "row > heads.num_slots"),
    "rope-table-alignment": Mutation("rope.cu", "can_vectorize<N, float>(h.tables.cos, h.tables.cos_stride, half) &&", "true &&"),
    "rope-head-stride": Mutation("rope.cu", "h.head_stride % N == 0 &&", "true &&"),
    # sampling
    "argmax-tie": Mutation("sampling.cu", "if (key > best) {", "if (key >= best) {"),
    "argmax-not-finite": Mutation("sampling.cu", "finite ? ordered(values[k]) : kNotFinite", "ordered(values[k])"),
    "argmax-mask": Mutation("sampling.cu", "mask != nullptr && allowed.values[k] == 0 ? 0 :", ""),
    "argmax-last-span": Mutation("sampling.cu", "rows.size - begin < rows.span ? rows.size : begin + rows.span", "begin + rows.span"),
    "argmax-candidates": Mutation("sampling.cu", "i < spans; i += 32", "i < 32 && i < spans; i += 32"),
    "argmax-mask-alignment": Mutation("sampling.cu", "can_vectorize<N, uint8_t>(a.mask, a.mask_stride, a.size);", "true;"),
    "penalty-twice": Mutation("sampling.cu", "atomicOr(&marks[column / 32], 1u << column % 32);", "atomicAdd(&marks[column / 32], 1u << column % 32);"),
    "penalty-window": Mutation("sampling.cu", "if (id >= first && id < last) {", "if (id >= first) {"),
    "penalty-offsets": Mutation("sampling.cu", "end = min(p.offsets.at(row + 1), p.listed);", "end = p.offsets.at(row + 1);"),
    "penalty-negative": Mutation("sampling.cu", "value > 0.0f ? value / penalty : value * penalty", "value / penalty"),
    "penalty-barrier": Mutation("sampling.cu", "    marks[word] = 0;\n  }\n  __syncthreads();\n", "    marks[word] = 0;\n  }\n"),
}  # fmt: skip


def family(mutation: Mutation) -> str:
    stem = Path(mutation.file).stem
    if stem in ("marlin_dequantize", "marlin_pack", "marlin_runs"):
        return "marlin_layout"
    return "moe_routing" if stem.startswith("moe_routing") else stem


def replacement(mutation: Mutation) -> dict[Path, str]:
    """The sources of the mutant that differ from the shipped ones; a header stands in those that include it."""
    path, include = FOLDER / mutation.file, f'#include "cuda/{mutation.file}"\n'
    text = path.read_text()
    if (found := text.count(mutation.old)) != 1:
        raise ValueError(f"[mutations] {mutation.file}: expected {mutation.old!r} once, found it {found} times")
    text = text.replace(mutation.old, mutation.new)
    if path.suffix == ".cu":
        return {path: text}
    using = {source: source.read_text() for source in kernel_sources()}
    return {source: code.replace(include, text) for source, code in using.items() if include in code}


def run(name: str) -> int:
    files = [f"tests/emulation/test_{family(SHIPPED[name])}.py", "tests/emulation/test_every_kernel.py"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", "--mutation", name]
    done = subprocess.run([*pytest, *files], cwd=ROOT, capture_output=True, text=True)
    outcome = {CAUGHT: "caught", SURVIVED: "SURVIVED"}.get(done.returncode, "ERROR")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E "))]
    print(f"{outcome:<9} {name:<28} {lines[-1][:150] if lines else done.stdout[-300:]}", flush=True)
    return done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        statuses = list(pool.map(run, args.names or SHIPPED))
    print(f"{statuses.count(CAUGHT)} of {len(statuses)} caught")
    raise SystemExit(statuses.count(CAUGHT) != len(statuses))


if __name__ == "__main__":
    main()
