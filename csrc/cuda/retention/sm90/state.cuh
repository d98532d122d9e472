// The warpgroups of a Hopper run that hold the state: 64 columns of v each.
#pragma once

#include "cuda/retention/sm90/block.cuh"

namespace yoco::cuda::sm90 {

// What a thread holds of the state S^T: state[4 j + e] is row (of v) 64 group + 16 warp + lane / 4, + 8 for e / 2 = 1,
// and column (of k) 8 j + lane % 4 * 2 + e % 2: the accumulators of WGMMA.
template <int kDimK, typename Shape>
struct StateOwner {
  static constexpr int kThreads = Shape::kGroups * kWarpgroup, kStateSize = kThreads * kDimK / 2;
  int group, thread;  // thread: of all that hold the state

  // f(element, offset in [num_sequences, heads, dim_k, dim_v])
  template <typename F>
  YOCO_DEVICE void for_each(const RunBlock& b, const RetentionGrid& p, const RetentionRun& run, F&& f) const {
    const int lane = thread % 32, column = group * 64 + thread / 32 % 4 * 16 + lane / 4;
    const int64_t own = (b.n * p.heads + b.head) * run.dim_k * run.dim_v + lane % 4 * 2 * run.state_stride_k +
                        (b.column + column) * run.state_stride_v;
#pragma unroll
    for (int j = 0; j < kDimK / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * j + e % 2;
        if (lane % 4 * 2 + row < run.dim_k && column + e / 2 * 8 < b.columns) {
          f(4 * j + e, own + row * run.state_stride_k + e / 2 * 8 * run.state_stride_v);
        }
      }
    }
  }
  // A whole state in the kernel's own order, `index` counted in states.
  YOCO_DEVICE float4* whole(float* states, int64_t index) const {
    return reinterpret_cast<float4*>(states + index * kStateSize) + thread;
  }
  YOCO_DEVICE void store(float4* to, const float (&state)[kDimK / 2]) const {
#pragma unroll
    for (int j = 0; j < kDimK / 8; ++j) {
      to[j * kThreads] = make_float4(state[4 * j], state[4 * j + 1], state[4 * j + 2], state[4 * j + 3]);
    }
  }
};

YOCO_DEVICE int64_t segment_index(const RunBlock& b, const RetentionGrid& p) {
  return ((b.n * p.heads + b.head) * p.blocks_v + b.block_v) * (p.segments - 1) + b.segment;
}

template <int kDimK, typename Shape>
YOCO_DEVICE void load_state(float (&state)[kDimK / 2], const StateOwner<kDimK, Shape>& owner, const RunBlock& b,
                            const RetentionGrid& p, const RetentionRun& run) {
#pragma unroll
  for (int j = 0; j < kDimK / 2; ++j) state[j] = 0.f;
  if (b.segment > 0) {
    if (!b.outputs) return;
    const float4* from = owner.whole(run.segment_states, segment_index(b, p) - 1);
#pragma unroll
    for (int j = 0; j < kDimK / 8; ++j) {
      const float4 v = from[j * owner.kThreads];
      state[4 * j] = v.x, state[4 * j + 1] = v.y, state[4 * j + 2] = v.z, state[4 * j + 3] = v.w;
    }
  } else if (run.state_in != nullptr) {
    owner.for_each(b, p, run, [&](int j, int64_t at) { state[j] = run.state_in[at]; });
  }
}

template <int kDimK, typename Shape>
YOCO_DEVICE void store_state(const float (&state)[kDimK / 2], float segment_decay,
                             const StateOwner<kDimK, Shape>& owner, const RunBlock& b, const RetentionGrid& p,
                             const RetentionRun& run) {
  if (b.segment < b.segments - 1) {
    if (b.outputs) return;
    owner.store(owner.whole(run.segment_states, segment_index(b, p)), state);
    if (owner.thread == 0) run.segment_decays[segment_index(b, p)] = segment_decay;
  } else if (run.state_out != nullptr) {
    owner.for_each(b, p, run, [&](int j, int64_t at) { run.state_out[at] = state[j]; });
  }
}

// ---- gate gradient
// Every 64 columns of v are a part of their own in the sums that retention.cu's last kernel adds up.
struct GateSums {
  float* tokens;  // x . o of the batch row's first token on: [batch * time] of this part and head
  float* dots;    // shared memory, [2][4 warps][64]: of this and the last chunk
  float* warps;   // shared memory, [4]
};

// Lanes that differ in bit kBit of their number each give the other half of 2 kHalf values and add what they get.
template <int kHalf, int kBit>
YOCO_DEVICE void exchange_half(float (&part)[16]) {
  const bool upper = threadIdx.x & kBit;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = part[i], high = part[kHalf + i];
    part[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kBit);
  }
}
// x . o over this warp's 16 columns for the 64 tokens: the lanes of one token hold two columns each in part[16] (token
// 8 j + lane % 4 * 2 + e in part[2 j + e]). On return lane l has tokens 2 l and 2 l + 1.
YOCO_DEVICE float2 sum_columns(float (&part)[16]) {
  exchange_half<8, 16>(part);
  exchange_half<4, 8>(part);
  exchange_half<2, 4>(part);
  return make_float2(part[0], part[1]);
}

