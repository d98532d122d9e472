// The kernel table of one instruction set; compiled once for each.
#include "kernels.h"

#define YOCO_STRING_(x) #x
#define YOCO_STRING(x) YOCO_STRING_(x)

namespace yoco::cpu::YOCO_ISA {
namespace {
const char* variant() { return YOCO_STRING(YOCO_ISA); }
}  // namespace

const KernelTable* table() {
  static const KernelTable t = [] {
    KernelTable t{};
    t.abi_version = kKernelTableVersion;
    t.name = "cpu";
    t.variant = variant;
    t.retention_forward = retention_forward;
    t.retention_backward = retention_backward;
    t.retention_step = retention_step;
    t.attention_forward = attention_forward;
    t.attention_backward = attention_backward;
    t.decode = decode;
    t.append_kv = append_kv;
    t.rms_norm = rms_norm;
    t.rms_norm_backward = rms_norm_backward;
    t.rotary = rotary;
    t.swiglu = swiglu;
    t.swiglu_backward = swiglu_backward;
    t.retention_output = retention_output;
    t.retention_output_backward = retention_output_backward;
    t.pair_norm = pair_norm;
    t.pair_norm_backward = pair_norm_backward;
    return t;
  }();
  return &t;
}

}  // namespace yoco::cpu::YOCO_ISA
