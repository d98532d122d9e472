// Small matrix products C (+)= A B on tiles that live in the cache: AMX tiles, bf16 dot products, or FMA.
//
// Operand type (MatrixOperand<T>): bf16 inputs stay bf16 where the CPU multiplies bf16; every other low-precision input
// is widened to float; float64 stays float64. Accumulators are float (double for float64).
// SplitOperand<T>: the same, but where the CPU has AMX float32 and float16 become planes of bf16 (Split<n>).
//
//   A   [rows, lda]          row major, Op
//   B   [depth / kPair, ldb, kPair]  packed: kPair consecutive k of one column lie together (2 for bf16, else 1)
//   C   [rows, ldc]          row major, accumulator type
//
// Split<n>: every 32 consecutive bf16 of these layouts (64 bytes: one row of a tile) become n times 64 bytes, plane
// after plane. Strides and offsets stay counted in numbers, but a pointer may only move by multiples of 32 of them.
//
// Buffers are padded, so that no product has tails: rows of A and C up to a multiple of kMatrixRows must exist (their
// contents may be anything: a row of C depends on the same row of A only), depth is a multiple of matrix_depth<Op>()
// with ZEROS in the padding of A and B both (0 * NaN is NaN), and N is a multiple of kMatrixCols. padded_rows / _cols /
// _depth round up. The pack functions fill the padding.
#pragma once

#include <algorithm>
#include <utility>

#include "row.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

template <class T>
using MatrixOperand =
    std::conditional_t<std::is_same_v<T, double>, double,
                       std::conditional_t<std::is_same_v<T, BFloat16> && YOCO_HAS_BF16_DOT, BFloat16, float>>;

// A number as the sum of n bf16, each the leading bits of what the ones before it leave: three hold a float32 exactly,
// two a float16. The planes of 32 numbers lie behind each other, so one object means nothing by itself.
template <int n>
struct Split {
  BFloat16 planes[n];
};
template <class T>
constexpr int kPlanes = std::is_same_v<T, float> ? 3 : (std::is_same_v<T, Float16> ? 2 : 1);
template <class T>
using SplitOperand = std::conditional_t<YOCO_HAS_AMX && (kPlanes<T> > 1), Split<kPlanes<T>>, MatrixOperand<T>>;
template <class Op>
constexpr bool kIsSplit = false;
template <int n>
constexpr bool kIsSplit<Split<n>> = true;

template <class Op>
using Accumulator = std::conditional_t<std::is_same_v<Op, double>, double, float>;

constexpr int64_t kMatrixRows = 16;
constexpr int64_t kMatrixCols = 16;
template <class Op>
constexpr int kPair = std::is_same_v<Op, BFloat16> || kIsSplit<Op> ? 2 : 1;
template <class Op>
constexpr int64_t matrix_depth() {
  return kPair<Op> == 2 ? 32 : 1;
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t padded_rows(int64_t n) { return round_up(n, kMatrixRows); }
constexpr int64_t padded_cols(int64_t n) { return round_up(n, kMatrixCols); }
template <class Op>
constexpr int64_t padded_depth(int64_t n) {
  return round_up(n, matrix_depth<Op>());
}

// Lives in every task that multiplies: AMX needs its tile registers configured in the thread (and other libraries in
// this process configure them for themselves).
class MatrixScope {
 public:
#if YOCO_HAS_AMX
  MatrixScope() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes per row
      config[48 + tile] = 16;      // rows
    }
    // GCC's intrinsic only says that it reads the first word.
    __asm__ volatile("" : : "r"(config) : "memory");
    _tile_loadconfig(config);
  }
  ~MatrixScope() { _tile_release(); }
#else
  MatrixScope() {}
#endif
  MatrixScope(const MatrixScope&) = delete;
  MatrixScope& operator=(const MatrixScope&) = delete;
};

// ---- planes

