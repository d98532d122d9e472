// Attention forward for the sm_80 family: one kernel, read top to bottom.
//
// A CTA owns kRows rows (token x query head) of one KV head and walks over the blocks of kKeys keys they see, first in
// the main segment, then in the latents, with one online softmax. Per block:
//   S = Q K^T          tensor cores; Q from shared memory (or registers), K from shared memory
//   P = exp2(S - max)  float32, in registers
//   O += P V           P rounded to T straight from the accumulators, V read transposed
// K and V blocks take turns in a ring of three slots, each filled by cp.async one product ahead of its use:
//   product      S(n)      O(n)      S(n+1)    O(n+1)
//   reads        K(n)      V(n)      K(n+1)    V(n+1)
//   is filled    K(n+1)    V(n+1)    K(n+2)    V(n+2)      (into the slot whose readers passed the last barrier)
// so a copy has the time of two products and a softmax to arrive, and one barrier per product keeps the ring safe.
#pragma once

#include <algorithm>

#include "cuda/attention/plan.h"
#include "cuda/attention/simt.h"
#include "cuda/attention/tile.h"

namespace yoco::cuda {

// Tile table. Shared memory: Q (kRows x D) and three slots (kKeys x D), 2 bytes each, and 8 bytes per row for the mask.
//   D    rows keys warps  shared   per SM
//   64   128  64   4      41 KB    2     Q stays in registers: it would be a third of the shared memory traffic
//   128  128  64   4      81 KB    2     O 128 + S 64 registers; 81 KB is the most of which two fit into A100's 164
//   256  128  64   8      161 KB   1     16 rows per warp (O 128 registers); two CTAs would need 32-key slots
// Warps own whole rows, so softmax needs no exchange between warps. 32 rows per warp halve the K/V traffic from shared
// memory per product; only D 256 has no registers for it.
// kTransform: softcap or alibi (16 registers too many for the common case).
template <typename T, int D, bool Transform>
struct ForwardConfig {
  static constexpr bool kTransform = Transform;
  using Element = T;
  static constexpr int kDim = D;
  static constexpr int kRows = kForwardRows;
  static constexpr int kKeys = kForwardKeys;
  static constexpr int kWarps = D == 256 ? 8 : 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kCtasPerSm = D == 256 ? 1 : 2;
  static constexpr bool kQInRegisters = D == 64;
  static constexpr int kM = kRows / (16 * kWarps);  // 16-row blocks per warp
  static constexpr int kQBytes = kRows * D * 2;
  static constexpr int kSlotBytes = kKeys * D * 2;
  static constexpr int kSharedBytes = kQBytes + 3 * kSlotBytes + kRows * int(sizeof(int2));
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    attention_forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ ForwardPlan plan) {
  using T = typename Config::Element;
  constexpr int kDim = Config::kDim, kRows = Config::kRows, kKeys = Config::kKeys, kThreads = Config::kThreads;
  constexpr int kM = Config::kM, kS = kKeys / 8, kO = kDim / 8;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t q_tile = shared_address(shared), ring = q_tile + Config::kQBytes;
  int2* const row_table = reinterpret_cast<int2*>(shared + Config::kQBytes + 3 * Config::kSlotBytes);
  int4* const scratch = reinterpret_cast<int4*>(shared + Config::kQBytes);  // in the ring, before it is filled
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * (16 * kM);

  if (blockIdx.y == 0) zero_tail<T>(p, blockIdx.x, gridDim.x);
  if (p.num_sequences == 0) return;
  const WorkTile work = plan.schedule.decode(blockIdx.x);
  const RowMap whole = make_row_map(p, work.sequence, work.head);
  enum { kRowCount, kLenK, kMainFirst, kLatentFirst, kFullBegin, kFullEnd, kPointerK, kPointerV = kPointerK + 2 };
  WarpValues values{0};
  values.set(kRowCount, whole.rows);
  values.set(kLenK, int(whole.sequence.len_k));
  values.set_pointer(kPointerK, make_segment<T>(p, whole, false).k);
  values.set_pointer(kPointerV, make_segment<T>(p, whole, false).v);
  // The accumulators fill the register file: what is rarely needed is computed where it is needed.
  const auto row_map_again = [&] {
    const WorkTile again = plan.schedule.decode(opaque(blockIdx.x));
    return make_row_map(p, again.sequence, again.head);
  };
  const int dim_qk = int(p.dim_qk), dim_v = int(p.dim_v);
  const bool all_latents = p.latent_begin == nullptr && p.latent_end == nullptr;

  // Once per CTA, unless max_seqlen_q understated a sequence.
  for (int first_row = work.tile * kRows; first_row < values.get(kRowCount); first_row += plan.schedule.tiles * kRows) {
    const RowMap tile_map = row_map_again();
    __syncthreads();  // shared memory of the previous tile is free

    // ---- which blocks: [0, num_main) of the main segment, then those of the latents
    TileBounds seen_latent = no_rows();
    if (p.num_latents > 0) {
      seen_latent = fill_row_keys<kThreads, kRows>(p, tile_map, first_row, true, row_table, scratch);
    }
    const TileBounds seen = fill_row_keys<kThreads, kRows>(p, tile_map, first_row, false, row_table, scratch);
    const int main_first = seen.begin < seen.end ? seen.begin / kKeys : 0;
    const int num_main = seen.begin < seen.end ? (seen.end + kKeys - 1) / kKeys - main_first : 0;
    int num_blocks = num_main, latent_first = 0;
    if (seen_latent.begin < seen_latent.end) {
      latent_first = seen_latent.begin / kKeys;
      num_blocks += (seen_latent.end + kKeys - 1) / kKeys - latent_first;
    }
    const int block_begin = int(int64_t(num_blocks) * blockIdx.y / plan.splits);
    const int block_end = int(int64_t(num_blocks) * (blockIdx.y + 1) / plan.splits);
    values.set(kMainFirst, main_first);
    values.set(kLatentFirst, latent_first - num_main);
    values.set(kFullBegin, seen.full_begin);
    values.set(kFullEnd, seen.full_end);
    const auto first_key = [&](int n) { return (n + values.get(n < num_main ? kMainFirst : kLatentFirst)) * kKeys; };
    const auto load_k = [&](int n, uint32_t slot) {
      const int first = first_key(n);
      int keys = values.get(kLenK) - first;
      int64_t stride = p.k.time_stride;
      const T* from = values.get_pointer<T>(kPointerK) + first * stride;
      if (n >= num_main) {
        keys = int(p.num_latents) - first;
        stride = p.latent_k.time_stride;
        from = make_segment<T>(p, row_map_again(), true).k + first * stride;
      }
      load_tile<kKeys, kDim, kThreads, T>(slot, keys, dim_qk, [&](int r) { return from + r * stride; });
    };
    const auto load_v = [&](int n, uint32_t slot) {
      const int first = first_key(n);
      int keys = values.get(kLenK) - first;
      int64_t stride = p.v.time_stride;
      const T* from = values.get_pointer<T>(kPointerV) + first * stride;
      if (n >= num_main) {
        keys = int(p.num_latents) - first;
        stride = p.latent_v.time_stride;
        from = make_segment<T>(p, row_map_again(), true).v + first * stride;
      }
      load_tile<kKeys, kDim, kThreads, T>(slot, keys, dim_v, [&](int r) { return from + r * stride; });
    };
    const auto use_latent_table = [&] {
      if (threadIdx.x < kRows) {
        const int row = first_row + int(threadIdx.x);
        row_table[threadIdx.x] =
            row < values.get(kRowCount) ? row_keys(p, row_map_again(), row, true) : make_int2(0, 0);
      }
    };

    // ---- prologue
    uint32_t slot_k = ring;
    const auto slot_after = [&](uint32_t slot) {
      return slot == ring + 2 * Config::kSlotBytes ? ring : slot + Config::kSlotBytes;
    };
    if (block_begin < block_end) {
      if (block_begin >= num_main) use_latent_table();
      load_tile<kRows, kDim, kThreads, T>(q_tile, values.get(kRowCount) - first_row, dim_qk, [&](int r) {
        return static_cast<const T*>(p.q.data) + tile_map.offset(p.q, first_row + r);
      });
      load_k(block_begin, slot_k);
      cp_async_commit();
      load_v(block_begin, slot_after(slot_k));
      cp_async_commit();
    }
    float o[kM][kO][4];
    clear(o);
    RowSoftmax softmax[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) softmax[m][0].start(), softmax[m][1].start();
    uint32_t q_registers[Config::kQInRegisters ? kDim / 16 : 1][kM][4];
    const uint32_t q_lane = lane_by_rows(q_tile, warp_row);
    const float multiplier = plan.score.multiplier;

    // ---- key blocks
    for (int n = block_begin; n < block_end; ++n) {
      const bool more = n + 1 < block_end;
      cp_async_wait<1>();  // K(n), and Q before it
      __syncthreads();     // ... of every thread; and all have read V(n - 1), whose slot is next
      const uint32_t slot_v = slot_after(slot_k), slot_next = slot_after(slot_v);
      if (more) load_k(n + 1, slot_next);
      cp_async_commit();

      float s[kM][kS][4];
      clear(s);
      if constexpr (Config::kQInRegisters) {
        if (n == block_begin) {
#pragma unroll
          for (int k = 0; k < kDim / 16; ++k)
#pragma unroll
            for (int m = 0; m < kM; ++m) ldmatrix(q_registers[k][m], block_at<kRows>(q_lane, m * 16, k * 16));
        }
        multiply_from_registers<T, kKeys, false>(s, q_registers, lane_by_chunks(slot_k, 0));
      } else {
        multiply<T, kDim, kRows, false, kKeys, false>(s, q_lane, 0, lane_by_chunks(slot_k, 0), 0);
      }

      const int first = first_key(n);
      if constexpr (Config::kTransform) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float bias = 0.f, distance = 0.f;
            if (p.alibi_slopes != nullptr && n < num_main) {
              const RowMap map = row_map_again();
              const int row = min(first_row + warp_row + m * 16 + h * 8 + lane / 4, map.rows - 1);
              bias = alibi_log2(p, map.sequence_index, map.head(row));
              distance = float(map.token(row) + int(map.sequence.len_k - map.sequence.len_q) - first - lane % 4 * 2);
            }
#pragma unroll
            for (int i = 0; i < kS; ++i) {
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                float& x = s[m][i][h * 2 + c];
                x = transform_score(plan.score, x, bias, distance - float(i * 8 + c));
              }
            }
          }
        }
      }
      const bool full = n < num_main ? first >= values.get(kFullBegin) && first + kKeys <= values.get(kFullEnd)
                                     : all_latents && first + kKeys <= p.num_latents;
      if (!full) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            int2 keys = row_table[warp_row + m * 16 + h * 8 + lane / 4];
            keys.x -= first + lane % 4 * 2;
            keys.y -= first + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < kS; ++i) {
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                float& x = s[m][i][h * 2 + c];
                x = sees(keys, i * 8 + c) ? x : YOCO_NEG_INF;
              }
            }
          }
        }
      }

      // Online softmax; s becomes P.
      bool moves = false;
      float block_max[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float top = fmaxf(s[m][0][h * 2], s[m][0][h * 2 + 1]);
#pragma unroll
          for (int i = 1; i < kS; ++i) top = fmaxf(top, fmaxf(s[m][i][h * 2], s[m][i][h * 2 + 1]));
          block_max[m][h] = group_max<4>(top);
          moves |= softmax[m][h].must_move(block_max[m][h], multiplier);
        }
      }
      if (__any_sync(0xffffffffu, moves)) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float factor = softmax[m][h].move(block_max[m][h], multiplier);
