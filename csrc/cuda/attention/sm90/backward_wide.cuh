// The consumers of the Hopper attention backward at D 256, where dK and dV of 64 keys are half of all registers of the
// SM. Each warpgroup owns one of them, for all 64 keys of the CTA and with it one half of a tile's work:
//
//   warpgroup 0                                   warpgroup 1
//   S^T = K Q^T                                   dP^T = V dO^T
//   P = exp2(S - lse)  -- rounded, by shared -->  dS = P * (dP - delta)
//   dV += P^T dO                                  dK += dS^T Q
//   dQ = dS K, columns 0 .. 127  <- by shared --  dQ = dS K, columns 128 .. 255
//
// (With a softcap P times its derivative goes over.)
// Every product with a sum over rows has its left operand in registers, no score is computed twice, and the
// exponentials of one warpgroup meet the products of the other. A warp of the second writes its 16 keys of dS over the
// P that it read. dQ runs one tile late as in backward.cuh; there are 64 KB of it per tile, which go to memory from
// registers: a bulk reduction would write them to shared memory and read them there again.
#pragma once

#include "cuda/attention/sm90/backward_shared.cuh"

namespace yoco::cuda::sm90 {

template <typename Config, bool kValues>
YOCO_DEVICE void consume_wide(const AttentionBackwardParams& p, const BackwardPlan& plan, uint32_t shared) {
  using Shared = BackwardShared<Config>;
  using T = typename Config::Element;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys, kS = kRows / 2;
  constexpr int kHalfDim = Config::kDim / 2, kOwn = kValues ? 0 : 1;  // this warpgroup
  const int warp = uniform(int(threadIdx.x) / 32 % 4), lane = int(threadIdx.x % 32);
  const int own_key = warp * 16 + lane / 4;  // and + 8
  const float multiplier = plan.score.multiplier;
  // P lies in the order of the registers, dS^T as [key][64 rows]; of both a warp has 2 KB, in the same place.
  const uint32_t p_lane = warp * 2048 + lane * 16;
  SlotReader<Config> slots(p, shared);
  LateDQ<Config> late(shared, warp * 16);

  for (;;) {
    const int4 first_header = slots.next_header();
    if ((first_header.y & kNoMore) != 0) break;
    const int index = uniform(first_header.z), first = uniform(first_header.w);
    float gradient[Config::kDim / 2];  // dV or dK
#pragma unroll
    for (int i = 0; i < Config::kDim / 2; ++i) gradient[i] = 0.f;
    int late_tile = 0;  // whose dQ is still to be made
    float dq[kHalfDim / 2];
    const auto issue_dq = [&] { late.issue(dq, 0, kOwn * (kHalfDim / 64)); };
    const auto add_dq = [&] {
      late.wait(dq);
      const int64_t piece = int64_t(late_tile) * Config::kPieces + kOwn * (Config::kPieces / 2) + warp;
      float* const to = plan.dq_accumulator + piece * Config::kPiece + lane * 4;
#pragma unroll
      for (int i = 0; i < kHalfDim / 8; ++i) {
        reduce_add(to + i / 8 * (4 * Config::kPiece) + i % 8 * 128, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2],
                   dq[4 * i + 3]);
      }
    };

    // One tile; dQ of the one before it, unless this is the first of its walk.
    const auto step = [&](const int4& header, auto first_tile) {
      constexpr bool kDQBefore = Config::kDQ && !decltype(first_tile)::value;
      const bool full = (header.y & kFullTile) != 0;
      slots.clear_loose_rows(header.y & kRowsMask);
      const uint32_t row_floats = slots.slot * (kRows * 4);
      const uint32_t exchange = late.tile();
      float s[kS];  // S, P or dP, dS
      uint32_t operand[kS / 8][4];
      pin_registers(s);
      wgmma_fence();
      issue_scores<Config>(s, shared + (kValues ? Shared::kK : Shared::kV), kValues ? slots.q_tile() : slots.do_tile());
      if constexpr (kValues) {
        wgmma_wait<0>();
        pin_registers(s);
        uint32_t weights[kS / 8][4];  // of dS: P, or what stands for it
        if constexpr (Config::kModified) {
          exponentiate_modified<Config>(plan.score, s, operand, weights, shared, slots.slot,
                                        first + own_key - slots.diagonal());
          if (!full) mask_operand<Config>(operand, shared, slots.slot, first + own_key);
        } else {
          exponentiate(s, shared + Shared::kLse + row_floats, multiplier);
          if (!full) mask_scores<Config>(s, shared, slots.slot, first + own_key);
          pack_operand<T>(operand, s);
          pack_operand<T>(weights, s);
        }
        late.wait_empty();
#pragma unroll
        for (int k = 0; k < kS / 8; ++k) {
          store_shared(exchange + p_lane + k * 512,
                       make_int4(int(weights[k][0]), int(weights[k][1]), int(weights[k][2]), int(weights[k][3])));
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared + Shared::kPFull + 8 * late.at.slot);
      } else {
        mbarrier_wait(shared + Shared::kPFull + 8 * late.at.slot, late.at.parity);
        uint32_t weights[kS / 8][4];
#pragma unroll
        for (int k = 0; k < kS / 8; ++k) {
          const int4 v = load_shared_int4(exchange + p_lane + k * 512);
          weights[k][0] = v.x, weights[k][1] = v.y, weights[k][2] = v.z, weights[k][3] = v.w;
        }
        wgmma_wait<0>();
        pin_registers(s);
        score_gradients(s, shared + Shared::kDelta + row_floats, [&](int i) { return operand_element<T>(weights, i); });
        if (!full) mask_scores<Config>(s, shared, slots.slot, first + own_key);
        pack_operand<T>(operand, s);
      }
      if constexpr (!kValues) {
        __syncwarp();  // every lane has read its P
        if constexpr (Config::kDQ) {
          late.put(operand);  // before the product has its registers: nobody may touch those until it is done
        } else if (lane == 0) {
          mbarrier_arrive(shared + Shared::kDSEmpty + 8 * late.at.slot);
        }
      }
      pin_registers(gradient);
      wgmma_fence();
      const uint64_t columns = descriptor_mn(kValues ? slots.do_tile() : slots.q_tile(), kRows * 128);
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k) {
        wgmma<T, Major::MN>(gradient, operand[k], columns + descriptor_step(k * 2048), true);
      }
      wgmma_commit();
      if constexpr (kDQBefore) issue_dq();
      wgmma_wait<kDQBefore ? 1 : 0>();
      pin_registers(gradient);
      slots.release_slot();
      if constexpr (kDQBefore) add_dq();
      late.at.advance();
      late_tile = header.x;
    };
    slots.walk(p, plan, index, first, first_header, step, [&] {
      if constexpr (Config::kDQ) {
        issue_dq();
        add_dq();
      }
    });

