// What the host decides before a launch, and the instances it can choose from (instances/*.cu, one file each).
#pragma once

#include "cuda/core/launch.h"
#include "cuda/core/softmax.h"
#include "cuda/core/tile_scheduler.h"

namespace yoco::cuda {

constexpr int kForwardRows = 128;  // rows (token x query head) per CTA of every forward instance
constexpr int kForwardKeys = 64;   // keys per block

struct ForwardPlan {
  TileSchedule schedule;
  ScoreParams score;
  bool aligned_out;    // 16-byte stores; the inputs must be aligned (align_inputs)
  int splits;          // over the key blocks; > 1: partial results, merged by combine_kernel
  float* partial_out;  // [splits, batch, heads_q, time_q, dim_v]
  float* partial_lse;  // [splits, batch, heads_q, time_q], log2 units, without the sink
};

// D: 64, 128 or 256, at least both head dims.
template <typename T, int D>
const char* launch_attention_forward(const AttentionParams& p, const ForwardPlan& plan, const Launch& launch);

}  // namespace yoco::cuda
