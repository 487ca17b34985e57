// Writes of K and V to their caches, both in one launch: every byte is read once and written once, 17 MB of half
// precision for 4096 tokens of 4 heads of 128: 4 us at 4.3 TB/s.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "checks/kv_cache.h"
#include "cuda/heads.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"

namespace ferrum::cuda {
namespace {

// What is moved at a time: 16 bytes, or one element.
struct alignas(16) Quad {
  uint32_t words[4];
};

// Keys or values [sequences, tokens, heads, head_words], and where they go. Strides are in words.
template <typename Word>
struct Side {
  const Word* from;
  Word* to;
  int64_t sequence_stride, token_stride, head_stride;
};

// The row that `index` has for a token or for its sequence, where 0 <= index <= last: of a pool of slots, or of a
// sequence's cache, in which a call's tokens follow each other. Strides are in words.
struct Destination {
  Integers index;
  bool of_sequence;
  int64_t last;
  int64_t sequence_stride, row_stride, head_stride;

  // Where the first head of the token goes; -1: nowhere.
  __device__ __forceinline__ int64_t first(int64_t sequence, int64_t token) const {
    const int64_t row = integer_at(index, of_sequence ? sequence : token);
    if (row < 0 || row > last) {
      return -1;
    }
    return sequence * sequence_stride + (of_sequence ? row + token : row) * row_stride;
  }
};

template <typename Word>
struct Copy {
  Side<Word> k, v;
  Destination destination;
  int64_t sequences, tokens;
  unsigned heads, head_words;
};

template <typename Word>
__global__ void __launch_bounds__(kSpreadThreads) copy_heads(Copy<Word> copy) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= copy.tokens) {
    return;
  }
  const unsigned words = copy.heads * copy.head_words, step = gridDim.y * blockDim.x;
  for (int64_t sequence = blockIdx.z; sequence < copy.sequences; sequence += gridDim.z) {
    const int64_t first = copy.destination.first(sequence, token);
    const Word* const k = copy.k.from + sequence * copy.k.sequence_stride + token * copy.k.token_stride;
    const Word* const v = copy.v.from + sequence * copy.v.sequence_stride + token * copy.v.token_stride;
    for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < words; i += step) {
      const unsigned head = i / copy.head_words, word = i % copy.head_words;
      // Read before the destination is known: one trip to memory less.
      const Word from_k = k[head * copy.k.head_stride + word], from_v = v[head * copy.v.head_stride + word];
      if (first >= 0) {
        const int64_t to = first + head * copy.destination.head_stride + word;
        copy.k.to[to] = from_k;
        copy.v.to[to] = from_v;
      }
    }
  }
}

