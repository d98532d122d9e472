// One step of decode: kStep tokens of one KV head against all query rows that share it (query heads of the group times
// query tokens, row = token * group + head). Scores, one online-softmax update, P V: the parts that do not depend on
// how the matrix products are done, and the products in vectors of the compute type. decode_amx.h has the tiles.
#pragma once

#include "decode_plan.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

inline Vec<float> exp2(Vec<float> x) {
  const Vec<float> magic = splat(0x1.8p23f);
  const Vec<float> bounded = x < -126.0f ? splat(-126.0f) : x;
  const Vec<float> shifted = bounded + magic;
  const Vec<float> f = bounded - (shifted - magic);
  Vec<float> y = splat(1.5469732e-4f);
  y = y * f + 1.34004322e-3f;
  y = y * f + 9.6180256e-3f;
  y = y * f + 5.55032721e-2f;
  y = y * f + 2.40226512e-1f;
  y = y * f + 6.93147207e-1f;
  y = y * f + 1.0f;
  y *= bit_cast<Vec<float>>((bit_cast<VecI>(shifted) + 127) << 23);
  return x < -126.0f ? splat(0.0f) : y;  // what is masked weighs exactly nothing
}

inline Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

template <class C>
Vec<C> tanh(Vec<C> x) {
  if constexpr (std::is_same_v<C, double>) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
    return x;
  } else {
    const Vec<C> x2 = x * x;  // near zero the formula below would cancel
    const Vec<C> small =
        x * (1 + x2 * (-0.333333333f + x2 * (0.133333333f + x2 * (-0.0539682540f + x2 * 0.0218694885f))));
    return x2 < 0.0625f ? small : 1 - 2 / (1 + exp(2 * x));
  }
}

// How a score becomes a logit in base 2, for one KV head.
template <class C>
struct Logits {
  C factor;         // scale * k_scale * log2(e); with softcap: scale * k_scale / softcap
  C softcap;        // softcap * log2(e), or 0
  const C* slopes;  // [group]: alibi slope * log2(e) of each query head, or null
};

// Running softmax of one row.
template <class C>
struct RowState {
  C max, sum;  // base 2; sum relative to max
};

// Turns the scores of entries [begin, end) into weights (all others into 0), updates the running softmax, and returns
// by what the row's accumulator has to be multiplied. `distance`: position of the row minus position of entry 0.
template <class C>
C softmax_row(C* scores, int64_t begin, int64_t end, const Logits<C>& logits, C slope, int64_t distance,
              RowState<C>* state) {
  constexpr C kInfinity = static_cast<C>(INFINITY);
  using Index = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  Indices lane;
  for (int i = 0; i < kLanes<C>; ++i) lane[i] = i;
  const bool all = begin <= 0 && end >= kStep;
  const bool plain = logits.softcap == 0 && slope == 0;
  Vec<C> top = splat(-kInfinity);
  for (int64_t i = 0; i < kStep; i += kLanes<C>) {
    Vec<C> x = load<C>(scores + i) * logits.factor;
    const Indices index = lane + static_cast<Index>(i);
    if (!plain) {
      if (logits.softcap != 0) x = tanh<C>(x) * logits.softcap;
      if (slope != 0) {
        const Indices gap = index - static_cast<Index>(distance);
        x -= slope * __builtin_convertvector(gap < 0 ? -gap : gap, Vec<C>);
      }
    }
    if (!all) x = (index >= static_cast<Index>(begin)) & (index < static_cast<Index>(end)) ? x : splat(-kInfinity);
    store<C>(scores + i, x);
    top = top > x ? top : x;
  }
  C max = state->max;
  for (int i = 0; i < kLanes<C>; ++i) max = max > top[i] ? max : top[i];
  const C base = max == -kInfinity ? C{0} : max;  // nothing but -inf so far: -inf - -inf is not a number
  Vec<C> sum{};
  for (int64_t i = 0; i < kStep; i += kLanes<C>) {
    const Vec<C> weight = exp2(load<C>(scores + i) - base);
    store<C>(scores + i, weight);
    sum += weight;
  }
  const C decay = state->max == max ? C{1} : static_cast<C>(std::exp2(state->max - base));
  state->max = max;
  state->sum = state->sum * decay + sum_lanes<C>(sum);
  return decay;
}

