// Attention backward for Hopper (sm_90a): dK and dV, and with them dQ. One kernel, read from its end upwards.
//
// A persistent CTA takes kKeys keys of one KV head at a time: K and V stay in shared memory while it walks over the
// tiles of kRows rows (token x query head) that see these keys. One producer warp finds the tiles, moves Q and dO by
// TMA into a ring and writes what each row of them needs: lse, delta and, at the edges of the mask, the keys it sees.
// Two consumer warpgroups own 64 keys each (at D 256: see backward_wide.cuh); keys are the rows of their products, so
// that P^T and dS^T come out of the softmax as operands of the next products and never leave the registers of dK and
// dV:
//   S^T = K Q^T, dP^T = V dO^T     WGMMA, both operands from shared memory
//   P = exp2(S - lse), dS = P * (dP - delta)        float32, in registers; softcap and alibi are a second instance
//   dV += P^T dO, dK += dS^T Q     WGMMA, P^T and dS^T rounded to T from registers, dO and Q as they lie
//   dQ = dS K                      WGMMA over the keys of both warpgroups: dS goes through shared memory
// dQ of a tile runs one tile late, behind dV and dK of the next one: dS has two buffers, so the warpgroups may be half
// a tile apart and one's softmax meets the other's products. Each warp adds its 4 KB of dQ to the float32 accumulator
// in memory by a bulk reduction, in the order of the registers.
#pragma once

#include <algorithm>

#include "cuda/attention/sm90/backward_shared.cuh"
#include "cuda/attention/sm90/backward_wide.cuh"

