// What the backward kernels share, and gradients of one row or one key per warp in ordinary float32 arithmetic: for
// float32 inputs, and for the rows and keys in which a tensor-core kernel found a NaN or infinity (see simt.h).
#pragma once

#include "cuda/attention/plan.h"
#include "cuda/attention/simt.h"
#include "cuda/attention/tile.h"

namespace yoco::cuda {

// ---- scores
struct RowScore {
  float bias;      // alibi slope in log2 units
  float distance;  // diagonal - key
};
YOCO_DEVICE RowScore make_row_score(const AttentionParams& p, const RowMap& m, int row, int key, bool latents) {
  if (p.alibi_slopes == nullptr || latents || row >= m.rows) return RowScore{0.f, 0.f};
  return RowScore{alibi_log2(p, m.sequence_index, m.head(row)),
                  float(m.token(row) + int(m.sequence.len_k - m.sequence.len_q) - key)};
}

// P of a score without its bias, in log2 units; the key is `offset` after the one row_score was made for.
YOCO_DEVICE float biased_probability(const RowScore& r, int offset, float score, float lse) {
  return exp2_approx(score - r.bias * fabsf(r.distance - float(offset)) - lse);
}
// x: raw score -> P; d: dP -> dS, without the scale. stat: {lse, delta} of the row; offset as above.
template <bool kTransform>
YOCO_DEVICE void score_gradient(const ScoreParams& sp, const RowScore& r, int offset, float2 stat, float& x, float& d) {
  if constexpr (kTransform) {
    const CappedScore s = sp.cap_out > 0.f ? softcap(sp, x) : CappedScore{x * sp.scale_log2, 1.f};
    x = biased_probability(r, offset, s.score, stat.x);
    d = x * (d - stat.y) * s.slope;
  } else {
    x = exp2_approx(fmaf(x, sp.multiplier, -stat.x));
    d = x * (d - stat.y);
  }
}

// The same with accurate functions.
YOCO_DEVICE void simt_score_gradient(const ScoreParams& sp, const RowScore& r, float2 stat, float& x, float& d) {
  float slope = 1.f, score = x * sp.scale_log2;
  if (sp.cap_out > 0.f) {
    const float t = tanhf(x * sp.cap_in);
    score = sp.cap_out * t;
    slope = 1.f - t * t;
  }
  x = exp2f(score - r.bias * fabsf(r.distance) - stat.x);
  d = x * (d - stat.y) * slope;
}

// ---- where things lie
// First row of a
// sequence and KV head in plan.stats.
YOCO_DEVICE int64_t first_stat(const AttentionParams& p, const RowMap& m) {
  return ((m.sequence.batch * p.heads_kv + m.head_kv) * p.time_q + m.sequence.q_begin) * m.group;
}
// Number of a row tile in the dQ accumulator. Packed: sequences begin at any row, so each gets room for one tile more.
YOCO_DEVICE int64_t dq_tile(const AttentionParams& p, const RowMap& m, int rows, int tile) {
  const int64_t first = p.cu_seqlens_q != nullptr ? m.sequence.q_begin * m.group / rows + m.sequence_index
                                                  : m.sequence.batch * ((p.time_q * m.group + rows - 1) / rows);
  return (first + tile) * p.heads_kv + m.head_kv;
}

// Gradients of the keys of one sequence and KV head.
struct GradientRows {
  void* data;
  int64_t stride;
  bool float32;     // float32 memory, else the dtype of the inputs
  bool accumulate;  // added to what is there
  bool aligned;     // 16-byte stores
};
template <typename T>
YOCO_DEVICE GradientRows gradient_rows(const AttentionBackwardParams& p, const BackwardPlan& plan, const RowMap& m,
                                       bool latents, bool values) {
  if (latents && plan.latent_partial_k != nullptr) {
    const int64_t dim = values ? p.dim_v : p.dim_qk;
    float* base = values ? plan.latent_partial_v : plan.latent_partial_k;
    return GradientRows{base + (m.sequence_index * p.num_latents * p.heads_kv + m.head_kv) * dim, p.heads_kv * dim,
                        true, false, false};
  }
  const View& v = latents ? (values ? p.d_latent_v : p.d_latent_k) : (values ? p.dv : p.dk);
  const int64_t offset = m.sequence.batch * v.batch_stride + (latents ? 0 : m.sequence.k_begin) * v.time_stride +
                         m.head_kv * v.head_stride;
  if (!latents && p.accumulate_dkv) {
    return GradientRows{static_cast<float*>(v.data) + offset, v.time_stride, true, true, false};
  }
  return GradientRows{static_cast<T*>(v.data) + offset, v.time_stride, std::is_same_v<T, float>, false,
                      latents ? plan.aligned_latents : plan.aligned_dkv};
}
template <typename T>
YOCO_DEVICE void put_gradient(const GradientRows& rows, int key, int col, float x) {
  if (rows.float32) {
    float* to = static_cast<float*>(rows.data) + key * rows.stride + col;
    *to = rows.accumulate ? *to + x : x;
  } else {
    static_cast<T*>(rows.data)[key * rows.stride + col] = from_float<T>(x);
  }
}

// Keys of a sequence whose gradients must be written: those that seqused_k leaves out are zero.
YOCO_DEVICE int keys_to_store(const AttentionBackwardParams& p, const RowMap& m) {
  if (p.accumulate_dkv) return int(m.sequence.len_k);
  if (p.cu_seqlens_k == nullptr) return int(p.time_k);
  return int(clamp_index(p.cu_seqlens_k[m.sequence_index + 1], m.sequence.k_begin, p.time_k) - m.sequence.k_begin);
}

// Rows [begin, time) of a view, shared by all CTAs of the grid.
template <typename T>
YOCO_DEVICE void zero_rows(const View& v, int64_t begin, int64_t time, int64_t heads, int64_t dim) {
  for (int64_t t = begin + blockIdx.x; t < time; t += gridDim.x) {
    for (int64_t i = threadIdx.x; i < heads * dim; i += blockDim.x) {
      static_cast<T*>(v.data)[t * v.time_stride + i / dim * v.head_stride + i % dim] = from_float<T>(0.f);
    }
  }
}
// Rows and keys behind the last sequence of a packed batch.
template <typename T>
YOCO_DEVICE void zero_key_tails(const AttentionBackwardParams& p, const BackwardPlan& plan) {
  if (p.cu_seqlens_k == nullptr || !plan.want_dkv || p.accumulate_dkv) return;
  const int64_t begin = clamp_index(p.cu_seqlens_k[p.num_sequences], 0, p.time_k);
  zero_rows<T>(p.dk, begin, p.time_k, p.heads_kv, p.dim_qk);
  zero_rows<T>(p.dv, begin, p.time_k, p.heads_kv, p.dim_v);
}
template <typename T>
YOCO_DEVICE void zero_query_tail(const AttentionBackwardParams& p) {
  if (p.cu_seqlens_q == nullptr) return;
  zero_rows<T>(p.dq, clamp_index(p.cu_seqlens_q[p.num_sequences], 0, p.time_q), p.time_q, p.heads_q, p.dim_qk);
}

// ---- one row, one key
// dQ of one row by one
// warp: a lane per key for scores, a lane per column for the sum over keys.
template <typename T>
__device__ __noinline__ void query_gradient(const AttentionBackwardParams& p, const BackwardPlan& plan, int sequence,
                                            int head_kv, int row) {
  constexpr int kColumns = 256 / 32;
  const RowMap m = make_row_map(p, sequence, head_kv);
  const int lane = threadIdx.x % 32, dim_qk = int(p.dim_qk), dim_v = int(p.dim_v);
  const T* q = static_cast<const T*>(p.q.data) + m.offset(p.q, row);
  const T* d_out = static_cast<const T*>(p.d_out.data) + m.offset(p.d_out, row);
  const float2 stat = plan.stats[first_stat(p, m) + row];
  float dq[kColumns] = {};
  for (int latents = 0; latents < (p.num_latents > 0 ? 2 : 1); ++latents) {
    const Segment<T> s = make_segment<T>(p, m, latents != 0);
    const int2 keys = row_keys(p, m, row, latents != 0);
    for (int first = keys.x; first < keys.y; first += 32) {
      const int key = first + lane;
      float ds = 0.f;
      if (key < keys.y) {
        float x = dot(q, s.k + key * s.k_stride, dim_qk);
        ds = dot(d_out, s.v + key * s.v_stride, dim_v);
        simt_score_gradient(plan.score, make_row_score(p, m, row, key, latents != 0), stat, x, ds);
      }
      const int count = min(32, keys.y - first);
      for (int j = 0; j < count; ++j) {
        const float w = __shfl_sync(0xffffffffu, ds, j);
        const T* k = s.k + (first + j) * s.k_stride;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (c * 32 + lane < dim_qk) dq[c] = fmaf(w, to_float(k[c * 32 + lane]), dq[c]);
        }
      }
      // NaN in a row's own statistics: everything is NaN, and a diverged model should not wait for it.
      if (stat.x != stat.x) break;
    }
  }
  T* to = static_cast<T*>(p.dq.data) + m.offset(p.dq, row);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (c * 32 + lane < dim_qk) to[c * 32 + lane] = from_float<T>(dq[c] * plan.scale);
  }
}

