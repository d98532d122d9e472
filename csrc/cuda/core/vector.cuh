// Conversions between storage types and float, and accesses of several elements at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace yoco::cuda {

#define YOCO_DEVICE __device__ __forceinline__

YOCO_DEVICE float to_float(float x) { return x; }
YOCO_DEVICE float to_float(__half x) { return __half2float(x); }
YOCO_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
YOCO_DEVICE float to_float(__nv_fp8_e4m3 x) { return static_cast<float>(x); }
YOCO_DEVICE float to_float(int8_t x) { return static_cast<float>(x); }

template <typename T>
YOCO_DEVICE T from_float(float x);
template <>
YOCO_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
YOCO_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
YOCO_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
// Saturates at +-448; NaN stays NaN.
template <>
YOCO_DEVICE __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x) {
  return __nv_fp8_e4m3(x);
}
// Round half to even, saturated at +-127 (symmetric: -128 is never written). NaN becomes 0.
template <>
YOCO_DEVICE int8_t from_float<int8_t>(float x) {
  return static_cast<int8_t>(__float2int_rn(fminf(fmaxf(x == x ? x : 0.f, -127.f), 127.f)));
}

// N elements of T that are loaded and stored together; sizeof must be a power of two up to 16.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16, "one access has at most 16 bytes");
  T at[N];
  YOCO_DEVICE T& operator[](int i) { return at[i]; }
  YOCO_DEVICE const T& operator[](int i) const { return at[i]; }
};

// The widest access for T.
template <typename T>
constexpr int kVec = 16 / sizeof(T);

namespace detail {
template <int kBytes>
struct Raw;
template <>
struct Raw<1> {
  using type = uint8_t;
};
template <>
struct Raw<2> {
  using type = uint16_t;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};
}  // namespace detail

template <int N, typename T>
YOCO_DEVICE Vec<T, N> load(const T* p) {
  using R = typename detail::Raw<sizeof(T) * N>::type;
  R raw = *reinterpret_cast<const R*>(p);
  return *reinterpret_cast<Vec<T, N>*>(&raw);
}
// Through the read-only path; for memory that nothing writes while the kernel runs.
template <int N, typename T>
YOCO_DEVICE Vec<T, N> load_const(const T* p) {
  using R = typename detail::Raw<sizeof(T) * N>::type;
  R raw = __ldg(reinterpret_cast<const R*>(p));
  return *reinterpret_cast<Vec<T, N>*>(&raw);
}
template <int N, typename T>
YOCO_DEVICE void store(T* p, const Vec<T, N>& v) {
  using R = typename detail::Raw<sizeof(T) * N>::type;
  *reinterpret_cast<R*>(p) = *reinterpret_cast<const R*>(&v);
}

// To global memory in exactly one instruction: the compiler is free to split the store above, and does.
template <int N, typename T>
YOCO_DEVICE void store_global(T* p, const Vec<T, N>& v) {
  constexpr int kBytes = sizeof(T) * N;
  const size_t to = __cvta_generic_to_global(p);
  if constexpr (kBytes == 16) {
    const uint4 r = *reinterpret_cast<const uint4*>(&v);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(r.x), "r"(r.y), "r"(r.z), "r"(r.w)
                 : "memory");
  } else if constexpr (kBytes == 8) {
    const uint2 r = *reinterpret_cast<const uint2*>(&v);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};\n" ::"l"(to), "r"(r.x), "r"(r.y) : "memory");
  } else {
    store<N>(p, v);
  }
}

// Global memory, through the read-only path.
template <int N, typename T>
YOCO_DEVICE void load_float(float (&out)[N], const T* p) {
  const Vec<T, N> v = load_const<N>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(v[i]);
}
template <int N, typename T>
YOCO_DEVICE void store_float(T* p, const float (&in)[N]) {
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = from_float<T>(in[i]);
  store_global<N>(p, v);
}

}  // namespace yoco::cuda
