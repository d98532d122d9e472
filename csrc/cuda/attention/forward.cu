// Attention forward: what runs where, and the kernels beside the tensor-core one (merging splits, float32).
#include <algorithm>

#include "cuda/attention/align.h"
#include "cuda/attention/plan.h"
#include "cuda/attention/simt.h"
#include "cuda/attention/sm90/plan.h"
#include "cuda/kernels.h"

namespace yoco::cuda {
namespace {

// Merges the splits of a row, by one warp: softmax over the partial lse and the sink.
template <typename T>
__global__ void __launch_bounds__(128) combine_kernel(const __grid_constant__ AttentionParams p,
                                                      const __grid_constant__ ForwardPlan plan, int rows_per_tile) {
  constexpr int kColumns = 256 / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim_v = int(p.dim_v);
  const WorkTile work = plan.schedule.decode(blockIdx.x);
  const RowMap map = make_row_map(p, work.sequence, work.head);
  const int64_t statistics = p.batch * p.heads_q * p.time_q;
  for (int tile = work.tile; tile * rows_per_tile < map.rows; tile += plan.schedule.tiles) {
    for (int r = warp + 4 * blockIdx.y; r < rows_per_tile; r += 4 * gridDim.y) {
      const int row = tile * rows_per_tile + r;
      if (row >= map.rows) break;
      const int64_t statistic = map.statistic(p, row);
      float top = YOCO_NEG_INF;
      for (int s = 0; s < plan.splits; ++s) top = fmaxf(top, plan.partial_lse[s * statistics + statistic]);
      float out[kColumns] = {}, sum = 0.f;
      bool legitimate = true;  // a NaN lse comes from visible scores only
      for (int s = 0; s < plan.splits; ++s) {
        const float lse = plan.partial_lse[s * statistics + statistic];
        if (lse == YOCO_NEG_INF) continue;
        legitimate &= lse == lse;
        const float weight = exp2f(lse - (top == YOCO_NEG_INF ? 0.f : top));
        sum += weight;
        const float* from = plan.partial_out + (s * statistics + statistic) * dim_v;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (c * 32 + lane < dim_v) out[c] = fmaf(weight, from[c * 32 + lane], out[c]);
        }
      }
      const RowResult result = finish_row(top, sum, 1.f, sink_log2(p, map.head(row)));
      float check = 0.f;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) check = fmaf(out[c], 0.f, check);
      if (legitimate && __any_sync(0xffffffffu, check != 0.f)) {
        attend_row<T>(p, plan.score, work.sequence, work.head, row);
        continue;
      }
      T* to = static_cast<T*>(p.out.data) + map.offset(p.out, row);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c * 32 + lane < dim_v) to[c * 32 + lane] = from_float<T>(out[c] * result.factor);
      }
      if (lane == 0) static_cast<float*>(p.lse)[statistic] = result.lse;
    }
  }
}

// float32: a warp per row.
template <typename T>
__global__ void __launch_bounds__(128)
    simt_forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ ForwardPlan plan,
                        int rows_per_tile) {
  zero_tail<T>(p, blockIdx.x, gridDim.x);
  if (p.num_sequences == 0) return;
  const WorkTile work = plan.schedule.decode(blockIdx.x);
  const RowMap map = make_row_map(p, work.sequence, work.head);
#pragma unroll 1  // a row is a call: copies of the loop only need registers
  for (int tile = work.tile; tile * rows_per_tile < map.rows; tile += plan.schedule.tiles) {
    const int end = min((tile + 1) * rows_per_tile, map.rows);
#pragma unroll 1
    for (int row = tile * rows_per_tile + int(threadIdx.x) / 32; row < end; row += 4) {
      attend_row<T>(p, plan.score, work.sequence, work.head, row);
    }
  }
}

// ---- host
constexpr int kSimtRows = 16;  // rows per CTA of the float32 kernel: short, so that small inputs fill the GPU

// What runs, and its tiles.
struct Kernel {
  bool hopper;  // attention/sm90/, else the sm_80 family (or float32)
  int rows;     // per tile
  int ctas_per_sm;
};

Kernel choose_kernel(const AttentionParams& p, const Launch& launch) {
  if (p.dtype == DType::kFloat32) return {false, kSimtRows, 1};
  const int64_t dim = std::max(p.dim_qk, p.dim_v);
#ifdef YOCO_HAS_SM90
  const int64_t group = p.heads_q / p.heads_kv;
  const int rows = sm90::forward_rows(dim);
  if (compute_capability(launch.device) == 90 && group <= rows && sm90::inputs_fit(p)) {
    return {true, int(rows / group * group), 1};
  }
#endif
  return {false, kForwardRows, dim > 128 ? 1 : 2};
}

bool is_causal(const AttentionParams& p) { return p.mask.window_right >= 0 && p.mask.prefix_len == nullptr; }

int64_t row_tiles(const AttentionParams& p, int rows) {
  return std::max<int64_t>(1, ceil_div(p.max_seqlen_q * (p.heads_q / p.heads_kv), rows));
}

