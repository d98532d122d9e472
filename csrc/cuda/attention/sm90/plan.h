// Hopper attention as the host sees it: tiles, tensor maps, the instances (one file each beside this one).
#pragma once

#include "cuda/attention/plan.h"
#include "cuda/core/tensor_map.h"

namespace yoco::cuda::sm90 {

// Reasons in forward.cuh. kRows: rows (token x query head) per tile; a tile holds whole tokens, kRows / group of them.
template <int D>
struct ForwardTiles {
  static constexpr int kWarpgroups = D == 64 ? 3 : 2;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kKeys = D == 256 ? 80 : 128;
};
inline int forward_rows(int64_t dim) { return dim <= 64 ? ForwardTiles<64>::kRows : ForwardTiles<128>::kRows; }

struct ForwardMaps {
  CUtensorMap q;         // [batch][time][KV head][head in group][dim]: a box is a tile of rows
  CUtensorMap k, v;      // [batch][head][time][dim]
  CUtensorMap latent_k;  // like k; batch 1 when shared
  CUtensorMap latent_v;
};

// counter: one zeroed int when there are more tiles than CTAs (the next tile of a CTA), else null.
template <typename T, int D>
const char* launch_attention_forward(const AttentionParams& p, const ForwardPlan& plan, int* counter,
                                     const Launch& launch);

inline bool readable(const View& v, int64_t batch, int64_t time, int64_t heads) {
  return v.data == nullptr || tma_readable(v, batch, time, heads, 2);
}

// TMA can read this input. Asked before the copies of align.h as well: those leave nothing to object to.
inline bool fits(const View& v, int64_t batch, int64_t time, int64_t heads) {
  const bool copied = v.data != nullptr && !aligned(v, 2, 16);
  return copied ? batch <= 1 || v.batch_stride != 0 : readable(v, batch, time, heads);
}
inline bool inputs_fit(const AttentionParams& p) {
  const int64_t latent_batch = p.latents_shared ? 1 : p.batch;
  return fits(p.q, p.batch, p.time_q, p.heads_q) && fits(p.k, p.batch, p.time_k, p.heads_kv) &&
         fits(p.v, p.batch, p.time_k, p.heads_kv) && fits(p.latent_k, latent_batch, p.num_latents, p.heads_kv) &&
         fits(p.latent_v, latent_batch, p.num_latents, p.heads_kv);
}

// ---- tensor maps
// A map of
// [batch, time, heads, dim] with boxes of `rows` tokens of one head. Nothing is loaded of an empty tensor.
inline const char* make_rows_map(CUtensorMap& map, const View& v, DType type, int64_t batch, int64_t time,
                                 int64_t heads, int64_t dim, int rows) {
  if (v.data == nullptr || batch * time * heads == 0) return nullptr;
  const MapDim dims[4] = {
      {dim, 1, 64}, {time, v.time_stride, rows}, {heads, v.head_stride, 1}, {batch, v.batch_stride, 1}};
  return make_tensor_map(map, map_type(type), 2, v.data, dims);
}
// The same with boxes of `tokens` tokens, `group` heads each, heads fastest: rows as RowMap counts them.
inline const char* make_grouped_map(CUtensorMap& map, const View& v, DType type, int64_t batch, int64_t time,
                                    int64_t heads_kv, int64_t group, int64_t dim, int tokens) {
  if (v.data == nullptr || batch * time * heads_kv == 0) return nullptr;
  const MapDim dims[5] = {{dim, 1, 64},
                          {group, v.head_stride, int(group)},
                          {time, v.time_stride, tokens},
                          {heads_kv, v.head_stride * group, 1},
                          {batch, v.batch_stride, 1}};
  return make_tensor_map(map, map_type(type), 2, v.data, dims);
}

}  // namespace yoco::cuda::sm90
