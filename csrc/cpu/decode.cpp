// Few query tokens against a long cache: split-KV attention that reads K and V once for all query rows that share them.
//
// A task is one split of one sequence (decode_plan.h). It walks through its tokens in steps of kStep, over all its KV
// heads in each step, because the heads of a token lie side by side in memory; meanwhile the next step is prefetched.
// Each task leaves an unnormalised accumulator, the maximum and the sum of its softmax; these are merged in order.
#include <atomic>

#include "decode_amx.h"
#include "decode_step.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// [slot][heads_kv][rows]: what tasks leave behind.
template <class C>
struct Partials {
  int64_t heads, rows, stride;  // stride: padded dim_v
  C* acc;
  RowState<C>* state;

  C* acc_of(int64_t slot, int64_t head) const { return acc + (slot * heads + head) * rows * stride; }
  RowState<C>* state_of(int64_t slot, int64_t head) const { return state + (slot * heads + head) * rows; }
};

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

alignas(64) const char kZeroRow[256 * 8] = {};  // stands in for tokens that are not there

// The part of one thread: walks through the steps of its tasks. Cache: what the plan's segment stores.
template <class Q, class Cache, class Products>
class Worker {
  using C = Compute<Q>;

 public:
  Worker(const DecodeParams& p, const Plan& plan, const Partials<C>& partials)
      : p_(p),
        plan_(plan),
        partials_(partials),
        group_(p.heads_q / p.heads_kv),
        rows_(group_ * p.time_q),
        products_(rows_, p.dim_qk, p.dim_v),
        acc_rows_(products_.padded_rows()),
        scratch_(bytes()) {
    char* at = scratch_.as<char>();
    const auto take = [&](int64_t bytes) {
      char* here = at;
      at += rounded(bytes);
      return here;
    };
    if (failed()) return;
    const int64_t heads = plan.heads_per_task();
    q_ = take(heads * products_.q_bytes());
    std::memset(q_, 0, heads * products_.q_bytes());  // the padding stays zero
    acc_ = reinterpret_cast<C*>(take(heads * acc_rows_ * partials.stride * sizeof(C)));
    state_ = reinterpret_cast<RowState<C>*>(take(heads * rows_ * sizeof(RowState<C>)));
    scores_ = reinterpret_cast<C*>(take(acc_rows_ * kStep * sizeof(C)));
    slopes_ = reinterpret_cast<C*>(take(p.heads_q * sizeof(C)));
    products_.set_scratch(take(products_.scratch_bytes()));
  }

  bool failed() const { return scratch_.failed(bytes()); }

  void run(std::atomic<int64_t>* next_task) {
    products_.begin();
    int64_t index = next_task->fetch_add(1, std::memory_order_relaxed);
    if (index < plan_.tasks()) enter(plan_.find(index));
    while (index < plan_.tasks()) {
      const Task task = current_;
      const int64_t following = next_task->fetch_add(1, std::memory_order_relaxed);
      start(task);
      for (int64_t position = task.begin / kStep * kStep; position < task.end; position += kStep) {
        const StepRows& now = rows_of_step_[parity_];
        StepRows* next = &rows_of_step_[parity_ ^ 1];
        next->first = next->last = 0;
        if (position + kStep < task.end) {
          segment_of(task).rows(position + kStep, task.begin, task.end, next);
        } else if (following < plan_.tasks()) {
          enter(plan_.find(following), parity_ ^ 1);
        }
        step(task, now, *next);
        parity_ ^= 1;
      }
      finish(task);
      index = following;
    }
    products_.end();
  }

 private:
  int64_t bytes() const {
    const int64_t heads = plan_.heads_per_task();
    return rounded(heads * products_.q_bytes()) + rounded(heads * acc_rows_ * partials_.stride * sizeof(C)) +
           rounded(heads * rows_ * sizeof(RowState<C>)) + rounded(acc_rows_ * kStep * sizeof(C)) +
           rounded(p_.heads_q * sizeof(C)) + rounded(products_.scratch_bytes());
  }

  Segment segment_of(const Task& t) const { return Segment(p_, t.sequence, plan_.latents(), int64_t{sizeof(Cache)}); }

  // Makes `t` the task to do next and finds the rows of its first step.
  void enter(const Task& t, int parity) {
    current_ = t;
    segment_of(t).rows(t.begin / kStep * kStep, t.begin, t.end, &rows_of_step_[parity]);
  }
  void enter(const Task& t) { enter(t, parity_); }

