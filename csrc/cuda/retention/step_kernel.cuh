// gated_retention_step: 1 to 16 tokens per sequence, the state updated in place. Bound by reading and writing the state
// (float32): it passes through registers once, 16 bytes per access, whatever the number of tokens.
//
// A block owns 32 columns of one head's state: rows of 128 bytes, 8 lanes each, and Dv / 32 blocks per head, so that
// 24 heads of D = 128 already give 96 blocks. All its loads are in flight before the first is used.
#pragma once

#include "cuda/core/activation.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/rotary.cuh"
#include "cuda/retention/gate.cuh"

namespace yoco::cuda::step {

constexpr int kColumns = 32, kLanes = kColumns / 4;  // lanes per row
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRowStep = kThreads / kLanes;
constexpr int kMaxRows = 256 / kRowStep;  // per thread
constexpr int kMaxTokens = 16;

// Bytes of shared memory, the arrays of the kernel in their order.
inline size_t shared_bytes(const RetentionStepParams& p, bool output_gate) {
  const int64_t per_token = 2 * p.dim_k + (output_gate ? 2 : 1) * kColumns + kWarps * kColumns + (output_gate ? 2 : 1);
  return p.time * per_token * sizeof(float);
}

// A float of another block of the cluster, at the place where this block has `own`.
YOCO_DEVICE float load_cluster(const float* own, int rank) {
  uint32_t address;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}
YOCO_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory"); }
YOCO_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }

// kOutputGate: o becomes o / sqrt(mean(o^2) + norm_eps) * silu(output_gate). The blocks of a head are a cluster then
// (compute capability 9.0) and read each other's sums of squares.
template <typename T, int kRows, bool kRotary, bool kOutputGate>
__global__ void __launch_bounds__(kThreads,
                                  kRows == 8 ? 7 : 4)  // else the compiler spills to fit one block more per SM
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
  float* const q = shared;                                  // [time][dim_k]
  float* const k = q + time * dim_k;                        // [time][dim_k]
  float* const v = k + time * dim_k;                        // [time][kColumns]
  float* const partial = v + time * kColumns;               // [time][kWarps][kColumns]
  float* const decay = partial + time * kWarps * kColumns;  // [time]
  [[maybe_unused]] float* const squares = decay + time;     // [time]: sums over this block's columns
  [[maybe_unused]] float* const silu = squares + time;      // [time][kColumns]
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
    if constexpr (kOutputGate) {
      const float gate = c < dim_v ? to_float(at(p.output_gate, i / kColumns)[c]) : 0.f;
      silu[i] = gate * sigmoid<T>(gate);
    }
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
  // A warp has a token, a lane a column of it.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = column + lane;
  const auto output = [&](int t) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[(t * kWarps + w) * kColumns + lane];
    return sum;
  };
  if constexpr (!kOutputGate) {
    for (int t = warp; t < time; t += kWarps) {
      const float o = output(t);
      if (c < dim_v) at(p.o, t)[c] = from_float<T>(o);
    }
  } else {
    float o[kMaxTokens / kWarps];
#pragma unroll
    for (int i = 0; i < kMaxTokens / kWarps; ++i) {
      const int t = warp + i * kWarps;
      if (t >= time) break;
      o[i] = output(t);  // 0 in columns that do not exist, where v is 0
      const float sum = group_sum(o[i] * o[i]);
      if (lane == 0) squares[t] = sum;
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int i = 0; i < kMaxTokens / kWarps; ++i) {
      const int t = warp + i * kWarps;
      if (t >= time) break;
      const float sum = group_sum(lane < blocks_v ? load_cluster(&squares[t], lane) : 0.f);
      const float rstd = rsqrtf(__fdividef(sum, static_cast<float>(dim_v)) + static_cast<float>(p.norm_eps));
      if (c < dim_v) at(p.o, t)[c] = from_float<T>(o[i] * rstd * silu[t * kColumns + lane]);
    }
    cluster_arrive();  // a block stays until the others have read its sums
    cluster_wait();
  }
}

// Rows of the state per thread: 32 registers up to dim_k = 128, 64 up to 256.
template <typename T, bool kOutputGate>
auto pick_kernel(const RetentionStepParams& p) {
  const bool rotary = p.rotary.inv_freq != nullptr;
  if (p.dim_k <= 128) {
    return rotary ? retention_step_kernel<T, kMaxRows / 2, true, kOutputGate>
                  : retention_step_kernel<T, kMaxRows / 2, false, kOutputGate>;
  }
  return rotary ? retention_step_kernel<T, kMaxRows, true, kOutputGate>
                : retention_step_kernel<T, kMaxRows, false, kOutputGate>;
}

// Launches the instance with the norm and the output gate; retention/sm90/step.cu defines it.
const char* launch_gated(const RetentionStepParams& p, bool vectors, const GateFormat& gate_format,
                         const Launch& launch);

}  // namespace yoco::cuda::step
