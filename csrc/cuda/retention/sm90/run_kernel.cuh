// One run of gated retention (retention/run.h) on Hopper; docs/cuda_retention_hopper.md has the schedule and its
// budget.
//
// A block owns one head of one sequence (or one segment of it) and kBlockV columns of v. Its warpgroups:
//   producer   one warp brings Q, K, V of a chunk by TMA, another turns the chunk's gates into factors
//   scores     P = (Q K^T) * decays of a chunk, ahead of
//   state      one or two warpgroups, each with 64 columns of v: the state S^T [64, dim_k] stays in their accumulators
//              O^T = row factors * (S^T Q^T) + V^T P^T          S^T = total * S^T + (update factors * V)^T K
// The accumulators of S^T, rounded, are register by register the A operand of S^T Q^T, and V^T read by ldmatrix is the
// A operand of the other two products, so every product has its A in registers and its B as TMA or stmatrix left it.
#pragma once

#include "cuda/retention/sm90/block.cuh"

namespace yoco::cuda::sm90 {

// ---- producer
// --------------------------------------------------------------------------------------------------------
template <typename Shape>
YOCO_DEVICE void load_tiles(const RunBlock& b, const RetentionMaps::Run& maps) {
  RingPosition<Shape::kStages> at;
  const int bytes = (b.outputs ? 2 : 1) * Shape::kTileK + Shape::kTileV;
#pragma unroll 1
  for (int i = b.begin; i < b.end; ++i, at.advance()) {
    const uint32_t tiles = b.shared + at.slot * Shape::kStageBytes, full = b.shared + Shape::kFull + at.slot * 8;
    const RunBlock::Chunk c = b.chunk(i);
    mbarrier_wait(b.shared + Shape::kEmpty + at.slot * 8, at.parity ^ 1);
    mbarrier_arrive_expect(full, bytes);
#pragma unroll
    for (int panel = 0; panel < Shape::kTileK / kPanelBytes; ++panel) {
      const int offset = panel * kPanelBytes, column = panel * 64;
      if (b.outputs) tma_load_panel(tiles + offset, maps.q, full, column, b, c);
      tma_load_panel(tiles + Shape::kK + offset, maps.k, full, column, b, c);
    }
#pragma unroll
    for (int panel = 0; panel < Shape::kGroups; ++panel) {
      tma_load_panel(tiles + Shape::kV + panel * kPanelBytes, maps.v, full, b.column + panel * 64, b, c);
    }
  }
}

template <typename T, typename Shape>
YOCO_DEVICE void load_chunk_gates(const RunBlock& b, const RetentionGrid& p, const RetentionRun& run,
                                  ChunkGates* gates) {
  // Row r of the tiles is token r of the chunk in both directions; backwards, the run visits row 63 first.
  const int flip = b.reverse ? kChunk - 1 : 0;
  const auto read = [&](int i) {
    const RunBlock::Chunk c = b.chunk(i);
    const int64_t first = b.batch * p.g.batch_stride + b.head * p.g.head_stride + (c.end - c.count) * p.g.time_stride;
    return load_gates<T>(p.g.data, first, p.g.time_stride, c.count, p.gate_is_float, flip);
  };
  RingPosition<Shape::kStages> at;
  float2 next = b.begin < b.end ? read(b.begin) : make_float2(0.f, 0.f);
#pragma unroll 1
  for (int i = b.begin; i < b.end; ++i, at.advance()) {
    const float2 g = next;
    if (i + 1 < b.end) next = read(i + 1);
    mbarrier_wait(b.shared + Shape::kEmpty + at.slot * 8, at.parity ^ 1);
    scan_gates(gates[at.slot], g, !b.reverse, run.row_scale, run.update_scale, flip);
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(b.shared + Shape::kFull + at.slot * 8);
  }
}

// ---- scores
// ----------------------------------------------------------------------------------------------------------
template <typename T, int kDimK, typename Shape>
YOCO_DEVICE void make_scores(const RunBlock& b, float scale, const ChunkGates* gates) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, lane_row = lane / 4, lane_col = lane % 4 * 2;
  // Where this lane points stmatrix in the 16 x 64 rows of its warp, columns 0-15: matrices (rows 0-7, 8-15) x (columns
  // 0-7, 8-15).
  const int row = warp * 16 + lane % 16;
  const uint32_t store_at = row * 128 + (((lane / 16) ^ (lane & 7)) << 4);
  RingPosition<Shape::kStages> at;
  RingPosition<Shape::kScoreStages> to;
  for (int i = b.begin; i < b.end; ++i, at.advance(), to.advance()) {
    const uint32_t tiles = b.shared + at.slot * Shape::kStageBytes;
    mbarrier_wait(b.shared + Shape::kFull + at.slot * 8, at.parity);
    const uint64_t q = descriptor_k(tiles), k = descriptor_k(tiles + Shape::kK);
    float s[32];
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kDimK / 16; ++d) {
      const uint64_t step = descriptor_step(d / 4 * kPanelBytes + d % 4 * 32);
      wgmma<T, Major::K, Major::K>(s, q + step, k + step, d > 0);
    }
    wgmma_commit();