  const Q* query(const Task& t, int64_t head, int64_t row) const {
    return static_cast<const Q*>(p_.q.data) + t.sequence * p_.q.batch_stride + row / group_ * p_.q.time_stride +
           (head * group_ + row % group_) * p_.q.head_stride;
  }

  void start(const Task& t) {
    const int64_t heads = t.head_end - t.head_begin;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < rows_; ++r) {
        products_.pack_q(q_ + h * products_.q_bytes(), r, query(t, t.head_begin + h, r));
      }
    }
    for (int64_t i = 0; i < heads * acc_rows_ * partials_.stride; ++i) acc_[i] = 0;
    for (int64_t i = 0; i < heads * rows_; ++i) state_[i] = RowState<C>{static_cast<C>(-INFINITY), 0};
    if (p_.alibi_slopes != nullptr) {
      const float* slopes = p_.alibi_slopes + t.sequence * p_.alibi_batch_stride;
      for (int64_t h = 0; h < p_.heads_q; ++h) slopes_[h] = static_cast<C>(slopes[h] * kLog2E);
    }
  }

  // Entries [begin, end) of the step that query token `time` sees.
  KeyRange seen(const Task& t, const StepRows& step, int64_t time) const {
    KeyRange r{step.first, step.last};
    if (plan_.latents()) return r;
    const KeyRange w =
        window_range(p_.mask.window_left, p_.mask.window_right, time, p_.time_q, p_.seqused_k[t.sequence]);
    r.begin = clamp_index(w.begin - step.position, step.first, step.last);
    r.end = clamp_index(w.end - step.position, r.begin, step.last);
    return r;
  }

  void step(const Task& t, const StepRows& now, const StepRows& next) {
    KeyRange ranges[16];
    bool same = true;  // every query token sees every token of this step
    for (int64_t i = 0; i < p_.time_q; ++i) {
      ranges[i] = seen(t, now, i);
      same = same && ranges[i].begin == now.first && ranges[i].end == now.last;
    }
    const Segment segment = segment_of(t);
    const int64_t heads = t.head_end - t.head_begin;
    const int64_t diagonal = p_.seqused_k[t.sequence] - p_.time_q - now.position;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t head = t.head_begin + h;
      prefetch(next, h * (next.last - next.first) / heads, (h + 1) * (next.last - next.first) / heads);
      const char *k[kStep], *v[kStep];
      rows_of_head(now, now.k, head * segment.k_head_bytes(), k);
      rows_of_head(now, now.v, head * segment.v_head_bytes(), v);
      C* acc = acc_ + h * acc_rows_ * partials_.stride;

      products_.score(q_ + h * products_.q_bytes(), k, now.first, now.last, scores_);
      const Logits<C> logits = logits_of(head);
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t time = r / group_;
        RowState<C>* state = state_ + h * rows_ + r;
        if (ranges[time].begin >= ranges[time].end) {
          std::memset(scores_ + r * kStep, 0, kStep * sizeof(C));
          continue;
        }
        const C slope = logits.slopes != nullptr ? logits.slopes[r % group_] : C{0};
        const C decay = softmax_row<C>(scores_ + r * kStep, ranges[time].begin, ranges[time].end, logits, slope,
                                       diagonal + time, state);
        if (decay != C{1}) {
          C* row = acc + r * partials_.stride;
          for (int64_t d = 0; d < partials_.stride; ++d) row[d] *= decay;
        }
      }
      if (same) {
        products_.weigh(scores_, v, now.first, now.last, acc, partials_.stride);
        continue;
      }
      // A value that some row must not see may be NaN, and 0 * NaN is NaN: each query token reads its own values only.
      for (int64_t i = 0; i < p_.time_q; ++i) {
        weigh_all<C, Cache>(v, ranges[i].begin, ranges[i].end, scores_ + i * group_ * kStep, group_,
                            acc + i * group_ * partials_.stride, partials_.stride, p_.dim_v);
      }
    }
  }

  static void rows_of_head(const StepRows& step, const char* const* rows, int64_t offset, const char** out) {
    for (int64_t i = 0; i < kStep; ++i) out[i] = i >= step.first && i < step.last ? rows[i] + offset : kZeroRow;
  }

  Logits<C> logits_of(int64_t head) const {
    const double scale = p_.scale * (!plan_.latents() && p_.k_scale != nullptr ? p_.k_scale[head] : 1.0);
    Logits<C> l;
    l.factor = static_cast<C>(p_.softcap > 0 ? scale / p_.softcap : scale * kLog2E);
    l.softcap = static_cast<C>(p_.softcap * kLog2E);
    l.slopes = p_.alibi_slopes != nullptr && !plan_.latents() ? slopes_ + head * group_ : nullptr;
    return l;
  }

  // Entries [begin, end) behind next.first: one piece of the next step per head of this one, so that memory never
  // waits for arithmetic. The next step may already be that of the next task.
  void prefetch(const StepRows& next, int64_t begin, int64_t end) const {
    const Task& t = current_;
    const Segment segment = segment_of(t);
    for (int64_t i = next.first + begin; i < next.first + end; ++i) {
      for (int64_t h = t.head_begin; h < t.head_end; ++h) {
        const char* k = next.k[i] + h * segment.k_head_bytes();
        const char* v = next.v[i] + h * segment.v_head_bytes();
        for (int64_t byte = 0; byte < p_.dim_qk * int64_t{sizeof(Cache)}; byte += 64)
          __builtin_prefetch(k + byte, 0, 2);
        for (int64_t byte = 0; byte < p_.dim_v * int64_t{sizeof(Cache)}; byte += 64) __builtin_prefetch(v + byte, 0, 2);
      }
    }
  }

  void finish(const Task& t) {
    for (int64_t h = 0; h < t.head_end - t.head_begin; ++h) {
      const int64_t head = t.head_begin + h;
      const C scale = !plan_.latents() && p_.v_scale != nullptr ? static_cast<C>(p_.v_scale[head]) : C{1};
      const C* acc = acc_ + h * acc_rows_ * partials_.stride;
      C* out = partials_.acc_of(t.slot, head);
      for (int64_t i = 0; i < rows_ * partials_.stride; ++i) out[i] = acc[i] * scale;
      std::memcpy(partials_.state_of(t.slot, head), state_ + h * rows_, rows_ * sizeof(RowState<C>));
    }
  }

  const DecodeParams& p_;
  const Plan& plan_;
  const Partials<C>& partials_;
  const int64_t group_, rows_;
  Products products_;
  const int64_t acc_rows_;
  Scratch scratch_;
  char* q_ = nullptr;             // [heads of the task] packed queries
  C* acc_ = nullptr;              // [heads of the task][padded rows][padded dim_v]
  RowState<C>* state_ = nullptr;  // [heads of the task][rows]
  C* scores_ = nullptr;           // [padded rows][kStep]: scores, then weights
  C* slopes_ = nullptr;           // [heads_q], base 2
  StepRows rows_of_step_[2];
  int parity_ = 0;
  Task current_;
};

