// Attention backward: one pass over the visible tiles, five products per tile, every gradient owned by one task.
//
// A task owns a run of key blocks of one KV head: dK and dV are finished there. dQ collects contributions from every
// task of its head, each in its own buffer, added in a fixed order at the end: results do not depend on the threads.
// Tiles are kept transposed, [keys, rows], so that P^T and dS^T are at once the left operands of dV and dK; dQ is
// accumulated transposed with dS^T as the right operand. docs/cpu_attention.md has the schedule.
#include "attention_backward_tile.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// Enough tasks to keep many cores busy; more would only add dQ buffers. Shapes decide, never the number of threads.
constexpr int64_t kWantedTasks = 16;
constexpr int64_t kMinTaskKeys = 1024;

// Rows that see at most so many keys get their delta from P dP; with more keys out . d_out is as good as plain PyTorch.
constexpr int64_t kFewKeys = 8;

// One (sequence, KV head).
struct Unit {
  int64_t sequence, kv_head, rows, first_block;  // first_block: index of its first row block among all units
  int64_t blocks() const { return (rows + kRows - 1) / kRows; }
};

// A task's contribution to dQ of one unit: row blocks [begin, end), each [padded dim_qk, kRows].
struct Partial {
  int64_t unit, begin, end, offset;  // offset in row blocks
};

struct GradientScratch {};  // statistics of the rows, and dQ

struct Task {
  bool latent;
  Segment segment;
  int64_t kv_head, begin, end;  // key blocks
  std::vector<int64_t> partials;
  double cost;
};

template <class T>
class Backward {
 public:
  using Op = SplitOperand<T>;
  using C = Accumulator<Op>;

  explicit Backward(const AttentionBackwardParams& p)
      : p_(p), group_(p.heads_q / p.heads_kv), layout_(p), want_dq_(p.dq.data != nullptr) {
    plan();
  }

  const char* run(const Launch& launch) {
    const size_t stats_bytes = 3 * row_blocks_ * kRows * sizeof(C);
    const size_t dq_bytes = want_dq_ ? partial_blocks_ * layout_.dq_elements() * sizeof(C) : 0;
    const ScratchLease<GradientScratch> scratch(round_up(stats_bytes, 64) + dq_bytes + 64);
    if (scratch.data() == nullptr) return "out of memory for the buffers of the backward";
    lse_ = reinterpret_cast<C*>(scratch.data());
    delta_ = lse_ + row_blocks_ * kRows;
    sink_terms_ = delta_ + row_blocks_ * kRows;
    dq_ = reinterpret_cast<C*>(scratch.data() + round_up(stats_bytes, 64));
    touched_.assign(partial_blocks_, 0);

    for_each_task(launch, row_blocks_, [&](int64_t block) { row_statistics(block); });
    if (p_.d_sinks != nullptr) {
      for_each_task(launch, p_.heads_q, [&](int64_t head) { sum_sinks(head); });
    }
    for_each_task(launch, static_cast<int64_t>(tasks_.size()), [&](int64_t i) {
      const ScratchLease<TaskScratch> scratch(layout_.bytes());
      run_task(tasks_[i], scratch.data());
    });
    if (want_dq_) {
      for_each_task(launch, row_blocks_, [&](int64_t block) { finish_dq(block); });
      const int64_t end = rows_in_sequences(p_);
      zero_rows<T>(p_.dq, p_.batch, p_.heads_q, p_.dim_qk, end, p_.time_q);
    }
    zero_unused_keys();
    return nullptr;
  }

