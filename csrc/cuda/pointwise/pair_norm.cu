// y = norm(x) * weight * scale with x made of two rows: first - lambda * second (differential attention) or
// first * silu(second) (gated memory unit), and its backward. A row belongs to 16 or 32 lanes or to a block and stays
// in registers between the reduction and the result (kItems vectors per lane); what is longer is read a second time.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/core/launch.h"
#include "cuda/kernels.h"
#include "cuda/pointwise/norm_rows.cuh"

namespace yoco::cuda {
namespace {

YOCO_DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

struct Row {
  int64_t batch, time, head;
};
// Row `index` of all heads, or of one head when weights differ between heads.
YOCO_DEVICE Row split_row(const PairNormParams& p, int64_t index, int64_t heads, int64_t head) {
  const int64_t token = heads == 1 ? index : index / heads, batch = token / p.time;
  return {batch, token - batch * p.time, head + index - token * heads};
}
template <typename T>
YOCO_DEVICE T* row_of(const View& v, const Row& row) {
  return static_cast<T*>(v.data) + row.batch * v.batch_stride + row.time * v.time_stride + row.head * v.head_stride;
}

// Where the weight sums of a group of lanes lie in shared memory: element j of a lane's vector `item` at
// (item * N + j) * kPitch + lane. A warp that adds touches 32 banks (two groups of 16 lanes: kLanes apart), and so does
// one that reads 32 neighbouring columns.
template <int N, int kLanes>
struct WeightSums {
  static constexpr int kPitch = (kLanes + 31) / 32 * 32 + (N > 1 ? 32 / N : 0);
  static YOCO_DEVICE int at(int column) {
    const int vector = column / N;
    return (vector / kLanes * N + column % N) * kPitch + vector % kLanes;
  }
  static __host__ __device__ constexpr int64_t group_stride(int64_t dim) {
    return (dim + kLanes * N - 1) / (kLanes * N) * N * kPitch + (kLanes < 32 ? kLanes : 0);
  }
};

// How two elements become one, and what a gradient of the one means for the two.
template <PairKind kKind>
struct Source;

template <>
struct Source<PairKind::kDifference> {
  static constexpr int kItems = 2;  // head dimensions are at most 256
  float lambda, d_given;            // the factor, and its derivative by what was given
  YOCO_DEVICE Source(const PairNormParams& p, const Row& row) {
    const float given = *row_of<const float>(p.lambda, row);
    lambda = p.lambda_is_logit ? sigmoid(given) : given;
    d_given = p.lambda_is_logit ? lambda * (1.f - lambda) : 1.f;
  }
  YOCO_DEVICE float combine(float a, float b) const { return a - lambda * b; }
  YOCO_DEVICE void backward(float dx, float, float b, float& da, float& db, float& d_lambda) const {
    da = dx;
    db = -lambda * dx;
    d_lambda -= dx * b * d_given;
  }
};

template <>
struct Source<PairKind::kGate> {
  static constexpr int kItems = 4;
  YOCO_DEVICE Source(const PairNormParams&, const Row&) {}
  YOCO_DEVICE float combine(float memory, float gate) const { return memory * (gate * sigmoid(gate)); }
  YOCO_DEVICE void backward(float dx, float memory, float gate, float& d_memory, float& d_gate, float&) const {
    const float s = sigmoid(gate);
    d_memory = dx * gate * s;
    d_gate = dx * memory * s * (1.f + gate * (1.f - s));
  }
};

template <typename T>
YOCO_DEVICE const void* weight_of_head(const PairNormParams& p, int64_t head) {
  if (p.weight == nullptr || !p.weight_per_head) return p.weight;
  if (p.weight_dtype == DType::kFloat32) return static_cast<const float*>(p.weight) + head * p.dim;
  return static_cast<const T*>(p.weight) + head * p.dim;
}

template <typename T, int N, int kLanes, PairKind kKind>
__global__ void __launch_bounds__(kThreads) forward_kernel(const PairNormParams p) {
  constexpr int kItems = Source<kKind>::kItems;
  __shared__ float scratch[kThreads / 32];
  const int64_t index = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool active = index < p.batch * p.time * p.heads;  // all lanes of a warp take part in the shuffles
  const Row row = split_row(p, active ? index : 0, p.heads, 0);
  const T* first = row_of<const T>(p.first, row);
  const T* second = row_of<const T>(p.second, row);
  T* y = row_of<T>(p.y, row);
  const void* weight = weight_of_head<T>(p, row.head);
  const bool float_weight = p.weight_dtype == DType::kFloat32;
  const Source<kKind> source(p, row);
  const int dim = static_cast<int>(p.dim), lane = threadIdx.x % kLanes;
  const auto read = [&](float(&x)[N], int column) {
    float a[N], b[N];
    load_float(a, first + column);
    load_float(b, second + column);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = source.combine(a[j], b[j]);
  };
  float kept[kItems][N];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = (i * kLanes + lane) * N;
    if (column >= dim) continue;
    read(kept[i], column);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += kept[i][j] * kept[i][j];
  }
  for (int column = (kItems * kLanes + lane) * N; column < dim; column += kLanes * N) {
    float x[N];
    read(x, column);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += x[j] * x[j];
  }
  float factor = static_cast<float>(p.scale);
  if (p.normalize) factor *= rsqrtf(row_sum<kLanes>(sum, scratch) / dim + static_cast<float>(p.eps));
  if (!active) return;
  const auto finish = [&](const float(&x)[N], int column) {
    float w[N], out[N];
    load_weight<T>(w, weight, float_weight, column);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = x[j] * factor * w[j];
    store_float(y + column, out);
  };
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = (i * kLanes + lane) * N;
    if (column < dim) finish(kept[i], column);
  }
  for (int column = (kItems * kLanes + lane) * N; column < dim; column += kLanes * N) {
    float x[N];
    read(x, column);
    finish(x, column);
  }
}

