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
  const C top_lane = max_lanes<C>(top);
  const C max = state->max > top_lane ? state->max : top_lane;
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

// ---- prefetch

constexpr int kToL2 = 2;  // locality of __builtin_prefetch

// Lines to fetch between the instructions of one product: `per_drop` at a time.
struct Drip {
  const char* line;
  int64_t per_drop;

  YOCO_INLINE void drop() {
    for (int64_t i = 0; i < per_drop; ++i, line += 64) __builtin_prefetch(line, 0, kToL2);
  }
};

// Fetches rows before they are needed. Line by line between arithmetic: a burst would fill the line buffers, and loads
// that hit the cache would wait behind it.
class Prefetcher {
 public:
  struct Run {
    const char* begin;
    int64_t lines;
  };
  static int64_t most_runs(int64_t heads) { return 3 * kStep * heads; }

  void set_storage(Run* runs) { runs_ = runs; }
  void clear() { count_ = index_ = line_ = quota_ = 0; }

  void add(const char* begin, int64_t bytes) {
    const char* first = begin - reinterpret_cast<uintptr_t>(begin) % 64;
    const int64_t lines = (begin + bytes - first + 63) / 64;
    if (count_ > 0 && runs_[count_ - 1].begin + 64 * runs_[count_ - 1].lines == first) {
      runs_[count_ - 1].lines += lines;
    } else {
      runs_[count_++] = Run{first, lines};
    }
  }

  int64_t lines() const {
    int64_t n = 0;
    for (int64_t i = 0; i < count_; ++i) n += runs_[i].lines;
    return n;
  }

  // Passes over lines that were fetched before.
  void skip(int64_t lines) {
    while (lines > 0 && index_ < count_) {
      const int64_t n = lines < runs_[index_].lines - line_ ? lines : runs_[index_].lines - line_;
      lines -= n, line_ += n;
      if (line_ == runs_[index_].lines) ++index_, line_ = 0;
    }
  }

  // How much one pull() fetches.
  void set_quota(int64_t lines) { quota_ = lines; }

  YOCO_INLINE void pull() {
    int64_t left = quota_;
    while (left > 0 && index_ < count_) {
      const Run run = runs_[index_];
      const int64_t n = left < run.lines - line_ ? left : run.lines - line_;
      const char* line = run.begin + 64 * line_;
      for (int64_t i = 0; i < n; ++i) __builtin_prefetch(line + 64 * i, 0, kToL2);
      left -= n, line_ += n;
      if (line_ == run.lines) ++index_, line_ = 0;
    }
  }

  // The lines of one pull, to be fetched in `drops` drops.
  YOCO_INLINE Drip take(int64_t drops) {
    if (index_ >= count_ || runs_[index_].lines - line_ < quota_) {  // not in one piece
      pull();
      return Drip{nullptr, 0};
    }
    const Drip drip{runs_[index_].begin + 64 * line_, (quota_ + drops - 1) / drops};
    line_ += quota_;
    if (line_ == runs_[index_].lines) ++index_, line_ = 0;
    return drip;
  }

 private:
  Run* runs_ = nullptr;
  int64_t count_ = 0, index_ = 0, line_ = 0, quota_ = 0;
};

// ---- products in vectors

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

