// One run of gated retention (run.h) on tensor cores; docs/cuda_retention.md has the schedule and its budget.
//
// A block owns one head of one sequence (or one segment of it) and kBlockV columns of v; each warp keeps its 16 columns
// of the state S^T [16, dim_k] in float32 registers for the whole sequence. Accumulators of S^T are, lane by lane, the
// B operand of Q S, so the state never passes through shared memory. Per chunk of 64 tokens:
//   P = (Q K^T) * decays               the 10 blocks of 16 x 16 on and below the diagonal, dealt out to the warps
//   O = row factors * (Q S) + P V      each warp its 16 columns
//   S = total * S + (update factors * V)^T K
// while cp.async brings the next chunk. kBackward adds what the gate gradient needs, kRotary turns tiles in shared
// memory between their arrival and their use, kOutputGate ends with the norm over the columns and the output gate.
#pragma once

#include <type_traits>

#include "cuda/core/activation.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/retention/item.cuh"
#include "cuda/retention/rotate.cuh"

namespace yoco::cuda {

template <int kDimK, int kBlockV, bool kBackward, bool kRotary, bool kOutputGate>
struct RunShape {
  static constexpr int kWarps = kBlockV / 16, kThreads = kWarps * 32;
  // Where shared memory has room for two blocks with an output gate: for three ptxas would spill. 0: its own choice.
  static constexpr int kBlocksPerSM = kOutputGate && kDimK == 64 ? 2 : 0;
  // Q is free after half of a chunk's work: with dim_k = 256 its next chunk waits for that, so that all fits 163 KB.
  static constexpr int kStagesQ = kDimK <= 128 ? 2 : 1;
  static constexpr int kTileK = kDimK / 64 * kPanelBytes, kTileV = kBlockV / 64 * kPanelBytes;
  // Shared memory: Q, K, V stages, X or the output gate (needed late in a chunk, one stage), P, then the small arrays.
  static constexpr int kK = kStagesQ * kTileK, kV = kK + 2 * kTileK, kX = kV + 2 * kTileV;
  static constexpr int kP = kX + (kBackward || kOutputGate ? kTileV : 0);
  static constexpr int kGates = kP + kPanelBytes;
  static constexpr int kDots = kGates + 2 * static_cast<int>(sizeof(ChunkGates));
  // Per pair of columns: turns per position, and the angles of two chunks.
  static constexpr int kTurns = kDots + (kBackward ? 1 : kOutputGate ? 2 : 0) * kWarps * kChunk * 4;
  static constexpr int kAngles = kTurns + kDimK / 2 * 8;
  static constexpr int kAngleSlots = angle_slot(kDimK / 2);
  static constexpr int kBytes = (kRotary ? kAngles + 2 * kAngleSlots * 8 : kTurns) + 128;  // + alignment
};

// Block k of the ten 16 x 16 blocks on and below the diagonal, the long rows first.
YOCO_DEVICE int score_row(int k) { return k < 4 ? 3 : k < 7 ? 2 : k < 9 ? 1 : 0; }
YOCO_DEVICE int score_col(int k) { return k < 4 ? k : k < 7 ? k - 4 : k < 9 ? k - 7 : 0; }

template <typename T, int kDimK, int kBlockV, bool kBackward, bool kRotary, bool kOutputGate>
__global__ void __launch_bounds__(RunShape<kDimK, kBlockV, kBackward, kRotary, kOutputGate>::kThreads,
                                  RunShape<kDimK, kBlockV, kBackward, kRotary, kOutputGate>::kBlocksPerSM)
    retention_run_kernel(const __grid_constant__ RetentionGrid p) {
  using Shape = RunShape<kDimK, kBlockV, kBackward, kRotary, kOutputGate>;
  constexpr int kThreads = Shape::kThreads, kWarps = Shape::kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, lane_row = lane / 4, lane_col = lane % 4 * 2;

  // ---- which work
  RunItem item = run_item(p, kBlockV);
  if constexpr (kOutputGate) item.run = 0;  // known to the compiler: parameters at fixed places
  const RetentionRun& run = p.runs[item.run];
  const int64_t head = item.head, n = item.n;
  const int block_v = item.block_v, column = item.column, columns = item.columns, segment = item.segment;
  if (columns <= 0) return;
  if (n == p.num_sequences) {
    zero_tail<T, kThreads>(p, item);
    if constexpr (kOutputGate) zero_tail<T, kThreads>(p, item, p.y);
    return;
  }
  const RetentionSequence seq = retention_sequence(p, n);
  const int64_t num_chunks = chunks_of(seq.length);
  const int segments = static_cast<int>(segments_of(num_chunks, p.segments));
  if (segment >= segments || (p.states_only && segment == segments - 1)) return;
  const KeyRange range = segment_chunks(num_chunks, segments, segment);  // in the order of this run
  const bool reverse = run.reverse, vectors = p.vectors, outputs = !p.states_only;

  extern __shared__ uint8_t shared_raw[];
  const uint32_t shared = (shared_address(shared_raw) + 127) / 128 * 128;
  uint8_t* const shared_bytes = shared_raw + (shared - shared_address(shared_raw));
  ChunkGates* const gates = reinterpret_cast<ChunkGates*>(shared_bytes + Shape::kGates);
  // [kWarps][kChunk] sums over a warp's columns: X . O, or O . O and then, in the same form, the norm's factors.
  float* const dots = reinterpret_cast<float*>(shared_bytes + Shape::kDots);

  // ---- rows of a chunk
  const auto chunk_of = [&](int64_t i) { return reverse ? num_chunks - 1 - i : i; };
  const auto rows_of = [&](int64_t c) { return static_cast<int>(min(int64_t(kChunk), seq.length - c * kChunk)); };
  const auto rows = [&](const View& view, int64_t c, int64_t first_column) {
    const int count = rows_of(c);
    const int64_t token = seq.begin + c * kChunk + (reverse ? count - 1 : 0);
    T* first = static_cast<T*>(view.data) + seq.batch * view.batch_stride + head * view.head_stride +
               token * view.time_stride + first_column;
    return ChunkRows<T>{first, reverse ? -view.time_stride : view.time_stride, count};
  };
  const auto read_gates = [&](int64_t c) {
    const int count = rows_of(c);
    const int64_t token = seq.begin + c * kChunk + (reverse ? count - 1 : 0);
    const int64_t first = seq.batch * p.g.batch_stride + head * p.g.head_stride + token * p.g.time_stride;
    return load_gates<T>(p.g.data, first, reverse ? -p.g.time_stride : p.g.time_stride, count, p.gate_format);
  };
  // Where a column of a tile lies, from the first one on: in order, but for what turns.
  const auto place_k = [&](int col) {
    if constexpr (kRotary) return run.rotate_v ? col : p.order.column(col);
    return col;
  };
  const auto place_v = [&](int col) {
    if constexpr (kRotary && kBackward) return run.rotate_v ? p.order.column(column + col) - column : col;
    return col;
  };
  const auto load_q = [&](int64_t c, int stage) {
    if (!outputs) return;
    load_tile<kDimK, kThreads>(shared + stage * Shape::kTileK, rows(run.q, c, 0), run.dim_k, vectors, place_k);
  };
  const auto load_kv = [&](int64_t c, int stage) {
    load_tile<kDimK, kThreads>(shared + Shape::kK + stage * Shape::kTileK, rows(run.k, c, 0), run.dim_k, vectors,
                               place_k);
    load_tile<kBlockV, kThreads>(shared + Shape::kV + stage * Shape::kTileV, rows(run.v, c, column), columns, vectors,
                                 place_v);
  };

  // ---- rotary
  [[maybe_unused]] uint64_t* const turns = reinterpret_cast<uint64_t*>(shared_bytes + Shape::kTurns);
  [[maybe_unused]] PairAngle* const angles = reinterpret_cast<PairAngle*>(shared_bytes + Shape::kAngles);
  [[maybe_unused]] const auto make_angles = [&](int64_t c, int stage) {
    if (threadIdx.x >= kDimK / 2) return;  // the others make those of a pair each
    const int64_t offset = p.rotary.offsets == nullptr ? 0 : p.rotary.offsets[n];
    const int64_t position = offset + c * kChunk + (reverse ? rows_of(c) - 1 : 0);
    angles[stage * Shape::kAngleSlots + angle_slot(threadIdx.x)] = chunk_angle(turns[threadIdx.x], position, reverse);
  };
  if constexpr (kRotary) {
    if (threadIdx.x < kDimK / 2) {
      turns[threadIdx.x] =
          threadIdx.x < p.rotary.dim / 2 ? turns_per_position(p.rotary.inv_freq[threadIdx.x]) : 0;  // 0: stays as it is
    }
    if (range.begin < range.end) make_angles(chunk_of(range.begin), 0);  // the thread's own pair
  }
  // Tiles of kBlockV columns of the turned dimension.
  [[maybe_unused]] const auto turn_v = [&](uint32_t tile, int stage, float sign) {
    turn_tiles<T, kBlockV, kThreads>({tile}, angles + stage * Shape::kAngleSlots + angle_slot(column / 2),
                                     static_cast<int>(p.rotary.dim / 2) - column / 2, p.order.shift == 0, sign);
  };

  // ---- first chunk on its way, and the state before it
  float2 next_gates;
  if (range.begin < range.end) {
    load_q(chunk_of(range.begin), 0);
    load_kv(chunk_of(range.begin), 0);
    if (warp == kWarps - 1) {
      scan_gates(gates[0], read_gates(chunk_of(range.begin)), !reverse, run.row_scale, run.update_scale);
    }
  }
  cp_async_commit();

  // state[j]: columns (of v) 16 warp + lane_row and + 8 in halves 0, 1 and 2, 3; rows (of k) 8 j + lane_col, + 1.
  constexpr int kStateTiles = kDimK / 8;
  float state[kStateTiles][4];
  const int64_t own_state = (n * p.heads + head) * run.dim_k * run.dim_v;
  const int64_t own_segments = ((n * p.heads + head) * p.blocks_v + block_v) * (p.segments - 1);
  const auto for_state = [&](auto&& f) {  // f(value, offset in [dim_k, dim_v])
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * j + lane_col + e % 2, col = warp * 16 + lane_row + e / 2 * 8;
        if (row < run.dim_k && col < columns) {
          f(state[j][e], own_state + place_k(row) * run.state_stride_k + (column + place_v(col)) * run.state_stride_v);
        }
      }
    }
  };
