#include "cuda/attention/forward.h"

template const char* yoco::cuda::launch_attention_forward<__half, 128>(const AttentionParams&, const ForwardPlan&,
                                                                       const Launch&);
