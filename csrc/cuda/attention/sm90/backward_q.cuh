// dQ by row tiles for Hopper (sm_90a): nothing is added in memory, so it is bitwise repeatable (deterministic=True),
// and it is all there is to do when only dQ is wanted.
//
// As in forward.cuh a CTA owns kRows rows (token x query head) of one KV head and walks over the blocks of keys they
// see; a producer warp moves everything by TMA, two consumer warpgroups own 64 rows each. Per block
//   S = Q K^T, dP = dO V^T           WGMMA, operands from shared memory
//   P = exp2(S - lse), dS = P * (dP - delta)        float32, in registers
//   dQ += dS K                       WGMMA, dS rounded to T from registers, K as it lies (keys x columns)
// S and dP of block n + 1 and dQ of block n are in flight together; the arithmetic of block n + 1 runs while dQ of
// block n does, and the warpgroups take turns in issuing products.
#pragma once

#include <algorithm>

#include "cuda/attention/sm90/backward_shared.cuh"

namespace yoco::cuda::sm90 {

// Tile table. 128 rows; 2 consumers x 240 registers, producer 24. Shared memory: Q, dO, the slots of K and V. K is used
// twice, a block apart: a third slot lets the next one arrive meanwhile.
//   D    keys  slots K + V  shared   registers
//   64   128   3 + 2        114 KB   dQ 32, S + dP 128, dS 32
//   128  64    3 + 2        146 KB   dQ 64, S + dP 64, dS 16
//   256  48    2 + 2        226 KB   dQ 128, S + dP 48, dS 12; 64 keys do not fit
// kModified: softcap, alibi or a scale that is not positive.
template <typename T, int D, bool Modified>
struct BackwardQConfig {
  using Element = T;
  static constexpr bool kModified = Modified;
  static constexpr int kDim = D, kPanels = D / 64;
  static constexpr int kRows = kBackwardQRows, kKeys = D == 64 ? 128 : D == 128 ? 64 : 48;
  static constexpr int kConsumers = 2 * kWarpgroup, kThreads = kWarpgroup + kConsumers;
  static constexpr int kStagesK = D == 256 ? 2 : 3, kStagesV = 2;
  static constexpr int kRowBytes = kRows * D * 2, kSlotBytes = kKeys * D * 2;

