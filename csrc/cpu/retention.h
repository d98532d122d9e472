// What the forward and the backward of gated retention share: sequences and segments, the decays of a chunk, rows in
// and out of tensors, operands scaled by decays. docs/cpu_retention.md derives the schedule.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "retention_rotary.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

constexpr int kChunk = 64;  // tokens that one step of the recurrence takes
constexpr int kBlock = 16;  // tokens inside which pairwise decays are products, not exponentials

YOCO_INLINE int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

// ---- which tokens

struct Tokens {
  int64_t batch, begin, length;
  int64_t position;  // of the first one, for rotary
};

// cu_seqlens is clamped into the tensors: a wrong entry gives a wrong sequence, never a wrong address.
inline Tokens sequence_tokens(const RetentionParams& p, int64_t n) {
  const int64_t position = p.rotary.offsets == nullptr ? 0 : p.rotary.offsets[n];
  if (p.cu_seqlens == nullptr) return {n, 0, p.time, position};
  const int64_t begin = std::clamp<int64_t>(p.cu_seqlens[n], 0, p.time);
  const int64_t end = std::clamp<int64_t>(p.cu_seqlens[n + 1], begin, p.time);
  return {0, begin, end - begin, position};
}

// Chunk c of a sequence.
inline Tokens chunk_tokens(const Tokens& sequence, int64_t c) {
  const int64_t begin = c * kChunk;
  return {sequence.batch, sequence.begin + begin, std::min<int64_t>(kChunk, sequence.length - begin),
          sequence.position + begin};
}

template <class T>
YOCO_INLINE T* element(const View& view, int64_t batch, int64_t time, int64_t head) {
  return static_cast<T*>(view.data) + batch * view.batch_stride + time * view.time_stride + head * view.head_stride;
}

// A piece of one (sequence, head) that one task works on: chunks [first, last).
struct Segment {
  int64_t sequence, head, first, last;
  int64_t index;  // among all segments; those of one (sequence, head) follow each other
};

// Segments of every (sequence, head), at most `chunks` chunks each; a sequence without tokens has one empty segment.
inline int64_t count_segments(const RetentionParams& p, int64_t chunks) {
  int64_t count = 0;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    count += std::max<int64_t>(1, divide_up(sequence_tokens(p, n).length, chunks * kChunk)) * p.heads;
  }
  return count;
}

inline void list_segments(const RetentionParams& p, int64_t chunks, Segment* out) {
  int64_t index = 0;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t all = divide_up(sequence_tokens(p, n).length, kChunk);
    for (int64_t head = 0; head < p.heads; ++head) {
      int64_t first = 0;
      do {
        out[index] = {n, head, first, std::min(first + chunks, all), index};
        ++index;
        first += chunks;
      } while (first < all);
    }
  }
}

// Tasks 0 .. n - 1, each run by whichever thread is free; what a task computes depends on its number only.
// make() gives a thread its state once.
template <class Make, class Body>
void run_tasks(const Launch& launch, int64_t n, const Make& make, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(n, std::max<int32_t>(1, launch.num_threads));
  parallel(launch, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      auto state = make();
      for (int64_t task = next++; task < n; task = next++) body(state, task);
    }
  });
}

// Walking through a (sequence, head) from segment to segment needs fewer products; segments as tasks feed threads that
// would have nothing to walk. Both give the same bits, so the number of threads may decide.
inline bool worth_cutting(const Launch& launch, int64_t streams, int64_t segments) {
  const int64_t threads = launch.num_threads;
  return threads > 1 && segments > streams && streams % threads != 0 && streams < 4 * threads;
}

// Memory of this thread, kept between calls: fresh pages would cost more than the kernel on short sequences.
inline void* thread_memory(size_t bytes) {
  struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
    ~Memory() { std::free(data); }
  };
  thread_local Memory memory;
  if (memory.bytes < bytes) {
    std::free(memory.data);
    memory.data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    memory.bytes = memory.data == nullptr ? 0 : bytes;
    if (memory.data == nullptr) std::abort();  // as the allocator of a thread pool has no one to report to
  }
  return memory.data;
}

// ---- decays of a chunk

// b_i is the sum of g over the chunk up to token i, the token included. The sums are float64: after one strong decay
// the differences of float32 sums have lost the weak decays behind it. Tokens behind the end have g = 0.
template <class C>
struct Decay {
  alignas(64) C from_start[kChunk];    // scale * exp(b_i)
  alignas(64) C to_end[kChunk];        // exp(b_C - b_j)
  C total;                             // exp(b_C)
  double log_total;                    // b_C
  alignas(64) C pair[kChunk][kChunk];  // scale * exp(b_i - b_j) for i >= j, else 0; rows of whole blocks
};

// exp of (x - from) for x <= from; exactly 0 where float underflows.
template <class C>
YOCO_INLINE void exp_below(C* out, const double* x, double sign, double from, int n, C factor) {
  alignas(64) C part[kChunk];
  for (int i = 0; i < n; ++i) part[i] = static_cast<C>(sign * (x[i] - from));
  for (int i = 0; i < n; i += kLanes<C>) {
    const Vec<C> v = load<C>(part + i);
    const Vec<C> e = exp(v) * factor;
    store<C>(out + i, v < static_cast<C>(-87.0) && sizeof(C) == 4 ? Vec<C>{} : e);
  }
}

