// Attention forward: one pass over the visible key tiles per block of rows, online softmax in float32.

#include "attention_amx.h"
#include "attention_tile.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// One row of scores to unnormalised probabilities. Returns their sum; `top` is the new maximum in raw units.
template <class Op, class C>
YOCO_INLINE C softmax_row(const C* scores, int64_t columns, C factor, C top, Op* out) {
  const Vec<C> scale = splat(factor), shift = splat(-top * factor);
  Vec<C> sum{};
  int64_t j = 0;
#if YOCO_HAS_BF16_DOT
  if constexpr (std::is_same_v<Op, BFloat16>) {
    Vec<C> sum2{};
    for (; j + 32 <= columns; j += 32) {
      const Vec<C> a = exp2_nonpositive(load<C>(scores + j) * scale + shift);
      const Vec<C> b = exp2_nonpositive(load<C>(scores + j + 16) * scale + shift);
      sum += a, sum2 += b;
      _mm512_storeu_si512(out + j, bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(b), bit_cast<__m512>(a))));
    }
    sum += sum2;
  }
#endif
  for (; j < columns; j += kLanes<C>) {
    const Vec<C> e = exp2_nonpositive(load<C>(scores + j) * scale + shift);
    sum += e;
    store<C>(out + j, e);
  }
  return sum_lanes<C>(sum);
}

template <class C>
YOCO_INLINE C max_row(const C* scores, int64_t columns) {
  constexpr int kWidth = kLanes<C>;
  Vec<C> a = load<C>(scores), b = a;
  int64_t j = kWidth;
  for (; j + 2 * kWidth <= columns; j += 2 * kWidth) {
    const Vec<C> x = load<C>(scores + j), y = load<C>(scores + j + kWidth);
    a = x > a ? x : a;
    b = y > b ? y : b;
  }
  for (; j < columns; j += kWidth) {
    const Vec<C> x = load<C>(scores + j);
    a = x > a ? x : a;
  }
  a = b > a ? b : a;
  C top = a[0];
  for (int i = 1; i < kWidth; ++i) top = a[i] > top ? a[i] : top;
  return top;
}

template <class T>
class Forward {
 public:
  using Op = MatrixOperand<T>;
  using C = Accumulator<Op>;
  using Packed = PackedKV<T>;

  // amx_depth: 0, or which instance of AmxForward takes the blocks that suit it.
  Forward(const AttentionParams& p, const Packed& kv, int amx_depth)
      : p_(p),
        kv_(kv),
        group_(p.heads_q / p.heads_kv),
        depth_(padded_depth<Op>(p.dim_qk)),
        cols_(padded_cols(p.dim_v)),
        amx_depth_(amx_depth),
        transform_(needs_transform(p)),
        factor_(static_cast<C>(transform_ ? 1.0 : p.scale * kLog2E)) {}

  size_t scratch_bytes() const {
    const size_t general = (kRows * depth_ + kRows * kKeys) * sizeof(Op) + (kRows * kKeys + kRows * cols_) * sizeof(C) +
                           (amx_depth_ > 0 ? kKeys * (depth_ + cols_) * sizeof(Op) : 0);
#if YOCO_HAS_AMX
    if constexpr (!std::is_same_v<T, double>) {
      if (amx_depth_ > 0) return std::max(general, amx_scratch_bytes<T>(amx_depth_));
    }
#endif
    return general;
  }

  void run(const Rows& rows, char* scratch) const {
    const Sequence& s = kv_.sequence(rows.sequence);
#if YOCO_HAS_AMX
    if constexpr (!std::is_same_v<T, double>) {
      if (amx_depth_ == 2 && run_amx<2>(rows, s, scratch)) return;
      if (amx_depth_ == 4 && run_amx<4>(rows, s, scratch)) return;
      if (amx_depth_ == 8 && run_amx<8>(rows, s, scratch)) return;
    }
#endif
    for (int64_t r = 0; r < rows.count; r += kRows) {
      run_tile({rows.sequence, rows.kv_head, rows.first + r, std::min(kRows, rows.count - r)}, s, scratch);
    }
  }