  // Offsets in shared memory. Barriers: "full" counts TMA bytes, "empty" one arrival per consumer warp.
  static constexpr int kQ = 0, kDo = kRowBytes, kK = 2 * kRowBytes, kV = kK + kStagesK * kSlotBytes;
  static constexpr int kRowKeys = kV + kStagesV * kSlotBytes;  // int2 per row: keys, then latents it sees
  static constexpr int kTile = kRowKeys + 2 * kRows * int(sizeof(int2));
  static constexpr int kKFull = kTile + int(sizeof(Tile)), kKEmpty = kKFull + 8 * kStagesK;
  static constexpr int kVFull = kKEmpty + 8 * kStagesK, kVEmpty = kVFull + 8 * kStagesV;
  static constexpr int kQFull = kVEmpty + 8 * kStagesV, kTileFull = kQFull + 8, kTileEmpty = kTileFull + 8;
  static constexpr int kSharedBytes = kTileEmpty + 8;
  static_assert(kSharedBytes <= 227 * 1024);
};
constexpr int kTurnBarrier = 1;  // named barriers: 1 + w is the turn of warpgroup w

// The producer warp. Its CTA has one tile, or several if max_seqlen_q understated a sequence or the plan's tiles are
// larger than these: Q and dO then have one slot, freed with the tile.
template <typename Config>
YOCO_DEVICE void produce(const AttentionBackwardParams& p, const BackwardPlan& plan, const BackwardMaps& maps,
                         uint32_t shared) {
  constexpr int kKeys = Config::kKeys, kRows = Config::kRows, kPanels = Config::kPanels;
  const bool leader = threadIdx.x % 32 == 0;
  const WorkTile work = plan.row_schedule.decode(int(blockIdx.x));
  const RowMap map = make_row_map(p, work.sequence, work.head);
  const int tile_rows = kRows / map.group * map.group;
  RingPosition<Config::kStagesK> at_k;
  RingPosition<Config::kStagesV> at_v;
  uint32_t tile_parity = 0;
  const auto publish = [&](const Tile& tile) {
    mbarrier_wait(shared + Config::kTileEmpty, tile_parity ^ 1);
    tile_parity ^= 1;
    if (leader) {
      put_tile(shared + Config::kTile, tile);
      mbarrier_arrive(shared + Config::kTileFull);
    }
  };
#pragma unroll 1
  for (int first_row = work.tile * tile_rows; first_row < map.rows; first_row += plan.row_schedule.tiles * tile_rows) {
    const Tile tile = make_tile<kKeys>(p, map, int(blockIdx.x), first_row, min(tile_rows, map.rows - first_row), 0, 1);
    publish(tile);
    if (tile.begin >= tile.end) continue;
    const int batch = int(map.sequence.batch), k_begin = int(map.sequence.k_begin);
    if (leader) {
      // Rows behind the sequence belong to its neighbour or are zero; nobody stores what comes of them.
      mbarrier_arrive_expect(shared + Config::kQFull, 2 * kPanels * tile_rows * 128);
      const int token = int(map.sequence.q_begin) + first_row / map.group;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const int offset = panel * kRows * 128;
        tma_load(shared + Config::kQ + offset, maps.q, shared + Config::kQFull, panel * 64, 0, token, map.head_kv,
                 batch);
        tma_load(shared + Config::kDo + offset, maps.d_out, shared + Config::kQFull, panel * 64, 0, token, map.head_kv,
                 batch);
      }
    }
    const auto load = [&](const CUtensorMap& main, const CUtensorMap& latent, int n, uint32_t slot, uint32_t barrier) {
      if (!leader) return;
      mbarrier_arrive_expect(barrier, Config::kSlotBytes);
      const bool in_main = n < tile.num_main;
      const CUtensorMap& from = in_main ? main : latent;
      const int key = tile.first_key<kKeys>(n) + (in_main ? k_begin : 0);
      const int b = in_main || !p.latents_shared ? batch : 0;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        tma_load(slot + panel * kKeys * 128, from, barrier, panel * 64, key, map.head_kv, b);
      }
    };
#pragma unroll 1
    for (int n = tile.begin; n < tile.end; ++n) {
      mbarrier_wait(shared + Config::kKEmpty + 8 * at_k.slot, at_k.parity ^ 1);
      load(maps.k, maps.latent_k, n, shared + Config::kK + at_k.slot * Config::kSlotBytes,
           shared + Config::kKFull + 8 * at_k.slot);
      at_k.advance();
      mbarrier_wait(shared + Config::kVEmpty + 8 * at_v.slot, at_v.parity ^ 1);
      load(maps.v, maps.latent_v, n, shared + Config::kV + at_v.slot * Config::kSlotBytes,
           shared + Config::kVFull + 8 * at_v.slot);
      at_v.advance();
    }
  }
  Tile last{};
  last.index = Tile::kNoMore;
  publish(last);
}

// kModified. s: raw scores, dp: dP -> dS; rows: the two rows of this thread, at its first column.
template <bool kSoftcap, int N>
YOCO_DEVICE void modified_gradients(const ScoreParams& score, const RowScore (&rows)[2], const float2 (&stat)[2],
                                    const float (&s)[N], float (&dp)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int h = i / 2 % 2;
    const CappedScore capped = kSoftcap ? softcap(score, s[i]) : CappedScore{s[i] * score.scale_log2, 1.f};
    const float p = biased_probability(rows[h], i / 4 * 8 + i % 2, capped.score, stat[h].x);
    dp[i] = p * (dp[i] - stat[h].y) * capped.slope;
  }
}

