// Attention backward for the sm_80 family: dK and dV, and with them dQ.
//
// A CTA owns kKeys keys of one KV head. K and V stay in shared memory, dK and dV in registers, while it walks over the
// tiles of kRows rows (token x query head) that see these keys: the sum over the query heads of a group is part of the
// walk. Per tile, with P and dS exchanged through shared memory because the products need them in three orientations:
//   S = Q K^T, dP = dO V^T                      P = exp2(S - lse), dS = P * (dP - delta)
//   dV += P^T dO, dK += dS^T Q, dQ = dS K       dQ is added to a float32 accumulator in memory
// While one tile is worked on, cp.async brings Q and dO of the next one (two stages; one at D 256).
// Without dQ (deterministic, or not wanted) the last product is left out and backward_q.h does it row by row.
#pragma once

#include <algorithm>

#include "cuda/attention/plan.h"
#include "cuda/attention/simt_backward.h"
#include "cuda/attention/tile.h"

namespace yoco::cuda {

// Tile table. 8 warps, one CTA per SM. Shared memory: K, V (kKeys x D), Q, dO (kRows x D, per stage), P, dS.
//   D    rows keys stages shared
//   64   64   128  2      98 KB    128 rows would need 164 KB with the tables, 1 KB more than A100 has
//   128  64   128  2      162 KB   dK + dV take 128 registers, S + dP 64; 128 keys halve the dQ traffic of 64
//   256  64   64   1      145 KB   dK + dV 128 registers; a second stage would need 209 KB
template <typename T, int D, bool Transform>
struct BackwardConfig {
  using Element = T;
  static constexpr bool kTransform = Transform;
  static constexpr int kDim = D;
  static constexpr int kRows = BackwardTiles<D>::kRows;
  static constexpr int kKeys = BackwardTiles<D>::kKeys;
  static constexpr int kStages = D == 256 ? 1 : 2;
  static constexpr int kThreads = 256;
  // What one warp of each product computes: S and dP in 2 x 4 warps, dK and dV in 32-key strips, dQ in 32-row strips.
  static constexpr int kSRows = kRows / 2, kSKeys = kKeys / 4;
  static constexpr int kKeyWarps = kKeys / 32, kKeyCols = D / (8 / kKeyWarps);
  static constexpr int kRowWarps = kRows / 32, kRowCols = D / (8 / kRowWarps);
  static constexpr int kKeyBytes = kKeys * D * 2, kRowBytes = kRows * D * 2, kScoreBytes = kRows * kKeys * 2;
  static constexpr int kTableBytes = kRows * 8;
  static constexpr int kSharedBytes =
      2 * kKeyBytes + 2 * kStages * kRowBytes + 2 * kScoreBytes + 2 * kStages * kTableBytes;
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ AttentionBackwardParams p,
                              const __grid_constant__ BackwardPlan plan) {
  using T = typename Config::Element;
  constexpr int kDim = Config::kDim, kRows = Config::kRows, kKeys = Config::kKeys, kThreads = Config::kThreads;
  constexpr int kSM = Config::kSRows / 16, kSN = Config::kSKeys / 8, kStages = Config::kStages;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t k_tile = shared_address(shared), v_tile = k_tile + Config::kKeyBytes;
  const uint32_t q_tiles = v_tile + Config::kKeyBytes, do_tiles = q_tiles + kStages * Config::kRowBytes;
  const uint32_t p_tile = do_tiles + kStages * Config::kRowBytes, ds_tile = p_tile + Config::kScoreBytes;
  float2* const stats_tables = reinterpret_cast<float2*>(shared + (ds_tile + Config::kScoreBytes - k_tile));
  int2* const key_tables = reinterpret_cast<int2*>(stats_tables + kStages * kRows);
  int* const bad_keys = reinterpret_cast<int*>(key_tables);  // after the last tile
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int dim_qk = int(p.dim_qk), dim_v = int(p.dim_v);

  zero_key_tails<T>(p, plan);
  if (p.num_sequences == 0) return;
  const WorkTile work = plan.schedule.decode(int(blockIdx.x));
  const bool latents = work.tile >= plan.main_tiles;
  if (latents ? !plan.want_latents || work.sequence >= plan.latent_slices : !plan.want_dkv) return;

  const int sequence_step = latents ? plan.latent_slices : int(p.num_sequences);
  const RowMap own = make_row_map(p, work.sequence, work.head);
  const int num_keys = latents ? int(p.num_latents) : int(own.sequence.len_k);  // that take part
  const int store_keys = latents ? int(p.num_latents) : keys_to_store(p, own);  // whose gradients are ours
  // Once per CTA, unless max_seqlen_k understated a sequence.
  for (int first = (latents ? work.tile - plan.main_tiles : work.tile) * kKeys; first < store_keys;
       first += (latents ? plan.latent_tiles : plan.main_tiles) * kKeys) {
    float dk[2][Config::kKeyCols / 8][4], dv[2][Config::kKeyCols / 8][4];
    clear(dk);
    clear(dv);
    // One sequence; shared latents sum over several.
    for (int sequence = work.sequence; sequence < p.num_sequences; sequence += sequence_step) {
      const RowMap map = make_row_map(p, sequence, work.head);
      const int len_q = int(map.sequence.len_q), len_k = int(map.sequence.len_k);
      const bool scan = latents ? p.latent_begin != nullptr || p.latent_end != nullptr : p.mask.prefix_len != nullptr;

      // ---- which row tiles
      int tile_begin = 0, tile_end = num_keys > first ? (map.rows + kRows - 1) / kRows : 0;
      if (!scan && !latents && tile_end > 0) {
        const int last = min(first + kKeys, num_keys) - 1;
        const int64_t i0 = query_range(p.mask.window_left, p.mask.window_right, first, len_q, len_k).begin;
        const int64_t i1 = query_range(p.mask.window_left, p.mask.window_right, last, len_q, len_k).end;
        tile_begin = int(i0) * map.group / kRows;
        tile_end = i0 < i1 ? (int(i1) * map.group + kRows - 1) / kRows : tile_begin;
      }
      // The first tile from m on that sees these keys; full: all of its rows see all of them. Contains barriers.
      bool full = false;
      const auto find = [&](int m) {
        if (!scan) {
          full = (m + 1) * kRows <= map.rows && first + kKeys <= num_keys;
          if (!latents && full) {
            const KeyRange a =
                window_range(p.mask.window_left, p.mask.window_right, map.token(m * kRows), len_q, len_k);
            const KeyRange b =
                window_range(p.mask.window_left, p.mask.window_right, map.token((m + 1) * kRows - 1), len_q, len_k);
            full = b.begin <= first && a.end >= first + kKeys;
          }
          return m;
        }
        for (; m < tile_end; ++m) {
          bool some = false, all = true;
          if (tid < kRows) {
            const int row = m * kRows + tid;
            const int2 keys = row < map.rows ? row_keys(p, map, row, latents) : make_int2(0, 0);
            some = keys.x < first + kKeys && keys.y > first && keys.x < keys.y;
            all = keys.x <= first && keys.y >= first + kKeys;
          }
          if (__syncthreads_or(some)) {
            full = __syncthreads_and(all);
            break;
          }
        }
        return m;
      };
      const float2* stats = plan.stats + first_stat(p, map);
      const auto load_rows = [&](int m, int stage) {
        const int rows = map.rows - m * kRows;
        load_tile<kRows, kDim, kThreads, T>(q_tiles + stage * Config::kRowBytes, rows, dim_qk, [&](int r) {
          return static_cast<const T*>(p.q.data) + map.offset(p.q, m * kRows + r);
        });
        load_tile<kRows, kDim, kThreads, T>(do_tiles + stage * Config::kRowBytes, rows, dim_v, [&](int r) {
          return static_cast<const T*>(p.d_out.data) + map.offset(p.d_out, m * kRows + r);
        });
        if (tid < kRows) {
          cp_async_small<8>(&stats_tables[stage * kRows + tid], stats + m * kRows + tid, tid < rows);
          key_tables[stage * kRows + tid] = tid < rows ? row_keys(p, map, m * kRows + tid, latents) : make_int2(0, 0);
        }
        cp_async_commit();
      };

      // ---- prologue
      __syncthreads();  // shared memory is free
      int tile = find(tile_begin);
      if (tile < tile_end) {
        const Segment<T> s = make_segment<T>(p, map, latents);
        load_tile<kKeys, kDim, kThreads, T>(k_tile, num_keys - first, dim_qk,
                                            [&](int r) { return s.k + (first + r) * s.k_stride; });
        load_tile<kKeys, kDim, kThreads, T>(v_tile, num_keys - first, dim_v,
                                            [&](int r) { return s.v + (first + r) * s.v_stride; });
        load_rows(tile, 0);
      }

      // ---- row tiles
      int stage = 0;
      while (tile < tile_end) {
        const bool this_full = full;
        const int this_tile = tile;
        cp_async_wait<0>();
        __syncthreads();  // this tile is here, and nobody reads the other stage, P or dS any more
        tile = find(tile + 1);
        if (kStages == 2 && tile < tile_end) load_rows(tile, stage ^ 1);
        const uint32_t q_tile = q_tiles + stage * Config::kRowBytes, do_tile = do_tiles + stage * Config::kRowBytes;

        const int s_row = warp / 4 * Config::kSRows, s_key = warp % 4 * Config::kSKeys;
        float s[kSM][kSN][4], dp[kSM][kSN][4];
        clear(s);
        clear(dp);
        multiply<T, kDim, kRows, false, kKeys, false>(s, lane_by_rows(q_tile, s_row), 0, lane_by_chunks(k_tile, s_key),
                                                      0);
        multiply<T, kDim, kRows, false, kKeys, false>(dp, lane_by_rows(do_tile, s_row), 0,
                                                      lane_by_chunks(v_tile, s_key), 0);
#pragma unroll
        for (int m = 0; m < kSM; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int row = s_row + m * 16 + h * 8 + lane / 4, key = first + s_key + lane % 4 * 2;
            const float2 stat = stats_tables[stage * kRows + row];  // lse in log2 units, delta
            RowScore row_score{};
            if constexpr (Config::kTransform) row_score = make_row_score(p, map, this_tile * kRows + row, key, latents);
#pragma unroll
            for (int i = 0; i < kSN; ++i) {
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                float& x = s[m][i][h * 2 + c];
                float& d = dp[m][i][h * 2 + c];
                score_gradient<Config::kTransform>(plan.score, row_score, i * 8 + c, stat, x, d);
              }
            }
            if (!this_full) {
              int2 keys = key_tables[stage * kRows + row];
              keys.x -= key;
              keys.y -= key;
#pragma unroll
              for (int i = 0; i < kSN; ++i) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                  const bool seen = sees(keys, i * 8 + c);
                  s[m][i][h * 2 + c] = seen ? s[m][i][h * 2 + c] : 0.f;
                  dp[m][i][h * 2 + c] = seen ? dp[m][i][h * 2 + c] : 0.f;
                }
              }
            }
          }
        }
        put_accumulators<T, kRows>(p_tile, s_row, s_key, s);
        put_accumulators<T, kRows>(ds_tile, s_row, s_key, dp);
        __syncthreads();

