// Backward of gated retention. With dS the gradient of the state behind a chunk and S the state before it:
//   dQ = (dP * D) K + exp(b) dO S^T                 P = Q K^T, dP = dO V^T, D with the scale in it
//   dK = (dP * D)^T Q + exp(b_C - b) V dS^T
//   dV = (P * D)^T dO + exp(b_C - b) K dS
//   dS' = exp(b_C) dS + (Q * exp(b))^T dO
//   dg_t = sum of every product that decays through t; see chunk() and docs/cpu_retention.md
//
// Over segments of some chunks: first what each segment adds to S, and so the state before each; then, from the
// last segment to the first, the states before its chunks again, kept this time, and the gradients from its last chunk
// to its first. Inside a segment dS = carry * after + local: the decayed gradient of the state behind the segment, plus
// what the segment's own tokens added. Neither S nor `local` depends on anything outside the segment but the state at
// its border, so one thread walking through a sequence and many threads, each with a segment, compute the same bits.
// States are transposed here, [dim_v][dim_k]: of the products that read or make one, most then need no other layout.
#include "retention.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// The states of a segment's chunks are kept at once: as many as half an L2 cache holds. Less where only segments can
// feed the threads. Depends on the shape alone, so that results do not depend on the number of threads.
inline int64_t segment_chunks(int64_t streams, int64_t state_bytes) {
  return std::clamp<int64_t>((streams >= 8 ? 1 << 20 : 1 << 18) / state_bytes, 4, 64);
}

template <class T, class G, class Ops>
class Backward {
  using C = typename Ops::Compute;
  using E = typename Ops::Element;
  using Left = typename Ops::Left;
  using Right = typename Ops::Right;

 public:
  Backward(const RetentionBackwardParams& p, const Launch& launch)
      : p_(p),
        launch_(launch),
        dim_k_(round_up(p.dim_k, Ops::kStep)),
        dim_v_(round_up(p.dim_v, Ops::kStep)),
        ld_(dim_k_ + kRowPadBytes / static_cast<int64_t>(sizeof(C))),
        state_size_(dim_v_ * ld_),
        chunk_tokens_(std::min<int64_t>(kChunk, p.time)),
        segment_(segment_chunks(p.num_sequences * p.heads, state_size_ * static_cast<int64_t>(sizeof(C)))) {}

  const char* run() {
    zero_rest<T>(p_, p_.dq, p_.dim_k);
    zero_rest<T>(p_, p_.dk, p_.dim_k);
    zero_rest<T>(p_, p_.dv, p_.dim_v);
    zero_rest<G>(p_, p_.dg, 1);
    const int64_t streams = p_.num_sequences * p_.heads;
    if (streams == 0) return nullptr;
    pieces_ = count_segments(p_, segment_);
    const bool cut = worth_cutting(launch_, streams, pieces_);
    const int64_t matrices = cut ? 2 * pieces_ : pieces_;
    const Scratch memory(static_cast<size_t>(pieces_) * (sizeof(Segment) + 2 * sizeof(C)) +
                         static_cast<size_t>(matrices * state_size_) * sizeof(C) + 512);
    if (memory.template as<char>() == nullptr) return "gated_retention_backward: out of memory for the states";
    Arena arena(memory.template as<char>(), SIZE_MAX);
    segments_ = arena.take<Segment>(pieces_);
    carry_ = arena.take<C>(pieces_);
    d_carry_ = arena.take<C>(pieces_);
    states_ = arena.take<C>(pieces_ * state_size_);
    if (cut) d_states_ = arena.take<C>(pieces_ * state_size_);
    list_segments(p_, segment_, segments_);
    const auto make = [&] { return Thread(*this); };
    if (!cut) {
      run_tasks(launch_, pieces_, make, [&](Thread& t, int64_t i) {
        if (segments_[i].first == 0) walk(t, i);
      });
      return nullptr;
    }
    run_tasks(launch_, pieces_, make, [&](Thread& t, int64_t i) {
      sum_states(t, i);
      sum_d_states(t, i);
    });
    run_tasks(launch_, pieces_, make, [&](Thread& t, int64_t i) {
      if (segments_[i].first == 0) borders(t, i);
    });
    run_tasks(launch_, pieces_, make, [&](Thread& t, int64_t i) { gradients(t, i, d_state(i)); });
    return nullptr;
  }

