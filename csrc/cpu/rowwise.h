// What row-wise kernels share: sums over a row, optional weights, blocks of rows whose sums do not depend on the number
// of threads, heads of tokens.
#pragma once

#include "row.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// Elements that are worth waking a thread for.
constexpr int64_t kGrainElements = 16384;

inline int64_t grain_rows(int64_t dim) { return 1 + kGrainElements / (dim + 1); }

// Sum over a row of term(io): four independent accumulators, so that the additions overlap.
template <class C, class Term>
YOCO_INLINE C row_sum(int64_t dim, const Term& term) {
  Vec<C> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<C> <= dim; i += 4 * kLanes<C>) {
    for (int u = 0; u < 4; ++u) sums[u] += term(FullVector<C>{i + u * kLanes<C>});
  }
  for (; i + kLanes<C> <= dim; i += kLanes<C>) sums[0] += term(FullVector<C>{i});
  if (i < dim) sums[1] += term(PartVector<C>{i, dim - i});
  return sum_lanes<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// 1 / sqrt(mean(o^2) + eps)
template <class C, class T>
YOCO_INLINE C head_rstd(const T* o, int64_t dim, double eps) {
  const C squares = row_sum<C>(dim, [&](auto io) {
    const Vec<C> v = io.load(o);
    return v * v;
  });
  return C{1} / std::sqrt(squares / static_cast<C>(dim) + static_cast<C>(eps));
}

// The end of a gated retention layer, for one head of one token: y = o / sqrt(mean(o^2) + eps) * silu(gate).
template <class C, class O, class T>
YOCO_INLINE void norm_and_gate(const O* o, const T* gate, T* y, int64_t dim, double eps) {
  const C rstd = head_rstd<C>(o, dim, eps);
  for_each_vector<C>(dim, [&](auto io) {
    const Vec<C> g = io.load(gate);
    io.store(y, io.load(o) * rstd * (g * sigmoid(g)));
  });
}

// f(row, i) for rows that are absent or in one of two dtypes, without a branch per element.
template <class C>
struct NoWeight {
  template <class Io>
  YOCO_INLINE Vec<C> operator()(Io) const {
    return splat(C{1});
  }
  YOCO_INLINE NoWeight at(int64_t) const { return {}; }
};

template <class C, class T>
struct Weight {
  const T* data;
  template <class Io>
  YOCO_INLINE Vec<C> operator()(Io io) const {
    return io.load(data);
  }
  YOCO_INLINE Weight at(int64_t offset) const { return {data + offset}; }
};

template <class T, class F>
const char* with_weight(const void* weight, DType weight_dtype, DType dtype, const F& f) {
  using C = Compute<T>;
  if (weight == nullptr) return f(NoWeight<C>{});
  if (weight_dtype == dtype) return f(Weight<C, T>{static_cast<const T*>(weight)});
  if (weight_dtype == DType::kFloat32) return f(Weight<C, float>{static_cast<const float*>(weight)});
  return "weight must have the dtype of x or float32";
}

// d_weight sums over rows: blocks of rows whose size follows from the shape alone are summed in order, so the result
// does not depend on the number of threads.
struct RowBlocks {
  int64_t rows_per_block, count;
  explicit RowBlocks(int64_t rows) : rows_per_block(rows < 64 * 64 ? 64 : (rows + 63) / 64) {
    count = (rows + rows_per_block - 1) / rows_per_block;
  }
};

// out[i] = sum over blocks of parts[block][i], in order.
template <class C>
void sum_blocks(const Launch& launch, int64_t blocks, int64_t dim, const C* parts, C* out) {
  parallel(launch, dim, 1 + kGrainElements / (blocks + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const C* part = parts + block * dim;
      for (int64_t i = begin; i < end; ++i) out[i] += part[i];
    }
  });
}

template <class T>
T* head_row(const View& view, int64_t b, int64_t t, int64_t h) {
  return static_cast<T*>(view.data) + b * view.batch_stride + t * view.time_stride + h * view.head_stride;
}

// body(b, t, h) over all heads of all tokens.
template <class Params, class Body>
void parallel_heads(const Params& p, const Launch& launch, const Body& body) {
  parallel(launch, p.batch * p.time, grain_rows(p.heads * p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t h = 0; h < p.heads; ++h) body(token / p.time, token % p.time, h);
    }
  });
}

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