// Splitting over keys: only when the row tiles leave most of the GPU idle (few query tokens on a long cache). Depends
// on the shape and the number of SMs alone, so equal calls give equal bits.
int choose_splits(const AttentionParams& p, const Kernel& kernel, const Launch& launch) {
  if (p.dtype == DType::kFloat32) return 1;
  const int64_t ctas = row_tiles(p, kernel.rows) * p.heads_kv * p.num_sequences;
  const int64_t slots = int64_t(sm_count(launch.device)) * kernel.ctas_per_sm;
  int64_t keys = p.max_seqlen_k;
  if (p.mask.prefix_len == nullptr && p.mask.window_left >= 0 && p.mask.window_right >= 0) {
    keys = std::min(keys, p.mask.window_left + p.mask.window_right + p.max_seqlen_q);
  }
  const int64_t blocks = ceil_div(keys, kForwardKeys) + ceil_div(p.num_latents, kForwardKeys);
  constexpr int64_t kMinBlocks = 8;  // a split must be worth its partial results and its share of the merge
  if (ctas <= 0 || ctas * 10 >= slots * 8 || blocks < 2 * kMinBlocks) return 1;
  return int(std::min({slots / ctas, blocks / kMinBlocks, int64_t(128)}));
}

// Lays out the workspace and, with memory behind it, makes p's inputs aligned. base null: only counts.
template <typename T>
const char* prepare(AttentionParams& p, ForwardPlan& plan, const Kernel& kernel, int*& tile_counter,
                    WorkspaceCursor& workspace, const Launch& launch) {
  plan.splits = choose_splits(p, kernel, launch);
  if (std::is_same_v<T, float>) return nullptr;
  if (kernel.hopper) tile_counter = workspace.take<int>(1);
  if (plan.splits > 1) {
    const size_t rows = size_t(plan.splits) * p.batch * p.heads_q * p.time_q;
    plan.partial_out = workspace.take<float>(rows * p.dim_v);
    plan.partial_lse = workspace.take<float>(rows);
  }
  const char* m = align_rows<T>(p.q, p.batch, p.time_q, p.heads_q, p.dim_qk, workspace, launch);
  if (!m) m = align_rows<T>(p.k, p.batch, p.time_k, p.heads_kv, p.dim_qk, workspace, launch);
  if (!m) m = align_rows<T>(p.v, p.batch, p.time_k, p.heads_kv, p.dim_v, workspace, launch);
  if (!m) m = align_rows<T>(p.latent_k, p.batch, p.num_latents, p.heads_kv, p.dim_qk, workspace, launch);
  if (!m) m = align_rows<T>(p.latent_v, p.batch, p.num_latents, p.heads_kv, p.dim_v, workspace, launch);
  plan.aligned_out = aligned(p.out, sizeof(T), 16);
  return m;
}

template <typename T>
const char* forward(AttentionParams p, const Launch& launch) {
  ForwardPlan plan{};
  plan.score = make_score_params(p);
  const int64_t pair_bytes = p.max_seqlen_k * (p.dim_qk + p.dim_v) * int64_t(sizeof(T));
  constexpr bool kSimt = std::is_same_v<T, float>;
  const Kernel kernel = choose_kernel(p, launch);
  const int rows = kernel.rows;
  plan.schedule = make_tile_schedule(row_tiles(p, rows), p.heads_kv, p.num_sequences, pair_bytes, is_causal(p));
  if (plan.schedule.count() >= (int64_t(1) << 31)) return "attention: more than 2^31 row tiles in one call";
  const unsigned ctas = unsigned(std::max<int64_t>(plan.schedule.count(), 1));
  WorkspaceCursor workspace{static_cast<char*>(p.workspace)};
  int* tile_counter = nullptr;
  if (const char* message = prepare<T>(p, plan, kernel, tile_counter, workspace, launch)) return message;
  if constexpr (kSimt) {
    return launch_kernel(simt_forward_kernel<T>, ctas, 128, 0, launch, p, plan, rows);
  } else {
    const int64_t dim = std::max(p.dim_qk, p.dim_v);
    const auto run = [&]() -> const char* {
#ifdef YOCO_HAS_SM90
      if (kernel.hopper) {
        return (dim <= 64    ? sm90::launch_attention_forward<T, 64>
                : dim <= 128 ? sm90::launch_attention_forward<T, 128>
                             : sm90::launch_attention_forward<T, 256>)(p, plan, tile_counter, launch);
      }
#endif
      return (dim <= 64    ? launch_attention_forward<T, 64>
              : dim <= 128 ? launch_attention_forward<T, 128>
                           : launch_attention_forward<T, 256>)(p, plan, launch);
    };
    if (const char* message = run()) return message;
    if (plan.splits == 1) return nullptr;
    return launch_kernel(combine_kernel<T>, dim3(ctas, 4), 128, 0, launch, p, plan, rows);
  }
}

}  // namespace

size_t attention_forward_workspace(const AttentionParams& params, const Launch& launch) {
  AttentionParams p = params;
  ForwardPlan plan{};
  WorkspaceCursor workspace{nullptr};
  const Kernel kernel = choose_kernel(p, launch);
  int* tile_counter = nullptr;
  YOCO_CUDA_DISPATCH(p.dtype, T,
                     [&]() -> const char* { return prepare<T>(p, plan, kernel, tile_counter, workspace, launch); });
  return workspace.used;
}

const char* attention_forward(const AttentionParams& p, const Launch& launch) {
  if (p.dim_qk % 8 != 0 || p.dim_v % 8 != 0 || p.dim_qk > 256 || p.dim_v > 256) {
    return "attention on the cuda back end takes head dims that are multiples of 8 up to 256";
  }
  if (p.time_q == 0 || p.batch == 0 || p.heads_q == 0) return nullptr;
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* { return forward<T>(p, launch); });
}

}  // namespace yoco::cuda
