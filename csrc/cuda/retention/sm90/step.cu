// gated_retention_step with the norm and the output gate: the blocks of a head are a cluster.
#include "cuda/retention/step_kernel.cuh"

namespace yoco::cuda::step {

const char* launch_gated(const RetentionStepParams& p, bool vectors, const GateFormat& gate_format,
                         const Launch& launch) {
  if (const char* message = set_device(launch)) return message;
  const unsigned cluster = static_cast<unsigned>(ceil_div(p.dim_v, kColumns));  // up to 8, as every GPU allows
  const int shared = static_cast<int>(shared_bytes(p, true));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.batch * p.heads) * cluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return YOCO_CUDA_DISPATCH(p.dtype, T, [&]() -> const char* {
    const auto kernel = pick_kernel<T, true>(p);
    if (size_t(shared) > kSharedUnasked) {
      YOCO_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    }
    return error_message(cudaLaunchKernelEx(&config, kernel, p, vectors, gate_format));
  });
}

}  // namespace yoco::cuda::step