#pragma unroll
            for (int i = 0; i < kO; ++i) {
              o[m][i][h * 2] *= factor;
              o[m][i][h * 2 + 1] *= factor;
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float offset = softmax[m][h].offset(multiplier);
          float sum = 0.f;
#pragma unroll
          for (int i = 0; i < kS; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& x = s[m][i][h * 2 + c];
              x = exp2_approx(fmaf(x, multiplier, -offset));
              sum += x;
            }
          }
          softmax[m][h].sum += sum;
        }
      }

      uint32_t probabilities[kS / 2][kM][4];
      pack_fragments<T>(probabilities, s);

      cp_async_wait<1>();  // V(n)
      __syncthreads();     // ... of every thread; and all have read K(n), whose slot V(n + 1) gets
      if (more) load_v(n + 1, slot_k);
      cp_async_commit();
      if (n + 1 == num_main) use_latent_table();  // nobody reads the table before the next barrier
      multiply_from_registers<T, kKeys, true>(o, probabilities, lane_by_rows(slot_v, 0));
      slot_k = slot_next;
    }

    // ---- epilogue
    const RowMap map = row_map_again();
    const int tile_rows = min(kRows, map.rows - first_row);
    const int64_t statistics = p.batch * p.heads_q * p.time_q;
    float not_finite[kM][2];  // NaN if a product put an infinity or NaN into a row whose own scores had none
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + m * 16 + h * 8 + lane / 4;
        const bool valid = row < tile_rows;
        const float sum = group_sum<4>(softmax[m][h].sum);
        const float sink = valid && plan.splits == 1 ? sink_log2(p, map.head(first_row + row)) : YOCO_NEG_INF;
        const RowResult r = finish_row(softmax[m][h].max, sum, multiplier, sink);
        float check = 0.f;
