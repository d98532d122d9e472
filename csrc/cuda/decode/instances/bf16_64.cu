#include "cuda/decode/decode_kernel.cuh"

namespace yoco::cuda {
template const char* launch_decode<__nv_bfloat16, 64>(const DecodeParams&, const DecodePlan&, const DecodeSegment&,
                                                      const DecodePartials&, const Launch&);
}  // namespace yoco::cuda