int64_t element_bytes(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

// The copy in units of bytes, of k and v [..., tokens, heads, head_dim].
Side<char> side_of(const Tensor& from, const Tensor& to) {
  const int64_t last = from.dim() - 1, element = element_bytes(from);
  return {data<char>(from), mutable_data<char>(to), last == 3 ? from.stride(0) * element : 0,
          from.stride(last - 2) * element, from.stride(last - 1) * element};
}

template <typename Word>
bool moves_by(const Side<char>& side) {
  constexpr int64_t size = sizeof(Word);
  return reinterpret_cast<uintptr_t>(side.from) % size == 0 && reinterpret_cast<uintptr_t>(side.to) % size == 0 &&
         side.sequence_stride % size == 0 && side.token_stride % size == 0 && side.head_stride % size == 0;
}

template <typename Word>
Side<Word> in_words(const Side<char>& side) {
  constexpr int64_t size = sizeof(Word);
  return {reinterpret_cast<const Word*>(side.from), reinterpret_cast<Word*>(side.to), side.sequence_stride / size,
          side.token_stride / size, side.head_stride / size};
}

// `row` in bytes; strides of the destination too.
template <typename Word>
void launch_copy(const char* op, const Tensor& k, const Side<char>& k_side, const Side<char>& v_side,
                 Destination destination, int64_t heads, int64_t row) {
  constexpr int64_t size = sizeof(Word);
  destination.sequence_stride /= size;
  destination.row_stride /= size;
  destination.head_stride /= size;
  const int64_t sequences = k.dim() == 4 ? k.size(0) : 1, tokens = k.size(k.dim() - 3);
  const unsigned words = narrow(op, "k", heads * row / size), head_words = static_cast<unsigned>(row / size);
  const Copy<Word> copy{
      in_words<Word>(k_side), in_words<Word>(v_side), destination, sequences, tokens, words / head_words, head_words};
  SpreadConfig config = pick_spread_config(sequences * tokens, words);
  config.rows = static_cast<unsigned>(std::min<int64_t>(config.rows, tokens));
  Grid grid = spread_grid(op, config, tokens);
  grid.blocks.z = static_cast<unsigned>(std::min(sequences, kMaxGridY));
  Stream(op, k).launch(copy_heads<Word>, grid, copy);
}

// The destination's strides are in rows of one head.
void run_copy(const char* op, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
              Destination destination) {
  if (k.numel() == 0) {
    return;
  }
  const Side<char> k_side = side_of(k, k_cache), v_side = side_of(v, v_cache);
  int64_t heads = k.size(k.dim() - 2), row = k.size(k.dim() - 1) * element_bytes(k);
  destination.sequence_stride *= row;
  destination.row_stride *= row;
  destination.head_stride *= row;
  if (k_side.head_stride == row && v_side.head_stride == row && destination.head_stride == row) {
    row *= heads;  // heads without gaps on both sides are one long head
    heads = 1;
  }
  const bool quads = moves_by<Quad>(k_side) && moves_by<Quad>(v_side) && row % sizeof(Quad) == 0;
  const auto launch = quads ? launch_copy<Quad> : element_bytes(k) == 4 ? launch_copy<uint32_t> : launch_copy<uint16_t>;
  launch(op, k, k_side, v_side, destination, heads, row);
}

void kv_append_(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& cache_lens) {
  const char* op = "kv_append_";
  check_kv_append(op, k_cache, v_cache, k, v, cache_lens);
  check_device(op, k_cache, {{"v_cache", v_cache}, {"k", k}, {"v", v}, {"cache_lens", cache_lens}});
  const int64_t heads = k_cache.size(1), capacity = k_cache.size(2);
  const Integers lengths{cache_lens.const_data_ptr(), false};
  run_copy(op, k_cache, v_cache, k, v, {lengths, true, capacity - k.size(1), heads * capacity, 1, capacity});
}

void paged_kv_write_(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& slot_mapping) {
  const char* op = "paged_kv_write_";
  const Integers slots = check_paged_kv_write(op, k_cache, v_cache, k, v, slot_mapping);
  check_device(op, k_cache, {{"v_cache", v_cache}, {"k", k}, {"v", v}, {"slot_mapping", slot_mapping}});
  run_copy(op, k_cache, v_cache, k, v, {slots, false, pool_slots(k_cache) - 1, 0, k.size(1), 1});
}

// Heads to quantise, and the pool of codes [slots, heads, head_dim] and scales [slots, heads] they go to. Element
// strides.
template <typename T>
struct Quantized {
  const T* x;
  int8_t* codes;
  float* scales;
  int64_t token_stride, head_stride;
};

template <typename T>
struct Quantization {
  Quantized<T> k, v;
  Integers slots;
  int64_t num_slots;
  unsigned units, heads;
  int head_dim;
};

// blockIdx.y: K or V. A head is read twice, the second time from L1.
template <typename T, int N>
__global__ void __launch_bounds__(kHeadThreads) quantize_heads(Quantization<T> p) {
  constexpr unsigned kInfinity = 0x7f800000u;
  const unsigned unit = blockIdx.x * blockDim.y + threadIdx.y;
  const unsigned token = unit / p.heads, head = unit % p.heads;
  const bool inside = unit < p.units;  // no early return: every lane of the warp takes part in the maximum
  const Quantized<T> side = blockIdx.y == 0 ? p.k : p.v;
  const T* const x = side.x + token * side.token_stride + head * side.head_stride;
  const int64_t slot = inside ? integer_at(p.slots, token) : -1;
  const int begin = threadIdx.x * N, step = blockDim.x * N;
  // Without its sign a float is ordered as its bits are, with infinity and then the NaNs above all numbers.
  unsigned largest = __float_as_uint(1e-8f);
  if (inside) {
    for (int i = begin; i < p.head_dim; i += step) {
      float value[N];
      load(x + i, value);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        largest = max(largest, __float_as_uint(fabsf(value[j])));
      }
    }
  }
  largest = group_max(largest);
  if (slot < 0 || slot >= p.num_slots) {
    return;
  }
  const bool finite = largest < kInfinity;
  const float scale = finite ? __uint_as_float(largest) / 127.0f : __uint_as_float(0x7fc00000u);
  const int64_t row = slot * p.heads + head;
  for (int i = begin; i < p.head_dim; i += step) {
    float value[N];
    load(x + i, value);
    Vec<int8_t, N> codes;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float code = fminf(127.0f, fmaxf(-127.0f, rintf(value[j] / scale)));
      codes.values[j] = finite ? static_cast<int8_t>(code) : 0;
    }
    *reinterpret_cast<Vec<int8_t, N>*>(side.codes + row * p.head_dim + i) = codes;
  }
  if (threadIdx.x == 0) {
    side.scales[row] = scale;
  }
}