// With n = x * rstd and dn = dy * weight * scale:  dx = rstd * (dn - n * mean(dn * n)), d_weight = sum over rows of
// dy * n * scale. Block (part, h) takes the rows part * rows_per_part ... of all heads or, when weights differ between
// heads, of head h; partial[part][weights] = its sum for d_weight (null: not wanted).
template <typename T, int N, int kLanes, PairKind kKind>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const PairNormBackwardParams p, int64_t rows_per_part, float* partial) {
  constexpr int kItems = Source<kKind>::kItems, kGroups = kThreads / kLanes;
  using Sums = WeightSums<N, kLanes>;
  extern __shared__ __align__(16) float weight_sum[];  // [kGroups][stride]; each column has one owning lane per group
  __shared__ float scratch[kThreads / 32];
  const int dim = static_cast<int>(p.dim), lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t heads = p.weight_per_head ? 1 : p.heads, rows = p.batch * p.time * heads;
  const void* weight = weight_of_head<T>(p, blockIdx.y);
  const bool float_weight = p.weight_dtype == DType::kFloat32;
  const float scale = static_cast<float>(p.scale);
  const int stride = static_cast<int>(Sums::group_stride(dim));
  float* sums = weight_sum + group * stride;
  if (partial != nullptr) {
    for (int i = lane; i < stride; i += kLanes) sums[i] = 0.f;
    if constexpr (kLanes > 32) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  const int64_t begin = int64_t(blockIdx.x) * rows_per_part;
  const int64_t end = min(begin + rows_per_part, rows);
  for (int64_t base = begin; base < end; base += kGroups) {
    const bool active = base + group < end;  // all lanes of a warp take part in the shuffles
    const Row row = split_row(p, active ? base + group : begin, heads, blockIdx.y);
    const T* first = row_of<const T>(p.first, row);
    const T* second = row_of<const T>(p.second, row);
    const T* dy = row_of<const T>(p.dy, row);
    const Source<kKind> source(p, row);
    // Kept as stored: half the registers of floats.
    Vec<T, N> kept_a[kItems], kept_b[kItems], kept_d[kItems];
    float sum_xx = 0.f, sum_dx = 0.f;
    const auto accumulate = [&](const Vec<T, N>& a, const Vec<T, N>& b, const Vec<T, N>& d, int column) {
      float w[N];
      load_weight<T>(w, weight, float_weight, column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float x = source.combine(to_float(a[j]), to_float(b[j]));
        sum_xx += x * x;
        sum_dx += to_float(d[j]) * w[j] * x;
      }
    };
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int column = (i * kLanes + lane) * N;
      if (column >= dim) continue;
      kept_a[i] = load_const<N>(first + column);
      kept_b[i] = load_const<N>(second + column);
      kept_d[i] = load_const<N>(dy + column);
      accumulate(kept_a[i], kept_b[i], kept_d[i], column);
    }
    for (int column = (kItems * kLanes + lane) * N; column < dim; column += kLanes * N) {
      accumulate(load_const<N>(first + column), load_const<N>(second + column), load_const<N>(dy + column), column);
    }
    float rstd = 1.f, along_x = 0.f;
    if (p.normalize) {
      rstd = rsqrtf(row_sum<kLanes>(sum_xx, scratch) / dim + static_cast<float>(p.eps));
      along_x = row_sum<kLanes>(sum_dx, scratch) * rstd * rstd / dim;
    }
    const float factor = rstd * scale;
    T* d_first = row_of<T>(p.d_first, row);
    T* d_second = row_of<T>(p.d_second, row);
    float d_lambda = 0.f;
    const auto finish = [&](const Vec<T, N>& a, const Vec<T, N>& b, const Vec<T, N>& d, int column) {
      float w[N], da[N], db[N];
      load_weight<T>(w, weight, float_weight, column);
      const int first_sum = Sums::at(column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float af = to_float(a[j]), bf = to_float(b[j]), df = to_float(d[j]), x = source.combine(af, bf);
        source.backward((df * w[j] - x * along_x) * factor, af, bf, da[j], db[j], d_lambda);
        if (partial != nullptr) sums[first_sum + j * Sums::kPitch] += df * x * factor;
      }
      store_float(d_first + column, da);
      store_float(d_second + column, db);
    };
    if (active) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int column = (i * kLanes + lane) * N;
        if (column < dim) finish(kept_a[i], kept_b[i], kept_d[i], column);
      }
      for (int column = (kItems * kLanes + lane) * N; column < dim; column += kLanes * N) {
        finish(load_const<N>(first + column), load_const<N>(second + column), load_const<N>(dy + column), column);
      }
    }
    if constexpr (kKind == PairKind::kDifference) {
      if (p.d_lambda == nullptr) continue;
      const float total = row_sum<kLanes>(d_lambda, scratch);
      if (active && lane == 0) {
        static_cast<float*>(p.d_lambda)[(row.batch * p.time + row.time) * p.heads + row.head] = total;
      }
    }
  }
  if (partial == nullptr) return;
  __syncthreads();
  for (int column = threadIdx.x; column < dim; column += kThreads) {
    float sum = 0.f;
    for (int g = 0; g < kGroups; ++g) sum += weight_sum[g * stride + Sums::at(column)];
    partial[(int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * dim + column] = sum;
  }
}

