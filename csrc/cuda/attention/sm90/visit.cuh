// What one warpgroup of the forward kernel multiplies of a tile. The tile's blocks are what any of its rows sees; the
// 64 rows of a warpgroup often see nothing of the first or last of them, or only one end: half of the block on a causal
// diagonal or at the edge of a window. What is left out are products with zeros, so no bit of the result depends on it.
#pragma once

#include "cuda/attention/sm90/tile.cuh"

namespace yoco::cuda::sm90 {

// Blocks [begin, end) of the tile's. The two at the ends may be multiplied in part: kPart keys from the one given on.
// kWhole: all of them.
struct alignas(16) Visit {
  int begin, end;
  int first_part, last_part;  // of blocks begin and end - 1: the same if they are one
  int full_begin, full_end;   // blocks of the main segment of which these rows see every key
  int full_latents;           // they see all of block n of the latents if n < full_latents
  int loose;                  // the block of which only Tile::keep keys belong to the sequence, or -1
  static constexpr int kWhole = -1;
};

YOCO_DEVICE void put_visit(uint32_t shared, const Visit& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared), "r"(v.begin), "r"(v.end), "r"(v.first_part),
               "r"(v.last_part)
               : "memory");
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared + 16), "r"(v.full_begin), "r"(v.full_end),
               "r"(v.full_latents), "r"(v.loose)
               : "memory");
}
YOCO_DEVICE Visit get_visit(uint32_t shared) {
  const int4 v = get_uniform(shared), u = get_uniform(shared + 16);
  return Visit{v.x, v.y, v.z, v.w, u.x, u.y, u.z, u.w};
}

// Of a block's keys [0, kKeys) only [low, high) are seen: the part that holds them, if one end of kPart keys does.
template <int kKeys, int kPart>
YOCO_DEVICE int part_of_block(int low, int high) {
  static_assert(kPart < kKeys);
  return high <= kPart ? 0 : low >= kKeys - kPart ? kKeys - kPart : Visit::kWhole;
}

// own: what the warpgroup's rows see of the main segment. has_rows: it has any. The latents are visited by every
// warpgroup that has, as far as the tile does.
template <int kKeys, int kPart>
YOCO_DEVICE Visit make_visit(const Tile& t, const TileBounds& own, bool has_rows) {
  const bool sees_main = own.begin < own.end;
  const bool latents = t.end > t.num_main;
  const int first = sees_main ? own.begin / kKeys - t.main_first : t.num_main;
  const int end = sees_main ? (own.end + kKeys - 1) / kKeys - t.main_first : first;
  Visit v;
  v.begin = has_rows ? min(max(t.begin, first), t.end) : t.end;
  v.end = latents ? t.end : min(max(v.begin, end), t.end);
  // What is seen of the blocks at the ends, unless a split or the latents cut the main segment off there.
  const int low = sees_main && v.begin == first ? own.begin % kKeys : 0;
  const int high = sees_main && !latents && v.end == end ? own.end - (end - 1 + t.main_first) * kKeys : kKeys;
  const bool one = v.end - v.begin == 1;
  v.first_part = part_of_block<kKeys, kPart>(low, one ? high : kKeys);
  v.last_part = part_of_block<kKeys, kPart>(one ? low : 0, high);
  v.full_begin = (own.full_begin + kKeys - 1) / kKeys - t.main_first;
  v.full_end = min(own.full_end / kKeys - t.main_first, t.num_main);
  v.full_latents = t.full_latents / kKeys - t.latent_first;
  v.loose = t.keep < kKeys ? t.num_main - 1 : -1;
  return v;
}

// What the rows of each warpgroup see of the main segment, over the lanes of a warp (registers are few in the
// producer): lane 2 w holds (begin, full_end) and lane 2 w + 1 (full_begin, end) of warpgroup w, lanes behind them the
// last row's. That is what the first and the last row of the warpgroup see, in a window, which moves with the row;
// prefix rows are all asked. Rows [first, first + count), count <= 64 kWarpgroups; by a whole warp.
template <int kWarpgroups>
YOCO_DEVICE int2 warpgroup_keys(const AttentionParams& p, const RowMap& m, int first, int count) {
  const int lane = int(threadIdx.x % 32);
  if (p.mask.prefix_len == nullptr) {
    return row_keys(p, m, first + min(lane / 2 * 64 + lane % 2 * 63, count - 1), false);
  }
  int2 keys = make_int2(0, 0);
#pragma unroll 1
  for (int w = 0; w < kWarpgroups; ++w) {
    TileBounds b = no_rows();
#pragma unroll 1
    for (int r = w * 64 + lane; r < min(w * 64 + 64, count); r += 32) b = add_row(b, row_keys(p, m, first + r, false));
    b.begin = __reduce_min_sync(0xffffffffu, b.begin);
    b.end = __reduce_max_sync(0xffffffffu, b.end);
    b.full_begin = __reduce_max_sync(0xffffffffu, b.full_begin);
    b.full_end = __reduce_min_sync(0xffffffffu, b.full_end);
    if (lane / 2 == w) keys = lane % 2 == 0 ? make_int2(b.begin, b.full_end) : make_int2(b.full_begin, b.end);
  }
  return keys;
}
// Of warpgroup w, from what warpgroup_keys gave.
YOCO_DEVICE TileBounds warpgroup_bounds(int2 keys, int w) {
  const int begin = __shfl_sync(0xffffffffu, keys.x, 2 * w), full_end = __shfl_sync(0xffffffffu, keys.y, 2 * w);
  const int full_begin = __shfl_sync(0xffffffffu, keys.x, 2 * w + 1), end = __shfl_sync(0xffffffffu, keys.y, 2 * w + 1);
  return full_begin >= end ? no_rows() : TileBounds{begin, end, full_begin, begin < full_end ? full_end : 0};
}

// Of all of them together.
YOCO_DEVICE TileBounds all_bounds(int2 keys) {
  const TileBounds own = warpgroup_bounds(keys, int(threadIdx.x % 32));
  return TileBounds{__reduce_min_sync(0xffffffffu, own.begin), __reduce_max_sync(0xffffffffu, own.end),
                    __reduce_max_sync(0xffffffffu, own.full_begin), __reduce_min_sync(0xffffffffu, own.full_end)};
}

// ---- registers
// The first kColumns columns of accumulators that have room for more, for wgmma, pin_registers and pack_operand.
template <int kColumns, int N>
YOCO_DEVICE auto columns(float (&d)[N]) -> float (&)[kColumns / 2] {
  static_assert(kColumns <= 2 * N);
  return reinterpret_cast<float(&)[kColumns / 2]>(d);
}
template <int kColumns, int N>
YOCO_DEVICE auto columns(uint32_t (&a)[N][4]) -> uint32_t (&)[kColumns / 16][4] {
  static_assert(kColumns <= 16 * N);
  return reinterpret_cast<uint32_t(&)[kColumns / 16][4]>(a);
}
// In place of pin_registers before a product that overwrites its accumulators: what they held is gone, so that the
// compiler may choose registers for each product. Code with more than one product runs out of them otherwise, and it
// serialises them all.
template <int N>
YOCO_DEVICE void new_registers(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "=f"(r[i])::"memory");
}

}  // namespace yoco::cuda::sm90