#pragma unroll
  for (int j = 0; j < kStateTiles; ++j) state[j][0] = state[j][1] = state[j][2] = state[j][3] = 0.f;
  if (segment > 0) {
    if (outputs) {
      const float4* from =
          reinterpret_cast<const float4*>(run.segment_states + (own_segments + segment - 1) * (kDimK * kBlockV));
#pragma unroll
      for (int j = 0; j < kStateTiles; ++j) {
        const float4 v = from[j * kThreads + threadIdx.x];
        state[j][0] = v.x, state[j][1] = v.y, state[j][2] = v.z, state[j][3] = v.w;
      }
    }
  } else if (run.state_in != nullptr) {
    for_state([&](float& s, int64_t at) { s = run.state_in[at]; });
  }

  // Sums over the warps of the dots of the chunk before; the same order every time.
  const auto write_dots = [&](int64_t c) {
    const int count = rows_of(c);
    if (threadIdx.x < kChunk && threadIdx.x < count) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += dots[w * kChunk + threadIdx.x];
      const int64_t token = seq.begin + c * kChunk + (reverse ? count - 1 - threadIdx.x : threadIdx.x);
      run.dots[(block_v * p.heads + head) * (p.batch * p.time) + seq.batch * p.time + token] = sum;
    }
  };

  // The state before the anchor of every group of chunks: dq's run leaves it (before the chunk), dk's multiplies it
  // with its own state, the gradient (behind the chunk, which is the same place).
  const bool has_x = kBackward && outputs && run.x.data != nullptr;
  const auto group_state = [&](int64_t group) {
    const int64_t slot = first_group_slot(p, n, seq.begin) + group;
    return reinterpret_cast<float4*>(run.group_states) +
           ((slot * p.heads + head) * p.blocks_v + block_v) * (kStateTiles * kThreads) + threadIdx.x;
  };
  const auto save_state = [&](int64_t group) {
    float4* const at = group_state(group);
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
      if (reverse) {
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(at + j * kThreads));
      } else {
        at[j * kThreads] = make_float4(state[j][0], state[j][1], state[j][2], state[j][3]);
      }
    }
  };
  const auto dot_state = [&](int64_t group) {
    __shared__ float warp_sums[kWarps];
    const float4* const at = group_state(group);
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
      const float4 s = at[j * kThreads];
      sum += s.x * state[j][0] + s.y * state[j][1] + s.z * state[j][2] + s.w * state[j][3];
    }
    sum = block_sum<kThreads>(sum, warp_sums);
    const int64_t slot = first_group_slot(p, n, seq.begin) + group;
    if (threadIdx.x == 0) run.boundary[(block_v * p.heads + head) * group_slots(p) + slot] = sum;
  };

  // ---- chunks
  const uint32_t lane_at = lane_offset();
  const uint32_t tile_p = shared + Shape::kP, tile_x = shared + Shape::kX;
  float segment_decay = 1.f;
  for (int64_t i = range.begin; i < range.end; ++i) {
    const int64_t c = chunk_of(i);
    const int stage = static_cast<int>(i - range.begin) & 1;
    const uint32_t tile_q = shared + stage % Shape::kStagesQ * Shape::kTileK;
    const uint32_t tile_k = shared + Shape::kK + stage * Shape::kTileK;
    const uint32_t tile_v = shared + Shape::kV + stage * Shape::kTileV;
    const ChunkGates& gate = gates[stage];
    cp_async_wait<0>();
    __syncthreads();  // this chunk is here, and everybody is done with the one before

    const bool at_anchor = has_x && c == anchor_of(c / p.group_chunks, p.group_chunks, num_chunks);
    if constexpr (kBackward) {
      if (at_anchor) save_state(c / p.group_chunks);
      if (has_x) {
        if (i > range.begin) write_dots(chunk_of(i - 1));
        load_tile<kBlockV, kThreads>(tile_x, rows(run.x, c, column), columns, vectors, place_v);
      }
      cp_async_commit();
    }
    if constexpr (kOutputGate) {
      load_tile<kBlockV, kThreads>(tile_x, rows(p.output_gate, c, 0), columns, vectors);
      cp_async_commit();
    }
    if (i + 1 < range.end) {
      if constexpr (Shape::kStagesQ == 2) load_q(chunk_of(i + 1), stage ^ 1);
      load_kv(chunk_of(i + 1), stage ^ 1);
      if (warp == kWarps - 1) next_gates = read_gates(chunk_of(i + 1));
    }
    cp_async_commit();
    if constexpr (kRotary) {
      if (i + 1 < range.end) make_angles(chunk_of(i + 1), stage ^ 1);
      const PairAngle* const own = angles + stage * Shape::kAngleSlots;
      const int pairs = static_cast<int>(p.rotary.dim / 2);
      if (kBackward && run.rotate_v) {
        turn_v(tile_v, stage, 1.f);
      } else if (outputs) {
        turn_tiles<T, kDimK, kThreads>({tile_q, tile_k}, own, pairs, p.order.shift == 0);
      } else {
        turn_tiles<T, kDimK, kThreads>({tile_k}, own, pairs, p.order.shift == 0);
      }
      __syncthreads();
    }

    // V of this warp, all 64 tokens: as the B operand of P V (first, second column tile: 0, 1 and 2, 3), and as the A
    // operand of V^T K (0, 2, 1, 3).
    uint32_t v[4][4];
    if (outputs) {
      // ---- P = (Q K^T) * decays
#pragma unroll 1
      for (int k = warp; k < 10; k += kWarps) {
        const int row = score_row(k) * 16, col = score_col(k) * 16;
        float s[2][4] = {};
#pragma unroll
        for (int d = 0; d < kDimK; d += 16) {
          uint32_t a[4], b[4];
          ldmatrix(a, tile_q + block_offset(lane_at, row, d));
          ldmatrix(b, tile_k + block_offset(lane_at, col, d));
          mma_16816<T>(s[0], a, b[0], b[2]);
          mma_16816<T>(s[1], a, b[1], b[3]);
        }
        const float2 b_i[2] = {gate.sum[row + lane_row], gate.sum[row + lane_row + 8]};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 b_j = *reinterpret_cast<const float4*>(&gate.sum[col + j * 8 + lane_col]);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float decay =
                decay_between(b_i[e / 2], e % 2 == 0 ? make_float2(b_j.x, b_j.y) : make_float2(b_j.z, b_j.w));
            const bool visible = col < row || j * 8 + lane_col + e % 2 <= lane_row + e / 2 * 8;
            s[j][e] = visible ? s[j][e] * (decay * run.score_scale) : 0.f;
          }
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            store_shared(tile_p + tile_offset(row + lane_row + e * 4, col + j * 8 + lane_col),
                         pack2<T>(s[j][e], s[j][e + 1]));
          }
        }
      }

      // ---- O = Q S
      // For the gate gradient S is taken in two halves, rounded and the rest, so that x . (Q S) is exact to 2^-17.
      float o[4][2][4] = {};
