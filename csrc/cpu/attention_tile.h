// What attention forward and backward share: K and V packed once per head, the rows of one task with their key
// intervals, and the rule for which tiles are visited. docs/cpu_attention.md has the schedule.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../mask.h"
#include "matrix.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// Query rows, that is (query, head of the group) pairs of one KV head: of a tile, and at most of a task.
constexpr int64_t kRows = 64, kTaskRows = 256;
constexpr int64_t kKeys = 128;  // keys of a tile: scores [64, 128] in float32 are 32 KiB, they stay in L1

// Calls body(task) for task 0 .. n-1, each once, in that order of starting: long tasks first balances the threads. What
// a task computes must not depend on the thread.
template <class Body>
void for_each_task(const Launch& launch, int64_t n, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel(launch, std::min<int64_t>(n, std::max(launch.num_threads, 1)), 1, [&](int64_t, int64_t) {
    MatrixScope scope;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(task);
  });
}

template <class T>
const T* at(const View& view, int64_t batch, int64_t time, int64_t head) {
  return static_cast<const T*>(view.data) + batch * view.batch_stride + time * view.time_stride +
         head * view.head_stride;
}

template <class T>
T* at_mutable(const View& view, int64_t batch, int64_t time, int64_t head) {
  return const_cast<T*>(at<T>(view, batch, time, head));
}

// Whether every element of rows [0, n) is finite. Zero times NaN is NaN, so a tile that is partly masked must know.
template <class T>
bool all_finite(const T* p, int64_t stride, int64_t n, int64_t dim) {
  using C = Compute<T>;
  Vec<C> bad{};
  C rest = 0;
  for (int64_t r = 0; r < n; ++r) {
    const T* row = p + r * stride;
    int64_t i = 0;
    for (; i + kLanes<C> <= dim; i += kLanes<C>) {
      const Vec<C> x = load<C>(row + i);
      bad += x - x;  // 0, or NaN from then on
    }
    for (; i < dim; ++i) rest += to_float(row[i]) - to_float(row[i]);
  }
  return sum_lanes<C>(bad) + rest == 0;
}

// Uninitialised memory of this thread, kept for the next lease of the same purpose while it is small: fresh pages cost
// more than what is done with them.
template <class Purpose>
class ScratchLease {
 public:
  explicit ScratchLease(size_t bytes) {
    constexpr size_t kKept = size_t{64} << 20;
    thread_local std::unique_ptr<Scratch> kept;
    thread_local size_t kept_bytes = 0;
    if (bytes > kKept) {
      own_ = std::make_unique<Scratch>(bytes);
      data_ = own_->template as<char>();
    } else {
      if (kept_bytes < bytes) {
        kept.reset();
        kept = std::make_unique<Scratch>(bytes);
        kept_bytes = bytes;
      }
      data_ = kept->template as<char>();
    }
  }
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;
  char* data() const { return data_; }  // null: no memory

 private:
  std::unique_ptr<Scratch> own_;
  char* data_;
};

struct TaskScratch {};
struct PackedScratch {};

// One K/V segment of one (sequence, KV head): the cached tokens, or the latents.
struct Segment {
  int64_t batch = 0, begin = 0, length = 0;  // rows of k and v
  int64_t first_block = 0;                   // index into the packed blocks
  int64_t blocks() const { return (length + kKeys - 1) / kKeys; }
};

#if YOCO_HAS_AMX
// attention_amx.h
constexpr int64_t slot_elements(int64_t depth, int64_t planes);
template <class T>
void pack_slot(const T* k, int64_t k_stride, int64_t dim_k, const T* v, int64_t v_stride, int64_t dim_v, int64_t n,
               int64_t depth, BFloat16* dst);
#endif

// K and V of all heads in blocks of kKeys keys: B = K^T [depth_qk, kKeys] for the scores and B = V [kKeys, cols_v] for
// the output; or, with slot_depth > 0, the slots of attention_amx.h.
template <class T>
class PackedKV {
 public:
  using Op = MatrixOperand<T>;