 private:
  void run_tile(const Rows& rows, const Sequence& s, char* scratch) const {
    const RowPlaces places(rows, group_);
    Op* q = reinterpret_cast<Op*>(scratch);                           // [kRows, depth]
    Op* probabilities = q + kRows * depth_;                           // [kRows, kKeys]
    C* scores = reinterpret_cast<C*>(probabilities + kRows * kKeys);  // [kRows, kKeys]
    C* out = scores + kRows * kKeys;                                  // [kRows, cols]
    for (int64_t r = 0; r < rows.count; ++r) {
      pack_row(query<const T>(p_.q, s, places, r), p_.dim_qk, depth_, q + r * depth_);
    }
    std::memset(static_cast<void*>(q + rows.count * depth_), 0, (kRows - rows.count) * depth_ * sizeof(Op));
    std::memset(static_cast<void*>(out), 0, kRows * cols_ * sizeof(C));
    C top[kRows], sum[kRows];
    std::fill(top, top + kRows, -std::numeric_limits<C>::infinity());
    std::fill(sum, sum + kRows, C{0});
    Tile tile{rows, s, q, probabilities, scores, out, top, sum, reinterpret_cast<Op*>(out + kRows * cols_)};
    visit(tile, kv_.main_segment(rows.sequence), false);
    if (const Segment* latent = kv_.latent_segment(s)) visit(tile, *latent, true);
    for (int64_t r = 0; r < rows.count; ++r) finish_row(places, s, r, out + r * cols_, top[r] * factor_, sum[r]);
  }

#if YOCO_HAS_AMX
  // False: not a case for this kernel, nothing was written.
  template <int kDepth>
  bool run_amx(const Rows& rows, const Sequence& s, char* scratch) const {
    using Kernel = AmxForward<T, kDepth>;
    AmxUnits units(rows.count, kDepth, Kernel::kP);
    for (const Segment* segment : {&kv_.main_segment(rows.sequence), kv_.latent_segment(s)}) {
      if (segment == nullptr || segment->length == 0) continue;
      if (!units.add(p_, kv_, s, rows, *segment, segment == kv_.latent_segment(s))) return false;
    }
    const RowPlaces places(rows, group_);
    const auto b = Kernel::carve(scratch);
    Kernel::clear(b, rows.count);
    for (int64_t r = 0; r < rows.count; ++r) {
      const T* q = query<const T>(p_.q, s, places, r);
      if (Kernel::kP > 1 && !all_finite(q, 0, 1, p_.dim_qk)) return false;
      Kernel::set_query(b, r, q, p_.dim_qk);
    }
    const FlushDenormals flush;
    Kernel::run(b, factor_, units);
    float top[kTaskRows], sum[kTaskRows];
    bool good = true;
    for (int64_t r = 0; r < rows.count; ++r) {
      sum[r] = _mm512_reduce_add_ps(_mm512_load_ps(b.sum + 16 * r)), top[r] = -b.shift[r];
      good &= sum[r] < kAmxLargestSum;
    }
    if (!good) return false;
    alignas(64) float row[Kernel::kDim];
    for (int64_t r = 0; r < rows.count; ++r) {
      Kernel::get_output(b, r, row);
      finish_row(places, s, r, row, top[r], sum[r]);
    }
    return true;
  }
#endif

  struct Tile {
    const Rows& rows;
    const Sequence& s;
    const Op* q;
    Op* probabilities;
    C *scores, *out, *top, *sum;
    Op* packed;  // room for one block, where kv has none in this layout
  };

  template <class P>
  static P* query(const View& view, const Sequence& s, const RowPlaces& places, int64_t r) {
    return const_cast<P*>(at<std::remove_const_t<P>>(view, s.batch, s.q_begin + places.query[r], places.head[r]));
  }

  void visit(const Tile& t, const Segment& segment, bool latent) const {
    const Intervals seen(p_, t.s, t.rows, group_, latent);
    if (seen.empty()) return;
    for (int64_t k0 = seen.low / kKeys * kKeys; k0 < seen.high; k0 += kKeys) {
      const auto cover = seen.cover(k0, t.rows.count);
      if (cover == Intervals::kNone) continue;
      const int64_t index = kv_.block_index(segment, t.rows.kv_head, k0 / kKeys);
      const auto block = kv_.block(segment, latent, t.rows.kv_head, k0 / kKeys, t.packed);
      const int64_t columns = std::min(kKeys, round_up(seen.high - k0, 2 * kMatrixCols));
      gemm<Op>(t.rows.count, columns, depth_, t.q, depth_, block.keys, kKeys, t.scores, kKeys, false);
      if (transform_) transform_scores(p_, t.s, t.rows, group_, latent, k0, t.scores);
      if (cover == Intervals::kPart) {
        for (int64_t r = 0; r < t.rows.count; ++r) {
          const KeyRange visible = seen.columns(r, k0);
          C* row = t.scores + r * kKeys;
          std::fill(row, row + std::min(visible.begin, columns), -std::numeric_limits<C>::infinity());
          std::fill(row + std::min(visible.end, columns), row + columns, -std::numeric_limits<C>::infinity());
        }
      }
      softmax(t, columns);
      if (cover == Intervals::kFull || kv_.finite(index)) {
        gemm<Op>(t.rows.count, cols_, columns, t.probabilities, kKeys, block.values, cols_, t.out, cols_, true);
      } else {
        careful_output(t, seen, segment, latent, k0);
      }
    }
  }

