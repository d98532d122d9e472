// Sums and maxima over the lanes of a warp (or an aligned group of kWidth lanes) and over the warps of a block.
#pragma once

#include "cuda/core/vector.cuh"

namespace yoco::cuda {

template <int kWidth = 32>
YOCO_DEVICE float group_sum(float x) {
#pragma unroll
  for (int d = kWidth / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}
template <int kWidth = 32>
YOCO_DEVICE float group_max(float x) {
#pragma unroll
  for (int d = kWidth / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}

// Every thread gets the sum over the block; kThreads is the block size. scratch: kThreads / 32 floats, free to reuse
// after the next barrier. The order of additions is fixed.
template <int kThreads>
YOCO_DEVICE float block_sum(float x, float* scratch) {
  constexpr int kWarps = kThreads / 32;
  x = group_sum(x);
  if constexpr (kWarps == 1) return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += scratch[w];
  return sum;
}

}  // namespace yoco::cuda
