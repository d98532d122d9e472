#include "cuda/retention/run_kernel.cuh"

namespace yoco::cuda {
YOCO_RETENTION_INSTANCES(__half, 64, 64)
}  // namespace yoco::cuda
