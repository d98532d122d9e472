// The op `rotary`: rotates pairs of components of every head by the token's position.
#include "rotary.h"

#include <cstdio>

namespace yoco::cpu::YOCO_ISA {
namespace {

thread_local char message[160];

const char* check(const RotaryParams& p) {
  if (p.rotary_dim % 2 != 0 || p.rotary_dim < 0 || p.rotary_dim > p.dim) {
    return "rotary_dim must be even and at most the head dim";
  }
  if (p.inv_freq != nullptr) return nullptr;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t length = p.cu_seqlens != nullptr ? p.cu_seqlens[n + 1] - p.cu_seqlens[n] : p.time;
    const int64_t begin = p.offsets != nullptr ? p.offsets[n] : 0;
    if (length > 0 && (begin < 0 || begin + length > p.table_length)) {
      std::snprintf(message, sizeof(message),
                    "sequence %lld has positions %lld to %lld; cos and sin have %lld positions",
                    static_cast<long long>(n), static_cast<long long>(begin),
                    static_cast<long long>(begin + length - 1), static_cast<long long>(p.table_length));
      return message;
    }
  }
  return nullptr;
}

// The sequence of a token and its index in it; tokens are asked for in increasing order.
class TokenPositions {
 public:
  explicit TokenPositions(const RotaryParams& p) : p_(p) {}

  // False when the token lies behind the last sequence.
  bool find(int64_t batch, int64_t time, int64_t* position) {
    int64_t sequence = batch, index = time;
    if (p_.cu_seqlens != nullptr) {
      while (sequence_ < p_.num_sequences && p_.cu_seqlens[sequence_ + 1] <= time) ++sequence_;
      if (sequence_ >= p_.num_sequences) return false;
      sequence = sequence_;
      index = time - p_.cu_seqlens[sequence];
    }
    *position = index + (p_.offsets != nullptr ? p_.offsets[sequence] : 0);
    return true;
  }

 private:
  const RotaryParams& p_;
  int64_t sequence_ = 0;
};

template <class C, class Table>
void load_table(const void* table, int64_t row, int64_t pairs, C* out) {
  const Table* in = static_cast<const Table*>(table) + row * pairs;
  for_each_vector<C>(pairs, [&](auto io) { io.store(out, io.load(in)); });
}

template <class T>
const char* run(const RotaryParams& p, const Launch& launch) {
  using C = Compute<T>;
  const int64_t pairs = p.rotary_dim / 2, tokens = p.batch * p.time;
  const int64_t grain = 1 + 16384 / (p.heads * p.dim + 1);
  parallel(launch, tokens, grain, [&](int64_t begin, int64_t end) {
    // Head dims are small (the angles of one token stay in L1), but nothing here bounds them.
    const Scratch scratch(sizeof(C) * 6 * (pairs + 64));
    C* cos = scratch.as<C>();
    C* sin = cos + pairs + 64;
    C* factors = sin + pairs + 64;
    C* cross = factors + 2 * pairs + 64;
    TokenPositions positions(p);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.time, t = token % p.time;
      const T* x = static_cast<const T*>(p.x.data) + b * p.x.batch_stride + t * p.x.time_stride;
      T* y = static_cast<T*>(p.y.data) + b * p.y.batch_stride + t * p.y.time_stride;
      int64_t position;
      if (!positions.find(b, t, &position)) {
        for (int64_t h = 0; h < p.heads; ++h) std::memset(y + h * p.y.head_stride, 0, p.dim * sizeof(T));
        continue;
      }
      if (p.inv_freq != nullptr) {
        token_angles(position, p.inv_freq, pairs, cos, sin);
      } else if (p.table_dtype == p.dtype) {
        load_table<C, T>(p.cos, position, pairs, cos);
        load_table<C, T>(p.sin, position, pairs, sin);
      } else {
        load_table<C, float>(p.cos, position, pairs, cos);
        load_table<C, float>(p.sin, position, pairs, sin);
      }
      if (p.inverse) {
        for (int64_t i = 0; i < pairs; ++i) sin[i] = -sin[i];
      }
      arrange_angles(cos, sin, pairs, p.interleaved, factors, cross);
      for (int64_t h = 0; h < p.heads; ++h) {
        const T* from = x + h * p.x.head_stride;
        T* to = y + h * p.y.head_stride;
        rotate_row(from, to, pairs, p.interleaved, factors, cross);
        std::memcpy(to + p.rotary_dim, from + p.rotary_dim, (p.dim - p.rotary_dim) * sizeof(T));
      }
    }
  });
  return nullptr;
}

}  // namespace

const char* rotary(const RotaryParams& p, const Launch& launch) {
  if (const char* error = check(p)) return error;
  return with_float_type(p.dtype, [&](auto type) { return run<decltype(type)>(p, launch); });
}

}  // namespace yoco::cpu::YOCO_ISA
