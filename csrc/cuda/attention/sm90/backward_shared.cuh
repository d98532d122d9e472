// Attention backward for Hopper: tile table, shared memory, slots of the ring, what one piece of work is, and the parts
// of a tile that are the same at every head dim. The kernel is in backward.cuh.
#pragma once

#include <type_traits>

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
//   256  64   64    32      128      64   211 KB   S, dV in one warpgroup, dP, dK in the other (backward_wide.cuh); 128
//                                                  keys: dK + dV alone would be all registers of the SM
// kDQ: dQ is made here too. kModified: softcap, alibi or a scale that is not positive.
template <typename T, int D, bool DQ, bool Modified>
struct BackwardConfig {
  using Element = T;
  static constexpr bool kDQ = DQ, kModified = Modified;
  static constexpr int kDim = D;
  static constexpr int kRows = BackwardTiles<D>::kRows;
  static constexpr int kKeys = BackwardTiles<D>::kKeys;
  static constexpr int kStages = 2;
  static constexpr int kWarpgroups = 2;  // consumers
  static constexpr int kConsumers = kWarpgroup * kWarpgroups, kThreads = kWarpgroup + kConsumers;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  static constexpr int kPanels = D / 64;
  static constexpr int kKeyBytes = kKeys * D * 2, kRowBytes = kRows * D * 2, kScoreBytes = kKeys * kRows * 2;
  // The warpgroups share the keys, or at D 256 one has dV and the other dK of all.
  static constexpr bool kWide = D == 256;
  // dQ of a tile is pieces of [16 rows][64 columns], piece (panel, w) for warp w of a warpgroup. D 64: 128 rows, a
  // warpgroup has 64 of them; D 128: one panel of columns; D 256: two.
  static constexpr int kPiece = 16 * 64;  // float32
  static constexpr int kPieces = kRows * D / kPiece;
  static_assert(kPieces == (kWide ? 16 : 8) && kKeys == (kWide ? 64 : 64 * kWarpgroups));
};

// Offsets in shared memory. "Full" and "empty" barriers as usual; consumers arrive once per warp.
template <typename Config>
struct BackwardShared {
  static constexpr int kK = 0;
  static constexpr int kV = kK + Config::kKeyBytes;
  static constexpr int kQ = kV + Config::kKeyBytes;
  static constexpr int kDOut = kQ + Config::kStages * Config::kRowBytes;
  static constexpr int kDS = kDOut + Config::kStages * Config::kRowBytes;          // dS^T [row panel][key][64 rows]
  static constexpr int kDQ = kDS + 2 * Config::kScoreBytes;                        // [warp][kPiece]; unused at D 256
  static constexpr int kLse = kDQ + (Config::kWide ? 0 : 8 * Config::kPiece * 4);  // [stage][row]
  static constexpr int kDelta = kLse + Config::kStages * Config::kRows * 4;
  static constexpr int kSeen = kDelta + Config::kStages * Config::kRows * 4;  // [stage][row] {begin, end} of keys
  // [stage] {dQ tile, rows + flags, work, first key}
  static constexpr int kHeader = kSeen + Config::kStages * Config::kRows * 8;
  // kModified: [row] RowScore, its distance counted from kDiagonal, [stage] int: the key on the diagonal of row 0.
  static constexpr int kBias = kHeader + Config::kStages * 16;
  static constexpr int kDiagonal = kBias + (Config::kModified ? Config::kRows * 8 : 0);
  static constexpr int kFull = kDiagonal + (Config::kModified ? Config::kStages * 4 : 0);
  static constexpr int kEmpty = kFull + 8 * Config::kStages;
  static constexpr int kKeysFull = kEmpty + 8 * Config::kStages;
  static constexpr int kKeysEmpty = kKeysFull + 8;
  static constexpr int kDSFull = kKeysEmpty + 8;
  static constexpr int kDSEmpty = kDSFull + 16;
  static constexpr int kPFull = kDSEmpty + 16;  // only D 256, as the next
  static constexpr int kBadKeys = kPFull + 16;  // [warpgroup][warp][half] lanes
  static constexpr int kBytes = kBadKeys + (Config::kWide ? 64 : 0);
  static_assert(kBytes <= 227 * 1024);
};
// Flags of a slot's header, above the number of rows. A slot without a tile ends a walk over the rows of one sequence.
constexpr int kRowsMask = 0xffff;
constexpr int kFullTile = 1 << 16;  // every row sees every key
constexpr int kEndOfWalk = 2 << 16;
constexpr int kLastWalk = 4 << 16;   // these keys are done
constexpr int kNoMore = 8 << 16;     // so is the CTA
constexpr int kConsumerBarrier = 3;  // named barrier of all consumers; 1 and 2 are turns in backward_q.cuh

