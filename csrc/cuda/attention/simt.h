// Attention one row (or one key) per warp, with ordinary float32 arithmetic: no tile, no tensor core, any alignment.
//
// It serves float32 inputs, and it settles the rows in which the tensor-core kernels found a NaN or infinity: inside a
// tile those multiply every element, also masked ones, and 0 * NaN is NaN. Here only what a row sees is touched.
#pragma once

#include "cuda/core/reduce.cuh"
#include "cuda/core/row_mask.h"
#include "cuda/core/softmax.h"

namespace yoco::cuda {

// Score in log2 units with accurate functions.
YOCO_DEVICE float simt_score(const ScoreParams& sp, float raw, float bias_log2, float distance) {
  const float s = sp.cap_out > 0.f ? sp.cap_out * tanhf(raw * sp.cap_in) : raw * sp.scale_log2;
  return s - bias_log2 * fabsf(distance);
}

YOCO_DEVICE float alibi_log2(const AttentionParams& p, int sequence, int head) {
  return p.alibi_slopes == nullptr ? 0.f : p.alibi_slopes[sequence * p.alibi_batch_stride + head] * kLog2E;
}
YOCO_DEVICE float sink_log2(const AttentionParams& p, int head) {
  return p.sinks == nullptr ? YOCO_NEG_INF : p.sinks[head] * kLog2E;
}

template <typename T>
YOCO_DEVICE float dot(const T* a, const T* b, int n) {
  float sum = 0.f;
  for (int d = 0; d < n; ++d) sum = fmaf(to_float(a[d]), to_float(b[d]), sum);
  return sum;
}

// One K/V segment as a row's kernel sees it: first key of this sequence and KV head.
template <typename T>
struct Segment {
  const T* k;
  const T* v;
  int64_t k_stride, v_stride;
};
template <typename T>
YOCO_DEVICE Segment<T> make_segment(const AttentionParams& p, const RowMap& m, bool latents) {
  const View& k = latents ? p.latent_k : p.k;
  const View& v = latents ? p.latent_v : p.v;
  const int64_t first = latents ? 0 : m.sequence.k_begin;
  return Segment<T>{static_cast<const T*>(k.data) + m.sequence.batch * k.batch_stride + first * k.time_stride +
                        m.head_kv * k.head_stride,
                    static_cast<const T*>(v.data) + m.sequence.batch * v.batch_stride + first * v.time_stride +
                        m.head_kv * v.head_stride,
                    k.time_stride, v.time_stride};
}

// Output and lse of one row, by one warp: 32 keys at a time, a lane per key for the scores and a lane per column for
// the sum over values.
template <typename T>
__device__ __noinline__ void attend_row(const AttentionParams& p, const ScoreParams& sp, int sequence, int head_kv,
                                        int row) {
  const RowMap m = make_row_map(p, sequence, head_kv);
  constexpr int kColumns = 256 / 32;
  const int lane = threadIdx.x % 32, head = m.head(row), dim_qk = int(p.dim_qk), dim_v = int(p.dim_v);
  const T* q = static_cast<const T*>(p.q.data) + m.offset(p.q, row);
  const float diagonal = float(m.token(row) + m.sequence.len_k - m.sequence.len_q);
  float out[kColumns] = {}, top = YOCO_NEG_INF, sum = 0.f;
  for (int latents = 0; latents < (p.num_latents > 0 ? 2 : 1); ++latents) {
    const Segment<T> s = make_segment<T>(p, m, latents != 0);
    const int2 keys = row_keys(p, m, row, latents != 0);
    const float bias = latents != 0 ? 0.f : alibi_log2(p, sequence, head);
    for (int first = keys.x; first < keys.y; first += 32) {
      const int key = first + lane;
      float score = YOCO_NEG_INF;
      if (key < keys.y) score = simt_score(sp, dot(q, s.k + key * s.k_stride, dim_qk), bias, diagonal - float(key));
      const float new_top = fmaxf(top, group_max(score));
      const float reference = new_top == YOCO_NEG_INF ? 0.f : new_top;
      const float factor = top == YOCO_NEG_INF ? 0.f : exp2f(top - reference);
      top = new_top;
      const float weight = exp2f(score - reference);
      sum = sum * factor + group_sum(weight);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] *= factor;
      const int count = min(32, keys.y - first);
      for (int j = 0; j < count; ++j) {
        const float w = __shfl_sync(0xffffffffu, weight, j);
        const T* v = s.v + (first + j) * s.v_stride;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (c * 32 + lane < dim_v) out[c] = fmaf(w, to_float(v[c * 32 + lane]), out[c]);
        }
      }
    }
  }
  const RowResult r = finish_row(top, sum, 1.f, sink_log2(p, head));
  T* to = static_cast<T*>(p.out.data) + m.offset(p.out, row);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (c * 32 + lane < dim_v) to[c * 32 + lane] = from_float<T>(out[c] * r.factor);
  }
  if (lane == 0) static_cast<float*>(p.lse)[m.statistic(p, row)] = r.lse;
}

// Rows behind the last sequence of a packed batch: output 0, lse -inf. All CTAs of the grid share them.
template <typename T>
YOCO_DEVICE void zero_tail(const AttentionParams& p, int64_t cta, int64_t ctas) {
  if (p.cu_seqlens_q == nullptr) return;
  const int64_t end = clamp_index(p.cu_seqlens_q[p.num_sequences], 0, p.time_q);
  for (int64_t t = end + cta; t < p.time_q; t += ctas) {
    for (int i = threadIdx.x; i < p.heads_q * p.dim_v; i += blockDim.x) {
      const int64_t head = i / p.dim_v, d = i % p.dim_v;
      static_cast<T*>(p.out.data)[t * p.out.time_stride + head * p.out.head_stride + d] = from_float<T>(0.f);
    }
    for (int head = threadIdx.x; head < p.heads_q; head += blockDim.x) {
      static_cast<float*>(p.lse)[head * p.time_q + t] = YOCO_NEG_INF;
    }
  }
}

}  // namespace yoco::cuda