  PackedKV(const AttentionParams& p, int slot_depth, int planes)
      : p_(p),
        depth_(padded_depth<Op>(p.dim_qk)),
        cols_(padded_cols(p.dim_v)),
        slot_depth_(slot_depth),
        planes_(planes) {
    // A slot of 32 keys is padded to 32 * slot_depth components in both K and V.
    const int64_t bytes = slot_depth > 0 ? kKeys * 64 * slot_depth * planes * 2
                                         : kKeys * (depth_ + cols_) * static_cast<int64_t>(sizeof(Op));
    block_bytes_ = round_up(bytes, 64);
    sequences_.reserve(p.num_sequences);
    for (int64_t n = 0; n < p.num_sequences; ++n) {
      const Sequence s = make_sequence(p, n);
      sequences_.push_back(s);
      main_.push_back({s.batch, s.k_begin, s.len_q > 0 ? s.len_k : 0, blocks_ * p.heads_kv});
      blocks_ += main_.back().blocks();
    }
    const int64_t latent_batches = p.num_latents == 0 ? 0 : (p.latent_k.batch_stride == 0 ? 1 : p.batch);
    for (int64_t b = 0; b < latent_batches; ++b) {
      latent_.push_back({b, 0, p.num_latents, blocks_ * p.heads_kv});
      blocks_ += latent_.back().blocks();
    }
  }

  bool allocate() {
    total_ = blocks_ * p_.heads_kv;
    finite_.resize(total_);
    if (total_ == 0) return true;
    storage_ = std::make_unique<ScratchLease<PackedScratch>>(static_cast<size_t>(total_ * block_bytes_));
    return storage_->data() != nullptr;
  }

  void pack(const Launch& launch) {
    struct Item {
      const Segment* segment;
      bool latent;
      int64_t head, block;
    };
    std::vector<Item> items;
    items.reserve(total_);
    for (const auto* list : {&main_, &latent_}) {
      for (const Segment& s : *list) {
        for (int64_t h = 0; h < p_.heads_kv; ++h) {
          for (int64_t b = 0; b < s.blocks(); ++b) items.push_back({&s, list == &latent_, h, b});
        }
      }
    }
    for_each_task(launch, static_cast<int64_t>(items.size()), [&](int64_t i) {
      const Item& item = items[i];
      pack_stored(*item.segment, item.latent, item.head, item.block);
    });
  }

  const Sequence& sequence(int64_t n) const { return sequences_[n]; }
  const Segment& main_segment(int64_t n) const { return main_[n]; }
  // Null without latents.
  const Segment* latent_segment(const Sequence& s) const {
    if (latent_.empty()) return nullptr;
    return &latent_[latent_.size() == 1 ? 0 : s.batch];
  }
  int64_t block_index(const Segment& s, int64_t head, int64_t block) const {
    return s.first_block + head * s.blocks() + block;
  }
  // Consecutive blocks of one head and segment lie together, so this is the first of all their slots.
  const BFloat16* slots(int64_t index) const { return reinterpret_cast<const BFloat16*>(memory(index)); }

  struct Block {
    const Op *keys, *values;
  };
  // room: for the block if it is only there as slots.
  Block block(const Segment& s, bool latent, int64_t head, int64_t block, Op* room) const {
    if (slot_depth_ > 0) {
      pack_block(s, latent, head, block, room);
    } else {
      room = reinterpret_cast<Op*>(memory(block_index(s, head, block)));
    }
    return {room, room + kKeys * depth_};
  }
  // Values (and keys, where they are split into planes).
  bool finite(int64_t index) const { return finite_[index]; }

 private:
  char* memory(int64_t index) const { return storage_->data() + index * block_bytes_; }

  struct Source {
    const T *k, *v;
    int64_t k_stride, v_stride, n;
  };
  Source source(const Segment& s, bool latent, int64_t head, int64_t block) const {
    const View &kv = latent ? p_.latent_k : p_.k, &vv = latent ? p_.latent_v : p_.v;
    const int64_t row = s.begin + block * kKeys;
    return {at<T>(kv, s.batch, row, head), at<T>(vv, s.batch, row, head), kv.time_stride, vv.time_stride,
            std::min(kKeys, s.length - block * kKeys)};
  }

  void pack_block(const Segment& s, bool latent, int64_t head, int64_t block, Op* dst) const {
    const Source from = source(s, latent, head, block);
    pack_columns(from.k, from.k_stride, from.n, dst);
    pack_rows(from.v, from.v_stride, from.n, dst + kKeys * depth_);
  }