 private:
  // ---- plan
  void plan() {
    for (int64_t n = 0; n < p_.num_sequences; ++n) {
      const Sequence s = make_sequence(p_, n);
      sequences_.push_back(s);
      for (int64_t h = 0; h < p_.heads_kv; ++h) {
        units_.push_back({n, h, s.len_q * group_, row_blocks_});
        for (int64_t b = 0; b < units_.back().blocks(); ++b)
          block_unit_.push_back(static_cast<int64_t>(units_.size()) - 1);
        row_blocks_ += units_.back().blocks();
      }
    }
    unit_partials_.resize(units_.size());
    const int64_t splits =
        std::max<int64_t>(1, kWantedTasks / std::max<int64_t>(1, static_cast<int64_t>(units_.size())));
    const bool main_wanted = want_dq_ || p_.dk.data != nullptr || p_.dv.data != nullptr;
    for (int64_t u = 0; main_wanted && u < static_cast<int64_t>(units_.size()); ++u) {
      const Sequence& s = sequences_[units_[u].sequence];
      const Segment segment{s.batch, s.k_begin, s.len_k, 0};
      const int64_t blocks = segment.blocks(), parts = std::min(splits, (s.len_k + kMinTaskKeys - 1) / kMinTaskKeys);
      for (int64_t i = 0; i < parts; ++i) {
        Task task{false, segment, units_[u].kv_head, blocks * i / parts, blocks * (i + 1) / parts, {}, 0};
        const KeyRange rows = visiting_blocks(u, false, task.begin * kKeys, std::min(s.len_k, task.end * kKeys));
        add_partial(task, u, rows.begin, rows.end);
        const KeyRange first = visiting_blocks(u, false, task.begin * kKeys, task.begin * kKeys + 1);
        task.cost = static_cast<double>(task.end - task.begin) * static_cast<double>(first.end - first.begin + 1);
        tasks_.push_back(std::move(task));
      }
    }
    const bool latents_wanted = want_dq_ || p_.d_latent_k.data != nullptr || p_.d_latent_v.data != nullptr;
    const bool shared = p_.latents_shared || p_.batch == 1 || p_.latent_k.batch_stride == 0;
    const int64_t latent_batches = p_.num_latents == 0 || !latents_wanted ? 0 : (shared ? 1 : p_.batch);
    for (int64_t b = 0; b < latent_batches; ++b) {
      const Segment segment{b, 0, p_.num_latents, 0};
      for (int64_t h = 0; h < p_.heads_kv; ++h) {
        Task task{true, segment, h, 0, segment.blocks(), {}, 1e30};
        for (int64_t u = 0; u < static_cast<int64_t>(units_.size()); ++u) {
          if (units_[u].kv_head != h || (!shared && sequences_[units_[u].sequence].batch != b)) continue;
          add_partial(task, u, 0, units_[u].blocks());
        }
        tasks_.push_back(std::move(task));
      }
    }
    std::stable_sort(tasks_.begin(), tasks_.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  }

  void add_partial(Task& task, int64_t unit, int64_t begin, int64_t end) {
    task.partials.push_back(static_cast<int64_t>(partials_.size()));
    unit_partials_[unit].push_back(static_cast<int64_t>(partials_.size()));
    partials_.push_back({unit, begin, end, partial_blocks_});
    partial_blocks_ += end - begin;
  }

  // Row blocks that may see a key of [key_begin, key_end).
  KeyRange visiting_blocks(int64_t unit, bool latent, int64_t key_begin, int64_t key_end) const {
    const Unit& u = units_[unit];
    if (latent || p_.mask.prefix_len != nullptr) return {0, u.blocks()};
    const Sequence& s = sequences_[u.sequence];
    const MaskParams& m = p_.mask;
    const int64_t first = query_range(m.window_left, m.window_right, key_begin, s.len_q, s.len_k).begin;
    const int64_t last = query_range(m.window_left, m.window_right, key_end - 1, s.len_q, s.len_k).end;
    const int64_t begin = std::min(first * group_ / kRows, u.blocks());
    return {begin, std::clamp((last * group_ + kRows - 1) / kRows, begin, u.blocks())};
  }

  Rows rows_of(const Unit& u, int64_t block) const {
    return {u.sequence, u.kv_head, block * kRows, std::min(kRows, u.rows - block * kRows)};
  }

  template <class P>
  P* query(const View& view, const Sequence& s, const Rows& rows, int64_t r) const {
    const int64_t row = rows.first + r;
    return const_cast<P*>(
        at<std::remove_const_t<P>>(view, s.batch, s.q_begin + row / group_, rows.kv_head * group_ + row % group_));
  }

  // ---- before: lse in base 2 and delta = out . d_out - d_lse for every row
  void row_statistics(int64_t block) {
    const Unit& u = units_[block_unit_[block]];
    const Sequence& s = sequences_[u.sequence];
    const Rows rows = rows_of(u, block - u.first_block);
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t index = block * kRows + r;
      lse_[index] = kUnseen<C>, delta_[index] = 0, sink_terms_[index] = 0;
      if (r >= rows.count) continue;
      const int64_t row = rows.first + r, head = u.kv_head * group_ + row % group_;
      const int64_t at = (s.batch * p_.heads_q + head) * p_.time_q + s.q_begin + row / group_;
      const C lse = static_cast<const C*>(p_.lse)[at];
      if (lse == -std::numeric_limits<C>::infinity()) continue;  // sees nothing
      C delta = dot(query<const T>(p_.out, s, rows, r), query<const T>(p_.d_out, s, rows, r), p_.dim_v);
      if constexpr (sizeof(T) == 2) delta_of_few_keys(u, s, rows, r, lse * static_cast<C>(kLog2E), delta);
      if (p_.d_lse != nullptr) delta -= static_cast<const C*>(p_.d_lse)[at];
      lse_[index] = lse * static_cast<C>(kLog2E);
      delta_[index] = delta;
      if (p_.d_sinks != nullptr) sink_terms_[index] = -std::exp(static_cast<C>(p_.sinks[head]) - lse) * delta;
    }
  }