namespace yoco::cuda::sm90 {

// ---- the producer warp
template <typename Config>
YOCO_DEVICE void produce(const AttentionBackwardParams& p, const BackwardPlan& plan, const BackwardMaps& maps,
                         int* counter, uint32_t shared) {
  using Shared = BackwardShared<Config>;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys, kPanels = Config::kPanels, kPerLane = kRows / 32;
  const int lane = int(threadIdx.x % 32);
  const bool leader = lane == 0;
  RingPosition<Config::kStages> at;
  uint32_t keys_parity = 0;
  const auto end_slot = [&](int flags, int index, int first) {
    mbarrier_wait(shared + Shared::kEmpty + 8 * at.slot, at.parity ^ 1);
    if (leader) {
      store_shared(shared + Shared::kHeader + at.slot * 16, make_int4(0, flags, index, first));
      mbarrier_arrive(shared + Shared::kFull + 8 * at.slot);
      mbarrier_arrive(shared + Shared::kFull + 8 * at.slot);
    }
    at.advance();
  };
  const int count = int(plan.schedule.count());
  for (int index = int(blockIdx.x), next; index < count; index = next) {
    // Asked for before it is needed.
    next = counter == nullptr ? count : leader ? int(gridDim.x) + atomicAdd(counter, 1) : 0;
    const KeyTile keys = key_tile(p, plan, kKeys, index);
    for (int first = keys.first; first < keys.store_keys; first += keys.step) {
      for (int sequence = keys.sequence; sequence < p.num_sequences; sequence += keys.sequence_step) {
        const RowMap map = make_row_map(p, sequence, keys.head);
        const int tile_rows = kRows / map.group * map.group;
        const int len_q = int(map.sequence.len_q), len_k = int(map.sequence.len_k);
        const bool latents = keys.latents;
        const bool scan = latents ? p.latent_begin != nullptr || p.latent_end != nullptr : p.mask.prefix_len != nullptr;
        int tile = 0, tile_end = keys.num_keys > first ? (map.rows + tile_rows - 1) / tile_rows : 0;
        if (!scan && !latents && tile_end > 0) {
          const int last = min(first + kKeys, keys.num_keys) - 1;
          const int64_t i0 = query_range(p.mask.window_left, p.mask.window_right, first, len_q, len_k).begin;
          const int64_t i1 = query_range(p.mask.window_left, p.mask.window_right, last, len_q, len_k).end;
          tile = int(i0) * map.group / tile_rows;
          tile_end = i0 < i1 ? (int(i1) * map.group + tile_rows - 1) / tile_rows : tile;
        }
        const float2* stats = plan.stats + first_stat(p, map);
        bool any = false;
        for (; tile < tile_end; ++tile) {
          // Does any row of the tile see any of these keys, do all see all?
          bool full;
          if (scan) {
            bool some = false;
            full = true;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) {
              const int r = i * 32 + lane, row = tile * tile_rows + r;
              if (r >= tile_rows) continue;
              const int2 seen = row < map.rows ? row_keys(p, map, row, latents) : make_int2(0, 0);
              some |= seen.x < first + kKeys && seen.y > first && seen.x < seen.y;
              full &= seen.x <= first && seen.y >= first + kKeys;
            }
            if (!__any_sync(0xffffffffu, some)) continue;
            full = __all_sync(0xffffffffu, full);
          } else {
            full = (tile + 1) * tile_rows <= map.rows && first + kKeys <= keys.num_keys;
            if (!latents && full) {
              const KeyRange a =
                  window_range(p.mask.window_left, p.mask.window_right, map.token(tile * tile_rows), len_q, len_k);
              const KeyRange b = window_range(p.mask.window_left, p.mask.window_right,
                                              map.token((tile + 1) * tile_rows - 1), len_q, len_k);
              full = b.begin <= first && a.end >= first + kKeys;
            }
          }
          if (!any) {
            mbarrier_wait(shared + Shared::kKeysEmpty, keys_parity ^ 1);
            keys_parity ^= 1;
            if (leader) {
              const uint32_t barrier = shared + Shared::kKeysFull;
              mbarrier_arrive_expect(barrier, 2 * Config::kKeyBytes);
              const int batch = latents && p.latents_shared ? 0 : int(map.sequence.batch);
              const int key = first + (latents ? 0 : int(map.sequence.k_begin));
#pragma unroll
              for (int panel = 0; panel < kPanels; ++panel) {
                tma_load(shared + Shared::kK + panel * kKeys * 128, latents ? maps.latent_k : maps.k, barrier,
                         panel * 64, key, map.head_kv, batch);
                tma_load(shared + Shared::kV + panel * kKeys * 128, latents ? maps.latent_v : maps.v, barrier,
                         panel * 64, key, map.head_kv, batch);
              }
            }
          }
          const int rows = min(tile_rows, map.rows - tile * tile_rows);
          float2 stat[kPerLane];
#pragma unroll
          for (int i = 0; i < kPerLane; ++i) {
            stat[i] = i * 32 + lane < rows ? stats[tile * tile_rows + i * 32 + lane] : make_float2(-YOCO_NEG_INF, 0.f);
          }
          const uint32_t barrier = shared + Shared::kFull + 8 * at.slot;
          mbarrier_wait(shared + Shared::kEmpty + 8 * at.slot, at.parity ^ 1);
          if (leader) {
            mbarrier_arrive_expect(barrier, 2 * kPanels * tile_rows * 128);
            const int token = int(map.sequence.q_begin) + tile * (tile_rows / map.group),
                      batch = int(map.sequence.batch);
#pragma unroll
            for (int panel = 0; panel < kPanels; ++panel) {
              const uint32_t to = shared + at.slot * Config::kRowBytes + panel * kRows * 128;
              tma_load(to + Shared::kQ, maps.q, barrier, panel * 64, 0, token, map.head_kv, batch);
              tma_load(to + Shared::kDOut, maps.d_out, barrier, panel * 64, 0, token, map.head_kv, batch);
            }
            store_shared(shared + Shared::kHeader + at.slot * 16,
                         make_int4(int(dq_tile(p, map, tile_rows, tile)), rows | (full ? kFullTile : 0), index, first));
            if constexpr (Config::kModified) {
              store_shared(shared + Shared::kDiagonal + at.slot * 4, tile * (tile_rows / map.group) + len_k - len_q);
            }
          }
#pragma unroll
          for (int i = 0; i < kPerLane; ++i) {
            const int r = i * 32 + lane, at_row = int(at.slot) * kRows + r;
            store_shared(shared + Shared::kLse + at_row * 4, stat[i].x);
            store_shared(shared + Shared::kDelta + at_row * 4, stat[i].y);
            if (!full) {
              store_shared(shared + Shared::kSeen + at_row * 8,
                           r < rows ? row_keys(p, map, tile * tile_rows + r, latents) : make_int2(0, 0));
            }
          }
          __syncwarp();
          if (leader) mbarrier_arrive(barrier);
          at.advance();
          any = true;
        }
        // The end of the walk, in a slot of its own. A walk without a tile is told to the consumers only if it is the
        // last.
        const bool last_walk = sequence + keys.sequence_step >= p.num_sequences;
        if (any || last_walk) end_slot(kEndOfWalk | (last_walk ? kLastWalk : 0), index, first);
      }
    }
    next = __shfl_sync(0xffffffffu, next, 0);
  }
  end_slot(kNoMore, 0, 0);
}

