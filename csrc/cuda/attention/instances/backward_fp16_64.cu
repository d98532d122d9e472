#include "cuda/attention/backward.h"
#include "cuda/attention/backward_q.h"

template const char* yoco::cuda::launch_attention_backward<__half, 64>(const AttentionBackwardParams&,
                                                                       const BackwardPlan&, const Launch&);
template const char* yoco::cuda::launch_attention_backward_q<__half, 64>(const AttentionBackwardParams&,
                                                                         const BackwardPlan&, const Launch&);