#if YOCO_HAS_AVX512
// dst[j][i] = src[i][j] for 16 x 16 words of 32 bits; rows beyond `rows` read as zero.
YOCO_INLINE void transpose_words(const uint32_t* src, int64_t stride, int rows, uint32_t* dst, int64_t dst_stride) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_loadu_si512(src + i * stride) : _mm512_setzero_si512();
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_si512(dst + i * dst_stride, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(dst + (4 + i) * dst_stride, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(dst + (8 + i) * dst_stride, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(dst + (12 + i) * dst_stride, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}
#endif

// Where a plane of the 32 numbers at p begins.
template <class Op>
YOCO_INLINE auto plane_of(Op* p, int plane) {
  using B = std::conditional_t<std::is_const_v<Op>, const BFloat16, BFloat16>;
  return reinterpret_cast<B*>(p) + 32 * plane;
}

// Which planes are multiplied: those (i, j) with i + j < n. What is left out is as small as the rounding of a product
// in the wider type. The small products come first, and every next one changes one operand.
template <int n>
struct PlanePairs {
  static_assert(n >= 1 && n <= 3);
  static constexpr int kCount = n * (n + 1) / 2;
  static constexpr int kLeft3[] = {0, 0, 0, 1, 1, 2}, kRight3[] = {2, 1, 0, 0, 1, 0};
  static constexpr int kLeft2[] = {0, 0, 1}, kRight2[] = {1, 0, 0};
  static constexpr int left(int pair) { return n == 3 ? kLeft3[pair] : (n == 2 ? kLeft2[pair] : 0); }
  static constexpr int right(int pair) { return n == 3 ? kRight3[pair] : (n == 2 ? kRight2[pair] : 0); }
  static constexpr bool new_left(int pair) { return pair == 0 || left(pair) != left(pair - 1); }
  static constexpr bool new_right(int pair) { return pair == 0 || right(pair) != right(pair - 1); }
};

#if YOCO_HAS_AMX
// The leading bits of x as bf16 (in the upper half of each word); x keeps the rest. Exact.
YOCO_INLINE __m512i take_plane(__m512& x) {
  const __m512i plane = _mm512_and_si512(bit_cast<__m512i>(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  x = _mm512_sub_ps(x, bit_cast<__m512>(plane));
  return plane;
}
// Two vectors of such words as one row of 32 bf16.
YOCO_INLINE __m512i join_planes(__m512i low, __m512i high) {
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
}

// The words of an even and of an odd row as a row of pairs.
YOCO_INLINE __m512i pair_planes(__m512i even, __m512i odd) { return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd); }

// The first `width` elements as float, the rest zero.
YOCO_INLINE __m512 load_some(const float* p, int64_t width) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << std::clamp<int64_t>(width, 0, 16)) - 1), p);
}
YOCO_INLINE __m512 load_some(const Float16* p, int64_t width) {
  return _mm512_cvtph_ps(
      _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << std::clamp<int64_t>(width, 0, 16)) - 1), p));
}

// 32 components of one row, one row of 32 bf16 per plane.
template <class T>
YOCO_INLINE void load_planes(const T* p, int64_t width, __m512i* planes) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto columns = static_cast<__mmask32>((uint64_t{1} << std::clamp<int64_t>(width, 0, 32)) - 1);
    planes[0] = _mm512_maskz_loadu_epi16(columns, p);
  } else {
    __m512 low = load_some(p, width), high = load_some(p + 16, width - 16);
    for (int i = 0; i < kPlanes<T>; ++i) {
      const __m512i a = take_plane(low), b = take_plane(high);
      planes[i] = join_planes(a, b);
    }
  }
}

// 32 numbers.
template <int n>
YOCO_INLINE void split_vectors(const Vec<float> (&x)[2], Split<n>* dst) {
  __m512 low = bit_cast<__m512>(x[0]), high = bit_cast<__m512>(x[1]);
  for (int plane = 0; plane < n; ++plane) {
    const __m512i a = take_plane(low), b = take_plane(high);
    _mm512_storeu_si512(plane_of(dst, plane), join_planes(a, b));
  }
}
// Two rows of 32 numbers, as rows of an A [.., lda] and as one row of pairs of a B.
template <int n>
YOCO_INLINE void split_vector_pairs(const Vec<float> (&x)[2][2], Split<n>* rows, int64_t lda, Split<n>* pairs) {
  __m512 rest[2][2];
  for (int i = 0; i < 2; ++i) {
    for (int v = 0; v < 2; ++v) rest[i][v] = bit_cast<__m512>(x[i][v]);
  }
  for (int plane = 0; plane < n; ++plane) {
    __m512i words[2][2];
    for (int i = 0; i < 2; ++i) {
      for (int v = 0; v < 2; ++v) words[i][v] = take_plane(rest[i][v]);
      _mm512_storeu_si512(plane_of(rows + i * lda, plane), join_planes(words[i][0], words[i][1]));
    }
    for (int v = 0; v < 2; ++v) {
      _mm512_storeu_si512(plane_of(pairs + 32 * v, plane), pair_planes(words[0][v], words[1][v]));
    }
  }
}