// ---- a consumer warpgroup: keys 64 w .. 64 w + 63
template <typename Config>
YOCO_DEVICE void consume(const AttentionBackwardParams& p, const BackwardPlan& plan, uint32_t shared) {
  using Shared = BackwardShared<Config>;
  using T = typename Config::Element;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys, kDim = Config::kDim;
  constexpr int kS = kRows / 2, kAcc = kDim / 2;
  const int warpgroup = uniform(int(threadIdx.x) / kWarpgroup) - 1, warp = uniform(int(threadIdx.x) / 32 % 4);
  const int lane = int(threadIdx.x % 32);
  const int own_key = warpgroup * 64 + warp * 16 + lane / 4;  // and + 8
  const uint32_t piece = shared + Shared::kDQ + (warpgroup * 4 + warp) * (Config::kPiece * 4);
  const float multiplier = plan.score.multiplier;
  SlotReader<Config> slots(p, shared);
  LateDQ<Config> late(shared, warpgroup * 64 + warp * 16);

  for (;;) {
    const int4 first_header = slots.next_header();
    if ((first_header.y & kNoMore) != 0) break;
    const int index = uniform(first_header.z), first = uniform(first_header.w);
    float dk[kAcc], dv[kAcc];
#pragma unroll
    for (int i = 0; i < kAcc; ++i) dk[i] = dv[i] = 0.f;
    int late_tile = 0;  // whose dQ is still to be made
    float dq[32];
    // D 64: half the rows of the tile, D 128: half the columns.
    const auto issue_dq = [&] { late.issue(dq, kDim == 64 ? warpgroup : 0, kDim == 64 ? 0 : warpgroup); };
    const auto add_dq = [&] {
      late.wait(dq);
      if (lane == 0) bulk_wait_read<0>();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        store_shared(piece + i * 512 + lane * 16, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        const int64_t to = int64_t(late_tile) * Config::kPieces + warpgroup * 4 + warp;
        bulk_reduce_add(plan.dq_accumulator + to * Config::kPiece, piece, Config::kPiece * 4);
        bulk_commit();
      }
    };

    // One tile; dQ of the one before it, unless this is the first of its walk.
    const auto step = [&](const int4& header, auto first_tile) {
      constexpr bool kDQBefore = Config::kDQ && !decltype(first_tile)::value;
      const int rows = header.y & kRowsMask;
      const uint32_t q_tile = slots.q_tile(), do_tile = slots.do_tile();
      slots.clear_loose_rows(rows);

      // ---- S^T, dP^T
      float s[kS], dp[kS];
      pin_registers(s);
      pin_registers(dp);
      wgmma_fence();
      issue_scores<Config>(s, shared + Shared::kK + warpgroup * (64 * 128), q_tile);
      issue_scores<Config>(dp, shared + Shared::kV + warpgroup * (64 * 128), do_tile);

      // ---- P, dS
      const bool full = (header.y & kFullTile) != 0;
      const uint32_t row_floats = slots.slot * (kRows * 4);
      wgmma_wait<1>();
      pin_registers(s);
      uint32_t probabilities[kS / 8][4], ds[kS / 8][4];
      uint32_t weights[kS / 8][4];  // kModified: of dS
      if constexpr (Config::kModified) {
        exponentiate_modified<Config>(plan.score, s, probabilities, weights, shared, slots.slot,
                                      first + own_key - slots.diagonal());
        if (!full) mask_operand<Config>(probabilities, shared, slots.slot, first + own_key);
      } else {
        exponentiate(s, shared + Shared::kLse + row_floats, multiplier);
        if (!full) mask_scores<Config>(s, shared, slots.slot, first + own_key);
        pack_operand<T>(probabilities, s);
      }
      wgmma_wait<0>();
      pin_registers(dp);
      score_gradients(dp, shared + Shared::kDelta + row_floats,
                      [&](int i) { return Config::kModified ? operand_element<T>(weights, i) : s[i]; });
      if (!full) mask_scores<Config>(dp, shared, slots.slot, first + own_key);
      pack_operand<T>(ds, dp);

      // ---- dV, dK. Not dV before dS: P in both precisions beside dP is more than 240 registers at D 64.
      pin_registers(dv);
      pin_registers(dk);
      wgmma_fence();
      const uint64_t do_columns = descriptor_mn(do_tile, kRows * 128), q_columns = descriptor_mn(q_tile, kRows * 128);
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k) {
        wgmma<T, Major::MN>(dv, probabilities[k], do_columns + descriptor_step(k * 2048), true);
      }
      // dS to shared memory before dK has its registers: nobody may touch those until it is done.
      if constexpr (Config::kDQ) {
        late.wait_empty();
        late.put(ds);
        wgmma_fence();
      }
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k) {
        wgmma<T, Major::MN>(dk, ds[k], q_columns + descriptor_step(k * 2048), true);
      }
      wgmma_commit();

      // ---- dQ of the tile before
      if constexpr (kDQBefore) issue_dq();
      wgmma_wait<kDQBefore ? 1 : 0>();
      pin_registers(dv);
      pin_registers(dk);
      slots.release_slot();
      if constexpr (kDQBefore) add_dq();
      if constexpr (Config::kDQ) {
        late.at.advance();
        late_tile = header.x;
      }
    };
    slots.walk(p, plan, index, first, first_header, step, [&] {
      if constexpr (Config::kDQ) {
        issue_dq();
        add_dq();
      }
    });

    // ---- epilogue. A row that does not see a key may have put 0 * NaN into its gradients: such keys are computed
    // again, row by row. Keys that seqused_k leaves out are zero.
    const KeyTile keys = key_tile(p, plan, kKeys, index);
    bool bad[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool out = first + own_key + 8 * h >= keys.num_keys;
      const float check = check_row(dk, h, out) + check_row(dv, h, out);
      bad[h] = (__ballot_sync(0xffffffffu, check != 0.f) >> (lane & ~3) & 0xf) != 0;
    }
    const int key0 = first + own_key - lane / 4;
    store_keys<T>(p, plan, keys, false, dk, key0, bad);
    store_keys<T>(p, plan, keys, true, dv, key0, bad);
    redo_bad_keys<T>(p, plan, keys, key0, bad);
  }
  if (lane == 0) bulk_wait<0>();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ AttentionBackwardParams p,
                              const __grid_constant__ BackwardPlan plan, const __grid_constant__ BackwardMaps maps,
                              int* counter) {
  using Shared = BackwardShared<Config>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const uint32_t shared = shared_address(shared_memory);
  zero_key_tails<typename Config::Element>(p, plan);
  if (p.num_sequences == 0) return;
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * Config::kWarpgroups;
    for (int i = 0; i < Config::kStages; ++i) {
      mbarrier_init(shared + Shared::kFull + 8 * i, 2);  // the copies are under way, the tables are written
      mbarrier_init(shared + Shared::kEmpty + 8 * i, kConsumerWarps);
    }
    mbarrier_init(shared + Shared::kKeysFull, 1);
    mbarrier_init(shared + Shared::kKeysEmpty, kConsumerWarps);
    for (int i = 0; i < 2; ++i) {
      // At D 256 one warpgroup writes dS; without dQ the same one is the only reader of what lies there, P.
      mbarrier_init(shared + Shared::kDSFull + 8 * i, Config::kWide ? 4 : kConsumerWarps);
      mbarrier_init(shared + Shared::kDSEmpty + 8 * i, Config::kWide && !Config::kDQ ? 4 : kConsumerWarps);
      if (Config::kWide) mbarrier_init(shared + Shared::kPFull + 8 * i, 4);
    }
    mbarrier_init_fence();
  }
  // Rows that no box fills, because a tile holds whole tokens: they take part in products, with P = 0.
  const int group = int(p.heads_q / p.heads_kv), tile_rows = Config::kRows / group * group;
  zero_tile_rows<Config::kRows, 2 * Config::kStages * Config::kPanels, Config::kThreads>(shared + Shared::kQ, tile_rows,
                                                                                         int(threadIdx.x));
  fence_async_proxy();
  __syncthreads();
  // Of the same value in all lanes, so that the compiler may use uniform registers on both sides.
  const int warpgroup = uniform(int(threadIdx.x) / kWarpgroup);
  if (warpgroup == 0) {
    give_registers<Config::kProducerRegisters>();
    if (threadIdx.x < 32) produce<Config>(p, plan, maps, counter, shared);
  } else {
    take_registers<Config::kConsumerRegisters>();
    if constexpr (!Config::kWide) {
      consume<Config>(p, plan, shared);
    } else if (warpgroup == 1) {
      consume_wide<Config, true>(p, plan, shared);
    } else {
      consume_wide<Config, false>(p, plan, shared);
    }
  }
}

