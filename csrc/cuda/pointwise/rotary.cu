// y = x rotated by its position. A block takes kTokens tokens: first their cosines and sines go into shared memory,
// once for all heads, then it streams the rows.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/core/launch.h"
#include "cuda/core/sequence.cuh"
#include "cuda/kernels.h"
#include "cuda/pointwise/rotate_row.cuh"

namespace yoco::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 4;
constexpr int kMaxHalf = 512;  // pairs per token: 16 KB of shared memory

// A position outside the given tables has no angle: NaN, which shows in the output, rather than a read out of range.
YOCO_DEVICE Rotation table_rotation(const RotaryParams& p, int64_t position, int pair) {
  if (position < 0 || position >= p.table_length) return {NAN, NAN};
  const int64_t i = position * (p.rotary_dim / 2) + pair;
  if (p.table_dtype == DType::kFloat32) {
    return {static_cast<const float*>(p.cos)[i], static_cast<const float*>(p.sin)[i]};
  }
  if (p.table_dtype == DType::kBFloat16) {
    return {to_float(static_cast<const __nv_bfloat16*>(p.cos)[i]),
            to_float(static_cast<const __nv_bfloat16*>(p.sin)[i])};
  }
  return {to_float(static_cast<const __half*>(p.cos)[i]), to_float(static_cast<const __half*>(p.sin)[i])};
}

template <typename T, bool kVectors, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const RotaryParams p) {
  __shared__ __align__(16) float cos[kTokens][rotary_slot(kMaxHalf)], sin[kTokens][rotary_slot(kMaxHalf)];
  const int64_t tokens = p.batch * p.time;
  const int64_t first = int64_t(blockIdx.x) * kTokens;
  const int half = static_cast<int>(p.rotary_dim / 2);
  for (int i = threadIdx.x; i < kTokens * half; i += kThreads) {
    const int slot = i / half, pair = i - slot * half;
    if (first + slot >= tokens) break;
    const Token token = find_token(first + slot, p.time, p.cu_seqlens, p.num_sequences);
    if (token.sequence < 0) continue;
    const int64_t position = token.index + (p.offsets != nullptr ? p.offsets[token.sequence] : 0);
    const Rotation r = p.inv_freq != nullptr ? rotation(turns_per_position(p.inv_freq[pair]), position)
                                             : table_rotation(p, position, pair);
    cos[slot][rotary_slot(pair)] = r.cos;
    sin[slot][rotary_slot(pair)] = p.inverse ? -r.sin : r.sin;
  }
  __syncthreads();
  for (int slot = 0; slot < kTokens && first + slot < tokens; ++slot) {
    const Token token = find_token(first + slot, p.time, p.cu_seqlens, p.num_sequences);
    const T* x = static_cast<const T*>(p.x.data) + token.batch * p.x.batch_stride + token.time * p.x.time_stride;
    T* y = static_cast<T*>(p.y.data) + token.batch * p.y.batch_stride + token.time * p.y.time_stride;
    const bool present = token.sequence >= 0;
    // Rows behind the last sequence are zero whatever x holds there.
    rotate_heads<T, T, kVectors, kInterleaved>(
        x, p.x.head_stride, y, p.y.head_stride, static_cast<int>(p.heads), static_cast<int>(p.dim),
        present ? static_cast<int>(p.rotary_dim) : 0, cos[slot], sin[slot], threadIdx.x, kThreads,
        [present](int) { return [present](float v) { return from_float<T>(present ? v : 0.f); }; });
  }
}

}  // namespace

const char* rotary(const RotaryParams& p, const Launch& launch) {
  if (p.rotary_dim / 2 > kMaxHalf) return "rotary: the cuda back end takes rotary dimensions up to 1024";
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    const int64_t unit = p.interleaved ? kVec<T> : 2 * kVec<T>;
    const bool vectors =
        aligned(p.x, sizeof(T), 16) && aligned(p.y, sizeof(T), 16) && p.dim % kVec<T> == 0 && p.rotary_dim % unit == 0;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.batch * p.time, kTokens)));
    auto kernel = vectors ? (p.interleaved ? rotary_kernel<T, true, true> : rotary_kernel<T, true, false>)
                          : (p.interleaved ? rotary_kernel<T, false, true> : rotary_kernel<T, false, false>);
    return launch_kernel(kernel, grid, kThreads, 0, launch, p);
  });
}

}  // namespace yoco::cuda
