// Rotary on the tiles that TMA brought: they turn in shared memory between their arrival and their use, dq and dk
// before they leave. Columns keep the order of the tensor here, because every tile holds both columns of its pairs.
#pragma once

#include "cuda/retention/sm90/block.cuh"

namespace yoco::cuda::sm90 {

// ---- which columns turn
// Half-split pairs of v that one block of neighbouring columns would not hold (a whole head of 256): block n takes
// columns 64 n, 64 n + 1, ... of both halves, a panel of each.
template <int kBlockV>
YOCO_DEVICE void set_turning(RunBlock& b, const RotaryOnLoad& rotary, const RetentionRun& run) {
  const int pairs = static_cast<int>(rotary.dim / 2), column = run.rotate_v ? b.column : 0;
  b.rotate_v = run.rotate_v;
  b.position = rotary.offsets == nullptr ? 0 : rotary.offsets[b.n];
  if (rotary.interleaved) {
    b.half_pieces = 0, b.first_pair = column / 2, b.pairs = pairs - column / 2;
  } else if (run.rotate_v && rotary.dim > kBlockV) {
    b.column = b.block_v * 64, b.panel_stride = pairs;
    b.half_pieces = 8, b.first_pair = b.column, b.pairs = 64;
  } else {  // both columns of a pair are in the tile: of v among the first kBlockV (retention_fits_sm90)
    b.half_pieces = pairs / 8, b.first_pair = 0, b.pairs = column == 0 ? pairs : 0;
  }
}

// ---- angles
// Four pairs of a row are a unit: 16 bytes, or twice 8 half a head apart. A thread of a warpgroup has one unit of every
// kTurnRows-th row.
template <int kCols>
constexpr int kTurnUnits = kCols / 8;
template <int kCols>
constexpr int kTurnRows = kWarpgroup / kTurnUnits<kCols>;

// What is the same for all chunks: the angle from a row to the next in turns, 64 bits in two words, and the rotation
// from a row of a thread to its next one, in float32 exact to a rounding. Pairs that do not exist stay as they are.
template <int kPairs>
struct TurnSteps {
  uint32_t high[kPairs], low[kPairs];
  float cos[kPairs], sin[kPairs];
};

template <typename Shape>
YOCO_DEVICE void write_turn_steps(uint8_t* shared_bytes, const RotaryOnLoad& rotary, bool rotate_v) {
  auto& steps = *reinterpret_cast<TurnSteps<Shape::kPairs>*>(shared_bytes + Shape::kTurnSteps);
  const int pair = threadIdx.x;
  if (pair >= Shape::kPairs) return;
  const uint64_t turns = pair < rotary.dim / 2 ? turns_per_position(rotary.inv_freq[pair]) : 0;
  const Rotation r = rotation(turns, rotate_v ? kTurnRows<Shape::kGroups * 64> : kTurnRows<Shape::kPairs * 2>);
  steps.high[pair] = static_cast<uint32_t>(turns >> 32), steps.low[pair] = static_cast<uint32_t>(turns);
  steps.cos[pair] = r.cos, steps.sin[pair] = r.sin;
}

// Per chunk: the angles of its first row [kPairs] in units of 2^-32 turns, cut from the exact product of position and
// frequency. By one warp of the producer.
template <typename Shape>
YOCO_DEVICE uint32_t stage_angles(uint32_t shared, int slot) {
  return shared + Shape::kAngles + slot * (Shape::kPairs * 4);
}
template <typename Shape>
YOCO_DEVICE void write_angles(uint32_t shared, int slot, const RunBlock& b, const RunBlock::Chunk& c) {
  using Steps = TurnSteps<Shape::kPairs>;
  const uint64_t position = b.position + (c.end - c.count - b.first_token);
#pragma unroll 1
  for (int pair = threadIdx.x % 32; pair < Shape::kPairs; pair += 32) {
    const uint32_t steps = shared + Shape::kTurnSteps + pair * 4;
    const uint32_t high = load_shared(steps + offsetof(Steps, high)), low = load_shared(steps + offsetof(Steps, low));
    store_shared(stage_angles<Shape>(shared, slot) + pair * 4,
                 static_cast<uint32_t>((uint64_t(high) << 32 | low) * position >> 32));
  }
}

// ---- tiles
YOCO_DEVICE void load_shared_8(uint32_t& x, uint32_t& y, uint32_t address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(x), "=r"(y) : "r"(address) : "memory");
}
YOCO_DEVICE void store_shared_8(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(address), "r"(x), "r"(y) : "memory");
}
YOCO_DEVICE void load_four(float (&x)[4], uint32_t address) {
  const uint4 v = load_shared_16(address);
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
  x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}

