// Operands of the matrix products of gated retention, in two arithmetics with one interface:
//
//   FloatOps<C>   operands and sums in C (float, or double); any instruction set
//   BFloatOps     operands in bfloat16, exact products, sums in float
//
// A product is c[m][n] (+)= left[m][k] right[k][n], done by gemm of matrix.h; this file makes the left and right
// operands from rows of tokens, from states, and from either scaled by decays. All extents are multiples of kStep:
// callers pad with zeros. Rows are kRowPadBytes longer than their width, so that the rows of a power-of-two matrix do
// not all fall into the same cache sets.
#pragma once

#include <utility>

#include "matrix.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

// ---- scratch memory of one task

// A bump allocator over memory that the caller sized; released in one go.
class Arena {
 public:
  Arena(void* data, size_t bytes) : data_(static_cast<char*>(data)), bytes_(bytes) {}
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (used_ + bytes > bytes_) std::abort();  // the size formula of the kernel is wrong: a bug, not a state to run in
    T* p = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes;
    return p;
  }
  size_t mark() const { return used_; }
  void release(size_t mark) { used_ = mark; }

 private:
  char* data_;
  size_t bytes_, used_ = 0;
};

constexpr int kRowPadBytes = 64;

// A row-major matrix of elements, ld apart.
template <class E>
struct Rows {
  E* data;
  int64_t ld;
  E* row(int64_t i) const { return data + i * ld; }
};

template <class E>
Rows<E> take_rows(Arena& arena, int64_t rows, int64_t width) {
  const int64_t ld = width + kRowPadBytes / static_cast<int64_t>(sizeof(E));
  return {arena.take<E>(rows * ld), ld};
}

// ---- transposes

template <class V, int... I>
YOCO_INLINE V zip_low(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * static_cast<int>(sizeof...(I)))...);
}
template <class V, int... I>
YOCO_INLINE V zip_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (n / 2 + I / 2 + (I % 2) * n)...);
}

