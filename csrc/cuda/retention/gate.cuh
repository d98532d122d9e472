// From what the caller gives as a gate to the log decay of a token, and back for the gradient.
#pragma once

#include "cuda/core/vector.cuh"

namespace yoco::cuda {

// How gates are given: params.h, gate_dtype and gate_normalizer.
struct GateFormat {
  int32_t is_float;  // float32, else the dtype of q
  float normalizer;  // > 0: logits x, log decay logsigmoid(x) / normalizer; 0: log decays
};

YOCO_DEVICE float log_decay(float gate, float normalizer) {
  return normalizer > 0.f ? (fminf(gate, 0.f) - log1pf(expf(-fabsf(gate)))) / normalizer : gate;
}
// d log_decay / d gate
YOCO_DEVICE float log_decay_slope(float gate, float normalizer) {
  return normalizer > 0.f ? 1.f / (normalizer * (1.f + expf(gate))) : 1.f;
}

// The gate at element `at`, as a log decay.
template <typename T>
YOCO_DEVICE float load_gate(const void* gates, int64_t at, const GateFormat& format) {
  const float x = format.is_float ? static_cast<const float*>(gates)[at] : to_float(static_cast<const T*>(gates)[at]);
  return log_decay(x, format.normalizer);
}

}  // namespace yoco::cuda
