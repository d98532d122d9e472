#include "cuda/retention/sm90/run_kernel.cuh"

namespace yoco::cuda {
YOCO_RETENTION_SM90_INSTANCES(__half, 128, 128)
YOCO_RETENTION_SM90_INSTANCES(__half, 128, 64)
}  // namespace yoco::cuda