YOCO_DEVICE float2 load_shared_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
YOCO_DEVICE void store_shared(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(v) : "memory");
}
YOCO_DEVICE float4 load_shared_float4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
YOCO_DEVICE int load_shared_int(uint32_t address) {
  int v;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(v) : "r"(address) : "memory");
  return v;
}
YOCO_DEVICE void store_shared(uint32_t address, int v) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(v) : "memory");
}
YOCO_DEVICE void store_shared(uint32_t address, const RowScore& v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(v.bias), "f"(v.distance) : "memory");
}
YOCO_DEVICE void store_shared(uint32_t address, int2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
YOCO_DEVICE int2 load_shared_int2(uint32_t address) {
  int2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
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
// global[0..3] += x, float32; the thread does not wait. 16-byte aligned.
YOCO_DEVICE void reduce_add(float* global, float x0, float x1, float x2, float x3) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(global)), "f"(x0),
               "f"(x1), "f"(x2), "f"(x3)
               : "memory");
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

// ---- a consumer's way through the slots
template <typename Config>
struct SlotReader {
  using Shared = BackwardShared<Config>;
  uint32_t shared;
  // Neighbours' rows and keys behind a sequence (TMA writes zeros behind the tensor itself).
  bool loose_rows, loose_keys;
  RingPosition<Config::kStages> at;
  uint32_t slot;  // the slot, and the compiler knows that all lanes agree: descriptors live in uniform registers
  uint32_t keys_parity;

  YOCO_DEVICE SlotReader(const AttentionBackwardParams& p, uint32_t shared)
      : shared(shared),
        loose_rows(p.cu_seqlens_q != nullptr),
        loose_keys(p.cu_seqlens_k != nullptr || p.seqused_k != nullptr),
        slot(0),
        keys_parity(0) {}
  YOCO_DEVICE int4 next_header() {
    slot = uint32_t(uniform(int(at.slot)));
    mbarrier_wait(shared + Shared::kFull + 8 * slot, at.parity);
    const int4 v = load_shared_int4(shared + Shared::kHeader + slot * 16);
    return make_int4(uniform(v.x), uniform(v.y), v.z, v.w);
  }
  YOCO_DEVICE void release_slot() {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared + Shared::kEmpty + 8 * slot);
    at.advance();
  }
  YOCO_DEVICE uint32_t q_tile() const { return shared + Shared::kQ + slot * Config::kRowBytes; }
  YOCO_DEVICE uint32_t do_tile() const { return shared + Shared::kDOut + slot * Config::kRowBytes; }
  // Rows [rows, kRows) of Q and dO become zero if they may be anything.
  YOCO_DEVICE void clear_loose_rows(int rows) const {
    if (!loose_rows || rows >= Config::kRows) return;
    const int consumer = int(threadIdx.x) - kWarpgroup;
    zero_tile_rows<Config::kRows, Config::kPanels, Config::kConsumers>(q_tile(), rows, consumer);
    zero_tile_rows<Config::kRows, Config::kPanels, Config::kConsumers>(do_tile(), rows, consumer);
    fence_async_proxy();
    named_sync(kConsumerBarrier, Config::kConsumers);
  }
  // kModified: the slope of alibi and the token of each row of a tile, for all tiles that see these keys.
  YOCO_DEVICE void put_row_scores(const AttentionBackwardParams& p, const KeyTile& keys) const {
    const int r = int(threadIdx.x) - kWarpgroup, group = int(p.heads_q / p.heads_kv);
    named_sync(kConsumerBarrier, Config::kConsumers);  // nobody needs the last ones
    if (r < Config::kRows) {
      const bool biased = !keys.latents && r < Config::kRows / group * group;
      store_shared(
          shared + Shared::kBias + r * 8,
          RowScore{biased ? alibi_log2(p, keys.sequence, keys.head * group + r % group) : 0.f, float(r / group)});
    }
    named_sync(kConsumerBarrier, Config::kConsumers);
  }
  // The key on the diagonal of this slot's first row.
  YOCO_DEVICE int diagonal() const { return load_shared_int(shared + Shared::kDiagonal + slot * 4); }
  // All walks over rows that the piece of work `index` has, keys from `first` on: step(header, first tile of a walk?)
  // per tile, last() behind the last tile of a walk.
  template <typename Step, typename Last>
  YOCO_DEVICE void walk(const AttentionBackwardParams& p, const BackwardPlan& plan, int index, int first, int4 header,
                        Step step, Last last) {
    if constexpr (Config::kModified) put_row_scores(p, key_tile(p, plan, Config::kKeys, index));
    for (;;) {
      if ((header.y & kEndOfWalk) == 0) {
        mbarrier_wait(shared + Shared::kKeysFull, keys_parity);
        keys_parity ^= 1;
        const int keys = key_tile(p, plan, Config::kKeys, index).num_keys - first;  // that take part
        if (loose_keys && keys < Config::kKeys) {
          zero_tile_rows<Config::kKeys, 2 * Config::kPanels, Config::kConsumers>(shared + Shared::kK, keys,
                                                                                 int(threadIdx.x) - kWarpgroup);
          fence_async_proxy();
          named_sync(kConsumerBarrier, Config::kConsumers);
        }
        step(header, std::true_type());
#pragma unroll 1
        for (header = next_header(); (header.y & kEndOfWalk) == 0; header = next_header()) {
          step(header, std::false_type());
        }
        last();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(shared + Shared::kKeysEmpty);
      }
      const bool last_walk = (header.y & kLastWalk) != 0;
      release_slot();
      if (last_walk) break;
      header = next_header();
    }
  }
};

