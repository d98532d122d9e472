// gated_retention and its backward: plan, one launch per run (two with segments), chaining of segments, gate gradient.
#include <algorithm>

#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"
#include "cuda/kernels.h"
#include "cuda/retention/run.h"
#if YOCO_HAS_SM90
#include "cuda/retention/sm90/run.h"
#endif

namespace yoco::cuda {
namespace {

// ---- chaining of segments
// States behind segments
// 0, 1, ... that started from zero (0: from the initial state) become the states of the whole sequence: S_s += decay_s
// * S_{s-1}. All elements of a state have the same decay, so their order does not matter.
constexpr int kCombineThreads = 256;

__global__ void __launch_bounds__(kCombineThreads)
    retention_combine_kernel(const __grid_constant__ RetentionGrid p, int64_t state_size) {
  const RetentionRun& run = p.runs[blockIdx.y];
  const int64_t n = blockIdx.x / (p.heads * p.blocks_v);
  const int64_t segments = segments_of(chunks_of(retention_sequence(p, n).length), p.segments);
  const int64_t at = (int64_t(blockIdx.z) * kCombineThreads + threadIdx.x) * 4;
  if (at >= state_size) return;
  float4* states = reinterpret_cast<float4*>(run.segment_states + blockIdx.x * (p.segments - 1) * state_size + at);
  const float* decays = run.segment_decays + blockIdx.x * (p.segments - 1);
  if (segments < 3) return;
  float4 state = states[0];
  for (int64_t s = 1; s < segments - 1; ++s) {
    float4& own = states[s * (state_size / 4)];
    const float decay = decays[s];
    state =
        make_float4(own.x + decay * state.x, own.y + decay * state.y, own.z + decay * state.z, own.w + decay * state.w);
    own = state;
  }
}

// ---- gate gradient
// dg_t = <S, dS>
// before t, so dg_{t+1} = dg_t - (q_t . dq_t - k_t . dk_t). Summed over a sequence the rounding of operands would add
// up; each group of chunks starts from its own anchor instead, where <S, dS> is known. One warp per group.
constexpr int kGateWarps = 4;

struct GateGradient {
  View dg;
  const float* q_dots;    // [blocks, heads, batch * time]; blocks: of columns of the head dim
  const float* k_dots;    // the same
  const float* boundary;  // [blocks, heads, group slots]
  int blocks;
};

template <typename G>
__global__ void __launch_bounds__(kGateWarps * 32)
    retention_gate_gradient_kernel(const __grid_constant__ RetentionGrid p, const GateGradient a) {
  const int64_t head = blockIdx.x % p.heads, n = blockIdx.x / p.heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  G* dg = static_cast<G*>(a.dg.data) + head * a.dg.head_stride;
  if (n == p.num_sequences) {  // rows behind the last packed sequence
    const int64_t end = n == 0 ? 0 : clamp_index(p.cu_seqlens[n], 0, p.time);
    const int64_t step = int64_t(gridDim.y) * kGateWarps * 32;
    for (int64_t t = end + blockIdx.y * (kGateWarps * 32) + threadIdx.x; t < p.time; t += step) {
      dg[t * a.dg.time_stride] = from_float<G>(0.f);
    }
    return;
  }
  const RetentionSequence seq = retention_sequence(p, n);
  dg += seq.batch * a.dg.batch_stride + seq.begin * a.dg.time_stride;
  const G* const g = static_cast<const G*>(p.g.data) + head * p.g.head_stride + seq.batch * p.g.batch_stride +
                     seq.begin * p.g.time_stride;
  const auto slope = [&](int64_t t) {
    const float normalizer = p.gate_format.normalizer;
    return normalizer > 0.f ? log_decay_slope(to_float(g[t * p.g.time_stride]), normalizer) : 1.f;
  };
  const int64_t tokens = p.batch * p.time, first_token = seq.batch * p.time + seq.begin;
  const int64_t slots = group_slots(p), slot = first_group_slot(p, n, seq.begin);
  const int64_t group_tokens = int64_t(kChunk) * p.group_chunks;
  for (int64_t group = blockIdx.y * kGateWarps + warp; group * group_tokens < seq.length;
       group += gridDim.y * kGateWarps) {
    const int64_t num_chunks = chunks_of(seq.length), anchor = anchor_of(group, p.group_chunks, num_chunks);
    float at_anchor = 0.f;
    for (int b = 0; b < a.blocks; ++b) at_anchor += a.boundary[(b * p.heads + head) * slots + slot + group];
    // given: dg of the chunk's first token, or (backwards) of the token behind the chunk. Returns the other one.
    const auto chunk = [&](int64_t c, float given, bool backwards) {
      float d[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t t = c * kChunk + lane * 2 + i;
        for (int b = 0; b < a.blocks && t < seq.length; ++b) {
          const int64_t at = (b * p.heads + head) * tokens + first_token + t;
          d[i] += a.q_dots[at] - a.k_dots[at];
        }
      }
      float sum = d[0] + d[1];  // of this lane's tokens and all before them
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const float below = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += below;
      }
      const float total = __shfl_sync(0xffffffffu, sum, 31), below = __shfl_up_sync(0xffffffffu, sum, 1);
      const float first = backwards ? given + total : given, own = first - (lane == 0 ? 0.f : below);
      const int64_t t = c * kChunk + lane * 2;
      const auto put = [&](int64_t i, float gradient) {
        if (i < seq.length) dg[i * a.dg.time_stride] = from_float<G>(gradient * slope(i));
      };
      put(t, own);
      put(t + 1, own - d[0]);
      return backwards ? first : first - total;
    };
    const int64_t begin = group * p.group_chunks, end = min(begin + p.group_chunks, num_chunks);
    float gradient = at_anchor;
    for (int64_t c = anchor; c < end; ++c) gradient = chunk(c, gradient, false);
    gradient = at_anchor;
    for (int64_t c = anchor - 1; c >= begin; --c) gradient = chunk(c, gradient, true);
  }
}

// ---- plan
struct Plan {
  bool simple;  // float32: no tensor cores
  RetentionInstance instance;
  int64_t blocks_v, segments;
  int64_t segment_bytes;  // segment_states and segment_decays of one run
};

// Columns over which the Hopper kernels leave a sum of their own for the gate gradient; the others do so per block.
constexpr int kHopperPart = 64;

constexpr int64_t round_up(int64_t n) { return ceil_div(n, 256) * 256; }

// dim_k and dim_v: the largest of the runs. num_runs: that run at the same time. v_turns: by rotary, in one of them.
Plan make_plan(const RetentionParams& p, int64_t dim_k, int64_t dim_v, int64_t num_runs, const Launch& launch,
               bool v_turns = false) {
  Plan plan{};
  const int64_t sms = std::max(sm_count(launch.device), 1);
  const int64_t rows = p.num_sequences * p.heads * num_runs;
  plan.simple = p.dtype == DType::kFloat32;
  plan.instance = plan.simple ? RetentionInstance{static_cast<int32_t>(dim_k), kSimpleBlockV}
                              : retention_instance(dim_k, dim_v, rows, sms);
  // The Hopper kernels turn the halves of v against each other inside one block.
  const bool halves = v_turns && !plan.simple && !p.rotary.interleaved && p.rotary.dim > plan.instance.block_v;
  if (halves && plan.instance.dim_k == 128 && compute_capability(launch.device) == 90) plan.instance.block_v = 128;
  plan.blocks_v = ceil_div(dim_v, plan.instance.block_v);
  plan.segments = plan.simple ? 1 : retention_segments(rows * plan.blocks_v, p.time, sms);
  const int64_t size = block_state_size(plan.instance);
  plan.segment_bytes = plan.segments == 1
                           ? 0
                           : round_up(p.num_sequences * p.heads * plan.blocks_v * (plan.segments - 1) * (size + 1) * 4);
  return plan;
}

RetentionGrid make_grid(const RetentionParams& p, const Plan& plan) {
  RetentionGrid grid{};
  grid.batch = p.batch, grid.time = p.time, grid.heads = p.heads, grid.num_sequences = p.num_sequences;
  grid.cu_seqlens = p.cu_seqlens;
  grid.g = p.g;
  grid.gate_format = {p.gate_dtype == DType::kFloat32, static_cast<float>(p.gate_normalizer)};
  grid.blocks_v = static_cast<int32_t>(plan.blocks_v);
  grid.segments = static_cast<int32_t>(plan.segments);
  grid.vectors = 1;
  grid.group_chunks = plan.simple ? 1 : kGroupChunks;
  grid.rotary = p.rotary;
  if (p.rotary.inv_freq != nullptr && !p.rotary.interleaved) {
    const bool pieces = !plan.simple && p.rotary.dim % 16 == 0;
    grid.order = {static_cast<int32_t>(p.rotary.dim), pieces ? 3 : 0};
    grid.vectors = pieces;
  }
  return grid;
}

template <typename T, bool kBackward>
const char* launch_instance(const RetentionGrid& grid, const Plan& plan, const Launch& launch) {
  switch (plan.instance.dim_k) {
    case 64:
      return launch_retention<T, 64, 64, kBackward>(grid, launch);
    case 128:
      return plan.instance.block_v == 64 ? launch_retention<T, 128, 64, kBackward>(grid, launch)
                                         : launch_retention<T, 128, 128, kBackward>(grid, launch);
    default:
      return launch_retention<T, 256, 128, kBackward>(grid, launch);
  }
}

// Whether the Hopper kernels take these runs. The runs of one backward must agree: they hand states to each other.
bool takes_hopper(const RetentionGrid& grid, const Plan& plan, const Launch& launch) {
#if YOCO_HAS_SM90
  return !plan.simple && compute_capability(launch.device) == 90 && retention_fits_sm90(grid, plan.instance);
#else
  return false;
#endif
}

// The runs of `grid`, with as many passes as segments need. segments: their memory.
template <bool kBackward>
const char* launch_runs(RetentionGrid& grid, const Plan& plan, DType dtype, char* segments, bool hopper,
                        const Launch& launch) {
  if (plan.simple) return launch_retention_simple(grid, launch);
  const auto pass = [&]() {
#if YOCO_HAS_SM90
    if (hopper) return launch_retention_sm90(grid, plan.instance, dtype, kBackward, launch);
#endif
    return dtype == DType::kBFloat16 ? launch_instance<__nv_bfloat16, kBackward>(grid, plan, launch)
                                     : launch_instance<__half, kBackward>(grid, plan, launch);
  };
  const int64_t size = block_state_size(plan.instance), items = grid.num_sequences * grid.heads * plan.blocks_v;
  for (int r = 0; r < grid.num_runs; ++r) {
    RetentionRun& run = grid.runs[r];
    for (const View* v : {&run.q, &run.k, &run.v, &run.o, &run.x, &grid.output_gate, &grid.y}) {
      grid.vectors &= aligned(*v, 2, 16);
    }
    if (plan.segments == 1) continue;
    run.segment_states = reinterpret_cast<float*>(segments + r * plan.segment_bytes);
    run.segment_decays = run.segment_states + items * (plan.segments - 1) * size;
  }
  if (plan.segments > 1) {
    grid.states_only = 1;
    if (const char* message = pass()) return message;
    grid.states_only = 0;
    if (plan.segments > 2) {
      const dim3 blocks(static_cast<unsigned>(items), grid.num_runs,
                        static_cast<unsigned>(ceil_div(size, kCombineThreads * 4)));
      if (const char* message = launch_kernel(retention_combine_kernel, blocks, kCombineThreads, 0, launch, grid, size))
        return message;
    }
  }
  return pass();
}

bool nothing_to_do(const RetentionParams& p) {
  return p.heads == 0 || (p.num_sequences == 0 && (p.cu_seqlens == nullptr || p.time == 0));
}

RetentionRun forward_run(const RetentionParams& p) {
  RetentionRun run{};
  const float scale = static_cast<float>(p.scale);
  run.q = p.q, run.k = p.k, run.v = p.v, run.o = p.o;
  run.dim_k = static_cast<int32_t>(p.dim_k), run.dim_v = static_cast<int32_t>(p.dim_v);
  run.row_scale = scale, run.score_scale = scale, run.update_scale = 1.f;
  run.state_in = static_cast<const float*>(p.initial_state);
  run.state_out = static_cast<float*>(p.final_state);
  run.state_stride_k = p.dim_v, run.state_stride_v = 1;
  return run;
}

// ---- norm and output gate, where the kernel of the run does not do them
constexpr int kTailThreads = 256;

// One warp per head of a token behind the last packed sequence.
template <typename T>
__global__ void __launch_bounds__(kTailThreads)
    retention_zero_tail_kernel(const View y, const int32_t* end, int64_t time, int64_t heads, int dim) {
  const int64_t step = int64_t(gridDim.x) * (kTailThreads / 32);
  const int64_t first = clamp_index(*end, 0, time) * heads + blockIdx.x * (kTailThreads / 32) + threadIdx.x / 32;
  for (int64_t row = first; row < time * heads; row += step) {
    T* const to = static_cast<T*>(y.data) + row / heads * y.time_stride + row % heads * y.head_stride;
    for (int i = threadIdx.x % 32; i < dim; i += 32) to[i] = from_float<T>(0.f);
  }
}

// y = o / sqrt(mean(o^2) + eps) * silu(output_gate), a pass of its own; o and y may be the same. Rows of no sequence
// are zero in y whatever the gate holds there.
const char* finish_with_gate(const RetentionParams& p, const View& o, const Launch& launch) {
  const RetentionOutputParams output{p.dtype, p.batch, p.time, p.heads, p.dim_v, p.norm_eps, o, p.output_gate, p.y};
  if (const char* message = retention_output(output, launch)) return message;
  if (p.cu_seqlens == nullptr) return nullptr;
  const int64_t blocks = clamp_index(ceil_div(p.time * p.heads, kTailThreads / 32), 0, 1024);
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    return launch_kernel(retention_zero_tail_kernel<T>, dim3(static_cast<unsigned>(blocks)), kTailThreads, 0, launch,
                         p.y, p.cu_seqlens + p.num_sequences, p.time, p.heads, static_cast<int>(p.dim_v));
  });
}

