#include "cuda/retention/run_kernel.cuh"

namespace yoco::cuda {
YOCO_RETENTION_INSTANCES(__nv_bfloat16, 64, 64)
}  // namespace yoco::cuda