// ---- dQ: the accumulator, rounded and in its place. A warp per 16 rows.
template <typename Config>
__global__ void __launch_bounds__(Config::kRows * 2)
    finish_dq_kernel(const __grid_constant__ AttentionBackwardParams p, const __grid_constant__ BackwardPlan plan) {
  using T = typename Config::Element;
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  zero_query_tail<T>(p);
  if (p.num_sequences == 0) return;
  const WorkTile work = plan.row_schedule.decode(int(blockIdx.x));
  const RowMap map = make_row_map(p, work.sequence, work.head);
  const int tile_rows = Config::kRows / map.group * map.group;
  for (int tile = work.tile; tile * tile_rows < map.rows; tile += plan.row_schedule.tiles) {
    const int rows = min(tile_rows, map.rows - tile * tile_rows);
    const float* from =
        plan.dq_accumulator + (dq_tile(p, map, tile_rows, tile) * Config::kPieces + warp) * Config::kPiece + lane * 4;
    unsigned bad[2] = {};
#pragma unroll
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      float dq[32];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 v = *reinterpret_cast<const float4*>(from + panel * (4 * Config::kPiece) + i * 128);
        dq[4 * i] = v.x, dq[4 * i + 1] = v.y, dq[4 * i + 2] = v.z, dq[4 * i + 3] = v.w;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = warp * 16 + lane / 4 + 8 * h;
        bad[h] |= __ballot_sync(0xffffffffu, check_row(dq, h, false) != 0.f && r < rows);
        T* const to = static_cast<T*>(p.dq.data) + (r < rows ? map.offset(p.dq, tile * tile_rows + r) : 0);
        store_row<T>(to + panel * 64, dq, h, plan.scale, int(p.dim_qk) - panel * 64, r < rows, plan.aligned_dq);
      }
    }
    redo_bad_rows(bad, [&](int r) {
      query_gradient<T>(p, plan, map.sequence_index, map.head_kv, tile * tile_rows + warp * 16 + r);
    });
  }
}

