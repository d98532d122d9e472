// One run of gated retention (run.h) token by token in float32, without tensor cores: float32 inputs. Correct to the
// last digits rather than fast; the low-precision kernels are in run_kernel.cuh.
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/rotary.cuh"
#include "cuda/retention/item.cuh"

namespace yoco::cuda {
namespace {

constexpr int kParts = 8;  // threads that share a column of the state
constexpr int kColumns = kSimpleBlockV, kThreads = kParts * kColumns;
constexpr int kMaxRows = 256 / kParts;  // of the state, per thread
constexpr int kTokens = 16;             // staged at a time; divides kChunk
static_assert(kChunk % kTokens == 0 && kTokens * kColumns == 2 * kThreads);

// A thread owns rows part, part + 8, ... of one column of S.
__global__ void __launch_bounds__(kThreads) retention_simple_kernel(const __grid_constant__ RetentionGrid p) {
  const RunItem item = run_item(p, kColumns);
  const RetentionRun& run = p.runs[item.run];
  if (item.columns <= 0) return;
  if (item.n == p.num_sequences) {
    zero_tail<float, kThreads>(p, item);
    return;
  }
  __shared__ float q[kTokens][256], k[kTokens][256], v[kTokens][kColumns], out[kTokens][kColumns], decay[kTokens];
  __shared__ float scratch[kThreads / 32];
  __shared__ uint64_t turns[128];  // per position, of each pair
  const int column = threadIdx.x / kParts, part = threadIdx.x % kParts, dim_k = run.dim_k;
  const bool active = column < item.columns;
  const RetentionSequence seq = retention_sequence(p, item.n);
  const int64_t num_chunks = chunks_of(seq.length);
  const auto at = [&](const View& view, int64_t t) {  // row of token t of this sequence and head
    return static_cast<float*>(view.data) + seq.batch * view.batch_stride + item.head * view.head_stride +
           (seq.begin + t) * view.time_stride;
  };
  const int pairs = p.rotary.inv_freq == nullptr ? 0 : static_cast<int>(p.rotary.dim / 2);
  const int64_t position = p.rotary.offsets == nullptr ? 0 : p.rotary.offsets[item.n];  // of the sequence's first token
  for (int i = threadIdx.x; i < pairs; i += kThreads) turns[i] = turns_per_position(p.rotary.inv_freq[i]);
  // Where a column of this block lies in v, x and o.
  const auto place_v = [&](int col) { return run.rotate_v ? p.order.column(item.column + col) : item.column + col; };
  const int block_pairs = run.rotate_v ? min(pairs - item.column / 2, kColumns / 2) : 0;  // that turn in v, x and o

  float state[kMaxRows] = {};
  const int64_t own_state = (item.n * p.heads + item.head) * run.dim_k * run.dim_v;
  const auto state_offset = [&](int row) {
    return own_state + row * run.state_stride_k + place_v(column) * run.state_stride_v;
  };
#pragma unroll
  for (int i = 0; i < kMaxRows; ++i) {
    const int row = i * kParts + part;
    if (run.state_in != nullptr && active && row < dim_k) state[i] = run.state_in[state_offset(row)];
  }

  // The state before each chunk (a group is one chunk here): dq's run leaves it, dk's multiplies it with its own state,
  // the gradient.
  const auto group_state = [&](int64_t c) {
    const int64_t slot = first_group_slot(p, item.n, seq.begin) + c;
    return run.group_states + ((slot * p.heads + item.head) * p.blocks_v + item.block_v) * (dim_k * kColumns) +
           threadIdx.x;
  };
  const auto save_state = [&](int64_t c) {
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      if (i * kParts < dim_k) group_state(c)[i * kThreads] = state[i];
    }
  };
  const auto dot_state = [&](int64_t c) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      if (i * kParts < dim_k) sum += state[i] * group_state(c)[i * kThreads];
    }
    sum = block_sum<kThreads>(sum, scratch);
    const int64_t slot = first_group_slot(p, item.n, seq.begin) + c;
    if (threadIdx.x == 0) run.boundary[(item.block_v * p.heads + item.head) * group_slots(p) + slot] = sum;
  };
  for (int64_t step = 0; step < num_chunks; ++step) {
    const int64_t c = run.reverse ? num_chunks - 1 - step : step;
    const int rows = static_cast<int>(min(int64_t(kChunk), seq.length - c * kChunk));
    if (!run.reverse && run.group_states != nullptr) save_state(c);
    for (int first = 0; first < rows; first += kTokens) {
      const int tokens = min(kTokens, rows - first);
      // Token i of this batch, in the order of the run.
      const auto token = [&](int i) { return c * kChunk + (run.reverse ? rows - 1 - first - i : first + i); };
      __syncthreads();
      for (int i = threadIdx.x; i < tokens * dim_k; i += kThreads) {
        q[i / dim_k][i % dim_k] = at(run.q, token(i / dim_k))[i % dim_k];
        k[i / dim_k][i % dim_k] = at(run.k, token(i / dim_k))[i % dim_k];
      }
      for (int i = threadIdx.x; i < tokens * kColumns; i += kThreads) {
        const int t = i / kColumns, col = i % kColumns;
        v[t][col] = col < item.columns ? at(run.v, token(t))[place_v(col)] * run.update_scale : 0.f;
      }
      if (threadIdx.x < tokens) {
        const View& g = p.g;
        decay[threadIdx.x] = expf(load_gate<float>(
            g.data,
            seq.batch * g.batch_stride + item.head * g.head_stride + (seq.begin + token(threadIdx.x)) * g.time_stride,
            p.gate_format));
      }
      __syncthreads();
      if (pairs > 0 && !run.rotate_v) {
        const bool adjacent = p.rotary.interleaved;
        for (int i = threadIdx.x; i < tokens * pairs; i += kThreads) {
          const int t = i / pairs, pair = i % pairs;
          const int a = adjacent ? 2 * pair : pair, b = adjacent ? a + 1 : pair + pairs;
          const Rotation r = rotation(turns[pair], position + token(t));
          rotate(q[t][a], q[t][b], r.cos, r.sin);
          rotate(k[t][a], k[t][b], r.cos, r.sin);
        }
        __syncthreads();
      }
      // The pairs of this block's columns, neighbours here: v before, o (by the negative angle) behind.
      const auto turn_columns = [&](float(&rows)[kTokens][kColumns], float sign) {
        if (block_pairs <= 0) return;
        for (int i = threadIdx.x; i < tokens * block_pairs; i += kThreads) {
          const int t = i / block_pairs, pair = i % block_pairs;
          const Rotation r = rotation(turns[item.column / 2 + pair], position + token(t));
          rotate(rows[t][2 * pair], rows[t][2 * pair + 1], r.cos, r.sin * sign);
        }
        __syncthreads();
      };
      turn_columns(v, 1.f);
      for (int t = 0; t < tokens; ++t) {
        // Forward in time a token's gate acts before it, backwards behind it.
        const float before = run.reverse ? 1.f : decay[t], behind = run.reverse ? decay[t] : 1.f;
        const float value = v[t][column];
        float o = 0.f;
#pragma unroll
        for (int i = 0; i < kMaxRows; ++i) {
          if (i * kParts >= dim_k) break;
          state[i] = before * state[i] + k[t][i * kParts + part] * value;
          o += q[t][i * kParts + part] * state[i];
          state[i] *= behind;
        }
        o = group_sum<kParts>(o) * run.row_scale;
        if (part == 0) out[t][column] = o;
      }
      __syncthreads();
      turn_columns(out, -1.f);
      for (int i = threadIdx.x; i < tokens * kColumns; i += kThreads) {
        const int t = i / kColumns, col = i % kColumns;
        if (col < item.columns) at(run.o, token(t))[place_v(col)] = out[t][col];
      }
      if (run.x.data != nullptr && threadIdx.x < tokens) {
        const float* x = at(run.x, token(threadIdx.x));
        float sum = 0.f;
        for (int col = 0; col < item.columns; ++col) sum += x[place_v(col)] * out[threadIdx.x][col];
        run.dots[(item.block_v * p.heads + item.head) * (p.batch * p.time) + seq.batch * p.time + seq.begin +
                 token(threadIdx.x)] = sum;
      }
    }
    if (run.boundary != nullptr) dot_state(c);
  }
  if (run.state_out == nullptr) return;
#pragma unroll
  for (int i = 0; i < kMaxRows; ++i) {
    const int row = i * kParts + part;
    if (active && row < dim_k) run.state_out[state_offset(row)] = state[i];
  }
}

}  // namespace

const char* launch_retention_simple(const RetentionGrid& p, const Launch& launch) {
  const int64_t blocks = run_blocks(p);
  if (blocks > INT32_MAX) return "gated_retention: more than 2^31 blocks";
  return launch_kernel(retention_simple_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, launch, p);
}

}  // namespace yoco::cuda