  // delta of a row that sees few keys: sum of P dP. There dP - delta cancels down to far less than the rounding of
  // `out`, which out . d_out would put into it.
  void delta_of_few_keys(const Unit& u, const Sequence& s, const Rows& rows, int64_t r, C lse_log2, C& delta) const {
    const int64_t row = rows.first + r, i = row / group_, head = u.kv_head * group_ + row % group_;
    const KeyRange keys = key_range(p_, s, i), latents = p_.num_latents > 0 ? latent_range(p_, s, i) : KeyRange{0, 0};
    const auto count = [](const KeyRange& k) { return std::max<int64_t>(k.end - k.begin, 0); };
    if (count(keys) + count(latents) > kFewKeys) return;
    delta = 0;
    const auto add = [&](const KeyRange& range, bool latent) {
      for (int64_t j = range.begin; j < range.end; ++j) {
        const int64_t t = latent ? j : s.k_begin + j;
        const T* k = at<T>(latent ? p_.latent_k : p_.k, s.batch, t, u.kv_head);
        const T* v = at<T>(latent ? p_.latent_v : p_.v, s.batch, t, u.kv_head);
        double score = p_.scale * static_cast<double>(dot(query<const T>(p_.q, s, rows, r), k, p_.dim_qk));
        if (p_.softcap > 0) score = p_.softcap * std::tanh(score / p_.softcap);
        if (!latent && p_.alibi_slopes != nullptr) {
          const double distance = std::abs(static_cast<double>(i + s.len_k - s.len_q - j));
          score -= static_cast<double>(p_.alibi_slopes[u.sequence * p_.alibi_batch_stride + head]) * distance;
        }
        const double weight = std::exp2(score * kLog2E - static_cast<double>(lse_log2));
        delta += static_cast<C>(weight) * dot(query<const T>(p_.d_out, s, rows, r), v, p_.dim_v);
      }
    };
    add(keys, false);
    add(latents, true);
  }

  static C dot(const T* a, const T* b, int64_t dim) {
    Vec<C> sum{};
    int64_t i = 0;
    for (; i + kLanes<C> <= dim; i += kLanes<C>) sum += load<C>(a + i) * load<C>(b + i);
    C total = sum_lanes<C>(sum);
    for (; i < dim; ++i) total += static_cast<C>(to_float(a[i])) * static_cast<C>(to_float(b[i]));
    return total;
  }

  void sum_sinks(int64_t head) {
    double total = 0;
    for (const Unit& u : units_) {
      if (u.kv_head != head / group_) continue;
      for (int64_t row = head % group_; row < u.rows; row += group_) total += sink_terms_[u.first_block * kRows + row];
    }
    p_.d_sinks[head] = static_cast<float>(total);
  }