#pragma unroll
      for (int k = 0; k < kDimK / 16; ++k) {
        const float(&s0)[4] = state[2 * k];
        const float(&s1)[4] = state[2 * k + 1];
        const uint4 b =
            make_uint4(pack2<T>(s0[0], s0[1]), pack2<T>(s1[0], s1[1]), pack2<T>(s0[2], s0[3]), pack2<T>(s1[2], s1[3]));
        [[maybe_unused]] uint4 rest;
        if constexpr (kBackward) {
          rest = make_uint4(pack_rest<T>(s0[0], s0[1], b.x), pack_rest<T>(s1[0], s1[1], b.y),
                            pack_rest<T>(s0[2], s0[3], b.z), pack_rest<T>(s1[2], s1[3], b.w));
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          uint32_t a[4];
          ldmatrix(a, tile_q + block_offset(lane_at, m * 16, k * 16));
          mma_16816<T>(o[m][0], a, b.x, b.y);
          mma_16816<T>(o[m][1], a, b.z, b.w);
          if constexpr (kBackward) {
            if (has_x) {
              mma_16816<T>(o[m][0], a, rest.x, rest.y);
              mma_16816<T>(o[m][1], a, rest.z, rest.w);
            }
          }
        }
      }
      const auto apply_row_factors = [&](int m) {
        const float f[2] = {gate.row[m * 16 + lane_row], gate.row[m * 16 + lane_row + 8]};
#pragma unroll
        for (int e = 0; e < 4; ++e) o[m][0][e] *= f[e / 2], o[m][1][e] *= f[e / 2];
      };
      if constexpr (!kBackward) {
#pragma unroll
        for (int m = 0; m < 4; ++m) apply_row_factors(m);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix_trans(v[k], tile_v + block_offset(lane_at, k * 16, warp * 16));
      if (warp == kWarps - 1 && i + 1 < range.end) {
        scan_gates(gates[stage ^ 1], next_gates, !reverse, run.row_scale, run.update_scale);
      }
      if constexpr (kBackward) cp_async_wait<1>();  // x
      __syncthreads();                              // P and x are complete, q is free
      if constexpr (Shape::kStagesQ == 1) {
        if (i + 1 < range.end) load_q(chunk_of(i + 1), 0);
        cp_async_commit();
      }
      if constexpr (kRotary && kBackward) {
        if (has_x) {  // the other run's V: rounded as there
          turn_v(tile_x, stage, 1.f);
          __syncthreads();
        }
      }

      // ---- O += P V
      // x . o for the gate gradient. The other run of the pair has x as its V: there row factor * x is rounded before
      // it goes into the state. Rounded the same way here, the sums of the two runs differ by the gradient and by
      // nothing that rounding put into one of them (docs/cuda_retention.md).
      const auto x_at = [&](int m, int e, int j) {  // elements e, e + 1 of column tile j
        return unpack2<T>(load_shared(tile_x + tile_offset(m * 16 + lane_row + e * 4, warp * 16 + j * 8 + lane_col)));
      };
      const auto x_dot = [&](int m, int e) {
        const float2 x = x_at(m, e, 0), x_8 = x_at(m, e, 1);
        return o[m][0][e] * x.x + o[m][0][e + 1] * x.y + o[m][1][e] * x_8.x + o[m][1][e + 1] * x_8.y;
      };
      const auto rounding_dot = [&](int m, int e) {  // o is Q S still
        const float f = gate.row[m * 16 + lane_row + e * 4];
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 x = x_at(m, e, j), rounded = unpack2<T>(pack2<T>(x.x * f, x.y * f));
          sum += o[m][j][e] * (rounded.x - x.x * f) + o[m][j][e + 1] * (rounded.y - x.y * f);
        }
        return sum;
      };
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        [[maybe_unused]] float low = 0.f, high = 0.f;
        if constexpr (kBackward) {
          if (has_x) low = rounding_dot(m, 0), high = rounding_dot(m, 2);
          apply_row_factors(m);
        }
