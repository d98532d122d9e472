#include "cuda/attention/sm90/forward.cuh"

template const char* yoco::cuda::sm90::launch_attention_forward<__nv_bfloat16, 256>(const AttentionParams&,
                                                                                    const ForwardPlan&, int*,
                                                                                    const Launch&);
