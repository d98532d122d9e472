// The work inside one tile of the attention backward: buffers, and the step from scores to P^T and dS^T.
#pragma once

#include "attention_tile.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// Key blocks that a block of rows takes one after the other, with their gradients: they stay in L2.
constexpr int64_t kGroupBytes = int64_t{1} << (YOCO_HAS_AMX ? 20 : 18);
constexpr int64_t kKeyStep = 32;  // key counts of a tile: what every product takes as rows and as depth
// lse of a row that sees nothing: any score minus this is far below the smallest exponent.
template <class C>
constexpr C kUnseen = static_cast<C>(1e30);

// Which keys the rows of a block see; low and high bound their union, all_low and all_high their intersection.
struct RowIntervals {
  int32_t begin[kRows], end[kRows];
  int64_t low = INT64_MAX, high = 0, all_low = 0, all_high = INT64_MAX;

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

// The rows of a tile.
struct RowBlock {
  const Sequence& sequence;
  const Rows rows;
  const RowIntervals seen;

  RowBlock(const AttentionParams& p, const Sequence& s, const Rows& r, int64_t group, bool latent)
      : sequence(s), rows(r), seen(p, s, r, group, latent) {}
};

template <class T>
struct BackwardLayout {
  using Op = SplitOperand<T>;
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
  int64_t row_elements() const { return kRows * (depth_qk + depth_v + cols_qk + cols_v); }
  int64_t key_elements() const { return kKeys * (depth_qk + depth_v + cols_qk); }
  int64_t key_bytes() const { return key_elements() * sizeof(Op) + accumulator_elements() * sizeof(C); }
  int64_t group() const { return std::max<int64_t>(1, kGroupBytes / key_bytes()); }  // in key blocks
  size_t bytes() const {
    const int64_t ops = row_elements() + 3 * kKeys * kRows, wide = (softcap ? 3 : 2) * kKeys * kRows;
    return group() * key_bytes() + ops * sizeof(Op) + wide * sizeof(C) + kRows * (dim_qk + dim_v) * sizeof(T) + 16 * 64;
  }

  const int64_t dim_qk, dim_v, depth_qk, depth_v, cols_qk, cols_v;
  const bool transform, softcap;
};

// The scratch of one task, carved up.
template <class T>
struct BackwardBuffers {
  using Op = SplitOperand<T>;
  using C = Accumulator<Op>;

  struct Keys {        // of one block
    Op *k, *v;         // A [kKeys, depth]
    Op* k_transposed;  // A = K^T [cols_qk, kKeys]
    C *dk, *dv;        // [kKeys, cols]
  };

  BackwardBuffers(const BackwardLayout<T>& l, char* memory) : layout(l), next_(memory) {
    keys_ = take<Op>(l.group() * l.key_elements());
    accumulators_ = take<C>(l.group() * l.accumulator_elements());
    q_columns = take<Op>(kRows * l.depth_qk);
    d_out_columns = take<Op>(kRows * l.depth_v);
    q_rows = take<Op>(kRows * l.cols_qk);
    d_out_rows = take<Op>(kRows * l.cols_v);
    p = take<Op>(kKeys * kRows);
    ds = take<Op>(kKeys * kRows);
    if (kPair<Op> == 2) ds_pairs = take<Op>(kKeys * kRows);
    scores = take<C>(kKeys * kRows);
    d_scores = take<C>(kKeys * kRows);
    derivative = l.softcap ? take<C>(kKeys * kRows) : nullptr;
    gather = take<T>(kRows * (l.dim_qk + l.dim_v));
  }

  // Block i of the group.
  Keys keys(int64_t i) const {
    Keys keys;
    keys.k = keys_ + i * layout.key_elements();
    keys.v = keys.k + kKeys * layout.depth_qk;
    keys.k_transposed = keys.v + kKeys * layout.depth_v;
    keys.dk = accumulators_ + i * layout.accumulator_elements();
    keys.dv = keys.dk + kKeys * layout.cols_qk;
    return keys;
  }
  const Op* ds_packed() const { return kPair<Op> == 2 ? ds_pairs : ds; }

