// Writes new keys and values behind the tokens a cache already holds: contiguous, paged or ring, rotated and quantised
// on the way. Everything is checked before the first byte is written.
#include <cstdio>

#include "rotary.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// Rows [begin, begin + length) of k and v belong to a sequence.
struct Rows {
  int64_t begin, length;
};

Rows rows_of(const AppendParams& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return Rows{0, p.time};
  return Rows{p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]};
}

const char* check(const AppendParams& p) {
  static thread_local char text[200];
  if (p.inv_freq != nullptr && (p.rotary_dim % 2 != 0 || p.rotary_dim > p.dim_k)) {
    return "rotary_dim must be even and at most the dim of k";
  }
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const Rows rows = rows_of(p, n);
    const long long used = p.seqused_k[n], end = used + rows.length;
    if (rows.begin < 0 || rows.length < 0 || rows.begin + rows.length > p.time) {
      return "cu_seqlens must rise from 0 to at most the time of k";
    }
    if (used < 0 || (!p.ring && end > p.capacity)) {
      std::snprintf(text, sizeof(text), "seqused_k[%lld] is %lld and %lld tokens come; the cache holds 0 to %lld",
                    static_cast<long long>(n), used, static_cast<long long>(rows.length),
                    static_cast<long long>(p.capacity));
      return text;
    }
    if (p.block_table == nullptr || rows.length == 0) continue;
    for (int64_t page = used / p.page_size; page * p.page_size < end; ++page) {
      const int32_t entry = p.block_table[n * p.max_pages + page];
      if (entry < 0 || entry >= p.num_pages) {
        std::snprintf(text, sizeof(text), "block_table[%lld, %lld] is %d; allowed: 0 to %lld",
                      static_cast<long long>(n), static_cast<long long>(page), entry,
                      static_cast<long long>(p.num_pages - 1));
        return text;
      }
    }
  }
  return nullptr;
}

// Offset in elements of a position of sequence n, in a cache of shape [sequences, capacity] or [num_pages, page_size].
int64_t place(const AppendParams& p, const View& cache, int64_t n, int64_t position) {
  int64_t block = n, slot = p.ring ? position % p.capacity : position;
  if (p.block_table != nullptr) {
    block = p.block_table[n * p.max_pages + slot / p.page_size];
    slot %= p.page_size;
  }
  return block * cache.batch_stride + slot * cache.time_stride;
}

// One head of one token on its way into the cache.
template <class T, class Cache>
void write_row(const T* in, int64_t dim, const float* scale, Cache* out) {
  using C = Compute<T>;
  if constexpr (std::is_same_v<T, Cache>) {
    if (scale == nullptr) {
      std::memcpy(out, in, dim * sizeof(T));
      return;
    }
  }
  // Divided, not multiplied by a reciprocal: the stored number is the nearest one.
  const C by = scale != nullptr ? static_cast<C>(*scale) : C{1};
  C wide[256];
  for_each_vector<C>(dim, [&](auto io) { io.store(wide, io.load(in) / by); });
  for (int64_t i = 0; i < dim; ++i) from_float(wide[i], out + i);
}

// The token that row `t` of k and v is: its sequence and position. Rows are asked for in increasing order.
class Tokens {
 public:
  explicit Tokens(const AppendParams& p) : p_(p) {}

  // False when nothing is to be written: the row belongs to no sequence, or a later token takes its place in the ring.
  bool find(int64_t batch, int64_t t, int64_t* sequence, int64_t* position) {
    if (p_.cu_seqlens != nullptr) {
      while (sequence_ < p_.num_sequences && p_.cu_seqlens[sequence_ + 1] <= t) ++sequence_;
      if (sequence_ >= p_.num_sequences) return false;
      batch = sequence_;
    }
    const Rows rows = rows_of(p_, batch);
    const int64_t index = t - rows.begin;
    if (p_.ring && rows.length - index > p_.capacity) return false;
    *sequence = batch;
    *position = p_.seqused_k[batch] + index;
    return true;
  }

 private:
  const AppendParams& p_;
  int64_t sequence_ = 0;
};

template <class T, class Cache>
const char* run(const AppendParams& p, const Launch& launch) {
  using C = Compute<T>;
  if (p.dim_k > 256 || p.dim_v > 256) return "head dims above 256 are not supported";
  const int64_t pairs = p.inv_freq != nullptr ? p.rotary_dim / 2 : 0;
  const int64_t grain = 1 + 16384 / (p.heads * (p.dim_k + p.dim_v) + 1);
  parallel(launch, p.batch * p.time, grain, [&](int64_t begin, int64_t end) {
    C cos[128], sin[128], factors[256], cross[256], turned[256];
    Tokens tokens(p);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.time, t = row % p.time;
      int64_t n, position;
      if (!tokens.find(b, t, &n, &position)) continue;
      const T* k = static_cast<const T*>(p.k.data) + b * p.k.batch_stride + t * p.k.time_stride;
      const T* v = static_cast<const T*>(p.v.data) + b * p.v.batch_stride + t * p.v.time_stride;
      Cache* k_out = static_cast<Cache*>(p.k_cache.data) + place(p, p.k_cache, n, position);
      Cache* v_out = static_cast<Cache*>(p.v_cache.data) + place(p, p.v_cache, n, position);
      if (pairs > 0) {
        token_angles(position, p.inv_freq, pairs, cos, sin);
        arrange_angles(cos, sin, pairs, p.interleaved, factors, cross);
      }
      for (int64_t h = 0; h < p.heads; ++h) {
        const float* k_scale = p.k_scale != nullptr ? p.k_scale + h : nullptr;
        const float* v_scale = p.v_scale != nullptr ? p.v_scale + h : nullptr;
        const T* key = k + h * p.k.head_stride;
        if (pairs > 0) {
          for_each_vector<C>(p.dim_k, [&](auto io) { io.store(turned, io.load(key)); });
          rotate_row(turned, turned, pairs, p.interleaved, factors, cross);
          write_row<C, Cache>(turned, p.dim_k, k_scale, k_out + h * p.k_cache.head_stride);
        } else {
          write_row<T, Cache>(key, p.dim_k, k_scale, k_out + h * p.k_cache.head_stride);
        }
        write_row<T, Cache>(v + h * p.v.head_stride, p.dim_v, v_scale, v_out + h * p.v_cache.head_stride);
      }
    }
  });
  return nullptr;
}

}  // namespace

const char* append_kv(const AppendParams& p, const Launch& launch) {
  if (const char* error = check(p)) return error;
  return with_float_type(p.dtype, [&](auto type) -> const char* {
    using T = decltype(type);
    if (p.cache_dtype == p.dtype) return run<T, T>(p, launch);
    if (p.cache_dtype == DType::kInt8) return run<T, int8_t>(p, launch);
    if (p.cache_dtype == DType::kFloat8E4M3) return run<T, Float8>(p, launch);
    return "k_cache must have the dtype of k, float8_e4m3fn or int8";
  });
}

}  // namespace yoco::cpu::YOCO_ISA