// ---- backward
struct BackwardMemory {
  int64_t q_dots, k_dots, boundary, group_states, segments, total;  // offsets in the workspace
};

struct BackwardPlan {
  Plan first, second;  // dq; dk and dv together
  BackwardMemory at;
};

BackwardPlan make_backward_plan(const RetentionBackwardParams& p, const Launch& launch) {
  // The three runs swap dim_k and dim_v; one instance that takes either way round serves all.
  const int64_t dim = std::max(p.dim_k, p.dim_v);
  BackwardPlan plan;
  plan.first = plan.second = make_plan(p, dim, dim, 1, launch, p.rotary.inv_freq != nullptr);
  // dk finds the states that dq left in the order of the same instance, so only the segments may differ.
  if (!plan.first.simple) {
    const int64_t sms = std::max(sm_count(launch.device), 1);
    const int64_t items = 2 * p.num_sequences * p.heads * plan.second.blocks_v;
    plan.second.segments = std::min(plan.first.segments, retention_segments(items, p.time, sms));
    const int64_t states = p.num_sequences * p.heads * plan.second.blocks_v * (plan.second.segments - 1);
    plan.second.segment_bytes = round_up(states * (block_state_size(plan.second.instance) + 1) * 4);
  }
  RetentionGrid grid = make_grid(p, plan.first);
  const int64_t rows = plan.first.blocks_v * p.heads, slots = group_slots(grid);
  const int64_t parts = plan.first.simple ? rows : rows * ceil_div(plan.first.instance.block_v, kHopperPart);
  BackwardMemory& at = plan.at;
  at.q_dots = 0;
  at.k_dots = at.q_dots + round_up(parts * p.batch * p.time * 4);
  at.boundary = at.k_dots + round_up(parts * p.batch * p.time * 4);
  at.group_states = at.boundary + round_up(parts * slots * 4);
  at.segments = at.group_states + round_up(rows * slots * block_state_size(plan.first.instance) * 4);
  at.total = at.segments + std::max(plan.first.segment_bytes, 2 * plan.second.segment_bytes);
  return plan;
}

}  // namespace

