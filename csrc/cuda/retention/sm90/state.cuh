// The warpgroups of a Hopper run that hold the state: 64 columns of v each.
#pragma once

#include "cuda/retention/sm90/rotate.cuh"

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
                        (b.panel_column(group) + column - group * 64) * run.state_stride_v;
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
// Whether the i-th chunk of the run has an anchor: the state is saved there, or dotted with the saved one.
YOCO_DEVICE bool has_anchor(const RunBlock& b, int i) {
  const int c = b.chunk_index(i);
  return c == anchor_of(c / kGroupChunks, kGroupChunks, b.num_chunks);
}
template <int kDimK, typename Shape>
YOCO_DEVICE float4* anchor_state(const StateOwner<kDimK, Shape>& owner, const RunBlock& b, int i) {
  return owner.whole(b.anchor_states, b.chunk_index(i) / kGroupChunks * b.anchor_stride);
}
// Lanes that differ in bit kBit of their number each give the other half of 2 kHalf values and add what they get.
template <int kHalf, int kBit>
YOCO_DEVICE void exchange_half(float (&part)[8]) {
  const bool upper = threadIdx.x & kBit;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = part[i], high = part[kHalf + i];
    part[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kBit);
  }
}
// Sums over this warp's 16 columns for 32 tokens: the lanes of one token hold two columns each, in part[2 j + e] those
// of token 8 j + lane % 4 * 2 + e. Returns the sum of token sum_token(lane).
YOCO_DEVICE float sum_columns(float (&part)[8]) {
  exchange_half<4, 16>(part);
  exchange_half<2, 8>(part);
  exchange_half<1, 4>(part);
  return part[0];
}
YOCO_DEVICE int sum_token(int lane) { return lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2; }

// ---- chunks
// Where a thread is among the state's, and where it points ldmatrix and stmatrix in a tile's panel of its group.
template <typename Shape>
struct StatePlace {
  int index;  // in the block
  YOCO_DEVICE int lane() const { return index % 32; }
  YOCO_DEVICE int warp() const { return index / 32 % 4; }
  YOCO_DEVICE int group() const { return Shape::kGroups == 1 ? 0 : index / kWarpgroup - 2; }
  YOCO_DEVICE int row() const { return index % kWarpgroup; }  // in the group
  YOCO_DEVICE int column() const { return lane() % 4 * 2; }   // of accumulators: this and the next, + 8 j
  YOCO_DEVICE int panel() const { return group() * kPanelBytes; }
  // Tokens 0-15 of this warp's 16 columns.
  YOCO_DEVICE uint32_t load() const {
    const uint32_t block = lane() % 16 * 128 + (((lane() / 16) ^ (lane() % 8)) << 4);
    return panel() + block_offset(block, 0, warp() * 16);
  }
  // The same for the transposed stmatrix, whose matrices are (columns 0-7, 8-15) x (tokens 0-7, 8-15).
  YOCO_DEVICE uint32_t store() const {
    const int piece = warp() * 2 + lane() / 8 % 2;
    return panel() + (lane() / 16 * 8 + lane() % 8) * 128 + ((piece ^ (lane() & 7)) << 4);
  }
};

