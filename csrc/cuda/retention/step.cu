// Host side of gated_retention_step: choice of the instance (step_kernel.cuh).
#include "cuda/kernels.h"
#include "cuda/retention/step_kernel.cuh"

namespace yoco::cuda {

const char* retention_step(const RetentionStepParams& p, const Launch& launch) {
  if (p.dim_k > 256 || p.dim_v > 256) return "gated_retention_step: the cuda back end takes head dims up to 256";
  const int64_t blocks = p.batch * p.heads * ceil_div(p.dim_v, step::kColumns);
  if (blocks == 0 || p.time == 0) return nullptr;
  if (blocks > INT32_MAX) return "gated_retention_step: more than 2^31 blocks";
  const bool vectors = aligned(p.state, 16), gated = p.output_gate.data != nullptr;
  const GateFormat gate_format{p.gate_dtype == DType::kFloat32, static_cast<float>(p.gate_normalizer)};
#if YOCO_HAS_SM90
  if (gated && compute_capability(launch.device) == 90) return step::launch_gated(p, vectors, gate_format, launch);
#endif
  const char* message = YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    return launch_kernel(step::pick_kernel<T, false>(p), dim3(static_cast<unsigned>(blocks)), step::kThreads,
                         step::shared_bytes(p, false), launch, p, vectors, gate_format);
  });
  if (message != nullptr || !gated) return message;
  // Norm and gate in place: a block of the step has not all columns of a row.
  return retention_output({p.dtype, p.batch, p.time, p.heads, p.dim_v, p.norm_eps, p.o, p.output_gate, p.o}, launch);
}

}  // namespace yoco::cuda