  // ---- the tiles
  void run_task(const Task& task, char* scratch) {
    BackwardBuffers<T> b(layout_, scratch);
    const View &dk = task.latent ? p_.d_latent_k : p_.dk, &dv = task.latent ? p_.d_latent_v : p_.dv;
    std::vector<uint8_t> finite(layout_.group());
    for (int64_t first = task.begin; first < task.end; first += layout_.group()) {
      const int64_t last = std::min(first + layout_.group(), task.end), k0 = first * kKeys;
      const int64_t k1 = std::min(last * kKeys, task.segment.length);
      std::memset(static_cast<void*>(b.keys(0).dk), 0, (last - first) * layout_.accumulator_elements() * sizeof(C));
      for (int64_t i = 0; first + i < last; ++i) finite[i] = pack_keys(b.keys(i), task, k0 + i * kKeys);
      for (int64_t index : task.partials) {
        const Partial& partial = partials_[index];
        const Unit& u = units_[partial.unit];
        const KeyRange visiting = visiting_blocks(partial.unit, task.latent, k0, k1);
        const int64_t end = std::min(visiting.end, partial.end);
        for (int64_t block = std::max(visiting.begin, partial.begin); block < end; ++block) {
          const RowBlock rows(p_, sequences_[u.sequence], rows_of(u, block), group_, task.latent);
          if (rows.seen.low >= k1 || rows.seen.high <= k0) continue;
          const bool rows_finite = pack_rows(b, rows);
          for (int64_t i = 0; first + i < last; ++i) {
            tile(b, task, rows, u.first_block + block, partial.offset + block - partial.begin, k0 + i * kKeys,
                 b.keys(i), rows_finite && finite[i] != 0);
          }
        }
      }
      for (int64_t i = 0; first + i < last; ++i) {
        const auto keys = b.keys(i);
        if (dk.data != nullptr) {
          write_keys(task, dk, keys.dk, layout_.cols_qk, p_.dim_qk, k0 + i * kKeys, static_cast<C>(p_.scale));
        }
        if (dv.data != nullptr) write_keys(task, dv, keys.dv, layout_.cols_v, p_.dim_v, k0 + i * kKeys, C{1});
      }
    }
  }

  // Both forms of q and d_out of one row block. Returns whether all of it is finite.
  bool pack_rows(BackwardBuffers<T>& b, const RowBlock& block) const {
    const Rows& rows = block.rows;
    const T* q = gather(p_.q, block, p_.dim_qk, b.gather);
    const T* d_out = gather(p_.d_out, block, p_.dim_v, b.gather + kRows * p_.dim_qk);
    const int64_t q_stride = group_ == 1 ? p_.q.time_stride : p_.dim_qk;
    const int64_t d_out_stride = group_ == 1 ? p_.d_out.time_stride : p_.dim_v;
    pack_b_transposed<Op>(q, q_stride, p_.dim_qk, rows.count, b.q_columns, kRows);
    pack_b_transposed<Op>(d_out, d_out_stride, p_.dim_v, rows.count, b.d_out_columns, kRows);
    zero_columns(b.q_columns, layout_.depth_qk, rows.count);
    zero_columns(b.d_out_columns, layout_.depth_v, rows.count);
    pack_b<Op>(q, q_stride, rows.count, p_.dim_qk, b.q_rows, layout_.cols_qk);
    pack_b<Op>(d_out, d_out_stride, rows.count, p_.dim_v, b.d_out_rows, layout_.cols_v);
    zero_rest(b.q_rows, rows.count, layout_.cols_qk);
    zero_rest(b.d_out_rows, rows.count, layout_.cols_v);
    return all_finite(q, q_stride, rows.count, p_.dim_qk) && all_finite(d_out, d_out_stride, rows.count, p_.dim_v);
  }
  // The rows of a block behind each other, in `room` unless rows of one head have one stride anyway.
  const T* gather(const View& view, const RowBlock& block, int64_t dim, T* room) const {
    if (group_ == 1) return query<const T>(view, block.sequence, block.rows, 0);
    for (int64_t r = 0; r < block.rows.count; ++r) {
      std::memcpy(room + r * dim, query<const T>(view, block.sequence, block.rows, r), dim * sizeof(T));
    }
    return room;
  }
  static void zero_columns(Op* packed, int64_t depth, int64_t count) {
    const int64_t done = padded_cols(count);
    for (int64_t k = 0; done < kRows && k < depth; k += kPair<Op>) {
      std::memset(static_cast<void*>(packed + k * kRows + done * kPair<Op>), 0,
                  (kRows - done) * kPair<Op> * sizeof(Op));
    }
  }
  static void zero_rest(Op* packed, int64_t count, int64_t cols) {
    const int64_t done = padded_depth<Op>(count);
    if (done < kRows) std::memset(static_cast<void*>(packed + done * cols), 0, (kRows - done) * cols * sizeof(Op));
  }

