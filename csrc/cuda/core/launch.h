// Host side of a kernel call: device facts, error messages, the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "params.h"

namespace yoco::cuda {

// null for success, else CUDA's text (static storage), as KernelTable wants it.
inline const char* error_message(cudaError_t e) { return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

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

// This library has its own copy of the CUDA runtime: make it use the device the caller's launch names.
inline const char* set_device(const Launch& launch) {
  int current = -1;
  if (cudaGetDevice(&current) != cudaSuccess || current != launch.device)
    return error_message(cudaSetDevice(launch.device));
  return nullptr;
}

// One launch. Dynamic shared memory above the 48 KB default is opted into; the launch error (not an asynchronous fault
// of an earlier kernel on a real device) comes back as a message.
template <typename... Params, typename... Args>
const char* launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Launch& launch,
                          Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (const char* message = set_device(launch)) return message;
  if (shared_bytes > 48 * 1024) {
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
