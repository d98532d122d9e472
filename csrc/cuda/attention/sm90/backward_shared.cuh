// Attention backward for Hopper: tile table, shared memory, slots of the ring, and what one piece of work is. The
// kernel is in backward.cuh.
#pragma once

#include "cuda/attention/simt_backward.h"
#include "cuda/attention/sm90/backward_plan.h"
#include "cuda/attention/sm90/tile.cuh"

namespace yoco::cuda::sm90 {

// Tile table. 2 consumer warpgroups of 240 registers, producer 24, one CTA per SM. Registers of a consumer thread:
// S + dP, then P + dS (half as many); dK + dV; dQ (when S and dP are gone). Shared memory: K, V; two stages of Q, dO;
// two of dS; 32 KB of dQ.
//   D    rows keys  S + dP  dK + dV  dQ   shared
//   64   128  128   128     64       32   197 KB   64 rows would read each byte of K and V twice as often
//   128  64   128   64      128      32   195 KB   80 rows: S + dP 80, 240 registers do not hold it with a row's mask
// kDQ: dQ is made here too.
template <typename T, int D, bool DQ>
struct BackwardConfig {
  using Element = T;
  static constexpr bool kDQ = DQ;
  static constexpr int kDim = D;
  static constexpr int kRows = BackwardTiles<D>::kRows;
  static constexpr int kKeys = BackwardTiles<D>::kKeys;
  static constexpr int kStages = 2;
  static constexpr int kWarpgroups = 2;  // consumers
  static constexpr int kThreads = kWarpgroup * (1 + kWarpgroups);
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  static constexpr int kPanels = D / 64;
  static constexpr int kKeyBytes = kKeys * D * 2, kRowBytes = kRows * D * 2, kScoreBytes = kKeys * kRows * 2;
  // dQ of a tile is 8 pieces of [16 rows][64 columns], one per consumer warp: rows 16 (warp % 4) .. of 64 rows or, at
  // D 128, of 64 columns that the warpgroup owns.
  static constexpr int kPiece = 16 * 64;  // float32
  static_assert(kRows * D == 8 * kPiece && kKeys == 64 * kWarpgroups);
};

// Offsets in shared memory. "Full" and "empty" barriers as usual; consumers arrive once per warp.
template <typename Config>
struct BackwardShared {
  static constexpr int kK = 0;
  static constexpr int kV = kK + Config::kKeyBytes;
  static constexpr int kQ = kV + Config::kKeyBytes;
  static constexpr int kDOut = kQ + Config::kStages * Config::kRowBytes;
  static constexpr int kDS = kDOut + Config::kStages * Config::kRowBytes;  // dS^T [row panel][key][64 rows]
  static constexpr int kDQ = kDS + 2 * Config::kScoreBytes;                // [warp][kPiece]
  static constexpr int kLse = kDQ + 8 * Config::kPiece * 4;                // [stage][row]
  static constexpr int kDelta = kLse + Config::kStages * Config::kRows * 4;
  static constexpr int kSeen = kDelta + Config::kStages * Config::kRows * 4;  // [stage][row] {begin, end} of keys
  static constexpr int kHeader =
      kSeen + Config::kStages * Config::kRows * 8;  // [stage] {dQ tile, rows + flags, work, first key}
  static constexpr int kFull = kHeader + Config::kStages * 16;
  static constexpr int kEmpty = kFull + 8 * Config::kStages;
  static constexpr int kKeysFull = kEmpty + 8 * Config::kStages;
  static constexpr int kKeysEmpty = kKeysFull + 8;
  static constexpr int kDSFull = kKeysEmpty + 8;
  static constexpr int kDSEmpty = kDSFull + 16;
  static constexpr int kBytes = kDSEmpty + 16;
  static_assert(kBytes <= 227 * 1024);
};
// Flags of a slot's header, above the number of rows. A slot without a tile ends a walk over the rows of one sequence.
constexpr int kRowsMask = 0xffff;
constexpr int kFullTile = 1 << 16;  // every row sees every key
constexpr int kEndOfWalk = 2 << 16;
constexpr int kLastWalk = 4 << 16;   // these keys are done
constexpr int kNoMore = 8 << 16;     // so is the CTA
constexpr int kConsumerBarrier = 1;  // named barrier of all consumers

YOCO_DEVICE float2 load_shared_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
YOCO_DEVICE void store_shared(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(v) : "memory");
}
YOCO_DEVICE void store_shared(uint32_t address, int2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
YOCO_DEVICE int4 load_shared_int4(uint32_t address) {
  int4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
YOCO_DEVICE void store_shared(uint32_t address, int4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
YOCO_DEVICE void store_shared(uint32_t address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
YOCO_DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Rows [begin, end) of every panel of a tile become zero; thread i of `threads`.
template <int kPanels>
YOCO_DEVICE void zero_tile_rows(uint32_t tile, int panel_bytes, int begin, int end, int i, int threads) {
  for (int chunk = begin * 8 + i; chunk < end * 8; chunk += threads) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      store_shared(tile + panel * panel_bytes + chunk * 16, make_int4(0, 0, 0, 0));
    }
  }
}

// One piece of work: keys from `first` on of one KV head.
struct KeyTile {
  bool latents;
  int sequence, head, sequence_step;
  int first, step;  // first key; the next one if max_seqlen_k understated a sequence
  int num_keys;     // that take part
  int store_keys;   // whose gradients are ours
};
YOCO_DEVICE KeyTile key_tile(const AttentionBackwardParams& p, const BackwardPlan& plan, int kKeys, int index) {
  const WorkTile work = plan.schedule.decode(index);
  KeyTile k;
  k.latents = work.tile >= plan.main_tiles;
  k.sequence = work.sequence;
  k.head = work.head;
  k.sequence_step = k.latents ? plan.latent_slices : int(p.num_sequences);
  const RowMap own = make_row_map(p, work.sequence, work.head);
  k.first = (k.latents ? work.tile - plan.main_tiles : work.tile) * kKeys;
  k.step = (k.latents ? plan.latent_tiles : plan.main_tiles) * kKeys;
  k.num_keys = k.latents ? int(p.num_latents) : int(own.sequence.len_k);
  k.store_keys = k.latents ? int(p.num_latents) : keys_to_store(p, own);
  if (k.latents ? !plan.want_latents || work.sequence >= plan.latent_slices : !plan.want_dkv) k.store_keys = 0;
  return k;
}

}  // namespace yoco::cuda::sm90
