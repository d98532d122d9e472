// The work inside one tile of the attention backward: buffers, and the step from scores to P^T and dS^T.
#pragma once

#include "attention_tile.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

constexpr int64_t kKeyStep = 32;  // key counts of a tile: what every product takes as rows and as depth
// lse of a row that sees nothing: any score minus this is far below the smallest exponent.
template <class C>
constexpr C kUnseen = static_cast<C>(1e30);

// Which keys the rows of a block see; low and high bound their union, all_low and all_high their intersection.
struct RowIntervals {
  int32_t begin[kRows], end[kRows];
  int64_t low = INT64_MAX, high = 0, all_low = 0, all_high = INT64_MAX;
  bool finite = true;  // q and d_out of these rows

  RowIntervals() = default;
  RowIntervals(const AttentionParams& p, const Sequence& s, const Rows& rows, int64_t group, bool latent) {
    const Intervals seen(p, s, rows, group, latent);
    low = seen.low, high = seen.high;
    for (int64_t r = 0; r < kRows; ++r) {
      begin[r] = r < rows.count ? seen.begin[r] : 0;
      end[r] = r < rows.count ? seen.end[r] : 0;
      if (r >= rows.count) continue;  // rows that do not exist have zero q and d_out: they add nothing
      all_low = std::max<int64_t>(all_low, begin[r]);
      all_high = std::min<int64_t>(all_high, end[r]);
    }
  }
};

template <class T>
struct BackwardLayout {
  using Op = MatrixOperand<T>;
  using C = Accumulator<Op>;

  explicit BackwardLayout(const AttentionParams& p)
      : dim_qk(p.dim_qk),
        dim_v(p.dim_v),
        depth_qk(padded_depth<Op>(p.dim_qk)),
        depth_v(padded_depth<Op>(p.dim_v)),
        cols_qk(padded_cols(p.dim_qk)),
        cols_v(padded_cols(p.dim_v)),
        transform(p.softcap > 0 || p.alibi_slopes != nullptr),
        softcap(p.softcap > 0) {}

  int64_t dq_elements() const { return cols_qk * kRows; }
  int64_t accumulator_elements() const { return kKeys * (cols_qk + cols_v); }
  int64_t row_block_elements() const { return kRows * (depth_qk + depth_v + cols_qk + cols_v); }
  size_t bytes(int64_t row_blocks, int64_t accumulators) const {
    const int64_t ops = row_blocks * row_block_elements() + kKeys * (depth_qk + depth_v + cols_qk) + 3 * kKeys * kRows;
    const int64_t wide = (softcap ? 3 : 2) * kKeys * kRows + accumulators * accumulator_elements();
    return row_blocks * sizeof(RowIntervals) + ops * sizeof(Op) + wide * sizeof(C) +
           kRows * (dim_qk + dim_v) * sizeof(T) + 16 * 64;
  }

  const int64_t dim_qk, dim_v, depth_qk, depth_v, cols_qk, cols_v;
  const bool transform, softcap;
};

// The scratch of one task, carved up.
template <class T>
struct BackwardBuffers {
  using Op = MatrixOperand<T>;
  using C = Accumulator<Op>;

  struct PackedRows {
    Op* q_columns;      // B = Q^T    [depth_qk, kRows]
    Op* d_out_columns;  // B = dO^T   [depth_v, kRows]
    Op* q_rows;         // B = Q      [kRows, cols_qk]
    Op* d_out_rows;     // B = dO     [kRows, cols_v]
  };

  BackwardBuffers(const BackwardLayout<T>& l, char* memory, int64_t row_blocks) : layout(l), next_(memory) {
    seen = take<RowIntervals>(row_blocks);
    packed_rows_ = take<Op>(row_blocks * l.row_block_elements());
    k = take<Op>(kKeys * l.depth_qk);
    v = take<Op>(kKeys * l.depth_v);
    k_transposed = take<Op>(kKeys * l.cols_qk);
    p = take<Op>(kKeys * kRows);
    ds = take<Op>(kKeys * kRows);
    if (kPair<Op> == 2) ds_pairs = take<Op>(kKeys * kRows);
    scores = take<C>(kKeys * kRows);
    d_scores = take<C>(kKeys * kRows);
    derivative = l.softcap ? take<C>(kKeys * kRows) : nullptr;
    gather = take<T>(kRows * (l.dim_qk + l.dim_v));
    accumulators_ = take<C>(0);
  }