// ---- products in vectors ---------------------------------------------------------------------------

// out[0..3] = the sums of four vectors.
template <class C>
YOCO_INLINE void sum_four(Vec<C> a, Vec<C> b, Vec<C> c, Vec<C> d, C* out) {
  if constexpr (std::is_same_v<C, float>) {
    VecI even, odd, low, high;
    for (int i = 0; i < kLanes<float>; ++i) {
      const int quad = i / 4 * 4, other = kLanes<float>;
      even[i] = quad + (i & 2) + ((i & 1) ? other : 0);
      odd[i] = even[i] + 1;
      low[i] = quad + (i & 1) + ((i & 2) ? other : 0);
      high[i] = low[i] + 2;
    }
    const Vec<C> ab = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    const Vec<C> cd = __builtin_shuffle(c, d, even) + __builtin_shuffle(c, d, odd);
    const Vec<C> quads = __builtin_shuffle(ab, cd, low) + __builtin_shuffle(ab, cd, high);
#if YOCO_HAS_AVX512
    const __m512 z = bit_cast<__m512>(quads);
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
#elif YOCO_HAS_AVX2
    const __m256 y = bit_cast<__m256>(quads);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
#else
    store<C>(out, quads);
#endif
  } else {
    out[0] = sum_lanes<C>(a), out[1] = sum_lanes<C>(b), out[2] = sum_lanes<C>(c), out[3] = sum_lanes<C>(d);
  }
}

// Scores of `kRows` query rows (stride `q_stride`, padded with zeros) against entries [first, last) in fours; entries
// outside hold a row of zeros.
template <int kRows, class C, class Cache>
void score_rows(const char* const* k, int first, int last, const C* q, int64_t q_stride, int64_t dim, C* scores) {
  for (int j = first / 4 * 4; j < last; j += 4) {
    Vec<C> sums[kRows][4] = {};
    const Cache* rows[4];
    for (int t = 0; t < 4; ++t) rows[t] = reinterpret_cast<const Cache*>(k[j + t]);
    for_each_vector<C>(dim, [&](auto io) {
      Vec<C> key[4];
      for (int t = 0; t < 4; ++t) key[t] = io.load(rows[t]);
      for (int r = 0; r < kRows; ++r) {
        const Vec<C> query = load<C>(q + r * q_stride + io.i);
        for (int t = 0; t < 4; ++t) sums[r][t] += query * key[t];
      }
    });
    for (int r = 0; r < kRows; ++r) {
      sum_four<C>(sums[r][0], sums[r][1], sums[r][2], sums[r][3], scores + r * kStep + j);
    }
  }
}

// acc[r] += sum over entries [first, last) of p[r][j] * v[j], for kRows rows and kVectors vectors of v.
template <int kRows, int kVectors, class C, class Cache, class Io>
YOCO_INLINE void weigh_block(const char* const* v, int64_t first, int64_t last, const C* p, C* acc, int64_t acc_stride,
                             Io io) {
  Vec<C> sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int u = 0; u < kVectors; ++u) sums[r][u] = load<C>(acc + r * acc_stride + io.i + u * kLanes<C>);
  }
  for (int64_t j = first; j < last; ++j) {
    const Cache* row = reinterpret_cast<const Cache*>(v[j]);
    Vec<C> value[kVectors];
    for (int u = 0; u < kVectors; ++u) value[u] = io.load(row + u * kLanes<C>);
    for (int r = 0; r < kRows; ++r) {
      for (int u = 0; u < kVectors; ++u) sums[r][u] += p[r * kStep + j] * value[u];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int u = 0; u < kVectors; ++u) store<C>(acc + r * acc_stride + io.i + u * kLanes<C>, sums[r][u]);
  }
}