template <int N, typename T>
bool quantizes_by(const Quantized<T>& side, int64_t head_dim) {
  return can_vectorize<N, T>(side.x, side.token_stride, head_dim) && side.head_stride % N == 0 &&
         can_vectorize<N, int8_t>(side.codes, 0, head_dim);
}

void paged_kv_write_int8_(Tensor k_cache, Tensor v_cache, Tensor k_scale, Tensor v_scale, const Tensor& k,
                          const Tensor& v, const Tensor& slot_mapping) {
  const char* op = "paged_kv_write_int8_";
  const Integers slots = check_paged_kv_write_int8(op, k_cache, v_cache, k_scale, v_scale, k, v, slot_mapping);
  check_device(op, k_cache,
               {{"v_cache", v_cache},
                {"k_scale", k_scale},
                {"v_scale", v_scale},
                {"k", k},
                {"v", v},
                {"slot_mapping", slot_mapping}});
  if (k.numel() == 0) {
    return;
  }
  for_dtype(activation_dtype(op, "k", k), [&](auto type) {
    using T = decltype(type);
    constexpr int N = 16 / sizeof(T);
    const auto side = [](const Tensor& x, const Tensor& codes, const Tensor& scales) {
      return Quantized<T>{data<T>(x), mutable_data<int8_t>(codes), mutable_data<float>(scales), x.stride(0),
                          x.stride(1)};
    };
    const Quantization<T> p{side(k, k_cache, k_scale),
                            side(v, v_cache, v_scale),
                            slots,
                            pool_slots(k_cache),
                            narrow(op, "k", k.size(0) * k.size(1)),
                            narrow(op, "k", k.size(1)),
                            static_cast<int>(narrow(op, "k", k.size(2)))};
    const bool vectors = quantizes_by<N>(p.k, p.head_dim) && quantizes_by<N>(p.v, p.head_dim);
    const HeadsConfig config = pick_heads_config(p.units, vectors ? p.head_dim / N : p.head_dim);
    Grid grid = heads_grid(op, config, p.units);
    grid.blocks.y = 2;
    Stream(op, k).launch(vectors ? quantize_heads<T, N> : quantize_heads<T, 1>, grid, p);
  });
}

}  // namespace
}  // namespace ferrum::cuda

STABLE_TORCH_LIBRARY_IMPL(FERRUM_NAMESPACE, FERRUM_CUDA_KEY, m) {
  m.impl("kv_append_", TORCH_BOX(&ferrum::cuda::kv_append_));
  m.impl("paged_kv_write_", TORCH_BOX(&ferrum::cuda::paged_kv_write_));
  m.impl("paged_kv_write_int8_", TORCH_BOX(&ferrum::cuda::paged_kv_write_int8_));
}
