// What libyoco_ext_cuda.so (and libyoco_ext_emulated.so) exports: one table, one op per line.
#include "cuda/core/launch.h"
#include "cuda/kernels.h"

namespace yoco::cuda {
namespace {

// The code that runs on the current device: "sm_90a" has its own kernels, everything else takes the sm_80 family.
const char* variant() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return "no device";
  return compute_capability(device) == 90 ? "sm_90a" : "sm_80";
}

constexpr KernelTable make_table() {
  KernelTable t{};
  t.abi_version = kKernelTableVersion;
  t.name = "cuda";
  t.variant = variant;
  t.retention_forward = retention_forward;
  t.retention_forward_workspace = retention_forward_workspace;
  t.retention_backward = retention_backward;
  t.retention_backward_workspace = retention_backward_workspace;
  t.retention_step = retention_step;
  t.attention_forward = attention_forward;
  t.attention_forward_workspace = attention_forward_workspace;
  t.attention_backward = attention_backward;
  t.attention_backward_workspace = attention_backward_workspace;
  t.decode = decode;
  t.decode_workspace = decode_workspace;
  t.append_kv = append_kv;
  t.rms_norm = rms_norm;
  t.rms_norm_backward = rms_norm_backward;
  t.rms_norm_backward_workspace = rms_norm_backward_workspace;
  t.rotary = rotary;
  t.swiglu = swiglu;
  t.swiglu_backward = swiglu_backward;
  t.retention_output = retention_output;
  t.retention_output_backward = retention_output_backward;
  t.pair_norm = pair_norm;
  t.pair_norm_backward = pair_norm_backward;
  t.pair_norm_backward_workspace = pair_norm_backward_workspace;
  return t;
}

}  // namespace
}  // namespace yoco::cuda

extern "C" __attribute__((visibility("default"))) const yoco::KernelTable* yoco_kernels() {
  static constexpr yoco::KernelTable table = yoco::cuda::make_table();
  return &table;
}