template <int kRows, class C, class Cache>
void weigh_rows(const char* const* v, int64_t first, int64_t last, const C* p, C* acc, int64_t acc_stride,
                int64_t dim) {
  int64_t i = 0;
  for (; i + 4 * kLanes<C> <= dim; i += 4 * kLanes<C>) {
    weigh_block<kRows, 4, C, Cache>(v, first, last, p, acc, acc_stride, FullVector<C>{i});
  }
  for (; i + kLanes<C> <= dim; i += kLanes<C>) {
    weigh_block<kRows, 1, C, Cache>(v, first, last, p, acc, acc_stride, FullVector<C>{i});
  }
  if (i < dim) weigh_block<kRows, 1, C, Cache>(v, first, last, p, acc, acc_stride, PartVector<C>{i, dim - i});
}

// Calls f(constant, row) for blocks of at most kBlock rows.
template <int kBlock, class F>
YOCO_INLINE void for_row_blocks(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) f(std::integral_constant<int, kBlock>{}, r);
  if constexpr (kBlock > 2) {
    if (rows - r == 3) return f(std::integral_constant<int, 3>{}, r);
  }
  if constexpr (kBlock > 2) {
    if (rows - r == 2) return f(std::integral_constant<int, 2>{}, r);
  }
  if (rows - r == 1) f(std::integral_constant<int, 1>{}, r);
}

constexpr int kRowBlock = YOCO_HAS_AVX512 ? 4 : 2;  // rows whose accumulators fit into the registers

template <class C, class Cache>
void score_all(const char* const* k, int first, int last, const C* q, int64_t q_stride, int64_t rows, int64_t dim,
               C* scores) {
  for_row_blocks<kRowBlock>(rows, [&](auto count, int64_t r) {
    score_rows<decltype(count)::value, C, Cache>(k, first, last, q + r * q_stride, q_stride, dim, scores + r * kStep);
  });
}

template <class C, class Cache>
void weigh_all(const char* const* v, int64_t first, int64_t last, const C* p, int64_t rows, C* acc, int64_t acc_stride,
               int64_t dim) {
  for_row_blocks<kRowBlock>(rows, [&](auto count, int64_t r) {
    weigh_rows<decltype(count)::value, C, Cache>(v, first, last, p + r * kStep, acc + r * acc_stride, acc_stride, dim);
  });
}

// Products in the compute type, for every dtype and instruction set.
template <class C, class Cache>
class VectorProducts {
 public:
  VectorProducts(int64_t rows, int64_t dim_k, int64_t dim_v) : rows_(rows), dim_k_(dim_k), dim_v_(dim_v) {}

  static int64_t padded(int64_t dim) { return (dim + kLanes<C> - 1) / kLanes<C> * kLanes<C>; }
  int64_t q_bytes() const { return rows_ * padded(dim_k_) * sizeof(C); }  // of one head
  int64_t padded_rows() const { return rows_; }
  int64_t scratch_bytes() const { return 0; }
  void set_scratch(char*) {}
  void begin() {}
  void end() {}

  // Row r of one head's queries.
  template <class Q>
  void pack_q(char* packed, int64_t r, const Q* q) const {
    C* out = reinterpret_cast<C*>(packed) + r * padded(dim_k_);
    for_each_vector<C>(dim_k_, [&](auto io) { store<C>(out + io.i, io.load(q)); });
  }

  void score(const char* packed_q, const char* const* k, int first, int last, C* scores) {
    score_all<C, Cache>(k, first, last, reinterpret_cast<const C*>(packed_q), padded(dim_k_), rows_, dim_k_, scores);
  }

  void weigh(const C* p, const char* const* v, int first, int last, C* acc, int64_t acc_stride) {
    weigh_all<C, Cache>(v, first, last, p, rows_, acc, acc_stride, dim_v_);
  }

 private:
  int64_t rows_, dim_k_, dim_v_;
};

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