        const int out_key = warp % Config::kKeyWarps * 32, key_col = warp / Config::kKeyWarps * Config::kKeyCols;
        multiply<T, kRows, kRows, true, kRows, true>(dv, lane_by_chunks(p_tile, 0), out_key, lane_by_rows(do_tile, 0),
                                                     key_col);
        multiply<T, kRows, kRows, true, kRows, true>(dk, lane_by_chunks(ds_tile, 0), out_key, lane_by_rows(q_tile, 0),
                                                     key_col);
        if (plan.dq_accumulator != nullptr) {
          const int q_row = warp % Config::kRowWarps * 32, row_col = warp / Config::kRowWarps * Config::kRowCols;
          float dq[2][Config::kRowCols / 8][4];
          clear(dq);
          multiply<T, kKeys, kRows, false, kKeys, true>(dq, lane_by_rows(ds_tile, q_row), 0, lane_by_rows(k_tile, 0),
                                                        row_col);
          // In the order of the registers, so that a warp adds to 128 consecutive bytes; finish_dq_kernel knows it.
          float* to = plan.dq_accumulator + dq_tile(p, map, kRows, this_tile) * (kRows * kDim) + tid;
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int i = 0; i < Config::kRowCols / 8; ++i)
#pragma unroll
              for (int j = 0; j < 4; ++j)
                atomicAdd(to + ((m * Config::kRowCols / 8 + i) * 4 + j) * kThreads, dq[m][i][j]);
        }
        if (kStages == 1) {
          __syncthreads();
          if (tile < tile_end) load_rows(tile, 0);
        } else {
          stage ^= 1;
        }
      }
    }

    // ---- epilogue
    // A row that
    // does not see a key may have put 0 * NaN into its gradients: such keys are computed again, row by row.
    const int out_key = warp % Config::kKeyWarps * 32, key_col = warp / Config::kKeyWarps * Config::kKeyCols;
    __syncthreads();
    if (tid < kKeys) bad_keys[tid] = 0;
    __syncthreads();
    const GradientRows to_k = gradient_rows<T>(p, plan, own, latents, false);
    const GradientRows to_v = gradient_rows<T>(p, plan, own, latents, true);
    bool bad = false;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Keys that seqused_k leaves out: P = 0, but 0 * NaN of a row that is NaN is not.
        const bool left_out = first + out_key + m * 16 + h * 8 + lane / 4 >= num_keys;
        float check = 0.f;