// A consumer warpgroup: rows 64 w .. 64 w + 63 of every tile.
template <typename Config>
YOCO_DEVICE void consume(const AttentionBackwardParams& p, const BackwardPlan& plan, uint32_t shared) {
  using T = typename Config::Element;
  constexpr int kKeys = Config::kKeys, kRows = Config::kRows, kDim = Config::kDim, kS = kKeys / 2, kO = kDim / 2;
  const int warpgroup = uniform(int(threadIdx.x) / kWarpgroup) - 1, lane = int(threadIdx.x % 32);
  const int tile_row = int(threadIdx.x - kWarpgroup) / 32 * 16 + lane / 4;  // and + 8
  const uint32_t q_tile = shared + Config::kQ + warpgroup * 64 * 128, do_tile = q_tile + Config::kRowBytes;
  const uint32_t row_keys_at = shared + Config::kRowKeys + tile_row * int(sizeof(int2));
  RingPosition<Config::kStagesK> at_k, at_k_again;  // S, and dQ one block behind
  RingPosition<Config::kStagesV> at_v;
  uint32_t tile_parity = 0, q_parity = 0;
  if (warpgroup == 0) named_arrive(kTurnBarrier, 2 * kWarpgroup);

  for (;;) {
    mbarrier_wait(shared + Config::kTileFull, tile_parity);
    tile_parity ^= 1;
    const Tile tile = get_tile(shared + Config::kTile);
    if (tile.index == Tile::kNoMore) return;
    const auto row_map = [&] {
      const WorkTile work = plan.row_schedule.decode(opaque(tile.index));
      return make_row_map(p, work.sequence, work.head);
    };
    float dq[kO];
#pragma unroll
    for (int i = 0; i < kO; ++i) dq[i] = 0.f;

    if (tile.begin < tile.end) {
      float2 stat[2];  // lse in log2 units, delta
      RowScore row_score[2] = {};
      {
        const RowMap map = row_map();
        const float2* stats = plan.stats + first_stat(p, map) + tile.first_row;
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = tile_row + 8 * h;
          stat[h] = row < tile.rows ? stats[row] : make_float2(-YOCO_NEG_INF, 0.f);
          if constexpr (Config::kModified) {
            if (row < tile.rows) row_score[h] = make_row_score(p, map, tile.first_row + row, lane % 4 * 2, false);
          }
        }
#pragma unroll 1
        for (int latents = 0; latents < (p.num_latents > 0 ? 2 : 1); ++latents) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = tile_row + 8 * h;
            const int2 keys = row < tile.rows ? row_keys(p, map, tile.first_row + row, latents != 0) : make_int2(0, 0);
            if (lane % 4 != 0) continue;
            store_shared(row_keys_at + 8 * (latents * kRows + 8 * h), keys);
          }
        }
        __syncwarp();
      }

      float s[kS], dp[kS];
      uint32_t ds[kS / 8][4];
      // Block n: K has arrived; keys behind the sequence become zero in it, as dS = 0 times NaN would be NaN. Both
      // warpgroups share the work; nobody holds the turn meanwhile.
      const auto wait_k = [&](int n) {
        mbarrier_wait(shared + Config::kKFull + 8 * at_k.slot, at_k.parity);
        if (n != tile.num_main - 1 || tile.keep >= kKeys) return;
        zero_tile_rows<kKeys, Config::kPanels, Config::kConsumers>(shared + Config::kK + at_k.slot * Config::kSlotBytes,
                                                                   tile.keep, int(threadIdx.x) - kWarpgroup);
        fence_async_proxy();
        named_sync(kConsumerBarrier, Config::kConsumers);
      };
      const auto issue_scores = [&] {
        pin_registers(s);
        pin_registers(dp);
        wgmma_fence();
        const uint64_t q = descriptor_k(q_tile),
                       k_slot = descriptor_k(shared + Config::kK + at_k.slot * Config::kSlotBytes);
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          wgmma<T, Major::K, Major::K>(s, q + descriptor_step(k / 4 * (kRows * 128) + k % 4 * 32),
                                       k_slot + descriptor_step(k / 4 * (kKeys * 128) + k % 4 * 32), k > 0);
        }
        mbarrier_wait(shared + Config::kVFull + 8 * at_v.slot, at_v.parity);
        wgmma_fence();
        const uint64_t d_out = descriptor_k(do_tile),
                       v_slot = descriptor_k(shared + Config::kV + at_v.slot * Config::kSlotBytes);
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          wgmma<T, Major::K, Major::K>(dp, d_out + descriptor_step(k / 4 * (kRows * 128) + k % 4 * 32),
                                       v_slot + descriptor_step(k / 4 * (kKeys * 128) + k % 4 * 32), k > 0);
        }
        wgmma_commit();
        at_k.advance();
      };
      const auto release_v = [&] {
        if (lane == 0) mbarrier_arrive(shared + Config::kVEmpty + 8 * at_v.slot);
        at_v.advance();
      };
      const auto issue_dq = [&] {
        const uint64_t b = descriptor_mn(shared + Config::kK + at_k_again.slot * Config::kSlotBytes, kKeys * 128);
        pin_registers(dq);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
          wgmma<T, Major::MN>(dq, ds[k], b + descriptor_step(k * 2048), true);
        }
        wgmma_commit();
      };
      const auto finish_dq = [&] {
        wgmma_wait<0>();
        pin_registers(dq);
        if (lane == 0) mbarrier_arrive(shared + Config::kKEmpty + 8 * at_k_again.slot);
        at_k_again.advance();
      };
      // dS of block n, in dp.
      const auto scores_to_ds = [&](int n) {
        const int first = tile.first_key<kKeys>(n);
        if constexpr (Config::kModified) {
          RowScore rows[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            rows[h] = RowScore{n < tile.num_main ? row_score[h].bias : 0.f, row_score[h].distance - float(first)};
          }
          if (plan.score.cap_out > 0.f) {
            modified_gradients<true>(plan.score, rows, stat, s, dp);
          } else {
            modified_gradients<false>(plan.score, rows, stat, s, dp);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kS; ++i) score_gradient<false>(plan.score, RowScore{}, 0, stat[i / 2 % 2], s[i], dp[i]);
        }
        if (tile.full<kKeys>(n, first)) return;
        int2 keys[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          keys[h] = load_shared_int2(row_keys_at + 8 * ((n < tile.num_main ? 0 : kRows) + 8 * h));
          keys[h].x -= first + lane % 4 * 2;
          keys[h].y -= first + lane % 4 * 2;
        }
#pragma unroll
        for (int i = 0; i < kS; ++i) dp[i] = sees(keys[i / 2 % 2], i / 4 * 8 + i % 2) ? dp[i] : 0.f;
      };

      mbarrier_wait(shared + Config::kQFull, q_parity);
      q_parity ^= 1;
      wait_k(tile.begin);
      issue_scores();
      wgmma_wait<0>();
      pin_registers(s);
      pin_registers(dp);
      release_v();
      scores_to_ds(tile.begin);
      pack_operand<T>(ds, dp);
