// Native-width vectors of the compute type (float, or double for float64 tensors), with loads and stores that convert
// from and to the tensor's dtype: what bandwidth-bound kernels need. GCC vector extensions; intrinsics only where the
// compiler finds no good conversion by itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(YOCO_HAS_AVX2) && YOCO_HAS_AVX2
// GCC 12 warns about its own way of saying "undefined" in the AVX-512 headers.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifndef YOCO_HAS_AVX2
#define YOCO_HAS_AVX2 0
#endif
#ifndef YOCO_HAS_AVX512
#define YOCO_HAS_AVX512 0
#endif
#ifndef YOCO_HAS_BF16_DOT
#define YOCO_HAS_BF16_DOT 0
#endif
#ifndef YOCO_HAS_AMX
#define YOCO_HAS_AMX 0
#endif

#define YOCO_INLINE inline __attribute__((always_inline))

namespace yoco::cpu::YOCO_ISA {
namespace {

constexpr int kVectorBytes = YOCO_HAS_AVX512 ? 64 : (YOCO_HAS_AVX2 ? 32 : 16);

template <class C>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));

template <class C>
struct VecOf {
  typedef C type __attribute__((vector_size(kVectorBytes)));
};
template <class C>
using Vec = typename VecOf<C>::type;
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));

// Storage types without arithmetic of their own.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8 {  // e4m3fn: bias 7, no infinities, 0x7f is NaN
  uint8_t bits;
};

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
YOCO_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class C>
YOCO_INLINE Vec<C> splat(C x) {
  return x - Vec<C>{};  // x - 0 is x for every x, so nothing is left of it; 0 + x would turn -0 into 0
}

// ---- scalar conversions

YOCO_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

YOCO_INLINE float to_float(Float16 x) {
#if YOCO_HAS_AVX2
  return _cvtsh_ss(x.bits);
#else
  // The half's exponent and fraction, moved into place, are its value times 2^-112: exact, subnormals included.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  const float magnitude = rest >= 0x7c00u ? bit_cast<float>((rest << 13) | 0x7f800000u)
                                          : bit_cast<float>(rest << 13) * bit_cast<float>(0x77800000u);
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
#endif
}

YOCO_INLINE float to_float(Float8 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80u) << 24, rest = x.bits & 0x7fu;
  const float magnitude = rest == 0x7fu ? bit_cast<float>(0x7fc00000u)
                          : rest >= 8u  ? bit_cast<float>((rest << 20) + (120u << 23))
                                        : static_cast<float>(rest) * 0x1p-9f;
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
}

YOCO_INLINE float to_float(int8_t x) { return static_cast<float>(x); }
YOCO_INLINE float to_float(float x) { return x; }
YOCO_INLINE double to_float(double x) { return x; }

YOCO_INLINE void from_float(float x, float* out) { *out = x; }
YOCO_INLINE void from_float(double x, double* out) { *out = x; }

YOCO_INLINE void from_float(float x, BFloat16* out) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : rounded);
}

