// What a decode call reads and how it is cut into tasks: plain index arithmetic, checked before anything is written.
//
// A sequence's visible tokens are cut into splits of whole steps (kStep tokens). Where the cuts lie follows from the
// sequence's own length and window only, so results are the same bit for bit whatever the number of threads, the
// layout of the cache and the other sequences of the batch. Latents get splits of their own.
#pragma once

#include <cstdio>

#include "../mask.h"
#include "row.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

constexpr int64_t kStep = 64;            // tokens that one softmax update covers
constexpr int64_t kMinSplit = 512;       // shorter splits would spend more on merging than they gain in parallelism
constexpr int64_t kMaxSplits = 64;       // of one sequence, unless the caller asks for more
constexpr int64_t kTaskBytes = 1 << 18;  // K and V that one step of a task reads: two steps fit into a 1 MB L2 cache

inline char* decode_message() {
  static thread_local char text[200];
  return text;
}

inline const char* check_decode(const DecodeParams& p) {
  char* text = decode_message();
  constexpr size_t size = 200;
  if (p.time_q < 1 || p.time_q > 16) return "time_q must be 1 to 16";
  if (p.heads_kv < 1 || p.heads_q % p.heads_kv != 0) return "heads_q must be a multiple of heads_kv";
  for (int64_t b = 0; b < p.batch; ++b) {
    const long long used = p.seqused_k[b], capacity = p.capacity;
    if (used < 0 || (!p.ring && used > capacity)) {
      std::snprintf(text, size, "seqused_k[%lld] is %lld; allowed: 0 to %lld, the capacity of the cache",
                    static_cast<long long>(b), used, capacity);
      return text;
    }
    if (p.latent_len != nullptr && (p.latent_len[b] < 0 || p.latent_len[b] > p.num_latents)) {
      std::snprintf(text, size, "latent_len[%lld] is %d; allowed: 0 to %lld", static_cast<long long>(b),
                    p.latent_len[b], static_cast<long long>(p.num_latents));
      return text;
    }
    if (p.block_table == nullptr) continue;
    const int32_t* pages = p.block_table + b * p.max_pages;
    for (int64_t i = 0; i * p.page_size < (used < capacity ? used : capacity); ++i) {
      if (pages[i] < 0 || pages[i] >= p.num_pages) {
        std::snprintf(text, size, "block_table[%lld, %lld] is %d; allowed: 0 to %lld", static_cast<long long>(b),
                      static_cast<long long>(i), pages[i], static_cast<long long>(p.num_pages - 1));
        return text;
      }
    }
  }
  return nullptr;
}

// Tokens [begin, end) of one segment (cache or latents) of one sequence, cut at start + i * length.
struct Splits {
  int64_t begin, end, start, length, count;
};

inline Splits cut(int64_t begin, int64_t end, int64_t wanted) {
  Splits s{begin, end, begin / kStep * kStep, kMinSplit, 0};
  const int64_t tokens = end - s.start;
  if (begin >= end) return s;
  const int64_t even = (tokens + (wanted > 0 ? wanted : kMaxSplits) - 1) / (wanted > 0 ? wanted : kMaxSplits);
  const int64_t rounded = (even + kStep - 1) / kStep * kStep;
  s.length = wanted > 0 || rounded > kMinSplit ? rounded : kMinSplit;
  s.count = (tokens + s.length - 1) / s.length;
  return s;
}

// The tokens that at least one query of the sequence sees.
inline KeyRange visible_tokens(const DecodeParams& p, int64_t b) {
  const int64_t used = p.seqused_k[b];
  const KeyRange first = window_range(p.mask.window_left, p.mask.window_right, 0, p.time_q, used);
  const KeyRange last = window_range(p.mask.window_left, p.mask.window_right, p.time_q - 1, p.time_q, used);
  const int64_t held = p.ring && used > p.capacity ? used - p.capacity : 0;  // a ring forgets what lies before
  return KeyRange{first.begin > held ? first.begin : held, last.end};
}

inline int64_t latents_seen(const DecodeParams& p, int64_t b) {
  if (p.latent_k.data == nullptr) return 0;
  return p.latent_len != nullptr ? p.latent_len[b] : p.num_latents;
}

// One split of one sequence for a group of KV heads.
struct Task {
  int64_t sequence, head_begin, head_end;
  int64_t begin, end;  // tokens
  int64_t slot;        // where its partial result goes
};

