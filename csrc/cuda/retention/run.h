// One "run": gated retention over time, from the first token to the last or the other way round. The forward is one
// run, the backward is three (docs/cuda_retention.md derives it):
//   o  = run(q, k, v)                              scores Q K^T, state sum k^T v
//   dq = run(d_o, v, k)                            the state is the forward's, transposed
//   dv = run(k, q, d_o), backwards in time         the state is the gradient of the forward's state
//   dk = run(v, d_o, q), backwards in time         the same, transposed
// so every matrix product of this back end's retention is in one kernel (run_kernel.cuh; simple.cu for float32).
#pragma once

#include "cuda/core/launch.h"
#include "cuda/retention/gate.cuh"
#include "cuda/retention/plan.h"

namespace yoco::cuda {

// The order that the columns of a turned tensor have in tiles, blocks and states, so that the two of a pair are in one
// block, in one unit of 16 columns. Interleaved pairs are neighbours already. Of half-split pairs (i, i + half), pieces
// of 2^shift columns of the one half alternate with those of the other: 8, or 1 where half is not a multiple of 8.
struct PairOrder {
  int32_t turned;  // columns that are reordered; 0: none
  int32_t shift;
  // Where column c of a tile lies in the tensor.
  YOCO_HOST_DEVICE int column(int c) const {
    if (c >= turned) return c;
    const int piece = c >> shift;
    return (piece >> 1 << shift) + (piece & 1) * (turned / 2) + (c & ((1 << shift) - 1));
  }
};

// What goes through a run. dim_k and dim_v are those of this run: dq's dim_k is the forward's dim_v.
struct RetentionRun {
  View q, k;  // [batch, time, heads, dim_k]
  View v, o;  // [batch, time, heads, dim_v]; o null: not wanted
  View x;     // [batch, time, heads, dim_v]: o is dotted with it for the gate gradient; or null
  int32_t dim_k, dim_v;
  float row_scale;  // o = row_scale * decayed q S + score_scale * (scores) V
  float score_scale;
  float update_scale;     // S += update_scale * decayed k^T v
  int32_t reverse;        // backwards in time: token t sees tokens >= t, and its own gate does not act on it
  int32_t rotate_v;       // with rotary: v and x turn on load and o turns back; else q and k turn on load
  const float* state_in;  // [num_sequences, heads, dim_k, dim_v] through the strides below; or null (zero)
  float* state_out;       // the same, or null
  int64_t state_stride_k, state_stride_v;
  // Segments of a sequence (see Segments): the state behind each but the last, in the kernel's own order.
  float* segment_states;  // [num_sequences, heads, blocks of dim_v, segments - 1, state of a block]
  float* segment_decays;  // [num_sequences, heads, blocks of dim_v, segments - 1]
  // Gate gradient (null otherwise). Token arrays are float32 [blocks of dim_v, heads, batch * time].
  float* dots;          // x . o of this block's columns
  float* group_states;  // [group slots, heads, blocks of dim_v, state of a block]: the state at each anchor in the
                        // kernel's own order: written, or (reverse) read
  float* boundary;      // reverse: [blocks of dim_v, heads, group slots], <state, its gradient> there
};

// All runs of one launch share these.
struct RetentionGrid {
  int64_t batch, time, heads, num_sequences;
  const int32_t* cu_seqlens;
  View g;
  GateFormat gate_format;      // of g and dg
  int32_t num_runs, blocks_v;  // blocks_v: of the run that has more
  int32_t segments;            // upper bound per sequence
  int32_t states_only;         // first pass of several segments: nothing but segment_states and segment_decays
  int32_t vectors;             // all rows are 16-byte aligned
  int32_t group_chunks;        // chunks from one exact <state, gradient> to the next
  RotaryOnLoad rotary;
  PairOrder order;  // of the turned columns
  // The layer's end, in a forward whose blocks have all columns of v (plan.h), or null:
  // y = o / sqrt(mean(o^2) + norm_eps) * silu(output_gate).
  View output_gate, y;  // [batch, time, heads, dim_v]
  float norm_eps;
  RetentionRun runs[2];
};

// ---- sequences
struct RetentionSequence {
  int64_t batch, begin, length;
};

YOCO_HOST_DEVICE RetentionSequence retention_sequence(const RetentionGrid& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.time};
  const int64_t begin = clamp_index(p.cu_seqlens[n], 0, p.time);
  return {0, begin, clamp_index(p.cu_seqlens[n + 1], begin, p.time) - begin};
}

// plan.h's numbers of groups, for these sequences.
YOCO_HOST_DEVICE int64_t first_group_slot(const RetentionGrid& p, int64_t n, int64_t begin) {
  return group_slot(n, begin, p.time, p.group_chunks, p.cu_seqlens != nullptr);
}
YOCO_HOST_DEVICE int64_t group_slots(const RetentionGrid& p) { return first_group_slot(p, p.num_sequences, p.time); }

// The state of a block in float32, padded to the instance.
YOCO_HOST_DEVICE int64_t block_state_size(const RetentionInstance& i) { return int64_t(i.dim_k) * i.block_v; }

// Launches one instance; retention/instances/*.cu define these. kBackward: with the parts for the gate gradient.
template <typename T, int kDimK, int kBlockV, bool kBackward>
const char* launch_retention(const RetentionGrid& p, const Launch& launch);
// float32, any alignment.
const char* launch_retention_simple(const RetentionGrid& p, const Launch& launch);
constexpr int kSimpleBlockV = 32;

}  // namespace yoco::cuda
