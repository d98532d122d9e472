// Hopper attention backward as the host sees it: tiles, tensor maps, what it serves, the instances (one file each).
#pragma once

#include "cuda/attention/sm90/plan.h"

namespace yoco::cuda::sm90 {

// Reasons in backward.cuh. A tile of rows holds whole tokens: kRows / group * group of kRows.
template <int D>
struct BackwardTiles {
  static constexpr int kRows = D == 64 ? 128 : 64;
  static constexpr int kKeys = D == 256 ? 64 : 128;
};
inline int backward_rows(int64_t dim) { return dim <= 64 ? BackwardTiles<64>::kRows : BackwardTiles<128>::kRows; }

constexpr int kBackwardQRows = 128;  // of dQ by rows, at every head dim

struct BackwardMaps {
  CUtensorMap q, d_out;  // [batch][time][KV head][head in group][dim]: a box is a tile of rows
  CUtensorMap k, v;      // [batch][head][time][dim]
  CUtensorMap latent_k;  // like k; batch 1 when shared
  CUtensorMap latent_v;
};
// For tiles of this many rows and keys.
inline const char* make_backward_maps(BackwardMaps& maps, const AttentionBackwardParams& p, int rows, int keys) {
  const int64_t group = p.heads_q / p.heads_kv, latent_batch = p.latents_shared ? 1 : p.batch;
  const int tokens = int(rows / group);
  const char* m = make_grouped_map(maps.q, p.q, p.dtype, p.batch, p.time_q, p.heads_kv, group, p.dim_qk, tokens);
  if (!m) m = make_grouped_map(maps.d_out, p.d_out, p.dtype, p.batch, p.time_q, p.heads_kv, group, p.dim_v, tokens);
  const auto key_map = [&](CUtensorMap& map, const View& v, int64_t batch, int64_t time, int64_t dim) {
    if (!m) m = make_rows_map(map, v, p.dtype, batch, time, p.heads_kv, dim, keys);
  };
  key_map(maps.k, p.k, p.batch, p.time_k, p.dim_qk);
  key_map(maps.v, p.v, p.batch, p.time_k, p.dim_v);
  key_map(maps.latent_k, p.latent_k, latent_batch, p.num_latents, p.dim_qk);
  key_map(maps.latent_v, p.latent_v, latent_batch, p.num_latents, p.dim_v);
  return m;
}

// D: 64, 128 or 256. dK, dV (and with a dq_accumulator dQ) by key tiles. counter: one zeroed int, the next tile of a
// CTA.
template <typename T, int D>
const char* launch_attention_backward(const AttentionBackwardParams& p, const BackwardPlan& plan, int* counter,
                                      const Launch& launch);
// dQ by row tiles.
template <typename T, int D>
const char* launch_attention_backward_q(const AttentionBackwardParams& p, const BackwardPlan& plan,
                                        const Launch& launch);

// The rule of dispatch: what the Hopper kernels do not serve runs on those of the sm_80 family.
//   group > rows           a tile of rows holds whole tokens
//   broadcast inputs       TMA reads no dimension of stride 0
inline bool backward_fits(const AttentionBackwardParams& p, int rows) {
  return p.dtype != DType::kFloat32 && p.heads_q / p.heads_kv <= rows && inputs_fit(p) &&
         fits(p.d_out, p.batch, p.time_q, p.heads_q);
}
inline bool backward_fits(const AttentionBackwardParams& p) {
  return backward_fits(p, backward_rows(std::max(p.dim_qk, p.dim_v)));
}
inline bool backward_q_fits(const AttentionBackwardParams& p) { return backward_fits(p, kBackwardQRows); }

}  // namespace yoco::cuda::sm90
