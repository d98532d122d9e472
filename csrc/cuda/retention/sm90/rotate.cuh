// Rotary on the tiles that TMA brought: they turn in shared memory between their arrival and their use, dq and dk
// before they leave. Angles and rotations are those of retention/rotate.cuh; columns keep the order of the tensor here,
// because every tile holds both columns of its pairs.
#pragma once

#include "cuda/retention/sm90/block.cuh"

namespace yoco::cuda::sm90 {

YOCO_DEVICE void set_turning(RunBlock& b, const RotaryOnLoad& rotary, const RetentionRun& run) {
  const int pairs = static_cast<int>(rotary.dim / 2), column = run.rotate_v ? b.column : 0;
  b.rotate_v = run.rotate_v;
  b.position = rotary.offsets == nullptr ? 0 : rotary.offsets[b.n];
  if (rotary.interleaved) {
    b.half_pieces = 0, b.first_pair = column / 2, b.pairs = pairs - column / 2;
  } else {  // both columns of a pair are among the first kBlockV (retention_fits_sm90)
    b.half_pieces = pairs / 8, b.first_pair = 0, b.pairs = column == 0 ? pairs : 0;
  }
}

// Where the angles of a stage's chunk lie.
template <typename Shape>
YOCO_DEVICE uint32_t stage_angles(uint32_t shared, int slot) {
  return shared + Shape::kAngles + slot * (Shape::kAngleSlots * 8);
}

// Eight pairs lie in two pieces of 16 bytes. A thread has them for every kThreads / kUnits-th row. Eight neighbouring
// threads read eight different banks: of one row (128 columns) or of two.
template <typename T, int kCols, int kThreads, bool kAdjacent, int kTiles>
YOCO_DEVICE void turn_tiles_as(const uint32_t (&tiles)[kTiles], uint32_t angles, const RunBlock& b, int thread,
                               float sign) {
  constexpr int kUnits = kCols / 16;
  const int unit = thread % kUnits;
  if (unit * 8 >= b.pairs) return;
  // Neighbours in the second panel: the other piece first, and with it the other four angles.
  const int flip = kAdjacent && unit >= 4;
  const int first = kAdjacent ? 2 * unit + flip : unit, second = kAdjacent ? first ^ 1 : first + b.half_pieces;
  const uint32_t own = angles + 8 * angle_slot(b.first_pair + unit * 8);
  uint4 angle[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) angle[i] = load_shared_16(own + 16 * (i ^ 2 * flip));
  int row0 = thread / kUnits;
  if (kUnits == 4 && !kAdjacent) row0 = (row0 & ~5) | (row0 & 1) << 2 | (row0 & 4) >> 2;  // rows r and r + 4
#pragma unroll 1
  for (int row = row0; row < kChunk; row += kThreads / kUnits) {
    float cos[8], sin[8];
    turn_angles(cos, sin, angle, row, sign);
    const auto at = [&](uint32_t tile, int piece) {
      return tile + (piece >> 3) * kPanelBytes + row * 128 + (((piece ^ row) & 7) << 4);
    };
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 u = load_shared_16(at(tiles[i], first)), v = load_shared_16(at(tiles[i], second));
      uint32_t x[4] = {u.x, u.y, u.z, u.w}, y[4] = {v.x, v.y, v.z, v.w};
      turn_pairs<T, kAdjacent>(x, y, cos, sin);
      store_shared(at(tiles[i], first), make_uint4(x[0], x[1], x[2], x[3]));
      store_shared(at(tiles[i], second), make_uint4(y[0], y[1], y[2], y[3]));
    }
  }
}

template <typename T, int kCols, int kThreads, int kTiles>
YOCO_DEVICE void turn_tiles(const uint32_t (&tiles)[kTiles], uint32_t angles, const RunBlock& b, int thread,
                            float sign = 1.f) {
  if (b.half_pieces == 0) {
    turn_tiles_as<T, kCols, kThreads, true>(tiles, angles, b, thread, sign);
  } else {
    turn_tiles_as<T, kCols, kThreads, false>(tiles, angles, b, thread, sign);
  }
}

// ---- who turns what
// The angles of a chunk, by one warp of the producer; turns: of this lane's pairs.
template <int kPairs>
YOCO_DEVICE void write_angles(uint32_t angles, const uint64_t (&turns)[kPairs / 32], const RunBlock& b,
                              const RunBlock::Chunk& c) {
  const int64_t position = b.position + (c.end - c.count - b.first_token);
#pragma unroll
  for (int j = 0; j < kPairs / 32; ++j) {
    const PairAngle angle = chunk_angle(turns[j], position, false);
    const uint32_t at = angles + 8 * angle_slot(j * 32 + threadIdx.x % 32);
    store_shared(at, angle.first);
    store_shared(at + 4, angle.step);
  }
}

// The tiles of a stage, by the scores' warpgroup; state groups (and the scores' own products) wait for kTilesTurned.
template <typename T, int kDimK, int kBlockV, typename Shape>
YOCO_DEVICE void turn_stage(uint32_t shared, const RunBlock& b, int slot) {
  const uint32_t tiles = shared + slot * Shape::kStageBytes, angles = stage_angles<Shape>(shared, slot);
  const uint32_t q = tiles, k = tiles + Shape::kK, v = tiles + Shape::kV, x = tiles + Shape::kX;
  const int thread = threadIdx.x % kWarpgroup;
  if (b.rotate_v) {
    if constexpr (Shape::kOutInStage) {  // backward: x lies in the stage
      if (b.outputs) {
        turn_tiles<T, kBlockV, kWarpgroup>({v, x}, angles, b, thread);
      } else {
        turn_tiles<T, kBlockV, kWarpgroup>({v}, angles, b, thread);
      }
    }
  } else if (b.outputs) {
    turn_tiles<T, kDimK, kWarpgroup>({q, k}, angles, b, thread);
  } else {
    turn_tiles<T, kDimK, kWarpgroup>({k}, angles, b, thread);
  }
  fence_async_proxy();
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(shared + Shape::kTilesTurned + slot * 8);
}

}  // namespace yoco::cuda::sm90