 private:
  // What a thread owns.
  struct Thread {
    explicit Thread(const Backward& b)
        : arena(thread_memory(b.arena_bytes()), b.arena_bytes()), rotation(b.p_.rotary, b.chunk_tokens_, arena) {
      decay = arena.take<Decay<C>>(1);
      for (Rows<C>* s : {&sum, &local, &d_state}) *s = b.matrix(arena.take<C>(b.state_size_));
      before = arena.take<C>(b.segment_ * b.state_size_);
    }
    MatrixScope scope;
    Arena arena;
    ChunkRotation<C> rotation;
    Decay<C>* decay;
    Rows<C> sum;             // running over segments
    Rows<C> local, d_state;  // dS = carry * after + local
    C* before;               // the states before the chunks of a segment
  };

  size_t arena_bytes() const {
    const int64_t width = std::max<int64_t>({dim_k_, dim_v_, kChunk}) + kRowPadBytes;
    return sizeof(Decay<C>) + 16384 +
           sizeof(C) * static_cast<size_t>((segment_ + 6) * state_size_ + 28 * kChunk * width) +
           ChunkRotation<C>::bytes(p_.rotary, chunk_tokens_);
  }

  Rows<C> matrix(C* data) const { return {data, ld_}; }
  Rows<C> state(int64_t segment) const { return matrix(states_ + segment * state_size_); }
  Rows<C> d_state(int64_t segment) const { return matrix(d_states_ + segment * state_size_); }

  void clear(Rows<C> x) const { std::fill(x.data, x.data + state_size_, C(0)); }

  // The segments of one (sequence, head) follow each other.
  int64_t segments_end(int64_t first) const {
    int64_t last = first + 1;
    while (last < pieces_ && segments_[last].first != 0) ++last;
    return last;
  }

  int64_t state_offset(const Segment& s) const { return (s.sequence * p_.heads + s.head) * p_.dim_k * p_.dim_v; }

  // ---- one thread, the whole sequence
  void walk(Thread& t, int64_t first) const {
    const int64_t last = segments_end(first);
    load_transposed(t.sum, p_.initial_state, state_offset(segments_[first]));
    for (int64_t i = first; i < last; ++i) {
      if (i + 1 < last) sum_states(t, i);  // nobody asks for the state behind the last segment
      exchange(t.sum, state(i), i + 1 < last ? carry_[i] : C(0));
    }
    load_transposed(t.sum, p_.d_final_state, state_offset(segments_[first]));
    for (int64_t i = last - 1; i >= first; --i) {
      gradients(t, i, t.sum);
      for (int64_t r = 0; r < dim_v_; ++r) {
        C *to = t.sum.row(r), *from = t.local.row(r);
        for (int64_t n = 0; n < dim_k_; n += kLanes<C>) {
          store<C>(to + n, d_carry_[i] * load<C>(to + n) + load<C>(from + n));
        }
      }
    }
    store_d_initial_state(t.sum, segments_[first]);
  }

  // ---- what the tokens of a segment add to the state behind it, and to the gradient of the state before it
  void sum_states(Thread& t, int64_t i) const {
    const Segment& s = segments_[i];
    const Tokens sequence = sequence_tokens(p_, s.sequence);
    const Rows<C> to = state(i);
    clear(to);
    double log_carry = 0;
    for (int64_t c = s.first; c < s.last; ++c) log_carry += add_to_state(t, sequence, s.head, c, to);
    carry_[i] = static_cast<C>(std::exp(log_carry));
  }

  void sum_d_states(Thread& t, int64_t i) const {
    const Segment& s = segments_[i];
    const Tokens sequence = sequence_tokens(p_, s.sequence);
    const Rows<C> to = d_state(i);
    clear(to);
    double log_carry = 0;
    for (int64_t c = s.last - 1; c >= s.first; --c) log_carry += add_to_d_state(t, sequence, s.head, c, to);
    d_carry_[i] = static_cast<C>(std::exp(log_carry));
  }

