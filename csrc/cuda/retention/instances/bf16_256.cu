#include "cuda/retention/run_kernel.cuh"

namespace yoco::cuda {
YOCO_RETENTION_INSTANCES(__nv_bfloat16, 256, 128)
}  // namespace yoco::cuda
