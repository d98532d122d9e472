// Binds schemas to implementations. Meta (fake) implementations and the autograd formulas are Python: yoco_ext/ops.
#include "ops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(yoco_ext, m) {
  for (const char* schema : yoco::kSchemas) m.def(schema);
}

namespace {

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("gated_retention", TORCH_BOX(&yoco::gated_retention));
  m.impl("gated_retention_backward", TORCH_BOX(&yoco::gated_retention_backward));
  m.impl("gated_retention_step", TORCH_BOX(&yoco::gated_retention_step));
  m.impl("attention", TORCH_BOX(&yoco::attention));
  m.impl("shared_attention", TORCH_BOX(&yoco::shared_attention));
  m.impl("attention_backward", TORCH_BOX(&yoco::attention_backward));
  m.impl("attention_backward_accumulate", TORCH_BOX(&yoco::attention_backward_accumulate));
  m.impl("attention_decode", TORCH_BOX(&yoco::attention_decode));
  m.impl("append_kv", TORCH_BOX(&yoco::append_kv));
  m.impl("rms_norm", TORCH_BOX(&yoco::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&yoco::rms_norm_backward));
  m.impl("rotary", TORCH_BOX(&yoco::rotary));
  m.impl("swiglu", TORCH_BOX(&yoco::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&yoco::swiglu_backward));
  m.impl("retention_output", TORCH_BOX(&yoco::retention_output));
  m.impl("retention_output_backward", TORCH_BOX(&yoco::retention_output_backward));
  m.impl("differential_combine", TORCH_BOX(&yoco::differential_combine));
  m.impl("differential_combine_backward", TORCH_BOX(&yoco::differential_combine_backward));
  m.impl("gated_memory", TORCH_BOX(&yoco::gated_memory));
  m.impl("gated_memory_backward", TORCH_BOX(&yoco::gated_memory_backward));
}

}  // namespace

// One implementation for both: it asks the tensor's device for the kernels.
STABLE_TORCH_LIBRARY_IMPL(yoco_ext, CPU, m) { register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(yoco_ext, CUDA, m) { register_ops(m); }
