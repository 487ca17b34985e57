#include "cpu/sampling.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks/rows.h"

namespace ferrum::cpu {
namespace {

// A row is cut into spans of this many columns, so that all threads work on the vocabulary of a single token.
constexpr int64_t kSpan = 32768;

void check_mask(const char* op, const Tensor& mask, const Tensor& logits, LogitRows& rows) {
  check_dtype(op, "mask", mask, ScalarType::Bool);
  const bool shared = mask.dim() == 1;
  const bool matches = shared ? mask.size(0) == logits.size(1)
                              : mask.dim() == 2 && mask.size(0) == logits.size(0) && mask.size(1) == logits.size(1);
  FERRUM_CHECK(matches, op, "mask", "expected shape (", logits.size(1), ",) or ", shape_string(logits), ", got ",
               shape_string(mask));
  check_last_contiguous(op, "mask", mask);
  rows.mask = data<uint8_t>(mask);
  rows.mask_stride = shared ? 0 : mask.stride(0);
}

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
  const char* op = "argmax_rows";
  LogitRows rows{};
  rows.dtype = activation_dtype(op, "logits", logits);
  FERRUM_CHECK(logits.dim() == 2 && logits.size(1) >= 1, op, "logits",
               "expected shape (tokens, vocabulary) with at least 1 column, got ", shape_string(logits));
  check_last_contiguous(op, "logits", logits);
  const int64_t tokens = logits.size(0);
  rows.size = logits.size(1);
  if (mask.has_value()) {
    check_mask(op, *mask, logits, rows);
  }
  rows.logits = logits.const_data_ptr();
  rows.logits_stride = logits.stride(0);
  Tensor out = torch::stable::new_empty(logits, {tokens}, ScalarType::Long);

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
std::vector<int64_t> check_integers(const char* op, const char* name, const Tensor& t) {
  FERRUM_CHECK(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, name,
               "expected int32 or int64, got ", torch::headeronly::toString(t.scalar_type()));
  FERRUM_CHECK(t.dim() == 1, op, name, "expected 1 dimension, got ", t.dim());
  check_contiguous(op, name, t);
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
  const Dtype dtype = activation_dtype(op, "logits", logits);
  FERRUM_CHECK(logits.dim() == 2, op, "logits", "expected shape (tokens, vocabulary), got ", shape_string(logits));
  check_last_contiguous(op, "logits", logits);
  const int64_t tokens = logits.size(0), size = logits.size(1), stride = logits.stride(0);
  check_rows_apart(op, "logits", logits, {logits.numel() == 0 ? 0 : tokens, size, stride});
  std::vector<int64_t> listed = check_integers(op, "ids", ids);
  const std::vector<int64_t> first = check_integers(op, "offsets", offsets);
  check_shape(op, "offsets", offsets, {tokens + 1});
  check_offsets(op, first, ids.numel());
  check_dtype(op, "penalty", penalty, ScalarType::Float);
  check_shape(op, "penalty", penalty, {tokens});
  check_contiguous(op, "penalty", penalty);
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
          kernel(rows + row * stride * element_size(dtype), dtype, start, kept - start, penalties[row],
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
