// The combination as a dependent launch: its blocks are placed and wait on the device while the last pieces run.
#include "cuda/decode/combine.cuh"
#include "cuda/decode/sm90/launch.h"

namespace yoco::cuda::sm90 {

const char* launch_combine(const DecodeParams& p, const DecodePartials& partials, const Launch& launch) {
  if (const char* message = set_device(launch)) return message;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.batch * p.heads_q * p.time_q));
  config.blockDim = dim3(kCombineThreads);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return error_message(p.dtype == DType::kBFloat16
                           ? cudaLaunchKernelEx(&config, combine_kernel<__nv_bfloat16, true>, p, partials)
                           : cudaLaunchKernelEx(&config, combine_kernel<__half, true>, p, partials));
}

}  // namespace yoco::cuda::sm90
