// Tensors on the CPU made without boxed arguments, which take as long as a small kernel: an op of a few rows makes
// several.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace ferrum::cpu {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::vector<int64_t> contiguous_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return strides;
}

// An uninitialised contiguous tensor, of `like`'s dtype where none is given.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, Sizes sizes,
                                      std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  int32_t type;
  if (dtype) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &type,
                                                   nullptr, nullptr, 0, nullptr, &handle));
  return torch::stable::Tensor(handle);
}

// A contiguous tensor with other sizes, for as many elements.
inline torch::stable::Tensor reshaped(const torch::stable::Tensor& t, Sizes sizes) {
  int64_t offset;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        contiguous_strides(sizes).data(), offset, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace ferrum::cpu