// run(N, lanes, kind). Heads of differential attention have at most 256 elements; a gated row belongs to a warp while
// it fits its registers, else to a block.
template <typename T, typename Run>
const char* with_row(const PairNormParams& p, bool vectors, Run run) {
  using std::integral_constant;
  constexpr int N = kVec<T>;
  using One = integral_constant<int, 1>;
  using Wide = integral_constant<int, N>;
  using Warp = integral_constant<int, 32>;
  using Block = integral_constant<int, kThreads>;
  if (p.kind == PairKind::kDifference) {
    const integral_constant<PairKind, PairKind::kDifference> kind;
    if (!vectors) return run(One{}, Warp{}, kind);
    if (p.dim <= 16 * N) return run(Wide{}, integral_constant<int, 16>{}, kind);
    return run(Wide{}, Warp{}, kind);
  }
  const integral_constant<PairKind, PairKind::kGate> kind;
  if (!vectors) return run(One{}, Block{}, kind);
  if (p.dim <= 32 * N * Source<PairKind::kGate>::kItems) return run(Wide{}, Warp{}, kind);
  return run(Wide{}, Block{}, kind);
}

template <typename T>
bool aligned_inputs(const PairNormParams& p) {
  return p.dim % kVec<T> == 0 && aligned(p.first, sizeof(T), 16) && aligned(p.second, sizeof(T), 16) &&
         aligned(p.weight, 16);
}

int64_t weight_heads(const PairNormParams& p) { return p.weight_per_head ? p.heads : 1; }

}  // namespace

const char* pair_norm(const PairNormParams& p, const Launch& launch) {
  if (p.dim == 0) return nullptr;
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    const bool vectors = aligned_inputs<T>(p) && aligned(p.y, sizeof(T), 16);
    return with_row<T>(p, vectors, [&](auto n, auto lanes, auto kind) {
      const int64_t blocks = ceil_div(p.batch * p.time * p.heads, kThreads / lanes);
      return launch_kernel(forward_kernel<T, n, lanes, kind>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, launch,
                           p);
    });
  });
}

size_t pair_norm_backward_workspace(const PairNormBackwardParams& p, const Launch&) {
  return p.d_weight == nullptr ? 0 : static_cast<size_t>(kMaxParts * weight_heads(p) * p.dim) * sizeof(float);
}

const char* pair_norm_backward(const PairNormBackwardParams& p, const Launch& launch) {
  if (p.dim == 0) return nullptr;
  if (p.d_weight != nullptr && p.dim > kMaxWeightGradient) {
    return "the cuda back end gives weight gradients for rows up to 32768 elements";
  }
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    const bool vectors = aligned_inputs<T>(p) && aligned(p.dy, sizeof(T), 16) && aligned(p.d_first, sizeof(T), 16) &&
                         aligned(p.d_second, sizeof(T), 16);
    return with_row<T>(p, vectors, [&](auto n, auto lanes, auto kind) -> const char* {
      constexpr int kGroups = kThreads / lanes;
      const int64_t y = weight_heads(p), weights = y * p.dim;
      const Parts split = split_rows(p.batch * p.time * p.heads / y, kGroups);
      auto* partial = p.d_weight != nullptr ? static_cast<float*>(p.workspace) : nullptr;
      const size_t shared =
          partial != nullptr ? kGroups * WeightSums<n, lanes>::group_stride(p.dim) * sizeof(float) : 0;
      const dim3 grid(static_cast<unsigned>(split.parts), static_cast<unsigned>(y));
      const char* message = launch_kernel(backward_kernel<T, n, lanes, kind>, grid, kThreads, shared, launch, p,
                                          split.rows_per_part, partial);
      if (message != nullptr || partial == nullptr) return message;
      return launch_kernel(weight_gradient_kernel, dim3(static_cast<unsigned>(ceil_div(weights, 32))), kThreads, 0,
                           launch, partial, split.parts, weights, static_cast<float*>(p.d_weight));
    });
  });
}

}  // namespace yoco::cuda
