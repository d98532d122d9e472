// What the warps of a Hopper run share: sizes, shared memory, the block's work, and the instructions only this kernel
// uses.
#pragma once

#include "cuda/core/reduce.cuh"
#include "cuda/core/sm90.cuh"
#include "cuda/retention/item.cuh"
#include "cuda/retention/rotate.cuh"
#include "cuda/retention/sm90/run.h"

namespace yoco::cuda::sm90 {

template <int kDimK, int kBlockV, bool kBackward, bool kTurned, bool kNormed>
struct RunShape {
  static constexpr bool kRotary = kTurned, kOutputGate = kNormed;
  static constexpr int kGroups = kBlockV / 64;  // warpgroups that hold the state, 64 columns of v each
  static constexpr int kThreads = (2 + kGroups) * kWarpgroup;
  // dim_k = 64 leaves room for two blocks on an SM; the others fill it with stages.
  static constexpr int kBlocksPerSM = kDimK == 64 && !kBackward ? 2 : 1;
  static constexpr int kStages = kDimK == 256                    ? 2
                                 : kDimK == 128 && kBlockV == 64 ? 4
                                 : kDimK == 64 && kBackward      ? 5
                                                                 : 3;
  // Two stages are filled in two steps, so that more of memory's latency is covered: Q's part is free again when the
  // scores and the first product of the state groups are done, long before the rest is.
  static constexpr bool kEarlyQ = kStages == 2;
  static constexpr int kScoreStages = 2;
  static constexpr bool kSmallGated = kOutputGate && kBlocksPerSM == 2;
  // Instances that are short of registers make what follows from a thread's index where they use it.
  static constexpr bool kOpaqueThread = kDimK == 256 || kSmallGated;
  // Registers per thread of the producer, the scores and the state warpgroups: multiples of 8 whose sum over the
  // warpgroups is at most what the block starts with.
  static constexpr int kLoadRegisters = kDimK == 256 || kSmallGated ? 32 : 40;
  static constexpr int kScoreRegisters = kDimK == 256 ? 64 : kGroups == 2 ? 72 : kBlocksPerSM == 2 ? 64 : 136;
  static constexpr int kStateRegisters = kDimK == 256        ? 208
                                         : kGroups == 2      ? 200
                                         : kSmallGated       ? 144
                                         : kBlocksPerSM == 2 ? 136
                                                             : 240;

