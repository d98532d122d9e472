// Small matrix products C (+)= A B on tiles that live in the cache: AMX tiles, bf16 dot products, or FMA.
//
// Operand type (MatrixOperand<T>): bf16 inputs stay bf16 where the CPU multiplies bf16; every other low-precision input
// is widened to float; float64 stays float64. Accumulators are float (double for float64).
//
//   A   [rows, lda]          row major, Op
//   B   [depth / kPair, ldb, kPair]  packed: kPair consecutive k of one column lie together (2 for bf16, else 1)
//   C   [rows, ldc]          row major, accumulator type
//
// Buffers are padded, so that no product has tails: rows of A and C up to a multiple of kMatrixRows must exist (their
// contents may be anything: a row of C depends on the same row of A only), depth is a multiple of matrix_depth<Op>()
// with ZEROS in the padding of A and B both (0 * NaN is NaN), and N is a multiple of kMatrixCols. padded_rows / _cols /
// _depth round up. The pack functions fill the padding.
#pragma once

#include "row.h"

namespace yoco::cpu::YOCO_ISA {
namespace {

template <class T>
using MatrixOperand =
    std::conditional_t<std::is_same_v<T, double>, double,
                       std::conditional_t<std::is_same_v<T, BFloat16> && YOCO_HAS_BF16_DOT, BFloat16, float>>;

template <class Op>
using Accumulator = std::conditional_t<std::is_same_v<Op, double>, double, float>;

constexpr int64_t kMatrixRows = 16;
constexpr int64_t kMatrixCols = 16;
template <class Op>
constexpr int kPair = std::is_same_v<Op, BFloat16> ? 2 : 1;
template <class Op>
constexpr int64_t matrix_depth() {
  return std::is_same_v<Op, BFloat16> ? 32 : 1;
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
  if constexpr (std::is_same_v<Op, T>) {
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
  if constexpr (kPair<Op> == 1) {
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

// B[k][n] = src[n * stride + k]: the rows of src are the columns of B (keys of attention).
template <class Op, class T>
void pack_b_transposed(const T* src, int64_t stride, int64_t depth, int64_t cols, Op* dst, int64_t ldb) {
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

// ---- products

#if YOCO_HAS_AMX
// M and N in units of two tiles where possible: four products for four loads.
template <int MT, int NT>
YOCO_INLINE void amx_block(int64_t depth, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t ldb, float* c,
                           int64_t ldc, bool accumulate) {
  const int64_t a_bytes = lda * 2, b_bytes = ldb * 4, c_bytes = ldc * 4;
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
    const BFloat16* b_k = b + k * ldb;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b_k, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (NT > 1) {
      _tile_loadd(7, b_k + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (MT > 1) {
      _tile_loadd(5, a + 16 * lda + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (NT > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (NT > 1) _tile_stored(1, c + 16, c_bytes);
  if (MT > 1) _tile_stored(2, c + 16 * ldc, c_bytes);
  if (MT > 1 && NT > 1) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

inline void gemm_amx(int64_t rows, int64_t cols, int64_t depth, const BFloat16* a, int64_t lda, const BFloat16* b,
                     int64_t ldb, float* c, int64_t ldc, bool accumulate) {
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
#if YOCO_HAS_AMX
  if constexpr (std::is_same_v<Op, BFloat16>) {
    gemm_amx(padded_rows(rows), cols, depth, a, lda, b, ldb, c, ldc, accumulate);
    return;
  }
#endif
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

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA
