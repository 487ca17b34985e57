// One warp, one instruction at a time: operands in, results out. test_instructions.py knows what they should be.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/ptx.cuh"

namespace ferrum::cuda {
namespace {

// ---- out[instruction][lane] of x[lane]; lanes outside `mask` keep out of it

__global__ void exchange(const int* x, int* out, unsigned mask, int argument, int width) {
  const int lane = threadIdx.x, value = x[lane];
  if ((mask >> lane & 1) == 0) {
    return;
  }
  int i = 0;
  const auto put = [&](int result) { out[i++ * 32 + lane] = result; };
  put(__shfl_sync(mask, value, argument, width));
  put(__shfl_up_sync(mask, value, argument, width));
  put(__shfl_down_sync(mask, value, argument, width));
  put(__shfl_xor_sync(mask, value, argument, width));
  put(static_cast<int>(__ballot_sync(mask, value > 0)));
  put(__any_sync(mask, value > 5));
  put(__all_sync(mask, value > -6));
  put(__reduce_add_sync(mask, value));
  put(__reduce_max_sync(mask, value));
  put(__reduce_min_sync(mask, value));
  put(static_cast<int>(__match_any_sync(mask, value)));
}

Tensor warp_exchange(const Tensor& x, int64_t mask, int64_t argument, int64_t width) {
  Tensor out = new_output(x, {11, 32});
  Stream("warp_exchange", x)
      .launch(exchange, Grid{dim3(1), dim3(32)}, data<int>(x), mutable_data<int>(out), static_cast<unsigned>(mask),
              static_cast<int>(argument), static_cast<int>(width));
  return out;
}

// ---- votes of a block of 64: out[thread] = count, or, and

__global__ void vote(const int* x, int* out) {
  const int thread = threadIdx.x;
  out[thread * 3] = __syncthreads_count(x[thread]);
  out[thread * 3 + 1] = __syncthreads_or(x[thread]);
  out[thread * 3 + 2] = __syncthreads_and(x[thread]);
}

Tensor block_votes(const Tensor& x) {
  Tensor out = new_output(x, {64, 3});
  Stream("block_votes", x).launch(vote, Grid{dim3(1), dim3(64)}, data<int>(x), mutable_data<int>(out));
  return out;
}

// ---- d += a b on registers as they lie in the lanes: a[32][4], b[32][2], d[32][4]

template <typename T, typename Number>
__global__ void multiply(const uint32_t* a, const uint32_t* b, Number* d) {
  uint32_t left[4], right[2];
  Number sum[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[threadIdx.x * 4 + i];
    sum[i] = d[threadIdx.x * 4 + i];
  }
  for (int i = 0; i < 2; ++i) {
    right[i] = b[threadIdx.x * 2 + i];
  }
  if constexpr (sizeof(T) == 1) {
    mma_m16n8k32_s8(sum, left, right);
  } else {
    mma_m16n8k16<T>(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) {
    d[threadIdx.x * 4 + i] = sum[i];
  }
}

// `like` has the dtype of the numbers in the registers.
void mma_(const Tensor& like, const Tensor& a, const Tensor& b, const Tensor& d) {
  const Stream stream("mma_", a);
  const Grid grid{dim3(1), dim3(32)};
  const auto* left = reinterpret_cast<const uint32_t*>(data<int>(a));
  const auto* right = reinterpret_cast<const uint32_t*>(data<int>(b));
  if (like.scalar_type() == ScalarType::Half) {
    stream.launch(multiply<__half, float>, grid, left, right, mutable_data<float>(d));
  } else if (like.scalar_type() == ScalarType::BFloat16) {
    stream.launch(multiply<__nv_bfloat16, float>, grid, left, right, mutable_data<float>(d));
  } else {
    stream.launch(multiply<int8_t, int>, grid, left, right, mutable_data<int>(d));
  }
}

// ---- registers[32][Count] of Count 8x8 matrices x[Count * 8][8] of 16 bits

template <int Count, bool Transposed>
__global__ void load_matrices(const uint4* x, uint32_t* registers) {
  __shared__ uint4 rows[32];
  const int lane = threadIdx.x;
  if (lane < 8 * Count) {
    rows[lane] = x[lane];
  }
  __syncwarp();
  uint32_t loaded[Count];
  ldmatrix<Count, Transposed>(loaded, &rows[lane]);
  for (int i = 0; i < Count; ++i) {
    registers[lane * Count + i] = loaded[i];
  }
}

Tensor matrices(const Tensor& x, bool transposed) {
  const int64_t count = x.size(0) / 8;
  Tensor out = new_output(x, {32, count}, ScalarType::Int);
  const auto kernel = count == 1   ? (transposed ? load_matrices<1, true> : load_matrices<1, false>)
                      : count == 2 ? (transposed ? load_matrices<2, true> : load_matrices<2, false>)
                                   : (transposed ? load_matrices<4, true> : load_matrices<4, false>);
  Stream("matrices", x)
      .launch(kernel, Grid{dim3(1), dim3(32)}, reinterpret_cast<const uint4*>(x.const_data_ptr()),
              reinterpret_cast<uint32_t*>(mutable_data<int>(out)));
  return out;
}

// ---- bits[lane] of a[lane], b[lane], c[lane]

__global__ void twiddle(const uint32_t* a, const uint32_t* b, const uint32_t* c, int* out) {
  const int lane = threadIdx.x;
  const uint32_t x = a[lane], y = b[lane], z = c[lane];
  int i = 0;
  const auto put = [&](uint32_t result) { out[i++ * 32 + lane] = static_cast<int>(result); };
  put(lop3<(0xf0 & 0xcc) | 0xaa>(x, y, z));
  put(lop3<0xf0 ^ 0xcc ^ 0xaa>(x, y, z));
  put(prmt(x, y, 0x5410));
  put(prmt(x, y, 0xb7c2));
  put(__byte_perm(x, y, 0x3210 + lane));
  put(__popc(x));
  put(__clz(static_cast<int>(x >> lane)));
  put(__ffs(static_cast<int>(x << lane)));
  put(__brev(x));
  put(__umulhi(x, y));
  put(__dp4a(static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)));
}

Tensor bits(const Tensor& a, const Tensor& b, const Tensor& c) {
  Tensor out = new_output(a, {11, 32});
  const auto words = [](const Tensor& t) { return reinterpret_cast<const uint32_t*>(data<int>(t)); };
  Stream("bits", a).launch(twiddle, Grid{dim3(1), dim3(32)}, words(a), words(b), words(c), mutable_data<int>(out));
  return out;
}

// ---- to integers: nearest, towards zero, down, up

__global__ void round_numbers(const float* x, int* out) {
  const int lane = threadIdx.x;
  out[lane * 4] = __float2int_rn(x[lane]);
  out[lane * 4 + 1] = __float2int_rz(x[lane]);
  out[lane * 4 + 2] = __float2int_rd(x[lane]);
  out[lane * 4 + 3] = __float2int_ru(x[lane]);
}

Tensor rounded(const Tensor& x) {
  Tensor out = new_output(x, {32, 4}, ScalarType::Int);
  Stream("rounded", x).launch(round_numbers, Grid{dim3(1), dim3(32)}, data<float>(x), mutable_data<int>(out));
  return out;
}

// ---- 32 pieces of Bytes, of each of which `valid` bytes are copied and the others zeroed

template <int Bytes>
__global__ void copy_pieces(const unsigned char* x, unsigned char* out, int valid) {
  __shared__ __align__(16) unsigned char pieces[32 * 16];
  cp_async<Bytes>(pieces + threadIdx.x * Bytes, x + threadIdx.x * Bytes, valid);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  for (int i = threadIdx.x; i < 32 * Bytes; i += 32) {
    out[i] = pieces[i];
  }
}

Tensor copied(const Tensor& x, int64_t valid) {
  Tensor out = new_output(x, x.sizes());
  const int64_t bytes = x.size(0) / 32;
  const auto kernel = bytes == 4 ? copy_pieces<4> : bytes == 8 ? copy_pieces<8> : copy_pieces<16>;
  Stream("copied", x)
      .launch(kernel, Grid{dim3(1), dim3(32)}, data<unsigned char>(x), mutable_data<unsigned char>(out),
              static_cast<int>(valid));
  return out;
}

// ---- many products, to be timed

__global__ void multiply_often(float* out, int times) {
  uint32_t a[4] = {0x3c003c00, 0, 0, 0}, b[2] = {0x3c003c00, 0};
  float d[4] = {};
  for (int i = 0; i < times; ++i) {
    mma_m16n8k16<__half>(d, a, b);
  }
  out[threadIdx.x] = d[0];
}

void mma_often_(const Tensor& out, int64_t times) {
  Stream("mma_often_", out)
      .launch(multiply_often, Grid{dim3(1), dim3(32)}, mutable_data<float>(out), static_cast<int>(times));
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(FERRUM_NAMESPACE, m) {
  m.def("bits(Tensor a, Tensor b, Tensor c) -> Tensor");
  m.def("block_votes(Tensor x) -> Tensor");
  m.def("copied(Tensor x, int valid) -> Tensor");
  m.def("matrices(Tensor x, bool transposed) -> Tensor");
  m.def("mma_(Tensor like, Tensor a, Tensor b, Tensor(a!) d) -> ()");
  m.def("mma_often_(Tensor(a!) out, int times) -> ()");
  m.def("rounded(Tensor x) -> Tensor");
  m.def("warp_exchange(Tensor x, int mask, int argument, int width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("bits", TORCH_BOX(&ferrum::cuda::bits));
  m.impl("block_votes", TORCH_BOX(&ferrum::cuda::block_votes));
  m.impl("copied", TORCH_BOX(&ferrum::cuda::copied));
  m.impl("matrices", TORCH_BOX(&ferrum::cuda::matrices));
  m.impl("mma_", TORCH_BOX(&ferrum::cuda::mma_));
  m.impl("mma_often_", TORCH_BOX(&ferrum::cuda::mma_often_));
  m.impl("rounded", TORCH_BOX(&ferrum::cuda::rounded));
  m.impl("warp_exchange", TORCH_BOX(&ferrum::cuda::warp_exchange));
}