#pragma unroll
        for (int i = 0; i < Config::kKeyCols / 8; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            dk[m][i][h * 2 + c] = left_out ? 0.f : dk[m][i][h * 2 + c] * plan.scale;
            dv[m][i][h * 2 + c] = left_out ? 0.f : dv[m][i][h * 2 + c];
            check = fmaf(dk[m][i][h * 2 + c], 0.f, fmaf(dv[m][i][h * 2 + c], 0.f, check));
          }
        }
        if (check != 0.f) bad_keys[out_key + m * 16 + h * 8 + lane / 4] = 1;
        bad |= check != 0.f;
      }
    }
    const bool any_bad = __syncthreads_or(bad);
    const auto skip = [&](int key) { return any_bad && bad_keys[key] != 0; };
    if (to_k.float32) {
      put_gradients<T>(to_k, dk, out_key, key_col, first, num_keys, dim_qk, skip);
      put_gradients<T>(to_v, dv, out_key, key_col, first, num_keys, dim_v, skip);
    } else {
      put_accumulators<T, kKeys>(k_tile, out_key, key_col, dk);
      put_accumulators<T, kKeys>(v_tile, out_key, key_col, dv);
      __syncthreads();
      store_tile<kKeys, kDim, kThreads, T>(k_tile, store_keys - first, dim_qk, to_k.aligned, [&](int r) {
        return static_cast<T*>(to_k.data) + (first + r) * to_k.stride;
      });
      store_tile<kKeys, kDim, kThreads, T>(v_tile, store_keys - first, dim_v, to_v.aligned, [&](int r) {
        return static_cast<T*>(to_v.data) + (first + r) * to_v.stride;
      });
    }
    if (any_bad) {
      __syncthreads();
      for (int key = warp; key < kKeys && first + key < num_keys; key += kThreads / 32) {
        if (bad_keys[key] == 0) continue;
        key_gradients<T>(p, plan, work.sequence, sequence_step, work.head, latents, first + key);
      }
    }
  }
}

