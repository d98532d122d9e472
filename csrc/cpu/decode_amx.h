// Products of one decode step on AMX tiles, for bf16 queries over caches whose numbers are exact in bf16 (bf16 itself,
// int8, float8 e4m3). Query rows are few, so the big operands K and V must not be rearranged more than needed:
//   scores^T [tokens, rows] = K Q^T: K enters as the A operand just as it lies in memory, Q^T is packed once per task;
//   acc [rows, dim_v] = P V: V is the B operand, which wants pairs of tokens interleaved: two shuffles per register.
#pragma once

#include <initializer_list>

#include "decode_step.h"

#if YOCO_HAS_AMX

namespace yoco::cpu::YOCO_ISA {
namespace {

// ---- tile instructions: the compiler's own macros do not tell it that memory is read and written

template <int kTile>
YOCO_INLINE void tile_load(const void* base, int64_t stride_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
YOCO_INLINE void tile_store(void* base, int64_t stride_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
YOCO_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kAcc, int kA, int kB>
YOCO_INLINE void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kAcc), "i"(kA), "i"(kB));
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// ---- conversion to bf16, zero behind a row's end
//
// Unpack instructions interleave within 16-byte lanes, so numbers come out in an order of their own. Nothing puts them
// back: a dot product does not care, and of the accumulators only the final result is reordered (`key_place` and
// `column` below say where component d went).

YOCO_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (n <= 0 ? 0 : (uint64_t{1} << n) - 1); }

// 64 bytes of a row from element d on.
template <class Cache>
YOCO_INLINE __m512i load_bytes(const Cache* row, int64_t d, int64_t dim) {
  if constexpr (sizeof(Cache) == 2) {
    if (dim - d >= 32) return _mm512_loadu_si512(row + d);
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(low_bits(dim - d)), row + d);
  } else {
    if (dim - d >= 64) return _mm512_loadu_si512(row + d);
    return _mm512_maskz_loadu_epi8(low_bits(dim - d), row + d);
  }
}

// The 128 magnitudes of a one-byte type as bf16, split into high and low bytes: two table look-ups per 64 numbers.
template <class Cache>
struct ByteTables {
  alignas(64) uint8_t high[128], low[128];
  ByteTables() {
    for (int i = 0; i < 128; ++i) {
      float x;
      if constexpr (std::is_same_v<Cache, int8_t>) {
        x = static_cast<float>(i);
      } else {
        x = to_float(Float8{static_cast<uint8_t>(i)});
      }
      BFloat16 y;
      from_float(x, &y);
      high[i] = static_cast<uint8_t>(y.bits >> 8);
      low[i] = static_cast<uint8_t>(y.bits & 0xff);
    }
  }
};

template <class Cache>
const ByteTables<Cache>& byte_tables() {
  static const ByteTables<Cache> tables;
  return tables;
}

// 64 one-byte numbers to bf16: low[0], high[0] .. of each lane's first half in out[0], of its second half in out[1].
template <class Cache>
YOCO_INLINE void widen(__m512i raw, const __m512i tables[4], __m512i out[2]) {
  __m512i index = raw;
  if constexpr (std::is_same_v<Cache, int8_t>) index = _mm512_abs_epi8(raw);
  __m512i high = _mm512_permutex2var_epi8(tables[0], index, tables[1]);
  const __m512i low = _mm512_permutex2var_epi8(tables[2], index, tables[3]);
  if constexpr (std::is_same_v<Cache, int8_t>) {  // |-128| does not fit into seven bits: 128 is 0x4300
    high = _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), high, _mm512_set1_epi8(0x43));
  }
  high = _mm512_ternarylogic_epi64(high, raw, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // high | (raw & sign)
  out[0] = _mm512_unpacklo_epi8(low, high);
  out[1] = _mm512_unpackhi_epi8(low, high);
}

