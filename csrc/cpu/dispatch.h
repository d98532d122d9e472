// The CPU kernels for this machine.
#pragma once

#include "../params.h"

namespace yoco::cpu {

// Picked once by cpuid, or by the environment variable YOCO_CPU_ISA (portable, avx2, avx512, avx512_bf16, amx).
const KernelTable* kernels();

}  // namespace yoco::cpu