  const BackwardLayout<T>& layout;
  Op* q_columns;                      // B = Q^T    [depth_qk, kRows]
  Op* d_out_columns;                  // B = dO^T   [depth_v, kRows]
  Op* q_rows;                         // B = Q      [kRows, cols_qk]
  Op* d_out_rows;                     // B = dO     [kRows, cols_v]
  Op *p, *ds;                         // A = P^T, dS^T [kKeys, kRows]
  Op* ds_pairs = nullptr;             // B = dS^T where operands are packed in pairs
  C *scores, *d_scores, *derivative;  // [kKeys, kRows]
  T* gather;

 private:
  template <class E>
  E* take(int64_t n) {
    E* here = reinterpret_cast<E*>(next_);
    next_ += round_up(n * static_cast<int64_t>(sizeof(E)), 64);
    return here;
  }
  char* next_;
  Op* keys_;
  C* accumulators_;
};

// A [dim, lda]: dst[d][j] = src[j][d], zero for keys in [n, kKeys).
template <class Op, class T>
void pack_a_transposed(const T* src, int64_t stride, int64_t n, int64_t dim, Op* dst, int64_t lda) {
  for (int64_t j0 = 0; j0 < kKeys; j0 += 32) {
    if constexpr (kIsSplit<Op>) {
      split_transposed(src + j0 * stride, stride, n - j0, dim, dst + j0, lda);
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        for (int64_t j = j0; j < j0 + 32; ++j) dst[d * lda + j] = j < n ? to_operand<Op>(src[j * stride + d]) : Op{};
      }
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
                        Accumulator<SplitOperand<T>> factor, const Accumulator<SplitOperand<T>>* lse,
                        const Accumulator<SplitOperand<T>>* delta) {
  using Op = SplitOperand<T>;
  using C = Accumulator<Op>;
  C begin[kRows], end[kRows];  // visible keys of each row, relative to k0
  if constexpr (kMasked) {
    for (int64_t r = 0; r < kRows; ++r) {
      begin[r] = static_cast<C>(std::clamp<int64_t>(seen->begin[r] - k0, 0, keys));
      end[r] = static_cast<C>(std::clamp<int64_t>(seen->end[r] - k0, 0, keys));
    }
  }
  const Vec<C> scale = splat(factor);
  const auto entries = [&](int64_t j, int64_t r, Vec<C>& p, Vec<C>& ds) __attribute__((always_inline)) {
    const int64_t e = j * kRows + r;
    p = exp2_nonpositive(load<C>(b.scores + e) * scale - load<C>(lse + r));
    ds = p * (load<C>(b.d_scores + e) - load<C>(delta + r));
    if (b.derivative != nullptr) ds *= load<C>(b.derivative + e);
    if constexpr (kMasked) {
      const Vec<C> key = splat(static_cast<C>(j));
      const auto visible = (load<C>(begin + r) <= key) & (load<C>(end + r) > key);
      p = visible ? p : Vec<C>{};
      ds = visible ? ds : Vec<C>{};
    }
  };
  // Two keys, and as many rows as make one row of a tile.
  constexpr int kVectors = kIsSplit<Op> ? 2 : 1;
  for (int64_t j = 0; j < keys; j += 2) {
    for (int64_t r = 0; r < kRows; r += kVectors * kLanes<C>) {
      Vec<C> p[2][kVectors], ds[2][kVectors];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) entries(j + i, r + v * kLanes<C>, p[i][v], ds[i][v]);
      }
      if constexpr (kIsSplit<Op>) {
        for (int i = 0; i < 2; ++i) split_vectors(p[i], b.p + (j + i) * kRows + r);
        split_vector_pairs(ds, b.ds + j * kRows + r, kRows, b.ds_pairs + j * kRows + 2 * r);
        continue;
      }
#if YOCO_HAS_BF16_DOT
      if constexpr (std::is_same_v<Op, BFloat16>) {
        const auto halves = [](Vec<C> low, Vec<C> high) {
          return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
        };
        const __m512i p2 = halves(p[0][0], p[1][0]), ds2 = halves(ds[0][0], ds[1][0]);
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
      if constexpr (!kIsSplit<Op>) {
        for (int i = 0; i < 2; ++i) {
          store<C>(b.p + (j + i) * kRows + r, p[i][0]);
          store<C>(b.ds + (j + i) * kRows + r, ds[i][0]);
        }
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
