// The warpgroups of a Hopper run that hold the state: 64 columns of v each.
#pragma once

#include "cuda/core/activation.cuh"
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
                              const CUtensorMap& out_map, const RetentionGrid& p, const RetentionMaps& maps) {
  constexpr bool kWide = kDimK == 256;
  constexpr bool kOutputGate = kOutputs && Shape::kOutputGate;
  static_assert(!kOutputGate || (!kDots && !kWide));
  const auto here = [] { return StatePlace<Shape>{thread_index<Shape::kOpaqueThread>()}; };
  const auto owner = [&] {
    const auto place = here();
    return StateOwner<kDimK, Shape>{place.group(), place.group() * kWarpgroup + place.row()};
  };
  float segment_decay = 1.f;
  // Operands of the state's product: how many have registers, and how many are made (and committed) at once.
  constexpr int kSteps = kDimK / 16, kSlots = kWide ? 3 : 8, kBatch = kWide ? 1 : 4;
  constexpr int kBatches = (kDots ? 2 : 1) * kSteps / kBatch;
  // The output gate's ring. The thread that stores y of a chunk, and so knows when its tile is free, requests the next
  // one to come there. Where a chunk is in the ring follows from the number of chunks before it: that saves registers.
  const bool stores_o = !kOutputGate || p.runs[0].o.data != nullptr;
  [[maybe_unused]] const auto gate_place = [&](uint32_t before) -> RingPosition<1> {
    constexpr uint32_t kTiles = kOutputGate ? Shape::kOutTiles : 2;
    const uint32_t slots = kTiles - stores_o, round = stores_o ? before / (kTiles - 1) : before / kTiles;
    return {before - round * slots, round % 2};
  };
  const auto gate_tile = [&](uint32_t slot) { return shared + Shape::kOut + slot * Shape::kTileV; };
  const auto gate_barrier = [&](uint32_t slot) {
    return shared + Shape::kGateFull + (slot * Shape::kGroups + here().group()) * 8;
  };
  [[maybe_unused]] const auto load_output_gate = [&](int i) {
    const uint32_t slot = gate_place(i - b.begin).slot;
    mbarrier_arrive_expect(gate_barrier(slot), kPanelBytes);
    tma_load_panel(gate_tile(slot) + here().panel(), maps.output_gate, gate_barrier(slot),
                   b.panel_column(here().group()), chunk_box(b, b.chunk(i)));
  };
  if constexpr (kOutputGate) {
    const int first = min(b.begin + Shape::kOutTiles - stores_o, b.end);
    for (int i = b.begin; i < first && here().row() == 0; ++i) load_output_gate(i);
  }
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
    const auto make_update = [&](int k, const StatePlace<Shape>& place) {
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
      const auto place = here();
#pragma unroll
      for (int k = 0; k < 4; ++k) make_update(k, place);
    }
    if constexpr (kOutputGate) {
      if (i > b.begin && here().row() == 0) {  // by now the chunk before has left its tiles
        bulk_wait_read<0>();
        const int next = i - 1 + Shape::kOutTiles - stores_o;
        if (next < b.end) load_output_gate(next);
      }
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
        make_update(k, here());
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

    // silu(output gate), in the places of o: asked for before O is complete where there are registers.
    [[maybe_unused]] float silu[kOutputGate ? 32 : 1];
    [[maybe_unused]] const auto gate_at = gate_place(i - b.begin);
    const auto make_silu = [&](int k, uint32_t load_at) {
      uint32_t x[4];
      ldmatrix_trans(x, load_at + k * 16 * 128);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 g = unpack2<T>(x[j]);
        const int e = k * 8 + j % 2 * 4 + j / 2 * 2;
        silu[e] = g.x * sigmoid<T>(g.x), silu[e + 1] = g.y * sigmoid<T>(g.y);
      }
    };
    constexpr bool kSiluEarly = kOutputGate && Shape::kGroups == 2;
    if constexpr (kOutputGate) mbarrier_wait(gate_barrier(gate_at.slot), gate_at.parity);
    if constexpr (kSiluEarly) {
      const uint32_t load_at = gate_tile(gate_at.slot) + here().load();
#pragma unroll
      for (int k = 0; k < 4; ++k) make_silu(k, load_at);
    }

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
      const uint32_t out_last = out + (Shape::kOutInStage ? 0 : (Shape::kOutTiles - 1) * Shape::kTileV);
      const auto store_tokens = [&](uint32_t tile, int k, const float* x) {  // 16 k to 16 k + 15 of the chunk
        stmatrix_x4_trans(tile + place.store() + k * 16 * 128,
                          {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])});
      };
      if constexpr (Shape::kOutInStage) {
        __syncwarp();
      } else if constexpr (kOutputGate) {
        // Sums of squares over the columns: of this warp's 16, then of all warps. The barrier also stands between the
        // stores of the chunk before and new tiles.
        constexpr int kWarps = Shape::kGroups * 4;
        float* const sums = reinterpret_cast<float*>(shared_bytes + Shape::kNormSums);  // [2][kWarps][64]
        float* const own = sums + i % 2 * (kWarps * kChunk) + (group * 4 + place.warp()) * kChunk;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float part[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float* const x = &o[half * 16 + j / 2 * 4 + j % 2];
            part[j] = x[0] * x[0] + x[2] * x[2];
          }
          const float sum = sum_columns(part);
          own[half * 32 + sum_token(place.lane())] = sum;
        }
        named_sync(3, Shape::kGroups * kWarpgroup);
        if (stores_o) {
#pragma unroll
          for (int k = 0; k < 4; ++k) store_tokens(out_last, k, &o[k * 8]);
        }
        // Every lane makes the factors of two tokens. They take this warp's place among the sums of the chunk before.
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 x = *reinterpret_cast<const float2*>(&sums[(i % 2 * kWarps + w) * kChunk + place.lane() * 2]);
          sum.x += x.x, sum.y += x.y;
        }
        const float scale = __fdividef(1.f, static_cast<float>(b.columns));
        float* const factors = sums + ((i + 1) % 2 * kWarps + group * 4 + place.warp()) * kChunk;
        *reinterpret_cast<float2*>(&factors[place.lane() * 2]) =
            make_float2(rsqrtf(sum.x * scale + p.norm_eps), rsqrtf(sum.y * scale + p.norm_eps));
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if constexpr (!kSiluEarly) make_silu(k, gate_tile(gate_at.slot) + place.load());
#pragma unroll
          for (int j = 2 * k; j < 2 * k + 2; ++j) {
            const float2 f = *reinterpret_cast<const float2*>(&factors[j * 8 + place.column()]);
            o[4 * j] *= f.x * silu[4 * j], o[4 * j + 1] *= f.y * silu[4 * j + 1];
            o[4 * j + 2] *= f.x * silu[4 * j + 2], o[4 * j + 3] *= f.y * silu[4 * j + 3];
          }
          store_tokens(gate_tile(gate_at.slot), k, &o[k * 8]);
        }
      } else {
        if (row == 0) bulk_wait_read<0>();
        named_sync(1 + group, kWarpgroup);
      }
      if constexpr (!kOutputGate) {
#pragma unroll
        for (int k = 0; k < 4; ++k) store_tokens(out, k, &o[k * 8]);
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
        const auto send = [&](const CUtensorMap& map, uint32_t tile) {
          tma_store_panel(map, tile + place.panel(), b.panel_column(group), chunk_box(b, c));
        };
        if constexpr (kOutputGate) send(maps.y, gate_tile(gate_at.slot));
        if (stores_o) send(out_map, out_last);
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
