#include "cuda/retention/sm90/run_kernel.cuh"

namespace yoco::cuda {
YOCO_RETENTION_SM90_INSTANCES(__half, 256, 128)
}  // namespace yoco::cuda