// The packing of a Split operand: a row (pack_row), a whole B (pack_b and pack_b_transposed).
template <class T, int n>
YOCO_INLINE void split_row(const T* src, int64_t width, int64_t padded, Split<n>* dst) {
  for (int64_t i = 0; i < padded; i += 32) {
    __m512i planes[n];
    load_planes(src + i, width - i, planes);
    for (int plane = 0; plane < n; ++plane) _mm512_storeu_si512(plane_of(dst + i, plane), planes[plane]);
  }
}

template <class T, int n>
void split_b(const T* src, int64_t stride, int64_t depth, int64_t cols, Split<n>* dst, int64_t ldb) {
  for (int64_t k = 0; k < padded_depth<Split<n>>(depth); k += 2) {
    for (int64_t col = 0; col < cols; col += 16) {
      const auto row = [&](int64_t k) {
        return k < depth ? load_some(src + k * stride + col, cols - col) : _mm512_setzero_ps();
      };
      __m512 even = row(k), odd = row(k + 1);
      for (int plane = 0; plane < n; ++plane) {
        const __m512i a = take_plane(even), b = take_plane(odd);
        _mm512_storeu_si512(plane_of(dst + k * ldb + 2 * col, plane), pair_planes(a, b));
      }
    }
  }
}

template <class T, int n>
void split_b_transposed(const T* src, int64_t stride, int64_t depth, int64_t cols, Split<n>* dst, int64_t ldb) {
  for (int64_t col = 0; col < cols; col += 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      alignas(64) uint32_t words[n][16 * 16];
      for (int64_t j = 0; j < 16; ++j) {
        __m512i planes[n] = {};
        if (col + j < cols) load_planes(src + (col + j) * stride + k, depth - k, planes);
        for (int plane = 0; plane < n; ++plane) _mm512_store_si512(words[plane] + 16 * j, planes[plane]);
      }
      for (int plane = 0; plane < n; ++plane) {
        auto* to = reinterpret_cast<uint32_t*>(plane_of(dst + k * ldb + 2 * col, plane));
        transpose_words(words[plane], 16, 16, to, n * ldb);
      }
    }
  }
}

// 32 rows of src as columns: dst[d][j] = src[j][d], zero for rows from n on.
template <class T, int n>
void split_transposed(const T* src, int64_t stride, int64_t rows, int64_t dim, Split<n>* dst, int64_t ldd) {
  for (int64_t d0 = 0; d0 < dim; d0 += 16) {
    alignas(64) float by_row[32][16], by_dim[2][16][16];
    for (int64_t j = 0; j < 32; ++j) {
      _mm512_store_ps(by_row[j], j < rows ? load_some(src + j * stride + d0, dim - d0) : _mm512_setzero_ps());
    }
    for (int half = 0; half < 2; ++half) {
      transpose_words(reinterpret_cast<const uint32_t*>(by_row[16 * half]), 16, 16,
                      reinterpret_cast<uint32_t*>(by_dim[half][0]), 16);
    }
    for (int64_t d = 0; d < 16; ++d) {
      const Vec<float> row[2] = {load<float>(by_dim[0][d]), load<float>(by_dim[1][d])};
      split_vectors(row, dst + (d0 + d) * ldd);
    }
  }
}
#endif

// ---- packing

template <class Op, class T>
YOCO_INLINE Op to_operand(T x) {
  if constexpr (std::is_same_v<Op, T>) {
    return x;
  } else {
    Op y;
    from_float(to_float(x), &y);
    return y;
  }
}