// Logits -> log decays: x = logsigmoid(x) / normalizer, in place. log(1 + y) for y in (0, 1] is 2 atanh(y / (2 + y)), a
// series in squares of at most 1/9.
template <class C>
YOCO_INLINE void logits_to_decays(C* x, int n, C normalizer) {
  constexpr int kTerms = sizeof(C) == 4 ? 8 : 18;
  for (int i = 0; i < n; i += kLanes<C>) {
    const Vec<C> v = load<C>(x + i), zero{};
    const Vec<C> y = exp(v < zero ? v : -v), z = y / (C(2) + y), square = z * z;
    Vec<C> sum = splat(C(1) / C(2 * kTerms - 1));
    for (int k = kTerms - 2; k >= 0; --k) sum = sum * square + C(1) / C(2 * k + 1);
    store<C>(x + i, ((v > zero ? zero : v) - C(2) * z * sum) / normalizer);
  }
}

// normalizer: of RetentionParams, 0 where g holds log decays.
template <class C, class G>
void load_decay(Decay<C>& d, const View& g, const Tokens& tokens, int64_t head, C scale, C normalizer, bool pairs) {
  alignas(64) double b[kChunk];  // b_i
  alignas(64) C one[kChunk];     // exp(g_i)
  double sum = 0;
  const G* row = element<G>(g, tokens.batch, tokens.begin, head);
  double step[kChunk];
  alignas(64) C given[kChunk] = {};
  for (int64_t i = 0; i < tokens.length; ++i) given[i] = static_cast<C>(to_float(row[i * g.time_stride]));
  if (normalizer > 0) logits_to_decays(given, kChunk, normalizer);
  for (int64_t i = 0; i < kChunk; ++i) {
    double x = i < tokens.length ? static_cast<double>(given[i]) : 0.0;
    if (x < -1e5) x = -1e5;  // exp is 0 long before; keeps -inf - -inf out of the differences
    step[i] = x;
    sum += x;
    b[i] = sum;
  }
  d.log_total = sum;
  d.total = static_cast<C>(std::exp(sum));
  exp_below<C>(d.from_start, b, 1.0, 0.0, kChunk, scale);
  exp_below<C>(d.to_end, b, -1.0, sum, kChunk, C(1));
  if (!pairs) return;
  exp_below<C>(one, step, 1.0, 0.0, kChunk, C(1));
  const int64_t blocks = divide_up(tokens.length, kBlock);
  for (int64_t bi = 0; bi < blocks; ++bi) {
    const double before = bi == 0 ? 0.0 : b[bi * kBlock - 1];
    C rows[kBlock];  // scale * exp(b_i - b at the start of i's block)
    exp_below<C>(rows, b + bi * kBlock, 1.0, before, kBlock, scale);
    for (int64_t bj = 0; bj < bi; ++bj) {
      // exp(b_i - b_j) = exp(b_i - start of i's block) * exp(start of i's block - b_j), both at most 1.
      C columns[kBlock];
      exp_below<C>(columns, b + bj * kBlock, -1.0, before, kBlock, C(1));
      for (int i = 0; i < kBlock; ++i) {
        C* out = d.pair[bi * kBlock + i] + bj * kBlock;
        for (int j = 0; j < kBlock; ++j) out[j] = rows[i] * columns[j];
      }
    }
    // Inside a block a row is the row above times exp(g_i): exact however much the sums have lost.
    C line[kBlock] = {};
    for (int i = 0; i < kBlock; ++i) {
      C* out = d.pair[bi * kBlock + i];
      for (int j = 0; j < kBlock; ++j) line[j] *= one[bi * kBlock + i];
      line[i] = C(1);
      for (int j = 0; j < kBlock; ++j) out[bi * kBlock + j] = scale * line[j];
      for (int j = (bi + 1) * kBlock; j < kChunk; ++j) out[j] = C(0);
    }
  }
  for (int64_t i = blocks * kBlock; i < kChunk; ++i) std::fill(d.pair[i], d.pair[i] + kChunk, C(0));
}

// ---- rows of tensors

