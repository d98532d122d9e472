// What one thread does in a decode call: it takes tasks (decode_plan.h: one split of one sequence) and walks through
// their tokens in steps of kStep, over all the task's KV heads in each step, because the heads of a token lie side by
// side in memory; meanwhile the next step is prefetched. Each task leaves an unnormalised accumulator, the maximum and
// the sum of its softmax.
#pragma once

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

constexpr int64_t kLeadLines =
    512;  // 32 KB: later than this, memory is slower than the arithmetic; earlier gains nothing

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
    scores_ = reinterpret_cast<C*>(take(heads * acc_rows_ * kStep * sizeof(C)));
    slopes_ = reinterpret_cast<C*>(take(p.heads_q * sizeof(C)));
    edge_ = reinterpret_cast<C*>(take(group_ * partials.stride * sizeof(C)));
    prefetcher_.set_storage(reinterpret_cast<Prefetcher::Run*>(take(run_bytes())));
    products_.set_scratch(take(products_.scratch_bytes()), &prefetcher_);
    for (int64_t d = 0; d < p.dim_v; ++d) column_[d] = static_cast<int32_t>(Products::column(d));
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
           rounded(heads * rows_ * sizeof(RowState<C>)) + rounded(heads * acc_rows_ * kStep * sizeof(C)) +
           rounded(p_.heads_q * sizeof(C)) + rounded(group_ * partials_.stride * sizeof(C)) + rounded(run_bytes()) +
           rounded(products_.scratch_bytes());
  }
  int64_t run_bytes() const { return Prefetcher::most_runs(plan_.heads_per_task()) * sizeof(Prefetcher::Run); }

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
    const int64_t heads = t.head_end - t.head_begin, k_head = segment.k_head_bytes(), v_head = segment.v_head_bytes();
    plan_prefetch(t, now, next);
    constexpr int64_t kPiece = Products::kPiece;
    const int64_t together = Products::kStreams ? heads : 1;
    const char* rows[kStep];
    for (int64_t begin = 0; begin < heads; begin += together) {
      const int64_t end = begin + together;
      if (same && !Products::kStreams) {
        rows_of_head(now, now.v, (t.head_begin + begin) * v_head, 0, kStep, rows);
        products_.stage(rows);
      }
      for (int64_t j = now.first / kPiece * kPiece; j < now.last; j += kPiece) {
        for (int64_t h = begin; h < end; ++h) {
          rows_of_head(now, now.k, (t.head_begin + h) * k_head, j, kPiece, rows);
          products_.score(q_ + h * products_.q_bytes(), rows, now.last - j, scores_of(h) + j);
        }
      }
      for (int64_t h = begin; h < end; ++h) update_softmax(t, now, ranges, h);
      if (!same) {
        for (int64_t h = begin; h < end; ++h) {
          rows_of_head(now, now.v, (t.head_begin + h) * v_head, 0, kStep, rows);
          weigh_by_token(ranges, h, rows);
        }
        continue;
      }
      for (int64_t j = now.first / kPiece * kPiece; j < now.last; j += kPiece) {
        for (int64_t h = begin; h < end; ++h) {
          rows_of_head(now, now.v, (t.head_begin + h) * v_head, j, kPiece, rows);
          products_.weigh(scores_of(h) + j, rows, now.last - j, acc_of(h), partials_.stride);
        }
      }
    }
  }

  C* acc_of(int64_t h) const { return acc_ + h * acc_rows_ * partials_.stride; }
  C* scores_of(int64_t h) const { return scores_ + h * acc_rows_ * kStep; }

  void update_softmax(const Task& t, const StepRows& now, const KeyRange* ranges, int64_t h) {
    const Logits<C> logits = logits_of(t.head_begin + h);
    const int64_t diagonal = p_.seqused_k[t.sequence] - p_.time_q - now.position;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t time = r / group_;
      C* scores = scores_of(h) + r * kStep;
      if (ranges[time].begin >= ranges[time].end) {
        std::memset(scores, 0, kStep * sizeof(C));
        continue;
      }
      const C slope = logits.slopes != nullptr ? logits.slopes[r % group_] : C{0};
      const C decay = softmax_row<C>(scores, ranges[time].begin, ranges[time].end, logits, slope, diagonal + time,
                                     state_ + h * rows_ + r);
      if (decay != C{1}) {
        C* row = acc_of(h) + r * partials_.stride;
        for (int64_t d = 0; d < partials_.stride; ++d) row[d] *= decay;
      }
    }
  }

  // A value that some row must not see may be NaN, and 0 * NaN is NaN: each query token reads its own values only.
  void weigh_by_token(const KeyRange* ranges, int64_t h, const char* const* v) {
    for (int64_t i = 0; i < p_.time_q; ++i) {
      if (ranges[i].begin >= ranges[i].end) continue;
      for (int64_t d = 0; d < group_ * partials_.stride; ++d) edge_[d] = 0;
      weigh_all<C, Cache>(v, ranges[i].begin, ranges[i].end, scores_of(h) + i * group_ * kStep, group_, edge_,
                          partials_.stride, p_.dim_v, Drip{nullptr, 0});
      for (int64_t g = 0; g < group_; ++g) {
        C* row = acc_of(h) + (i * group_ + g) * partials_.stride;
        for (int64_t d = 0; d < p_.dim_v; ++d) row[column_[d]] += edge_[g * partials_.stride + d];
      }
    }
  }

  // Rows [begin, begin + count) of a step for the head at `offset`.
  static void rows_of_head(const StepRows& step, const char* const* rows, int64_t offset, int64_t begin, int64_t count,
                           const char** out) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = begin + i;
      out[i] = j >= step.first && j < step.last ? rows[j] + offset : kZeroRow;
    }
  }

  Logits<C> logits_of(int64_t head) const {
    const double scale = p_.scale * (!plan_.latents() && p_.k_scale != nullptr ? p_.k_scale[head] : 1.0);
    Logits<C> l;
    l.factor = static_cast<C>(p_.softcap > 0 ? scale / p_.softcap : scale * kLog2E);
    l.softcap = static_cast<C>(p_.softcap * kLog2E);
    l.slopes = p_.alibi_slopes != nullptr && !plan_.latents() ? slopes_ + head * group_ : nullptr;
    return l;
  }

  // Streaming products read K and V of this step in order, kLeadLines behind the prefetcher; the others have this step
  // in L2 already and fetch the whole next one (which may be that of the next task).
  void plan_prefetch(const Task& t, const StepRows& now, const StepRows& next) {
    const int64_t k_bytes = p_.dim_qk * sizeof(Cache), v_bytes = p_.dim_v * sizeof(Cache);
    const Segment segment = segment_of(t);
    const int64_t k_head = segment.k_head_bytes(), v_head = segment.v_head_bytes();
    prefetcher_.clear();
    if (Products::kStreams) {
      list_rows(t, now, now.k, k_head, k_bytes);
      list_rows(t, now, now.v, v_head, v_bytes);
    }
    const int64_t here = prefetcher_.lines();
    list_rows(current_, next, next.k, k_head, k_bytes);
    if (!Products::kStreams) list_rows(current_, next, next.v, v_head, v_bytes);
    const int64_t pulls = (t.head_end - t.head_begin) * products_.pulls_per_head();
    if (Products::kStreams && running_) {
      prefetcher_.skip(kLeadLines);
    } else if (Products::kStreams) {
      prefetcher_.set_quota(kLeadLines);
      prefetcher_.pull();
      running_ = true;
    }
    prefetcher_.set_quota(((Products::kStreams ? here : prefetcher_.lines()) + pulls - 1) / pulls);
  }

  // In the order in which pieces of tokens are read.
  void list_rows(const Task& t, const StepRows& step, const char* const* rows, int64_t head_bytes, int64_t row_bytes) {
    const bool adjacent = head_bytes == row_bytes;  // all heads of a token in one run
    const int64_t runs = adjacent ? 1 : t.head_end - t.head_begin;
    const int64_t bytes = adjacent ? row_bytes * (t.head_end - t.head_begin) : row_bytes;
    for (int64_t j = step.first; j < step.last; j += Products::kPiece) {
      const int64_t end = j + Products::kPiece < step.last ? j + Products::kPiece : step.last;
      for (int64_t h = 0; h < runs; ++h) {
        for (int64_t i = j; i < end; ++i) prefetcher_.add(rows[i] + (t.head_begin + h) * head_bytes, bytes);
      }
    }
  }

  void finish(const Task& t) {
    for (int64_t h = 0; h < t.head_end - t.head_begin; ++h) {
      const int64_t head = t.head_begin + h;
      const C scale = !plan_.latents() && p_.v_scale != nullptr ? static_cast<C>(p_.v_scale[head]) : C{1};
      const C* acc = acc_ + h * acc_rows_ * partials_.stride;
      C* out = partials_.acc_of(t.slot, head);
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t d = 0; d < p_.dim_v; ++d)
          out[r * partials_.stride + d] = acc[r * partials_.stride + column_[d]] * scale;
      }
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
  C* edge_ = nullptr;             // [group][padded dim_v]
  int32_t column_[256];           // where the products accumulate a component of v
  Prefetcher prefetcher_;
  bool running_ = false;
  StepRows rows_of_step_[2];
  int parity_ = 0;
  Task current_;
};

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
