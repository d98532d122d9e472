// Host side of the Hopper runs: tensor maps, choice of the instance.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/retention/sm90/run.h"

namespace yoco::cuda {
namespace {

// Dimensions: columns, rows, head, and two that RetentionMaps explains.
const char* chunk_map(CUtensorMap& map, DType dtype, const RetentionGrid& p, const View& v, int dim) {
  constexpr int64_t kSize = 2;
  const int64_t stride = p.time > 1 ? v.time_stride : 8;  // of a single token: anything
  const MapDim dense[] = {
      {dim, 1, 64}, {p.time, stride, kChunk}, {p.heads, v.head_stride, 1}, {p.batch, v.batch_stride, 1}, {1, 0, 1}};
  const MapDim packed[] = {{dim, 1, 64},
                           {kPackedRows, stride, kChunk},
                           {p.heads, v.head_stride, 1},
                           {p.time + 1, stride, 1},
                           {kPackedRows + 1, kPackedStride - stride, 1}};
  return make_tensor_map(map, map_type(dtype), kSize, v.data, p.cu_seqlens != nullptr ? packed : dense);
}

template <typename T, bool kBackward>
const char* launch_instance(const RetentionGrid& p, const RetentionMaps& maps, const RetentionInstance& instance,
                            const Launch& launch) {
  if (instance.dim_k == 64) return launch_retention_sm90<T, 64, 64, kBackward>(p, maps, launch);
  if (instance.dim_k == 256) return launch_retention_sm90<T, 256, 128, kBackward>(p, maps, launch);
  return instance.block_v == 64 ? launch_retention_sm90<T, 128, 64, kBackward>(p, maps, launch)
                                : launch_retention_sm90<T, 128, 128, kBackward>(p, maps, launch);
}

}  // namespace

bool retention_fits_sm90(const RetentionGrid& p, const RetentionInstance& instance) {
  if (p.time >= INT32_MAX - kChunk || tensor_map_encoder() == nullptr) return false;
  if (p.rotary.inv_freq != nullptr) {
    // Where v turns, a block has both columns of its pairs: among the first block_v, or in two panels of 64.
    const bool one_block =
        !p.runs[0].rotate_v || p.rotary.dim <= instance.block_v || (instance.block_v == 128 && p.rotary.dim == 256);
    if (!p.rotary.interleaved && (p.rotary.dim % 16 != 0 || !one_block)) return false;
  }
  for (int r = 0; r < p.num_runs; ++r) {
    const RetentionRun& run = p.runs[r];
    for (const View* v : {&run.q, &run.k, &run.v, &run.o, &run.x, &p.output_gate, &p.y}) {
      if (v->data != nullptr && !(tma_readable(*v, p.batch, p.time, p.heads, 2) && v->time_stride < kPackedStride)) {
        return false;
      }
    }
  }
  return true;
}

const char* launch_retention_sm90(const RetentionGrid& p, const RetentionInstance& instance, DType dtype, bool backward,
                                  const Launch& launch) {
  if (const char* message = set_device(launch)) return message;
  RetentionMaps maps{};
  for (int r = 0; r < p.num_runs; ++r) {
    const RetentionRun& run = p.runs[r];
    RetentionMaps::Run& to = maps.runs[r];
    const struct {
      CUtensorMap& map;
      const View& view;
      int dim;
    } tensors[] = {{to.q, run.q, run.dim_k}, {to.k, run.k, run.dim_k}, {to.v, run.v, run.dim_v},
                   {to.o, run.o, run.dim_v}, {to.x, run.x, run.dim_v}, {maps.output_gate, p.output_gate, run.dim_v},
                   {maps.y, p.y, run.dim_v}};
    for (const auto& t : tensors) {
      if (t.view.data == nullptr) continue;
      if (const char* message = chunk_map(t.map, dtype, p, t.view, t.dim)) return message;
    }
  }
  if (dtype == DType::kBFloat16) {
    return backward ? launch_instance<__nv_bfloat16, true>(p, maps, instance, launch)
                    : launch_instance<__nv_bfloat16, false>(p, maps, instance, launch);
  }
  return backward ? launch_instance<__half, true>(p, maps, instance, launch)
                  : launch_instance<__half, false>(p, maps, instance, launch);
}

}  // namespace yoco::cuda
