// attention_decode: plan, one launch per segment, and the combination of their pieces.
#include <algorithm>

#include "cuda/core/reduce.cuh"
#include "cuda/decode/keys.cuh"
#include "cuda/decode/plan.h"
#include "cuda/kernels.h"

namespace yoco::cuda {
namespace {

constexpr int kThreads = 128;

// One block per output row: out = sum over slots of 2^(lse - max) * partial / sum of 2^(lse - max). Each warp takes
// every fourth slot, in ascending order, and the warps are added in order: bitwise the same for the same slots.
template <typename T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const DecodeParams p, const DecodePartials partials) {
  constexpr int kWarps = kThreads / 32, kMaxPerLane = 256 / 32;
  __shared__ float warp_max[kWarps], warp_sum[kWarps], warp_out[kWarps][256];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, rows = p.batch * p.heads_q * p.time_q;
  const int64_t t = row % p.time_q, head = row / p.time_q % p.heads_q, b = row / p.time_q / p.heads_q;
  const int dim_v = static_cast<int>(p.dim_v), slots = static_cast<int>(partials.slots);

  float max = -INFINITY;
  for (int s = threadIdx.x; s < slots; s += kThreads) max = fmaxf(max, partials.lse[s * rows + row]);
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
    if (lse == -INFINITY) continue;  // an empty piece
    const float weight = exp2f(lse - offset);
    sum += weight;
    const float* from = partials.out + (s * rows + row) * p.dim_v;
#pragma unroll
    for (int i = 0; i < kMaxPerLane; ++i) {
      if (i * 32 + lane < dim_v) out[i] += weight * from[i * 32 + lane];
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
  write_decode_row<T>(p, final_result, 0, b, head, t, max, sum, 1.f, false, threadIdx.x, kThreads, [&](int column) {
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += warp_out[w][column];
    return x;
  });
}

int64_t result_rows(const DecodeParams& p) { return p.batch * p.heads_q * p.time_q; }

const char* launch_segment(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                           const DecodePartials& partials, const Launch& launch) {
  if (segment.splits == 0) return nullptr;
  if (!plan.tensor_cores) return launch_decode_simple(p, plan, segment, partials, launch);
  const bool bf16 = p.dtype == DType::kBFloat16;
  switch (plan.head_dim) {
    case 64:
      return bf16 ? launch_decode<__nv_bfloat16, 64>(p, plan, segment, partials, launch)
                  : launch_decode<__half, 64>(p, plan, segment, partials, launch);
    case 128:
      return bf16 ? launch_decode<__nv_bfloat16, 128>(p, plan, segment, partials, launch)
                  : launch_decode<__half, 128>(p, plan, segment, partials, launch);
    default:
      return bf16 ? launch_decode<__nv_bfloat16, 256>(p, plan, segment, partials, launch)
                  : launch_decode<__half, 256>(p, plan, segment, partials, launch);
  }
}

}  // namespace

size_t decode_workspace(const DecodeParams& p, const Launch& launch) {
  if (p.heads_kv == 0) return 0;
  const DecodePlan plan = plan_decode(p, sm_count(launch.device));
  if (plan.slots <= 1) return 0;
  return static_cast<size_t>(plan.slots * result_rows(p) * (p.dim_v + 1)) * sizeof(float);
}

const char* decode(const DecodeParams& p, const Launch& launch) {
  if (result_rows(p) == 0) return nullptr;
  if (p.dim_qk > 256 || p.dim_v > 256) return "attention_decode: the cuda back end takes head dims up to 256";
  const DecodePlan plan = plan_decode(p, sm_count(launch.device));
  DecodePartials partials{plan.slots, static_cast<float*>(p.workspace), nullptr};
  partials.lse = partials.out + plan.slots * result_rows(p) * p.dim_v;
  if (const char* message = launch_segment(p, plan, plan.cache, partials, launch)) return message;
  if (const char* message = launch_segment(p, plan, plan.latents, partials, launch)) return message;
  if (plan.slots == 1) return nullptr;
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    return launch_kernel(combine_kernel<T>, dim3(static_cast<unsigned>(result_rows(p))), kThreads, 0, launch, p,
                         partials);
  });
}

}  // namespace yoco::cuda
