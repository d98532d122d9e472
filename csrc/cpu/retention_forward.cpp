// Forward of gated retention, chunk by chunk:
//   O = (Q K^T * D) V + (Q * exp(b)) S,    S' = exp(b_C) S + K^T (V * exp(b_C - b))
//
// A sequence is cut into segments of kSegment chunks. Inside a segment the state is kept as
//   S = carry * start + local,
// the decayed state before the segment plus what the segment's own tokens added. `local` depends on nothing outside
// the segment, so one thread walking through a sequence and many threads, each with a segment, compute the same bits.
//
// An output gate, and the norm before it, meet the outputs of a chunk while those are in the cache, not yet rounded.
#include "retention.h"
#include "rowwise.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

constexpr int64_t kSegment = 16;  // chunks: 1024 tokens

template <class T, class G, class Ops>
class Forward {
  using C = typename Ops::Compute;
  using E = typename Ops::Element;
  using Left = typename Ops::Left;
  using Right = typename Ops::Right;

 public:
  Forward(const RetentionParams& p, const Launch& launch)
      : p_(p),
        launch_(launch),
        dim_k_(round_up(p.dim_k, Ops::kStep)),
        dim_v_(round_up(p.dim_v, Ops::kStep)),
        state_size_(dim_k_ * (dim_v_ + kRowPadBytes / static_cast<int64_t>(sizeof(C)))),
        chunk_tokens_(std::min<int64_t>(kChunk, p.time)) {}

  const char* run() {
    for (const View& view : {p_.o, p_.y}) {
      if (view.data != nullptr) zero_rest<T>(p_, view, p_.dim_v);
    }
    const int64_t streams = p_.num_sequences * p_.heads;
    if (streams == 0) return nullptr;
    const int64_t pieces = count_segments(p_, kSegment);
    if (worth_cutting(launch_, streams, pieces)) return run_cut(pieces);
    run_tasks(
        launch_, streams, [&] { return Thread(*this); },
        [&](Thread& t, int64_t stream) { walk(t, stream / p_.heads, stream % p_.heads); });
    return nullptr;
  }

 private:
  // What a thread owns.
  struct Thread {
    explicit Thread(const Forward& f)
        : arena(thread_memory(f.arena_bytes()), f.arena_bytes()), rotation(f.p_.rotary, f.chunk_tokens_, arena) {
      decay = arena.take<Decay<C>>(1);
      start = take_rows<C>(arena, f.dim_k_, f.dim_v_);
      local = take_rows<C>(arena, f.dim_k_, f.dim_v_);
    }
    MatrixScope scope;
    Arena arena;
    ChunkRotation<C> rotation;
    Decay<C>* decay;
    Rows<C> start, local;
  };

  size_t arena_bytes() const {
    const int64_t width = std::max<int64_t>({dim_k_, dim_v_, kChunk}) + kRowPadBytes;
    return sizeof(Decay<C>) + 4096 + sizeof(C) * static_cast<size_t>(3 * state_size_ + 12 * kChunk * width) +
           ChunkRotation<C>::bytes(p_.rotary, chunk_tokens_);
  }

  const C* initial_state(int64_t n, int64_t head) const {
    if (p_.initial_state == nullptr) return nullptr;
    return static_cast<const C*>(p_.initial_state) + (n * p_.heads + head) * p_.dim_k * p_.dim_v;
  }

  void store_final_state(int64_t n, int64_t head, Rows<C> state) const {
    if (p_.final_state == nullptr) return;
    store_state(static_cast<C*>(p_.final_state) + (n * p_.heads + head) * p_.dim_k * p_.dim_v, state, p_.dim_k,
                p_.dim_v);
  }

  // start = carry * start + local
  void advance(Rows<C> start, C carry, Rows<C> local) const {
    for (int64_t r = 0; r < dim_k_; ++r) {
      C *to = start.row(r), *from = local.row(r);
      for (int64_t n = 0; n < dim_v_; n += kLanes<C>) store<C>(to + n, carry * load<C>(to + n) + load<C>(from + n));
    }
  }

  // One thread, the whole sequence.
  void walk(Thread& t, int64_t n, int64_t head) const {
    const Tokens sequence = sequence_tokens(p_, n);
    const int64_t chunks = divide_up(sequence.length, kChunk);
    load_state(t.start, initial_state(n, head), p_.dim_k, p_.dim_v, dim_k_, dim_v_);
    bool zero = p_.initial_state == nullptr;
    for (int64_t first = 0; first < chunks; first += kSegment) {
      const double log_carry = segment(t, sequence, head, first, std::min(first + kSegment, chunks), zero, true);
      advance(t.start, static_cast<C>(std::exp(log_carry)), t.local);
      zero = false;
    }
    store_final_state(n, head, t.start);
  }