template <class Cache>
YOCO_INLINE void load_tables(__m512i out[4]) {
  if constexpr (sizeof(Cache) == 1) {
    const ByteTables<Cache>& t = byte_tables<Cache>();
    out[0] = _mm512_load_si512(t.high), out[1] = _mm512_load_si512(t.high + 64);
    out[2] = _mm512_load_si512(t.low), out[3] = _mm512_load_si512(t.low + 64);
  }
}

// Where component d of a key lies in a copied row.
template <class Cache>
int64_t key_place(int64_t d) {
  return sizeof(Cache) == 2 ? d : d / 64 * 64 + 32 * (d / 8 % 2) + 8 * (d / 16 % 4) + d % 8;
}

// Rows of `count` entries as bf16 with a stride of `stride` elements (a multiple of 64).
template <class Cache>
void stage_keys(const char* const* k, int64_t count, int64_t dim, int64_t stride, uint16_t* out) {
  __m512i tables[4];
  load_tables<Cache>(tables);
  for (int64_t j = 0; j < count; ++j) {
    const Cache* row = reinterpret_cast<const Cache*>(k[j]);
    if constexpr (sizeof(Cache) == 2) {
      for (int64_t d = 0; d < dim; d += 32) _mm512_store_si512(out + j * stride + d, load_bytes(row, d, dim));
    } else {
      for (int64_t d = 0; d < dim; d += 64) {
        __m512i part[2];
        widen<Cache>(load_bytes(row, d, dim), tables, part);
        _mm512_store_si512(out + j * stride + d, part[0]);
        _mm512_store_si512(out + j * stride + d + 32, part[1]);
      }
    }
  }
}

// Where component d of a value is accumulated: stage_values puts 16 components into each tile.
template <class Cache>
int64_t value_column(int64_t d) {
  return sizeof(Cache) == 2 ? d / 32 * 32 + 16 * (d / 4 % 2) + 4 * (d / 8 % 4) + d % 4
                            : d / 64 * 64 + 16 * (d / 4 % 4) + 4 * (d / 16 % 4) + d % 4;
}

// Pairs of entries interleaved: out[pair][column][2], `stride` elements from pair to pair.
template <class Cache>
void stage_values(const char* const* v, int64_t dim, int64_t stride, uint16_t* out, Prefetcher* prefetcher) {
  __m512i tables[4];
  load_tables<Cache>(tables);
  for (int64_t pair = 0; pair < kStep / 2; ++pair) {
    const Cache* first = reinterpret_cast<const Cache*>(v[2 * pair]);
    const Cache* second = reinterpret_cast<const Cache*>(v[2 * pair + 1]);
    for (int64_t d = 0; d < dim; d += 64 / sizeof(Cache)) {
      uint16_t* to = out + pair * stride + 2 * d;
      const __m512i a = load_bytes(first, d, dim), b = load_bytes(second, d, dim);
      if constexpr (sizeof(Cache) == 2) {
        _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(to + 32, _mm512_unpackhi_epi16(a, b));
      } else {
        const __m512i halves[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)};
        for (int h = 0; h < 2; ++h) {
          __m512i part[2];
          widen<Cache>(halves[h], tables, part);
          _mm512_store_si512(to + 64 * h, part[0]);
          _mm512_store_si512(to + 64 * h + 32, part[1]);
        }
      }
    }
    prefetcher->pull();
  }
}