// The tasks of one segment and what they leave behind.
template <class C>
struct Pass {
  Plan plan;
  Partials<C> partials;
  size_t count, acc_bytes;
  Scratch scratch;

  Pass(const DecodeParams& p, bool latents, int64_t element_size, int num_threads)
      : plan(p, latents, element_size, num_threads),
        partials{p.heads_kv, p.heads_q / p.heads_kv * p.time_q, (p.dim_v + 31) / 32 * 32, nullptr, nullptr},
        count(plan.slots() * p.heads_kv * partials.rows),
        acc_bytes(rounded(count * partials.stride * sizeof(C))),
        scratch(bytes()) {
    partials.acc = scratch.template as<C>();
    partials.state = scratch.template as<RowState<C>>(acc_bytes);
  }
  size_t bytes() const { return acc_bytes + count * sizeof(RowState<C>); }

  // False when memory ran out.
  template <class Q, class Cache, class Products>
  bool run(const DecodeParams& p, const Launch& launch) {
    if (scratch.failed(bytes())) return false;
    std::atomic<int64_t> next_task{0};
    std::atomic<bool> complete{true};
    const int64_t threads = launch.num_threads < plan.tasks() ? launch.num_threads : plan.tasks();
    parallel(launch, threads, 1, [&](int64_t, int64_t) {
      Worker<Q, Cache, Products> worker(p, plan, partials);
      if (worker.failed()) {
        complete = false;
      } else {
        worker.run(&next_task);
      }
    });
    return complete;
  }
};