  // Every segment is a task: first what each adds to the state, then the states before them, then the outputs.
  const char* run_cut(int64_t pieces) {
    const Scratch memory(static_cast<size_t>(pieces) * (sizeof(Segment) + sizeof(double)) +
                         static_cast<size_t>(pieces * state_size_) * sizeof(C) + 256);
    Arena arena(memory.as<char>(), SIZE_MAX);
    if (memory.as<char>() == nullptr) return "gated_retention: out of memory for the states between segments";
    Segment* segments = arena.take<Segment>(pieces);
    double* log_carry = arena.take<double>(pieces);
    C* states = arena.take<C>(pieces * state_size_);
    list_segments(p_, kSegment, segments);
    const int64_t ld = state_size_ / dim_k_;
    const auto state = [&](int64_t index) { return Rows<C>{states + index * state_size_, ld}; };
    const auto make = [&] { return Thread(*this); };
    run_tasks(launch_, pieces, make, [&](Thread& t, int64_t i) {
      const Segment& s = segments[i];
      const Tokens sequence = sequence_tokens(p_, s.sequence);
      t.local = state(i);
      log_carry[i] = segment(t, sequence, s.head, s.first, s.last, true, false);
    });
    // In place: the sum of segment i becomes the state before segment i.
    run_tasks(launch_, p_.num_sequences * p_.heads, make, [&](Thread& t, int64_t stream) {
      const int64_t n = stream / p_.heads, head = stream % p_.heads;
      load_state(t.start, initial_state(n, head), p_.dim_k, p_.dim_v, dim_k_, dim_v_);
      for (int64_t i = first_segment(segments, pieces, n, head); i < pieces; ++i) {
        if (segments[i].sequence != n || segments[i].head != head) break;
        const Rows<C> piece = state(i);
        std::copy(piece.data, piece.data + state_size_, t.local.data);
        std::copy(t.start.data, t.start.data + state_size_, piece.data);
        advance(t.start, static_cast<C>(std::exp(log_carry[i])), t.local);
      }
      store_final_state(n, head, t.start);
    });
    run_tasks(launch_, pieces, make, [&](Thread& t, int64_t i) {
      const Segment& s = segments[i];
      t.start = state(i);
      const bool zero = s.first == 0 && p_.initial_state == nullptr;
      segment(t, sequence_tokens(p_, s.sequence), s.head, s.first, s.last, zero, true);
    });
    return nullptr;
  }

  static int64_t first_segment(const Segment* segments, int64_t count, int64_t n, int64_t head) {
    const Segment* found = std::lower_bound(
        segments, segments + count, std::pair(n, head),
        [](const Segment& s, auto x) { return s.sequence != x.first ? s.sequence < x.first : s.head < x.second; });
    return found - segments;
  }

  // Chunks [first, last) with local = 0 before them. Returns the log of the decay over all of them.
  double segment(Thread& t, const Tokens& sequence, int64_t head, int64_t first, int64_t last, bool start_is_zero,
                 bool outputs) const {
    for (int64_t r = 0; r < dim_k_; ++r) std::fill(t.local.row(r), t.local.row(r) + dim_v_, C(0));
    double log_carry = 0;
    for (int64_t c = first; c < last; ++c) {
      const size_t mark = t.arena.mark();
      const Tokens tokens = chunk_tokens(sequence, c);
      const int64_t rows = round_up(tokens.length, Ops::kStep);
      load_decay<C, G>(*t.decay, p_.g, tokens, head, static_cast<C>(p_.scale), static_cast<C>(p_.gate_normalizer),
                       outputs);
      t.rotation.start(tokens.position, tokens.length);
      const Rows<E> k = load_rows<Ops, T>(t.arena, p_.k, tokens, head, p_.dim_k, rows, dim_k_, &t.rotation);
      const Rows<E> v = load_rows<Ops, T>(t.arena, p_.v, tokens, head, p_.dim_v, rows, dim_v_);
      const Right kt = Ops::right_transposed(t.arena, k, rows, dim_k_);
      if (outputs) {
        Right state{};  // no data: zero
        if (!start_is_zero || c > first) state = current_state(t, start_is_zero, static_cast<C>(std::exp(log_carry)));
        if (!output(t, tokens, head, rows, kt, v, state)) mend(t, tokens, head, rows, k, v, state);
      }
      const Left k_left = Ops::left_transposed(t.arena, kt, rows, dim_k_);
      const Right v_scaled = scaled<Ops>(t.arena, v, t.decay->to_end, rows, dim_v_);
      if (!outputs) scale_rows(t.local, t.decay->total, dim_k_, dim_v_);  // else current_state() has done it
      multiply_scaled<Ops>(t.local, k_left, v_scaled, dim_k_, dim_v_, rows);
      log_carry += t.decay->log_total;
      t.arena.release(mark);
    }
    return log_carry;
  }

