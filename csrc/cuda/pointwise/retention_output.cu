// y = o / sqrt(mean(o^2) + eps) * silu(gate), one norm per head, and its backward. Each row of `dim` elements belongs
// to a group of lanes; the row stays in registers between the reduction and the result (kItems vectors per lane), what
// is longer is read a second time.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/core/activation.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/kernels.h"

namespace yoco::cuda {
namespace {

constexpr int kThreads = 256;
template <typename T>
constexpr int kItems = sizeof(T) == 4 ? 2 : 1;  // 256 elements in 32 lanes

YOCO_DEVICE int64_t row_offset(const View& v, int64_t batch, int64_t time, int64_t head) {
  return batch * v.batch_stride + time * v.time_stride + head * v.head_stride;
}

struct Row {
  int64_t batch, time, head;
};
// row < 2^31 (the host checks): a 64-bit division is a call, around which the kernels would spill.
template <typename Params>
YOCO_DEVICE Row split_row(const Params& p, int64_t row) {
  const uint32_t heads = uint32_t(p.heads), time = uint32_t(p.time);
  const uint32_t bt = uint32_t(row) / heads, batch = bt / time;
  return {int64_t(batch), int64_t(bt - batch * time), int64_t(uint32_t(row) - bt * heads)};
}

// y may be o, so o does not come through the read-only path. The gate does.
template <typename T, int N, int kLanes>
__global__ void __launch_bounds__(kThreads) forward_kernel(const RetentionOutputParams p) {
  const int64_t index = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool active = index < p.batch * p.time * p.heads;  // all lanes of a warp take part in the shuffles
  const Row row = split_row(p, active ? index : 0);
  const T* o = static_cast<const T*>(p.o.data) + row_offset(p.o, row.batch, row.time, row.head);
  const T* gate = static_cast<const T*>(p.gate.data) + row_offset(p.gate, row.batch, row.time, row.head);
  T* y = static_cast<T*>(p.y.data) + row_offset(p.y, row.batch, row.time, row.head);
  // Groups without a row read nothing: another block may be writing there.
  const int dim = active ? static_cast<int>(p.dim) : 0, lane = threadIdx.x % kLanes;
  // All loads before the first use: the gate must not wait for the reduction. Kept as stored: half the registers.
  Vec<T, N> kept_o[kItems<T>], kept_gate[kItems<T>];
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) {
    const int column = (i * kLanes + lane) * N;
    kept_o[i] = column < dim ? load<N>(o + column) : Vec<T, N>{};
    kept_gate[i] = column < dim ? load_const<N>(gate + column) : Vec<T, N>{};
  }
  float sum = 0.f;
  const auto accumulate = [&](const Vec<T, N>& v) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum += to_float(v[j]) * to_float(v[j]);
  };
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) accumulate(kept_o[i]);
  for (int column = (kItems<T> * kLanes + lane) * N; column < dim; column += kLanes * N) {
    accumulate(load<N>(o + column));
  }
  // __fdividef: an exact quotient is a call as well.
  const float rstd = rsqrtf(__fdividef(group_sum<kLanes>(sum), dim) + static_cast<float>(p.eps));
  if (!active) return;
  const auto finish = [&](const Vec<T, N>& vo, const Vec<T, N>& vg, int column) {
    float out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = to_float(vg[j]);
      out[j] = to_float(vo[j]) * rstd * (g * sigmoid<T>(g));
    }
    store_float(y + column, out);
  };
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) {
    const int column = (i * kLanes + lane) * N;
    if (column < dim) finish(kept_o[i], kept_gate[i], column);
  }
  for (int column = (kItems<T> * kLanes + lane) * N; column < dim; column += kLanes * N) {
    finish(load<N>(o + column), load_const<N>(gate + column), column);
  }
}