// 16 rows of 16 floats (a stride of 16) to 16 columns, `stride` floats apart.
inline void transpose_16(const float* in, float* out, int64_t stride) {
  __m512 r[16], s[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_ps(in + 16 * i);
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d a = _mm512_castps_pd(s[i + h]), b = _mm512_castps_pd(s[i + 2 + h]);
      r[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {  // r[4 * block + i] holds column i of every quad of columns, for rows 4 * block ..
    const __m512 low = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88), high = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_ps(out + i * stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(out + (4 + i) * stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(out + (8 + i) * stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(out + (12 + i) * stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}

template <class Cache>
class TileProducts {
 public:
  static constexpr bool kStreams = false;  // one head after the other; the next step is fetched into L2 meanwhile
  static constexpr int kPiece = kStep;

  TileProducts(int64_t rows, int64_t dim_k, int64_t dim_v)
      : rows_(rows), tile_rows_(rows < 16 ? rows : 16), row_tiles_((rows + 15) / 16), dim_k_(dim_k), dim_v_(dim_v) {}

  static int64_t padded(int64_t dim) { return (dim + 63) / 64 * 64; }
  int64_t chunks() const { return sizeof(Cache) == 2 ? (dim_k_ + 31) / 32 : padded(dim_k_) / 32; }
  int64_t q_bytes() const { return row_tiles_ * chunks() * 1024; }
  int64_t padded_rows() const { return row_tiles_ * tile_rows_; }
  int64_t scratch_bytes() const {
    return kStep * padded(dim_k_) * 2 + kStep * padded(dim_v_) * 2 + kStep * 64 + padded_rows() * kStep * 2;
  }
  int64_t pulls_per_head() const { return kStep / 2 + row_tiles_ * kStep / 32 * chunks(); }
  static int64_t column(int64_t d) { return value_column<Cache>(d); }
  void set_scratch(char* scratch, Prefetcher* prefetcher) {
    prefetcher_ = prefetcher;
    keys_ = reinterpret_cast<uint16_t*>(scratch);
    values_ = keys_ + kStep * padded(dim_k_);
    transposed_ = reinterpret_cast<float*>(values_ + kStep * padded(dim_v_));
    weights_ = reinterpret_cast<uint16_t*>(transposed_ + kStep * 16);
    std::memset(weights_, 0, padded_rows() * kStep * 2);
  }

  // tmm0, 1: scores^T; 2, 3: accumulators; 4: K; 5: Q^T; 6: P; 7: V.
  void begin() {
    TileConfig c;
    const auto rows = static_cast<uint8_t>(tile_rows_);
    for (int t : {0, 1, 5}) c.rows[t] = 16, c.column_bytes[t] = static_cast<uint16_t>(4 * rows);
    for (int t : {2, 3, 6}) c.rows[t] = rows, c.column_bytes[t] = 64;
    for (int t : {4, 7}) c.rows[t] = 16, c.column_bytes[t] = 64;
    __asm__ volatile("ldtilecfg %0" ::"m"(c));
  }
  void end() { __asm__ volatile("tilerelease"); }

  // [row tile][chunk of 32 dims][pair of dims][row][2]
  void pack_q(char* packed, int64_t r, const BFloat16* q) const {
    uint16_t* tile = reinterpret_cast<uint16_t*>(packed) + r / 16 * chunks() * 512 + 2 * (r % 16);
    for (int64_t d = 0; d < dim_k_; ++d) {
      const int64_t place = key_place<Cache>(d);
      tile[place / 32 * 512 + place % 32 / 2 * 32 + place % 2] = q[d].bits;
    }
  }

  // The stores need time to reach the cache before tiles can be loaded from there, so this comes before the scores.
  void stage(const char* const* v) { stage_values<Cache>(v, dim_v_, 2 * padded(dim_v_), values_, prefetcher_); }

  void score(const char* packed_q, const char* const* k, int64_t last, float* scores) {
    const char* keys[kStep / 16];
    int64_t strides[kStep / 16];
    const int64_t groups = (last + 15) / 16;
    locate_keys(k, groups, keys, strides);
    for (int64_t tile = 0; tile < row_tiles_; ++tile) {
      const char* q = packed_q + tile * chunks() * 1024;
      for (int64_t g = 0; g < groups; g += 2) {
        const bool two = g + 1 < groups;
        tile_zero<0>();
        tile_zero<1>();
        for (int64_t c = 0; c < chunks(); ++c) {
          tile_load<5>(q + c * 1024, 64);
          tile_load<4>(keys[g] + c * 64, strides[g]);
          tile_dot<0, 4, 5>();
          if (two) {
            tile_load<4>(keys[g + 1] + c * 64, strides[g + 1]);
            tile_dot<1, 4, 5>();
          }
          prefetcher_->pull();
        }
        tile_store<0>(transposed_ + g * 256, 64);
        tile_store<1>(transposed_ + (g + 1) * 256, 64);
      }
      const int64_t rows = rows_ - tile * 16 < 16 ? rows_ - tile * 16 : 16;
      float* out = scores + tile * 16 * kStep;
      if (rows == 16) {
        for (int64_t g = 0; g < groups; ++g) transpose_16(transposed_ + g * 256, out + g * 16, kStep);
        continue;
      }
      const __m512i every_16 =
          _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t r = 0; r < rows; ++r) {
          _mm512_storeu_ps(out + r * kStep + g * 16, _mm512_i32gather_ps(every_16, transposed_ + g * 256 + r, 4));
        }
      }
    }
  }

  void weigh(const float* p, const char* const*, int64_t last, float* acc, int64_t acc_stride) {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t j = 0; j < kStep; j += 32) {
        const __m512i both = bit_cast<__m512i>(
            _mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + r * kStep + j + 16), _mm512_loadu_ps(p + r * kStep + j)));
        _mm512_store_si512(weights_ + r * kStep + j, both);
      }
    }
    const int64_t halves = last > 32 ? 2 : 1;
    const int64_t value_columns = sizeof(Cache) == 2 ? dim_v_ : padded(dim_v_);
    for (int64_t tile = 0; tile < row_tiles_; ++tile) {
      float* out = acc + tile * 16 * acc_stride;
      const uint16_t* weights = weights_ + tile * 16 * kStep;
      for (int64_t d = 0; d < value_columns; d += 32) {
        tile_load<2>(out + d, acc_stride * 4);
        tile_load<3>(out + d + 16, acc_stride * 4);
        for (int64_t half = 0; half < halves; ++half) {
          const uint16_t* values = values_ + half * 16 * 2 * padded(dim_v_) + 2 * d;
          tile_load<6>(weights + half * 32, kStep * 2);
          tile_load<7>(values, 4 * padded(dim_v_));
          tile_dot<2, 6, 7>();
          tile_load<7>(values + 32, 4 * padded(dim_v_));
          tile_dot<3, 6, 7>();
        }
        tile_store<2>(out + d, acc_stride * 4);
        tile_store<3>(out + d + 16, acc_stride * 4);
      }
    }
  }

 private:
  // Tiles of 16 tokens at equal distances are read where they lie; others (converted, ragged, at the edge of small
  // pages) from a copy. The products are the same either way.
  void locate_keys(const char* const* k, int64_t groups, const char** keys, int64_t* strides) {
    for (int64_t g = 0; g < groups; ++g) {
      const char* const* rows = k + g * 16;
      if constexpr (std::is_same_v<Cache, BFloat16>) {
        const int64_t stride = rows[1] - rows[0];
        bool even = dim_k_ % 32 == 0;
        for (int i = 2; i < 16; ++i) even = even && rows[i] - rows[i - 1] == stride;
        if (even) {
          keys[g] = rows[0];
          strides[g] = stride;
          continue;
        }
      }
      uint16_t* copy = keys_ + g * 16 * padded(dim_k_);
      stage_keys<Cache>(rows, 16, dim_k_, padded(dim_k_), copy);
      keys[g] = reinterpret_cast<const char*>(copy);
      strides[g] = 2 * padded(dim_k_);
    }
  }

  int64_t rows_, tile_rows_, row_tiles_, dim_k_, dim_v_;
  Prefetcher* prefetcher_ = nullptr;
  uint16_t* keys_ = nullptr;     // [kStep][padded dim_k]
  uint16_t* values_ = nullptr;   // [kStep / 2][padded dim_v][2]
  float* transposed_ = nullptr;  // [kStep][16]
  uint16_t* weights_ = nullptr;  // [padded rows][kStep]
};

}  // namespace
}  // namespace yoco::cpu::YOCO_ISA

#endif  // YOCO_HAS_AMX