  using Keys = typename BackwardBuffers<T>::Keys;

  // Key block from k0 on. Returns whether all of it is finite.
  bool pack_keys(const Keys& keys, const Task& task, int64_t k0) const {
    const int64_t n = std::min(kKeys, task.segment.length - k0);
    const View &kv = task.latent ? p_.latent_k : p_.k, &vv = task.latent ? p_.latent_v : p_.v;
    const T* k = at<T>(kv, task.segment.batch, task.segment.begin + k0, task.kv_head);
    const T* v = at<T>(vv, task.segment.batch, task.segment.begin + k0, task.kv_head);
    pack_a<Op>(k, kv.time_stride, n, p_.dim_qk, keys.k, layout_.depth_qk);
    pack_a<Op>(v, vv.time_stride, n, p_.dim_v, keys.v, layout_.depth_v);
    std::memset(static_cast<void*>(keys.k + n * layout_.depth_qk), 0, (kKeys - n) * layout_.depth_qk * sizeof(Op));
    std::memset(static_cast<void*>(keys.v + n * layout_.depth_v), 0, (kKeys - n) * layout_.depth_v * sizeof(Op));
    if (want_dq_) pack_a_transposed(k, kv.time_stride, n, p_.dim_qk, keys.k_transposed, kKeys);
    return all_finite(k, kv.time_stride, n, p_.dim_qk) && all_finite(v, vv.time_stride, n, p_.dim_v);
  }

  // stats, place: of the row block, in lse_ and delta_, and in dq_.
  void tile(BackwardBuffers<T>& b, const Task& task, const RowBlock& block, int64_t stats, int64_t place, int64_t k0,
            const Keys& all, bool finite) {
    const RowIntervals& seen = block.seen;
    const int64_t n = std::min(kKeys, task.segment.length - k0);
    if (seen.low >= k0 + n || seen.high <= k0) return;
    // Keys [j0, j1) of the block, in units that the products take.
    const int64_t j0 = std::max<int64_t>(seen.low - k0, 0) / kKeyStep * kKeyStep;
    const int64_t j1 = std::min(kKeys, round_up(std::min(seen.high - k0, n), kKeyStep)), keys = j1 - j0;
    const bool full = seen.all_low <= k0 + j0 && seen.all_high >= k0 + j1;
    const Keys from{all.k + j0 * layout_.depth_qk, all.v + j0 * layout_.depth_v, all.k_transposed + j0,
                    all.dk + j0 * layout_.cols_qk, all.dv + j0 * layout_.cols_v};
    C* dq = want_dq_ ? dq_ + place * layout_.dq_elements() : nullptr;
    const bool first = want_dq_ && !touched_[place];
    if (want_dq_) touched_[place] = 1;
    const C *lse = lse_ + stats * kRows, *delta = delta_ + stats * kRows;
    if (!finite && (!full || kIsSplit<Op>)) {
      if (first) std::memset(static_cast<void*>(dq), 0, layout_.dq_elements() * sizeof(C));
      careful_tile(b, task, block, k0 + j0, keys, from, dq, lse, delta);
      return;
    }
    gemm<Op>(keys, kRows, layout_.depth_qk, from.k, layout_.depth_qk, b.q_columns, kRows, b.scores, kRows, false);
    gemm<Op>(keys, kRows, layout_.depth_v, from.v, layout_.depth_v, b.d_out_columns, kRows, b.d_scores, kRows, false);
    const C factor = transform(b, block, task.latent, k0 + j0, keys);
    differentiate(b, layout_, full ? nullptr : &seen, k0 + j0, keys, factor, lse, delta);
    if (wanted(task.latent ? p_.d_latent_v : p_.dv)) {
      gemm<Op>(keys, layout_.cols_v, kRows, b.p, kRows, b.d_out_rows, layout_.cols_v, from.dv, layout_.cols_v, true);
    }
    if (wanted(task.latent ? p_.d_latent_k : p_.dk)) {
      gemm<Op>(keys, layout_.cols_qk, kRows, b.ds, kRows, b.q_rows, layout_.cols_qk, from.dk, layout_.cols_qk, true);
    }
    if (want_dq_) {
      gemm<Op>(p_.dim_qk, kRows, keys, from.k_transposed, kKeys, b.ds_packed(), kRows, dq, kRows, !first);
    }
  }
  static bool wanted(const View& gradient) { return gradient.data != nullptr; }

  // Softcap and linear bias of a tile's scores. Returns what makes them logits in base 2.
  C transform(BackwardBuffers<T>& b, const RowBlock& block, bool latent, int64_t key0, int64_t keys) const {
    if (!layout_.transform) return static_cast<C>(p_.scale * kLog2E);
    transform_transposed(p_, block.sequence, block.rows, group_, latent, key0, keys, b.scores, b.derivative);
    return 1;
  }

  // A tile with a NaN or infinity somewhere, one visible pair after the other: 0 * NaN must not reach what does not see
  // it, and an infinity has no planes.
  void careful_tile(BackwardBuffers<T>& b, const Task& task, const RowBlock& block, int64_t key0, int64_t keys,
                    const Keys& to, C* dq, const C* lse, const C* delta) const {
    const View &kv = task.latent ? p_.latent_k : p_.k, &vv = task.latent ? p_.latent_v : p_.v;
    const auto visible_pairs = [&](const auto& body) {
      for (int64_t j = 0; j < keys; ++j) {
        const T* k = at<T>(kv, task.segment.batch, task.segment.begin + key0 + j, task.kv_head);
        const T* v = at<T>(vv, task.segment.batch, task.segment.begin + key0 + j, task.kv_head);
        for (int64_t r = 0; r < block.rows.count; ++r) {
          if (key0 + j < block.seen.begin[r] || key0 + j >= block.seen.end[r]) continue;
          body(j, r, k, v, query<const T>(p_.q, block.sequence, block.rows, r),
               query<const T>(p_.d_out, block.sequence, block.rows, r));
        }
      }
    };
    std::memset(static_cast<void*>(b.scores), 0, keys * kRows * sizeof(C));
    visible_pairs([&](int64_t j, int64_t r, const T* k, const T* v, const T* q, const T* d_out) {
      b.scores[j * kRows + r] = dot(q, k, p_.dim_qk);
      b.d_scores[j * kRows + r] = dot(d_out, v, p_.dim_v);
    });
    const C factor = transform(b, block, task.latent, key0, keys);
    visible_pairs([&](int64_t j, int64_t r, const T* k, const T*, const T* q, const T* d_out) {
      const int64_t e = j * kRows + r;
      const C weight = std::exp2(b.scores[e] * factor - lse[r]);
      C d_score = weight * (b.d_scores[e] - delta[r]);
      if (b.derivative != nullptr) d_score *= b.derivative[e];
      const auto add = [](C a, const T* x, int64_t dim, C* sum, int64_t stride) {
        for (int64_t d = 0; d < dim; ++d) sum[d * stride] += a * static_cast<C>(to_float(x[d]));
      };
      add(weight, d_out, p_.dim_v, to.dv + j * layout_.cols_v, 1);
      add(d_score, q, p_.dim_qk, to.dk + j * layout_.cols_qk, 1);
      if (dq != nullptr) add(d_score, k, p_.dim_qk, dq + r, kRows);
    });
  }

