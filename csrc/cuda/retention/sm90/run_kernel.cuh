// One run of gated retention (retention/run.h) on Hopper; docs/cuda_retention_hopper.md has the schedule and its
// budget.
//
// A block owns one head of one sequence (or one segment of it) and kBlockV columns of v. Its warpgroups:
//   producer   one warp brings Q, K, V of a chunk by TMA, the others turn the chunk's gates into factors
//   scores     P = (Q K^T) * decays of a chunk, ahead of
//   state      one or two warpgroups, each with 64 columns of v: the state S^T [64, dim_k] stays in their accumulators
//              O^T = row factors * (S^T Q^T) + V^T P^T          S^T = total * S^T + (update factors * V)^T K
// The accumulators of S^T, rounded, are register by register the A operand of S^T Q^T, and V^T read by ldmatrix is the
// A operand of the other two products, so every product has its A in registers and its B as TMA or stmatrix left it.
#pragma once

#include <type_traits>

#include "cuda/retention/sm90/state.cuh"

namespace yoco::cuda::sm90 {

// ---- producer
template <typename Shape>
YOCO_DEVICE void load_tiles(uint32_t shared, const RunBlock& b, const RetentionMaps::Run& maps, bool dots) {
  RingPosition<Shape::kStages> at;
  const int bytes = (b.outputs ? 2 : 1) * Shape::kTileK + (dots ? 2 : 1) * Shape::kTileV;
#pragma unroll 1
  for (int i = b.begin; i < b.end; ++i, at.advance()) {
    const uint32_t tiles = shared + at.slot * Shape::kStageBytes, full = shared + Shape::kFull + at.slot * 8;
    const ChunkBox box = chunk_box(b, b.chunk(i));
    const bool early = Shape::kEarlyQ && b.outputs;
    mbarrier_wait(shared + (early ? Shape::kEmptyQ : Shape::kEmpty) + at.slot * 8, at.parity ^ 1);
    mbarrier_arrive_expect(full, bytes);
    if (b.outputs) {
#pragma unroll
      for (int panel = 0; panel < Shape::kTileK / kPanelBytes; ++panel) {
        tma_load_panel(tiles + panel * kPanelBytes, maps.q, full, panel * 64, box);
      }
    }
    if (early) mbarrier_wait(shared + Shape::kEmpty + at.slot * 8, at.parity ^ 1);
#pragma unroll
    for (int panel = 0; panel < Shape::kTileK / kPanelBytes; ++panel) {
      tma_load_panel(tiles + Shape::kK + panel * kPanelBytes, maps.k, full, panel * 64, box);
    }
#pragma unroll
    for (int panel = 0; panel < Shape::kGroups; ++panel) {
      const int offset = panel * kPanelBytes, column = b.panel_column(panel);
      tma_load_panel(tiles + Shape::kV + offset, maps.v, full, column, box);
      if (dots) tma_load_panel(tiles + Shape::kX + offset, maps.x, full, column, box);
    }
  }
}

template <typename T, typename Shape>
YOCO_DEVICE void load_chunk_gates(uint32_t shared, const RunBlock& b, const RetentionGrid& p, const RetentionRun& run,
                                  ChunkGates* gates) {
  // Row r of the tiles is token r of the chunk in both directions; backwards, the run visits row 63 first.
  const int flip = b.reverse ? kChunk - 1 : 0;
  const auto read = [&](int i) {
    const RunBlock::Chunk c = b.chunk(i);
    const int64_t first = b.batch * p.g.batch_stride + b.head * p.g.head_stride + (c.end - c.count) * p.g.time_stride;
    return load_gates<T>(p.g.data, first, p.g.time_stride, c.count, p.gate_format, flip);
  };
  // The scan is a chain of about 1,600 cycles, so the warps take chunks in turn. No more of them than stages: a warp
  // that is two rounds ahead of a barrier would take the phase before for the one it waits for.
  constexpr int kWarps = Shape::kStages < 3 ? Shape::kStages : 3;
  const int own = threadIdx.x / 32 - 1;
  if (own >= kWarps) return;
  RingPosition<Shape::kStages> at;
  const auto skip = [&](int chunks) {
    for (int j = 0; j < chunks; ++j) at.advance();
  };
  skip(own);
  float2 next = b.begin + own < b.end ? read(b.begin + own) : make_float2(0.f, 0.f);
#pragma unroll 1
  for (int i = b.begin + own; i < b.end; i += kWarps, skip(kWarps)) {
    const float2 g = next;
    if (i + kWarps < b.end) next = read(i + kWarps);
    mbarrier_wait(shared + Shape::kEmpty + at.slot * 8, at.parity ^ 1);
    scan_gates(gates[at.slot], g, !b.reverse, run.row_scale, run.update_scale, flip);
    if constexpr (Shape::kRotary) write_angles<Shape>(shared, at.slot, b, b.chunk(i));
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared + Shape::kFull + at.slot * 8);
  }
}

