#include "cpu/int4_activations.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"

namespace ferrum::cpu {

bool ActivationBuffer::fill(const Int4Kernels& kernels, int64_t row, const float* in, int64_t in_features,
                            const int32_t* perm, float* staging) const {
  const int64_t packed = layout_.packed_rows;
  float* ordered = layout_.int8 ? staging : values_.get() + row * packed;
  bool valid = true;
  if (perm) {
    for (int64_t k = 0; k < packed; ++k) {
      const int32_t channel = perm[k];
      const bool inside = channel >= 0 && channel < in_features;
      valid &= inside || channel == -1;
      ordered[k] = inside ? in[channel] : 0.0f;
    }
  } else if (layout_.int8 && packed == in_features) {
    ordered = const_cast<float*>(in);  // only read below
  } else {
    std::memcpy(ordered, in, static_cast<size_t>(in_features) * sizeof(float));
    std::memset(ordered + in_features, 0, static_cast<size_t>(packed - in_features) * sizeof(float));
  }
  if (layout_.int8) {
    const int64_t groups = layout_.groups();
    kernels.quantize_row(ordered, packed, layout_.group_size, codes_.get() + row * packed, scales_.get() + row * groups,
                         sums_.get() + row * groups);
  }
  return valid;
}

void ActivationBuffer::fill_group(const Int4Kernels& kernels, int64_t row, int64_t group, float* values,
                                  int64_t in_features) const {
  const int64_t first = group * layout_.group_size;
  const int64_t count = std::min(layout_.group_size, layout_.packed_rows - first);
  const int64_t present = std::min(count, in_features - first);
  std::memset(values + present, 0, static_cast<size_t>(count - present) * sizeof(float));
  const int64_t at = row * layout_.groups() + group;
  kernels.quantize_row(values, count, layout_.group_size, codes_.get() + row * layout_.packed_rows + first,
                       scales_.get() + at, sums_.get() + at);
}

const Int4Kernels& int4_kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512:
      return int4_kernels_avx512();
    case Isa::avx2:
      return int4_kernels_avx2();
    case Isa::generic:
      break;
  }
#endif
  return int4_kernels_generic();
}

}  // namespace ferrum::cpu
