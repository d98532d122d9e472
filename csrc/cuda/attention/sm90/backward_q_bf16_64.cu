#include "cuda/attention/sm90/backward_q.cuh"

template const char* yoco::cuda::sm90::launch_attention_backward_q<__nv_bfloat16, 64>(const AttentionBackwardParams&,
                                                                                      const BackwardPlan&,
                                                                                      const Launch&);
