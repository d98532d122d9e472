// attention_decode: plan, one launch per segment, and the combination of their pieces.
#include <algorithm>

#include "cuda/decode/combine.cuh"
#include "cuda/decode/plan.h"
#ifdef YOCO_HAS_SM90
#include "cuda/decode/sm90/launch.h"
#endif
#include "cuda/kernels.h"

namespace yoco::cuda {
namespace {

int64_t result_rows(const DecodeParams& p) { return p.batch * p.heads_q * p.time_q; }

DecodePlan make_plan(const DecodeParams& p, const Launch& launch) {
#ifdef YOCO_HAS_SM90
  const bool hopper = compute_capability(launch.device) == 90;
#else
  const bool hopper = false;
#endif
  return plan_decode(p, sm_count(launch.device), hopper);
}

using LaunchFunction = const char* (*)(const DecodeParams&, const DecodePlan&, const DecodeSegment&,
                                       const DecodePartials&, const Launch&);

template <typename T>
LaunchFunction choose_kernel(const DecodePlan& plan) {
  if (!plan.tensor_cores) return launch_decode_simple;
#ifdef YOCO_HAS_SM90
  if (plan.hopper) {
    return plan.head_dim == 64    ? sm90::launch_decode<T, 64>
           : plan.head_dim == 128 ? sm90::launch_decode<T, 128>
                                  : sm90::launch_decode<T, 256>;
  }
#endif
  return plan.head_dim == 64    ? launch_decode<T, 64>
         : plan.head_dim == 128 ? launch_decode<T, 128>
                                : launch_decode<T, 256>;
}

const char* launch_segment(const DecodeParams& p, const DecodePlan& plan, const DecodeSegment& segment,
                           const DecodePartials& partials, const Launch& launch) {
  if (segment.splits == 0) return nullptr;
  const LaunchFunction run =
      p.dtype == DType::kBFloat16 ? choose_kernel<__nv_bfloat16>(plan) : choose_kernel<__half>(plan);
  return run(p, plan, segment, partials, launch);
}

}  // namespace

size_t decode_workspace(const DecodeParams& p, const Launch& launch) {
  if (p.heads_kv == 0) return 0;
  const DecodePlan plan = make_plan(p, launch);
  if (plan.slots <= 1) return 0;
  return static_cast<size_t>(plan.slots * result_rows(p) * (p.dim_v + 1)) * sizeof(float);
}

const char* decode(const DecodeParams& p, const Launch& launch) {
  if (result_rows(p) == 0) return nullptr;
  if (p.dim_qk > 256 || p.dim_v > 256) return "attention_decode: the cuda back end takes head dims up to 256";
  const DecodePlan plan = make_plan(p, launch);
  DecodePartials partials{plan.slots, static_cast<float*>(p.workspace), nullptr};
  partials.lse = partials.out + plan.slots * result_rows(p) * p.dim_v;
  if (const char* message = launch_segment(p, plan, plan.cache, partials, launch)) return message;
  if (const char* message = launch_segment(p, plan, plan.latents, partials, launch)) return message;
  if (plan.slots == 1) return nullptr;
#ifdef YOCO_HAS_SM90
  if (plan.hopper) return sm90::launch_combine(p, partials, launch);
#endif
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    return launch_kernel(combine_kernel<T, false>, dim3(static_cast<unsigned>(result_rows(p))), kCombineThreads, 0,
                         launch, p, partials);
  });
}

}  // namespace yoco::cuda