// ---- parts of a tile
// d = keys x rows of K Q^T or V dO^T: 64 keys from key_tile on, all rows. Committed.
template <typename Config>
YOCO_DEVICE void issue_scores(float (&d)[Config::kRows / 2], uint32_t key_tile, uint32_t row_tile) {
  const uint64_t a = descriptor_k(key_tile), b = descriptor_k(row_tile);
#pragma unroll
  for (int k = 0; k < Config::kDim / 16; ++k) {
    wgmma<typename Config::Element, Major::K, Major::K>(
        d, a + descriptor_step(k / 4 * (Config::kKeys * 128) + k % 4 * 32),
        b + descriptor_step(k / 4 * (Config::kRows * 128) + k % 4 * 32), k > 0);
  }
  wgmma_commit();
}
// Zero where a row (columns of d) does not see the key; this thread has `key` and key + 8.
template <typename Config>
YOCO_DEVICE void mask_scores(float (&d)[Config::kRows / 2], uint32_t shared, uint32_t slot, int key) {
  const uint32_t seen_at = shared + BackwardShared<Config>::kSeen + slot * (Config::kRows * 8) + threadIdx.x % 4 * 16;
#pragma unroll
  for (int i = 0; i < Config::kRows / 8; ++i) {
    const int4 seen = load_shared_int4(seen_at + i * 64);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      d[4 * i + 2 * h] = sees(make_int2(seen.x, seen.y), key + 8 * h) ? d[4 * i + 2 * h] : 0.f;
      d[4 * i + 2 * h + 1] = sees(make_int2(seen.z, seen.w), key + 8 * h) ? d[4 * i + 2 * h + 1] : 0.f;
    }
  }
}
// Scores -> P. table: lse of the slot's rows.
template <int N>
YOCO_DEVICE void exponentiate(float (&s)[N], uint32_t table, float multiplier) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const float2 lse = load_shared_float2(table + threadIdx.x % 4 * 8 + i * 32);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[4 * i + j] = exp2_approx(fmaf(s[4 * i + j], multiplier, -(j % 2 == 0 ? lse.x : lse.y)));
    }
  }
}
// kModified: scores of the keys `key` and key + 8 behind the diagonal -> operand P of dV, and `weights`, which stand
// for P in dS: times the derivative of the softcap. Both rounded at once, there are no registers for P in two
// precisions; not masked.
template <typename Config, bool kSoftcap>
YOCO_DEVICE void exponentiate_modified(const ScoreParams& score, const float (&s)[Config::kRows / 2],
                                       uint32_t (&operand)[Config::kRows / 16][4],
                                       uint32_t (&weights)[Config::kRows / 16][4], uint32_t shared, uint32_t slot,
                                       int key) {
  using Shared = BackwardShared<Config>;
  using T = typename Config::Element;
  const uint32_t lse_at = shared + Shared::kLse + slot * (Config::kRows * 4) + threadIdx.x % 4 * 8;
  const uint32_t bias_at = shared + Shared::kBias + threadIdx.x % 4 * 16;
#pragma unroll
  for (int i = 0; i < Config::kRows / 8; ++i) {
    const float2 lse = load_shared_float2(lse_at + i * 32);
    const float4 rows = load_shared_float4(bias_at + i * 64);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float p[2], w[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float x = s[4 * i + 2 * h + c];
        const CappedScore capped = kSoftcap ? softcap(score, x) : CappedScore{x * score.scale_log2, 1.f};
        const RowScore row = c == 0 ? RowScore{rows.x, rows.y} : RowScore{rows.z, rows.w};
        p[c] = biased_probability(row, key + 8 * h, capped.score, c == 0 ? lse.x : lse.y);
        w[c] = p[c] * capped.slope;
      }
      operand[i / 2][i % 2 * 2 + h] = pack2<T>(p[0], p[1]);
      weights[i / 2][i % 2 * 2 + h] = pack2<T>(w[0], w[1]);
    }
  }
}
template <typename Config>
YOCO_DEVICE void exponentiate_modified(const ScoreParams& score, const float (&s)[Config::kRows / 2],
                                       uint32_t (&operand)[Config::kRows / 16][4],
                                       uint32_t (&weights)[Config::kRows / 16][4], uint32_t shared, uint32_t slot,
                                       int key) {
  if (score.cap_out > 0.f) {
    exponentiate_modified<Config, true>(score, s, operand, weights, shared, slot, key);
  } else {
    exponentiate_modified<Config, false>(score, s, operand, weights, shared, slot, key);
  }
}
// mask_scores of rounded ones.
template <typename Config>
YOCO_DEVICE void mask_operand(uint32_t (&d)[Config::kRows / 16][4], uint32_t shared, uint32_t slot, int key) {
  const uint32_t seen_at = shared + BackwardShared<Config>::kSeen + slot * (Config::kRows * 8) + threadIdx.x % 4 * 16;
#pragma unroll
  for (int i = 0; i < Config::kRows / 8; ++i) {
    const int4 seen = load_shared_int4(seen_at + i * 64);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      d[i / 2][i % 2 * 2 + h] &= (sees(make_int2(seen.x, seen.y), key + 8 * h) ? 0xffffu : 0u) |
                                 (sees(make_int2(seen.z, seen.w), key + 8 * h) ? 0xffff0000u : 0u);
    }
  }
}
// Element i of an operand, in the order of the accumulators that were rounded to it.
template <typename T, int N>
YOCO_DEVICE float operand_element(const uint32_t (&a)[N][4], int i) {
  return to_float(reinterpret_cast<const T(&)[2]>(a[i / 8][i % 8 / 2])[i % 2]);
}
// dP -> dS. table: delta of the slot's rows; probability(i): P of element i.
template <int N, typename Probability>
YOCO_DEVICE void score_gradients(float (&dp)[N], uint32_t table, Probability probability) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const float2 delta = load_shared_float2(table + threadIdx.x % 4 * 8 + i * 32);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      dp[4 * i + j] = probability(4 * i + j) * (dp[4 * i + j] - (j % 2 == 0 ? delta.x : delta.y));
    }
  }
}

