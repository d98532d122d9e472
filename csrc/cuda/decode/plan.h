// What the host decides about one decode call, and what the kernels need besides DecodeParams.
#pragma once

#include <algorithm>

#include "cuda/core/launch.h"
#include "cuda/core/split.h"

namespace yoco::cuda {

// One launch of a decode kernel: one segment (the cache or the latents) cut into `splits` pieces.
struct DecodeSegment {
  bool latent;
  int64_t splits, min_tiles;
  int64_t first_slot;  // where its partial results go
};

// Partial results of all pieces: normalised output and base-2 log-sum-exp of each piece, float32.
struct DecodePartials {
  int64_t slots;  // pieces of both segments; 1: the kernel writes the final result itself
  float* out;     // [slots, batch, heads_q, time_q, dim_v]
  float* lse;     // [slots, batch, heads_q, time_q]
};

struct DecodePlan {
  bool tensor_cores;  // else the simple kernel: float32, or rows that 16-byte copies cannot reach
  bool hopper;        // the sm_90a kernel (decode/sm90)
  int head_dim;       // instance: 64, 128, 256
  int tile_rows;      // packed rows in a tile: 16 or 64; hopper: 8, 16 or 64
  int64_t row_tiles;
  DecodeSegment cache, latents;  // latents.splits == 0: absent
  int64_t slots;
};

// Keys that a block takes in at a time; the unit of a split.
constexpr int64_t decode_tile_keys(int head_dim) { return head_dim <= 128 ? 64 : 32; }
constexpr int kHopperTileKeys = 64;  // the M of one WGMMA
constexpr int kHopperBoxKeys = 16;   // keys that one TMA copy moves: pages and rings of 16 slots and more have no seams

// Blocks that share an SM. A one-byte cache moves half the bytes per instruction and a narrow head fewer per block, so
// they need more warps to keep up with memory; the accumulators of the other instances leave room for two.
constexpr int decode_resident_blocks(int head_dim, bool narrow, int tile_rows) {
  return tile_rows == 16 && (head_dim == 64 || (head_dim == 128 && narrow)) ? 3 : 2;
}
// The Hopper kernel needs several blocks to cover each other's starts, ends and turns; what limits them is shared
// memory (64 KB per stage at head dim 256) and, with 64 rows, the accumulators.
constexpr int hopper_resident_blocks(int head_dim, bool narrow, int tile_rows) {
  if (head_dim == 256) return narrow && tile_rows < 64 ? 2 : 1;
  return tile_rows == 64 ? 2 : 3;
}

inline bool decode_fits_tensor_cores(const DecodeParams& p) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return false;
  const size_t cache = element_size(p.cache_dtype);
  return p.dim_qk % 8 == 0 && p.dim_v % 8 == 0 && aligned(p.q, 2, 16) && aligned(p.k_cache, cache, 16) &&
         aligned(p.v_cache, cache, 16) && aligned(p.latent_k, 2, 16) && aligned(p.latent_v, 2, 16);
}

// Whether TMA can describe the segment: there is memory, and strides are below 2^40 bytes. (Multiples of 16 bytes they
// are already.)
inline bool decode_fits_hopper(const DecodeParams& p) {
  const auto fits = [](const View& v, size_t size) {
    constexpr int64_t kLimit = int64_t(1) << 40;
    const int64_t bytes = static_cast<int64_t>(size);
    return v.time_stride > 0 && v.batch_stride * bytes < kLimit && v.time_stride * bytes < kLimit &&
           v.head_stride * bytes < kLimit;
  };
  const size_t cache = element_size(p.cache_dtype);
  const bool latents = p.latent_k.data != nullptr && p.num_latents > 0;
  const bool empty = p.capacity <= 0 || (p.block_table != nullptr && p.num_pages == 0);
  return !empty && fits(p.k_cache, cache) && fits(p.v_cache, cache) &&
         (!latents || (fits(p.latent_k, 2) && fits(p.latent_v, 2)));
}

// hopper: the device runs the sm_90a kernels and this build has them.
inline DecodePlan plan_decode(const DecodeParams& p, int sms, bool hopper) {
  DecodePlan plan{};
  const int64_t rows = p.heads_q / p.heads_kv * p.time_q;
  const int64_t dim = std::max(p.dim_qk, p.dim_v);
  plan.tensor_cores = decode_fits_tensor_cores(p);
  plan.head_dim = dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  plan.hopper = hopper && plan.tensor_cores && decode_fits_hopper(p);
  plan.tile_rows = !plan.tensor_cores ? 1 : plan.hopper && rows <= 8 ? 8 : rows <= 16 ? 16 : 64;
  plan.row_tiles = ceil_div(rows, plan.tile_rows);
  const int64_t tile = plan.hopper ? kHopperTileKeys : decode_tile_keys(plan.head_dim);
  const bool narrow = element_size(p.cache_dtype) == 1;
  const int blocks = plan.hopper ? hopper_resident_blocks(plan.head_dim, narrow, plan.tile_rows)
                                 : decode_resident_blocks(plan.head_dim, narrow, plan.tile_rows);
  const int64_t resident = int64_t(blocks) * std::max(sms, 1);
  const int64_t min_tiles = 256 / tile;  // a piece of 256 keys still hides its prologue behind its neighbour's stream
  const int64_t items = p.heads_kv * plan.row_tiles;
  int64_t splits = decode_splits(ceil_div(p.capacity, tile), items, resident, min_tiles);
  // A window bounds the visible keys whatever the length.
  if (p.mask.window_left >= 0) {
    const int64_t visible = p.mask.window_left + p.time_q;
    splits = std::min(splits, decode_splits(ceil_div(visible, tile), items, resident, min_tiles));
  }
  const bool chosen = p.num_splits > 0;
  plan.cache = {false, chosen ? std::min<int64_t>(p.num_splits, 1024) : splits, chosen ? 1 : min_tiles, 0};
  plan.latents = {true, 0, min_tiles, plan.cache.splits};
  if (p.latent_k.data != nullptr && p.num_latents > 0) {
    plan.latents.splits = decode_splits(ceil_div(p.num_latents, tile), items, resident, min_tiles);
  }
  plan.slots = plan.cache.splits + plan.latents.splits;
  return plan;
}

// Launches an instance; decode/instances/*.cu define these, one file per dtype and head dim.
template <typename T, int kHeadDim>
const char* launch_decode(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                          const DecodePartials& partials, const Launch& launch);
// The kernel without tensor cores: any dtype, any alignment, head dims up to 256.
const char* launch_decode_simple(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                                 const DecodePartials& partials, const Launch& launch);

}  // namespace yoco::cuda