// ---- chunks
// kOutputs: O is wanted, not only the state. kDots: O is dotted with x, which lies in the stage beside V. Returns the
// product of the chunks' decays.
template <typename T, int kDimK, bool kOutputs, bool kDots, typename Shape>
YOCO_DEVICE float carry_state(float (&state)[kDimK / 2], uint32_t shared, const StateOwner<kDimK, Shape>& owner,
                              const RunBlock& b, const RetentionGrid& p, const RetentionRun& run,
                              const CUtensorMap& out_map, const ChunkGates* gates, const GateSums& sums) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, lane_col = lane % 4 * 2, group = owner.group;
  const bool leader = threadIdx.x % kWarpgroup == 0;
  // Where this lane points ldmatrix in a panel, tokens 0-15 of its warp's 16 columns; and the transposed stmatrix,
  // whose matrices are (columns 0-7, 8-15) x (tokens 0-7, 8-15).
  const uint32_t panel = group * kPanelBytes, load_at = panel + block_offset(lane_offset(), 0, warp * 16);
  const uint32_t store_at = panel + (lane / 16 * 8 + lane % 8) * 128 + (((warp * 2 + lane / 8 % 2) ^ (lane & 7)) << 4);
  float segment_decay = 1.f;
  RingPosition<Shape::kStages> at;
  RingPosition<Shape::kScoreStages> from;
#pragma unroll 1
  for (int i = b.begin; i < b.end; ++i, at.advance(), from.advance()) {
    const uint32_t tiles = shared + at.slot * Shape::kStageBytes;
    const ChunkGates& gate = gates[at.slot];
    [[maybe_unused]] int64_t anchor = -1;  // the state to save or to dot with, where there is one at this chunk
    if constexpr (kDots) {
      const int c = b.chunk_index(i), c_group = c / p.group_chunks;
      if (c == anchor_of(c_group, p.group_chunks, b.num_chunks)) {
        anchor = (first_group_slot(p, b.n, b.first_token) + c_group) * p.heads + b.head;
        if (!b.reverse) owner.store(owner.whole(run.group_states, anchor * p.blocks_v + b.block_v), state);
      }
    }

    // O^T = S^T Q^T: the rounded state is the A operand, in registers. For the gate gradient what rounding left over
    // follows as a second one, so that x . (Q S) is exact to 2^-17.
    float o[32];
    uint32_t operand[kDimK / 16][4];
    if constexpr (kOutputs) pack_operand<T>(operand, state);
    mbarrier_wait(shared + Shape::kFull + at.slot * 8, at.parity);
    if constexpr (kOutputs) {
      const uint64_t q = descriptor_k(tiles);
      const auto step = [](int d) { return descriptor_step(d / 4 * kPanelBytes + d % 4 * 32); };
      wgmma_fence();
#pragma unroll
      for (int d = 0; d < kDimK / 16; ++d) wgmma<T, Major::K>(o, operand[d], q + step(d), d > 0);
      wgmma_commit();
      if constexpr (kDots) {
        wgmma_wait<0>();  // the rest takes the registers of the first operand
#pragma unroll
        for (int d = 0; d < kDimK / 16; ++d) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int e = (2 * d + j / 2) * 4 + j % 2 * 2;
            operand[d][j] = pack_rest<T>(state[e], state[e + 1], operand[d][j]);
          }
        }
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < kDimK / 16; ++d) wgmma<T, Major::K>(o, operand[d], q + step(d), true);
        wgmma_commit();
      }
    }
    // Meanwhile V^T of this warp, 16 columns by 64 tokens, with the update factors.
    uint32_t update[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t v[4];
      ldmatrix_trans(v, tiles + Shape::kV + load_at + k * 16 * 128);
      const float2 f = *reinterpret_cast<const float2*>(&gate.update[k * 16 + lane_col]);
      const float2 f_8 = *reinterpret_cast<const float2*>(&gate.update[k * 16 + 8 + lane_col]);
      const auto scaled = [](uint32_t pair, float2 factor) {
        const float2 x = unpack2<T>(pair);
        return pack2<T>(x.x * factor.x, x.y * factor.y);
      };
      update[k][0] = scaled(v[0], f), update[k][1] = scaled(v[2], f);
      update[k][2] = scaled(v[1], f_8), update[k][3] = scaled(v[3], f_8);
    }
    const float total = gate.total;
    segment_decay *= total;

    // f(x, n, k): the pair x of X at the place of o[n], o[n + 1], tokens 2 k and 2 k + 1 of this lane
    const auto for_x = [&](auto&& f) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t x[4];
        ldmatrix_trans(x, tiles + Shape::kX + load_at + k * 16 * 128);
