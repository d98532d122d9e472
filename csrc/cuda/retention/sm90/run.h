// A run of gated retention (retention/run.h) for Hopper: which shapes take it, and the tensor maps it needs.
#pragma once

#include "cuda/core/tensor_map.h"
#include "cuda/retention/run.h"

namespace yoco::cuda {

// How TMA sees the tensors of a run: chunks of 64 tokens of one head in boxes of 64 columns. Time appears twice, as
// [64] and as [time + 1], both with the stride of a token and 64 tokens before the tensor's first: the box at row
// 64 - count of the first and at position `end` of the second is the `count` tokens before `end`, and whatever follows
// them, be it the next packed sequence, lies outside of the map. Loads find zeros there and stores leave it alone.
struct RetentionMaps {
  struct Run {
    CUtensorMap q, k, v, o, x;
  } runs[2];
};

// TMA can reach every tensor of every run of the grid (strides are multiples of 16 bytes, nothing is broadcast) and
// there is an instance for it.
bool retention_fits_sm90(const RetentionGrid& p, const RetentionInstance& instance);

// One pass of p's runs; an instance per launch file in retention/sm90/instances.
template <typename T, int kDimK, int kBlockV, bool kBackward>
const char* launch_retention_sm90(const RetentionGrid& p, const RetentionMaps& maps, const Launch& launch);

// Picks the instance. dtype: bfloat16 or float16.
const char* launch_retention_sm90(const RetentionGrid& p, const RetentionInstance& instance, DType dtype, bool backward,
                                  const Launch& launch);

}  // namespace yoco::cuda
