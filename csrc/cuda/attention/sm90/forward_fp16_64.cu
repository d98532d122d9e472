#include "cuda/attention/sm90/forward.cuh"

template const char* yoco::cuda::sm90::launch_attention_forward<__half, 64>(const AttentionParams&, const ForwardPlan&,
                                                                            int*, const Launch&);
