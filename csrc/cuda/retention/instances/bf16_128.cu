#include "cuda/retention/run_kernel.cuh"

namespace yoco::cuda {
YOCO_RETENTION_INSTANCES(__nv_bfloat16, 128, 128)
YOCO_RETENTION_INSTANCES(__nv_bfloat16, 128, 64)
}  // namespace yoco::cuda
