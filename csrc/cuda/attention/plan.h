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

// ---- backward
template <int D>
struct BackwardTiles {  // reasons in backward.h
  static constexpr int kRows = 64;
  static constexpr int kKeys = D == 256 ? 64 : 128;
};

struct BackwardPlan {
  TileSchedule schedule;      // key tiles: main_tiles of the main segment, then latent_tiles
  TileSchedule row_schedule;  // row tiles (finish_dq_kernel, attention_backward_q_kernel)
  int main_tiles, latent_tiles;
  ScoreParams score;
  float scale;
  bool want_dkv, want_latents, want_dq;
  bool aligned_dq, aligned_dkv, aligned_latents;  // 16-byte stores
  // Per row {lse in log2 units (+inf where nothing is visible: P becomes 0), delta - d_lse}, [batch, heads_kv, rows].
  float2* stats;
  float* dq_accumulator;  // tiles of kRows x D in register order, or null: dQ is not made by key tiles
  // Latents that several sequences share: sequence s adds to slice s % latent_slices, reduced in a fixed order.
  int latent_slices;        // num_sequences when not shared
  float* latent_partial_k;  // [latent_slices, num_latents, heads_kv, dim_qk], or null: stored directly
  float* latent_partial_v;
};

// D: 64, 128 or 256. dK, dV (and with a dq_accumulator dQ) by key tiles; dQ by row tiles.
template <typename T, int D>
const char* launch_attention_backward(const AttentionBackwardParams& p, const BackwardPlan& plan, const Launch& launch);
template <typename T, int D>
const char* launch_attention_backward_q(const AttentionBackwardParams& p, const BackwardPlan& plan,
                                        const Launch& launch);

}  // namespace yoco::cuda
