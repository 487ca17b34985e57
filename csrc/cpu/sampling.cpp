#include "cpu/sampling.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks/sampling.h"
#include "cpu/allocate.h"

namespace ferrum::cpu {
namespace {

// A row is cut into spans of this many columns, so that all threads work on the vocabulary of a single token.
constexpr int64_t kSpan = 32768;

// What stands for a row without a finite value that may be chosen: its first allowed column, or -1.
int64_t first_allowed(const LogitRows& rows, int64_t row) {
  if (rows.mask == nullptr) {
    return 0;
  }
  const uint8_t* mask = rows.mask + row * rows.mask_stride;
  for (int64_t i = 0; i < rows.size; ++i) {
    if (mask[i]) {
      return i;
    }
  }
  return -1;
}

Tensor argmax_rows(const Tensor& logits, const std::optional<Tensor>& mask) {
  const LogitArguments a = check_argmax(logits, mask);
  const int64_t tokens = a.tokens;
  LogitRows rows{};
  rows.dtype = a.dtype;
  rows.size = a.size;
  rows.mask = a.mask;
  rows.mask_stride = a.mask_stride;
  rows.logits = logits.const_data_ptr();
  rows.logits_stride = a.stride;
  Tensor out = allocate(logits, {tokens}, ScalarType::Long);

  const int64_t spans = (rows.size + kSpan - 1) / kSpan;
  std::vector<Largest> largest(static_cast<size_t>(tokens * spans));
  const auto kernel = FERRUM_FOR_LEVEL(largest_of);
  torch::stable::parallel_for(
      0, tokens * spans, rows_per_task(std::min(rows.size, kSpan)), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task % spans * kSpan;
          largest[static_cast<size_t>(task)] = kernel(rows, task / spans, first, std::min(first + kSpan, rows.size));
        }
      });
  int64_t* ids = mutable_data<int64_t>(out);
  for (int64_t row = 0; row < tokens; ++row) {
    Largest best{-std::numeric_limits<float>::infinity(), -1};
    for (int64_t span = 0; span < spans; ++span) {
      const Largest& candidate = largest[static_cast<size_t>(row * spans + span)];
      best = candidate.value > best.value ? candidate : best;
    }
    ids[row] = best.index >= 0 ? best.index : first_allowed(rows, row);
  }
  return out;
}

// int32 or int64 elements as int64.
std::vector<int64_t> integers(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Int) {
    return {data<int32_t>(t), data<int32_t>(t) + t.numel()};
  }
  return {data<int64_t>(t), data<int64_t>(t) + t.numel()};
}

void check_offsets(const char* op, const std::vector<int64_t>& offsets, int64_t listed) {
  for (size_t i = 0; i < offsets.size(); ++i) {
    const int64_t before = i == 0 ? 0 : offsets[i - 1];
    FERRUM_CHECK(offsets[i] >= before && offsets[i] <= (i == 0 ? 0 : listed), op, "offsets",
                 "expected a list that starts at 0, never falls and stays within ", listed, ", got ", offsets[i],
                 " at index ", i);
  }
}

void repetition_penalty_(const Tensor& logits, const Tensor& ids, const Tensor& offsets, const Tensor& penalty) {
  const char* op = "repetition_penalty_";
  const LogitArguments a = check_penalty(logits, ids, offsets, penalty);
  const int64_t tokens = a.tokens, size = a.size;
  std::vector<int64_t> listed = integers(ids);
  const std::vector<int64_t> first = integers(offsets);
  check_offsets(op, first, ids.numel());
  const float* penalties = data<float>(penalty);
  for (int64_t row = 0; row < tokens; ++row) {
    FERRUM_CHECK(!(penalties[row] <= 0.0f), op, "penalty", "expected positive values, got ", penalties[row],
                 " at index ", row);
  }
  std::vector<float> values(listed.size());
  char* rows = static_cast<char*>(logits.mutable_data_ptr());
  const auto kernel = FERRUM_FOR_LEVEL(penalize);
  torch::stable::parallel_for(
      0, tokens, rows_per_task(8 * ids.numel() / std::max<int64_t>(tokens, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          if (penalties[row] == 1.0f || !std::isfinite(penalties[row])) {
            continue;
          }
          int64_t* const start = listed.data() + first[static_cast<size_t>(row)];
          int64_t* const stop = listed.data() + first[static_cast<size_t>(row) + 1];
          const int64_t* kept = std::remove_if(start, stop, [&](int64_t id) { return id < 0 || id >= size; });
          kernel(rows + row * a.stride * element_size(a.dtype), a.dtype, start, kept - start, penalties[row],
                 values.data() + (start - listed.data()));
        }
      });
}

}  // namespace
}  // namespace ferrum::cpu

STABLE_TORCH_LIBRARY_IMPL(ferrum, CPU, m) {
  m.impl("argmax_rows", TORCH_BOX(&ferrum::cpu::argmax_rows));
  m.impl("repetition_penalty_", TORCH_BOX(&ferrum::cpu::repetition_penalty_));
}
