// Host side of a kernel call: device facts, error messages, the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "params.h"

namespace yoco::cuda {

// null for success, else CUDA's text (static storage), as KernelTable wants it. The runtime keeps a failed call's error
// for the next cudaGetLastError: taken out here, or the next launch, though successful, would report it again.
inline const char* error_message(cudaError_t e) {
  if (e == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(e);
}

// Returns from the calling function (const char*) when a CUDA call fails.
#define YOCO_CUDA_CHECK(expr)                                                    \
  do {                                                                           \
    if (const char* message = ::yoco::cuda::error_message(expr)) return message; \
  } while (0)

namespace detail {
// Attribute queries cost microseconds on some drivers; a value never changes, so a race only asks twice.
template <cudaDeviceAttr kAttribute>
int cached_attribute(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> cache[kDevices];  // value + 1; 0 = not asked yet
  if (device < 0 || device >= kDevices) return 0;
  int v = cache[device].load(std::memory_order_relaxed);
  if (v == 0) {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, kAttribute, device) != cudaSuccess) return 0;
    v = value + 1;
    cache[device].store(v, std::memory_order_relaxed);
  }
  return v - 1;
}
}  // namespace detail

inline int sm_count(int device) { return detail::cached_attribute<cudaDevAttrMultiProcessorCount>(device); }
inline int max_shared_memory(int device) {
  return detail::cached_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device);
}
// 80, 90, ...
inline int compute_capability(int device) {
  return 10 * detail::cached_attribute<cudaDevAttrComputeCapabilityMajor>(device) +
         detail::cached_attribute<cudaDevAttrComputeCapabilityMinor>(device);
}

// This library has its own copy of the CUDA runtime: make it use the device the caller's launch names. Always, not only
// where cudaGetDevice disagrees: that answers 0 in a thread that has no context yet, and cuTensorMapEncodeTiled wants
// one. (The caller's device comes back behind the call: csrc/torch/backend.h.)
inline const char* set_device(const Launch& launch) { return error_message(cudaSetDevice(launch.device)); }

// Without asking, a block gets 48 KB of shared memory, static and dynamic together. No kernel has 8 KB of static and
// any dynamic.
constexpr size_t kSharedUnasked = 40 * 1024;

// One launch. The launch error (not an asynchronous fault of an earlier kernel on a real device) comes back as a
// message.
template <typename... Params, typename... Args>
const char* launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Launch& launch,
                          Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (const char* message = set_device(launch)) return message;
  if (shared_bytes > kSharedUnasked) {
    if (shared_bytes > size_t(max_shared_memory(launch.device))) {
      return "this call needs more shared memory per block than this GPU has: kernels for these head dims are sized "
             "for "
             "compute capability 8.0 and data centre GPUs from 9.0 on (163 KB or more)";
    }
    YOCO_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(static_cast<Params>(args)...);
  return error_message(cudaGetLastError());
}

// Calls f(T()) with the element type of a 16- or 32-bit dtype; message otherwise.
#define YOCO_CUDA_DISPATCH(dtype, T, ...)                                                  \
  [&]() -> const char* {                                                                   \
    switch (dtype) {                                                                       \
      case ::yoco::DType::kBFloat16: {                                                     \
        using T = __nv_bfloat16;                                                           \
        return __VA_ARGS__();                                                              \
      }                                                                                    \
      case ::yoco::DType::kFloat16: {                                                      \
        using T = __half;                                                                  \
        return __VA_ARGS__();                                                              \
      }                                                                                    \
      case ::yoco::DType::kFloat32: {                                                      \
        using T = float;                                                                   \
        return __VA_ARGS__();                                                              \
      }                                                                                    \
      default:                                                                             \
        return "the cuda back end takes bfloat16, float16 and float32 here; float64 runs " \
               "on the cpu back end and in yoco_ext.reference";                            \
    }                                                                                      \
  }()

inline size_t element_size(DType t) {
  switch (t) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    default:
      return 1;
  }
}

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Rows of this view can be accessed `bytes` at a time: pointer and every stride are multiples. `size` = element bytes.
inline bool aligned(const View& v, size_t size, size_t bytes) {
  return aligned(v.data, bytes) && v.batch_stride * size % bytes == 0 && v.time_stride * size % bytes == 0 &&
         v.head_stride * size % bytes == 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace yoco::cuda
