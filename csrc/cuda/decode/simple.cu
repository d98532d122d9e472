// Decode without tensor cores: float32 queries (tf32 would not be float32), and 16-bit ones whose rows 16-byte copies
// cannot reach. One block per query row and piece; each warp takes keys in turn, lanes share the head dimension.
#include <algorithm>

#include "cuda/core/reduce.cuh"
#include "cuda/decode/keys.cuh"

namespace yoco::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kPerLane = 256 / 32;
constexpr int kAtOnce = 4;  // keys whose loads a warp has in flight together

template <typename T, typename Cache>
__global__ void __launch_bounds__(kThreads)
    simple_kernel(const DecodeParams p, const DecodeSegment segment, const DecodePartials partials, int tile_keys) {
  __shared__ float warp_max[kWarps], warp_sum[kWarps], warp_out[kWarps][32 * kPerLane];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, split = blockIdx.y;
  const int64_t t = row % p.time_q, head = row / p.time_q % p.heads_q, b = row / p.time_q / p.heads_q;
  const int64_t kv_head = head / (p.heads_q / p.heads_kv);
  DecodeKeys keys(p, segment, b, split, tile_keys);
  const KeyRange seen = keys.row_range(t);
  const int64_t begin = std::max(seen.begin, keys.first), end = std::min(seen.end, keys.end);
  const T* q_row =
      static_cast<const T*>(p.q.data) + b * p.q.batch_stride + t * p.q.time_stride + head * p.q.head_stride;
  const Cache* k = static_cast<const Cache*>(keys.k().data) + kv_head * keys.k().head_stride;
  const Cache* v = static_cast<const Cache*>(keys.v().data) + kv_head * keys.v().head_stride;
  const int dim_qk = static_cast<int>(p.dim_qk), dim_v = static_cast<int>(p.dim_v);
  const bool scaled = !keys.latent;
  const float scale = static_cast<float>(p.scale) * (scaled && p.k_scale != nullptr ? p.k_scale[kv_head] : 1.f);
  const float v_scale = scaled && p.v_scale != nullptr ? p.v_scale[kv_head] : 1.f;
  const float softcap = static_cast<float>(p.softcap);
  const float slope = scaled && p.alibi_slopes != nullptr ? p.alibi_slopes[b * p.alibi_batch_stride + head] : 0.f;
  const int64_t diagonal = t + keys.length - p.time_q;

  float q[kPerLane], out[kPerLane] = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) q[i] = i * 32 + lane < dim_qk ? to_float(q_row[i * 32 + lane]) : 0.f;
  float max = -INFINITY, sum = 0.f;  // natural logarithm; the same in all lanes
  for (int64_t first = begin + warp * kAtOnce; first < end; first += kWarps * kAtOnce) {
    DecodeKeys::Offsets at[kAtOnce];
    float s[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      at[j] = first + j < end ? keys.locate(first + j) : DecodeKeys::Offsets{0, 0, false};
      s[j] = 0.f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (at[j].found && i * 32 + lane < dim_qk) s[j] = fmaf(q[i], to_float(k[at[j].k + i * 32 + lane]), s[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (!at[j].found) continue;  // uniform in the warp
      float x = group_sum(s[j]) * scale;
      if (softcap > 0.f) x = softcap * tanhf(x / softcap);
      x -= slope * fabsf(static_cast<float>(diagonal - first - j));
      const float top = fmaxf(max, x), base = top == -INFINITY ? 0.f : top;
      const float correction = expf(max - base), weight = expf(x - base);
      max = top;
      sum = sum * correction + weight;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i * 32 + lane < dim_v) out[i] = fmaf(weight, to_float(v[at[j].v + i * 32 + lane]), out[i] * correction);
      }
    }
  }
  const bool invalid = __syncthreads_or(keys.invalid);
  if (lane == 0) {
    warp_max[warp] = max;
    warp_sum[warp] = sum;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) warp_out[warp][i * 32 + lane] = out[i];
  __syncthreads();
  float factor[kWarps];
  max = -INFINITY, sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) max = fmaxf(max, warp_max[w]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    factor[w] = max == -INFINITY ? 0.f : expf(warp_max[w] - max);
    sum += warp_sum[w] == 0.f ? 0.f : warp_sum[w] * (max == -INFINITY ? 1.f : factor[w]);
  }
  write_decode_row<T>(p, partials, segment.first_slot + split, b, head, t, max * DecodeLogits::kLog2e, sum, v_scale,
                      invalid, threadIdx.x, kThreads, [&](int column) {
                        float x = 0.f;
#pragma unroll
                        for (int w = 0; w < kWarps; ++w) x += warp_out[w][column] * factor[w];
                        return x;
                      });
}

}  // namespace

const char* launch_decode_simple(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                                 const DecodePartials& partials, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(p.batch * p.heads_q * p.time_q), static_cast<unsigned>(segment.splits));
  const int tile = static_cast<int>(decode_tile_keys(plan.head_dim));
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    auto kernel = simple_kernel<T, T>;
    if (!segment.latent && p.cache_dtype == DType::kFloat8E4M3) {
      kernel = simple_kernel<T, __nv_fp8_e4m3>;
    } else if (!segment.latent && p.cache_dtype == DType::kInt8) {
      kernel = simple_kernel<T, int8_t>;
    } else if (!segment.latent && p.cache_dtype != p.dtype) {
      return "attention_decode: the cache must have the dtype of q, float8 e4m3 or int8";
    }
    return launch_kernel(kernel, grid, kThreads, 0, launch, p, segment, partials, tile);
  });
}

}  // namespace yoco::cuda