// Four pairs: kAdjacent one in each of w, else (i of w[0], w[1]; i of w[2], w[3]).
template <typename T, bool kAdjacent>
YOCO_DEVICE void turn_four(uint32_t (&w)[4], const float (&cos)[4], const float (&sin)[4]) {
  if constexpr (kAdjacent) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 a = unpack2<T>(w[i]);
      rotate(a.x, a.y, cos[i], sin[i]);
      w[i] = pack2<T>(a.x, a.y);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float2 a = unpack2<T>(w[i]), b = unpack2<T>(w[2 + i]);
      rotate(a.x, b.x, cos[2 * i], sin[2 * i]);
      rotate(a.y, b.y, cos[2 * i + 1], sin[2 * i + 1]);
      w[i] = pack2<T>(a.x, a.y), w[2 + i] = pack2<T>(b.x, b.y);
    }
  }
}

// Turns rows [first_row, first_row + kOwnRows) of tiles of kCols columns in place, by a warpgroup, of which this is
// thread `thread`; the caller puts barriers before and behind. Cosine and sine are formed for a thread's first row and
// turn from row to row by the step: a few roundings in float32 for four products where the function units would be
// asked twice. Two rows at a time, so that one warp's loads and products overlap.
template <typename T, int kCols, int kOwnRows, bool kAdjacent, typename Shape, int kTiles>
YOCO_DEVICE void turn_tiles_as(const uint32_t (&tiles)[kTiles], uint32_t shared, int slot, const RunBlock& b,
                               int thread, int first_row, float sign) {
  constexpr int kUnits = kTurnUnits<kCols>, kRows = kTurnRows<kCols>;
  const int unit = thread % kUnits;
  if (unit * 4 >= b.pairs) return;
  int row = thread / kUnits;
  // Two rows of halves of 64 bytes, read at once: r and r + 4 lie in different banks.
  if (kUnits == 8 && !kAdjacent) row = (row & ~5) | (row & 1) << 2 | (row & 4) >> 2;
  row += first_row;

  float cos[4], sin[4], step_cos[4], step_sin[4];
  {
    using Steps = TurnSteps<Shape::kPairs>;
    const uint32_t own = (b.first_pair + unit * 4) * 4, steps = shared + Shape::kTurnSteps + own;
    const uint4 first = load_shared_16(stage_angles<Shape>(shared, slot) + own);
    const uint4 step = load_shared_16(steps + offsetof(Steps, high));
    const uint32_t angle[4] = {first.x + row * step.x, first.y + row * step.y, first.z + row * step.z,
                               first.w + row * step.w};
    load_four(step_cos, steps + offsetof(Steps, cos));
    load_four(step_sin, steps + offsetof(Steps, sin));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float radians = angle_radians(angle[i]);
      cos[i] = __cosf(radians), sin[i] = __sinf(radians) * sign;
      step_sin[i] *= sign;
    }
  }

  const auto offset = [&](int piece) { return (piece >> 3) * kPanelBytes + row * 128 + (((piece ^ row) & 7) << 4); };
  uint32_t first = kAdjacent ? offset(unit) : offset(unit / 2) + unit % 2 * 8;
  uint32_t second = kAdjacent ? 0 : offset(unit / 2 + b.half_pieces) + unit % 2 * 8;
  static_assert(2 * kRows % 8 == 0 &&
                kOwnRows % (2 * kRows) == 0);  // so every second row of a thread has its pieces in the same order
  constexpr int kBytes = kRows * 128, kFlip = (kRows & 7) << 4;
