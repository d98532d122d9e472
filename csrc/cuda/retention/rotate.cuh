// Rotary on the tiles of a run: rows turn in shared memory by their positions, q and k as they arrive, dq and dk (by
// the negative angle) before they leave. docs/cuda_retention.md has the cost.
#pragma once

#include "cuda/core/rotary.cuh"
#include "cuda/retention/tile.cuh"

namespace yoco::cuda {

// The angle of a pair of columns at row r of a chunk is first + r * step, in units of 2^-32 turns. `first` is cut from
// the exact product of position and frequency; the 63 steps behind it add 2^-26 turns at most.
struct PairAngle {
  uint32_t first, step;
};
// Where a pair's angle lies in shared memory: eight pairs, then 16 bytes that put the next eight into other banks.
YOCO_HOST_DEVICE constexpr int angle_slot(int pair) { return pair + pair / 8 * 2; }

// turns: per position; position: of the chunk's row 0.
YOCO_DEVICE PairAngle chunk_angle(uint64_t turns, int64_t position, bool reverse) {
  const uint64_t first = turns * static_cast<uint64_t>(position), step = reverse ? 0 - turns : turns;
  return {static_cast<uint32_t>(first >> 32), static_cast<uint32_t>(step >> 32)};
}

// An angle in units of 2^-32 turns as radians within half a turn of 0, where the fast sine and cosine are good to
// 2^-20.
YOCO_DEVICE float angle_radians(uint32_t turns) {
  return static_cast<float>(static_cast<int32_t>(turns)) * 1.4629180792671596e-9f;
}

// Cosines and sines of eight pairs at one row; the angle of pair i is half of angle[i / 2].
YOCO_DEVICE void turn_angles(float (&cos)[8], float (&sin)[8], const uint4 (&angle)[4], int row, float sign) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t first = i % 2 == 0 ? angle[i / 2].x : angle[i / 2].z;
    const uint32_t step = i % 2 == 0 ? angle[i / 2].y : angle[i / 2].w;
    const float radians = angle_radians(first + row * step);
    cos[i] = __cosf(radians), sin[i] = __sinf(radians) * sign;
  }
}

// Eight pairs of one row: kAdjacent (2i, 2i + 1) of the 16 columns in x and y, else (i of x, i of y).
template <typename T, bool kAdjacent>
YOCO_DEVICE void turn_pairs(uint32_t (&x)[4], uint32_t (&y)[4], const float (&cos)[8], const float (&sin)[8]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float2 a = unpack2<T>(x[w]), b = unpack2<T>(y[w]);
    if constexpr (kAdjacent) {
      rotate(a.x, a.y, cos[w], sin[w]);
      rotate(b.x, b.y, cos[4 + w], sin[4 + w]);
    } else {
      rotate(a.x, b.x, cos[2 * w], sin[2 * w]);
      rotate(a.y, b.y, cos[2 * w + 1], sin[2 * w + 1]);
    }
    x[w] = pack2<T>(a.x, a.y), y[w] = pack2<T>(b.x, b.y);
  }
}

// Turns tiles of kCols columns in place. Units of 16 columns hold 8 pairs (PairOrder); a thread has one unit of a panel
// and every kThreads / 4-th row, so the cosines and sines of a row serve all the tiles. The tiles' first pair is a
// multiple of 8, its angle at `angles`; `pairs` turn from there on. The caller puts barriers before and behind.
template <typename T, int kCols, int kThreads, bool kAdjacent, int kTiles>
YOCO_DEVICE void turn_tiles_as(const uint32_t (&tiles)[kTiles], const PairAngle* angles, int pairs, float sign) {
  const int unit = threadIdx.x % 4;
#pragma unroll 1
  for (int panel = 0; panel < kCols / 64; ++panel) {
    const int first_pair = panel * 32 + unit * 8;
    if (first_pair >= pairs) return;
    uint4 angle[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) angle[i] = reinterpret_cast<const uint4*>(angles + angle_slot(first_pair))[i];
#pragma unroll
    for (int row0 = 0; row0 < kChunk; row0 += kThreads / 4) {
      const int row = row0 + threadIdx.x / 4;
      float cos[8], sin[8];
      turn_angles(cos, sin, angle, row, sign);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t at = tiles[tile] + tile_offset(row, panel * 64 + unit * 16);
        const uint4 a = load_shared_16(at), b = load_shared_16(at ^ 16);
        uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
        turn_pairs<T, kAdjacent>(x, y, cos, sin);
        store_shared(at, make_uint4(x[0], x[1], x[2], x[3]));
        store_shared(at ^ 16, make_uint4(y[0], y[1], y[2], y[3]));
      }
    }
  }
}

template <typename T, int kCols, int kThreads, int kTiles>
YOCO_DEVICE void turn_tiles(const uint32_t (&tiles)[kTiles], const PairAngle* angles, int pairs, bool adjacent,
                            float sign = 1.f) {
  if (adjacent) {
    turn_tiles_as<T, kCols, kThreads, true>(tiles, angles, pairs, sign);
  } else {
    turn_tiles_as<T, kCols, kThreads, false>(tiles, angles, pairs, sign);
  }
}

}  // namespace yoco::cuda
