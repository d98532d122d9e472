#include "cuda/attention/sm90/backward.cuh"

template const char* yoco::cuda::sm90::launch_attention_backward<__nv_bfloat16, 64>(const AttentionBackwardParams&,
                                                                                    const BackwardPlan&, int*,
                                                                                    const Launch&);
