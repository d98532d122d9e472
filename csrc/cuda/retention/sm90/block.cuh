// What the warps of a Hopper run share: sizes, shared memory, the block's work, and the instructions only this kernel
// uses.
#pragma once

#include "cuda/core/reduce.cuh"
#include "cuda/core/sm90.cuh"
#include "cuda/retention/item.cuh"
#include "cuda/retention/sm90/run.h"
#include "cuda/retention/tile.cuh"

namespace yoco::cuda::sm90 {

template <int kDimK, int kBlockV, bool kBackward>
struct RunShape {
  static constexpr int kGroups = kBlockV / 64;  // warpgroups that hold the state, 64 columns of v each
  static constexpr int kThreads = (2 + kGroups) * kWarpgroup;
  // dim_k = 64 leaves room for two blocks on an SM; the others fill it with stages.
  static constexpr int kBlocksPerSM = kDimK == 64 && !kBackward ? 2 : 1;
  static constexpr int kStages = kDimK == 128 && kBlockV == 64 ? 4 : kDimK == 64 && kBackward ? 5 : 3;
  static constexpr int kScoreStages = 2;
  // Registers per thread of the producer, the scores and the state warpgroups: multiples of 8 whose sum over the
  // warpgroups is at most what the block starts with.
  static constexpr int kLoadRegisters = 40;
  static constexpr int kScoreRegisters = kGroups == 2 ? 72 : kBlocksPerSM == 2 ? 64 : 136;
  static constexpr int kStateRegisters = kGroups == 2 ? 200 : kBlocksPerSM == 2 ? 136 : 240;

  // A stage: Q, K, V of a chunk; backward also X, where O takes its place.
  static constexpr int kTileK = kDimK / 64 * kPanelBytes, kTileV = kBlockV / 64 * kPanelBytes;
  static constexpr bool kOutInStage = kBackward;
  static constexpr int kK = kTileK, kV = 2 * kTileK, kX = kV + kTileV, kStageBytes = kX + (kBackward ? kTileV : 0);
  // Then P, O, the small arrays and the barriers.
  static constexpr int kScores = kStages * kStageBytes;
  static constexpr int kOut = kScores + kScoreStages * kPanelBytes;
  static constexpr int kGates = kOut + (kOutInStage ? 0 : kTileV);
  static constexpr int kDots = kGates + kStages * static_cast<int>(sizeof(ChunkGates));
  static constexpr int kWarpSums = kDots + (kBackward ? kGroups * 8 * kChunk * 4 : 0);
  static constexpr int kFull = kWarpSums + (kBackward ? kGroups * 16 : 0), kEmpty = kFull + 8 * kStages;
  static constexpr int kScoresFull = kEmpty + 8 * kStages, kScoresEmpty = kScoresFull + 8 * kScoreStages;
  static constexpr int kBytes = kScoresEmpty + 8 * kScoreStages + 1024;  // + alignment
  static_assert(kBlocksPerSM * (kBytes + 1024) <= 228 * 1024);
};

// Which tokens a block visits. It lies in shared memory: the warps' roles have few registers to spare for what they
// need once per chunk. Tokens of a batch row fit 31 bits here (run.h).
struct RunBlock {
  int n, head, segment, block_v, column, columns;  // RunItem's
  int batch, first_token, length;                  // of the sequence
  int num_chunks, segments;
  int begin, end;  // chunks of this segment, in the order of the run
  bool reverse, outputs, packed;

  // A chunk's tokens: [end - count, end) of the batch row.
  struct Chunk {
    int count, end;
  };
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
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];\n" ::"l"(&map),
               "r"(shared), "r"(column), "r"(box.row), "r"(box.head), "r"(box.c3), "r"(box.c4)
               : "memory");
}

// Four 8 x 8 matrices to shared memory: the inverse of ldmatrix, and of its transposed form.
YOCO_DEVICE void stmatrix(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}
YOCO_DEVICE void stmatrix_trans(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace yoco::cuda::sm90