#pragma unroll
        for (int k = 0; k <= m; ++k) {
          uint32_t a[4];
          ldmatrix(a, tile_p + block_offset(lane_at, m * 16, k * 16));
          mma_16816<T>(o[m][0], a, v[k][0], v[k][1]);
          mma_16816<T>(o[m][1], a, v[k][2], v[k][3]);
        }
        if constexpr (kBackward) {
          if (has_x) {
            low = group_sum<4>(low + x_dot(m, 0)), high = group_sum<4>(high + x_dot(m, 2));
            if (lane % 4 == 0) {
              dots[warp * kChunk + m * 16 + lane_row] = low;
              dots[warp * kChunk + m * 16 + lane_row + 8] = high;
            }
          }
        }
      }

      // ---- the norm: sums of squares over the columns of a warp, then of all
      [[maybe_unused]] float* const factors = dots + (kWarps + warp) * kChunk;  // of this warp, all tokens
      if constexpr (kOutputGate) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            const float low = o[m][0][e] * o[m][0][e] + o[m][0][e + 1] * o[m][0][e + 1];
            const float sum = group_sum<4>(low + o[m][1][e] * o[m][1][e] + o[m][1][e + 1] * o[m][1][e + 1]);
            if (lane % 4 == 0) dots[warp * kChunk + m * 16 + lane_row + e * 4] = sum;
          }
        }
        cp_async_wait<1>();  // the output gate
        __syncthreads();
        float2 sum = make_float2(0.f, 0.f);  // of two tokens
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 part = *reinterpret_cast<const float2*>(&dots[w * kChunk + lane * 2]);
          sum.x += part.x, sum.y += part.y;
        }
        const float scale = __fdividef(1.f, static_cast<float>(columns));
        *reinterpret_cast<float2*>(&factors[lane * 2]) =
            make_float2(rsqrtf(sum.x * scale + p.norm_eps), rsqrtf(sum.y * scale + p.norm_eps));
      }

      // ---- O to global memory, through this warp's columns of V (which it alone reads, and has in registers)
      const auto element = [&](uint32_t tile, int m, int j, int e) {  // where o[m][j][e] and its neighbour go
        return tile + tile_offset(m * 16 + lane_row + e * 4, warp * 16 + j * 8 + lane_col);
      };
      const auto for_pairs = [&](auto&& f) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 4; e += 2) f(m, j, e);
          }
        }
      };
      const auto store_rows = [&](uint32_t tile, const View& view) {
        const ChunkRows<T> to = rows(view, c, column);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          // Eight lanes read rows 0, 2, 4, 6 (or 1, 3, 5, 7): eight different banks.
          int row = m * 16 + lane / 2 % 4 * 2 + lane / 8 % 2 + lane / 16 * 8, col = warp * 16 + lane % 2 * 8;
          if constexpr (kRotary && kBackward) {
            // Where the pieces of two halves alternate, neighbours of the tensor are two pieces apart: columns of two
            // warps, rows 0, 1, 4, 5 (or 2, 3, 6, 7).
            if (run.rotate_v && p.order.shift > 0) {
              row = m * 16 + lane / 2 % 2 + lane / 4 % 2 * 4 + lane / 8 % 2 * 2 + lane / 16 * 8;
              col = warp / 2 * 32 + warp % 2 * 8 + lane % 2 * 16;
            }
          }
          if (row < to.rows && col < columns) {
            const uint4 value = load_shared_16(tile + tile_offset(row, col));
            T* at = to.first + row * to.stride;
            if (vectors) {
              *reinterpret_cast<uint4*>(at + place_v(col)) = value;
            } else {
              const Vec<T, 8>& e = *reinterpret_cast<const Vec<T, 8>*>(&value);
#pragma unroll
              for (int j = 0; j < 8; ++j) at[place_v(col + j)] = e[j];
            }
          }
        }
      };
      __syncwarp();
      if (!kOutputGate || run.o.data != nullptr) {
        for_pairs(
            [&](int m, int j, int e) { store_shared(element(tile_v, m, j, e), pack2<T>(o[m][j][e], o[m][j][e + 1])); });
        __syncwarp();
        if constexpr (kRotary && kBackward) {
          if (run.rotate_v) {
            __syncthreads();
            turn_v(tile_v, stage, -1.f);
            __syncthreads();
          }
        }
        store_rows(tile_v, run.o);
      }
      if constexpr (kOutputGate) {  // y takes the gate's place, element by element
        for_pairs([&](int m, int j, int e) {
          const uint32_t at = element(tile_x, m, j, e);
          const float2 g = unpack2<T>(load_shared(at));
          const float f = factors[m * 16 + lane_row + e * 4];
          store_shared(
              at, pack2<T>(o[m][j][e] * (f * (g.x * sigmoid<T>(g.x))), o[m][j][e + 1] * (f * (g.y * sigmoid<T>(g.y)))));
        });
        __syncwarp();
        store_rows(tile_x, p.y);
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix_trans(v[k], tile_v + block_offset(lane_at, k * 16, warp * 16));
      if (warp == kWarps - 1 && i + 1 < range.end) {
        scan_gates(gates[stage ^ 1], next_gates, !reverse, run.row_scale, run.update_scale);
      }
    }

    // ---- S = total * S + (update * V)^T K
    const float total = gate.total;
    segment_decay *= total;
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state[j][e] *= total;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 f = *reinterpret_cast<const float2*>(&gate.update[k * 16 + lane_col]);
      const float2 f_8 = *reinterpret_cast<const float2*>(&gate.update[k * 16 + 8 + lane_col]);
      const auto scaled = [](uint32_t pair, float2 factor) {
        const float2 x = unpack2<T>(pair);
        return pack2<T>(x.x * factor.x, x.y * factor.y);
      };
      const uint32_t a[4] = {scaled(v[k][0], f), scaled(v[k][2], f), scaled(v[k][1], f_8), scaled(v[k][3], f_8)};
