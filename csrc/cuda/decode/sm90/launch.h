// Host side of the Hopper decode kernel, and what decode.cu calls.
#pragma once

#include "cuda/core/tensor_map.h"
#include "cuda/decode/plan.h"

namespace yoco::cuda::sm90 {

// K and V as [outer][heads][slots][columns]: boxes of kHopperBoxKeys slots x one panel, and of one slot.
struct DecodeMaps {
  CUtensorMap k, v, k_row, v_row;
};

inline const char* make_decode_maps(DecodeMaps& maps, const DecodeParams& p, bool latent, int panel_columns) {
  const DType dtype = latent ? p.dtype : p.cache_dtype;
  const size_t size = element_size(dtype);
  const CUtensorMapDataType type = size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : map_type(dtype);
  const int64_t outer = p.block_table != nullptr && !latent ? p.num_pages : p.batch;
  const int64_t slots = latent ? p.num_latents : p.block_table != nullptr ? p.page_size : p.capacity;
  const auto make = [&](CUtensorMap& map, const View& view, int64_t dim, int box_keys) {
    // A dimension that is broadcast (stride 0) has one element here; the kernel uses index 0.
    const MapDim dims[4] = {{dim, 1, panel_columns},
                            {slots, view.time_stride, box_keys},
                            {view.head_stride == 0 ? 1 : p.heads_kv, view.head_stride, 1},
                            {view.batch_stride == 0 ? 1 : outer, view.batch_stride, 1}};
    // A miss must not fetch the neighbouring head: another CTA reads that, later.
    const int64_t row_bytes = dim * static_cast<int64_t>(size);
    return make_tensor_map(map, type, size, view.data, dims, true,
                           row_bytes % 256 == 0   ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B
                           : row_bytes % 128 == 0 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B
                           : row_bytes % 64 == 0  ? CU_TENSOR_MAP_L2_PROMOTION_L2_64B
                                                  : CU_TENSOR_MAP_L2_PROMOTION_NONE);
  };
  const View& k = latent ? p.latent_k : p.k_cache;
  const View& v = latent ? p.latent_v : p.v_cache;
  if (const char* message = make(maps.k, k, p.dim_qk, kHopperBoxKeys)) return message;
  if (const char* message = make(maps.v, v, p.dim_v, kHopperBoxKeys)) return message;
  if (const char* message = make(maps.k_row, k, p.dim_qk, 1)) return message;
  return make(maps.v_row, v, p.dim_v, 1);
}

// decode/sm90/*.cu define these, one file per dtype and head dim.
template <typename T, int kHeadDim>
const char* launch_decode(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                          const DecodePartials& partials, const Launch& launch);
// The combination of the pieces; it is put on the SMs while the last pieces still run.
const char* launch_combine(const DecodeParams& p, const DecodePartials& partials, const Launch& launch);

}  // namespace yoco::cuda::sm90