// With n = o * rstd and dn = dy * silu(gate):  d_o = rstd * (dn - n * mean(dn * n)),  d_gate = dy * n * silu'(gate).
template <typename T, int N, int kLanes>
__global__ void __launch_bounds__(kThreads) backward_kernel(const RetentionOutputBackwardParams p) {
  const int64_t index = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool active = index < p.batch * p.time * p.heads;
  const Row row = split_row(p, active ? index : 0);
  const T* o = static_cast<const T*>(p.o.data) + row_offset(p.o, row.batch, row.time, row.head);
  const T* gate = static_cast<const T*>(p.gate.data) + row_offset(p.gate, row.batch, row.time, row.head);
  const T* dy = static_cast<const T*>(p.dy.data) + row_offset(p.dy, row.batch, row.time, row.head);
  T* d_o = static_cast<T*>(p.d_o.data) + row_offset(p.d_o, row.batch, row.time, row.head);
  T* d_gate = static_cast<T*>(p.d_gate.data) + row_offset(p.d_gate, row.batch, row.time, row.head);
  const int dim = static_cast<int>(p.dim), lane = threadIdx.x % kLanes;
  // Kept as stored: half the registers of floats.
  Vec<T, N> kept_o[kItems<T>], kept_gate[kItems<T>], kept_dy[kItems<T>];
  float sum_oo = 0.f, sum_dno = 0.f;
  const auto accumulate = [&](const Vec<T, N>& vo, const Vec<T, N>& vg, const Vec<T, N>& vd) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float x = to_float(vo[j]), g = to_float(vg[j]);
      sum_oo += x * x;
      sum_dno += to_float(vd[j]) * g * sigmoid<T>(g) * x;
    }
  };
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) {
    const int column = (i * kLanes + lane) * N;
    if (column >= dim) continue;
    kept_o[i] = load_const<N>(o + column);
    kept_gate[i] = load_const<N>(gate + column);
    kept_dy[i] = load_const<N>(dy + column);
    accumulate(kept_o[i], kept_gate[i], kept_dy[i]);
  }
  for (int column = (kItems<T> * kLanes + lane) * N; column < dim; column += kLanes * N) {
    accumulate(load_const<N>(o + column), load_const<N>(gate + column), load_const<N>(dy + column));
  }
  const float rstd = rsqrtf(group_sum<kLanes>(sum_oo) / dim + static_cast<float>(p.eps));
  const float mean = group_sum<kLanes>(sum_dno) * rstd / dim;
  if (!active) return;
  const auto finish = [&](const Vec<T, N>& vo, const Vec<T, N>& vg, const Vec<T, N>& vd, int column) {
    float out_o[N], out_g[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float n = to_float(vo[j]) * rstd, g = to_float(vg[j]), d = to_float(vd[j]), s = sigmoid<T>(g);
      out_o[j] = rstd * (d * g * s - n * mean);
      out_g[j] = d * n * s * (1.f + g * (1.f - s));
    }
    store_float(d_o + column, out_o);
    store_float(d_gate + column, out_g);
  };
#pragma unroll
  for (int i = 0; i < kItems<T>; ++i) {
    const int column = (i * kLanes + lane) * N;
    if (column < dim) finish(kept_o[i], kept_gate[i], kept_dy[i], column);
  }
  for (int column = (kItems<T> * kLanes + lane) * N; column < dim; column += kLanes * N) {
    finish(load_const<N>(o + column), load_const<N>(gate + column), load_const<N>(dy + column), column);
  }
}

// run(N, lanes): lanes is the smallest power of two that covers a row of `dim` elements with one vector each.
template <typename T, typename Run>
const char* with_lanes(int64_t dim, bool vectors, Run run) {
  using std::integral_constant;
  if (!vectors) return run(integral_constant<int, 1>{}, integral_constant<int, 32>{});
  constexpr int N = kVec<T>;
  if (dim <= 8 * N) return run(integral_constant<int, N>{}, integral_constant<int, 8>{});
  if (dim <= 16 * N) return run(integral_constant<int, N>{}, integral_constant<int, 16>{});
  return run(integral_constant<int, N>{}, integral_constant<int, 32>{});
}

}  // namespace

const char* retention_output(const RetentionOutputParams& p, const Launch& launch) {
  if (p.dim == 0) return nullptr;
  if (p.batch * p.time * p.heads > INT32_MAX) return "retention_output: more than 2^31 heads of tokens in one call";
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    const bool vectors = p.dim % kVec<T> == 0 && aligned(p.o, sizeof(T), 16) && aligned(p.gate, sizeof(T), 16) &&
                         aligned(p.y, sizeof(T), 16);
    return with_lanes<T>(p.dim, vectors, [&](auto n, auto lanes) {
      const int64_t blocks = ceil_div(p.batch * p.time * p.heads, kThreads / lanes);
      return launch_kernel(forward_kernel<T, n, lanes>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, launch, p);
    });
  });
}

const char* retention_output_backward(const RetentionOutputBackwardParams& p, const Launch& launch) {
  if (p.dim == 0) return nullptr;
  if (p.batch * p.time * p.heads > INT32_MAX) return "retention_output: more than 2^31 heads of tokens in one call";
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    const bool vectors = p.dim % kVec<T> == 0 && aligned(p.o, sizeof(T), 16) && aligned(p.gate, sizeof(T), 16) &&
                         aligned(p.dy, sizeof(T), 16) && aligned(p.d_o, sizeof(T), 16) &&
                         aligned(p.d_gate, sizeof(T), 16);
    return with_lanes<T>(p.dim, vectors, [&](auto n, auto lanes) {
      const int64_t blocks = ceil_div(p.batch * p.time * p.heads, kThreads / lanes);
      return launch_kernel(backward_kernel<T, n, lanes>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, launch, p);
    });
  });
}

}  // namespace yoco::cuda
