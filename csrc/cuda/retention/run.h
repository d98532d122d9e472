// One "run": gated retention over time, from the first token to the last or the other way round. The forward is one
// run, the backward is three (docs/cuda_retention.md derives it):
//   o  = run(q, k, v)                              scores Q K^T, state sum k^T v
//   dq = run(d_o, v, k)                            the state is the forward's, transposed
//   dv = run(k, q, d_o), backwards in time         the state is the gradient of the forward's state
//   dk = run(v, d_o, q), backwards in time         the same, transposed
// so every matrix product of this back end's retention is in one kernel (run_kernel.cuh; simple.cu for float32).
#pragma once

#include <algorithm>

#include "cuda/core/launch.h"
#include "mask.h"

namespace yoco::cuda {

constexpr int kChunk = 64;

// What goes through a run. dim_k and dim_v are those of this run: dq's dim_k is the forward's dim_v.
struct RetentionRun {
  View q, k;  // [batch, time, heads, dim_k]
  View v, o;  // [batch, time, heads, dim_v]; o null: only the state is wanted
  View x;     // [batch, time, heads, dim_v]: o is dotted with it for the gate gradient; or null
  int32_t dim_k, dim_v;
  float row_scale;  // o = row_scale * decayed q S + score_scale * (scores) V
  float score_scale;
  float update_scale;     // S += update_scale * decayed k^T v
  int32_t reverse;        // backwards in time: token t sees tokens >= t, and its own gate does not act on it
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
  int32_t gate_is_float;       // g (and dg) are float32, else in the dtype of q
  int32_t num_runs, blocks_v;  // blocks_v: of the run that has more
  int32_t segments;            // upper bound per sequence
  int32_t states_only;         // first pass of several segments: nothing but segment_states and segment_decays
  int32_t vectors;             // all rows are 16-byte aligned
  int32_t group_chunks;        // chunks from one exact <state, gradient> to the next
  RetentionRun runs[2];
};

// ---- sequences, chunks, segments
// -------------------------------------------------------------------------------------
struct RetentionSequence {
  int64_t batch, begin, length;
};

YOCO_HOST_DEVICE RetentionSequence retention_sequence(const RetentionGrid& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.time};
  const int64_t begin = clamp_index(p.cu_seqlens[n], 0, p.time);
  return {0, begin, clamp_index(p.cu_seqlens[n + 1], begin, p.time) - begin};
}

YOCO_HOST_DEVICE int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }

// For the gate gradient, chunks come in groups of M, and the state before the middle chunk of each group (the last
// chunk of the sequence, where there is no such) is its anchor: at most M / 2 chunks from any token.
YOCO_HOST_DEVICE int64_t anchor_of(int64_t group, int64_t group_chunks, int64_t num_chunks) {
  return clamp_index(group * group_chunks + group_chunks / 2, 0, num_chunks - 1);
}
// A number of its own for every group of every sequence, without a sum over the sequences before it: with u = 64 M
// tokens to a group, a sequence of length l has at most l / u + 1 groups, and one that begins at b + l counts from
// (b + l) / u + n + 1 or higher where this one counts from b / u + n.
YOCO_HOST_DEVICE int64_t first_group_slot(const RetentionGrid& p, int64_t n, int64_t begin) {
  const int64_t tokens = int64_t(kChunk) * p.group_chunks;
  return p.cu_seqlens == nullptr ? n * ((p.time + tokens - 1) / tokens) : begin / tokens + n;
}
YOCO_HOST_DEVICE int64_t group_slots(const RetentionGrid& p) { return first_group_slot(p, p.num_sequences, p.time); }

// A sequence is cut into segments when there are too few (sequence, head, block of dim_v) items for the GPU. Every
// segment but the last finds its state (first pass: k, v and g are read a second time), the states are chained (a
// scalar decay each), then all segments run at once. Shorter pieces than this are not worth a pass.
constexpr int64_t kMinSegmentChunks = 16;

YOCO_HOST_DEVICE int64_t segments_of(int64_t chunks, int64_t upper_bound) {
  return clamp_index(chunks / kMinSegmentChunks, 1, upper_bound < 1 ? 1 : upper_bound);
}

// Chunks of segment `s`, counted in the order in which the run visits them.
YOCO_HOST_DEVICE KeyRange segment_chunks(int64_t chunks, int64_t segments, int64_t s) {
  const int64_t each = (chunks + segments - 1) / segments;
  const int64_t begin = clamp_index(s * each, 0, chunks);
  return {begin, clamp_index(begin + each, 0, chunks)};
}

// Upper bound of segments per sequence: as many as fill the SMs once. Two would read k, v and g again to halve the
// critical path: worth it. The longest sequence is not known on the host when packed; time bounds it.
YOCO_HOST_DEVICE int64_t retention_segments(int64_t items, int64_t time, int64_t sms) {
  if (items <= 0) return 1;
  return segments_of(chunks_of(time), clamp_index(sms / items, 1, 1024));
}

// ---- instances
// ------------------------------------------------------------------------------------------------------- A block of
// threads covers all dim_k and block_v of dim_v; each warp keeps 16 columns of the state in registers.
//   dim_k <=  64: block_v 64:  32 registers of state per thread, small blocks, several per SM
//   dim_k <= 128: block_v 128: one block covers D = 128, so q, k, v are read once; 64 registers of state
//                 block_v 64:  for dim_v <= 64, and twice the blocks where 128 leaves SMs idle
//   dim_k <= 256: block_v 128: 128 registers of state; two blocks share q and k through L2 at D = 256
struct RetentionInstance {
  int32_t dim_k, block_v;
};

YOCO_HOST_DEVICE RetentionInstance retention_instance(int64_t dim_k, int64_t dim_v, int64_t rows, int64_t sms) {
  if (dim_k <= 64) return {64, 64};
  if (dim_k > 128) return {256, 128};
  if (dim_v <= 64) return {128, 64};
  return {128, rows * ((dim_v + 127) / 128) * 2 <= sms ? 64 : 128};
}

// The state of a block in float32, padded to the instance.
YOCO_HOST_DEVICE int64_t block_state_size(const RetentionInstance& i) { return int64_t(i.dim_k) * i.block_v; }

// Launches one instance; retention/instances/*.cu define these. kBackward: with the parts for the gate gradient.
template <typename T, int kDimK, int kBlockV, bool kBackward>
const char* launch_retention(const RetentionGrid& p, const Launch& launch);
// float32, any alignment.
const char* launch_retention_simple(const RetentionGrid& p, const Launch& launch);
constexpr int kSimpleBlockV = 32;

}  // namespace yoco::cuda