// dst[0..n) = src[0..n) as Op, dst[n..padded) = 0.
template <class Op, class T>
YOCO_INLINE void pack_row(const T* src, int64_t n, int64_t padded, Op* dst) {
  if constexpr (kIsSplit<Op>) {
    split_row(src, n, padded, dst);
    return;
  } else if constexpr (std::is_same_v<Op, T>) {
    std::memcpy(dst, src, n * sizeof(Op));
  } else {
    using C = Compute<Op>;
    int64_t i = 0;
    for (; i + kLanes<C> <= n; i += kLanes<C>) store<C>(dst + i, load<C>(src + i));
    for (; i < n; ++i) dst[i] = to_operand<Op>(src[i]);
  }
  if (padded > n) std::memset(static_cast<void*>(dst + n), 0, (padded - n) * sizeof(Op));
}

// A [rows, lda] from rows of src with `stride` elements between them; padding columns are zero.
template <class Op, class T>
void pack_a(const T* src, int64_t stride, int64_t rows, int64_t depth, Op* dst, int64_t lda) {
  for (int64_t r = 0; r < rows; ++r) pack_row(src + r * stride, depth, padded_depth<Op>(depth), dst + r * lda);
}

// B[k][n] = src[k * stride + n]: the rows of src are the contraction (values of attention).
template <class Op, class T>
void pack_b(const T* src, int64_t stride, int64_t depth, int64_t cols, Op* dst, int64_t ldb) {
  if constexpr (kIsSplit<Op>) {
    split_b(src, stride, depth, cols, dst, ldb);
  } else if constexpr (kPair<Op> == 1) {
    for (int64_t k = 0; k < depth; ++k) pack_row(src + k * stride, cols, padded_cols(cols), dst + k * ldb);
  } else {
    const int64_t padded = padded_cols(cols), all = padded_depth<Op>(depth);
    for (int64_t k = 0; k < all; k += 2) {
      uint16_t* out = reinterpret_cast<uint16_t*>(dst) + k * ldb;
      if (k >= depth) {
        std::memset(out, 0, 2 * padded * sizeof(uint16_t));
        continue;
      }
      int64_t n = 0;
      if constexpr (std::is_same_v<T, BFloat16>) {
        const T *even = src + k * stride, *odd = even + stride;
        const bool has_odd = k + 1 < depth;
#if YOCO_HAS_AVX512
        for (; n + 16 <= cols; n += 16) {
          const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + n)));
          const __m512i high =
              has_odd ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + n)))
                      : _mm512_setzero_si512();
          _mm512_storeu_si512(out + 2 * n, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
#endif
        for (; n < cols; ++n) {
          out[2 * n] = even[n].bits;
          out[2 * n + 1] = has_odd ? odd[n].bits : 0;
        }
      } else {
        for (; n < cols; ++n) {
          out[2 * n] = to_operand<Op>(src[k * stride + n]).bits;
          out[2 * n + 1] = k + 1 < depth ? to_operand<Op>(src[(k + 1) * stride + n]).bits : 0;
        }
      }
      for (; n < padded; ++n) out[2 * n] = out[2 * n + 1] = 0;
    }
  }
}

// B[k][n] = src[n * stride + k]: the rows of src are the columns of B (keys of attention).
template <class Op, class T>
void pack_b_transposed(const T* src, int64_t stride, int64_t depth, int64_t cols, Op* dst, int64_t ldb) {
  if constexpr (kIsSplit<Op>) {
    split_b_transposed(src, stride, depth, cols, dst, ldb);
  } else {
    const int64_t all_depth = padded_depth<Op>(depth), all_cols = padded_cols(cols);
    int64_t done = 0;  // depth that the fast path has packed
#if YOCO_HAS_AVX512
    if constexpr (std::is_same_v<Op, T> && (sizeof(Op) == 4 || kPair<Op> == 2)) {
      constexpr int64_t kStep = 64 / sizeof(Op);  // k per 16 words
      // Rows of words: pairs of bf16, or floats.
      for (; done + kStep <= depth; done += kStep) {
        for (int64_t n = 0; n < all_cols; n += 16) {
          const int rows = static_cast<int>(cols - n < 16 ? cols - n : 16);
          alignas(64) uint32_t words[16 * 16];
          for (int i = 0; i < rows; ++i) std::memcpy(words + 16 * i, src + (n + i) * stride + done, 64);
          transpose_words(words, 16, rows, reinterpret_cast<uint32_t*>(dst + done * ldb + n * kPair<Op>), ldb);
        }
      }
    }
#endif
    for (int64_t k = done; k < all_depth; ++k) {
      Op* row = dst + k / kPair<Op> * kPair<Op> * ldb + k % kPair<Op>;
      for (int64_t n = 0; n < all_cols; ++n) {
        row[n * kPair<Op>] = k < depth && n < cols ? to_operand<Op>(src[n * stride + k]) : Op{};
      }
    }
  }
}

