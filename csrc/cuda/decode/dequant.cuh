// One-byte cache elements to the 16-bit operands of the tensor cores, four at a time; exact for every finite value. The
// scale per head is applied to logits and outputs, never to elements.
#pragma once

#include "cuda/core/ptx.cuh"

namespace yoco::cuda {

// Bytes of w in the order 0, 2, 1, 3: what the transposed V fragments need.
YOCO_DEVICE uint32_t swap_middle_bytes(uint32_t w) { return __byte_perm(w, 0, 0x3120); }

namespace detail {

template <typename T>
YOCO_DEVICE uint32_t multiply2(uint32_t x, float by);
template <>
YOCO_DEVICE uint32_t multiply2<__half>(uint32_t x, float by) {
  const __half2 r = __hmul2(*reinterpret_cast<__half2*>(&x), __float2half2_rn(by));
  return *reinterpret_cast<const uint32_t*>(&r);
}
template <>
YOCO_DEVICE uint32_t multiply2<__nv_bfloat16>(uint32_t x, float by) {
  const __nv_bfloat162 r = __hmul2(*reinterpret_cast<__nv_bfloat162*>(&x), __float2bfloat162_rn(by));
  return *reinterpret_cast<const uint32_t*>(&r);
}

// Two e4m3 values in the high bytes of the two halves of x: the seven bits behind the sign are moved onto the low end
// of the wider exponent, which divides every value, subnormals too, by 2^(bias - 7).
template <typename T>
YOCO_DEVICE uint32_t widen_e4m3(uint32_t x) {
  if constexpr (std::is_same<T, __half>::value) {
    return multiply2<T>((x & 0x80008000u) | (x >> 1 & 0x3f803f80u), 0x1p8f);
  } else {
    return multiply2<T>((x & 0x80008000u) | (x >> 4 & 0x07f007f0u), 0x1p120f);
  }
}

}  // namespace detail

// low = elements 0, 1 of the four bytes w; high = elements 2, 3.
template <typename T, typename Cache>
struct Dequant;

template <typename T>
struct Dequant<T, __nv_fp8_e4m3> {
  YOCO_DEVICE static void run(uint32_t w, uint32_t& low, uint32_t& high) {
    low = detail::widen_e4m3<T>(__byte_perm(w, 0, 0x1404));   // bytes: 0, w0, 0, w1
    high = detail::widen_e4m3<T>(__byte_perm(w, 0, 0x3424));  // bytes: 0, w2, 0, w3
    // The widened code would make 480 of the two NaN codes 0x7f and 0xff.
    if (((w & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) {
      constexpr uint32_t kNan = 0x7fff;
      if ((w & 0x7fu) == 0x7fu) low = (low & 0xffff0000u) | kNan;
      if ((w >> 8 & 0x7fu) == 0x7fu) low = (low & 0xffffu) | kNan << 16;
      if ((w >> 16 & 0x7fu) == 0x7fu) high = (high & 0xffff0000u) | kNan;
      if ((w >> 24 & 0x7fu) == 0x7fu) high = (high & 0xffffu) | kNan << 16;
    }
  }
};

template <>
struct Dequant<__half, int8_t> {
  // 1024 + (x + 128) is the half with bits 0x6400 | (x ^ 0x80).
  YOCO_DEVICE static void run(uint32_t w, uint32_t& low, uint32_t& high) {
    w ^= 0x80808080u;
    const uint32_t a = __byte_perm(w, 0x64646464u, 0x4140), b = __byte_perm(w, 0x64646464u, 0x4342);
    const __half2 bias = __float2half2_rn(1152.f);
    const __half2 l = __hsub2(*reinterpret_cast<const __half2*>(&a), bias);
    const __half2 h = __hsub2(*reinterpret_cast<const __half2*>(&b), bias);
    low = *reinterpret_cast<const uint32_t*>(&l);
    high = *reinterpret_cast<const uint32_t*>(&h);
  }
};

template <>
struct Dequant<__nv_bfloat16, int8_t> {
  // 2^23 + (x + 128) is the float with bits 0x4b000000 | (x ^ 0x80); an int8 fits the upper half of its float exactly.
  YOCO_DEVICE static void run(uint32_t w, uint32_t& low, uint32_t& high) {
    w ^= 0x80808080u;
    const auto element = [w](uint32_t selector) {
      return __float_as_uint(__uint_as_float(__byte_perm(w, 0x4b000000u, selector)) - 8388736.f);
    };
    low = __byte_perm(element(0x7440), element(0x7441), 0x7632);
    high = __byte_perm(element(0x7442), element(0x7443), 0x7632);
  }
};

}  // namespace yoco::cuda