// out = sum of the splits' accumulators, each weighed by its share of the softmax, for all query rows of one KV head.
template <class Q>
void merge(const DecodeParams& p, const Pass<Compute<Q>>* const* passes, int64_t b, int64_t head) {
  using C = Compute<Q>;
  constexpr C kInfinity = static_cast<C>(INFINITY);
  const int64_t group = p.heads_q / p.heads_kv, rows = group * p.time_q, stride = passes[0]->partials.stride;
  alignas(64) C total[256];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t time = r / group, head_q = head * group + r % group;
    const auto for_each_split = [&](const auto& f) {
      for (int i = 0; i < 2; ++i) {
        const Pass<C>& pass = *passes[i];
        for (int64_t s = pass.plan.slots_begin(b); s < pass.plan.slots_end(b); ++s) {
          f(pass.partials.state_of(s, head)[r], pass.partials.acc_of(s, head) + r * stride);
        }
      }
    };
    const C sink = p.sinks != nullptr ? static_cast<C>(p.sinks[head_q] * kLog2E) : -kInfinity;
    C max = sink;
    for_each_split([&](RowState<C> state, const C*) { max = max > state.max ? max : state.max; });
    const C base = max == -kInfinity ? C{0} : max;
    C sum = p.sinks != nullptr ? static_cast<C>(std::exp2(sink - base)) : C{0};
    for (int64_t d = 0; d < stride; ++d) total[d] = 0;
    for_each_split([&](RowState<C> state, const C* acc) {
      if (state.sum == 0) return;  // saw nothing
      const C share = static_cast<C>(std::exp2(state.max - base));
      sum += state.sum * share;
      for (int64_t d = 0; d < stride; ++d) total[d] += acc[d] * share;
    });
    const C inverse = sum == 0 ? C{0} : 1 / sum;
    Q* out =
        static_cast<Q*>(p.out.data) + b * p.out.batch_stride + time * p.out.time_stride + head_q * p.out.head_stride;
    for_each_vector<C>(p.dim_v, [&](auto io) { io.store(out, io.load(total) * inverse); });
    const C lse = sum == 0 ? -kInfinity : static_cast<C>((max + std::log2(sum)) * kLn2);
    static_cast<C*>(p.lse)[(b * p.heads_q + head_q) * p.time_q + time] = lse;
  }
}

template <class Q, class Cache>
using ProductsFor =
#if YOCO_HAS_AMX
    std::conditional_t<std::is_same_v<Q, BFloat16>, TileProducts<Cache>, VectorProducts<Compute<Q>, Cache>>;
#else
    VectorProducts<Compute<Q>, Cache>;
#endif

template <class Q, class Cache>
const char* run(const DecodeParams& p, const Launch& launch) {
  using C = Compute<Q>;
  Pass<C> cache(p, false, sizeof(Cache), launch.num_threads), latents(p, true, sizeof(Q), launch.num_threads);
  if (!cache.template run<Q, Cache, ProductsFor<Q, Cache>>(p, launch)) return "out of memory";
  if (!latents.template run<Q, Q, ProductsFor<Q, Q>>(p, launch)) return "out of memory";
  const Pass<C>* passes[2] = {&cache, &latents};
  const int64_t splits = 1 + (cache.plan.slots() + latents.plan.slots()) / (p.batch + 1);
  const int64_t work = cache.partials.rows * cache.partials.stride * splits;  // of one (sequence, KV head)
  parallel(launch, p.batch * p.heads_kv, 1 + 16384 / (work + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) merge<Q>(p, passes, i / p.heads_kv, i % p.heads_kv);
  });
  return nullptr;
}

}  // namespace

const char* decode(const DecodeParams& p, const Launch& launch) {
  if (const char* error = check_decode(p)) return error;
  return with_float_type(p.dtype, [&](auto type) -> const char* {
    using Q = decltype(type);
    if (p.cache_dtype == p.dtype) return run<Q, Q>(p, launch);
    if (p.cache_dtype == DType::kInt8) return run<Q, int8_t>(p, launch);
    if (p.cache_dtype == DType::kFloat8E4M3) return run<Q, Float8>(p, launch);
    return "k_cache must have the dtype of q, float8_e4m3fn or int8";
  });
}

}  // namespace yoco::cpu::YOCO_ISA
