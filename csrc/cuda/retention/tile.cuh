// Tiles of 64 rows (one chunk of tokens) in shared memory, and what a chunk's gates become.
#pragma once

#include "cuda/core/ptx.cuh"
#include "cuda/retention/gate.cuh"
#include "cuda/retention/run.h"

namespace yoco::cuda {

// ---- tiles
// A tile of
// 64 rows and D columns is D / 64 panels of [64][64] 16-bit elements: rows of 128 bytes whose eight 16-byte pieces are
// permuted by piece ^= row % 8. Eight rows at one column, or eight pieces of one row, lie in different banks: cp.async,
// ldmatrix, its transposed form and 4-byte accesses of accumulator fragments are all free of conflicts.
constexpr int kPanelBytes = kChunk * 128;

// Byte offset of element (row, col).
YOCO_DEVICE uint32_t tile_offset(int row, int col) {
  return (col >> 6) * kPanelBytes + row * 128 + ((((col >> 3) & 7) ^ (row & 7)) << 4) + (col & 7) * 2;
}
// The offset at which this lane points ldmatrix at the 16 x 16 block (0, 0). Matrices 0, 1 are rows 0-7, 8-15 of
// columns 0-7, matrices 2, 3 of columns 8-15.
YOCO_DEVICE uint32_t lane_offset() {
  const int lane = threadIdx.x % 32;
  return (lane % 16) * 128 + (((lane / 16) ^ (lane % 8)) << 4);
}
// From there to the block at (row, col), multiples of 16.
YOCO_DEVICE uint32_t block_offset(uint32_t lane, int row, int col) {
  return (lane ^ ((col & 48) << 1)) + (col >> 6) * kPanelBytes + row * 128;
}

YOCO_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
YOCO_DEVICE void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
YOCO_DEVICE void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(v) : "memory");
}
YOCO_DEVICE void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
YOCO_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(v) : "r"(address) : "memory");
  return v;
}
YOCO_DEVICE uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Two 16-bit numbers as floats, the low half first.
template <typename T>
YOCO_DEVICE float2 unpack2(uint32_t v);
template <>
YOCO_DEVICE float2 unpack2<__half>(uint32_t v) {
  return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
template <>
YOCO_DEVICE float2 unpack2<__nv_bfloat16>(uint32_t v) {
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

// What rounding (low, high) to `rounded` left over, rounded in turn.
template <typename T>
YOCO_DEVICE uint32_t pack_rest(float low, float high, uint32_t rounded) {
  const float2 r = unpack2<T>(rounded);
  return pack2<T>(low - r.x, high - r.y);
}

// Rows of one chunk in global memory: row r at first + r * stride (the stride is negative for a run backwards in time).
template <typename T>
struct ChunkRows {
  T* first;
  int64_t stride;
  int rows;  // that exist
};

// place(c): where column c of the tile lies in a row.
struct InOrder {
  YOCO_DEVICE int operator()(int c) const { return c; }
};

// Asynchronous unless rows are not 16-byte aligned. Rows and columns that do not exist become zero: what a neighbour or
// unused memory holds there may be NaN, and 0 * NaN is NaN.
template <int kCols, int kThreads, typename T, typename Place = InOrder>
YOCO_DEVICE void load_tile(uint32_t tile, const ChunkRows<T>& from, int dim, bool vectors, Place place = {}) {
  constexpr int kStep = kThreads / 8;
  const int piece = threadIdx.x % 8, row0 = threadIdx.x / 8;
  const uint32_t to = tile + row0 * 128 + ((piece ^ (row0 & 7)) << 4);
  if (vectors) {
#pragma unroll
    for (int i = 0; i < kChunk / kStep; ++i) {
      const T* p = from.first + (row0 + i * kStep) * from.stride + place(piece * 8);
#pragma unroll
      for (int panel = 0; panel < kCols / 64; ++panel) {
        const int bytes = row0 + i * kStep < from.rows && panel * 64 + piece * 8 < dim ? 16 : 0;
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to + panel * kPanelBytes +
                                                                                      i * kStep * 128),
                     "l"(p + (place(panel * 64 + piece * 8) - place(piece * 8))), "r"(bytes)
                     : "memory");
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kChunk / kStep * (kCols / 64); ++i) {
    const int row = row0 + i / (kCols / 64) * kStep, panel = i % (kCols / 64);
    Vec<T, 8> v{};
    if (row < from.rows && panel * 64 + piece * 8 < dim) {
      const T* p = from.first + row * from.stride;
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = p[place(panel * 64 + piece * 8 + j)];
    }
    store_shared(to + panel * kPanelBytes + i / (kCols / 64) * kStep * 128, *reinterpret_cast<const uint4*>(&v));
  }
}

// ---- gates
// What a
// chunk's gates become, all in base 2. With b_i the running sum of log decays, b_i - b_j is needed to an absolute 1e-7
// even right behind a gate that erases the state (log decay -1000 or below), where the difference of two float32 sums
// has lost it. So sums are float64 and kept as two floats: `hi` in steps of 1/256 (differences are exact), `lo` the
// rest.
struct alignas(16) ChunkGates {
  float2 sum[kChunk];    // (hi, lo) of b
  float row[kChunk];     // row_scale * 2^b
  float update[kChunk];  // update_scale * 2^(total - b)
  float total;           // 2^total
};

// 2^(b_i - b_j)
YOCO_DEVICE float decay_between(float2 i, float2 j) { return exp2_approx((i.x - j.x) + (i.y - j.y)); }

// Rows 2 * lane and 2 * lane + 1 of a chunk, in base 2; 0 where there is no row. flip 63: the chunk's rows lie in the
// order of tokens while the run visits them backwards, so visit r is of row r ^ 63.
template <typename T>
YOCO_DEVICE float2 load_gates(const void* gates, int64_t first, int64_t stride, int rows, const GateFormat& format,
                              int flip = 0) {
  float g[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = (threadIdx.x % 32 * 2 + i) ^ flip;
    if (row >= rows) continue;
    const int64_t at = first + row * stride;
    g[i] = load_gate<T>(gates, at, format) * 1.4426950408889634f;
    g[i] = g[i] < -1000.f ? -1000.f : g[i];  // 2^-1000 is 0 too; keeps -inf - -inf out, NaN stays NaN
  }
  return make_float2(g[0], g[1]);
}

// One warp. kInclusive sums for a run forward in time; backwards a token's own gate acts on the tokens before it.
YOCO_DEVICE void scan_gates(ChunkGates& to, float2 g, bool inclusive, float row_scale, float update_scale,
                            int flip = 0) {
  const int lane = threadIdx.x % 32;
  double sum = double(g.x) + double(g.y);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const double below = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += below;
  }
  const double total = __shfl_sync(0xffffffffu, sum, 31);
  double before = __shfl_up_sync(0xffffffffu, sum, 1);
  if (lane == 0) before = 0.0;
  double b[2] = {before, before + double(g.x)};
  if (inclusive) b[0] += double(g.x), b[1] = sum;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float hi = rintf(static_cast<float>(b[i] * 256.0)) * (1.f / 256.f);
    const int row = (2 * lane + i) ^ flip;
    to.sum[row] = make_float2(hi, static_cast<float>(b[i] - double(hi)));
    to.row[row] = row_scale * exp2_approx(static_cast<float>(b[i]));
    to.update[row] = update_scale * exp2_approx(static_cast<float>(total - b[i]));
  }
  if (lane == 0) to.total = exp2_approx(static_cast<float>(total));
}

}  // namespace yoco::cuda