// dK and dV of one key by one warp: a lane per row for scores, a lane per column for the sum over rows. Rows of the
// sequences sequence, sequence + step, ...; the result goes where gradient_rows of the first one says.
template <typename T>
__device__ __noinline__ void key_gradients(const AttentionBackwardParams& p, const BackwardPlan& plan,
                                           int first_sequence, int step, int head_kv, bool latents, int key) {
  constexpr int kColumns = 256 / 32;
  const int lane = threadIdx.x % 32, dim_qk = int(p.dim_qk), dim_v = int(p.dim_v);
  const bool by_window = !latents && p.mask.prefix_len == nullptr;
  float dk[kColumns] = {}, dv[kColumns] = {};
  bool lost = false;
  for (int sequence = first_sequence; sequence < p.num_sequences && !lost; sequence += step) {
    const RowMap m = make_row_map(p, sequence, head_kv);
    const Segment<T> s = make_segment<T>(p, m, latents);
    const T* k = s.k + key * s.k_stride;
    const T* v = s.v + key * s.v_stride;
    const float2* stats = plan.stats + first_stat(p, m);
    int begin = 0, end = m.rows;
    if (by_window) {
      const KeyRange tokens =
          query_range(p.mask.window_left, p.mask.window_right, key, m.sequence.len_q, m.sequence.len_k);
      begin = int(tokens.begin) * m.group;
      end = int(tokens.end) * m.group;
    }
    for (int first = begin; first < end && !lost; first += 32) {
      const int row = first + lane;
      float weight = 0.f, ds = 0.f;
      bool seen = false;
      if (row < end) seen = sees(row_keys(p, m, row, latents), key);
      if (seen) {
        weight = dot(static_cast<const T*>(p.q.data) + m.offset(p.q, row), k, dim_qk);
        ds = dot(static_cast<const T*>(p.d_out.data) + m.offset(p.d_out, row), v, dim_v);
        simt_score_gradient(plan.score, make_row_score(p, m, row, key, latents), stats[row], weight, ds);
      }
      for (unsigned todo = __ballot_sync(0xffffffffu, seen); todo != 0; todo &= todo - 1) {
        const int j = __ffs(int(todo)) - 1;
        const float w = __shfl_sync(0xffffffffu, weight, j), d = __shfl_sync(0xffffffffu, ds, j);
        const T* q = static_cast<const T*>(p.q.data) + m.offset(p.q, first + j);
        const T* d_out = static_cast<const T*>(p.d_out.data) + m.offset(p.d_out, first + j);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (c * 32 + lane < dim_qk) dk[c] = fmaf(d, to_float(q[c * 32 + lane]), dk[c]);
          if (c * 32 + lane < dim_v) dv[c] = fmaf(w, to_float(d_out[c * 32 + lane]), dv[c]);
        }
      }
      lost = __any_sync(0xffffffffu, seen && stats[min(row, m.rows - 1)].x != stats[min(row, m.rows - 1)].x);
    }
  }
  const RowMap own = make_row_map(p, first_sequence, head_kv);
  const GradientRows to_k = gradient_rows<T>(p, plan, own, latents, false);
  const GradientRows to_v = gradient_rows<T>(p, plan, own, latents, true);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (c * 32 + lane < dim_qk) put_gradient<T>(to_k, key, c * 32 + lane, dk[c] * plan.scale);
    if (c * 32 + lane < dim_v) put_gradient<T>(to_v, key, c * 32 + lane, dv[c]);
  }
}