// [length][dim] of a tensor as `rows` x `width` elements, zero where the tensor has nothing. With a rotation of this
// chunk: turned.
template <class Ops, class T>
Rows<typename Ops::Element> load_rows(Arena& arena, const View& view, const Tokens& tokens, int64_t head, int64_t dim,
                                      int64_t rows, int64_t width,
                                      const ChunkRotation<typename Ops::Compute>* rotation = nullptr) {
  using E = typename Ops::Element;
  const Rows<E> to = take_rows<E>(arena, rows, width);
  const T* from = element<T>(view, tokens.batch, tokens.begin, head);
  const int64_t turned = rotation == nullptr ? 0 : rotation->dim();
  for (int64_t i = 0; i < tokens.length; ++i, from += view.time_stride) {
    E* row = to.row(i);
    if (turned > 0) rotation->template turn<false>(from, row, i);
    if constexpr (std::is_same_v<T, E>) {
      std::memcpy(row + turned, from + turned, static_cast<size_t>(dim - turned) * sizeof(E));
    } else {
      for_each_vector<E>(dim - turned, [&](auto io) { io.store(row + turned, io.load(from + turned)); });
    }
    for (int64_t j = dim; j < width; ++j) row[j] = E{};
  }
  for (int64_t i = tokens.length; i < rows; ++i) std::fill(to.row(i), to.row(i) + width, E{});
  return to;
}

// With a rotation of this chunk: turned back.
template <class C, class T>
void store_rows(const View& view, const Tokens& tokens, int64_t head, int64_t dim, Rows<C> x,
                const ChunkRotation<C>* rotation = nullptr) {
  T* to = element<T>(view, tokens.batch, tokens.begin, head);
  const int64_t turned = rotation == nullptr ? 0 : rotation->dim();
  for (int64_t i = 0; i < tokens.length; ++i, to += view.time_stride) {
    const C* row = x.row(i);
    if (turned > 0) rotation->template turn<true>(row, to, i);
    for_each_vector<C>(dim - turned, [&](auto io) { io.store(to + turned, io.load(row + turned)); });
  }
}

// Rows that belong to no sequence.
template <class T>
void zero_rest(const RetentionParams& p, const View& view, int64_t dim) {
  if (p.cu_seqlens == nullptr) return;
  const int64_t end = std::clamp<int64_t>(p.cu_seqlens[p.num_sequences], 0, p.time);
  for (int64_t t = end; t < p.time; ++t) {
    for (int64_t head = 0; head < p.heads; ++head) {
      std::memset(static_cast<void*>(element<T>(view, 0, t, head)), 0, static_cast<size_t>(dim) * sizeof(T));
    }
  }
}

// ---- states

// A state tensor [dim_k][dim_v], or zero when there is none, as a padded matrix.
template <class C>
void load_state(Rows<C> to, const C* from, int64_t dim_k, int64_t dim_v, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) std::fill(to.row(r), to.row(r) + width, C(0));
  if (from == nullptr) return;
  for (int64_t r = 0; r < dim_k; ++r) std::copy(from + r * dim_v, from + (r + 1) * dim_v, to.row(r));
}

template <class C>
void store_state(C* to, Rows<C> from, int64_t dim_k, int64_t dim_v) {
  for (int64_t r = 0; r < dim_k; ++r) std::copy(from.row(r), from.row(r) + dim_v, to + r * dim_v);
}

// x *= factor
template <class C>
void scale_rows(Rows<C> x, C factor, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    C* row = x.row(r);
    for (int64_t n = 0; n < width; n += kLanes<C>) store<C>(row + n, factor * load<C>(row + n));
  }
}

// Rows scaled by one factor each, as a right operand. Rounding x * factor to bfloat16 would cost the state half of
// its digits at every step, so there the operand is a sum of two bfloat16 matrices: one on top of the other, against a
// left operand that has its columns twice.
template <class Ops>
typename Ops::Right scaled(Arena& arena, Rows<typename Ops::Element> x, const typename Ops::Compute* factor,
                           int64_t rows, int64_t width) {
  using C = typename Ops::Compute;
  const auto to = Ops::take_right(arena, Ops::kParts * rows, width);
  for (int64_t k = 0; k < rows; k += 2) {
    for (int64_t n = 0; n < width; n += kLanes<C>) {
      const Vec<C> a = factor[k] * load<C>(x.row(k) + n), b = factor[k + 1] * load<C>(x.row(k + 1) + n);
      Ops::put(to, k, n, a, b);
      if constexpr (Ops::kParts == 2) Ops::put(to, rows + k, n, a - Ops::rounded(a), b - Ops::rounded(b));
    }
  }
  return to;
}

// c += left * scaled operand of `rows` rows
template <class Ops>
void multiply_scaled(Rows<typename Ops::Compute> c, typename Ops::Left left, typename Ops::Right right, int64_t m,
                     int64_t n, int64_t rows) {
  Ops::multiply(c.data, c.ld, left, right, m, n, Ops::kParts * rows, true);
}

// ---- dispatch

// Calls f(storage type, gate type, ops): bfloat16 products where the CPU has them, float products elsewhere.
template <class F>
const char* with_retention_types(DType dtype, DType gate_dtype, const F& f) {
  const auto with_gate = [&](auto t, auto ops) { return gate_dtype == dtype ? f(t, t, ops) : f(t, float{}, ops); };
  return with_float_type(dtype, [&](auto t) -> const char* {
    using T = decltype(t);
#if YOCO_HAS_BF16_DOT
    if constexpr (std::is_same_v<T, BFloat16>) return with_gate(t, BFloatOps{});
#endif
    return with_gate(t, FloatOps<Compute<T>>{});
  });
}

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
