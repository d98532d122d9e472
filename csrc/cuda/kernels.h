// Entry points of the CUDA back end, as they appear in KernelTable (params.h). Host code: they pick an instance, launch
// it on launch.stream and return null or a message. Declared here, listed in table.cu, defined beside their kernels.
#pragma once

#include "params.h"

namespace yoco::cuda {

// attention/
const char* attention_forward(const AttentionParams& params, const Launch& launch);
size_t attention_forward_workspace(const AttentionParams& params, const Launch& launch);
const char* attention_backward(const AttentionBackwardParams& params, const Launch& launch);
size_t attention_backward_workspace(const AttentionBackwardParams& params, const Launch& launch);

// retention/
const char* retention_forward(const RetentionParams& params, const Launch& launch);
size_t retention_forward_workspace(const RetentionParams& params, const Launch& launch);
const char* retention_backward(const RetentionBackwardParams& params, const Launch& launch);
size_t retention_backward_workspace(const RetentionBackwardParams& params, const Launch& launch);
const char* retention_step(const RetentionStepParams& params, const Launch& launch);

// decode/
const char* decode(const DecodeParams& params, const Launch& launch);
size_t decode_workspace(const DecodeParams& params, const Launch& launch);

// pointwise/
const char* append_kv(const AppendParams& params, const Launch& launch);
const char* rms_norm(const RmsNormParams& params, const Launch& launch);
const char* rms_norm_backward(const RmsNormBackwardParams& params, const Launch& launch);
size_t rms_norm_backward_workspace(const RmsNormBackwardParams& params, const Launch& launch);
const char* rotary(const RotaryParams& params, const Launch& launch);
const char* swiglu(const SwigluParams& params, const Launch& launch);
const char* swiglu_backward(const SwigluBackwardParams& params, const Launch& launch);
const char* retention_output(const RetentionOutputParams& params, const Launch& launch);
const char* retention_output_backward(const RetentionOutputBackwardParams& params, const Launch& launch);
const char* pair_norm(const PairNormParams& params, const Launch& launch);
const char* pair_norm_backward(const PairNormBackwardParams& params, const Launch& launch);
size_t pair_norm_backward_workspace(const PairNormBackwardParams& params, const Launch& launch);

}  // namespace yoco::cuda