// The tasks of one segment, numbered (sequence, split, head group); find(i) unpacks a number.
class Plan {
 public:
  Plan(const DecodeParams& p, bool latents, int64_t element_size, int num_threads)
      : p_(p), latents_(latents), first_(new int64_t[p.batch + 1]), splits_(new Splits[p.batch + 1]) {
    first_[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const KeyRange seen = latents ? KeyRange{0, latents_seen(p, b)} : visible_tokens(p, b);
      splits_[b] = cut(seen.begin, seen.end, latents ? 0 : p.num_splits);
      first_[b + 1] = first_[b] + splits_[b].count;
    }
    // All heads of a token lie side by side: reading them together is one stream. Fewer heads per task where a step
    // would outgrow the cache or threads would have nothing to do; heads do not touch each other's results.
    const int64_t head_bytes = kStep * (p.dim_qk + p.dim_v) * element_size;
    heads_ = p.heads_kv < kTaskBytes / head_bytes ? p.heads_kv : kTaskBytes / head_bytes;
    if (heads_ < 1) heads_ = 1;
    while (heads_ > 1 && slots() * ((p.heads_kv + heads_ - 1) / heads_) < 3 * num_threads) heads_ = (heads_ + 1) / 2;
    groups_ = (p.heads_kv + heads_ - 1) / heads_;
  }
  ~Plan() {
    delete[] first_;
    delete[] splits_;
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  bool latents() const { return latents_; }
  int64_t slots() const { return first_[p_.batch]; }
  int64_t slots_begin(int64_t b) const { return first_[b]; }
  int64_t slots_end(int64_t b) const { return first_[b + 1]; }
  int64_t tasks() const { return slots() * groups_; }
  int64_t heads_per_task() const { return heads_; }

  Task find(int64_t index) const {
    Task t;
    t.slot = index / groups_;
    t.head_begin = index % groups_ * heads_;
    t.head_end = t.head_begin + heads_ < p_.heads_kv ? t.head_begin + heads_ : p_.heads_kv;
    int64_t low = 0, high = p_.batch - 1;  // last sequence whose slots start at or before t.slot
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first_[middle] <= t.slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    t.sequence = low;
    const Splits& s = splits_[low];
    const int64_t start = s.start + (t.slot - first_[low]) * s.length;
    t.begin = start > s.begin ? start : s.begin;
    t.end = start + s.length < s.end ? start + s.length : s.end;
    return t;
  }

 private:
  const DecodeParams& p_;
  const bool latents_;
  int64_t* first_;  // [batch + 1] slots before each sequence
  Splits* splits_;  // [batch]
  int64_t heads_, groups_;
};

// Where the K and V of up to kStep tokens start in memory (head 0), for tokens [begin, end) of the segment.
struct StepRows {
  int64_t position;  // of entry 0; a multiple of kStep
  int first, last;   // entries that hold tokens
  const char* k[kStep];
  const char* v[kStep];
};

class Segment {
 public:
  Segment(const DecodeParams& p, int64_t sequence, bool latents, int64_t element_size)
      : k_(latents ? p.latent_k : p.k_cache),
        v_(latents ? p.latent_v : p.v_cache),
        size_(element_size),
        pages_(latents || p.block_table == nullptr ? nullptr : p.block_table + sequence * p.max_pages),
        page_size_(p.page_size),
        ring_(!latents && p.ring ? p.capacity : 0),
        sequence_(sequence) {}

  // Tokens of the step at `position` that lie in [begin, end).
  void rows(int64_t position, int64_t begin, int64_t end, StepRows* out) const {
    out->position = position;
    out->first = static_cast<int>(begin > position ? begin - position : 0);
    out->last = static_cast<int>(end - position < kStep ? end - position : kStep);
    int64_t i = out->first;
    while (i < out->last) {  // runs of tokens that lie at equal distances
      int64_t block = sequence_, slot = position + i, run = out->last - i;
      if (ring_ > 0) {
        slot %= ring_;
        if (run > ring_ - slot) run = ring_ - slot;
      } else if (pages_ != nullptr) {
        block = pages_[slot / page_size_];
        slot %= page_size_;
        if (run > page_size_ - slot) run = page_size_ - slot;
      }
      const char* k = static_cast<const char*>(k_.data) + (block * k_.batch_stride + slot * k_.time_stride) * size_;
      const char* v = static_cast<const char*>(v_.data) + (block * v_.batch_stride + slot * v_.time_stride) * size_;
      for (int64_t r = 0; r < run; ++r, ++i) {
        out->k[i] = k + r * k_.time_stride * size_;
        out->v[i] = v + r * v_.time_stride * size_;
      }
    }
  }

  int64_t k_head_bytes() const { return k_.head_stride * size_; }
  int64_t v_head_bytes() const { return v_.head_stride * size_; }

 private:
  View k_, v_;
  int64_t size_;
  const int32_t* pages_;
  int64_t page_size_, ring_, sequence_;
};

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