// Scores of `kRows` query rows (stride `q_stride`, padded with zeros) against `count` tokens, a multiple of four.
template <int kRows, class C, class Cache>
void score_rows(const char* const* k, int count, const C* q, int64_t q_stride, int64_t dim, C* scores, Drip drip) {
  for (int j = 0; j < count; j += 4) {
    Vec<C> sums[kRows][4] = {};
    const Cache* rows[4];
    for (int t = 0; t < 4; ++t) rows[t] = reinterpret_cast<const Cache*>(k[j + t]);
    for_each_vector<C>(dim, [&](auto io) {
      drip.drop();
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
                             Io io, Drip* drip) {
  Vec<C> sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int u = 0; u < kVectors; ++u) sums[r][u] = load<C>(acc + r * acc_stride + io.i + u * kLanes<C>);
  }
  for (int64_t j = first; j < last; ++j) {
    drip->drop();
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
void weigh_rows(const char* const* v, int64_t first, int64_t last, const C* p, C* acc, int64_t acc_stride, int64_t dim,
                Drip drip) {
  int64_t i = 0;
  for (; i + 4 * kLanes<C> <= dim; i += 4 * kLanes<C>) {
    weigh_block<kRows, 4, C, Cache>(v, first, last, p, acc, acc_stride, FullVector<C>{i}, &drip);
  }
  for (; i + kLanes<C> <= dim; i += kLanes<C>) {
    weigh_block<kRows, 1, C, Cache>(v, first, last, p, acc, acc_stride, FullVector<C>{i}, &drip);
  }
  if (i < dim) weigh_block<kRows, 1, C, Cache>(v, first, last, p, acc, acc_stride, PartVector<C>{i, dim - i}, &drip);
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
void weigh_all(const char* const* v, int64_t first, int64_t last, const C* p, int64_t rows, C* acc, int64_t acc_stride,
               int64_t dim, Drip drip) {
  for_row_blocks<kRowBlock>(rows, [&](auto count, int64_t r) {
    weigh_rows<decltype(count)::value, C, Cache>(v, first, last, p + r * kStep, acc + r * acc_stride, acc_stride, dim,
                                                 drip);
    drip.per_drop = 0;
  });
}

// Products in the compute type, for every dtype and instruction set. Tokens are taken in small pieces, all heads of a
// piece together: memory is read in the order in which it lies.
template <class C, class Cache>
class VectorProducts {
 public:
  static constexpr bool kStreams = true;
  static constexpr int kPiece = 4;  // tokens that score() and weigh() take at a time

  VectorProducts(int64_t rows, int64_t dim_k, int64_t dim_v) : rows_(rows), dim_k_(dim_k), dim_v_(dim_v) {}

  static int64_t padded(int64_t dim) { return (dim + kLanes<C> - 1) / kLanes<C> * kLanes<C>; }
  int64_t q_bytes() const { return rows_ * padded(dim_k_) * sizeof(C); }  // of one head
  int64_t padded_rows() const { return rows_; }
  int64_t scratch_bytes() const { return 0; }
  void set_scratch(char*, Prefetcher* prefetcher) { prefetcher_ = prefetcher; }
  int64_t pulls_per_head() const { return 2 * kStep / kPiece; }
  static int64_t column(int64_t d) { return d; }  // where component d of a value is accumulated
  void begin() {}
  void end() {}

  // Row r of one head's queries.
  template <class Q>
  void pack_q(char* packed, int64_t r, const Q* q) const {
    C* out = reinterpret_cast<C*>(packed) + r * padded(dim_k_);
    for_each_vector<C>(dim_k_, [&](auto io) { store<C>(out + io.i, io.load(q)); });
  }

  // What can be done with the values before the weights are known.
  void stage(const char* const*) {}

  void score(const char* packed_q, const char* const* k, int64_t, C* scores) {
    const C* q = reinterpret_cast<const C*>(packed_q);
    Drip drip = prefetcher_->take(padded(dim_k_) / kLanes<C>);
    for_row_blocks<kRowBlock>(rows_, [&](auto count, int64_t r) {
      score_rows<decltype(count)::value, C, Cache>(k, kPiece, q + r * padded(dim_k_), padded(dim_k_), dim_k_,
                                                   scores + r * kStep, drip);
      drip.per_drop = 0;
    });
  }

  void weigh(const C* p, const char* const* v, int64_t, C* acc, int64_t acc_stride) {
    const int64_t blocks = dim_v_ / (4 * kLanes<C>)+(dim_v_ % (4 * kLanes<C>)+kLanes<C> - 1) / kLanes<C>;
    weigh_all<C, Cache>(v, 0, kPiece, p, rows_, acc, acc_stride, dim_v_, prefetcher_->take(kPiece * blocks));
  }

 private:
  int64_t rows_, dim_k_, dim_v_;
  Prefetcher* prefetcher_ = nullptr;
};

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
