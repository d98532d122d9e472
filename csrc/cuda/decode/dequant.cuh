// One-byte cache elements to half operands of the tensor cores, four at a time; exact for every finite value. Half
// whatever the dtype of q: it holds both formats, and its conversions are the cheapest. The scale per head is applied
// to logits and outputs, never to elements.
#pragma once

#include "cuda/core/ptx.cuh"

namespace yoco::cuda {

// Bytes of w in the order 0, 2, 1, 3: what the transposed V fragments need.
YOCO_DEVICE uint32_t swap_middle_bytes(uint32_t w) { return __byte_perm(w, 0, 0x3120); }

namespace detail {

YOCO_DEVICE uint32_t bits(__half2 x) { return *reinterpret_cast<const uint32_t*>(&x); }
YOCO_DEVICE __half2 halves(uint32_t x) { return *reinterpret_cast<const __half2*>(&x); }

// Two e4m3 values in the high bytes of the two halves of x: the seven bits behind the sign move onto the low end of the
// wider exponent, which divides every value, subnormals too, by 2^8.
YOCO_DEVICE uint32_t widen_e4m3(uint32_t x) {
  return bits(__hmul2(halves((x & 0x80008000u) | (x >> 1 & 0x3f803f80u)), __float2half2_rn(256.f)));
}

}  // namespace detail

// low = elements 0, 1 of the four bytes w; high = elements 2, 3.
YOCO_DEVICE void dequantise(__nv_fp8_e4m3, uint32_t w, uint32_t& low, uint32_t& high) {
#if __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 a, b;\n"
      "mov.b32 {a, b}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, a;\n"
      "cvt.rn.f16x2.e4m3x2 %1, b;\n"
      "}\n"
      : "=r"(low), "=r"(high)
      : "r"(w));
#else
  low = detail::widen_e4m3(__byte_perm(w, 0, 0x1404));   // bytes: 0, w0, 0, w1
  high = detail::widen_e4m3(__byte_perm(w, 0, 0x3424));  // bytes: 0, w2, 0, w3
  // That makes 480 of the two NaN codes 0x7f and 0xff.
  if (((w & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) {
    constexpr uint32_t kNan = 0x7fff;
    if ((w & 0x7fu) == 0x7fu) low = (low & 0xffff0000u) | kNan;
    if ((w >> 8 & 0x7fu) == 0x7fu) low = (low & 0xffffu) | kNan << 16;
    if ((w >> 16 & 0x7fu) == 0x7fu) high = (high & 0xffff0000u) | kNan;
    if ((w >> 24 & 0x7fu) == 0x7fu) high = (high & 0xffffu) | kNan << 16;
  }
#endif
}

// 1024 + (x + 128) is the half with bits 0x6400 | (x ^ 0x80).
YOCO_DEVICE void dequantise(int8_t, uint32_t w, uint32_t& low, uint32_t& high) {
  w ^= 0x80808080u;
  const __half2 bias = __float2half2_rn(1152.f);
  low = detail::bits(__hsub2(detail::halves(__byte_perm(w, 0x64646464u, 0x4140)), bias));
  high = detail::bits(__hsub2(detail::halves(__byte_perm(w, 0x64646464u, 0x4342)), bias));
}

}  // namespace yoco::cuda