  void write_keys(const Task& task, const View& view, const C* acc, int64_t cols, int64_t dim, int64_t k0,
                  C scale) const {
    const int64_t n = std::min(kKeys, task.segment.length - k0);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = task.segment.begin + k0 + j;
      const C* from = acc + j * cols;
      if (p_.accumulate_dkv && !task.latent) {
        C* to = at_mutable<C>(view, task.segment.batch, row, task.kv_head);
        for (int64_t d = 0; d < dim; ++d) to[d] += from[d] * scale;
      } else {
        T* to = at_mutable<T>(view, task.segment.batch, row, task.kv_head);
        for_each_vector<C>(dim, [&](auto io) { io.store(to, io.load(from) * scale); });
      }
    }
  }

  // ---- after: dQ is the sum of the tasks' contributions
  void finish_dq(int64_t block) {
    const int64_t unit = block_unit_[block];
    const Unit& u = units_[unit];
    const Sequence& s = sequences_[u.sequence];
    const int64_t local = block - u.first_block;
    const Rows rows = rows_of(u, local);
    alignas(64) C by_row[kRows * 16];
    for (int64_t d0 = 0; d0 < p_.dim_qk; d0 += 16) {
      alignas(64) C total[16 * kRows] = {};
      for (int64_t i : unit_partials_[unit]) {
        const Partial& part = partials_[i];
        if (local < part.begin || local >= part.end || !touched_[part.offset + local - part.begin]) continue;
        const C* from = dq_ + (part.offset + local - part.begin) * layout_.dq_elements() + d0 * kRows;
        for (int64_t e = 0; e < 16 * kRows; e += kLanes<C>) store<C>(total + e, load<C>(total + e) + load<C>(from + e));
      }
      transpose_16(total, by_row);
      const int64_t n = std::min<int64_t>(16, p_.dim_qk - d0);
      for (int64_t r = 0; r < rows.count; ++r) {
        T* to = query<T>(p_.dq, s, rows, r) + d0;
        const C *from = by_row + r * 16, scale = static_cast<C>(p_.scale);
        for_each_vector<C>(n, [&](auto io) { io.store(to, io.load(from) * scale); });
      }
    }
  }

  // Keys of no sequence, and those behind seqused_k.
  void zero_unused_keys() const {
    if (p_.accumulate_dkv) return;
    const auto zero = [&](int64_t batch, int64_t begin, int64_t end) {
      for (const auto& [view, dim] : {std::pair{&p_.dk, p_.dim_qk}, std::pair{&p_.dv, p_.dim_v}}) {
        if (view->data == nullptr) continue;
        View one = *view;
        one.data = at_mutable<T>(*view, batch, 0, 0);
        zero_rows<T>(one, 1, p_.heads_kv, dim, begin, end);
      }
    };
    int64_t end = 0;
    for (int64_t n = 0; n < p_.num_sequences; ++n) {
      const Sequence& s = sequences_[n];
      const bool packed = p_.cu_seqlens_k != nullptr;
      const int64_t stop = packed ? clamp_index(p_.cu_seqlens_k[n + 1], s.k_begin, p_.time_k) : p_.time_k;
      zero(s.batch, s.k_begin + s.len_k, stop);
      end = stop;
    }
    if (p_.cu_seqlens_k != nullptr) zero(0, end, p_.time_k);
  }

  const AttentionBackwardParams& p_;
  const int64_t group_;
  const BackwardLayout<T> layout_;
  const bool want_dq_;
  int64_t row_blocks_ = 0, partial_blocks_ = 0;
  std::vector<Sequence> sequences_;
  std::vector<Unit> units_;
  std::vector<int64_t> block_unit_;  // row block -> unit
  std::vector<Partial> partials_;
  std::vector<std::vector<int64_t>> unit_partials_;
  std::vector<Task> tasks_;
  std::vector<uint8_t> touched_;
  C *lse_ = nullptr, *delta_ = nullptr, *sink_terms_ = nullptr, *dq_ = nullptr;
};

}  // namespace

const char* attention_backward(const AttentionBackwardParams& p, const Launch& launch) {
  return with_float_type(p.dtype, [&](auto t) { return Backward<decltype(t)>(p).run(launch); });
}

}  // namespace yoco::cpu::YOCO_ISA
