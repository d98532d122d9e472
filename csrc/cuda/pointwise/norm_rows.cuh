// What kernels that normalise rows share: sums over the lanes that hold a row, optional weights, and the weight
// gradient, summed in a fixed order: per block over its rows, then over the blocks, with a number of blocks that
// depends on the shape only, not on the device.
#pragma once

#include <algorithm>

#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"

namespace yoco::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxParts = 264;             // partial sums of the weight gradient: two blocks per SM of an H100
constexpr int64_t kMaxWeightGradient = 32768;  // its shared memory must fit every supported device

template <int kLanes>
YOCO_DEVICE float row_sum(float x, float* scratch) {
  if constexpr (kLanes <= 32) {
    return group_sum<kLanes>(x);
  } else {
    return block_sum<kLanes>(x, scratch);
  }
}

// Weights come in the dtype of x or in float32; a missing weight is 1.
template <typename T, int N>
YOCO_DEVICE void load_weight(float (&w)[N], const void* weight, bool is_float, int column) {
  if (weight == nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) w[j] = 1.f;
  } else if (is_float) {
    constexpr int kStep = N % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int j = 0; j < N; j += kStep) {
      const Vec<float, kStep> v = load_const<kStep>(static_cast<const float*>(weight) + column + j);
#pragma unroll
      for (int i = 0; i < kStep; ++i) w[j + i] = v[i];
    }
  } else {
    load_float(w, static_cast<const T*>(weight) + column);
  }
}

// d_weight[c] = sum over parts, 32 columns and 8 interleaved runs of parts per block.
__global__ void __launch_bounds__(kThreads) weight_gradient_kernel(const float* __restrict__ partial, int64_t parts,
                                                                   int64_t dim, float* __restrict__ d_weight) {
  __shared__ float sums[8][32];
  const int lane = threadIdx.x % 32, run = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0.f;
  if (column < dim) {
    for (int64_t part = run; part < parts; part += 8) sum += partial[part * dim + column];
  }
  sums[run][lane] = sum;
  __syncthreads();
  if (run != 0 || column >= dim) return;
  for (int r = 1; r < 8; ++r) sum += sums[r][lane];
  d_weight[column] = sum;
}

struct Parts {
  int64_t parts, rows_per_part;
};
inline Parts split_rows(int64_t rows, int groups, int64_t max_parts = kMaxParts) {
  const int64_t steps = ceil_div(rows, groups);  // a block takes `groups` rows at a time
  const int64_t steps_per_part = ceil_div(std::max<int64_t>(steps, 1), max_parts);
  return {ceil_div(rows, steps_per_part * groups), steps_per_part * groups};
}

}  // namespace
}  // namespace yoco::cuda