// dS^T of a tile, rounded, in one of two buffers; from there dQ = dS K, one tile late: of a tile that both warpgroups
// have left behind them.
template <typename Config>
struct LateDQ {
  using Shared = BackwardShared<Config>;
  uint32_t shared;
  uint32_t lane_at;  // this lane's row of an 8 x 8 matrix of dS^T, for stmatrix
  RingPosition<2> at;

  // warp_key: the warp's first key in the tile.
  YOCO_DEVICE LateDQ(uint32_t shared, int warp_key) : shared(shared) {
    const int lane = int(threadIdx.x % 32), key = warp_key + lane % 16;
    lane_at = key * 128 + (((lane / 16) ^ (key & 7)) << 4);
  }
  YOCO_DEVICE uint32_t tile() const { return shared + Shared::kDS + at.slot * Config::kScoreBytes; }
  YOCO_DEVICE void wait_empty() const { mbarrier_wait(shared + Shared::kDSEmpty + 8 * at.slot, at.parity ^ 1); }
  // The 16 keys of this warp.
  YOCO_DEVICE void put(const uint32_t (&ds)[Config::kRows / 16][4]) const {
#pragma unroll
    for (int k = 0; k < Config::kRows / 16; ++k) {
      stmatrix_x4(tile() + k / 4 * (Config::kKeys * 128) + (lane_at ^ (k % 4 * 32)), ds[k]);
    }
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared + Shared::kDSFull + 8 * at.slot);
  }
  // dq = dS K of the tile before this one: 64 rows and 2 N columns, from these panels on. Committed.
  template <int N>
  YOCO_DEVICE void issue(float (&dq)[N], int row_panel, int column_panel) const {
    constexpr int kPanelBytes = Config::kKeys * 128;
    const uint32_t slot = at.slot ^ 1, parity = at.slot == 0 ? at.parity ^ 1 : at.parity;
    mbarrier_wait(shared + Shared::kDSFull + 8 * slot, parity);
    const uint32_t ds = shared + Shared::kDS + slot * Config::kScoreBytes;
    const uint64_t a = descriptor_mn(ds + row_panel * kPanelBytes, kPanelBytes);
    const uint64_t b = descriptor_mn(shared + Shared::kK + column_panel * kPanelBytes, kPanelBytes);
    pin_registers(dq);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Config::kKeys / 16; ++k) {
      wgmma<typename Config::Element, Major::MN, Major::MN>(dq, a + descriptor_step(k * 2048),
                                                            b + descriptor_step(k * 2048), k > 0);
    }
    wgmma_commit();
  }
  // Waits for it; its dS may be overwritten.
  template <int N>
  YOCO_DEVICE void wait(float (&dq)[N]) const {
    wgmma_wait<0>();
    pin_registers(dq);
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared + Shared::kDSEmpty + 8 * (at.slot ^ 1));
  }
};