  PackedRows rows(int64_t slot) const {
    PackedRows r;
    r.q_columns = packed_rows_ + slot * layout.row_block_elements();
    r.d_out_columns = r.q_columns + layout.depth_qk * kRows;
    r.q_rows = r.d_out_columns + layout.depth_v * kRows;
    r.d_out_rows = r.q_rows + kRows * layout.cols_qk;
    return r;
  }
  // dK [kKeys, cols_qk], then dV [kKeys, cols_v].
  C* accumulator(int64_t i) const { return accumulators_ + i * layout.accumulator_elements(); }
  const Op* ds_packed() const { return kPair<Op> == 2 ? ds_pairs : ds; }

  const BackwardLayout<T>& layout;
  RowIntervals* seen;
  Op *k, *v;                          // A [kKeys, depth]
  Op* k_transposed;                   // A = K^T [cols_qk, kKeys]
  Op *p, *ds;                         // A = P^T, dS^T [kKeys, kRows]
  Op* ds_pairs = nullptr;             // B = dS^T where operands are packed in pairs
  C *scores, *d_scores, *derivative;  // [kKeys, kRows]
  T* gather;
  bool keys_finite = true;

 private:
  template <class E>
  E* take(int64_t n) {
    E* here = reinterpret_cast<E*>(next_);
    next_ += round_up(n * static_cast<int64_t>(sizeof(E)), 64);
    return here;
  }
  char* next_;
  Op* packed_rows_;
  C* accumulators_;
};

// dst[d][j] = src[j][d].
template <class Op>
void pack_a_transposed(const Op* src, int64_t stride, int64_t keys, int64_t dim, Op* dst, int64_t lda) {
  for (int64_t j0 = 0; j0 < keys; j0 += 32) {
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t j = j0; j < j0 + 32; ++j) dst[d * lda + j] = src[j * stride + d];
    }
  }
}

// by_row[r][d] = by_dim[d][r] for 16 dims and kRows rows.
template <class C>
void transpose_16(const C* by_dim, C* by_row) {
#if YOCO_HAS_AVX512
  if constexpr (sizeof(C) == 4) {
    for (int64_t r = 0; r < kRows; r += 16) {
      transpose_words(reinterpret_cast<const uint32_t*>(by_dim) + r, kRows, 16,
                      reinterpret_cast<uint32_t*>(by_row) + r * 16, 16);
    }
    return;
  }
#endif
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t d = 0; d < 16; ++d) by_row[r * 16 + d] = by_dim[d * kRows + r];
  }
}

// transform_scores for transposed tiles [keys, kRows]; also the derivative of the softcap.
template <class C>
void transform_transposed(const AttentionParams& p, const Sequence& s, const Rows& rows, int64_t group, bool latent,
                          int64_t k0, int64_t keys, C* scores, C* derivative) {
  if (p.softcap > 0) {
    const C in = static_cast<C>(p.scale / p.softcap), out = static_cast<C>(p.softcap * kLog2E);
    for (int64_t e = 0; e < keys * kRows; ++e) {
      const C t = std::tanh(scores[e] * in);
      scores[e] = t * out;
      derivative[e] = 1 - t * t;
    }
  } else {
    for (int64_t e = 0; e < keys * kRows; ++e) scores[e] *= static_cast<C>(p.scale * kLog2E);
  }
  if (latent || p.alibi_slopes == nullptr) return;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t i = (rows.first + r) / group, head = rows.kv_head * group + (rows.first + r) % group;
    const C slope = static_cast<C>(p.alibi_slopes[rows.sequence * p.alibi_batch_stride + head] * kLog2E);
    const int64_t diagonal = i + s.len_k - s.len_q - k0;
    for (int64_t j = 0; j < keys; ++j) scores[j * kRows + r] -= slope * static_cast<C>(std::abs(diagonal - j));
  }
}

