#include "cuda/attention/sm90/backward.cuh"

template const char* yoco::cuda::sm90::launch_attention_backward<__nv_bfloat16, 256>(const AttentionBackwardParams&,
                                                                                     const BackwardPlan&, int*,
                                                                                     const Launch&);