  // S^T = exp(b_C) S^T + V^T (K * exp(b_C - b)). Returns b_C.
  double add_to_state(Thread& t, const Tokens& sequence, int64_t head, int64_t c, Rows<C> to) const {
    const size_t mark = t.arena.mark();
    const Tokens tokens = chunk_tokens(sequence, c);
    const int64_t rows = round_up(tokens.length, Ops::kStep);
    t.rotation.start(tokens.position, tokens.length);
    load_decay<C, G>(*t.decay, p_.g, tokens, head, static_cast<C>(p_.scale), static_cast<C>(p_.gate_normalizer), false);
    const Rows<E> k = load_rows<Ops, T>(t.arena, p_.k, tokens, head, p_.dim_k, rows, dim_k_, &t.rotation);
    const Rows<E> v = load_rows<Ops, T>(t.arena, p_.v, tokens, head, p_.dim_v, rows, dim_v_);
    const Left vt = Ops::left_transposed(t.arena, v, rows, dim_v_);
    scale_rows(to, t.decay->total, dim_v_, dim_k_);
    multiply_scaled<Ops>(to, vt, scaled<Ops>(t.arena, k, t.decay->to_end, rows, dim_k_), dim_v_, dim_k_, rows);
    t.arena.release(mark);
    return t.decay->log_total;
  }

  // dS^T = exp(b_C) dS^T + dO^T (Q * scale * exp(b)). Returns b_C.
  double add_to_d_state(Thread& t, const Tokens& sequence, int64_t head, int64_t c, Rows<C> to) const {
    const size_t mark = t.arena.mark();
    const Tokens tokens = chunk_tokens(sequence, c);
    const int64_t rows = round_up(tokens.length, Ops::kStep);
    t.rotation.start(tokens.position, tokens.length);
    load_decay<C, G>(*t.decay, p_.g, tokens, head, static_cast<C>(p_.scale), static_cast<C>(p_.gate_normalizer), false);
    const Rows<E> q = load_rows<Ops, T>(t.arena, p_.q, tokens, head, p_.dim_k, rows, dim_k_, &t.rotation);
    const Rows<E> d_o = load_rows<Ops, T>(t.arena, p_.d_o, tokens, head, p_.dim_v, rows, dim_v_);
    scale_rows(to, t.decay->total, dim_v_, dim_k_);
    add_queries(t, d_o, q, rows, to);
    t.arena.release(mark);
    return t.decay->log_total;
  }

  void add_queries(Thread& t, Rows<E> d_o, Rows<E> q, int64_t rows, Rows<C> to) const {
    const Left d_o_transposed = Ops::left_transposed(t.arena, d_o, rows, dim_v_);
    const Right q_scaled = scaled<Ops>(t.arena, q, t.decay->from_start, rows, dim_k_);
    multiply_scaled<Ops>(to, d_o_transposed, q_scaled, dim_v_, dim_k_, rows);
  }

  // ---- in place: the sum of a segment becomes the state before it, and the gradient of the state behind it
  void borders(Thread& t, int64_t first) const {
    const int64_t last = segments_end(first);
    load_transposed(t.sum, p_.initial_state, state_offset(segments_[first]));
    for (int64_t i = first; i < last; ++i) exchange(t.sum, state(i), carry_[i]);
    load_transposed(t.sum, p_.d_final_state, state_offset(segments_[first]));
    for (int64_t i = last - 1; i >= first; --i) exchange(t.sum, d_state(i), d_carry_[i]);
    store_d_initial_state(t.sum, segments_[first]);
  }

  // (running, piece) = (carry * running + piece, running)
  void exchange(Rows<C> running, Rows<C> piece, C carry) const {
    for (int64_t r = 0; r < dim_v_; ++r) {
      C *a = running.row(r), *b = piece.row(r);
      for (int64_t n = 0; n < dim_k_; n += kLanes<C>) {
        const Vec<C> old = load<C>(a + n);
        store<C>(a + n, carry * old + load<C>(b + n));
        store<C>(b + n, old);
      }
    }
  }

  void load_transposed(Rows<C> to, const void* states, int64_t offset) const {
    clear(to);
    if (states == nullptr) return;
    const C* from = static_cast<const C*>(states) + offset;
    for (int64_t r = 0; r < p_.dim_k; ++r) {
      for (int64_t n = 0; n < p_.dim_v; ++n) to.row(n)[r] = from[r * p_.dim_v + n];
    }
  }

  void store_d_initial_state(Rows<C> from, const Segment& s) const {
    if (p_.d_initial_state == nullptr) return;
    C* to = static_cast<C*>(p_.d_initial_state) + state_offset(s);
    for (int64_t r = 0; r < p_.dim_k; ++r) {
      for (int64_t n = 0; n < p_.dim_v; ++n) to[r * p_.dim_v + n] = from.row(n)[r];
    }
  }

