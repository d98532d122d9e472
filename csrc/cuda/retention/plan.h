// How work is cut up: chunks, segments, groups with an anchor, instances. Pure functions, host and device, so that
// tests call them without a GPU (python_tests/test_cuda_retention.py).
#pragma once

#include "mask.h"

namespace yoco::cuda {

constexpr int kChunk = 64;

YOCO_HOST_DEVICE int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }

// ---- segments
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

// ---- groups of chunks, for the gate gradient
// Chunks to an anchor (tensor-core kernels). A float32 state costs as much memory traffic as two tensors of a chunk,
// written and read.
constexpr int kGroupChunks = 16;

// For the gate gradient, chunks come in groups of M, and the state before the middle chunk of each group (the last
// chunk of the sequence, where there is no such) is its anchor: at most M / 2 chunks from any token.
YOCO_HOST_DEVICE int64_t anchor_of(int64_t group, int64_t group_chunks, int64_t num_chunks) {
  return clamp_index(group * group_chunks + group_chunks / 2, 0, num_chunks - 1);
}
// A number of its own for every group of every sequence, without a sum over the sequences before it: with u = 64 M
// tokens to a group, a sequence of length l has at most l / u + 1 groups, and one that begins at b + l counts from
// (b + l) / u + n + 1 or higher where this one counts from b / u + n. The first number of sequence n:
YOCO_HOST_DEVICE int64_t group_slot(int64_t n, int64_t begin, int64_t time, int64_t group_chunks, bool packed) {
  const int64_t tokens = kChunk * group_chunks;
  return packed ? begin / tokens + n : n * ((time + tokens - 1) / tokens);
}

// ---- instances
// A block of
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

// Which instances have a form that ends with the norm and the output gate: a block must hold all columns of v, since
// the norm sums over them. Of the rest, dim_k > 128 has no shared memory left for the gate, and 64 columns of v under
// 128 of k are too rare for kernels of their own.
YOCO_HOST_DEVICE constexpr bool norm_fuses(const RetentionInstance& i, int64_t dim_v) {
  return dim_v <= i.block_v && i.dim_k == i.block_v;
}

}  // namespace yoco::cuda