YOCO_INLINE void from_float(float x, Float16* out) {
#if YOCO_HAS_AVX2
  out->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
  uint32_t h;
  if (rest > 0x7f800000u) {
    h = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to 65536 or more
    h = 0x7c00u;
  } else if (rest >= 0x38800000u) {
    h = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 lets the adder round at the right bit
    h = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(h | sign);
#endif
}

// Quantised stores saturate; int8 has no NaN, so it stores 0.
template <class C>
YOCO_INLINE int8_t nearest_int8(C x) {
  constexpr C kMagic = std::is_same_v<C, double> ? C(0x1.8p52) : C(0x1.8p23);
  x = x > C{127} ? C{127} : (x < C{-127} ? C{-127} : x);
  const C nearest = (x + kMagic) - kMagic;  // the adder rounds to even
  return x != x ? int8_t{0} : static_cast<int8_t>(nearest);
}
YOCO_INLINE void from_float(float x, int8_t* out) { *out = nearest_int8(x); }
YOCO_INLINE void from_float(double x, int8_t* out) { *out = nearest_int8(x); }  // rounded once, not by way of float

YOCO_INLINE void from_float(float x, Float8* out) {
  const uint32_t sign = (bit_cast<uint32_t>(x) >> 24) & 0x80u;
  float a = std::fabs(x);
  uint32_t e;
  if (a != a) {
    e = 0x7fu;
  } else {
    a = a > 448.0f ? 448.0f : a;
    const uint32_t u = bit_cast<uint32_t>(a);
    // Normal from 2^-6 on; below, adding 2^14 rounds to multiples of 2^-9.
    e = a >= 0x1p-6f ? (u - (120u << 23) + 0x7ffffu + ((u >> 20) & 1u)) >> 20
                     : bit_cast<uint32_t>(a + 0x1p14f) - bit_cast<uint32_t>(0x1p14f);
  }
  out->bits = static_cast<uint8_t>(e | sign);
}

template <class T, class = std::enable_if_t<!std::is_same_v<T, double>>>
YOCO_INLINE void from_float(double x, T* out) {
  from_float(static_cast<float>(x), out);
}

// ---- vector loads and stores

template <class C, class T>
YOCO_INLINE Vec<C> load(const T* p) {
  Vec<C> v;
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
#if YOCO_HAS_AVX512
  if constexpr (std::is_same_v<C, float>) {
    if constexpr (sizeof(T) == 2) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (std::is_same_v<T, BFloat16>) {
        return bit_cast<Vec<C>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
      } else {
        return bit_cast<Vec<C>>(_mm512_cvtph_ps(raw));
      }
    } else if constexpr (sizeof(T) == 1) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (std::is_same_v<T, int8_t>) {
        return bit_cast<Vec<C>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)));
      } else {
        // As a half it is the value times 2^-8; the half-to-float conversion takes subnormals at full speed.
        const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(raw), 7);
        const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
        const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(raw, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
        const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
        return bit_cast<Vec<C>>(_mm512_mask_blend_ps(nan, value, _mm512_set1_ps(NAN)));
      }
    }
  }
#elif YOCO_HAS_AVX2
  if constexpr (std::is_same_v<C, float>) {
    if constexpr (sizeof(T) == 2) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (std::is_same_v<T, BFloat16>) {
        return bit_cast<Vec<C>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
      } else {
        return bit_cast<Vec<C>>(_mm256_cvtph_ps(raw));
      }
    } else if constexpr (sizeof(T) == 1) {
      const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      if constexpr (std::is_same_v<T, int8_t>) {
        return bit_cast<Vec<C>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)));
      } else {
        const __m128i word = _mm_cvtepi8_epi16(raw);
        const __m128i half = _mm_and_si128(_mm_slli_epi16(word, 7), _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
        const __m128i low = _mm_and_si128(word, _mm_set1_epi16(0x7f));
        const __m128i nan = _mm_cmpeq_epi16(low, _mm_set1_epi16(0x7f));  // becomes a half NaN
        return bit_cast<Vec<C>>(_mm256_mul_ps(
            _mm256_cvtph_ps(_mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)))), _mm256_set1_ps(256.0f)));
      }
    }
  }
#endif
  for (int i = 0; i < kLanes<C>; ++i) v[i] = to_float(p[i]);
  return v;
}

template <class C, class T>
YOCO_INLINE void store(T* p, Vec<C> v) {
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(p, &v, sizeof(v));
    return;
  }
#if YOCO_HAS_AVX2
  if constexpr (std::is_same_v<C, float> && std::is_same_v<T, BFloat16>) {
    const VecU u = bit_cast<VecU>(v);
    const VecI nan = v != v;
    const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const VecU bits = nan ? ((u >> 16) | 0x40u) : rounded;
#if YOCO_HAS_AVX512
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
#else
    const __m256i wide = bit_cast<__m256i>(bits);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#endif
    return;
  }
  if constexpr (std::is_same_v<C, float> && std::is_same_v<T, Float16>) {
#if YOCO_HAS_AVX512
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
    return;
  }