// kOutputs: O is wanted, not only the state. kDots: O is dotted with x, which lies in the stage beside V. Returns the
// product of the chunks' decays where only the state is wanted.
template <typename T, int kDimK, bool kOutputs, bool kDots, typename Shape>
YOCO_DEVICE float carry_state(float (&state)[kDimK / 2], uint32_t shared, uint8_t* shared_bytes, const RunBlock& b,
                              const CUtensorMap& out_map) {
  constexpr bool kWide = kDimK == 256;
  // A wide state leaves no registers for what follows from the thread's index: it is made where it is used, and the
  // compiler, which would make it once, does not see that the index is always the same.
  const auto here = [] {
    int index = threadIdx.x;
    if constexpr (kWide) asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
    return StatePlace<Shape>{index};
  };
  const auto owner = [&] {
    const auto place = here();
    return StateOwner<kDimK, Shape>{place.group(), place.group() * kWarpgroup + place.row()};
  };
  float segment_decay = 1.f;
  // Operands of the state's product: how many have registers, and how many are made (and committed) at once.
  constexpr int kSteps = kDimK / 16, kSlots = kWide ? 3 : 8, kBatch = kWide ? 1 : 4;
  constexpr int kBatches = (kDots ? 2 : 1) * kSteps / kBatch;
  ChunkRings<Shape> rings;
#pragma unroll 1
  for (int i = b.begin; i < b.end; ++i, rings.advance()) {
    const auto at = rings.stage(i - b.begin);
    const auto from = rings.scores(i - b.begin);
    const uint32_t tiles = shared + at.slot * Shape::kStageBytes;
    const ChunkGates& gate = reinterpret_cast<const ChunkGates*>(shared_bytes + Shape::kGates)[at.slot];
    if constexpr (kDots) {
      if (!b.reverse && has_anchor(b, i)) owner().store(anchor_state(owner(), b, i), state);
    }

    // O^T = S^T Q^T: the rounded state is the A operand, in registers. For the gate gradient what rounding left over
    // follows as a second one, so that x . (Q S) is exact to 2^-17. Both are made kBatch steps of 16 columns at a time
    // in registers that products have left, and the state decays behind them.
    float o[32];
    uint32_t operand[kSlots][4];
    const auto make_operands = [&](int batch) {
#pragma unroll
      for (int n = batch * kBatch; n < (batch + 1) * kBatch; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int e = (2 * (n % kSteps) + j / 2) * 4 + j % 2 * 2;
          uint32_t& to = operand[n % kSlots][j];
          if (n < kSteps) {
            to = pack2<T>(state[e], state[e + 1]);
          } else {  // swapped, or the compiler would keep what it rounded before in registers until now
            const float2 rounded = unpack2<T>(pack2<T>(state[e + 1], state[e]));
            to = pack2<T>(state[e] - rounded.y, state[e + 1] - rounded.x);
          }
        }
      }
    };
    if constexpr (kOutputs) make_operands(0);
    mbarrier_wait(shared + Shape::kFull + at.slot * 8, at.parity);
    if constexpr (Shape::kTurnTogether && !kDots) {  // where dots are wanted, V turns
      turn_share<T, kDimK, kOutputs, Shape>(shared, b, at.slot, here().group(), here().row());
    }
    if constexpr (Shape::kRotary) mbarrier_wait(shared + Shape::kTilesTurned + at.slot * 8, at.parity);
    const float total = gate.total;
    if constexpr (!kOutputs) segment_decay *= total;
    if constexpr (kOutputs) {
      uint64_t q = descriptor_k(tiles);
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch) {
        if (batch > 0) {
          if (batch >= kSlots / kBatch) wgmma_wait<kSlots / kBatch - 1>();
          make_operands(batch);
        }
        // Read again, or the compiler would keep sixteen descriptors for the second pass.
        if (kWide && batch * kBatch == kSteps) q = descriptor_k(b.tiles + at.slot * Shape::kStageBytes);
        wgmma_fence();
#pragma unroll
        for (int n = batch * kBatch; n < (batch + 1) * kBatch; ++n) {
          const int d = n % kSteps;
          wgmma<T, Major::K>(o, operand[n % kSlots], descriptor_at(q, d / 4 * kPanelBytes + d % 4 * 32), n > 0);
        }
        wgmma_commit();
        if (batch >= kBatches - kSteps / kBatch) {
          const int first = batch * kBatch % kSteps * 8;
#pragma unroll
          for (int j = first; j < first + kBatch * 8; ++j) state[j] *= total;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kDimK / 2; ++j) state[j] *= total;
    }
    // V^T of this warp, 16 columns by 64 tokens, with the update factors.
    uint32_t update[4][4];
    const auto make_update = [&](int k) {
      const auto place = here();
      uint32_t v[4];
      ldmatrix_trans(v, tiles + Shape::kV + place.load() + k * 16 * 128);
      const float2 f = *reinterpret_cast<const float2*>(&gate.update[k * 16 + place.column()]);
      const float2 f_8 = *reinterpret_cast<const float2*>(&gate.update[k * 16 + 8 + place.column()]);
      const auto scaled = [](uint32_t pair, float2 factor) {
        const float2 x = unpack2<T>(pair);
        return pack2<T>(x.x * factor.x, x.y * factor.y);
      };
      update[k][0] = scaled(v[0], f), update[k][1] = scaled(v[2], f);
      update[k][2] = scaled(v[1], f_8), update[k][3] = scaled(v[3], f_8);
    };
    // All of it while S^T Q^T runs; with a wide state piece by piece before the products, for want of registers.
    constexpr bool kUpdateLate = kWide && kOutputs;
    if constexpr (!kUpdateLate) {
#pragma unroll
      for (int k = 0; k < 4; ++k) make_update(k);
    }

    // Sums over columns of f(x, e, token), x a pair of X and o[e], o[e + 1] at its place, token and token + 1; f
    // returns the pair's products.
    const auto dot_x = [&](float(&sum)[2], auto&& f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto place = here();
        float part[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) part[i] = 0.f;
#pragma unroll
        for (int k = half * 2; k < half * 2 + 2; ++k) {
          uint32_t x[4];
          ldmatrix_trans(x, tiles + Shape::kX + place.load() + k * 16 * 128);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 product =
                f(unpack2<T>(x[j]), k * 8 + j % 2 * 4 + j / 2 * 2, k * 16 + j % 2 * 8 + place.column());
            part[k % 2 * 4 + j % 2 * 2] += product.x, part[k % 2 * 4 + j % 2 * 2 + 1] += product.y;
          }
        }
        sum[half] += sum_columns(part);
      }
    };
    [[maybe_unused]] float dot[2] = {0.f, 0.f};  // of tokens sum_token(lane) and 32 further on
    if constexpr (kOutputs) {
      wgmma_wait<0>();
      pin_registers(o);
      if constexpr (Shape::kEarlyQ) {
        if (here().lane() == 0) mbarrier_arrive(shared + Shape::kEmptyQ + at.slot * 8);
      }
      if constexpr (kDots) {
        // The other run of the pair has x as its V: there row factor * x is rounded before it goes into the state.
        // Rounded the same way here, the sums of the two runs differ by the gradient and by nothing that rounding put
        // into one of them (docs/cuda_retention.md).
        dot_x(dot, [&](float2 x, int e, int token) {
          const float2 f = *reinterpret_cast<const float2*>(&gate.row[token]);
          const float2 rounded = unpack2<T>(pack2<T>(x.x * f.x, x.y * f.y));
          return make_float2(o[e] * (rounded.x - x.x * f.x), o[e + 1] * (rounded.y - x.y * f.y));
        });
      }
      const float* const row_factors = &gate.row[here().column()];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 f = *reinterpret_cast<const float2*>(&row_factors[j * 8]);
        o[4 * j] *= f.x, o[4 * j + 1] *= f.y, o[4 * j + 2] *= f.x, o[4 * j + 3] *= f.y;
      }
      mbarrier_wait(shared + Shape::kScoresFull + from.slot * 8, from.parity);
    }

    // O^T += V^T P^T, then S^T += (update V)^T K; O leaves while the second runs.
    pin_registers(state);
    wgmma_fence();
    if constexpr (kOutputs) {
      const uint64_t scores = descriptor_k(shared + Shape::kScores + from.slot * kPanelBytes);
      const uint64_t values = descriptor_mn(tiles + Shape::kV + here().panel(), kPanelBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<T, Major::MN, Major::K>(o, descriptor_at(values, k * 16 * 128), descriptor_at(scores, k * 32), true);
      }
      wgmma_commit();
    }
    const uint64_t keys = descriptor_mn(tiles + Shape::kK, kPanelBytes);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kUpdateLate) {
        make_update(k);
        wgmma_fence();
      }
      // At most 128 columns at once: ptxas refuses an instruction with more registers than a thread has at launch.
      constexpr int kColumns = kDimK < 128 ? kDimK : 128;