  // ---- gradients of a segment; `after` is the gradient of the state behind it. Leaves local and d_carry_.
  void gradients(Thread& t, int64_t i, Rows<C> after) const {
    const Segment& s = segments_[i];
    const Tokens sequence = sequence_tokens(p_, s.sequence);
    const int64_t count = s.last - s.first;
    const auto before = [&](int64_t c) { return matrix(t.before + c * state_size_); };
    std::copy(state(i).data, state(i).data + state_size_, t.before);
    for (int64_t c = 0; c + 1 < count; ++c) {
      std::copy(before(c).data, before(c).data + state_size_, before(c + 1).data);
      add_to_state(t, sequence, s.head, s.first + c, before(c + 1));
    }
    clear(t.local);
    double log_carry = 0;
    for (int64_t c = count - 1; c >= 0; --c) {
      const C carry = static_cast<C>(std::exp(log_carry));
      log_carry += chunk(t, chunk_tokens(sequence, s.first + c), s.head, before(c), after, carry);
    }
    d_carry_[i] = static_cast<C>(std::exp(log_carry));
  }

  // The sums over a chunk that make up dg. The factor exp(g_t) decays
  //   every pair of a token j < t and a token i >= t inside the chunk:  rows - columns, summed over i >= t
  //   the state before the chunk on its way to a token i >= t:          state_to_row, summed over i >= t
  //   a token j < t on its way out of the chunk:                        row_to_state, summed over j < t
  //   the state on its way through the chunk:                           through
  // All are sums inside one chunk of float32 products: no difference of sums over the sequence, which would lose the
  // more digits the longer it is.
  struct GateSums {
    alignas(64) C rows[kChunk], columns[kChunk], state_to_row[kChunk], row_to_state[kChunk];
    C through;
  };

