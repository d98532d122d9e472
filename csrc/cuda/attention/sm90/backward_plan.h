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

struct BackwardMaps {
  CUtensorMap q, d_out;  // [batch][time][KV head][head in group][dim]: a box is a tile of rows
  CUtensorMap k, v;      // [batch][head][time][dim]
  CUtensorMap latent_k;  // like k; batch 1 when shared
  CUtensorMap latent_v;
};

// D: 64, 128 or 256. dK, dV (and with a dq_accumulator dQ) by key tiles. counter: one zeroed int, the next tile of a
// CTA.
template <typename T, int D>
const char* launch_attention_backward(const AttentionBackwardParams& p, const BackwardPlan& plan, int* counter,
                                      const Launch& launch);

inline bool d_out_fits(const AttentionBackwardParams& p) {
  const bool copied = !aligned(p.d_out, 2, 16);  // by align_rows
  return copied ? p.batch <= 1 || p.d_out.batch_stride != 0 : readable(p.d_out, p.batch, p.time_q, p.heads_q);
}

// The rule of dispatch: what the Hopper kernel does not serve runs on the kernel of the sm_80 family.
//   softcap, alibi         and negative scales: scores that are more than scale * q.k
//   group > kRows          a tile of rows holds whole tokens
//   broadcast inputs       TMA reads no dimension of stride 0
inline bool backward_fits(const AttentionBackwardParams& p) {
  const int64_t dim = std::max(p.dim_qk, p.dim_v);
  return p.dtype != DType::kFloat32 && make_score_params(p).plain && p.heads_q / p.heads_kv <= backward_rows(dim) &&
         inputs_fit(p) && d_out_fits(p);
}

}  // namespace yoco::cuda::sm90
