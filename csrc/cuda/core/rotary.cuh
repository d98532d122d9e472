// Rotary angles and rotations, written once for every kernel that rotates.
//
// position * inv_freq in float32 is off by 0.06 radians at a million positions. Here an angle is a fraction of a turn
// in 64-bit fixed point: whole turns overflow away, so position * turns is exact modulo one turn for every int64
// position, and no double precision is needed.
#pragma once

#include "cuda/core/vector.cuh"

namespace yoco::cuda {

// inv_freq / (2 pi) modulo one turn, in units of 2^-64 turns; exact to one unit below 2 radians per position.
YOCO_DEVICE uint64_t turns_per_position(float inv_freq) {
  constexpr uint64_t kInverse2Pi = 0x28BE60DB9391054Aull;  // floor(2^64 / (2 pi))
  const uint32_t bits = __float_as_uint(inv_freq);
  const int exponent = static_cast<int>(bits >> 23 & 0xff);
  const uint64_t mantissa = (bits & 0x7fffffu) | (exponent == 0 ? 0u : 0x800000u);
  const int shift = 150 - max(exponent, 1);  // inv_freq = mantissa * 2^-shift
  const uint64_t low = mantissa * kInverse2Pi, high = __umul64hi(mantissa, kInverse2Pi);
  uint64_t turns;
  if (shift >= 128) {
    turns = 0;
  } else if (shift >= 64) {
    turns = high >> (shift - 64);
  } else if (shift > 0) {
    turns = low >> shift | high << (64 - shift);
  } else {
    turns = shift > -64 ? low << -shift : 0;
  }
  return bits >> 31 ? 0 - turns : turns;
}

struct Rotation {
  float cos, sin;
};

YOCO_DEVICE Rotation rotation(uint64_t turns, int64_t position) {
  // In (-1, 1]: half turns, what sincospi takes.
  const float half_turns = __ll2float_rn(static_cast<int64_t>(turns * static_cast<uint64_t>(position))) * 0x1p-63f;
  Rotation r;
  sincospif(half_turns, &r.sin, &r.cos);
  return r;
}

// One pair (a, b) rotated by the angle.
YOCO_DEVICE void rotate(float& a, float& b, float cos, float sin) {
  const float x = a;
  a = x * cos - b * sin;
  b = x * sin + b * cos;
}

}  // namespace yoco::cuda