  // Gradients of one chunk; local goes from behind the chunk to before it. Returns b_C.
  double chunk(Thread& t, const Tokens& tokens, int64_t head, Rows<C> before, Rows<C> after, C carry) const {
    const size_t mark = t.arena.mark();
    constexpr int64_t step = Ops::kStep;
    const int64_t rows = round_up(tokens.length, step);
    t.rotation.start(tokens.position, tokens.length);
    const Decay<C>& decay = *t.decay;
    load_decay<C, G>(*t.decay, p_.g, tokens, head, static_cast<C>(p_.scale), static_cast<C>(p_.gate_normalizer), true);
    const Rows<E> q = load_rows<Ops, T>(t.arena, p_.q, tokens, head, p_.dim_k, rows, dim_k_, &t.rotation);
    const Rows<E> k = load_rows<Ops, T>(t.arena, p_.k, tokens, head, p_.dim_k, rows, dim_k_, &t.rotation);
    const Rows<E> v = load_rows<Ops, T>(t.arena, p_.v, tokens, head, p_.dim_v, rows, dim_v_);
    const Rows<E> d_o = load_rows<Ops, T>(t.arena, p_.d_o, tokens, head, p_.dim_v, rows, dim_v_);
    current_d_state(t, after, carry);
    const Rows<C> d_state = t.d_state;
    GateSums& sums = *t.arena.template take<GateSums>(1);

    // P * D and dP * D, on and below the diagonal.
    const Rows<C> p = take_rows<C>(t.arena, kChunk, kChunk), d_p = take_rows<C>(t.arena, kChunk, kChunk);
    const Rows<E> d_p_rows = take_rows<E>(t.arena, kChunk, kChunk);
    {
      const size_t inner = t.arena.mark();
      const Right kt = Ops::right_transposed(t.arena, k, rows, dim_k_);
      const Right vt = Ops::right_transposed(t.arena, v, rows, dim_v_);
      for (int64_t r = 0; r < rows; r += step) {
        Ops::multiply(p.row(r), p.ld, Ops::left(q).at(r, 0), kt, step, r + step, dim_k_, false);
        Ops::multiply(d_p.row(r), d_p.ld, Ops::left(d_o).at(r, 0), vt, step, r + step, dim_v_, false);
      }
      weigh(decay, rows, p, d_p, d_p_rows, sums);
      t.arena.release(inner);
    }

    const Rows<C> out = take_rows<C>(t.arena, kChunk, std::max(dim_k_, dim_v_));
    const size_t inner = t.arena.mark();
    {
      const Right state = state_operand(t, before, d_state, decay.total, &sums.through);
      Ops::multiply(out.data, out.ld, Ops::left(d_o), state, rows, dim_k_, dim_v_, false);
      finish_rows(out, decay.from_start, q, rows, dim_k_, sums.state_to_row);
      const Right k_right = Ops::right(t.arena, k, rows, dim_k_);
      for (int64_t r = 0; r < rows; r += step) {
        Ops::multiply(out.row(r), out.ld, Ops::left(d_p_rows).at(r, 0), k_right, step, dim_k_, r + step, true);
      }
      store_rows<C, T>(p_.dq, tokens, head, p_.dim_k, out, &t.rotation);
      t.arena.release(inner);
    }
    {
      const Right d_right = state_operand(t, d_state, d_state, C(0), nullptr);
      Ops::multiply(out.data, out.ld, Ops::left(v), d_right, rows, dim_k_, dim_v_, false);
      finish_rows(out, decay.to_end, k, rows, dim_k_, sums.row_to_state);
      const Right q_right = Ops::right(t.arena, q, rows, dim_k_);
      add_from_later_rows(t, out, d_p, q_right, rows, dim_k_);
      store_rows<C, T>(p_.dk, tokens, head, p_.dim_k, out, &t.rotation);
      t.arena.release(inner);
    }
    {
      const Rows<E> d_rows = Ops::elements(t.arena, d_state.data, d_state.ld, dim_v_, dim_k_);
      const Right d_right = Ops::right_transposed(t.arena, d_rows, dim_v_, dim_k_);
      Ops::multiply(out.data, out.ld, Ops::left(k), d_right, rows, dim_v_, dim_k_, false);
      finish_rows(out, decay.to_end, v, rows, dim_v_, nullptr);
      const Right d_o_right = Ops::right(t.arena, d_o, rows, dim_v_);
      add_from_later_rows(t, out, p, d_o_right, rows, dim_v_);
      store_rows<C, T>(p_.dv, tokens, head, p_.dim_v, out);
      t.arena.release(inner);
    }
    add_queries(t, d_o, q, rows, t.local);
    store_gate_gradient(tokens, head, sums);
    t.arena.release(mark);
    return decay.log_total;
  }

  // d_state = carry * after + local; local decays to the start of the chunk.
  void current_d_state(Thread& t, Rows<C> after, C carry) const {
    const C total = t.decay->total;
    for (int64_t r = 0; r < dim_v_; ++r) {
      C *to = t.d_state.row(r), *local = t.local.row(r);
      const C* far = after.row(r);
      for (int64_t n = 0; n < dim_k_; n += kLanes<C>) {
        const Vec<C> x = load<C>(local + n);
        store<C>(to + n, carry * load<C>(far + n) + x);
        store<C>(local + n, total * x);
      }
    }
  }