#pragma unroll 1
  for (int i = 0; i < kOwnRows / kRows / 2; ++i, first += 2 * kBytes, second += 2 * kBytes) {
    uint32_t w[2][kTiles][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint32_t at = tiles[t] + r * kBytes;
        if constexpr (kAdjacent) {
          const uint4 v = load_shared_16(at + (first ^ r * kFlip));
          w[r][t][0] = v.x, w[r][t][1] = v.y, w[r][t][2] = v.z, w[r][t][3] = v.w;
        } else {
          load_shared_8(w[r][t][0], w[r][t][1], at + (first ^ r * kFlip));
          load_shared_8(w[r][t][2], w[r][t][3], at + (second ^ r * kFlip));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint32_t at = tiles[t] + r * kBytes;
        turn_four<T, kAdjacent>(w[r][t], cos, sin);
        if constexpr (kAdjacent) {
          store_shared(at + (first ^ r * kFlip), make_uint4(w[r][t][0], w[r][t][1], w[r][t][2], w[r][t][3]));
        } else {
          store_shared_8(at + (first ^ r * kFlip), w[r][t][0], w[r][t][1]);
          store_shared_8(at + (second ^ r * kFlip), w[r][t][2], w[r][t][3]);
        }
      }
      // Explicit roundings: a tensor turns alike, to the bit, as V of one run and as X of another.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float c = cos[j], s = sin[j];
        cos[j] = __fmaf_rn(c, step_cos[j], -__fmul_rn(s, step_sin[j]));
        sin[j] = __fmaf_rn(c, step_sin[j], __fmul_rn(s, step_cos[j]));
      }
    }
  }
}

template <typename T, int kCols, int kOwnRows, typename Shape, int kTiles>
YOCO_DEVICE void turn_tiles(const uint32_t (&tiles)[kTiles], uint32_t shared, int slot, const RunBlock& b, int thread,
                            int first_row, float sign = 1.f) {
  if (b.half_pieces == 0) {
    turn_tiles_as<T, kCols, kOwnRows, true, Shape>(tiles, shared, slot, b, thread, first_row, sign);
  } else {
    turn_tiles_as<T, kCols, kOwnRows, false, Shape>(tiles, shared, slot, b, thread, first_row, sign);
  }
}

// ---- who turns the tiles of a stage: the scores' warpgroup. With 256 columns of k (kTurnTogether) that is more than
// it has time for: it turns one half of the rows of Q and K, the two state groups a quarter each. Everybody waits for
// kTilesTurned before using the tiles.
template <typename Shape>
YOCO_DEVICE void announce_turned(uint32_t shared, int slot) {
  fence_async_proxy();
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(shared + Shape::kTilesTurned + slot * 8);
}
template <typename Shape>
YOCO_DEVICE int turning_warps(bool rotate_v) {
  return Shape::kTurnTogether && !rotate_v ? 4 + 4 * Shape::kGroups : 4;
}

// Scores' warpgroup.
template <typename T, int kDimK, int kBlockV, typename Shape>
YOCO_DEVICE void turn_stage(uint32_t shared, const RunBlock& b, int slot) {
  const uint32_t tiles = shared + slot * Shape::kStageBytes;
  const uint32_t q = tiles, k = tiles + Shape::kK, v = tiles + Shape::kV, x = tiles + Shape::kX;
  constexpr int kRowsK = Shape::kTurnTogether ? kChunk / 2 : kChunk;
  const int thread = threadIdx.x % kWarpgroup;
  if (b.rotate_v) {
    if constexpr (Shape::kOutInStage) {  // backward: x lies in the stage
      if (b.outputs) {
        turn_tiles<T, kBlockV, kChunk, Shape>({v, x}, shared, slot, b, thread, 0);
      } else {
        turn_tiles<T, kBlockV, kChunk, Shape>({v}, shared, slot, b, thread, 0);
      }
    }
  } else if (b.outputs) {
    turn_tiles<T, kDimK, kRowsK, Shape>({q, k}, shared, slot, b, thread, 0);
  } else {
    turn_tiles<T, kDimK, kRowsK, Shape>({k}, shared, slot, b, thread, 0);
  }
  announce_turned<Shape>(shared, slot);
}

// State group `group`; thread: of this group.
template <typename T, int kDimK, bool kOutputs, typename Shape>
YOCO_DEVICE void turn_share(uint32_t shared, const RunBlock& b, int slot, int group, int thread) {
  if (b.rotate_v) return;
  constexpr int kRows = kChunk / 2 / Shape::kGroups;
  const uint32_t q = shared + slot * Shape::kStageBytes, k = q + Shape::kK;
  if constexpr (kOutputs) {
    turn_tiles<T, kDimK, kRows, Shape>({q, k}, shared, slot, b, thread, kChunk / 2 + group * kRows);
  } else {
    turn_tiles<T, kDimK, kRows, Shape>({k}, shared, slot, b, thread, kChunk / 2 + group * kRows);
  }
  announce_turned<Shape>(shared, slot);
}

}  // namespace yoco::cuda::sm90