size_t retention_forward_workspace(const RetentionParams& p, const Launch& launch) {
  if (nothing_to_do(p)) return 0;
  return static_cast<size_t>(make_plan(p, p.dim_k, p.dim_v, 1, launch).segment_bytes);
}

const char* retention_forward(const RetentionParams& p, const Launch& launch) {
  if (p.dtype == DType::kFloat64) return "gated_retention: float64 runs on the cpu back end and in yoco_ext.reference";
  if (p.dim_k > 256 || p.dim_v > 256) return "gated_retention: the cuda back end takes head dims up to 256";
  if (nothing_to_do(p)) return nullptr;
  const Plan plan = make_plan(p, p.dim_k, p.dim_v, 1, launch);
  RetentionGrid grid = make_grid(p, plan);
  grid.num_runs = 1;
  RetentionRun& run = grid.runs[0];
  run = forward_run(p);
  const bool gated = p.output_gate.data != nullptr;
  const bool fused = gated && !plan.simple && norm_fuses(plan.instance, p.dim_v);
  if (fused) grid.output_gate = p.output_gate, grid.y = p.y, grid.norm_eps = static_cast<float>(p.norm_eps);
  if (gated && !fused && p.o.data == nullptr) run.o = p.y;
  const bool hopper = takes_hopper(grid, plan, launch);
  const char* message = launch_runs<false>(grid, plan, p.dtype, static_cast<char*>(p.workspace), hopper, launch);
  return message == nullptr && gated && !fused ? finish_with_gate(p, run.o, launch) : message;
}