template <typename T, int D>
const char* launch_attention_backward(const AttentionBackwardParams& p, const BackwardPlan& plan, int* counter,
                                      const Launch& launch) {
  using Config = BackwardConfig<T, D, true, false>;
  using Modified = BackwardConfig<T, D, true, true>;
  if (const char* message = set_device(launch)) return message;
  BackwardMaps maps{};
  const char* m = make_backward_maps(maps, p, Config::kRows, Config::kKeys);
  if (m) return m;
  const int64_t count = std::max<int64_t>(plan.schedule.count(), 1);
  const unsigned ctas = unsigned(std::min<int64_t>(count, std::max(sm_count(launch.device), 1)));
  const bool plain = plan.score.plain, dq = plan.dq_accumulator != nullptr;
  const auto kernel =
      plain ? (dq ? attention_backward_kernel<Config> : attention_backward_kernel<BackwardConfig<T, D, false, false>>)
            : (dq ? attention_backward_kernel<Modified> : attention_backward_kernel<BackwardConfig<T, D, false, true>>);
  m = launch_kernel(kernel, ctas, Config::kThreads,
                    plain ? BackwardShared<Config>::kBytes : BackwardShared<Modified>::kBytes, launch, p, plan, maps,
                    count > ctas ? counter : nullptr);
  if (m || plan.dq_accumulator == nullptr) return m;
  return launch_kernel(finish_dq_kernel<Config>, unsigned(std::max<int64_t>(plan.row_schedule.count(), 1)),
                       Config::kRows * 2, 0, launch, p, plan);
}

}  // namespace yoco::cuda::sm90