// ---- products

#if YOCO_HAS_AMX
template <class Op>
constexpr int kOperandPlanes = static_cast<int>(sizeof(Op) / sizeof(BFloat16));

// One pair of planes, 32 of depth: tiles 4 and 5 are rows of A, 6 and 7 columns of B, loaded when the pair brings new
// ones.
template <int MT, int NT, int kPair, class Op>
YOCO_INLINE void amx_product(const Op* a, int64_t lda, const Op* b, int64_t ldb) {
  using Pairs = PlanePairs<kOperandPlanes<Op>>;
  constexpr int kLeft = Pairs::left(kPair), kRight = Pairs::right(kPair);
  constexpr bool kNewLeft = Pairs::new_left(kPair), kNewRight = Pairs::new_right(kPair);
  const int64_t a_bytes = lda * static_cast<int64_t>(sizeof(Op)), b_bytes = ldb * 2 * static_cast<int64_t>(sizeof(Op));
  if constexpr (kNewLeft) _tile_loadd(4, plane_of(a, kLeft), a_bytes);
  if constexpr (kNewRight) _tile_loadd(6, plane_of(b, kRight), b_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (NT > 1) {
    if constexpr (kNewRight) _tile_loadd(7, plane_of(b + 32, kRight), b_bytes);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (MT > 1) {
    if constexpr (kNewLeft) _tile_loadd(5, plane_of(a + 16 * lda, kLeft), a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (NT > 1) _tile_dpbf16ps(3, 5, 7);
  }
}

template <int MT, int NT, class Op, int... kPair>
YOCO_INLINE void amx_products(const Op* a, int64_t lda, const Op* b, int64_t ldb,
                              std::integer_sequence<int, kPair...>) {
  (amx_product<MT, NT, kPair>(a, lda, b, ldb), ...);
}

// M and N in units of two tiles where possible: four products for four loads, or 24 for 16 with three planes.
template <int MT, int NT, class Op>
YOCO_INLINE void amx_block(int64_t depth, const Op* a, int64_t lda, const Op* b, int64_t ldb, float* c, int64_t ldc,
                           bool accumulate) {
  const int64_t c_bytes = ldc * 4;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (NT > 1) _tile_loadd(1, c + 16, c_bytes);
    if (MT > 1) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if (MT > 1 && NT > 1) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (NT > 1) _tile_zero(1);
    if (MT > 1) _tile_zero(2);
    if (MT > 1 && NT > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 32) {
    amx_products<MT, NT>(a + k, lda, b + k * ldb, ldb,
                         std::make_integer_sequence<int, PlanePairs<kOperandPlanes<Op>>::kCount>());
  }
  _tile_stored(0, c, c_bytes);
  if (NT > 1) _tile_stored(1, c + 16, c_bytes);
  if (MT > 1) _tile_stored(2, c + 16 * ldc, c_bytes);
  if (MT > 1 && NT > 1) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

template <class Op>
void gemm_amx(int64_t rows, int64_t cols, int64_t depth, const Op* a, int64_t lda, const Op* b, int64_t ldb, float* c,
              int64_t ldc, bool accumulate) {
  __asm__ volatile("" ::: "memory");  // tile loads do not tell the compiler that they read a, b and c
  int64_t m = 0;
  for (; m + 32 <= rows; m += 32) {
    int64_t n = 0;
    for (; n + 32 <= cols; n += 32) {
      amx_block<2, 2>(depth, a + m * lda, lda, b + 2 * n, ldb, c + m * ldc + n, ldc, accumulate);
    }
    if (n < cols) amx_block<2, 1>(depth, a + m * lda, lda, b + 2 * n, ldb, c + m * ldc + n, ldc, accumulate);
  }
  if (m < rows) {
    int64_t n = 0;
    for (; n + 32 <= cols; n += 32) {
      amx_block<1, 2>(depth, a + m * lda, lda, b + 2 * n, ldb, c + m * ldc + n, ldc, accumulate);
    }
    if (n < cols) amx_block<1, 1>(depth, a + m * lda, lda, b + 2 * n, ldb, c + m * ldc + n, ldc, accumulate);
  }
}
#endif

// One register tile: MR rows x NV vectors of columns.
template <int MR, int NV, class Op>
YOCO_INLINE void register_block(int64_t depth, const Op* a, int64_t lda, const Op* b, int64_t ldb, Accumulator<Op>* c,
                                int64_t ldc, bool accumulate) {
  using C = Accumulator<Op>;
  constexpr int kWidth = kLanes<C>;
  Vec<C> acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? load<C>(c + i * ldc + j * kWidth) : Vec<C>{};
  }
  for (int64_t k = 0; k < depth; k += kPair<Op>) {
#if YOCO_HAS_BF16_DOT
    if constexpr (std::is_same_v<Op, BFloat16>) {
      __m512bh columns[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        columns[j] = bit_cast<__m512bh>(_mm512_loadu_si512(b + k * ldb + 2 * j * kWidth));
      }
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + i * lda + k, sizeof(pair));
        const __m512bh row = bit_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
          acc[i][j] = bit_cast<Vec<C>>(_mm512_dpbf16_ps(bit_cast<__m512>(acc[i][j]), row, columns[j]));
        }
      }
      continue;
    }
#endif
    if constexpr (!std::is_same_v<Op, BFloat16>) {
      Vec<C> columns[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) columns[j] = load<C>(b + k * ldb + j * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Vec<C> row = splat<C>(a[i * lda + k]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] += row * columns[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store<C>(c + i * ldc + j * kWidth, acc[i][j]);
  }
}

template <int NV, class Op>
void register_columns(int64_t rows, int64_t depth, const Op* a, int64_t lda, const Op* b, int64_t ldb,
                      Accumulator<Op>* c, int64_t ldc, bool accumulate) {
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6) {
    register_block<6, NV>(depth, a + m * lda, lda, b, ldb, c + m * ldc, ldc, accumulate);
  }
  a += m * lda, c += m * ldc;
  switch (rows - m) {
    case 5:
      return register_block<5, NV>(depth, a, lda, b, ldb, c, ldc, accumulate);
    case 4:
      return register_block<4, NV>(depth, a, lda, b, ldb, c, ldc, accumulate);
    case 3:
      return register_block<3, NV>(depth, a, lda, b, ldb, c, ldc, accumulate);
    case 2:
      return register_block<2, NV>(depth, a, lda, b, ldb, c, ldc, accumulate);
    case 1:
      return register_block<1, NV>(depth, a, lda, b, ldb, c, ldc, accumulate);
    default:
      return;
  }
}

// C [rows, cols] = A [rows, depth] B [depth, cols], added to C when accumulate. depth and cols are padded sizes.
template <class Op>
void gemm(int64_t rows, int64_t cols, int64_t depth, const Op* a, int64_t lda, const Op* b, int64_t ldb,
          Accumulator<Op>* c, int64_t ldc, bool accumulate) {
  if constexpr (YOCO_HAS_AMX && kPair<Op> == 2) {
    gemm_amx(padded_rows(rows), cols, depth, a, lda, b, ldb, c, ldc, accumulate);
  } else {
    // 24 accumulators of 32 registers with AVX-512, 12 of 16 otherwise.
    constexpr int kWide = YOCO_HAS_AVX512 ? 4 : 2;
    constexpr int64_t kWidth = kLanes<Accumulator<Op>>;
    int64_t n = 0;
    for (; n + kWide * kWidth <= cols; n += kWide * kWidth) {
      register_columns<kWide, Op>(rows, depth, a, lda, b + n * kPair<Op>, ldb, c + n, ldc, accumulate);
    }
    for (; n < cols; n += kWidth) {
      register_columns<1, Op>(rows, depth, a, lda, b + n * kPair<Op>, ldb, c + n, ldc, accumulate);
    }
  }
}

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