  void softmax(const Tile& t, int64_t columns) const {
    for (int64_t r = 0; r < t.rows.count; ++r) {
      const C* scores = t.scores + r * kKeys;
      Op* out = t.probabilities + r * kKeys;
      const C tile_top = max_row(scores, columns);
      const C top = tile_top > t.top[r] ? tile_top : t.top[r];
      if (top == -std::numeric_limits<C>::infinity() && !has_nan(scores, columns)) {
        std::memset(static_cast<void*>(out), 0, columns * sizeof(Op));
        continue;
      }
      const C safe_top = top == -std::numeric_limits<C>::infinity() ? C{0} : top;
      if (top != t.top[r]) {
        const C correction = std::exp2((t.top[r] - safe_top) * factor_);
        t.sum[r] *= correction;
        C* o = t.out + r * cols_;
        for (int64_t j = 0; j < cols_; j += kLanes<C>) store<C>(o + j, load<C>(o + j) * correction);
        t.top[r] = top;
      }
      t.sum[r] += softmax_row(scores, columns, factor_, safe_top, out);
    }
  }

  static bool has_nan(const C* scores, int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) {
      if (scores[j] != scores[j]) return true;
    }
    return false;
  }

  // A masked tile whose values are not all finite: only visible keys are touched.
  void careful_output(const Tile& t, const Intervals& seen, const Segment& segment, bool latent, int64_t k0) const {
    for (int64_t r = 0; r < t.rows.count; ++r) {
      const KeyRange visible = seen.columns(r, k0);
      for (int64_t j = visible.begin; j < visible.end; ++j) {
        const T* v = at<T>(latent ? p_.latent_v : p_.v, segment.batch, segment.begin + k0 + j, t.rows.kv_head);
        const C weight = static_cast<C>(to_float(t.probabilities[r * kKeys + j]));
        for (int64_t d = 0; d < p_.dim_v; ++d) t.out[r * cols_ + d] += weight * static_cast<C>(to_float(v[d]));
      }
    }
  }

  // o: the sum of p v; sum: that of p; top: what was subtracted from every logit, in base 2.
  void finish_row(const RowPlaces& places, const Sequence& s, int64_t r, const C* o, C top, C sum) const {
    const int64_t head = places.head[r];
    C scale = 1;
    if (p_.sinks != nullptr) {
      const C sink = static_cast<C>(p_.sinks[head] * kLog2E), high = sink > top ? sink : top;
      const C safe = high == -std::numeric_limits<C>::infinity() ? C{0} : high;
      scale = std::exp2(top - safe);
      sum = sum * scale + std::exp2(sink - safe);
      top = high;
    }
    const bool seen = sum != 0;  // true for NaN
    const C inverse = seen ? scale / sum : C{0};
    T* out = query<T>(p_.out, s, places, r);
    int64_t j = 0;
    for (; j + kLanes<C> <= p_.dim_v; j += kLanes<C>) store<C>(out + j, load<C>(o + j) * inverse);
    for (; j < p_.dim_v; ++j) from_float(o[j] * inverse, out + j);
    static_cast<C*>(p_.lse)[(s.batch * p_.heads_q + head) * p_.time_q + s.q_begin + places.query[r]] =
        seen ? top * static_cast<C>(kLn2) + std::log(sum) : -std::numeric_limits<C>::infinity();
  }

  const AttentionParams& p_;
  const Packed& kv_;
  const int64_t group_, depth_, cols_;
  [[maybe_unused]] const int amx_depth_;
  const bool transform_;
  const C factor_;
};

// Many rows take the same keys out of L2, as long as there are tasks for many threads. Results do not depend on it.
int64_t task_rows(const AttentionParams& p, bool amx) {
  int64_t rows = kRows;
  const auto tasks = [&](int64_t n) { return p.num_sequences * p.heads_q * p.max_seqlen_q / n; };
  while (amx && rows < kTaskRows && tasks(2 * rows) >= 64) rows *= 2;
  return rows;
}

template <class T>
const char* forward(const AttentionParams& p, const Launch& launch) {
  using C = typename Forward<T>::C;
  using Packed = PackedKV<T>;
  int amx_depth = 0, planes = 1;
#if YOCO_HAS_AMX
  if (!std::is_same_v<T, double> && !needs_transform(p)) {
    amx_depth = amx_kernel_depth(p), planes = kPlanes<T>;
  }
#endif
  Packed kv(p, amx_depth, planes);
  if (!kv.allocate()) return "out of memory for the packed keys and values";
  kv.pack(launch);
  const Forward<T> kernel(p, kv, amx_depth);
  const std::vector<Rows> tasks = make_row_tasks(p, task_rows(p, amx_depth > 0));
  for_each_task(launch, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const ScratchLease<TaskScratch> scratch(kernel.scratch_bytes());
    kernel.run(tasks[i], scratch.data());
  });
  const int64_t end = rows_in_sequences(p);
  zero_rows<T>(p.out, p.batch, p.heads_q, p.dim_v, end, p.time_q);
  for (int64_t row = 0; row < p.batch * p.heads_q; ++row) {
    C* lse = static_cast<C*>(p.lse) + row * p.time_q;
    std::fill(lse + end, lse + p.time_q, -std::numeric_limits<C>::infinity());
  }
  return nullptr;
}

}  // namespace

const char* attention_forward(const AttentionParams& p, const Launch& launch) {
  return with_float_type(p.dtype, [&](auto t) { return forward<decltype(t)>(p, launch); });
}

}  // namespace yoco::cpu::YOCO_ISA
