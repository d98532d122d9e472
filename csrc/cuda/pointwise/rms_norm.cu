// y = x * rsqrt(mean(x^2) + eps) * weight with x = input (+ residual), and its backward.
//
// Rows up to 1024 elements (bf16) belong to one warp, longer ones to a block of 64, 128 or 256 threads. A row stays in
// registers between the reduction and the result (kItems vectors per lane: up to 8192 bf16 or 4096 float32 elements);
// what is longer is read a second time. The weight gradient is summed in a fixed order: per block over its rows in
// shared memory, then over the blocks by a second kernel, with a number of blocks that depends on the shape only, not
// on the device.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/core/launch.h"
#include "cuda/kernels.h"
#include "cuda/pointwise/norm_rows.cuh"

namespace yoco::cuda {
namespace {

constexpr int kItems = 4;
constexpr int64_t kMaxRowParts = 528;  // a block may hold one row only: four per SM of an H100
// A row belongs to 32 lanes of a block of eight rows, or to a block of 64, 128 or 256.
template <int kLanes>
constexpr int kBlock = kLanes == 32 ? kThreads : kLanes;
// Blocks per SM, said in the launch bounds: left to itself the compiler spills to fit one block more.
template <int kLanes, int kThreadsPerSm>
constexpr int kResident = kThreadsPerSm / kBlock<kLanes>;

// Weight sums of a group of lanes in shared memory: element j of a lane's vector `item` at (item * N + j) * kSumStride
// + lane. A warp's sums lie in different banks when a row is added (stride 1), and, through the padding, when they are
// read column by column (stride kSumStride between the N elements of a vector).
template <int N, int kLanes>
constexpr int kSumStride = kLanes + (N == 1 ? 0 : 32 / N);
template <int N, int kLanes>
__host__ __device__ constexpr int64_t sum_floats(int64_t dim) {
  return (dim + kLanes * N - 1) / (kLanes * N) * N * kSumStride<N, kLanes>;
}

template <typename T, int N, int kLanes>
__global__ void __launch_bounds__(kBlock<kLanes>, (kResident<kLanes, 1024>)) forward_kernel(const RmsNormParams p) {
  __shared__ float scratch[kThreads / 32];
  const int64_t row = int64_t(blockIdx.x) * (kBlock<kLanes> / kLanes) + threadIdx.x / kLanes;
  if (row >= p.rows) return;  // whole warps (or the whole block) leave together
  const int dim = static_cast<int>(p.dim), lane = threadIdx.x % kLanes;
  const T* x = static_cast<const T*>(p.x) + row * p.dim;
  const T* residual = p.residual != nullptr ? static_cast<const T*>(p.residual) + row * p.dim : nullptr;
  T* residual_out = p.residual_out != nullptr ? static_cast<T*>(p.residual_out) + row * p.dim : nullptr;
  T* y = static_cast<T*>(p.y) + row * p.dim;
  const bool float_weight = p.weight_dtype == DType::kFloat32;
  // The sum is rounded to T before it is normalised: the backward and every other reader see that value.
  const auto add = [&](Vec<T, N>& a, const Vec<T, N>& b) {
    if (residual == nullptr) return;
#pragma unroll
    for (int j = 0; j < N; ++j) a[j] = from_float<T>(to_float(a[j]) + to_float(b[j]));
  };
  const auto read = [&](int column) {
    Vec<T, N> v = load_const<N>(x + column);
    add(v, residual != nullptr ? load_const<N>(residual + column) : Vec<T, N>{});
    return v;
  };
  // All loads before the first use.
  Vec<T, N> kept[kItems], kept_residual[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = (i * kLanes + lane) * N;
    kept[i] = column < dim ? load_const<N>(x + column) : Vec<T, N>{};
    kept_residual[i] = residual != nullptr && column < dim ? load_const<N>(residual + column) : Vec<T, N>{};
  }
  float sum = 0.f;
  const auto add_squares = [&](const Vec<T, N>& v) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum += to_float(v[j]) * to_float(v[j]);
  };
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    add(kept[i], kept_residual[i]);
    add_squares(kept[i]);
  }
  for (int column = (kItems * kLanes + lane) * N; column < dim; column += kLanes * N) add_squares(read(column));
  const float rstd = rsqrtf(row_sum<kLanes>(sum, scratch) / dim + static_cast<float>(p.eps));
  const auto finish = [&](const Vec<T, N>& v, int column) {
    float w[N], out[N];
    load_weight<T>(w, p.weight, float_weight, column);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = to_float(v[j]) * rstd * w[j];
    store_float(y + column, out);
    if (residual_out != nullptr) store<N>(residual_out + column, v);
  };
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = (i * kLanes + lane) * N;
    if (column < dim) finish(kept[i], column);
  }
  for (int column = (kItems * kLanes + lane) * N; column < dim; column += kLanes * N) finish(read(column), column);
  if (lane == 0) static_cast<float*>(p.rstd)[row] = rstd;
}