#pragma unroll
      for (int j = 0; j < kDimK / 16; ++j) {
        uint32_t b[4];
        ldmatrix_trans(b, tile_k + block_offset(lane_at, k * 16, j * 16));
        mma_16816<T>(state[2 * j], a, b[0], b[1]);
        mma_16816<T>(state[2 * j + 1], a, b[2], b[3]);
      }
    }

    if constexpr (kBackward) {
      if (at_anchor && reverse) dot_state(c / p.group_chunks);
    }
  }

  // ---- the state behind the last chunk
  if constexpr (kBackward) {
    if (has_x && range.begin < range.end) {
      __syncthreads();
      write_dots(chunk_of(range.end - 1));
    }
  }
  if (segment < segments - 1) {
    if (outputs) return;
    float4* to = reinterpret_cast<float4*>(run.segment_states + (own_segments + segment) * (kDimK * kBlockV));
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
      to[j * kThreads + threadIdx.x] = make_float4(state[j][0], state[j][1], state[j][2], state[j][3]);
    }
    if (threadIdx.x == 0) run.segment_decays[own_segments + segment] = segment_decay;
  } else if (run.state_out != nullptr) {
    for_state([&](float& s, int64_t at) { run.state_out[at] = s; });
  }
}

template <typename T, int kDimK, int kBlockV, bool kBackward>
const char* launch_retention(const RetentionGrid& p, const Launch& launch) {
  const int64_t blocks = run_blocks(p);
  if (blocks > INT32_MAX) return "gated_retention: more than 2^31 blocks";
  const auto launch_as = [&](auto rotary, auto output_gate) {
    using Shape = RunShape<kDimK, kBlockV, kBackward, rotary, output_gate>;
    return launch_kernel(retention_run_kernel<T, kDimK, kBlockV, kBackward, rotary, output_gate>,
                         dim3(static_cast<unsigned>(blocks)), Shape::kThreads, Shape::kBytes, launch, p);
  };
  const auto run = [&](auto rotary) {
    if constexpr (!kBackward && norm_fuses({kDimK, kBlockV}, 0)) {
      if (p.output_gate.data != nullptr && !p.states_only) return launch_as(rotary, std::true_type{});
    }
    return launch_as(rotary, std::false_type{});
  };
  return p.rotary.inv_freq != nullptr ? run(std::true_type{}) : run(std::false_type{});
}

#define YOCO_RETENTION_INSTANCES(T, kDimK, kBlockV)                                                     \
  template const char* launch_retention<T, kDimK, kBlockV, false>(const RetentionGrid&, const Launch&); \
  template const char* launch_retention<T, kDimK, kBlockV, true>(const RetentionGrid&, const Launch&);

}  // namespace yoco::cuda
