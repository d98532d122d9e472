// The tensor-core kernels read 16 bytes at a time. A view whose rows are not aligned to that (a column slice at an odd
// offset, say) is copied once into the workspace, instead of a slow load path in every kernel.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"

namespace yoco::cuda {

template <typename T>
__global__ void __launch_bounds__(256) pack_rows_kernel(View from, T* to, int64_t time, int64_t heads, int64_t dim) {
  const int64_t row = blockIdx.x;  // (batch * time + t) * heads + head
  const int64_t head = row % heads, t = row / heads % time, b = row / heads / time;
  const T* source =
      static_cast<const T*>(from.data) + b * from.batch_stride + t * from.time_stride + head * from.head_stride;
  for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) to[row * dim + d] = source[d];
}

// Hands out pieces of a workspace; with base null it only counts.
struct WorkspaceCursor {
  char* base;
  size_t used = 0;
  template <typename T>
  T* take(size_t count) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 255) / 256 * 256;
    return p;
  }
};

// Makes `v` [batch, time, heads, dim] readable 16 bytes at a time. With base null only the workspace is counted.
template <typename T>
const char* align_rows(View& v, int64_t batch, int64_t time, int64_t heads, int64_t dim, WorkspaceCursor& workspace,
                       const Launch& launch) {
  if (v.data == nullptr || aligned(v, sizeof(T), 16)) return nullptr;
  if (v.batch_stride == 0) batch = 1;  // shared over the batch
  const int64_t rows = batch * time * heads;
  T* to = workspace.take<T>(size_t(rows * dim));
  if (to == nullptr || rows == 0) return nullptr;
  if (rows >= (int64_t(1) << 31)) return "attention: an input that is not aligned to 16 bytes has more than 2^31 rows";
  const char* message =
      launch_kernel(pack_rows_kernel<T>, dim3(unsigned(rows)), 256, 0, launch, v, to, time, heads, dim);
  const int64_t row = dim;
  v = View{to, v.batch_stride == 0 ? 0 : time * heads * row, heads * row, row};
  return message;
}

}  // namespace yoco::cuda