#pragma unroll
      for (int c = 0; c < kDimK / kColumns; ++c) {
        auto& part = reinterpret_cast<float(&)[kColumns / 2]>(state[c * kColumns / 2]);
        wgmma<T, Major::MN>(part, update[k], descriptor_at(keys, c * kColumns / 64 * kPanelBytes + k * 16 * 128), true);
      }
    }
    wgmma_commit();

    if constexpr (kOutputs) {
      wgmma_wait<1>();
      pin_registers(o);
      const auto place = here();
      const int group = place.group(), row = place.row();
      if (place.lane() == 0) mbarrier_arrive(shared + Shape::kScoresEmpty + from.slot * 8);
      // [2][groups][4 warps][64]: of this and the last chunk
      [[maybe_unused]] float* const dots =
          reinterpret_cast<float*>(shared_bytes + Shape::kDots) + (i % 2 * Shape::kGroups + group) * 4 * kChunk;
      if constexpr (kDots) {
        dot_x(dot, [&](float2 x, int e, int) { return make_float2(o[e] * x.x, o[e + 1] * x.y); });
        float* const to = dots + place.warp() * kChunk + sum_token(place.lane());
        to[0] = dot[0], to[32] = dot[1];
      }
      // O has a tile of its own, or takes the place of X, of which every warp has read its columns.
      const uint32_t out = Shape::kOutInStage ? tiles + Shape::kX : shared + Shape::kOut;
      if constexpr (Shape::kOutInStage) {
        __syncwarp();
      } else {
        if (row == 0) bulk_wait_read<0>();
        named_sync(1 + group, kWarpgroup);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float* const x = &o[k * 8];
        stmatrix_x4_trans(out + place.store() + k * 16 * 128,
                          {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])});
      }
      if constexpr (kDots && Shape::kRotary) {  // dq and dk turn back; a pair's columns may be in both groups' panels
        named_sync(3, Shape::kGroups * kWarpgroup);
        constexpr int kRows = kChunk / Shape::kGroups;
        turn_tiles<T, Shape::kGroups * 64, kRows, Shape>({out}, shared, at.slot, b, row, group * kRows, -1.f);
        fence_async_proxy();
        named_sync(3, Shape::kGroups * kWarpgroup);
      } else {
        fence_async_proxy();
        named_sync(1 + group, kWarpgroup);
      }
      const RunBlock::Chunk c = b.chunk(i);
      if (row == 0 && group * 64 < b.columns) {
        tma_store_panel(out_map, out + place.panel(), b.panel_column(group), chunk_box(b, c));
        bulk_commit();
      }
      if constexpr (kDots) {
        if (row < c.count && group * 64 < b.columns) {
          b.dots[group][c.end - c.count + row] =
              dots[row] + dots[kChunk + row] + dots[2 * kChunk + row] + dots[3 * kChunk + row];
        }
      }
    }
    wgmma_wait<0>();
    pin_registers(state);
    const auto place = here();
    if constexpr (kOutputs && Shape::kOutInStage) {
      if (place.row() == 0) bulk_wait_read<0>();
    }
    if (place.lane() == 0) mbarrier_arrive(shared + Shape::kEmpty + at.slot * 8);

    if constexpr (kDots) {
      if (b.reverse && has_anchor(b, i)) {  // <S, D> behind the chunk, where the run forwards left S
        const int group = place.group();
        const float4* const saved = anchor_state(owner(), b, i);
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kDimK / 8; ++j) {
          const float4 s = saved[j * StateOwner<kDimK, Shape>::kThreads];
          sum += s.x * state[4 * j] + s.y * state[4 * j + 1] + s.z * state[4 * j + 2] + s.w * state[4 * j + 3];
        }
        sum = group_sum<32>(sum);
        float* const sums = reinterpret_cast<float*>(shared_bytes + Shape::kWarpSums) + group * 4;
        if (place.lane() == 0) sums[place.warp()] = sum;
        named_sync(1 + group, kWarpgroup);
        if (place.row() == 0 && group * 64 < b.columns) {
          b.boundary[group][b.chunk_index(i) / kGroupChunks] = sums[0] + sums[1] + sums[2] + sums[3];
        }
      }
    }
  }
  if (here().row() == 0) bulk_wait<0>();
  return segment_decay;
}

}  // namespace yoco::cuda::sm90
