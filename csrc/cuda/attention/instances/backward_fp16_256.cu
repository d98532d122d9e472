#include "cuda/attention/backward.h"
#include "cuda/attention/backward_q.h"

template const char* yoco::cuda::launch_attention_backward<__half, 256>(const AttentionBackwardParams&,
                                                                        const BackwardPlan&, const Launch&);
template const char* yoco::cuda::launch_attention_backward_q<__half, 256>(const AttentionBackwardParams&,
                                                                          const BackwardPlan&, const Launch&);
