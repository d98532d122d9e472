// Rows of k and v go behind the tokens that a cache holds: contiguous, ring or paged; k rotated on the way, both
// quantised on the way. One block per (token, k or v).
//
// Positions and page numbers live on the device and are not trusted: a row whose slot lies outside the cache is
// skipped, nothing is written out of range. (The cpu back end reports such rows; here no host ever looks.)
#include "cuda/core/launch.h"
#include "cuda/core/sequence.cuh"
#include "cuda/kernels.h"
#include "cuda/pointwise/rotate_row.cuh"

namespace yoco::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxHalf = 512;

// Offset (elements) of head 0 of the row for `position` of sequence n in a cache; -1: no such slot.
YOCO_DEVICE int64_t cache_offset(const AppendParams& p, const View& cache, int64_t n, int64_t position) {
  if (position < 0) return -1;
  if (p.ring) position %= p.capacity;
  if (position >= p.capacity) return -1;
  if (p.block_table == nullptr) return n * cache.batch_stride + position * cache.time_stride;
  const int64_t entry = position / p.page_size;
  if (entry >= p.max_pages) return -1;
  const int64_t page = p.block_table[n * p.max_pages + entry];
  if (page < 0 || page >= p.num_pages) return -1;
  return page * cache.batch_stride + (position - entry * p.page_size) * cache.time_stride;
}

template <typename T, typename Cache, bool kVectors, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) append_kernel(const AppendParams p) {
  __shared__ __align__(16) float cos[rotary_slot(kMaxHalf)], sin[rotary_slot(kMaxHalf)];
  const Token token = find_token(blockIdx.x, p.time, p.cu_seqlens, p.num_sequences);
  if (token.sequence < 0) return;
  const int64_t position = p.seqused_k[token.sequence] + token.index;
  // In a ring a later token of this call overwrites this one: leave the slot to it, whatever block runs first.
  if (p.ring && token.index + p.capacity < token.length) return;
  const bool is_k = blockIdx.y == 0;
  const View& rows = is_k ? p.k : p.v;
  const View& cache = is_k ? p.k_cache : p.v_cache;
  const float* scale = is_k ? p.k_scale : p.v_scale;
  const int64_t offset = cache_offset(p, cache, token.sequence, position);
  if (offset < 0) return;
  const bool rotated = is_k && p.inv_freq != nullptr;
  if (rotated) {
    for (int i = threadIdx.x; i < p.rotary_dim / 2; i += kThreads) {
      const Rotation r = rotation(turns_per_position(p.inv_freq[i]), position);
      cos[rotary_slot(i)] = r.cos;
      sin[rotary_slot(i)] = r.sin;
    }
    __syncthreads();
  }
  const T* x = static_cast<const T*>(rows.data) + token.batch * rows.batch_stride + token.time * rows.time_stride;
  Cache* y = static_cast<Cache*>(cache.data) + offset;
  rotate_heads<T, Cache, kVectors, kInterleaved>(
      x, rows.head_stride, y, cache.head_stride, static_cast<int>(p.heads), static_cast<int>(is_k ? p.dim_k : p.dim_v),
      rotated ? static_cast<int>(p.rotary_dim) : 0, cos, sin, threadIdx.x, kThreads, [=](int head) {
        const float s = scale != nullptr ? scale[head] : 1.f;
        return [s](float v) { return from_float<Cache>(__fdiv_rn(v, s)); };
      });
}

template <typename T, typename Cache>
const char* append_typed(const AppendParams& p, const Launch& launch) {
  const int64_t unit = p.interleaved ? kVec<T> : 2 * kVec<T>;
  const size_t store_bytes = kVec<T> * sizeof(Cache);
  const bool vectors = aligned(p.k, sizeof(T), 16) && aligned(p.v, sizeof(T), 16) && p.dim_k % kVec<T> == 0 &&
                       p.dim_v % kVec<T> == 0 && aligned(p.k_cache, sizeof(Cache), store_bytes) &&
                       aligned(p.v_cache, sizeof(Cache), store_bytes) &&
                       (p.inv_freq == nullptr || p.rotary_dim % unit == 0);
  const int64_t tokens = p.batch * p.time;
  if (tokens > INT32_MAX) return "append_kv: more than 2^31 tokens in one call";
  auto kernel = vectors
                    ? (p.interleaved ? append_kernel<T, Cache, true, true> : append_kernel<T, Cache, true, false>)
                    : (p.interleaved ? append_kernel<T, Cache, false, true> : append_kernel<T, Cache, false, false>);
  return launch_kernel(kernel, dim3(static_cast<unsigned>(tokens), 2), kThreads, 0, launch, p);
}

}  // namespace

const char* append_kv(const AppendParams& p, const Launch& launch) {
  if (p.inv_freq != nullptr && p.rotary_dim / 2 > kMaxHalf) {
    return "append_kv: the cuda back end takes rotary dimensions up to 1024";
  }
  if (p.capacity <= 0) return nullptr;
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    if (p.cache_dtype == p.dtype) return append_typed<T, T>(p, launch);
    if (p.cache_dtype == DType::kFloat8E4M3) return append_typed<T, __nv_fp8_e4m3>(p, launch);
    if (p.cache_dtype == DType::kInt8) return append_typed<T, int8_t>(p, launch);
    return "append_kv: the cache must have the dtype of k and v, float8 e4m3 or int8";
  });
}

}  // namespace yoco::cuda