    // ---- epilogue, as in backward.cuh; a key with a NaN in one gradient is computed again in both.
    const KeyTile keys = key_tile(p, plan, kKeys, index);
    bool bad[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) bad[h] = check_row(gradient, h, first + own_key + 8 * h >= keys.num_keys) != 0.f;
    if (named_sync_or(kConsumerBarrier, 2 * kWarpgroup, bad[0] || bad[1])) {
      const uint32_t bad_keys = shared + Shared::kBadKeys + warp * 8;
      const int2 found = make_int2(int(__ballot_sync(0xffffffffu, bad[0])), int(__ballot_sync(0xffffffffu, bad[1])));
      if (lane == 0) store_shared(bad_keys + kOwn * 32, found);
      named_sync(kConsumerBarrier, 2 * kWarpgroup);
      const int2 other = load_shared_int2(bad_keys + (kOwn ^ 1) * 32);
      bad[0] = (uint32_t(found.x | other.x) >> (lane & ~3) & 0xf) != 0;
      bad[1] = (uint32_t(found.y | other.y) >> (lane & ~3) & 0xf) != 0;
      named_sync(kConsumerBarrier, 2 * kWarpgroup);  // the words are free
    }
    const int key0 = first + warp * 16;
    store_keys<T>(p, plan, keys, kValues, gradient, key0, bad);
    if constexpr (kValues) redo_bad_keys<T>(p, plan, keys, key0, bad);
  }
}

}  // namespace yoco::cuda::sm90
