#include "cuda/attention/forward.h"

template const char* yoco::cuda::launch_attention_forward<__half, 256>(const AttentionParams&, const ForwardPlan&,
                                                                       const Launch&);