// ---- scores
template <typename T, int kDimK, int kBlockV, typename Shape>
YOCO_DEVICE void make_scores(uint32_t shared, const RunBlock& b, const ChunkGates* gates) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, lane_row = lane / 4, lane_col = lane % 4 * 2;
  // Where this lane points stmatrix in the 16 x 64 rows of its warp, columns 0-15: matrices (rows 0-7, 8-15) x (columns
  // 0-7, 8-15).
  const auto store_at = [] {
    const int thread = thread_index<Shape::kOutputGate && Shape::kOpaqueThread>(), row = thread / 32 % 4 * 16,
              lane = thread % 32;
    return (row + lane % 16) * 128 + (((lane / 16) ^ (lane & 7)) << 4);
  };
  ChunkRings<Shape> rings;
  for (int i = b.begin; i < b.end; ++i, rings.advance()) {
    const auto at = rings.stage(i - b.begin);
    const auto to = rings.scores(i - b.begin);
    const uint32_t tiles = shared + at.slot * Shape::kStageBytes;
    mbarrier_wait(shared + Shape::kFull + at.slot * 8, at.parity);
    if constexpr (Shape::kRotary) {
      turn_stage<T, kDimK, kBlockV, Shape>(shared, b, at.slot);
      mbarrier_wait(shared + Shape::kTilesTurned + at.slot * 8, at.parity);
    }
    const uint64_t q = descriptor_k(tiles), k = descriptor_k(tiles + Shape::kK);
    float s[32];
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDimK / 16; ++d) {
      const int step = d / 4 * kPanelBytes + d % 4 * 32;
      wgmma<T, Major::K, Major::K>(s, descriptor_at(q, step), descriptor_at(k, step), d > 0);
    }
    wgmma_commit();

    const float scale = b.score_scale;
    const ChunkGates& gate = gates[at.slot];
    const float2 b_i[2] = {gate.sum[warp * 16 + lane_row], gate.sum[warp * 16 + lane_row + 8]};
    const float2 b_r = gate.sum[warp * 16 + (b.reverse ? 15 : 0)];
    const float row[2] = {scale * decay_between(b_i[0], b_r), scale * decay_between(b_i[1], b_r)};
    mbarrier_wait(shared + Shape::kScoresEmpty + to.slot * 8, to.parity ^ 1);
    const uint32_t tile = shared + Shape::kScores + to.slot * kPanelBytes + store_at();
    wgmma_wait<0>();
    pin_registers(s);
    // Decays 2^(b_i - b_j) where row i sees column j (elsewhere they would overflow). Away from the diagonal they are
    // 2^(b_i - b_r) 2^(b_r - b_j) with r the row of this warp that comes first in time: between i and j, so neither
    // overflows, and the second factor is shared by the rows.
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      float* const x = &s[block * 8];
      const float2* const b_j = &gate.sum[block * 16 + lane_col];
      if (block == warp) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int column = e / 4 * 8 + e % 2, own = lane_row + e / 2 % 2 * 8;
          const float decay = scale * decay_between(b_i[e / 2 % 2], b_j[column]);
          x[e] = (b.reverse ? lane_col + column >= own : lane_col + column <= own) ? x[e] * decay : 0.f;
        }
      } else if (b.reverse ? block > warp : block < warp) {
        const float decay[4] = {decay_between(b_r, b_j[0]), decay_between(b_r, b_j[1]), decay_between(b_r, b_j[8]),
                                decay_between(b_r, b_j[9])};
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] *= row[e / 2 % 2] * decay[e / 4 * 2 + e % 2];
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = 0.f;
      }
      stmatrix_x4(tile ^ (block << 5),
                  {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])});
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(shared + Shape::kScoresFull + to.slot * 8);
      mbarrier_arrive(shared + Shape::kEmpty + at.slot * 8);
      if constexpr (Shape::kEarlyQ) mbarrier_arrive(shared + Shape::kEmptyQ + at.slot * 8);
    }
  }
}