  // Writes the outputs of a chunk. False if some of them are not finite.
  bool output(Thread& t, const Tokens& tokens, int64_t head, int64_t rows, Right kt, Rows<E> v, Right state) const {
    const size_t mark = t.arena.mark();
    const Decay<C>& decay = *t.decay;
    const bool has_state = state.data != nullptr;
    const Rows<E> q = load_rows<Ops, T>(t.arena, p_.q, tokens, head, p_.dim_k, rows, dim_k_, &t.rotation);
    const Left q_left = Ops::left(q);
    const Rows<C> scores = take_rows<C>(t.arena, kChunk, kChunk);
    const Rows<E> weights = take_rows<E>(t.arena, kChunk, kChunk);
    const Rows<C> o = take_rows<C>(t.arena, kChunk, dim_v_);
    constexpr int64_t step = Ops::kStep;
    if (has_state) {
      Ops::multiply(o.data, o.ld, q_left, state, rows, dim_v_, dim_k_, false);
      for (int64_t i = 0; i < rows; ++i) {
        C* row = o.row(i);
        for (int64_t n = 0; n < dim_v_; n += kLanes<C>) store<C>(row + n, decay.from_start[i] * load<C>(row + n));
      }
    }
    // Causal: rows [r, r + step) see tokens [0, r + step).
    const Right v_right = Ops::right(t.arena, v, rows, dim_v_);
    for (int64_t r = 0; r < rows; r += step) {
      Ops::multiply(scores.row(r), scores.ld, q_left.at(r, 0), kt, step, r + step, dim_k_, false);
      for (int64_t i = r; i < r + step; ++i) {
        for (int64_t j = 0; j < r + step; j += kLanes<C>) {
          Ops::put_elements(weights.row(i) + j, load<C>(scores.row(i) + j) * load<C>(decay.pair[i] + j));
        }
      }
      Ops::multiply(o.row(r), o.ld, Ops::left(weights).at(r, 0), v_right, step, dim_v_, r + step, has_state);
    }
    if (p_.o.data != nullptr) store_rows<C, T>(p_.o, tokens, head, p_.dim_v, o);
    if (p_.output_gate.data != nullptr) {
      const T* gate = element<T>(p_.output_gate, tokens.batch, tokens.begin, head);
      T* y = element<T>(p_.y, tokens.batch, tokens.begin, head);
      for (int64_t i = 0; i < tokens.length; ++i, gate += p_.output_gate.time_stride, y += p_.y.time_stride) {
        norm_and_gate<C>(o.row(i), gate, y, p_.dim_v, p_.norm_eps);
      }
    }
    t.arena.release(mark);
    return finite(o.data, tokens.length, dim_v_, o.ld);
  }

  // The causal mask is a factor 0 in a product, and 0 * NaN is NaN: a token that is not finite has reached the rows
  // before it in its chunk. Those are done again, from the chunk that ends where that token begins.
  void mend(Thread& t, const Tokens& tokens, int64_t head, int64_t rows, Rows<E> k, Rows<E> v, Right state) const {
    for (int64_t j = tokens.length - 1; j > 0; --j) {
      if (finite(k.row(j), 1, dim_k_, 0) && finite(v.row(j), 1, dim_v_, 0)) continue;
      const size_t mark = t.arena.mark();
      const Tokens before{tokens.batch, tokens.begin, j, tokens.position};
      const Rows<E> k_before = load_rows<Ops, T>(t.arena, p_.k, before, head, p_.dim_k, rows, dim_k_, &t.rotation);
      const Rows<E> v_before = load_rows<Ops, T>(t.arena, p_.v, before, head, p_.dim_v, rows, dim_v_);
      output(t, before, head, rows, Ops::right_transposed(t.arena, k_before, rows, dim_k_), v_before, state);
      t.arena.release(mark);
    }
  }

  template <class X>
  static bool finite(const X* x, int64_t rows, int64_t width, int64_t ld) {
    Vec<C> sum = {};  // of x - x: 0, or NaN
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t n = 0; n < width; n += kLanes<C>) {
        const Vec<C> y = load<C>(x + i * ld + n);
        sum += y - y;
      }
    }
    return sum_lanes<C>(sum) == 0;
  }

  // carry * start + local, as a right operand. On the way local decays to the end of the chunk.
  Right current_state(Thread& t, bool start_is_zero, C carry) const {
    const Right to = Ops::take_right(t.arena, dim_k_, dim_v_);
    const C total = t.decay->total;
    for (int64_t k = 0; k < dim_k_; k += 2) {
      C *a = t.local.row(k), *b = t.local.row(k + 1);
      const C *c = t.start.row(k), *d = t.start.row(k + 1);
      for (int64_t n = 0; n < dim_v_; n += kLanes<C>) {
        const Vec<C> x = load<C>(a + n), y = load<C>(b + n);
        if (start_is_zero) {
          Ops::put(to, k, n, x, y);
        } else {
          Ops::put(to, k, n, carry * load<C>(c + n) + x, carry * load<C>(d + n) + y);
        }
        store<C>(a + n, total * x);
        store<C>(b + n, total * y);
      }
    }
    return to;
  }

  const RetentionParams& p_;
  const Launch& launch_;
  const int64_t dim_k_, dim_v_;  // padded
  const int64_t state_size_;     // elements of a padded state
  const int64_t chunk_tokens_;   // at most
};

}  // namespace

const char* retention_forward(const RetentionParams& p, const Launch& launch) {
  return with_retention_types(p.dtype, p.gate_dtype, [&](auto t, auto g, auto ops) {
    return Forward<decltype(t), decltype(g), decltype(ops)>(p, launch).run();
  });
}

}  // namespace yoco::cpu::YOCO_ISA