#pragma unroll 1
      for (int n = tile.begin + 1; n < tile.end; ++n) {
        wait_k(n);
        named_sync(kTurnBarrier + warpgroup, 2 * kWarpgroup);
        issue_scores();
        issue_dq();
        named_arrive(kTurnBarrier + (warpgroup ^ 1), 2 * kWarpgroup);
        wgmma_wait<1>();
        pin_registers(s);
        pin_registers(dp);
        release_v();
        scores_to_ds(n);
        finish_dq();
        pack_operand<T>(ds, dp);
      }
      issue_dq();
      finish_dq();
    }

    // ---- epilogue: scaled, rounded, stored; rows with NaN or infinity again, key by key
    const RowMap map = row_map();
    unsigned bad[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = tile_row + 8 * h;
      const bool valid = row < tile.rows;
      bad[h] = __ballot_sync(0xffffffffu, check_row(dq, h, false) != 0.f && valid);
      T* const to = static_cast<T*>(p.dq.data) + (valid ? map.offset(p.dq, tile.first_row + row) : 0);
      store_row<T>(to, dq, h, plan.scale, int(p.dim_qk), valid, plan.aligned_dq);
    }
    const int warp_row = tile.first_row + tile_row - lane / 4;
    redo_bad_rows(bad, [&](int r) { query_gradient<T>(p, plan, map.sequence_index, map.head_kv, warp_row + r); });
    if (lane == 0) mbarrier_arrive(shared + Config::kTileEmpty);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_backward_q_kernel(const __grid_constant__ AttentionBackwardParams p,
                                const __grid_constant__ BackwardPlan plan, const __grid_constant__ BackwardMaps maps) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const uint32_t shared = shared_address(shared_memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = Config::kConsumers / 32;
    for (int i = 0; i < Config::kStagesK; ++i) {
      mbarrier_init(shared + Config::kKFull + 8 * i, 1);
      mbarrier_init(shared + Config::kKEmpty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < Config::kStagesV; ++i) {
      mbarrier_init(shared + Config::kVFull + 8 * i, 1);
      mbarrier_init(shared + Config::kVEmpty + 8 * i, kConsumerWarps);
    }
    mbarrier_init(shared + Config::kQFull, 1);
    mbarrier_init(shared + Config::kTileFull, 1);
    mbarrier_init(shared + Config::kTileEmpty, kConsumerWarps);
    mbarrier_init_fence();
  }
  zero_query_tail<typename Config::Element>(p);
  if (p.num_sequences == 0) return;
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<24>();
    if (threadIdx.x < 32) produce<Config>(p, plan, maps, shared);
  } else {
    take_registers<240>();
    consume<Config>(p, plan, shared);
  }
}

template <typename T, int D>
const char* launch_attention_backward_q(const AttentionBackwardParams& p, const BackwardPlan& plan,
                                        const Launch& launch) {
  using Config = BackwardQConfig<T, D, false>;
  if (const char* message = set_device(launch)) return message;
  BackwardMaps maps{};
  const char* m = make_backward_maps(maps, p, Config::kRows, Config::kKeys);
  if (m) return m;
  const auto kernel =
      plan.score.plain ? attention_backward_q_kernel<Config> : attention_backward_q_kernel<BackwardQConfig<T, D, true>>;
  // As many CTAs as the plan has row tiles, whatever their size: the kernel strides over them.
  return launch_kernel(kernel, unsigned(std::max<int64_t>(plan.row_schedule.count(), 1)), Config::kThreads,
                       Config::kSharedBytes, launch, p, plan, maps);
}

}  // namespace yoco::cuda::sm90
