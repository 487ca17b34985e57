// Activations prepared for the int4 kernels, and the scratch memory they live in. No torch header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "common/int4.h"
#include "cpu/int4_kernels.h"

namespace ferrum::cpu {

// Uninitialised memory on a 64-byte line, for plain types.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count)
      : data_(count > 0 ? static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kLine)) : nullptr) {}
  Scratch(Scratch&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Scratch& operator=(Scratch&& other) noexcept {
    T* data = other.data_;
    other.data_ = data_;
    data_ = data;
    return *this;
  }
  ~Scratch() { ::operator delete(data_, kLine); }

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_ = nullptr;
};

// How the rows of one product are prepared.
struct ActivationLayout {
  bool int8;            // else kept in fp32
  int64_t packed_rows;  // K_packed
  int64_t group_size;

  int64_t groups() const { return int4::ceil_div(packed_rows, group_size); }
};

// Owns `rows` prepared rows.
class ActivationBuffer {
 public:
  ActivationBuffer() = default;
  ActivationBuffer(const ActivationLayout& layout, int64_t rows)
      : layout_(layout),
        codes_(layout.int8 ? rows * layout.packed_rows : 0),
        scales_(layout.int8 ? rows * layout.groups() : 0),
        sums_(layout.int8 ? rows * layout.groups() : 0),
        values_(layout.int8 ? 0 : rows * layout.packed_rows) {}

  // Prepares one row of `in_features` fp32 values. `perm` holds the input channel of every packed row, -1 for padding;
  // without it the order is kept. `staging` has room for packed_rows values. Returns false when an entry of `perm` lies
  // outside [-1, in_features); it is then read as padding.
  bool fill(const Int4Kernels& kernels, int64_t row, const float* in, int64_t in_features, const int32_t* perm,
            float* staging) const;

  // Prepares one group of a row with int8 codes and no permutation, `values` being the group's; those behind the last
  // input channel are overwritten.
  void fill_group(const Int4Kernels& kernels, int64_t row, int64_t group, float* values, int64_t in_features) const;

  ActivationRows view() const {
    return {codes_.get(), scales_.get(), sums_.get(), values_.get(), layout_.packed_rows, layout_.groups()};
  }

 private:
  ActivationLayout layout_{false, 0, 1};
  Scratch<int8_t> codes_;
  Scratch<float> scales_;
  Scratch<int32_t> sums_;
  Scratch<float> values_;
};

}  // namespace ferrum::cpu