#if YOCO_HAS_BF16_DOT
// Two rows of 16 words each -> pairs (row 0, row 1) of the same column.
YOCO_INLINE __m512i interleave_halves(__m512i rows) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), rows);
}
#endif

// scores, d_scores -> p = exp2(scores * factor - lse), ds = p * (d_scores - delta) (* derivative); masked entries are
// exactly zero in both. seen: null when every row sees every key of the tile.
template <bool kMasked, class T>
void differentiate_tile(const BackwardBuffers<T>& b, const RowIntervals* seen, int64_t k0, int64_t keys,
                        Accumulator<MatrixOperand<T>> factor, const Accumulator<MatrixOperand<T>>* lse,
                        const Accumulator<MatrixOperand<T>>* delta) {
  using Op = MatrixOperand<T>;
  using C = Accumulator<Op>;
  C begin[kRows], end[kRows];  // visible keys of each row, relative to k0
  if constexpr (kMasked) {
    for (int64_t r = 0; r < kRows; ++r) {
      begin[r] = static_cast<C>(std::clamp<int64_t>(seen->begin[r] - k0, 0, keys));
      end[r] = static_cast<C>(std::clamp<int64_t>(seen->end[r] - k0, 0, keys));
    }
  }
  const Vec<C> scale = splat(factor);
  for (int64_t j = 0; j < keys; j += 2) {
    for (int64_t r = 0; r < kRows; r += kLanes<C>) {
      Vec<C> p[2], ds[2];
      const Vec<C> row_lse = load<C>(lse + r), row_delta = load<C>(delta + r);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64_t e = (j + i) * kRows + r;
        p[i] = exp2_nonpositive(load<C>(b.scores + e) * scale - row_lse);
        ds[i] = p[i] * (load<C>(b.d_scores + e) - row_delta);
        if (b.derivative != nullptr) ds[i] *= load<C>(b.derivative + e);
        if constexpr (kMasked) {
          const Vec<C> key = splat(static_cast<C>(j + i));
          const auto visible = (load<C>(begin + r) <= key) & (load<C>(end + r) > key);
          p[i] = visible ? p[i] : Vec<C>{};
          ds[i] = visible ? ds[i] : Vec<C>{};
        }
      }
#if YOCO_HAS_BF16_DOT
      if constexpr (std::is_same_v<Op, BFloat16>) {
        const auto halves = [](Vec<C> low, Vec<C> high) {
          return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
        };
        const __m512i p2 = halves(p[0], p[1]), ds2 = halves(ds[0], ds[1]);
        const auto store_halves = [&](Op* to, __m512i both) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j * kRows + r), _mm512_castsi512_si256(both));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (j + 1) * kRows + r), _mm512_extracti64x4_epi64(both, 1));
        };
        store_halves(b.p, p2);
        store_halves(b.ds, ds2);
        _mm512_storeu_si512(b.ds_pairs + j * kRows + 2 * r, interleave_halves(ds2));
        continue;
      }
#endif
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        store<C>(b.p + (j + i) * kRows + r, p[i]);
        store<C>(b.ds + (j + i) * kRows + r, ds[i]);
      }
    }
  }
}

template <class T, class C>
void differentiate(const BackwardBuffers<T>& b, const BackwardLayout<T>&, const RowIntervals* seen, int64_t k0,
                   int64_t keys, C factor, const C* lse, const C* delta) {
  if (seen != nullptr) {
    differentiate_tile<true, T>(b, seen, k0, keys, factor, lse, delta);
  } else {
    differentiate_tile<false, T>(b, seen, k0, keys, factor, lse, delta);
  }
}

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