  void pack_stored(const Segment& s, bool latent, int64_t head, int64_t block) {
    const int64_t index = block_index(s, head, block);
    const Source from = source(s, latent, head, block);
    finite_[index] = all_finite(from.v, from.v_stride, from.n, p_.dim_v);
#if YOCO_HAS_AMX
    if constexpr (!std::is_same_v<T, double>) {
      if (slot_depth_ > 0) {
        // Splitting an infinity would leave NaN.
        if (planes_ > 1) finite_[index] &= all_finite(from.k, from.k_stride, from.n, p_.dim_qk);
        BFloat16* slot = reinterpret_cast<BFloat16*>(memory(index));
        for (int64_t j = 0; j < kKeys; j += 32, slot += slot_elements(slot_depth_, planes_)) {
          pack_slot(from.k + j * from.k_stride, from.k_stride, p_.dim_qk, from.v + j * from.v_stride, from.v_stride,
                    p_.dim_v, from.n - j, slot_depth_, slot);
        }
        return;
      }
    }
#endif
    pack_block(s, latent, head, block, reinterpret_cast<Op*>(memory(index)));
  }

  // Keys beyond the last one are zero columns, or zero rows.
  void pack_columns(const T* src, int64_t stride, int64_t n, Op* dst) const {
    pack_b_transposed<Op>(src, stride, p_.dim_qk, n, dst, kKeys);
    const int64_t packed = padded_cols(n);
    for (int64_t k = 0; packed < kKeys && k < depth_; k += kPair<Op>) {
      std::memset(static_cast<void*>(dst + k * kKeys + packed * kPair<Op>), 0,
                  (kKeys - packed) * kPair<Op> * sizeof(Op));
    }
  }
  void pack_rows(const T* src, int64_t stride, int64_t n, Op* dst) const {
    pack_b<Op>(src, stride, n, p_.dim_v, dst, cols_);
    const int64_t packed = padded_depth<Op>(n);
    std::memset(static_cast<void*>(dst + packed * cols_), 0, (kKeys - packed) * cols_ * sizeof(Op));
  }

  const AttentionParams& p_;
  const int64_t depth_, cols_;
  [[maybe_unused]] const int slot_depth_, planes_;
  int64_t block_bytes_ = 0, blocks_ = 0, total_ = 0;
  std::vector<Sequence> sequences_;
  std::vector<Segment> main_, latent_;
  std::vector<uint8_t> finite_;
  std::unique_ptr<ScratchLease<PackedScratch>> storage_;
};

// The rows of one task: row r is query r / group of the sequence, head kv_head * group + r % group.
struct Rows {
  int64_t sequence, kv_head, first, count;  // rows first .. first + count - 1 of len_q * group
};

// All tasks of at most task_rows rows, those with the most keys first (the last rows of a causal sequence).
inline std::vector<Rows> make_row_tasks(const AttentionParams& p, int64_t task_rows) {
  const int64_t group = p.heads_q / p.heads_kv;
  std::vector<Rows> tasks;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t rows = make_sequence(p, n).len_q * group;
    for (int64_t h = 0; h < p.heads_kv; ++h) {
      for (int64_t r = 0; r < rows; r += task_rows) tasks.push_back({n, h, r, std::min(task_rows, rows - r)});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Rows& a, const Rows& b) { return a.first > b.first; });
  return tasks;
}

// Query (counted in its sequence) and head of each row of a task; a division per row would show.
struct RowPlaces {
  int64_t query[kTaskRows], head[kTaskRows];

  RowPlaces(const Rows& rows, int64_t group) {
    int64_t i = rows.first / group, h = rows.first % group;
    for (int64_t r = 0; r < rows.count; ++r) {
      query[r] = i, head[r] = rows.kv_head * group + h;
      if (++h == group) h = 0, ++i;
    }
  }
};

// Key intervals of the rows of a task in one segment, and their union.
struct Intervals {
  int32_t begin[kTaskRows], end[kTaskRows];
  int64_t low = INT64_MAX, high = 0;

