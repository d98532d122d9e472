// What one Hopper attention tile works on, in blocks of keys; and writing rows of accumulators to global memory.
#pragma once

#include "cuda/core/row_mask.h"
#include "cuda/core/sm90.cuh"
#include "cuda/core/softmax.h"

namespace yoco::cuda::sm90 {

// One tile (or one split of it), as the producer hands it to the consumers through shared memory. Its key blocks:
// [0, num_main) lie in the main segment, the rest in the latents; [begin, end) are visited.
struct alignas(16) Tile {
  int index;  // in the schedule, or kNoMore
  int first_row, rows;
  int begin, end, num_main;
  int main_first, latent_first;  // block index of the segment = n + first
  int full_begin, full_end;      // keys of the main segment that every row sees
  int full_latents;              // every row sees the latents [0, full_latents)
  int keep;                      // keys of main block num_main - 1 that belong to the sequence
  static constexpr int kNoMore = -1;

  template <int kKeys>
  YOCO_DEVICE int first_key(int n) const {
    return (n + (n < num_main ? main_first : latent_first)) * kKeys;
  }
  // Nothing in block n, whose first key is given, is masked.
  template <int kKeys>
  YOCO_DEVICE bool full(int n, int first) const {
    return n < num_main ? first >= full_begin && first + kKeys <= full_end : first + kKeys <= full_latents;
  }
};

YOCO_DEVICE void put_tile(uint32_t shared, const Tile& tile) {
  const int4* words = reinterpret_cast<const int4*>(&tile);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared + 16 * i), "r"(words[i].x), "r"(words[i].y),
                 "r"(words[i].z), "r"(words[i].w)
                 : "memory");
  }
}
// The same value in all lanes, and the compiler knows: it may live in a uniform register.
YOCO_DEVICE int uniform(int x) { return __reduce_max_sync(0xffffffffu, x); }
YOCO_DEVICE int4 get_uniform(uint32_t shared) {
  int4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return make_int4(uniform(v.x), uniform(v.y), uniform(v.z), uniform(v.w));
}
YOCO_DEVICE Tile get_tile(uint32_t shared) {
  Tile tile;
  int4* words = reinterpret_cast<int4*>(&tile);
#pragma unroll
  for (int i = 0; i < 3; ++i) words[i] = get_uniform(shared + 16 * i);
  return tile;
}
// One of its fields once more, by address: cheaper than to keep it in a register while accumulators fill the others.
YOCO_DEVICE int get_field(uint32_t shared) {
  int x;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(x) : "r"(shared) : "memory");
  return uniform(x);
}

// Bounds of rows [first, first + count), by a whole warp, every lane gets them.
YOCO_DEVICE TileBounds warp_bounds(const AttentionParams& p, const RowMap& m, int first, int count, bool latents) {
  if (latents ? p.latent_begin == nullptr && p.latent_end == nullptr : p.mask.prefix_len == nullptr) {
    // A window moves with the row: the first and the last row say it all.
    const int2 a = row_keys(p, m, first, latents), b = row_keys(p, m, first + count - 1, latents);
    if (b.x >= b.y) return no_rows();
    return TileBounds{a.x, b.y, b.x, a.x < a.y ? a.y : 0};
  }
  TileBounds b = no_rows();
#pragma unroll 1
  for (int r = int(threadIdx.x % 32); r < count; r += 32) b = add_row(b, row_keys(p, m, first + r, latents));
  b.begin = __reduce_min_sync(0xffffffffu, b.begin);
  b.end = __reduce_max_sync(0xffffffffu, b.end);
  b.full_begin = __reduce_max_sync(0xffffffffu, b.full_begin);
  b.full_end = __reduce_min_sync(0xffffffffu, b.full_end);
  return b;
}