    // Meanwhile the decays, for the blocks of 16 x 16 on the visible side of the diagonal.
    const ChunkGates& gate = gates[at.slot];
    const float2 b_i[2] = {gate.sum[warp * 16 + lane_row], gate.sum[warp * 16 + lane_row + 8]};
    float decay[32];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const bool seen = b.reverse ? block >= warp : block <= warp;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float(&d)[32] = decay;
        const int first = block * 8 + j * 4;
        if (seen) {
          const float4 b_j = *reinterpret_cast<const float4*>(&gate.sum[block * 16 + j * 8 + lane_col]);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            d[first + e] =
                scale * decay_between(b_i[e / 2], e % 2 == 0 ? make_float2(b_j.x, b_j.y) : make_float2(b_j.z, b_j.w));
          }
        } else {
          d[first] = d[first + 1] = d[first + 2] = d[first + 3] = 0.f;
        }
      }
    }
    wgmma_wait<0>();
    pin_registers(s);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(b.shared + Shape::kEmpty + at.slot * 8);
#pragma unroll
    for (int e = 0; e < 32; ++e) {
      const int column = e / 4 * 8 + lane_col + e % 2, own = warp * 16 + lane_row + e / 2 % 2 * 8;
      s[e] = (b.reverse ? column >= own : column <= own) ? s[e] * decay[e] : 0.f;
    }
    mbarrier_wait(b.shared + Shape::kScoresEmpty + to.slot * 8, to.parity ^ 1);
    const uint32_t tile = b.shared + Shape::kScores + to.slot * kPanelBytes + store_at;
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const float* const v = &s[block * 8];
      stmatrix(tile ^ (block << 5), pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]),
               pack2<T>(v[6], v[7]));
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(b.shared + Shape::kScoresFull + to.slot * 8);
  }
}

// ---- state
// ----------------------------------------------------------------------------------------------------------- Warpgroup
// `group` has columns [64 group, 64 group + 64) of the block's columns of v.
template <typename T, int kDimK, bool kOutputs, typename Shape>
YOCO_DEVICE void carry_state(const RunBlock& b, const RetentionGrid& p, const RetentionRun& run,
                             const RetentionMaps::Run& maps, const ChunkGates* gates, int group) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, lane_row = lane / 4, lane_col = lane % 4 * 2;
  const int thread = group * kWarpgroup + threadIdx.x % kWarpgroup;  // of all that hold the state
  constexpr int kThreads = Shape::kGroups * kWarpgroup, kStateSize = kThreads * kDimK / 2;

  // state[4 j + e]: columns (of v) 64 group + 16 warp + lane_row and + 8 for e / 2 = 1; rows (of k) 8 j + lane_col,
  // + 1.
  float state[kDimK / 2];
  const int64_t own_state = (b.n * p.heads + b.head) * run.dim_k * run.dim_v;
  const int64_t own_segments = ((b.n * p.heads + b.head) * p.blocks_v + b.block_v) * (p.segments - 1);
  const auto for_state = [&](auto&& f) {  // f(value, offset in [dim_k, dim_v])
#pragma unroll
    for (int j = 0; j < kDimK / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * j + lane_col + e % 2, col = group * 64 + warp * 16 + lane_row + e / 2 * 8;
        if (row < run.dim_k && col < b.columns) {
          f(state[4 * j + e], own_state + row * run.state_stride_k + (b.column + col) * run.state_stride_v);
        }
      }
    }
  };