// Without outputs there are no scores, but what goes into the state turns.
template <typename T, int kDimK, int kBlockV, typename Shape>
YOCO_DEVICE void turn_only(uint32_t shared, const RunBlock& b) {
  RingPosition<Shape::kStages> at;
  for (int i = b.begin; i < b.end; ++i, at.advance()) {
    mbarrier_wait(shared + Shape::kFull + at.slot * 8, at.parity);
    turn_stage<T, kDimK, kBlockV, Shape>(shared, b, at.slot);
  }
}

// ---- kernel
template <typename T, int kDimK, int kBlockV, bool kBackward, bool kRotary, bool kOutputGate>
__global__ void __launch_bounds__(RunShape<kDimK, kBlockV, kBackward, kRotary, kOutputGate>::kThreads,
                                  RunShape<kDimK, kBlockV, kBackward, kRotary, kOutputGate>::kBlocksPerSM)
    retention_run_kernel(const __grid_constant__ RetentionGrid p, const __grid_constant__ RetentionMaps maps) {
  using Shape = RunShape<kDimK, kBlockV, kBackward, kRotary, kOutputGate>;
  RunItem item = run_item(p, kBlockV);
  if constexpr (kOutputGate) item.run = 0;  // known to the compiler: parameters at fixed places
  const RetentionRun& run = p.runs[item.run];
  if (item.columns <= 0) return;
  if (item.n == p.num_sequences) {
    zero_tail<T, Shape::kThreads>(p, item);
    if constexpr (kOutputGate) zero_tail<T, Shape::kThreads>(p, item, p.y);
    return;
  }
  const RetentionSequence seq = retention_sequence(p, item.n);
  const int64_t num_chunks = chunks_of(seq.length), segments = segments_of(num_chunks, p.segments);
  if (item.segment >= segments || (p.states_only && item.segment == segments - 1)) return;
  const KeyRange range = segment_chunks(num_chunks, segments, item.segment);
  extern __shared__ uint8_t shared_raw[];
  const uint32_t shared = (shared_address(shared_raw) + 1023) / 1024 * 1024;
  uint8_t* const shared_bytes = shared_raw + (shared - shared_address(shared_raw));
  __shared__ RunBlock b;
  if (threadIdx.x == 0) {
    b.n = static_cast<int>(item.n), b.head = static_cast<int>(item.head), b.segment = item.segment;
    b.block_v = item.block_v, b.column = item.column, b.columns = item.columns, b.panel_stride = 64;
    b.batch = static_cast<int>(seq.batch), b.first_token = static_cast<int>(seq.begin);
    b.length = static_cast<int>(seq.length);
    b.num_chunks = static_cast<int>(num_chunks), b.segments = static_cast<int>(segments);
    b.begin = static_cast<int>(range.begin), b.end = static_cast<int>(range.end);
    b.tiles = shared;
    b.score_scale = run.score_scale;
    b.reverse = run.reverse, b.outputs = !p.states_only, b.packed = p.cu_seqlens != nullptr;
    if constexpr (kBackward) {
      const int64_t slot = first_group_slot(p, item.n, seq.begin);
      for (int part = 0; part < Shape::kGroups; ++part) {
        const int64_t part_head = (item.column / 64 + part) * p.heads + item.head;
        b.dots[part] = run.dots + (part_head * p.batch + seq.batch) * p.time;
        b.boundary[part] = run.boundary + part_head * group_slots(p) + slot;
      }
      b.anchor_states = run.group_states + ((slot * p.heads + item.head) * p.blocks_v + item.block_v) * kDimK * kBlockV;
      b.anchor_stride = p.heads * p.blocks_v;
    }
    if constexpr (kRotary) set_turning<kBlockV>(b, p.rotary, run);
  }
  if constexpr (kRotary) write_turn_steps<Shape>(shared_bytes, p.rotary, run.rotate_v);
  ChunkGates* const gates = reinterpret_cast<ChunkGates*>(shared_bytes + Shape::kGates);
  if (threadIdx.x == 0) {
    const int state_warps = 4 * Shape::kGroups;
    for (int s = 0; s < Shape::kStages; ++s) {
      mbarrier_init(shared + Shape::kFull + s * 8, 2);  // tiles, gates
      mbarrier_init(shared + Shape::kEmpty + s * 8, state_warps + (p.states_only ? 0 : 4));
      if (Shape::kEarlyQ) mbarrier_init(shared + Shape::kEmptyQ + s * 8, state_warps + 4);
    }
    for (int s = 0; s < Shape::kScoreStages; ++s) {
      mbarrier_init(shared + Shape::kScoresFull + s * 8, 4);
      mbarrier_init(shared + Shape::kScoresEmpty + s * 8, state_warps);
    }
    if constexpr (kRotary) {
      for (int s = 0; s < Shape::kStages; ++s) {
        mbarrier_init(shared + Shape::kTilesTurned + s * 8, turning_warps<Shape>(run.rotate_v));
      }
    }
    if constexpr (kOutputGate) {
      for (int s = 0; s < Shape::kOutTiles * Shape::kGroups; ++s) mbarrier_init(shared + Shape::kGateFull + s * 8, 1);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    give_registers<Shape::kLoadRegisters>();
    if (threadIdx.x / 32 == 0) {
      if (threadIdx.x == 0)
        load_tiles<Shape>(shared, b, maps.runs[item.run], kBackward && !p.states_only && run.x.data != nullptr);
    } else {
      load_chunk_gates<T, Shape>(shared, b, p, run, gates);
    }
  } else if (warpgroup == 1) {
    give_registers<Shape::kScoreRegisters>();
    if (!p.states_only) {
      make_scores<T, kDimK, kBlockV, Shape>(shared, b, gates);
    } else if constexpr (kRotary) {
      turn_only<T, kDimK, kBlockV, Shape>(shared, b);
    }
  } else {
    take_registers<Shape::kStateRegisters>();
    const int group = Shape::kGroups == 1 ? 0 : warpgroup - 2;
    const StateOwner<kDimK, Shape> owner{group, group * kWarpgroup + static_cast<int>(threadIdx.x % kWarpgroup)};
    const CUtensorMap& out = maps.runs[item.run].o;
    float state[kDimK / 2], decay;
    load_state(state, owner, b, p, run);
    if (p.states_only) {
      decay = carry_state<T, kDimK, false, false, Shape>(state, shared, shared_bytes, b, out, p, maps);
    } else if (kBackward && run.x.data != nullptr) {
      decay = carry_state<T, kDimK, true, kBackward, Shape>(state, shared, shared_bytes, b, out, p, maps);
    } else {
      decay = carry_state<T, kDimK, true, false, Shape>(state, shared, shared_bytes, b, out, p, maps);
    }
    store_state(state, decay, owner, b, p, run);
  }
}

}  // namespace yoco::cuda::sm90