  Intervals(const AttentionParams& p, const Sequence& s, const Rows& rows, int64_t group, bool latent) {
    int64_t i = rows.first / group, h = rows.first % group;
    for (int64_t r = 0; r < rows.count; ++r, ++h) {
      if (h == group) h = 0, ++i;
      const KeyRange range = latent ? latent_range(p, s, i) : key_range(p, s, i);
      begin[r] = static_cast<int32_t>(range.begin);
      end[r] = static_cast<int32_t>(std::max(range.begin, range.end));
      if (range.begin < range.end) {
        low = std::min(low, range.begin);
        high = std::max(high, range.end);
      }
    }
  }
  bool empty() const { return low >= high; }
  // How the keys [k0, k0 + kKeys) are seen: not at all, by every row whole, or in part.
  enum Cover { kNone, kPart, kFull };
  Cover cover(int64_t k0, int64_t count) const {
    bool any = false, full = true;
    for (int64_t r = 0; r < count; ++r) {
      any |= begin[r] < k0 + kKeys && end[r] > k0 && begin[r] < end[r];
      full &= begin[r] <= k0 && end[r] >= k0 + kKeys;
    }
    return full ? kFull : (any ? kPart : kNone);
  }
  // Visible columns of row r in the tile, inside [0, kKeys].
  KeyRange columns(int64_t r, int64_t k0) const {
    const int64_t b = std::clamp<int64_t>(begin[r] - k0, 0, kKeys);
    return {b, std::clamp<int64_t>(end[r] - k0, b, kKeys)};
  }
};

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x for x <= 0 (and a little above): 0 below -126, relative error 1e-7.
YOCO_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
#if YOCO_HAS_AVX512
  const __m512 t = bit_cast<__m512>(x);
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> r = x - bit_cast<Vec<float>>(n);
#else
  const Vec<float> clamped = x < -126.0f ? splat(-126.0f) : x;
  const Vec<float> magic = splat(0x1.8p23f);
  const Vec<float> shifted = clamped + magic;
  const Vec<float> r = clamped - (shifted - magic);
#endif
  Vec<float> y = splat(1.33978035e-3f);
  y = y * r + 9.67770115e-3f;
  y = y * r + 5.55071429e-2f;
  y = y * r + 2.40222947e-1f;
  y = y * r + 6.93147182e-1f;
  y = y * r + 1.0f;
#if YOCO_HAS_AVX512
  return bit_cast<Vec<float>>(_mm512_scalef_ps(bit_cast<__m512>(y), n));
#else
  const VecI exponent = (bit_cast<VecI>(shifted) + 127) << 23;
  const Vec<float> result = y * bit_cast<Vec<float>>(exponent);
  return x < -126.0f ? Vec<float>{} : result;
#endif
}

YOCO_INLINE Vec<double> exp2_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// Turns raw products q k into logits * log2(e) in place: softcap, then the linear bias. Only where one of them is used.
template <class C>
void transform_scores(const AttentionParams& p, const Sequence& s, const Rows& rows, int64_t group, bool latent,
                      int64_t k0, C* scores) {
  const float* slopes = latent ? nullptr : p.alibi_slopes;
  for (int64_t r = 0; r < rows.count; ++r) {
    C* row = scores + r * kKeys;
    if (p.softcap > 0) {
      for (int64_t j = 0; j < kKeys; ++j) {
        row[j] = static_cast<C>(p.softcap * std::tanh(row[j] * static_cast<C>(p.scale / p.softcap)) * kLog2E);
      }
    } else {
      for (int64_t j = 0; j < kKeys; ++j) row[j] *= static_cast<C>(p.scale * kLog2E);
    }
    if (slopes == nullptr) continue;
    const int64_t i = (rows.first + r) / group, head = rows.kv_head * group + (rows.first + r) % group;
    const C slope = static_cast<C>(slopes[rows.sequence * p.alibi_batch_stride + head] * kLog2E);
    const int64_t diagonal = i + s.len_k - s.len_q - k0;
    for (int64_t j = 0; j < kKeys; ++j) row[j] -= slope * static_cast<C>(std::abs(diagonal - j));
  }
}

inline bool needs_transform(const AttentionParams& p) {
  return p.softcap > 0 || p.alibi_slopes != nullptr || p.scale <= 0;
}

// Rows of no sequence (behind the last boundary of packed sequences).
inline int64_t rows_in_sequences(const AttentionParams& p) {
  return p.cu_seqlens_q == nullptr ? p.time_q : clamp_index(p.cu_seqlens_q[p.num_sequences], 0, p.time_q);
}

template <class T>
void zero_rows(const View& view, int64_t batch, int64_t heads, int64_t dim, int64_t begin, int64_t end) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < heads; ++h)
        std::memset(static_cast<void*>(at_mutable<T>(view, b, t, h)), 0, dim * sizeof(T));
    }
  }
}

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