// With n = x * rstd:  dx = rstd * (w dy - n * mean(w dy n)) + d_residual_out,  d_weight = sum over rows of dy * n.
// Block b takes the rows b * rows_per_part ...; partial[b][dim] = its sum for d_weight (null: not wanted).
template <typename T, int N, int kLanes>
__global__ void __launch_bounds__(kBlock<kLanes>, (kResident<kLanes, 512>))
    backward_kernel(const RmsNormBackwardParams p, int64_t rows_per_part, float* partial) {
  constexpr int kGroups = kBlock<kLanes> / kLanes;
  constexpr int kStride = kSumStride<N, kLanes>;
  extern __shared__ __align__(16) float weight_sum[];  // [kGroups][sum_floats]; each column has one lane per group
  __shared__ float scratch[kThreads / 32];
  const int dim = static_cast<int>(p.dim), lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const bool float_weight = p.weight_dtype == DType::kFloat32;
  const int padded = static_cast<int>(sum_floats<N, kLanes>(dim));
  float* sums = weight_sum + group * padded + lane;
  if (partial != nullptr) {
    for (int i = 0; i < padded; i += kStride) sums[i] = 0.f;
  }
  const int64_t begin = int64_t(blockIdx.x) * rows_per_part;
  const int64_t end = min(begin + rows_per_part, p.rows);
  for (int64_t row = begin + group; row < end; row += kGroups) {
    const T* x = static_cast<const T*>(p.x) + row * p.dim;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dim;
    const T* extra = p.d_residual_out != nullptr ? static_cast<const T*>(p.d_residual_out) + row * p.dim : nullptr;
    T* dx = static_cast<T*>(p.dx) + row * p.dim;
    const float rstd = static_cast<const float*>(p.rstd)[row];
    Vec<T, N> kept_x[kItems], kept_dy[kItems], kept_extra[kItems];
    float sum = 0.f;
    const auto accumulate = [&](const Vec<T, N>& vx, const Vec<T, N>& vd, int column) {
      float w[N];
      load_weight<T>(w, p.weight, float_weight, column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float n = to_float(vx[j]) * rstd, d = to_float(vd[j]);
        sum += d * w[j] * n;
        if (partial != nullptr) sums[(column / (kLanes * N) * N + j) * kStride] += d * n;
      }
    };
    // All loads before the first use.
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int column = (i * kLanes + lane) * N;
      const bool there = column < dim;
      kept_x[i] = there ? load_const<N>(x + column) : Vec<T, N>{};
      kept_dy[i] = there ? load_const<N>(dy + column) : Vec<T, N>{};
      kept_extra[i] = there && extra != nullptr ? load_const<N>(extra + column) : Vec<T, N>{};
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int column = (i * kLanes + lane) * N;
      if (column < dim) accumulate(kept_x[i], kept_dy[i], column);
    }
    for (int column = (kItems * kLanes + lane) * N; column < dim; column += kLanes * N) {
      accumulate(load_const<N>(x + column), load_const<N>(dy + column), column);
    }
    const float mean = row_sum<kLanes>(sum, scratch) / dim;
    const auto finish = [&](const Vec<T, N>& vx, const Vec<T, N>& vd, const Vec<T, N>& ve, int column) {
      float w[N], out[N];
      load_weight<T>(w, p.weight, float_weight, column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        out[j] = rstd * (to_float(vd[j]) * w[j] - to_float(vx[j]) * rstd * mean) + to_float(ve[j]);
      }
      store_float(dx + column, out);
    };
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int column = (i * kLanes + lane) * N;
      if (column < dim) finish(kept_x[i], kept_dy[i], kept_extra[i], column);
    }
    for (int column = (kItems * kLanes + lane) * N; column < dim; column += kLanes * N) {
      finish(load_const<N>(x + column), load_const<N>(dy + column),
             extra != nullptr ? load_const<N>(extra + column) : Vec<T, N>{}, column);
    }
  }
  if (partial == nullptr) return;
  __syncthreads();
  for (int column = threadIdx.x; column < dim; column += kBlock<kLanes>) {
    const int vector = column / N, at = (vector / kLanes * N + column % N) * kStride + vector % kLanes;
    float sum = 0.f;
    for (int g = 0; g < kGroups; ++g) sum += weight_sum[g * padded + at];
    partial[blockIdx.x * p.dim + column] = sum;
  }
}

