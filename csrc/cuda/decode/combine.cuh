// Adds the partial results of all pieces: one block per output row.
#pragma once

#include "cuda/core/reduce.cuh"
#include "cuda/decode/keys.cuh"

namespace yoco::cuda {

// out = sum over slots of 2^(lse - max) * partial / sum of 2^(lse - max). Each warp takes every eighth slot, in
// ascending order, and the warps are added in order: bitwise the same for the same slots. Up to 64 slots (and with 32
// columns per 32 slots more) are read in one flight.
constexpr int kCombineThreads = 256;

// kDependent: launched while the pieces still run (sm90/combine.cu), so it must wait for them. A parameter, not a test
// of
// __CUDA_ARCH__: kernels of two files with one name may become one at link time, and not the one that waits.
template <typename T, bool kDependent>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const DecodeParams p, const DecodePartials partials) {
  constexpr int kWarps = kCombineThreads / 32, kMaxPerLane = 256 / 32;
  __shared__ float warp_max[kWarps], warp_sum[kWarps], warp_out[kWarps][256];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, rows = p.batch * p.heads_q * p.time_q;
  const int64_t t = row % p.time_q, head = row / p.time_q % p.heads_q, b = row / p.time_q / p.heads_q;
  const int dim_v = static_cast<int>(p.dim_v), slots = static_cast<int>(partials.slots);
  if constexpr (kDependent) asm volatile("griddepcontrol.wait;\n" ::: "memory");  // the pieces are complete and visible

  float max = -INFINITY;
  for (int s = threadIdx.x; s < slots; s += kCombineThreads) max = fmaxf(max, partials.lse[s * rows + row]);
  max = group_max(max);
  if (lane == 0) warp_max[warp] = max;
  __syncthreads();
  max = warp_max[0];
  for (int w = 1; w < kWarps; ++w) max = fmaxf(max, warp_max[w]);
  const float offset = max == -INFINITY ? 0.f : max;

  float sum = 0.f, out[kMaxPerLane] = {};
#pragma unroll 4
  for (int s = warp; s < slots; s += kWarps) {
    const float lse = partials.lse[s * rows + row];
    const bool empty = lse == -INFINITY;  // nothing was stored
    const float weight = empty ? 0.f : exp2f(lse - offset);
    sum += weight;
    const float* from = partials.out + (s * rows + row) * p.dim_v;
#pragma unroll
    for (int i = 0; i < kMaxPerLane; ++i) {
      if (i * 32 + lane < dim_v && !empty) out[i] += weight * from[i * 32 + lane];
    }
  }
  if (lane == 0) warp_sum[warp] = sum;
#pragma unroll
  for (int i = 0; i < kMaxPerLane; ++i) {
    if (i * 32 + lane < dim_v) warp_out[warp][i * 32 + lane] = out[i];
  }
  __syncthreads();
  sum = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += warp_sum[w];
  const DecodePartials final_result{1, nullptr, nullptr};
  write_decode_row<T>(p, final_result, 0, b, head, t, max, sum, 1.f, false, threadIdx.x, kCombineThreads,
                      [&](int column) {
                        float x = 0.f;
#pragma unroll
                        for (int w = 0; w < kWarps; ++w) x += warp_out[w][column];
                        return x;
                      });
}

}  // namespace yoco::cuda