// The blocks that rows [first_row, first_row + rows) see, split `split` of `splits`; by a whole warp. seen: what they
// see of the main segment.
template <int kKeys>
YOCO_DEVICE Tile make_tile(const AttentionParams& p, const RowMap& m, const TileBounds& seen, int index, int first_row,
                           int rows, int split, int splits) {
  Tile t;
  t.index = index;
  t.first_row = first_row;
  t.rows = rows;
  t.main_first = seen.begin < seen.end ? seen.begin / kKeys : 0;
  t.num_main = seen.begin < seen.end ? (seen.end + kKeys - 1) / kKeys - t.main_first : 0;
  t.full_begin = seen.full_begin;
  t.full_end = seen.full_end;
  // TMA writes zeros behind the tensor, but a packed sequence or a cache goes on behind the keys that count.
  const bool loose_end = p.cu_seqlens_k != nullptr || p.seqused_k != nullptr;
  t.keep = loose_end ? int(m.sequence.len_k) - (t.main_first + t.num_main - 1) * kKeys : kKeys;
  int blocks = t.num_main;
  t.latent_first = 0;
  t.full_latents = 0;
  if (p.num_latents > 0) {
    const TileBounds latents = warp_bounds(p, m, first_row, rows, true);
    if (latents.begin < latents.end) {
      t.latent_first = latents.begin / kKeys - t.num_main;
      blocks += (latents.end + kKeys - 1) / kKeys - latents.begin / kKeys;
      t.full_latents = latents.full(0, int(p.num_latents)) ? int(p.num_latents) : 0;
    }
  }
  t.begin = splits == 1 ? 0 : int(int64_t(blocks) * split / splits);
  t.end = splits == 1 ? blocks : int(int64_t(blocks) * (split + 1) / splits);
  return t;
}

template <int kKeys>
YOCO_DEVICE Tile make_tile(const AttentionParams& p, const RowMap& m, int index, int first_row, int rows, int split,
                           int splits) {
  return make_tile<kKeys>(p, m, warp_bounds(p, m, first_row, rows, false), index, first_row, rows, split, splits);
}

// Rows [from, kRows) of a tile become zero; kThreads threads take part. Then fence_async_proxy and a barrier.
template <int kRows, int kPanels, int kThreads>
YOCO_DEVICE void zero_tile_rows(uint32_t tile, int from, int thread) {
#pragma unroll
  for (int i = 0; i < kRows * 8; i += kThreads) {
    const int chunk = i + thread;
    if (chunk >= kRows * 8 || chunk < from * 8) continue;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};\n" ::"r"(tile + panel * kRows * 128 + chunk * 16), "r"(0)
                   : "memory");
    }
  }
}

// The 4 x 4 transpose of r over the four lanes of a row of accumulators: lane t held word t of blocks 0..3, and now
// holds words 0..3 of block t, 16 bytes that lie together.
YOCO_DEVICE void transpose_quad(uint32_t (&r)[4]) {
  const int t = int(threadIdx.x % 4);
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (t & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? r[i] : r[i + bit], bit);
      r[i] = upper ? received : r[i];
      r[i + bit] = upper ? r[i + bit] : received;
    }
  }
}

// Stores row g + 8 h of every warp's accumulators, times factor and rounded to T; lanes with `valid` false only take
// part in the exchange. aligned: `to` is a multiple of 16 bytes.
template <typename T, int N>
YOCO_DEVICE void store_row(T* to, const float (&d)[N], int h, float factor, int dim, bool valid, bool aligned) {
  const int t = int(threadIdx.x % 4);
#pragma unroll
  for (int group = 0; group < N / 16; ++group) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = (group * 4 + i) * 4 + h * 2;
      r[i] = pack2<T>(d[from] * factor, d[from + 1] * factor);
    }
    transpose_quad(r);
    const int col = (group * 4 + t) * 8;
    if (!valid || col >= dim) continue;
    const Vec<T, 8> v = *reinterpret_cast<const Vec<T, 8>*>(r);
    if (aligned) {
      store_global<8>(to + col, v);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) to[col + i] = v.at[i];
    }
  }
}

}  // namespace yoco::cuda::sm90