#pragma unroll
        for (int j = 0; j < 4; ++j) f(unpack2<T>(x[j]), k * 8 + j % 2 * 4 + j / 2 * 2, 2 * k + j % 2);
      }
    };
    [[maybe_unused]] float part[16];
    if constexpr (kOutputs) {
      wgmma_wait<0>();
      pin_registers(o);
      if constexpr (kDots) {
        // The other run of the pair has x as its V: there row factor * x is rounded before it goes into the state.
        // Rounded the same way here, the sums of the two runs differ by the gradient and by nothing that rounding put
        // into one of them (docs/cuda_retention.md).
#pragma unroll
        for (int j = 0; j < 16; ++j) part[j] = 0.f;
        for_x([&](float2 x, int n, int k) {
          const float2 f = *reinterpret_cast<const float2*>(&gate.row[k * 8 + lane_col]);
          const float2 rounded = unpack2<T>(pack2<T>(x.x * f.x, x.y * f.y));
          part[2 * k] += o[n] * (rounded.x - x.x * f.x), part[2 * k + 1] += o[n + 1] * (rounded.y - x.y * f.y);
        });
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 f = *reinterpret_cast<const float2*>(&gate.row[j * 8 + lane_col]);
        o[4 * j] *= f.x, o[4 * j + 1] *= f.y, o[4 * j + 2] *= f.x, o[4 * j + 3] *= f.y;
      }
      mbarrier_wait(shared + Shape::kScoresFull + from.slot * 8, from.parity);
    }
#pragma unroll
    for (int j = 0; j < kDimK / 2; ++j) state[j] *= total;

    // O^T += V^T P^T, then S^T += (update V)^T K; O leaves while the second runs.
    pin_registers(state);
    wgmma_fence();
    if constexpr (kOutputs) {
      const uint64_t scores = descriptor_k(shared + Shape::kScores + from.slot * kPanelBytes);
      const uint64_t values = descriptor_mn(tiles + Shape::kV + panel, kPanelBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<T, Major::MN, Major::K>(o, values + descriptor_step(k * 16 * 128), scores + descriptor_step(k * 32),
                                      true);
      }
      wgmma_commit();
    }
    const uint64_t keys = descriptor_mn(tiles + Shape::kK, kPanelBytes);
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T, Major::MN>(state, update[k], keys + descriptor_step(k * 16 * 128), true);
    wgmma_commit();

    if constexpr (kOutputs) {
      wgmma_wait<1>();
      pin_registers(o);
      if (lane == 0) mbarrier_arrive(shared + Shape::kScoresEmpty + from.slot * 8);
      float* const dots = sums.dots + i % 2 * 4 * kChunk;
      if constexpr (kDots) {
        for_x([&](float2 x, int n, int k) { part[2 * k] += o[n] * x.x, part[2 * k + 1] += o[n + 1] * x.y; });
        reinterpret_cast<float2*>(dots + warp * kChunk)[lane] = sum_columns(part);
      }
      // O has a tile of its own, or takes the place of X, of which every warp has read its columns.
      const uint32_t out = Shape::kOutInStage ? tiles + Shape::kX : shared + Shape::kOut;
      if constexpr (Shape::kOutInStage) {
        __syncwarp();
      } else {
        if (leader) bulk_wait_read<0>();
        named_sync(1 + group, kWarpgroup);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float* const x = &o[k * 8];
        stmatrix_trans(out + store_at + k * 16 * 128, pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                       pack2<T>(x[6], x[7]));
      }
      fence_async_proxy();
      named_sync(1 + group, kWarpgroup);
      const RunBlock::Chunk c = b.chunk(i);
      if (leader && group * 64 < b.columns) {
        tma_store_panel(out_map, out + panel, b.column + group * 64, chunk_box(b, c));
        bulk_commit();
      }
      if constexpr (kDots) {
        const int row = threadIdx.x % kWarpgroup;
        if (row < c.count && group * 64 < b.columns) {
          sums.tokens[c.end - c.count + row] =
              dots[row] + dots[kChunk + row] + dots[2 * kChunk + row] + dots[3 * kChunk + row];
        }
      }
    }
    wgmma_wait<0>();
    pin_registers(state);
    if constexpr (kOutputs && Shape::kOutInStage) {
      if (leader) bulk_wait_read<0>();
    }
    if (lane == 0) mbarrier_arrive(shared + Shape::kEmpty + at.slot * 8);

    if constexpr (kDots) {
      if (anchor >= 0 && b.reverse) {  // <S, D> behind the chunk, where the run forwards left S
        const float4* const saved = owner.whole(run.group_states, anchor * p.blocks_v + b.block_v);
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kDimK / 8; ++j) {
          const float4 s = saved[j * owner.kThreads];
          sum += s.x * state[4 * j] + s.y * state[4 * j + 1] + s.z * state[4 * j + 2] + s.w * state[4 * j + 3];
        }
        sum = group_sum<32>(sum);
        if (lane == 0) sums.warps[warp] = sum;
        named_sync(1 + group, kWarpgroup);
        if (leader && group * 64 < b.columns) {
          const int64_t part_heads = (b.column / 64 + group) * p.heads + b.head;
          const int64_t slot = anchor / p.heads;
          run.boundary[part_heads * group_slots(p) + slot] =
              sums.warps[0] + sums.warps[1] + sums.warps[2] + sums.warps[3];
        }
      }
    }
  }
  if (leader) bulk_wait<0>();
  return segment_decay;
}

}  // namespace yoco::cuda::sm90
