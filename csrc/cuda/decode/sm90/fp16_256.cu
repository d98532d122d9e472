#include "cuda/decode/sm90/kernel.cuh"

namespace yoco::cuda::sm90 {
template const char* launch_decode<__half, 256>(const DecodeParams&, const DecodePlan&, const DecodeSegment&,
                                                const DecodePartials&, const Launch&);
}  // namespace yoco::cuda::sm90
