#include "cuda/attention/backward.h"
#include "cuda/attention/backward_q.h"

template const char* yoco::cuda::launch_attention_backward<__nv_bfloat16, 64>(const AttentionBackwardParams&,
                                                                              const BackwardPlan&, const Launch&);
template const char* yoco::cuda::launch_attention_backward_q<__nv_bfloat16, 64>(const AttentionBackwardParams&,
                                                                                const BackwardPlan&, const Launch&);