#pragma unroll
  for (int j = 0; j < kDimK / 2; ++j) state[j] = 0.f;
  if (b.segment > 0) {
    if constexpr (kOutputs) {
      const float4* from =
          reinterpret_cast<const float4*>(run.segment_states + (own_segments + b.segment - 1) * kStateSize) + thread;
#pragma unroll
      for (int j = 0; j < kDimK / 8; ++j) {
        const float4 v = from[j * kThreads];
        state[4 * j] = v.x, state[4 * j + 1] = v.y, state[4 * j + 2] = v.z, state[4 * j + 3] = v.w;
      }
    }
  } else if (run.state_in != nullptr) {
    for_state([&](float& s, int64_t at) { s = run.state_in[at]; });
  }

  const uint32_t v_at = Shape::kV + group * kPanelBytes + block_offset(lane_offset(), 0, warp * 16);
  // Where this lane points the transposed stmatrix in the tile of O, tokens 0-15: matrices (columns 0-7, 8-15 of this
  // warp's 16) x (tokens 0-7, 8-15).
  const uint32_t out = b.shared + Shape::kOut + group * kPanelBytes;
  const uint32_t out_at = out + (lane / 16 * 8 + lane % 8) * 128 + (((warp * 2 + lane / 8 % 2) ^ (lane & 7)) << 4);
  const bool leader = threadIdx.x % kWarpgroup == 0;
  float segment_decay = 1.f;
  RingPosition<Shape::kStages> at;
  RingPosition<Shape::kScoreStages> from;
  for (int i = b.begin; i < b.end; ++i, at.advance(), from.advance()) {
    const uint32_t tiles = b.shared + at.slot * Shape::kStageBytes;
    const ChunkGates& gate = gates[at.slot];

    // O^T = S^T Q^T, the rounded state as its operand.
    float o[32];
    uint32_t operand[kDimK / 16][4];
    if constexpr (kOutputs) pack_operand<T>(operand, state);
    mbarrier_wait(b.shared + Shape::kFull + at.slot * 8, at.parity);
    if constexpr (kOutputs) {
      const uint64_t q = descriptor_k(tiles);
      wgmma_fence();
#pragma unroll
      for (int d = 0; d < kDimK / 16; ++d) {
        wgmma<T, Major::K>(o, operand[d], q + descriptor_step(d / 4 * kPanelBytes + d % 4 * 32), d > 0);
      }
      wgmma_commit();
    }
    // Meanwhile V^T of this warp, 16 columns by 64 tokens, with the update factors.
    uint32_t update[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t v[4];
      ldmatrix_trans(v, tiles + v_at + k * 16 * 128);
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
    if constexpr (kOutputs) {
      wgmma_wait<0>();
      pin_registers(o);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 f = *reinterpret_cast<const float2*>(&gate.row[j * 8 + lane_col]);
        o[4 * j] *= f.x, o[4 * j + 1] *= f.y, o[4 * j + 2] *= f.x, o[4 * j + 3] *= f.y;
      }
      mbarrier_wait(b.shared + Shape::kScoresFull + from.slot * 8, from.parity);
    }
#pragma unroll
    for (int j = 0; j < kDimK / 2; ++j) state[j] *= total;

    // O^T += V^T P^T, then S^T += (update V)^T K; O leaves while the second runs.
    pin_registers(state);
    wgmma_fence();
    if constexpr (kOutputs) {
      const uint64_t scores = descriptor_k(b.shared + Shape::kScores + from.slot * kPanelBytes);
      const uint64_t values = descriptor_mn(tiles + Shape::kV + group * kPanelBytes, kPanelBytes);
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
      if (lane == 0) mbarrier_arrive(b.shared + Shape::kScoresEmpty + from.slot * 8);
      if (leader) bulk_wait_read<0>();
      named_sync(1 + group, kWarpgroup);  // the tile of O is free
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const x = &o[j * 8];
        stmatrix_trans(out_at + j * 16 * 128, pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                       pack2<T>(x[6], x[7]));
      }
      fence_async_proxy();
      named_sync(1 + group, kWarpgroup);
      if (leader && group * 64 < b.columns) {
        tma_store_panel(maps.o, out, b.column + group * 64, b, b.chunk(i));
        bulk_commit();
      }
    }
    wgmma_wait<0>();
    pin_registers(state);
    if (lane == 0) mbarrier_arrive(b.shared + Shape::kEmpty + at.slot * 8);
  }
  if (leader) bulk_wait<0>();

  // ---- the state behind the last chunk
  // -------------------------------------------------------------------------------
  if (b.segment < b.segments - 1) {
    if constexpr (kOutputs) return;
    float4* to = reinterpret_cast<float4*>(run.segment_states + (own_segments + b.segment) * kStateSize) + thread;
#pragma unroll
    for (int j = 0; j < kDimK / 8; ++j) {
      to[j * kThreads] = make_float4(state[4 * j], state[4 * j + 1], state[4 * j + 2], state[4 * j + 3]);
    }
    if (thread == 0) run.segment_decays[own_segments + b.segment] = segment_decay;
  } else if (run.state_out != nullptr) {
    for_state([&](float& s, int64_t to) { run.state_out[to] = s; });
  }
}