  // p *= D, d_p *= D (also as elements), and the row and column sums of p * dP * D off the diagonal.
  static void weigh(const Decay<C>& decay, int64_t rows, Rows<C> p, Rows<C> d_p, Rows<E> d_p_rows, GateSums& sums) {
    constexpr int64_t step = Ops::kStep, lanes = kLanes<C>;
    Vec<C> index;
    for (int i = 0; i < lanes; ++i) index[i] = static_cast<C>(i);
    std::fill(sums.columns, sums.columns + kChunk, C(0));
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t end = i / step * step + step;
      Vec<C> sum = {};
      for (int64_t j = 0; j < end; j += lanes) {
        const Vec<C> d = load<C>(decay.pair[i] + j), raw = load<C>(p.row(i) + j);
        const Vec<C> weighed = d * load<C>(d_p.row(i) + j);
        store<C>(p.row(i) + j, d * raw);
        store<C>(d_p.row(i) + j, weighed);
        Ops::put_elements(d_p_rows.row(i) + j, weighed);
        const Vec<C> product = index == static_cast<C>(i - j) ? Vec<C>{} : weighed * raw;
        sum += product;
        store<C>(sums.columns + j, load<C>(sums.columns + j) + product);
      }
      sums.rows[i] = sum_lanes<C>(sum);
      for (int64_t j = end; j < rows; j += lanes) {  // the transposes below read whole squares
        store<C>(p.row(i) + j, Vec<C>{});
        store<C>(d_p.row(i) + j, Vec<C>{});
      }
    }
  }

  // A transposed state as a right operand; on the way total * <other, state>.
  Right state_operand(Thread& t, Rows<C> state, Rows<C> other, C total, C* through) const {
    const Right to = Ops::take_right(t.arena, dim_v_, dim_k_);
    Vec<C> sum = {};
    for (int64_t r = 0; r < dim_v_; r += 2) {
      const C *a = state.row(r), *b = state.row(r + 1), *c = other.row(r), *d = other.row(r + 1);
      for (int64_t n = 0; n < dim_k_; n += kLanes<C>) {
        const Vec<C> x = load<C>(a + n), y = load<C>(b + n);
        Ops::put(to, r, n, x, y);
        if (through != nullptr) sum += x * load<C>(c + n) + y * load<C>(d + n);
      }
    }
    if (through != nullptr) *through = total * sum_lanes<C>(sum);
    return to;
  }

  // Each row times its factor; dots[i] = <row i, x_i> of the result, if wanted.
  static void finish_rows(Rows<C> out, const C* factor, Rows<E> x, int64_t rows, int64_t width, C* dots) {
    for (int64_t i = 0; i < rows; ++i) {
      C* row = out.row(i);
      const E* other = x.row(i);
      Vec<C> sum = {};
      for (int64_t n = 0; n < width; n += kLanes<C>) {
        const Vec<C> y = factor[i] * load<C>(row + n);
        store<C>(row + n, y);
        if (dots != nullptr) sum += y * load<C>(other + n);
      }
      if (dots != nullptr) dots[i] = sum_lanes<C>(sum);
    }
  }

  // out += weights^T right: row j takes from the tokens i >= j.
  static void add_from_later_rows(Thread& t, Rows<C> out, Rows<C> weights, Right right, int64_t rows, int64_t width) {
    constexpr int64_t step = Ops::kStep;
    const Left left = Ops::square_transposed(t.arena, weights.data, weights.ld, rows);
    for (int64_t r = 0; r < rows; r += step) {
      Ops::multiply(out.row(r), out.ld, left.at(r, r), right.at(r), step, width, rows - r, true);
    }
  }

  void store_gate_gradient(const Tokens& tokens, int64_t head, const GateSums& sums) const {
    alignas(64) double later[kChunk];
    double sum = 0;
    for (int64_t i = tokens.length - 1; i >= 0; --i) {
      sum += static_cast<double>(sums.rows[i]) - sums.columns[i] + sums.state_to_row[i];
      later[i] = sum;
    }
    double earlier = sums.through;
    for (int64_t i = 0; i < tokens.length; ++i) {
      double gradient = later[i] + earlier;
      if (p_.gate_normalizer > 0) {  // of the logit: times the slope of logsigmoid
        const double x = static_cast<double>(to_float(*element<G>(p_.g, tokens.batch, tokens.begin + i, head)));
        gradient /= p_.gate_normalizer * (1 + std::exp(x));
      }
      from_float(static_cast<C>(gradient), element<G>(p_.dg, tokens.batch, tokens.begin + i, head));
      earlier += sums.row_to_state[i];
    }
  }

  const RetentionBackwardParams& p_;
  const Launch& launch_;
  const int64_t dim_k_, dim_v_;  // padded
  const int64_t ld_, state_size_;
  const int64_t chunk_tokens_;  // at most
  const int64_t segment_;       // chunks
  int64_t pieces_ = 0;
  Segment* segments_ = nullptr;
  C *carry_ = nullptr, *d_carry_ = nullptr;  // exp of the sum of g over a segment, summed forwards and backwards
  C* states_ = nullptr;                      // per segment [dim_v][ld]: its own sum, then the state before it
  C* d_states_ = nullptr;                    // the same of the gradient: its own sum, then the gradient behind it
};

}  // namespace

const char* retention_backward(const RetentionBackwardParams& p, const Launch& launch) {
  return with_retention_types(p.dtype, p.gate_dtype, [&](auto t, auto g, auto ops) {
    return Backward<decltype(t), decltype(g), decltype(ops)>(p, launch).run();
  });
}

}  // namespace yoco::cpu::YOCO_ISA
