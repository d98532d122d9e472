#include "cuda/retention/sm90/run_kernel.cuh"

namespace yoco::cuda {
YOCO_RETENTION_SM90_INSTANCES(__nv_bfloat16, 256, 128)
}  // namespace yoco::cuda
