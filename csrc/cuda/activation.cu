// silu_mul and gelu_tanh_mul: every input byte is read once and every output byte written once, 6 bytes an output in
// half precision.
#include <torch/csrc/stable/library.h>

#include "checks/activation.h"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"

namespace ferrum::cuda {
namespace {

// Element strides. The output may be the gate: each thread writes only what it alone has read.
template <typename T>
struct GatedRows {
  const T* gate;
  const T* up;
  T* out;
  int64_t gate_stride, up_stride, out_stride;
  int64_t count, size;
};

// x / (1 + e^z). For half precision, whose rounding costs 2^-12 or more, with the short instructions: within 2^-17 of
// the exact ones, and 0 where the quotient is below 2^-119. A thread has eight of these to do for every 48 bytes.
template <typename T>
__device__ __forceinline__ float over_one_plus_exp(float x, float z) {
  if constexpr (sizeof(T) == 4) {
    return x / (1.0f + expf(z));
  } else {
    return __fdividef(x, 1.0f + __expf(z));
  }
}

struct Silu {
  template <typename T>
  static __device__ __forceinline__ float of(float x) {
    return over_one_plus_exp<T>(x, -x);
  }
};

// x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), written as x / (1 + e^(-2u)).
struct GeluTanh {
  template <typename T>
  static __device__ __forceinline__ float of(float x) {
    return over_one_plus_exp<T>(x, -1.5957691216057308f * (x + 0.044715f * x * x * x));
  }
};

template <typename Activation, typename T, int N>
__global__ void __launch_bounds__(kSpreadThreads) gated_rows(GatedRows<T> rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows.count) {
    return;
  }
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x * N;
  for (int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N; column < rows.size;
       column += step) {
    float gate[N], up[N];
    load(rows.gate + row * rows.gate_stride + column, gate);
    load(rows.up + row * rows.up_stride + column, up);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      gate[i] = Activation::template of<T>(gate[i]) * up[i];
    }
    store(rows.out + row * rows.out_stride + column, gate);
  }
}

template <typename Activation>
void run(const char* op, const Tensor& on, const GatedArguments& a, const Tensor& out, int64_t out_first,
         int64_t out_stride) {
  const Stream stream(op, on);
  for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = 16 / sizeof(T);
    const GatedRows<T> rows{static_cast<const T*>(a.gate),
                            static_cast<const T*>(a.up),
                            mutable_data<T>(out) + out_first,
                            a.gate_stride,
                            a.up_stride,
                            out_stride,
                            a.rows,
                            a.size};
    const bool vectors = can_vectorize<N, T>(rows.gate, rows.gate_stride, rows.size) &&
                         can_vectorize<N, T>(rows.up, rows.up_stride, rows.size) &&
                         can_vectorize<N, T>(rows.out, rows.out_stride, rows.size);
    const SpreadConfig config = pick_spread_config(rows.count, vectors ? rows.size / N : rows.size);
    stream.launch(vectors ? gated_rows<Activation, T, N> : gated_rows<Activation, T, 1>,
                  spread_grid(op, config, rows.count), rows);
  });
}

template <typename Activation>
Tensor gated_halves(const char* op, const Tensor& gate_up) {
  const GatedArguments a = check_halves(op, gate_up);
  Tensor out = new_output(gate_up, shape_of_half(gate_up));
  run<Activation>(op, gate_up, a, out, 0, a.size);
  return out;
}

Tensor silu_mul(const Tensor& gate_up) { return gated_halves<Silu>("silu_mul", gate_up); }

Tensor gelu_tanh_mul(const Tensor& gate_up) { return gated_halves<GeluTanh>("gelu_tanh_mul", gate_up); }

Tensor silu_mul_gate_up(const Tensor& gate, const Tensor& up) {
  const char* op = "silu_mul";
  const GatedArguments a = check_gate_up(op, gate, up);
  check_device(op, gate, {{"up", up}});
  Tensor out = new_output(gate, gate.sizes());
  run<Silu>(op, gate, a, out, 0, a.size);
  return out;
}

void silu_mul_out(const Tensor& gate_up, int64_t in_row, const Tensor& out, int64_t out_row, int64_t rows) {
  const char* op = "silu_mul_out";
  const GatedOutArguments a = check_halves_out(op, gate_up, in_row, out, out_row, rows);
  check_device(op, gate_up, {{"out", out}});
  run<Silu>(op, gate_up, a.in, out, a.out_first, a.out_stride);
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("gelu_tanh_mul", TORCH_BOX(&ferrum::cuda::gelu_tanh_mul));
  m.impl("silu_mul", TORCH_BOX(&ferrum::cuda::silu_mul));
  m.impl("silu_mul.gate_up", TORCH_BOX(&ferrum::cuda::silu_mul_gate_up));
  m.impl("silu_mul_out", TORCH_BOX(&ferrum::cuda::silu_mul_out));
}