// ---- results of the tensor-core kernels
// Accumulators of a warp at (key0, col0)
// of a key tile into float32 memory.
template <typename T, int M, int N, typename Skip>
YOCO_DEVICE void put_gradients(const GradientRows& rows, const float (&acc)[M][N][4], int key0, int col0, int first,
                               int num_keys, int dim, Skip skip) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = key0 + m * 16 + h * 8 + lane / 4;
      if (first + key >= num_keys || skip(key)) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int col = col0 + n * 8 + lane % 4 * 2;
        if (col >= dim) continue;
        put_gradient<T>(rows, first + key, col, acc[m][n][h * 2]);
        put_gradient<T>(rows, first + key, col + 1, acc[m][n][h * 2 + 1]);
      }
    }
  }
}

// dQ of the rows of one tile, accumulators of a warp at (row0, col0): scaled, rounded, stored; rows with NaN or
// infinity again, key by key. staging: shared memory for kRows x kDim, free when all threads have arrived here.
template <typename T, int kRows, int kDim, int kThreads, int M, int N>
YOCO_DEVICE void store_dq(const AttentionBackwardParams& p, const BackwardPlan& plan, const RowMap& map, int first_row,
                          uint32_t staging, float (&dq)[M][N][4], int row0, int col0) {
  __shared__ int bad_rows[kRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = min(kRows, map.rows - first_row);
  if (threadIdx.x < kRows) bad_rows[threadIdx.x] = 0;
  __syncthreads();
  bool bad = false;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float check = 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          dq[m][n][h * 2 + c] *= plan.scale;
          check = fmaf(dq[m][n][h * 2 + c], 0.f, check);
        }
      }
      if (check != 0.f) bad_rows[row0 + m * 16 + h * 8 + lane / 4] = 1;
      bad |= check != 0.f;
    }
  }
  put_accumulators<T, kRows>(staging, row0, col0, dq);
  const bool any_bad = __syncthreads_or(bad);
  store_tile<kRows, kDim, kThreads, T>(staging, rows, int(p.dim_qk), plan.aligned_dq, [&](int r) {
    return static_cast<T*>(p.dq.data) + map.offset(p.dq, first_row + r);
  });
  if (!any_bad) return;
  __syncthreads();
  for (int r = warp; r < rows; r += kThreads / 32) {
    if (bad_rows[r] != 0) query_gradient<T>(p, plan, map.sequence_index, map.head_kv, first_row + r);
  }
}

}  // namespace yoco::cuda
