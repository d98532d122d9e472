// gated_retention_step: 1 to 16 tokens per sequence, the state updated in place. Bound by reading and writing the state
// (float32): it passes through registers once, 16 bytes per access, whatever the number of tokens.
//
// A block owns 32 columns of one head's state: rows of 128 bytes, 8 lanes each, and Dv / 32 blocks per head, so that
// 24 heads of D = 128 already give 96 blocks. All its loads are in flight before the first is used.
#include <algorithm>

#include "cuda/core/launch.h"
#include "cuda/core/rotary.cuh"
#include "cuda/kernels.h"
#include "cuda/retention/gate.cuh"

namespace yoco::cuda {
namespace {

constexpr int kColumns = 32, kLanes = kColumns / 4;  // lanes per row
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRowStep = kThreads / kLanes;
constexpr int kMaxRows = 256 / kRowStep;  // per thread

template <typename T, int kRows, bool kRotary>
__global__ void __launch_bounds__(kThreads)
    retention_step_kernel(const __grid_constant__ RetentionStepParams p, bool vectors, GateFormat gate_format) {
  const int dim_k = static_cast<int>(p.dim_k), dim_v = static_cast<int>(p.dim_v), time = static_cast<int>(p.time);
  const int blocks_v = (dim_v + kColumns - 1) / kColumns;
  const int column = static_cast<int>(blockIdx.x % blocks_v) * kColumns;
  const int64_t head = blockIdx.x / blocks_v % p.heads, batch = blockIdx.x / blocks_v / p.heads;
  const int row0 = threadIdx.x / kLanes, col = column + threadIdx.x % kLanes * 4;
  const bool active = col < dim_v;  // dim_v is a multiple of 8

  float* const own = static_cast<float*>(p.state) + (batch * p.heads + head) * dim_k * dim_v + col;
  float state[kRows][4];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = row0 + i * kRowStep;
    state[i][0] = state[i][1] = state[i][2] = state[i][3] = 0.f;
    if (!active || row >= dim_k) continue;
    const float* from = own + row * dim_v;
    if (vectors) {
      const Vec<float, 4> s = load<4>(from);
#pragma unroll
      for (int j = 0; j < 4; ++j) state[i][j] = s[j];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) state[i][j] = from[j];
    }
  }

  extern __shared__ float shared[];
  float* const q = shared;                     // [time][dim_k]
  float* const k = q + time * dim_k;           // [time][dim_k]
  float* const v = k + time * dim_k;           // [time][kColumns]
  float* const partial = v + time * kColumns;  // [time][kWarps][kColumns]
  float* const decay = partial + time * kWarps * kColumns;
  const auto at = [&](const View& view, int t) {
    return static_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride + t * view.time_stride;
  };
  for (int i = threadIdx.x; i < time * dim_k; i += kThreads) {
    q[i] = to_float(at(p.q, i / dim_k)[i % dim_k]) * static_cast<float>(p.scale);
    k[i] = to_float(at(p.k, i / dim_k)[i % dim_k]);
  }
  for (int i = threadIdx.x; i < time * kColumns; i += kThreads) {
    const int c = column + i % kColumns;
    v[i] = c < dim_v ? to_float(at(p.v, i / kColumns)[c]) : 0.f;
  }
  if (threadIdx.x < time) {
    const int64_t i = batch * p.g.batch_stride + head * p.g.head_stride + threadIdx.x * p.g.time_stride;
    decay[threadIdx.x] = expf(load_gate<T>(p.g.data, i, gate_format));
  }
  __syncthreads();
  if constexpr (kRotary) {
    const int pairs = static_cast<int>(p.rotary.dim / 2);
    const int64_t position = p.rotary.offsets == nullptr ? 0 : p.rotary.offsets[batch];
#pragma unroll 1
    for (int i = threadIdx.x; i < time * pairs; i += kThreads) {
      const int t = i / pairs, pair = i % pairs;
      const int a = t * dim_k + (p.rotary.interleaved ? 2 * pair : pair), b = a + (p.rotary.interleaved ? 1 : pairs);
      const Rotation r = rotation(turns_per_position(p.rotary.inv_freq[pair]), position + t);
      rotate(q[a], q[b], r.cos, r.sin);
      rotate(k[a], k[b], r.cos, r.sin);
    }
    __syncthreads();
  }

  for (int t = 0; t < time; ++t) {
    const float4 value = *reinterpret_cast<const float4*>(&v[t * kColumns + col - column]);
    const float a = decay[t];
    float o[4] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = row0 + i * kRowStep;
      if (row >= dim_k) break;
      const float key = k[t * dim_k + row], query = q[t * dim_k + row];
      state[i][0] = a * state[i][0] + key * value.x;
      state[i][1] = a * state[i][1] + key * value.y;
      state[i][2] = a * state[i][2] + key * value.z;
      state[i][3] = a * state[i][3] + key * value.w;
#pragma unroll
      for (int j = 0; j < 4; ++j) o[j] += query * state[i][j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int d = kLanes; d < 32; d *= 2) o[j] += __shfl_xor_sync(0xffffffffu, o[j], d);
    }
    if (threadIdx.x % 32 < kLanes) {
      *reinterpret_cast<float4*>(&partial[(t * kWarps + threadIdx.x / 32) * kColumns + col - column]) =
          make_float4(o[0], o[1], o[2], o[3]);
    }
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = row0 + i * kRowStep;
    if (!active || row >= dim_k) continue;
    float* to = own + row * dim_v;
    if (vectors) {
      Vec<float, 4> s;
#pragma unroll
      for (int j = 0; j < 4; ++j) s[j] = state[i][j];
      store<4>(to, s);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] = state[i][j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < time * kColumns; i += kThreads) {
    const int t = i / kColumns, c = column + i % kColumns;
    if (c >= dim_v) continue;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[(t * kWarps + w) * kColumns + i % kColumns];
    at(p.o, t)[c] = from_float<T>(sum);
  }
}

}  // namespace

const char* retention_step(const RetentionStepParams& p, const Launch& launch) {
  if (p.dim_k > 256 || p.dim_v > 256) return "gated_retention_step: the cuda back end takes head dims up to 256";
  const int64_t blocks = p.batch * p.heads * ceil_div(p.dim_v, kColumns);
  if (blocks == 0 || p.time == 0) return nullptr;
  if (blocks > INT32_MAX) return "gated_retention_step: more than 2^31 blocks";
  const bool vectors = aligned(p.state, 16);
  const GateFormat gate_format{p.gate_dtype == DType::kFloat32, static_cast<float>(p.gate_normalizer)};
  const size_t shared = p.time * (2 * p.dim_k + kColumns + kWarps * kColumns + 1) * sizeof(float);
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    // Rows of the state per thread: 32 registers up to dim_k = 128, 64 up to 256.
    const bool rotary = p.rotary.inv_freq != nullptr;
    const auto kernel =
        p.dim_k <= 128
            ? (rotary ? retention_step_kernel<T, kMaxRows / 2, true> : retention_step_kernel<T, kMaxRows / 2, false>)
            : (rotary ? retention_step_kernel<T, kMaxRows, true> : retention_step_kernel<T, kMaxRows, false>);
    const char* message =
        launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, shared, launch, p, vectors, gate_format);
    if (message != nullptr || p.output_gate.data == nullptr) return message;
    // Norm and gate in place: a block of the step has not all columns of a row.
    return retention_output({p.dtype, p.batch, p.time, p.heads, p.dim_v, p.norm_eps, p.o, p.output_gate, p.o}, launch);
  });
}

}  // namespace yoco::cuda