// ---- epilogue
// Row g + 8 h of the warp's accumulators: NaN if it holds a NaN or infinity, else 0. out: it becomes zero instead (a
// key that no row may see).
template <int N>
YOCO_DEVICE float check_row(float (&d)[N], int h, bool out) {
  float check = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i / 2 % 2 != h) continue;
    d[i] = out ? 0.f : d[i];
    check = fmaf(d[i], 0.f, check);
  }
  return check;
}
// Accumulators of the warp's keys (rows g and g + 8), dV or dK, to memory; lanes of a quad hold one key's columns.
template <typename T, int N>
YOCO_DEVICE void store_keys(const AttentionBackwardParams& p, const BackwardPlan& plan, const KeyTile& keys,
                            bool values, const float (&d)[N], int key0, const bool (&skip)[2]) {
  const RowMap own = make_row_map(p, keys.sequence, keys.head);
  const GradientRows to = gradient_rows<T>(p, plan, own, keys.latents, values);
  const float factor = values ? 1.f : plan.scale;
  const int lane = int(threadIdx.x % 32), dim = int(values ? p.dim_v : p.dim_qk);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = key0 + lane / 4 + 8 * h;
    const bool valid = key < keys.store_keys && !skip[h];
    if (!to.float32) {
      store_row<T>(static_cast<T*>(to.data) + (valid ? key * to.stride : 0), d, h, factor, dim, valid, to.aligned);
      continue;
    }
    if (!valid) continue;
    float* const row = static_cast<float*>(to.data) + key * to.stride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      if (i * 8 + lane % 4 * 2 >= dim) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float x = d[i * 4 + h * 2 + c] * factor;
        row[i * 8 + c] = to.accumulate ? row[i * 8 + c] + x : x;
      }
    }
  }
}
// Calls redo(r) for each row r of the warp's 16 that holds a NaN or infinity: bad[h] are the lanes whose part of row
// g + 8 h does.
template <typename Redo>
YOCO_DEVICE void redo_bad_rows(const unsigned (&bad)[2], Redo redo) {
  if ((bad[0] | bad[1]) == 0) return;
  __syncwarp();  // what other lanes have stored of these rows comes first
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    for (unsigned todo = h == 0 ? bad[0] : bad[1]; todo != 0;) {
      const int r = (__ffs(int(todo)) - 1) / 4;
      todo &= ~(0xfu << (r * 4));
      redo(8 * h + r);
    }
  }
}
template <typename T>
YOCO_DEVICE void redo_bad_keys(const AttentionBackwardParams& p, const BackwardPlan& plan, const KeyTile& keys,
                               int key0, const bool (&bad)[2]) {
  const unsigned lanes[2] = {__ballot_sync(0xffffffffu, bad[0]), __ballot_sync(0xffffffffu, bad[1])};
  redo_bad_rows(lanes, [&](int r) {
    key_gradients<T>(p, plan, keys.sequence, keys.sequence_step, keys.head, keys.latents, key0 + r);
  });
}

}  // namespace yoco::cuda::sm90