  // A stage: Q, K, V of a chunk; backward also X, where O takes its place.
  static constexpr int kTileK = kDimK / 64 * kPanelBytes, kTileV = kBlockV / 64 * kPanelBytes;
  static constexpr bool kOutInStage = kBackward;
  static constexpr int kK = kTileK, kV = 2 * kTileK, kX = kV + kTileV, kStageBytes = kX + (kBackward ? kTileV : 0);
  // Then P, O, the small arrays and the barriers. With an output gate, tiles of it arrive in a ring of kOutTiles, where
  // y takes their place; O, where it is wanted, has the last one for itself.
  static constexpr int kOutTiles = kOutInStage ? 0 : !kOutputGate ? 1 : kBlocksPerSM == 2 ? 2 : 3;
  static constexpr int kScores = kStages * kStageBytes;
  static constexpr int kOut = kScores + kScoreStages * kPanelBytes;
  static constexpr int kGates = kOut + kOutTiles * kTileV;
  static constexpr int kDots = kGates + kStages * static_cast<int>(sizeof(ChunkGates));
  static constexpr int kWarpSums = kDots + (kBackward ? kGroups * 8 * kChunk * 4 : 0);
  static constexpr int kPairs = kDimK / 2;  // of columns that turn (rotate.cuh)
  static constexpr bool kTurnTogether = kRotary && kDimK == 256;
  static constexpr int kNormSums = kWarpSums + (kBackward ? kGroups * 16 : 0);  // [2][state warps][64] floats
  static constexpr int kTurnSteps = kNormSums + (kOutputGate ? 2 * kGroups * 4 * kChunk * 4 : 0);
  static constexpr int kAngles = kTurnSteps + (kRotary ? kPairs * 16 : 0);
  static constexpr int kFull = kAngles + (kRotary ? kStages * kPairs * 4 : 0), kEmpty = kFull + 8 * kStages;
  static constexpr int kEmptyQ = kEmpty + 8 * kStages;  // with kEarlyQ
  static constexpr int kScoresFull = kEmptyQ + 8 * kStages, kScoresEmpty = kScoresFull + 8 * kScoreStages;
  static constexpr int kTilesTurned = kScoresEmpty + 8 * kScoreStages;
  static constexpr int kGateFull = kTilesTurned + (kRotary ? 8 * kStages : 0);                   // [kOutTiles][kGroups]
  static constexpr int kBytes = kGateFull + (kOutputGate ? 8 * kOutTiles * kGroups : 0) + 1024;  // + alignment
  static_assert(kBlocksPerSM * (kBytes + 1024) <= 228 * 1024);
};

// This thread's index. kOpaque: read where it is used, and the compiler, which would keep all that follows from it in
// registers (or in local memory), does not see that it is always the same.
template <bool kOpaque>
YOCO_DEVICE int thread_index() {
  int index = threadIdx.x;
  if constexpr (kOpaque) asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

// Where a warp is in the ring of stages and in that of score tiles, which advance together. Two slots each: both follow
// from the number of chunks before this one, which saves registers.
template <typename Shape>
struct ChunkRings {
  static constexpr bool kPairs = Shape::kStages == 2 && Shape::kScoreStages == 2;
  RingPosition<Shape::kStages> stages;
  RingPosition<Shape::kScoreStages> tiles;
  YOCO_DEVICE RingPosition<Shape::kStages> stage(uint32_t before) const {
    if constexpr (kPairs) {
      return {before % 2, before / 2 % 2};
    } else {
      return stages;
    }
  }
  YOCO_DEVICE RingPosition<Shape::kScoreStages> scores(uint32_t before) const {
    if constexpr (kPairs) {
      return stage(before);
    } else {
      return tiles;
    }
  }
  YOCO_DEVICE void advance() {
    if constexpr (!kPairs) stages.advance(), tiles.advance();
  }
};

// Which tokens a block visits. It lies in shared memory: the warps' roles have few registers to spare for what they
// need once per chunk. Tokens of a batch row fit 31 bits here (run.h).
struct RunBlock {
  int n, head, segment, block_v, column, columns;  // RunItem's (column: that of the first panel)
  int panel_stride;                                // columns of v from one panel of the block to the next: 64, or
                                                   // half a head where both halves of it turn (rotate.cuh)
  int batch, first_token, length;                  // of the sequence
  int num_chunks, segments;
  int begin, end;  // chunks of this segment, in the order of the run
  bool reverse, outputs, packed;
  float score_scale;
  uint32_t tiles;  // where shared memory begins
  // Gate gradient: run.h's arrays for this block. 64 columns of v, a warpgroup's, are a part of their own in the sums.
  float* dots[2];        // [part], [time] of the batch row
  float* boundary[2];    // [part], [groups of chunks of the sequence]
  float* anchor_states;  // the state at the anchor of each group, anchor_stride states apart
  int64_t anchor_stride;
  // Rotary: v, x and o turn, or q and k. The tiles' first pair, how many turn from there on, and how far the columns of
  // a pair are apart in pieces of 8 columns (0: neighbours).
  bool rotate_v;
  int first_pair, pairs, half_pieces;
  int64_t position;  // of the sequence's first token

  // A chunk's tokens: [end - count, end) of the batch row.
  struct Chunk {
    int count, end;
  };
  YOCO_DEVICE int panel_column(int panel) const { return column + panel * panel_stride; }
  YOCO_DEVICE int chunk_index(int i) const { return reverse ? num_chunks - 1 - i : i; }
  YOCO_DEVICE Chunk chunk(int i) const {
    const int first = chunk_index(i) * kChunk, count = min(kChunk, length - first);
    return {count, first_token + first + count};
  }
};

// Where a chunk is in the maps of RetentionMaps, behind the column.
struct ChunkBox {
  int row, head, c3, c4;
};
YOCO_DEVICE ChunkBox chunk_box(const RunBlock& b, const RunBlock::Chunk& c) {
  constexpr int kRows = static_cast<int>(kPackedRows);
  return b.packed ? ChunkBox{kRows - c.count, b.head, c.end, kRows} : ChunkBox{c.end - c.count, b.head, b.batch, 0};
}
YOCO_DEVICE void tma_load_panel(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int column,
                                const ChunkBox& box) {
  tma_load(shared, map, barrier, column, box.row, box.head, box.c3, box.c4);
}
YOCO_DEVICE void tma_store_panel(const CUtensorMap& map, uint32_t shared, int column, const ChunkBox& box) {
  tma_store(map, shared, column, box.row, box.head, box.c3, box.c4);
}

}  // namespace yoco::cuda::sm90