// A square of lanes x lanes: log2(lanes) rounds that interleave rows half a square apart.
template <class C>
YOCO_INLINE void transpose_square(C* to, int64_t to_ld, const C* from, int64_t from_ld) {
  constexpr int n = kLanes<C>;
  constexpr auto lanes = std::make_integer_sequence<int, n>{};
  Vec<C> x[n], y[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) x[i] = load<C>(from + i * from_ld);
#pragma GCC unroll 4
  for (int width = 1; width < n; width *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      y[2 * i] = zip_low(x[i], x[i + n / 2], lanes);
      y[2 * i + 1] = zip_high(x[i], x[i + n / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store<C>(to + i * to_ld, x[i]);
}

// to[c][r] = from[r][c]; rows and columns are multiples of the lanes.
template <class C>
void transpose(C* to, int64_t to_ld, const C* from, int64_t from_ld, int64_t rows, int64_t columns) {
  constexpr int n = kLanes<C>;
  for (int64_t r = 0; r < rows; r += n) {
    for (int64_t c = 0; c < columns; c += n)
      transpose_square(to + c * to_ld + r, to_ld, from + r * from_ld + c, from_ld);
  }
}

// ---- float and double

template <class C>
struct FloatOps {
  using Compute = C;
  using Element = C;
  static constexpr int kStep = 16;  // extents; also the granularity at which a causal product skips its empty corner
  static constexpr int kParts = 1;

  struct Left {
    const C* data;
    int64_t ld;
    Left at(int64_t m, int64_t k) const { return {data + m * ld + k, ld}; }
  };
  struct Right {
    C* data;
    int64_t ld;
    Right at(int64_t k) const { return {data + k * ld, ld}; }
  };

  // The products of a causal triangle are 1, 2, 3 and 4 blocks wide: what gemm would do one vector at a time is done
  // here with as many vectors as are left.
  static void multiply(C* c, int64_t ldc, Left a, Right b, int64_t m, int64_t n, int64_t k, bool accumulate) {
    constexpr int64_t kWidth = kLanes<C>;
    const int64_t rest = YOCO_HAS_AVX512 ? n / kWidth % 4 : 0, wide = n - rest * kWidth;
    if (wide > 0) gemm<C>(m, wide, k, a.data, a.ld, b.data, b.ld, c, ldc, accumulate);
    if (rest == 1) register_columns<1, C>(m, k, a.data, a.ld, b.data + wide, b.ld, c + wide, ldc, accumulate);
    if (rest == 2) register_columns<2, C>(m, k, a.data, a.ld, b.data + wide, b.ld, c + wide, ldc, accumulate);
    if (rest == 3) register_columns<3, C>(m, k, a.data, a.ld, b.data + wide, b.ld, c + wide, ldc, accumulate);
  }

  static Left left(Rows<C> x) { return {x.data, x.ld}; }
  // x^T, from x or from right_transposed(x); its columns kParts times over, as the rows of a scaled operand are.
  static Left left_transposed(Arena& arena, Rows<C> x, int64_t rows, int64_t width) {
    const Right xt = right_transposed(arena, x, rows, width);
    return {xt.data, xt.ld};
  }
  static Left left_transposed(Arena&, Right xt, int64_t, int64_t) { return {xt.data, xt.ld}; }
  static Right right(Arena&, Rows<C> x, int64_t, int64_t) { return {x.data, x.ld}; }
  static Right right_transposed(Arena& arena, Rows<C> x, int64_t rows, int64_t width) {
    const Rows<C> to = take_rows<C>(arena, width, rows);
    transpose(to.data, to.ld, x.data, x.ld, rows, width);
    return {to.data, to.ld};
  }
  static Right take_right(Arena& arena, int64_t rows, int64_t width) {
    const Rows<C> x = take_rows<C>(arena, rows, width);
    return {x.data, x.ld};
  }
  // Rows k and k + 1 of a right operand, columns n to n + lanes.
  static YOCO_INLINE void put(Right to, int64_t k, int64_t n, Vec<C> row, Vec<C> next) {
    store<C>(to.data + k * to.ld + n, row);
    store<C>(to.data + (k + 1) * to.ld + n, next);
  }
  static YOCO_INLINE void put_elements(C* to, Vec<C> x) { store<C>(to, x); }
  static YOCO_INLINE Vec<C> rounded(Vec<C> x) { return x; }
  // A matrix of the compute type as rows of elements.
  static Rows<C> elements(Arena&, const C* x, int64_t ld, int64_t, int64_t) { return {const_cast<C*>(x), ld}; }
  // The transpose of a square matrix of the compute type, as a left operand.
  static Left square_transposed(Arena& arena, const C* x, int64_t ld, int64_t size) {
    const Rows<C> to = take_rows<C>(arena, size, size);
    transpose(to.data, to.ld, x, ld, size, size);
    return {to.data, to.ld};
  }
};

// ---- bfloat16
#if YOCO_HAS_BF16_DOT

struct BFloatOps {
  using Compute = float;
  using Element = BFloat16;
  static constexpr int kStep = 32;
  static constexpr int kParts = 2;  // a scaled operand is the sum of two bfloat16 matrices, one above the other

  struct Left {
    const BFloat16* data;
    int64_t ld;
    Left at(int64_t m, int64_t k) const { return {data + m * ld + k, ld}; }
  };
  struct Right {
    uint32_t* data;  // [k / 2][n]: low half row k, high half row k + 1
    int64_t ld;
    Right at(int64_t k) const { return {data + k / 2 * ld, ld}; }
  };

  static void multiply(float* c, int64_t ldc, Left a, Right b, int64_t m, int64_t n, int64_t k, bool accumulate) {
    gemm<BFloat16>(m, n, k, a.data, a.ld, reinterpret_cast<const BFloat16*>(b.data), b.ld, c, ldc, accumulate);
  }

  static Left left(Rows<BFloat16> x) { return {x.data, x.ld}; }

  static Left left_transposed(Arena& arena, Rows<BFloat16> x, int64_t rows, int64_t width) {
    return left_transposed(arena, right_transposed(arena, x, rows, width), rows, width);
  }

  // From the pairs of right_transposed: row 2r of the transpose is their low halves, row 2r + 1 the high halves.
  static Left left_transposed(Arena& arena, Right pairs, int64_t rows, int64_t width) {
    const Rows<BFloat16> to = take_rows<BFloat16>(arena, width, kParts * rows);
    alignas(64) uint16_t even[32], odd[32];
    for (int i = 0; i < 32; ++i) {
      even[i] = static_cast<uint16_t>(2 * i);
      odd[i] = static_cast<uint16_t>(2 * i + 1);
    }
    const __m512i low = _mm512_load_si512(even), high = _mm512_load_si512(odd);
    for (int64_t r = 0; r < width; r += 2) {
      const uint32_t* from = pairs.data + r / 2 * pairs.ld;
      for (int64_t n = 0; n < rows; n += 32) {
        const __m512i a = _mm512_loadu_si512(from + n), b = _mm512_loadu_si512(from + n + 16);
        const __m512i first = _mm512_permutex2var_epi16(a, low, b), second = _mm512_permutex2var_epi16(a, high, b);
        for (int64_t part = 0; part < kParts; ++part) {
          _mm512_storeu_si512(to.row(r) + part * rows + n, first);
          _mm512_storeu_si512(to.row(r + 1) + part * rows + n, second);
        }
      }
    }
    return {to.data, to.ld};
  }

  static Right right(Arena& arena, Rows<BFloat16> x, int64_t rows, int64_t width) {
    const Right to = take_right(arena, rows, width);
    for (int64_t k = 0; k < rows; k += 2) {
      uint32_t* pairs = to.data + k / 2 * to.ld;
      for (int64_t n = 0; n < width; n += 16) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.row(k) + n));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.row(k + 1) + n));
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
        _mm512_storeu_si512(pairs + n, _mm512_or_si512(_mm512_cvtepu16_epi32(a), high));
      }
    }
    return to;
  }

  // Two neighbours of a row are one 32-bit word: the pairs of the transpose are the transpose of the words.
  static Right right_transposed(Arena& arena, Rows<BFloat16> x, int64_t rows, int64_t width) {
    const Right to = take_right(arena, width, rows);
    transpose(reinterpret_cast<float*>(to.data), to.ld, reinterpret_cast<const float*>(x.data), x.ld / 2, rows,
              width / 2);
    return to;
  }

  static Right take_right(Arena& arena, int64_t rows, int64_t width) {
    const Rows<uint32_t> x = take_rows<uint32_t>(arena, rows / 2, width);
    return {x.data, x.ld};
  }

  static YOCO_INLINE void put(Right to, int64_t k, int64_t n, Vec<float> row, Vec<float> next) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(row)), high = _mm512_cvtepu16_epi32(narrow(next));
    _mm512_storeu_si512(to.data + k / 2 * to.ld + n, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  static YOCO_INLINE Vec<float> rounded(Vec<float> x) {
    return bit_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(x)), 16));
  }

  static Rows<BFloat16> elements(Arena& arena, const float* x, int64_t ld, int64_t rows, int64_t width) {
    const Rows<BFloat16> to = take_rows<BFloat16>(arena, rows, width);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < width; n += 16) put_elements(to.row(r) + n, load<float>(x + r * ld + n));
    }
    return to;
  }

  static Left square_transposed(Arena& arena, const float* x, int64_t ld, int64_t size) {
    const Rows<BFloat16> to = take_rows<BFloat16>(arena, size, size);
    const size_t mark = arena.mark();
    const Rows<float> turned = take_rows<float>(arena, size, size);
    transpose(turned.data, turned.ld, x, ld, size, size);
    for (int64_t r = 0; r < size; ++r) {
      for (int64_t n = 0; n < size; n += 16) put_elements(to.row(r) + n, load<float>(turned.row(r) + n));
    }
    arena.release(mark);
    return {to.data, to.ld};
  }

  static YOCO_INLINE void put_elements(BFloat16* to, Vec<float> x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x));
  }

 private:
  static YOCO_INLINE __m256i narrow(Vec<float> x) { return bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(x))); }
};

#endif  // YOCO_HAS_BF16_DOT

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