namespace yoco::cuda {

template <typename T, int kDimK, int kBlockV, bool kBackward>
const char* launch_retention_sm90(const RetentionGrid& p, const RetentionMaps& maps, const Launch& launch) {
  const int64_t blocks = run_blocks(p);
  if (blocks > INT32_MAX) return "gated_retention: more than 2^31 blocks";
  const auto launch_as = [&](auto rotary, auto output_gate) {
    using Shape = sm90::RunShape<kDimK, kBlockV, kBackward, rotary, output_gate>;
    return launch_kernel(sm90::retention_run_kernel<T, kDimK, kBlockV, kBackward, rotary, output_gate>,
                         dim3(static_cast<unsigned>(blocks)), Shape::kThreads, Shape::kBytes, launch, p, maps);
  };
  const auto run = [&](auto rotary) {
    if constexpr (!kBackward && norm_fuses({kDimK, kBlockV}, 0)) {
      if (p.output_gate.data != nullptr) return launch_as(rotary, std::true_type{});
    }
    return launch_as(rotary, std::false_type{});
  };
  return p.rotary.inv_freq != nullptr ? run(std::true_type{}) : run(std::false_type{});
}

#define YOCO_RETENTION_SM90_INSTANCES(T, kDimK, kBlockV)                                                           \
  template const char* launch_retention_sm90<T, kDimK, kBlockV, false>(const RetentionGrid&, const RetentionMaps&, \
                                                                       const Launch&);                             \
  template const char* launch_retention_sm90<T, kDimK, kBlockV, true>(const RetentionGrid&, const RetentionMaps&,  \
                                                                      const Launch&);

}  // namespace yoco::cuda