#endif
  for (int i = 0; i < kLanes<C>; ++i) from_float(v[i], p + i);
}

// The first n < lanes elements; the other lanes are zero.
template <class C, class T>
YOCO_INLINE Vec<C> load_part(const T* p, int64_t n) {
  Vec<C> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}

template <class C, class T>
YOCO_INLINE void store_part(T* p, Vec<C> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(v[i], p + i);
}

// body(vector index, load, store) over n elements: full vectors, then the rest. `io.load<T>(p)` reads elements
// [i, i + lanes) of a row, `io.store(p, v)` writes them.
template <class C>
struct FullVector {
  int64_t i;
  template <class T>
  YOCO_INLINE Vec<C> load(const T* row) const {
    return YOCO_ISA::load<C>(row + i);
  }
  template <class T>
  YOCO_INLINE void store(T* row, Vec<C> v) const {
    YOCO_ISA::store<C>(row + i, v);
  }
};

template <class C>
struct PartVector {
  int64_t i, n;
  template <class T>
  YOCO_INLINE Vec<C> load(const T* row) const {
    return load_part<C>(row + i, n);
  }
  template <class T>
  YOCO_INLINE void store(T* row, Vec<C> v) const {
    store_part<C>(row + i, v, n);
  }
};

template <class C, class Body>
YOCO_INLINE void for_each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) body(FullVector<C>{i});
  if (i < n) body(PartVector<C>{i, n - i});
}

template <class C>
YOCO_INLINE C sum_lanes(Vec<C> v) {
#if YOCO_HAS_AVX512
  if constexpr (std::is_same_v<C, float>) return _mm512_reduce_add_ps(bit_cast<__m512>(v));
#endif
  C part[kLanes<C>];
  std::memcpy(part, &v, sizeof(v));
  for (int width = kLanes<C> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

// Of lanes that are numbers; what becomes of NaN is not said.
template <class C>
YOCO_INLINE C max_lanes(Vec<C> v) {
#if YOCO_HAS_AVX512
  if constexpr (std::is_same_v<C, float>) return _mm512_reduce_max_ps(bit_cast<__m512>(v));
#endif
  C part[kLanes<C>];
  std::memcpy(part, &v, sizeof(v));
  for (int width = kLanes<C> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
  }
  return part[0];
}

// ---- exp

// Relative error below 2e-7; infinity from 88.4 on, at least 2^-126 on the other side; NaN stays NaN.
YOCO_INLINE Vec<float> exp(Vec<float> x) {
  x = x > 88.8f ? splat(88.8f) : x;
  x = x < -87.3f ? splat(-87.3f) : x;
  const Vec<float> magic = splat(0x1.8p23f);  // adding it rounds to the nearest integer
  const Vec<float> shifted = x * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec<float> y = splat(1.3981999e-3f);
  y = y * r + 8.3334519e-3f;
  y = y * r + 4.1665795e-2f;
  y = y * r + 1.6666665e-1f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const VecI exponent = bit_cast<VecI>(shifted) + 127;  // the low bits of `shifted` are n
  return y * bit_cast<Vec<float>>(exponent << 23);
}

YOCO_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
YOCO_INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

// ---- tasks

// parallel_for over a lambda (begin, end).
template <class Body>
void parallel(const Launch& launch, int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (launch.parallel_for == nullptr || launch.num_threads <= 1 || n <= grain) {
    body(int64_t{0}, n);
    return;
  }
  launch.parallel_for(
      0, n, grain, [](void* ctx, int64_t begin, int64_t end) { (*static_cast<const Body*>(ctx))(begin, end); },
      const_cast<Body*>(&body));
}

// Uninitialised, 64-byte aligned memory for one call.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }
  bool failed(size_t bytes) const { return bytes > 0 && data_ == nullptr; }

 private:
  void* data_;
};

// Calls f with a value of the storage type that `dtype` names.
template <class F>
const char* with_float_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat64:
      return f(double{});
    default:
      return "dtype is not supported by the CPU kernels; allowed: float32, float16, bfloat16, float64";
  }
}

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
