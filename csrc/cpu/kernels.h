// Entry points of the CPU kernels; compiled once per instruction set, each time in its own namespace YOCO_ISA.
#pragma once

#include "../params.h"

#ifndef YOCO_ISA
#error "YOCO_ISA names the instruction set (portable, avx2, avx512, avx512_bf16, amx)"
#endif

#define YOCO_WEAK __attribute__((weak))

namespace yoco::cpu::YOCO_ISA {

YOCO_WEAK const char* retention_forward(const RetentionParams&, const Launch&);
YOCO_WEAK const char* retention_backward(const RetentionBackwardParams&, const Launch&);
YOCO_WEAK const char* retention_step(const RetentionStepParams&, const Launch&);
YOCO_WEAK const char* attention_forward(const AttentionParams&, const Launch&);
YOCO_WEAK const char* attention_backward(const AttentionBackwardParams&, const Launch&);
YOCO_WEAK const char* decode(const DecodeParams&, const Launch&);
YOCO_WEAK const char* append_kv(const AppendParams&, const Launch&);
YOCO_WEAK const char* rms_norm(const RmsNormParams&, const Launch&);
YOCO_WEAK const char* rms_norm_backward(const RmsNormBackwardParams&, const Launch&);
YOCO_WEAK const char* rotary(const RotaryParams&, const Launch&);
YOCO_WEAK const char* swiglu(const SwigluParams&, const Launch&);
YOCO_WEAK const char* swiglu_backward(const SwigluBackwardParams&, const Launch&);
YOCO_WEAK const char* retention_output(const RetentionOutputParams&, const Launch&);
YOCO_WEAK const char* retention_output_backward(const RetentionOutputBackwardParams&, const Launch&);

}  // namespace yoco::cpu::YOCO_ISA