// run(N, lanes): as few lanes as hold a row with kItems vectors each, so that every thread has that many loads in
// flight.
template <typename T, typename Run>
const char* with_lanes(int64_t dim, bool vectors, Run run) {
  using std::integral_constant;
  constexpr int N = kVec<T>;
  using Wide = integral_constant<int, N>;
  using One = integral_constant<int, 1>;
  using Warp = integral_constant<int, 32>;
  using Block = integral_constant<int, kThreads>;
  if (!vectors) return dim <= 32 * N * kItems ? run(One{}, Warp{}) : run(One{}, Block{});
  if (dim <= 32 * N * kItems) return run(Wide{}, Warp{});
  if (dim <= 64 * N * kItems) return run(Wide{}, integral_constant<int, 64>{});
  if (dim <= 128 * N * kItems) return run(Wide{}, integral_constant<int, 128>{});
  return run(Wide{}, Block{});
}

}  // namespace

const char* rms_norm(const RmsNormParams& p, const Launch& launch) {
  if (p.dim == 0) return nullptr;
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    const bool vectors = p.dim % kVec<T> == 0 && aligned(p.x, 16) && aligned(p.residual, 16) && aligned(p.y, 16) &&
                         aligned(p.residual_out, 16) && aligned(p.weight, 16);
    return with_lanes<T>(p.dim, vectors, [&](auto n, auto lanes) {
      const int64_t blocks = ceil_div(p.rows, kBlock<lanes> / lanes);
      return launch_kernel(forward_kernel<T, n, lanes>, dim3(static_cast<unsigned>(blocks)), kBlock<lanes>, 0, launch,
                           p);
    });
  });
}

size_t rms_norm_backward_workspace(const RmsNormBackwardParams& p, const Launch&) {
  return p.d_weight == nullptr ? 0 : static_cast<size_t>(kMaxRowParts * p.dim) * sizeof(float);
}

const char* rms_norm_backward(const RmsNormBackwardParams& p, const Launch& launch) {
  if (p.dim == 0) return nullptr;
  if (p.d_weight != nullptr && p.dim > kMaxWeightGradient) {
    return "rms_norm: the cuda back end gives weight gradients for rows up to 32768 elements";
  }
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    const bool vectors = p.dim % kVec<T> == 0 && aligned(p.x, 16) && aligned(p.dy, 16) && aligned(p.dx, 16) &&
                         aligned(p.d_residual_out, 16) && aligned(p.weight, 16);
    return with_lanes<T>(p.dim, vectors, [&](auto n, auto lanes) -> const char* {
      constexpr int kGroups = kBlock<lanes> / lanes;
      const Parts split = split_rows(p.rows, kGroups, kMaxRowParts);
      auto* partial = p.d_weight != nullptr ? static_cast<float*>(p.workspace) : nullptr;
      const size_t shared = partial != nullptr ? kGroups * sum_floats<n, lanes>(p.dim) * sizeof(float) : 0;
      const char* message = launch_kernel(backward_kernel<T, n, lanes>, dim3(static_cast<unsigned>(split.parts)),
                                          kBlock<lanes>, shared, launch, p, split.rows_per_part, partial);
      if (message != nullptr || partial == nullptr) return message;
      return launch_kernel(weight_gradient_kernel, dim3(static_cast<unsigned>(ceil_div(p.dim, 32))), kThreads, 0,
                           launch, partial, split.parts, p.dim, static_cast<float*>(p.d_weight));
    });
  });
}

}  // namespace yoco::cuda
