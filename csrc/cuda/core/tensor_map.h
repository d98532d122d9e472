// Tensor maps: how TMA (sm_90a) sees a strided tensor. Host code; the map travels as a kernel parameter
// (const __grid_constant__ CUtensorMap).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace yoco::cuda {

// One dimension of a tensor map; the innermost is contiguous and its stride is not used.
struct MapDim {
  int64_t size;
  int64_t stride;  // elements; bytes must be a multiple of 16
  int box;         // 1 .. 256
};

// The driver's encoder, found at run time: the library does not link libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (e != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A map for `type` with boxes of dims[i].box, 128-byte swizzle when `swizzle` (the innermost box is then 128 bytes),
// zero outside the tensor. `promotion`: what a miss fetches into L2. Empty dimensions count as 1 (never loaded from).
// Returns null or a message.
template <int kRank>
const char* make_tensor_map(CUtensorMap& map, CUtensorMapDataType type, size_t element_bytes, const void* data,
                            const MapDim (&dims)[kRank], bool swizzle = true,
                            CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr)
    return "the CUDA driver has no cuTensorMapEncodeTiled: it is older than the Hopper kernels need";
  cuuint64_t sizes[kRank], strides[kRank];
  cuuint32_t box[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    sizes[i] = cuuint64_t(dims[i].size > 0 ? dims[i].size : 1);
    box[i] = cuuint32_t(dims[i].box);
    steps[i] = 1;
    // The stride of a dimension of size 1 means nothing and may be anything in PyTorch.
    if (i > 0) strides[i - 1] = dims[i].size > 1 ? cuuint64_t(dims[i].stride) * element_bytes : 16;
  }
  const CUresult result = encode(
      &map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor";
}

inline CUtensorMapDataType map_type(DType t) {
  return t == DType::kFloat16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
         : t == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

// TMA can read this [batch, time, heads, dim] view: rows of 16-byte chunks, and no broadcast dimension (stride 0).
inline bool tma_readable(const View& v, int64_t batch, int64_t time, int64_t heads, size_t element_bytes) {
  const auto fits = [&](int64_t size, int64_t stride) {
    return size <= 1 || (stride > 0 && stride * int64_t(element_bytes) % 16 == 0 &&
                         stride * int64_t(element_bytes) < (int64_t(1) << 40));
  };
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && fits(batch, v.batch_stride) && fits(time, v.time_stride) &&
         fits(heads, v.head_stride);
}

}  // namespace yoco::cuda