// ---- kernel
// ----------------------------------------------------------------------------------------------------------
template <typename T, int kDimK, int kBlockV, bool kBackward>
__global__ void __launch_bounds__(RunShape<kDimK, kBlockV, kBackward>::kThreads,
                                  RunShape<kDimK, kBlockV, kBackward>::kBlocksPerSM)
    retention_run_kernel(const __grid_constant__ RetentionGrid p, const __grid_constant__ RetentionMaps maps) {
  using Shape = RunShape<kDimK, kBlockV, kBackward>;
  const RunItem item = run_item(p, kBlockV);
  const RetentionRun& run = p.runs[item.run];
  if (item.columns <= 0) return;
  if (item.n == p.num_sequences) {
    zero_tail<T, Shape::kThreads>(p, item);
    return;
  }
  const RetentionSequence seq = retention_sequence(p, item.n);
  const int64_t num_chunks = chunks_of(seq.length), segments = segments_of(num_chunks, p.segments);
  if (item.segment >= segments || (p.states_only && item.segment == segments - 1)) return;
  const KeyRange range = segment_chunks(num_chunks, segments, item.segment);
  RunBlock b;
  b.n = static_cast<int>(item.n), b.head = static_cast<int>(item.head), b.segment = item.segment;
  b.block_v = item.block_v, b.column = item.column, b.columns = item.columns;
  b.batch = static_cast<int>(seq.batch), b.first_token = static_cast<int>(seq.begin);
  b.length = static_cast<int>(seq.length);
  b.num_chunks = static_cast<int>(num_chunks), b.segments = static_cast<int>(segments);
  b.begin = static_cast<int>(range.begin), b.end = static_cast<int>(range.end);
  b.reverse = run.reverse, b.outputs = !p.states_only;

  extern __shared__ uint8_t shared_raw[];
  b.shared = (shared_address(shared_raw) + 1023) / 1024 * 1024;
  ChunkGates* const gates =
      reinterpret_cast<ChunkGates*>(shared_raw + (b.shared - shared_address(shared_raw)) + Shape::kGates);
  if (threadIdx.x == 0) {
    const int state_warps = 4 * Shape::kGroups;
    for (int s = 0; s < Shape::kStages; ++s) {
      mbarrier_init(b.shared + Shape::kFull + s * 8, 2);  // tiles, gates
      mbarrier_init(b.shared + Shape::kEmpty + s * 8, state_warps + (b.outputs ? 4 : 0));
    }
    for (int s = 0; s < Shape::kScoreStages; ++s) {
      mbarrier_init(b.shared + Shape::kScoresFull + s * 8, 4);
      mbarrier_init(b.shared + Shape::kScoresEmpty + s * 8, state_warps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    give_registers<Shape::kLoadRegisters>();
    if (threadIdx.x / 32 == 0) {
      if (threadIdx.x == 0) load_tiles<Shape>(b, maps.runs[item.run]);
    } else if (threadIdx.x / 32 == 1) {
      load_chunk_gates<T, Shape>(b, p, run, gates);
    }
  } else if (warpgroup == 1) {
    give_registers<Shape::kScoreRegisters>();
    if (b.outputs) make_scores<T, kDimK, Shape>(b, run.score_scale, gates);
  } else {
    take_registers<Shape::kStateRegisters>();
    const int group = Shape::kGroups == 1 ? 0 : warpgroup - 2;
    if (b.outputs) {
      carry_state<T, kDimK, true, Shape>(b, p, run, maps.runs[item.run], gates, group);
    } else {
      carry_state<T, kDimK, false, Shape>(b, p, run, maps.runs[item.run], gates, group);
    }
  }
}

}  // namespace yoco::cuda::sm90

namespace yoco::cuda {

template <typename T, int kDimK, int kBlockV, bool kBackward>
const char* launch_retention_sm90(const RetentionGrid& p, const RetentionMaps& maps, const Launch& launch) {
  using Shape = sm90::RunShape<kDimK, kBlockV, kBackward>;
  const int64_t blocks = run_blocks(p);
  if (blocks > INT32_MAX) return "gated_retention: more than 2^31 blocks";
  return launch_kernel(sm90::retention_run_kernel<T, kDimK, kBlockV, kBackward>, dim3(static_cast<unsigned>(blocks)),
                       Shape::kThreads, Shape::kBytes, launch, p, maps);
}

#define YOCO_RETENTION_SM90_INSTANCE(T, kDimK, kBlockV)                                                            \
  template const char* launch_retention_sm90<T, kDimK, kBlockV, false>(const RetentionGrid&, const RetentionMaps&, \
                                                                       const Launch&);

}  // namespace yoco::cuda