// The dQ accumulator, rounded and in its place.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    finish_dq_kernel(const __grid_constant__ AttentionBackwardParams p, const __grid_constant__ BackwardPlan plan) {
  using T = typename Config::Element;
  constexpr int kRows = Config::kRows, kThreads = Config::kThreads;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t staging = shared_address(shared);
  const int warp = threadIdx.x / 32;
  zero_query_tail<T>(p);
  if (p.num_sequences == 0) return;
  const WorkTile work = plan.row_schedule.decode(int(blockIdx.x));
  const RowMap map = make_row_map(p, work.sequence, work.head);
  for (int tile = work.tile; tile * kRows < map.rows; tile += plan.row_schedule.tiles) {
    const float* from = plan.dq_accumulator + dq_tile(p, map, kRows, tile) * (kRows * Config::kDim) + threadIdx.x;
    float dq[2][Config::kRowCols / 8][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < Config::kRowCols / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) dq[m][i][j] = from[((m * Config::kRowCols / 8 + i) * 4 + j) * kThreads];
    __syncthreads();
    store_dq<T, kRows, Config::kDim, kThreads>(p, plan, map, tile * kRows, staging, dq, warp % Config::kRowWarps * 32,
                                               warp / Config::kRowWarps * Config::kRowCols);
  }
}

template <typename T, int D>
const char* launch_attention_backward(const AttentionBackwardParams& p, const BackwardPlan& plan,
                                      const Launch& launch) {
  using Config = BackwardConfig<T, D, false>;
  const auto kernel =
      plan.score.plain ? attention_backward_kernel<Config> : attention_backward_kernel<BackwardConfig<T, D, true>>;
  const unsigned ctas = unsigned(std::max<int64_t>(plan.schedule.count(), 1));
  const char* message = launch_kernel(kernel, ctas, Config::kThreads, Config::kSharedBytes, launch, p, plan);
  if (message != nullptr || plan.dq_accumulator == nullptr) return message;
  return launch_kernel(finish_dq_kernel<Config>, unsigned(std::max<int64_t>(plan.row_schedule.count(), 1)),
                       Config::kThreads, Config::kRowBytes, launch, p, plan);
}

}  // namespace yoco::cuda
