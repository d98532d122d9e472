// A run of gated retention (retention/run.h) for Hopper: which shapes take it, and the tensor maps it needs.
#pragma once

#include "cuda/core/tensor_map.h"
#include "cuda/retention/run.h"

namespace yoco::cuda {

// How TMA sees the tensors of a run: chunks of 64 tokens of one head in boxes of 64 columns. Where sequences are batch
// rows, the map is the tensor and a chunk that is cut off ends at the map's edge: loads find zeros there, stores leave
// it alone. Where sequences are packed, what follows the `count` tokens before `end` is the next sequence. There time
// appears twice, as kPackedRows rows and as the position `end`, both with the stride of a token: the box at row
// kPackedRows - count ends behind `count` rows. That address is kPackedRows tokens too high; a last dimension, always
// at kPackedRows, adds what the 64 bits of an address wrap around at: kPackedRows * kPackedStride * 2 bytes = 2^65.
// (A base address kPackedRows tokens before the tensor would do without it, but TMA needs a base that is mapped.)
constexpr int64_t kPackedRows = int64_t(1) << 30, kPackedStride = int64_t(1) << 34;

struct RetentionMaps {
  struct Run {
    CUtensorMap q, k, v, o, x;
  } runs[2];
  CUtensorMap output_gate, y;
};

// TMA can reach every tensor of every run of the grid (strides are multiples of 16 bytes, nothing is broadcast). With
// rotary: pairs of halves lie in pieces of 8 columns and, where v turns, of one block (retention_fits_sm90 has the
// rule).
bool retention_fits_sm90(const RetentionGrid& p, const RetentionInstance& instance);

// One pass of p's runs; an instance per launch file in retention/sm90/instances.
template <typename T, int kDimK, int kBlockV, bool kBackward>
const char* launch_retention_sm90(const RetentionGrid& p, const RetentionMaps& maps, const Launch& launch);

// Picks the instance. dtype: bfloat16 or float16.
const char* launch_retention_sm90(const RetentionGrid& p, const RetentionInstance& instance, DType dtype, bool backward,
                                  const Launch& launch);

}  // namespace yoco::cuda
