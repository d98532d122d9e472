// Row tiles of attention and what they see. csrc/mask.h says which keys a row sees; here that becomes the range of key
// blocks a tile of rows visits, the blocks in it that need no mask, and the mask of the others.
#pragma once

#include "cuda/core/ptx.cuh"
#include "mask.h"

namespace yoco::cuda {

// Rows of attention are (token, query head) pairs of one KV head, heads fastest: row = token * group + head_in_group.
// All query heads of a KV head share its key blocks, short query blocks fill the tile, and a windowed tile spans fewer
// tokens, so less of its edge blocks is masked.
struct RowMap {
  Sequence sequence;
  int sequence_index;
  int group;  // query heads per KV head
  int head_kv;
  int rows;  // len_q * group

  YOCO_DEVICE int token(int row) const { return row / group; }
  YOCO_DEVICE int head(int row) const { return head_kv * group + row % group; }
  // Offset in elements of a row in a [batch, time, heads_q, dim] view.
  YOCO_DEVICE int64_t offset(const View& v, int row) const {
    return sequence.batch * v.batch_stride + (sequence.q_begin + token(row)) * v.time_stride +
           head(row) * v.head_stride;
  }
  // Index into [batch, heads_q, time_q].
  YOCO_DEVICE int64_t statistic(const AttentionParams& p, int row) const {
    return (sequence.batch * p.heads_q + head(row)) * p.time_q + sequence.q_begin + token(row);
  }
};

YOCO_DEVICE RowMap make_row_map(const AttentionParams& p, int sequence, int head_kv) {
  RowMap m;
  m.sequence = make_sequence(p, sequence);
  m.sequence_index = sequence;
  m.group = int(p.heads_q) / int(p.heads_kv);
  m.head_kv = head_kv;
  m.rows = int(m.sequence.len_q) * m.group;
  return m;
}

// Keys [x, y) that a row sees, x <= y.
YOCO_DEVICE int2 as_int2(const KeyRange& r) { return make_int2(int(r.begin), int(r.end > r.begin ? r.end : r.begin)); }

// kLatents: the latent segment, else the main one.
YOCO_DEVICE int2 row_keys(const AttentionParams& p, const RowMap& m, int row, bool latents) {
  const int64_t i = m.token(row);
  return as_int2(latents ? latent_range(p, m.sequence, i) : key_range(p, m.sequence, i));
}

YOCO_DEVICE bool sees(int2 keys, int key) { return unsigned(key - keys.x) < unsigned(keys.y - keys.x); }

// What the rows of one tile see of one segment.
struct TileBounds {
  int begin, end;            // some row sees something between; empty: begin >= end
  int full_begin, full_end;  // every row sees all of this
  YOCO_DEVICE bool full(int first, int count) const { return first >= full_begin && first + count <= full_end; }
};

YOCO_DEVICE TileBounds no_rows() { return TileBounds{0x7fffffff, 0, 0, 0x7fffffff}; }
YOCO_DEVICE TileBounds add_row(TileBounds b, int2 keys) {
  if (keys.x < keys.y) {
    b.begin = min(b.begin, keys.x);
    b.end = max(b.end, keys.y);
  }
  b.full_begin = max(b.full_begin, keys.x);
  b.full_end = min(b.full_end, keys.x < keys.y ? keys.y : 0);
  return b;
}

// Over the block; scratch: 16 bytes per warp, free before and after. Contains barriers.
template <int kThreads>
YOCO_DEVICE TileBounds block_bounds(TileBounds b, int4* scratch) {
  b.begin = __reduce_min_sync(0xffffffffu, b.begin);
  b.end = __reduce_max_sync(0xffffffffu, b.end);
  b.full_begin = __reduce_max_sync(0xffffffffu, b.full_begin);
  b.full_end = __reduce_min_sync(0xffffffffu, b.full_end);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = make_int4(b.begin, b.end, b.full_begin, b.full_end);
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    const int4 o = scratch[w];
    b.begin = min(b.begin, o.x);
    b.end = max(b.end, o.y);
    b.full_begin = max(b.full_begin, o.z);
    b.full_end = min(b.full_end, o.w);
  }
  __syncthreads();
  return b;
}

// Fills the table of a tile's rows (thread r: row first + r) and returns the bounds. Rows behind the last one see
// nothing and do not count. Contains barriers; the table is complete when it returns.
template <int kThreads, int kRows>
YOCO_DEVICE TileBounds fill_row_keys(const AttentionParams& p, const RowMap& m, int first, bool latents, int2* table,
                                     int4* scratch) {
  static_assert(kThreads >= kRows);
  TileBounds b = no_rows();
  const int r = int(threadIdx.x);
  if (r < kRows) {
    int2 keys = make_int2(0, 0);
    if (first + r < m.rows) {
      keys = row_keys(p, m, first + r, latents);
      b = add_row(b, keys);
    }
    table[r] = keys;
  }
  return block_bounds<kThreads>(b, scratch);
}

}  // namespace yoco::cuda