#pragma unroll
        for (int i = 0; i < kO; ++i) {
          check = fmaf(o[m][i][h * 2], 0.f, fmaf(o[m][i][h * 2 + 1], 0.f, check));
          o[m][i][h * 2] *= r.factor;
          o[m][i][h * 2 + 1] *= r.factor;
        }
        not_finite[m][h] = sum == sum ? check : 0.f;
        if (valid && lane % 4 == 0) {
          const int64_t statistic = map.statistic(p, first_row + row);
          if (plan.splits == 1) {
            static_cast<float*>(p.lse)[statistic] = r.lse;
          } else {
            plan.partial_lse[blockIdx.y * statistics + statistic] = r.lse * kLog2E;
          }
        }
        if (valid && plan.splits > 1) {
          float* to = plan.partial_out + (blockIdx.y * statistics + map.statistic(p, first_row + row)) * dim_v;
#pragma unroll
          for (int i = 0; i < kO; ++i) {
            const int col = i * 8 + lane % 4 * 2;
            if (col < dim_v) *reinterpret_cast<float2*>(to + col) = make_float2(o[m][i][h * 2], o[m][i][h * 2 + 1]);
          }
        }
      }
    }
    if (plan.splits > 1) continue;  // combine_kernel does the rest

    // Through the rows of Q (each warp its own) so that global memory gets 16 bytes per thread.
    __syncwarp();
    put_accumulators<T, kRows>(q_tile, warp_row, 0, o);
    __syncthreads();
    store_tile<kRows, kDim, kThreads, T>(q_tile, tile_rows, dim_v, plan.aligned_out, [&](int r) {
      return static_cast<T*>(p.out.data) + map.offset(p.out, first_row + r);
    });

    // A masked key's value may be infinite or NaN and still have entered the products as 0 * NaN: such rows are
    // computed again, key by key.
    bool redo = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) redo |= not_finite[m][0] != 0.f || not_finite[m][1] != 0.f;
    if (!__syncthreads_or(redo)) continue;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        for (unsigned todo = __ballot_sync(0xffffffffu, not_finite[m][h] != 0.f); todo != 0;) {
          const int r = (__ffs(int(todo)) - 1) / 4;
          todo &= ~(0xfu << (r * 4));
          const int row = warp_row + m * 16 + h * 8 + r;
          if (row < tile_rows) attend_row<T>(p, plan.score, map.sequence_index, map.head_kv, first_row + row);
        }
      }
    }
  }
}

template <typename T, int D>
const char* launch_attention_forward(const AttentionParams& p, const ForwardPlan& plan, const Launch& launch) {
  using Config = ForwardConfig<T, D, false>;
  const dim3 grid(unsigned(std::max<int64_t>(plan.schedule.count(), 1)), unsigned(plan.splits));
  const auto kernel =
      plan.score.plain ? attention_forward_kernel<Config> : attention_forward_kernel<ForwardConfig<T, D, true>>;
  return launch_kernel(kernel, grid, Config::kThreads, Config::kSharedBytes, launch, p, plan);
}

}  // namespace yoco::cuda
