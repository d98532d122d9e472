#include "cuda/retention/run_kernel.cuh"

namespace yoco::cuda {
YOCO_RETENTION_INSTANCES(__half, 256, 128)
}  // namespace yoco::cuda
