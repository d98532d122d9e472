// Rotary position embedding of one token: angles once per (token, frequency), shared by its heads. Used by the op
// `rotary` and by `append_kv`, which rotates keys on their way into the cache.
#pragma once

#include "row.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// cos and sin of position * inv_freq. The angle is formed and reduced in double: in float it would be wrong by 0.03
// rad at position 1M. For float results the polynomials run in float on the reduced angle.
inline void token_angles(int64_t position, const float* inv_freq, int64_t pairs, float* __restrict cos,
                         float* __restrict sin) {
  const double at = static_cast<double>(position);
  for (int64_t i = 0; i < pairs; ++i) {
    const double angle = at * static_cast<double>(inv_freq[i]);
    const double shifted = angle * 0.63661977236758134308 + 0x1.8p52;  // quarter turns, rounded by the adder
    const double n = shifted - 0x1.8p52;
    // pi / 2 in two parts; the first has 33 bits, so that its product with n is exact up to n = 2^20.
    const double reduced = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
    const auto r = static_cast<float>(reduced);
    const auto quadrant = static_cast<int32_t>(bit_cast<int64_t>(shifted));
    const float r2 = r * r;
    float s = 2.7557314297e-6f;  // on [-pi/4, pi/4]
    s = s * r2 - 1.9841269304e-4f;
    s = s * r2 + 8.3333333333e-3f;
    s = s * r2 - 1.6666666667e-1f;
    s = r + r * (r2 * s);
    float c = -2.7557314297e-7f;
    c = c * r2 + 2.4801587642e-5f;
    c = c * r2 - 1.3888888889e-3f;
    c = c * r2 + 4.1666666667e-2f;
    c = 1.0f + r2 * (c * r2 - 0.5f);
    const float sin_part = (quadrant & 1) ? c : s, cos_part = (quadrant & 1) ? s : c;
    sin[i] = (quadrant & 2) ? -sin_part : sin_part;
    cos[i] = ((quadrant + 1) & 2) ? -cos_part : cos_part;
  }
}

inline void token_angles(int64_t position, const float* inv_freq, int64_t pairs, double* cos, double* sin) {
  for (int64_t i = 0; i < pairs; ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(inv_freq[i]);
    cos[i] = std::cos(angle);
    sin[i] = std::sin(angle);
  }
}

// What rotate_row reads: [2 * pairs] each. Interleaved: every value twice, the sine with the sign of its component.
template <class C>
void arrange_angles(const C* cos, const C* sin, int64_t pairs, bool interleaved, C* __restrict factors,
                    C* __restrict cross) {
  if (interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
      factors[2 * i] = factors[2 * i + 1] = cos[i];
      cross[2 * i] = -sin[i];
      cross[2 * i + 1] = sin[i];
    }
  } else {
    std::memcpy(factors, cos, pairs * sizeof(C));
    std::memcpy(cross, sin, pairs * sizeof(C));
  }
}

template <class C>
YOCO_INLINE Vec<C> swap_neighbours(Vec<C> v) {
  using Index = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  Indices other;
  for (int i = 0; i < kLanes<C>; ++i) other[i] = i ^ 1;
  return __builtin_shuffle(v, other);
}

// One head of one token; x and y may be the same row. kInverse: by the negative angle.
template <class C, class In, class Out, bool kInverse = false>
YOCO_INLINE void rotate_row(const In* x, Out* y, int64_t pairs, bool interleaved, const C* factors, const C* cross) {
  if (interleaved) {
    for_each_vector<C>(2 * pairs, [&](auto io) {
      const Vec<C> v = io.load(x);
      const Vec<C> crossed = swap_neighbours<C>(v) * io.load(cross);
      io.store(y, kInverse ? v * io.load(factors) - crossed : v * io.load(factors) + crossed);
    });
  } else {
    for_each_vector<C>(pairs, [&](auto io) {
      const Vec<C> a = io.load(x), b = io.load(x + pairs), c = io.load(factors);
      const Vec<C> s = kInverse ? -io.load(cross) : io.load(cross);
      io.store(y, a * c - b * s);
      io.store(y + pairs, a * s + b * c);
    });
  }
}

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