size_t retention_backward_workspace(const RetentionBackwardParams& p, const Launch& launch) {
  return nothing_to_do(p) ? 0 : static_cast<size_t>(make_backward_plan(p, launch).at.total);
}

const char* retention_backward(const RetentionBackwardParams& p, const Launch& launch) {
  if (p.dtype == DType::kFloat64)
    return "gated_retention_backward: float64 runs on the cpu back end and in yoco_ext.reference";
  if (p.dim_k > 256 || p.dim_v > 256) return "gated_retention_backward: the cuda back end takes head dims up to 256";
  if (nothing_to_do(p)) return nullptr;
  const BackwardPlan plan = make_backward_plan(p, launch);
  char* const workspace = static_cast<char*>(p.workspace);
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(workspace + offset); };
  const float scale = static_cast<float>(p.scale);

  RetentionRun dq = forward_run(p);  // the forward with v in the role of k: its state is S^T
  dq.q = p.d_o, dq.k = p.v, dq.v = p.k, dq.o = p.dq, dq.x = p.q;
  dq.rotate_v = 1;
  std::swap(dq.dim_k, dq.dim_v);
  std::swap(dq.state_stride_k, dq.state_stride_v);
  dq.state_out = nullptr;
  dq.dots = floats(plan.at.q_dots);
  dq.group_states = floats(plan.at.group_states);

  RetentionRun dv = forward_run(p);  // backwards; the state is the gradient of S
  dv.reverse = 1;
  dv.q = p.k, dv.k = p.q, dv.v = p.d_o, dv.o = p.dv;
  dv.row_scale = 1.f, dv.update_scale = scale;  // q carries the scale into the state
  dv.state_in = static_cast<const float*>(p.d_final_state);
  dv.state_out = static_cast<float*>(p.d_initial_state);

  RetentionRun dk = dv;  // the same, transposed
  dk.q = p.v, dk.k = p.d_o, dk.v = p.q, dk.o = p.dk, dk.x = p.k;
  dk.rotate_v = 1;
  std::swap(dk.dim_k, dk.dim_v);
  std::swap(dk.state_stride_k, dk.state_stride_v);
  dk.state_out = nullptr;
  dk.dots = floats(plan.at.k_dots);
  dk.boundary = floats(plan.at.boundary);
  dk.group_states = dq.group_states;

  RetentionGrid first = make_grid(p, plan.first);
  first.num_runs = 1;
  first.runs[0] = dq;
  RetentionGrid second = make_grid(p, plan.second);
  second.num_runs = 2;
  second.runs[0] = dk;
  second.runs[1] = dv;
  const bool hopper = takes_hopper(first, plan.first, launch) && takes_hopper(second, plan.second, launch);
  char* const segments = workspace + plan.at.segments;
  if (const char* message = launch_runs<true>(first, plan.first, p.dtype, segments, hopper, launch)) return message;
  if (const char* message = launch_runs<true>(second, plan.second, p.dtype, segments, hopper, launch)) return message;

  const GateGradient gate{p.dg, dq.dots, dk.dots, dk.boundary,
                          static_cast<int>(ceil_div(p.dim_k, hopper ? kHopperPart : plan.first.instance.block_v))};
  const int64_t rows = p.heads * (p.num_sequences + (p.cu_seqlens != nullptr ? 1 : 0));
  const dim3 blocks(static_cast<unsigned>(rows),
                    static_cast<unsigned>(clamp_index(chunks_of(p.time) / (4 * kGateWarps), 1, 1024)));
  return YOCO_CUDA_DISPATCH(p.gate_dtype, G, [&]() -> const char* {
    return launch_kernel(retention_gate_gradient_kernel<G>, blocks, kGateWarps * 32, 0, launch, first, gate);
  });
}

}  // namespace yoco::cuda
