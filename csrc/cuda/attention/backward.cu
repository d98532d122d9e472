// Attention backward: what runs where, and the kernels beside the tensor-core ones (statistics, sinks, latents that
// sequences share, float32).
//
//   row_statistics_kernel        lse and delta = rowsum(d_out * out) - d_lse of every row
//   attention_backward_kernel    dK, dV by key tiles, and dQ added in float32 (backward.h; on Hopper sm90/backward.cuh)
//   finish_dq_kernel             ... rounded; or, deterministic or when only dQ is wanted,
//   attention_backward_q_kernel  dQ by row tiles (sm90/backward_q.cuh, backward_q.h)
//   reduce_latents_kernel, sink_gradient_kernel
#include <algorithm>
#include <type_traits>

#include "cuda/attention/align.h"
#include "cuda/attention/simt_backward.h"
#include "cuda/attention/sm90/backward_plan.h"
#include "cuda/core/sequence.cuh"
#include "cuda/kernels.h"

namespace yoco::cuda {
namespace {

constexpr int kFewKeys = 8;  // with more keys out . d_out is as good as plain PyTorch

// delta of a row that sees few keys, by one warp with a lane per key: sum of P dP. There dP - delta cancels down to far
// less than the rounding of `out`, which out . d_out would put into it. False: not such a row, delta is as before.
template <typename T>
YOCO_DEVICE bool delta_of_few_keys(const AttentionBackwardParams& p, const ScoreParams& sp, int64_t batch,
                                   int64_t token, int head, const T* d_out, float lse_log2, float& delta) {
  const Token t = find_token(batch * p.time_q + token, p.time_q, p.cu_seqlens_q, p.num_sequences);
  if (t.sequence < 0) return false;
  const RowMap m = make_row_map(p, int(t.sequence), head / int(p.heads_q / p.heads_kv));
  const int row = int(t.index) * m.group + head % m.group, lane = threadIdx.x % 32;
  const int2 keys = row_keys(p, m, row, false);
  const int2 latents = p.num_latents > 0 ? row_keys(p, m, row, true) : make_int2(0, 0);
  const int count = keys.y - keys.x, total = count + latents.y - latents.x;
  if (total > kFewKeys) return false;
  float term = 0.f;
  if (lane < total) {
    const bool latent = lane >= count;
    const int key = latent ? latents.x + lane - count : keys.x + lane;
    const Segment<T> s = make_segment<T>(p, m, latent);
    const T* q = static_cast<const T*>(p.q.data) + m.offset(p.q, row);
    const float bias = latent ? 0.f : alibi_log2(p, m.sequence_index, head);
    const float distance = float(m.token(row) + int(m.sequence.len_k - m.sequence.len_q) - key);
    const float score = simt_score(sp, dot(q, s.k + key * s.k_stride, int(p.dim_qk)), bias, distance);
    term = exp2f(score - lse_log2) * dot(d_out, s.v + key * s.v_stride, int(p.dim_v));
  }
  delta = group_sum(term);
  return true;
}

// A warp per (batch, token, query head).
template <typename T>
__global__ void __launch_bounds__(256)
    row_statistics_kernel(const __grid_constant__ AttentionBackwardParams p, const ScoreParams score, float2* stats) {
  const int lane = threadIdx.x % 32, group = int(p.heads_q / p.heads_kv);
  const int64_t rows = p.batch * p.time_q * p.heads_q;
  for (int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32; row < rows; row += int64_t(gridDim.x) * 8) {
    const int64_t head = row % p.heads_q, t = row / p.heads_q % p.time_q, b = row / p.heads_q / p.time_q;
    const T* out =
        static_cast<const T*>(p.out.data) + b * p.out.batch_stride + t * p.out.time_stride + head * p.out.head_stride;
    const T* d_out = static_cast<const T*>(p.d_out.data) + b * p.d_out.batch_stride + t * p.d_out.time_stride +
                     head * p.d_out.head_stride;
    float delta = 0.f;
    for (int d = lane; d < p.dim_v; d += 32) delta = fmaf(to_float(out[d]), to_float(d_out[d]), delta);
    delta = group_sum(delta);
    const int64_t statistic = (b * p.heads_q + head) * p.time_q + t;
    const float lse = static_cast<const float*>(p.lse)[statistic];
    const float lse_log2 = lse == YOCO_NEG_INF ? -YOCO_NEG_INF : lse * kLog2E;
    if constexpr (!std::is_same_v<T, float>) delta_of_few_keys<T>(p, score, b, t, int(head), d_out, lse_log2, delta);
    if (p.d_lse != nullptr) delta -= static_cast<const float*>(p.d_lse)[statistic];
    if (lane == 0) {
      stats[((b * p.heads_kv + head / group) * p.time_q + t) * group + head % group] = make_float2(lse_log2, delta);
    }
  }
}

// d_sink = -sum over rows of exp(sink - lse) * delta: a sink has no value, so its dP is 0. One CTA per query head, in a
// fixed order.
__global__ void __launch_bounds__(256)
    sink_gradient_kernel(const __grid_constant__ AttentionBackwardParams p, const float2* stats) {
  __shared__ float scratch[8];
  const int head = int(blockIdx.x), group = int(p.heads_q / p.heads_kv);
  const float sink = p.sinks[head] * kLog2E;
  float sum = 0.f;
  for (int64_t i = threadIdx.x; i < p.batch * p.time_q; i += 256) {
    const float2 s =
        stats[((i / p.time_q * p.heads_kv + head / group) * p.time_q + i % p.time_q) * group + head % group];
    if (s.x != -YOCO_NEG_INF) sum -= exp2f(sink - s.x) * s.y;  // rows of no sequence have no sink
  }
  sum = block_sum<256>(sum, scratch);
  if (threadIdx.x == 0) p.d_sinks[head] = sum;
}

// Sums the slices of latents that sequences share.
template <typename T>
__global__ void __launch_bounds__(256)
    reduce_latents_kernel(const float* partial, int slices, View to, int64_t latents, int64_t heads, int64_t dim) {
  const int64_t size = latents * heads * dim;
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < size; i += int64_t(gridDim.x) * 256) {
    float sum = 0.f;
    for (int s = 0; s < slices; ++s) sum += partial[s * size + i];
    static_cast<T*>(to.data)[i / dim / heads * to.time_stride + i / dim % heads * to.head_stride + i % dim] =
        from_float<T>(sum);
  }
}

// float32: a warp per row, a warp per key.
constexpr int kSimtRows = 16;
template <typename T>
__global__ void __launch_bounds__(128) simt_backward_q_kernel(const __grid_constant__ AttentionBackwardParams p,
                                                              const __grid_constant__ BackwardPlan plan) {
  zero_query_tail<T>(p);
  if (p.num_sequences == 0) return;
  const WorkTile work = plan.row_schedule.decode(int(blockIdx.x));
  const RowMap map = make_row_map(p, work.sequence, work.head);
  for (int tile = work.tile; tile * kSimtRows < map.rows; tile += plan.row_schedule.tiles) {
    const int end = min((tile + 1) * kSimtRows, map.rows);
    for (int row = tile * kSimtRows + int(threadIdx.x) / 32; row < end; row += 4) {
      query_gradient<T>(p, plan, work.sequence, work.head, row);
    }
  }
}
template <typename T>
__global__ void __launch_bounds__(128)
    simt_backward_kernel(const __grid_constant__ AttentionBackwardParams p, const __grid_constant__ BackwardPlan plan) {
  zero_key_tails<T>(p, plan);
  if (p.num_sequences == 0) return;
  const WorkTile work = plan.schedule.decode(int(blockIdx.x));
  const bool latents = work.tile >= plan.main_tiles;
  if (latents ? !plan.want_latents || work.sequence >= plan.latent_slices : !plan.want_dkv) return;
  const RowMap own = make_row_map(p, work.sequence, work.head);
  const int keys = latents ? int(p.num_latents) : keys_to_store(p, own);
  const int step = (latents ? plan.latent_tiles : plan.main_tiles) * kSimtRows;
  for (int first = (latents ? work.tile - plan.main_tiles : work.tile) * kSimtRows; first < keys; first += step) {
    for (int key = first + int(threadIdx.x) / 32; key < min(first + kSimtRows, keys); key += 4) {
      if (latents || key < own.sequence.len_k) {
        key_gradients<T>(p, plan, work.sequence, latents ? plan.latent_slices : int(p.num_sequences), work.head,
                         latents, key);
      } else {  // left out by seqused_k
        const GradientRows to_k = gradient_rows<T>(p, plan, own, false, false);
        const GradientRows to_v = gradient_rows<T>(p, plan, own, false, true);
        for (int d = threadIdx.x % 32; d < p.dim_qk; d += 32) put_gradient<T>(to_k, key, d, 0.f);
        for (int d = threadIdx.x % 32; d < p.dim_v; d += 32) put_gradient<T>(to_v, key, d, 0.f);
      }
    }
  }
}

// ---- host
int instance(const AttentionParams& p) {
  const int64_t dim = std::max(p.dim_qk, p.dim_v);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}
int tile_keys(int d) { return d == 256 ? BackwardTiles<256>::kKeys : BackwardTiles<128>::kKeys; }
static_assert(sm90::BackwardTiles<64>::kKeys == BackwardTiles<64>::kKeys);
static_assert(sm90::BackwardTiles<128>::kKeys == BackwardTiles<128>::kKeys);
static_assert(sm90::BackwardTiles<256>::kKeys == BackwardTiles<256>::kKeys);

// What makes dK and dV; asked of the inputs as they came.
struct Kernel {
  bool hopper;  // sm90/backward.cuh, else the sm_80 family (or float32)
  int* tile_counter = nullptr;
};
Kernel choose_kernel(const AttentionBackwardParams& p, const Launch& launch) {
#ifdef YOCO_HAS_SM90
  return Kernel{compute_capability(launch.device) == 90 && sm90::backward_fits(p)};
#else
  return Kernel{false};
#endif
}

// Fills the plan, lays out the workspace and, with memory behind it, makes the inputs aligned. base null: only counts.
template <typename T>
const char* prepare(AttentionBackwardParams& p, BackwardPlan& plan, Kernel& kernel, WorkspaceCursor& workspace,
                    const Launch& launch) {
  constexpr bool kSimt = std::is_same_v<T, float>;
  const int d = instance(p);
  const int64_t group = p.heads_q / p.heads_kv;
  plan.score = make_score_params(p);
  plan.scale = float(p.scale);
  plan.want_dq = p.dq.data != nullptr;
  plan.want_dkv = p.dk.data != nullptr && p.time_k > 0;
  plan.want_latents = p.d_latent_k.data != nullptr && p.num_latents > 0;
  plan.aligned_dq = aligned(p.dq, sizeof(T), 16);
  plan.aligned_dkv = aligned(p.dk, sizeof(T), 16) && aligned(p.dv, sizeof(T), 16);
  plan.aligned_latents = aligned(p.d_latent_k, sizeof(T), 16) && aligned(p.d_latent_v, sizeof(T), 16);
  plan.stats = workspace.take<float2>(size_t(p.batch) * p.heads_q * p.time_q);

  // dQ rides along with dK and dV only if the key tiles it needs are visited anyway and the order of float32 additions
  // may vary.
  const int tile_rows = kernel.hopper ? sm90::backward_rows(d) : BackwardTiles<128>::kRows;
  const bool atomics =
      !kSimt && !p.deterministic && plan.want_dq && plan.want_dkv && (p.num_latents == 0 || plan.want_latents);
  size_t zeros = 0;  // 4-byte words
  int rows_per_tile = kSimt ? kSimtRows : d == 256 ? 64 : 128;
  if (atomics) {
    rows_per_tile = kernel.hopper ? int(tile_rows / group * group) : tile_rows;  // on Hopper whole tokens
    const int64_t tiles = p.cu_seqlens_q != nullptr ? p.time_q * group / rows_per_tile + p.num_sequences + 1
                                                    : p.batch * ceil_div(p.time_q * group, rows_per_tile);
    const size_t count = size_t(tiles) * p.heads_kv * tile_rows * d;
    plan.dq_accumulator = workspace.take<float>(count);
    zeros = count;
  }
  // Behind the accumulator, so that both are zeroed at once.
  if (kernel.hopper && (plan.want_dkv || plan.want_latents)) {
    kernel.tile_counter = workspace.take<int>(1);
    zeros = (zeros * sizeof(float) + 255) / 256 * 64 + 1;
  }
  void* const zeroed = plan.dq_accumulator != nullptr ? static_cast<void*>(plan.dq_accumulator) : kernel.tile_counter;
  if (zeroed != nullptr) {
    if (const char* message = set_device(launch)) return message;
    YOCO_CUDA_CHECK(cudaMemsetAsync(zeroed, 0, zeros * 4, static_cast<cudaStream_t>(launch.stream)));
  }

  // Latents of several sequences: up to 16 slices fill the GPU without much to reduce.
  const bool shared = plan.want_latents && p.num_sequences != 1 && (p.latents_shared || p.cu_seqlens_q != nullptr);
  plan.latent_slices = int(shared ? std::min<int64_t>(p.num_sequences, 16) : p.num_sequences);
  if (shared) {
    const size_t rows = size_t(std::max(plan.latent_slices, 1)) * p.num_latents * p.heads_kv;
    plan.latent_partial_k = workspace.take<float>(rows * p.dim_qk);
    plan.latent_partial_v = workspace.take<float>(rows * p.dim_v);
  }

  const int keys = kSimt ? kSimtRows : tile_keys(d);
  plan.main_tiles = int(plan.want_dkv ? std::max<int64_t>(ceil_div(p.max_seqlen_k, keys), 1) : 0);
  plan.latent_tiles = int(plan.want_latents ? ceil_div(p.num_latents, keys) : 0);
  const int64_t row_bytes = (p.dim_qk + p.dim_v) * int64_t(sizeof(T));
  plan.schedule = make_tile_schedule(plan.main_tiles + plan.latent_tiles, p.heads_kv, p.num_sequences,
                                     p.max_seqlen_q * group * row_bytes, false);
  plan.row_schedule =
      make_tile_schedule(std::max<int64_t>(ceil_div(p.max_seqlen_q * group, rows_per_tile), 1), p.heads_kv,
                         p.num_sequences, p.max_seqlen_k * row_bytes, p.mask.window_right >= 0);
  if (std::max(plan.schedule.count(), plan.row_schedule.count()) >= (int64_t(1) << 31)) {
    return "attention_backward: more than 2^31 tiles in one call";
  }
  if (kSimt) return nullptr;
  const char* m = align_rows<T>(p.q, p.batch, p.time_q, p.heads_q, p.dim_qk, workspace, launch);
  if (!m) m = align_rows<T>(p.k, p.batch, p.time_k, p.heads_kv, p.dim_qk, workspace, launch);
  if (!m) m = align_rows<T>(p.v, p.batch, p.time_k, p.heads_kv, p.dim_v, workspace, launch);
  if (!m) m = align_rows<T>(p.d_out, p.batch, p.time_q, p.heads_q, p.dim_v, workspace, launch);
  if (!m) m = align_rows<T>(p.latent_k, p.batch, p.num_latents, p.heads_kv, p.dim_qk, workspace, launch);
  if (!m) m = align_rows<T>(p.latent_v, p.batch, p.num_latents, p.heads_kv, p.dim_v, workspace, launch);
  return m;
}

template <typename T>
const char* run_gradients(const AttentionBackwardParams& p, const BackwardPlan& plan, const Kernel& kernel,
                          const Launch& launch) {
  const bool by_keys = plan.want_dkv || plan.want_latents;
  const bool by_rows = plan.want_dq && plan.dq_accumulator == nullptr;
  const char* message = nullptr;
  if constexpr (std::is_same_v<T, float>) {
    const auto ctas = [](const TileSchedule& s) { return unsigned(std::max<int64_t>(s.count(), 1)); };
    if (by_keys) {
      message = launch_kernel(simt_backward_kernel<T>, ctas(plan.schedule), 128, 0, launch, p, plan);
    }
    if (message == nullptr && by_rows) {
      message = launch_kernel(simt_backward_q_kernel<T>, ctas(plan.row_schedule), 128, 0, launch, p, plan);
    }
  } else {
    const int d = instance(p);
#ifdef YOCO_HAS_SM90
    if (by_keys && kernel.hopper) {
      message = (d == 64    ? sm90::launch_attention_backward<T, 64>
                 : d == 128 ? sm90::launch_attention_backward<T, 128>
                            : sm90::launch_attention_backward<T, 256>)(p, plan, kernel.tile_counter, launch);
    } else
#endif
        if (by_keys) {
      message = (d == 64    ? launch_attention_backward<T, 64>
                 : d == 128 ? launch_attention_backward<T, 128>
                            : launch_attention_backward<T, 256>)(p, plan, launch);
    }
#ifdef YOCO_HAS_SM90
    if (message == nullptr && by_rows && compute_capability(launch.device) == 90 && sm90::backward_q_fits(p)) {
      return (d == 64    ? sm90::launch_attention_backward_q<T, 64>
              : d == 128 ? sm90::launch_attention_backward_q<T, 128>
                         : sm90::launch_attention_backward_q<T, 256>)(p, plan, launch);
    }
#endif
    if (message == nullptr && by_rows) {
      message = (d == 64    ? launch_attention_backward_q<T, 64>
                 : d == 128 ? launch_attention_backward_q<T, 128>
                            : launch_attention_backward_q<T, 256>)(p, plan, launch);
    }
  }
  return message;
}

template <typename T>
const char* backward(AttentionBackwardParams p, const Launch& launch) {
  BackwardPlan plan{};
  WorkspaceCursor workspace{static_cast<char*>(p.workspace)};
  Kernel kernel = choose_kernel(p, launch);
  if (const char* message = prepare<T>(p, plan, kernel, workspace, launch)) return message;
  const int64_t rows = p.batch * p.time_q * p.heads_q;
  if (rows > 0) {
    const unsigned ctas = unsigned(std::min<int64_t>(ceil_div(rows, 8), int64_t(sm_count(launch.device)) * 32 + 1));
    if (const char* message =
            launch_kernel(row_statistics_kernel<T>, ctas, 256, 0, launch, p, plan.score, plan.stats)) {
      return message;
    }
  }
  if (const char* message = run_gradients<T>(p, plan, kernel, launch)) return message;
  if (plan.latent_partial_k != nullptr) {
    const auto reduce = [&](const float* partial, const View& to, int64_t dim) {
      const int64_t size = p.num_latents * p.heads_kv * dim;
      return launch_kernel(reduce_latents_kernel<T>, unsigned(std::min<int64_t>(ceil_div(size, 256), 4096)), 256, 0,
                           launch, partial, plan.latent_slices, to, p.num_latents, p.heads_kv, dim);
    };
    if (const char* message = reduce(plan.latent_partial_k, p.d_latent_k, p.dim_qk)) return message;
    if (const char* message = reduce(plan.latent_partial_v, p.d_latent_v, p.dim_v)) return message;
  }
  if (p.d_sinks == nullptr || p.sinks == nullptr) return nullptr;
  return launch_kernel(sink_gradient_kernel, unsigned(p.heads_q), 256, 0, launch, p, plan.stats);
}

}  // namespace

size_t attention_backward_workspace(const AttentionBackwardParams& params, const Launch& launch) {
  AttentionBackwardParams p = params;
  BackwardPlan plan{};
  WorkspaceCursor workspace{nullptr};
  Kernel kernel = choose_kernel(p, launch);
  YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* { return prepare<T>(p, plan, kernel, workspace, launch); });
  return workspace.used;
}

const char* attention_backward(const AttentionBackwardParams& p, const Launch& launch) {
  if (p.dim_qk % 8 != 0 || p.dim_v % 8 != 0 || p.dim_qk > 256 || p.dim_v > 256) {
    return "attention_backward on the cuda back end takes head dims that are multiples of 8 up to 256";
  }
  if (p.heads_q == 0) return nullptr;
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* { return backward<T>(p, launch); });
}

}  // namespace yoco::cuda
