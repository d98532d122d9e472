// dQ by row tiles, for the sm_80 family: nothing is added in memory, so it is bitwise repeatable (deterministic=True),
// and it is all there is to do when only dQ is wanted.
//
// Like the forward kernel a CTA owns kRows rows (token x query head) and walks over the blocks of kKeys keys they see;
// a warp owns 16 rows. Per block
//   S = Q K^T, dP = dO V^T           P = exp2(S - lse), dS = P * (dP - delta), all in registers
//   dQ += dS K                       dS straight from the accumulators
// K and V blocks come through two stages of cp.async.
#pragma once

#include <algorithm>

#include "cuda/attention/plan.h"
#include "cuda/attention/simt_backward.h"
#include "cuda/attention/tile.h"

namespace yoco::cuda {

// Tile table. Shared memory: Q, dO (kRows x D), two stages of K and V (kKeys x D), 2 bytes each, and the mask.
//   D    rows keys warps  shared   per SM
//   64   128  64   8      65 KB    1 (2 where registers allow)
//   128  128  64   8      129 KB   1     dQ 64 + S 32 + dP 32 registers
//   256  64   32   4      128 KB   1     dQ 128 registers; 64 keys would need 192 KB, more than A100 has
template <typename T, int D, bool Transform>
struct BackwardQConfig {
  using Element = T;
  static constexpr bool kTransform = Transform;
  static constexpr int kDim = D;
  static constexpr int kRows = D == 256 ? 64 : 128;
  static constexpr int kKeys = D == 256 ? 32 : 64;
  static constexpr int kThreads = kRows / 16 * 32;
  static constexpr int kRowBytes = kRows * D * 2, kKeyBytes = kKeys * D * 2;
  static constexpr int kSharedBytes = 2 * kRowBytes + 4 * kKeyBytes + kRows * int(sizeof(int2));
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_backward_q_kernel(const __grid_constant__ AttentionBackwardParams p,
                                const __grid_constant__ BackwardPlan plan) {
  using T = typename Config::Element;
  constexpr int kDim = Config::kDim, kRows = Config::kRows, kKeys = Config::kKeys, kThreads = Config::kThreads;
  constexpr int kS = kKeys / 8;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t q_tile = shared_address(shared), do_tile = q_tile + Config::kRowBytes;
  const uint32_t stages = do_tile + Config::kRowBytes;  // K, V, K, V
  int2* const row_table = reinterpret_cast<int2*>(shared + 2 * Config::kRowBytes + 4 * Config::kKeyBytes);
  int4* const scratch = reinterpret_cast<int4*>(shared);
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const int dim_qk = int(p.dim_qk), dim_v = int(p.dim_v);

  zero_query_tail<T>(p);
  if (p.num_sequences == 0) return;
  const WorkTile work = plan.row_schedule.decode(int(blockIdx.x));
  const RowMap map = make_row_map(p, work.sequence, work.head);
  const Segment<T> main = make_segment<T>(p, map, false);
  const Segment<T> latent = p.num_latents > 0 ? make_segment<T>(p, map, true) : main;
  const int len_k = int(map.sequence.len_k);

  for (int first_row = work.tile * kRows; first_row < map.rows; first_row += plan.row_schedule.tiles * kRows) {
    const int tile_rows = min(kRows, map.rows - first_row);
    __syncthreads();

    // ---- which blocks: [0, num_main) of the main segment, then those of the latents
    TileBounds seen_latent = no_rows();
    if (p.num_latents > 0) {
      seen_latent = fill_row_keys<kThreads, kRows>(p, map, first_row, true, row_table, scratch);
    }
    const TileBounds seen = fill_row_keys<kThreads, kRows>(p, map, first_row, false, row_table, scratch);
    const int main_first = seen.begin < seen.end ? seen.begin / kKeys : 0;
    const int num_main = seen.begin < seen.end ? (seen.end + kKeys - 1) / kKeys - main_first : 0;
    const int latent_first = seen_latent.begin < seen_latent.end ? seen_latent.begin / kKeys : 0;
    const int num_latent =
        seen_latent.begin < seen_latent.end ? (seen_latent.end + kKeys - 1) / kKeys - latent_first : 0;
    const auto first_key = [&](int n) { return (n < num_main ? main_first + n : latent_first + n - num_main) * kKeys; };
    const auto load_block = [&](int n) {
      const Segment<T>& s = n < num_main ? main : latent;
      const int first = first_key(n), keys = (n < num_main ? len_k : int(p.num_latents)) - first;
      const uint32_t k_tile = stages + n % 2 * 2 * Config::kKeyBytes;
      const int64_t k_stride = s.k_stride, v_stride = s.v_stride;
      const T *k = s.k + first * k_stride, *v = s.v + first * v_stride;
      load_tile<kKeys, kDim, kThreads, T>(k_tile, keys, dim_qk, [&](int r) { return k + r * k_stride; });
      load_tile<kKeys, kDim, kThreads, T>(k_tile + Config::kKeyBytes, keys, dim_v,
                                          [&](int r) { return v + r * v_stride; });
    };
    const auto use_latent_table = [&] {
      if (threadIdx.x < kRows) {
        const int row = first_row + int(threadIdx.x);
        row_table[threadIdx.x] = row < map.rows ? row_keys(p, map, row, true) : make_int2(0, 0);
      }
    };

    // ---- prologue
    const int num_blocks = num_main + num_latent;
    if (num_blocks > 0) {
      load_tile<kRows, kDim, kThreads, T>(q_tile, tile_rows, dim_qk, [&](int r) {
        return static_cast<const T*>(p.q.data) + map.offset(p.q, first_row + r);
      });
      load_tile<kRows, kDim, kThreads, T>(do_tile, tile_rows, dim_v, [&](int r) {
        return static_cast<const T*>(p.d_out.data) + map.offset(p.d_out, first_row + r);
      });
      load_block(0);
    }
    cp_async_commit();
    if (num_main == 0) use_latent_table();
    float2 stat[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(first_row + warp_row + h * 8 + lane / 4, map.rows - 1);
      stat[h] = plan.stats[first_stat(p, map) + row];
    }
    float dq[1][kDim / 8][4];
    clear(dq);

    // ---- key blocks
    for (int n = 0; n < num_blocks; ++n) {
      cp_async_wait<0>();
      __syncthreads();  // block n is here; everybody is done with the stage that gets block n + 1
      if (n + 1 < num_blocks) load_block(n + 1);
      cp_async_commit();
      const uint32_t k_tile = stages + n % 2 * 2 * Config::kKeyBytes, v_tile = k_tile + Config::kKeyBytes;
      const bool latents = n >= num_main;
      const int first = first_key(n);

      float s[1][kS][4], dp[1][kS][4];
      clear(s);
      clear(dp);
      multiply<T, kDim, kRows, false, kKeys, false>(s, lane_by_rows(q_tile, warp_row), 0, lane_by_chunks(k_tile, 0), 0);
      multiply<T, kDim, kRows, false, kKeys, false>(dp, lane_by_rows(do_tile, warp_row), 0, lane_by_chunks(v_tile, 0),
                                                    0);
      const bool full = (latents ? seen_latent : seen).full(first, kKeys);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + h * 8 + lane / 4, key = first + lane % 4 * 2;
        RowScore row_score{};
        if constexpr (Config::kTransform) row_score = make_row_score(p, map, first_row + row, key, latents);
#pragma unroll
        for (int i = 0; i < kS; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            score_gradient<Config::kTransform>(plan.score, row_score, i * 8 + c, stat[h], s[0][i][h * 2 + c],
                                               dp[0][i][h * 2 + c]);
          }
        }
        if (!full) {
          int2 keys = row_table[row];
          keys.x -= key;
          keys.y -= key;
#pragma unroll
          for (int i = 0; i < kS; ++i) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              dp[0][i][h * 2 + c] = sees(keys, i * 8 + c) ? dp[0][i][h * 2 + c] : 0.f;
            }
          }
        }
      }
      uint32_t ds[kS / 2][1][4];
      pack_fragments<T>(ds, dp);
      multiply_from_registers<T, kKeys, true>(dq, ds, lane_by_rows(k_tile, 0));
      if (n + 1 == num_main && num_latent > 0) {
        __syncthreads();  // everybody has read the table
        use_latent_table();
      }
    }
    __syncthreads();
    store_dq<T, kRows, kDim, kThreads>(p, plan, map, first_row, q_tile, dq, warp_row, 0);
  }
}

template <typename T, int D>
const char* launch_attention_backward_q(const AttentionBackwardParams& p, const BackwardPlan& plan,
                                        const Launch& launch) {
  using Config = BackwardQConfig<T, D, false>;
  const auto kernel =
      plan.score.plain ? attention_backward_q_kernel<Config> : attention_backward_q_kernel<BackwardQConfig<T, D, true>>;
  // The plan's row tiles are those of finish_dq_kernel: any number will do, the kernel strides over them.
  return launch_kernel(kernel, unsigned(std::max<int64_t>(plan.row_schedule.count(), 1)), Config::kThreads,
                       Config::kSharedBytes, launch, p, plan);
}

}  // namespace yoco::cuda
