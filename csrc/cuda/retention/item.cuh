// Which part of a launch a block is: shared by the tensor-core and the simple kernel.
#pragma once

#include "cuda/core/vector.cuh"
#include "cuda/retention/run.h"

namespace yoco::cuda {

struct RunItem {
  int run;
  int block_v, column, columns;  // columns [column, column + columns) of dim_v; columns <= 0: nothing to do
  int segment;
  int64_t head, n;  // n == num_sequences: the rows behind the last packed sequence
};

// Blocks that share q, k (blocks of v) or most tiles (the two runs of the backward) are neighbours: L2 serves them.
YOCO_DEVICE RunItem run_item(const RetentionGrid& p, int width) {
  RunItem item;
  int64_t index = blockIdx.x;
  item.block_v = static_cast<int>(index % p.blocks_v);
  index /= p.blocks_v;
  item.run = static_cast<int>(index % p.num_runs);
  index /= p.num_runs;
  item.head = index % p.heads;
  index /= p.heads;
  item.segment = static_cast<int>(index % p.segments);
  item.n = index / p.segments;
  item.column = item.block_v * width;
  item.columns = min(p.runs[item.run].dim_v - item.column, width);
  return item;
}

inline int64_t run_blocks(const RetentionGrid& p) {
  const int64_t sequences = p.num_sequences + (p.cu_seqlens != nullptr && !p.states_only ? 1 : 0);
  return sequences * p.segments * p.heads * p.num_runs * p.blocks_v;
}

// Rows behind the last packed sequence become zeros.
template <typename T, int kThreads>
YOCO_DEVICE void zero_tail(const RetentionGrid& p, const RunItem& item, const View& view) {
  if (view.data == nullptr || item.segment != 0) return;
  const int64_t end = p.num_sequences == 0 ? 0 : clamp_index(p.cu_seqlens[p.num_sequences], 0, p.time);
  T* o = static_cast<T*>(view.data) + item.head * view.head_stride + item.column;
  for (int64_t i = threadIdx.x; i < (p.time - end) * item.columns; i += kThreads) {
    o[(end + i / item.columns) * view.time_stride + i % item.columns] = from_float<T>(0.f);
  }
}
template <typename T, int kThreads>
YOCO_DEVICE void zero_tail(const RetentionGrid& p, const RunItem& item) {
  zero_tail<T, kThreads>(p, item, p.runs[item.run].o);
}

}  // namespace yoco::cuda
