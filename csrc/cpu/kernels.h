// Entry points of the CPU kernels; compiled once per instruction set, each time in its own namespace YOCO_ISA.
#pragma once

#include "../params.h"

#ifndef YOCO_ISA
#error "YOCO_ISA names the instruction set (portable, avx2, avx512, avx512_bf16, amx)"
#endif

namespace yoco::cpu::YOCO_ISA {

const char* retention_forward(const RetentionParams&, const Launch&);
const char* retention_backward(const RetentionBackwardParams&, const Launch&);
const char* retention_step(const RetentionStepParams&, const Launch&);
const char* attention_forward(const AttentionParams&, const Launch&);
const char* attention_backward(const AttentionBackwardParams&, const Launch&);
const char* decode(const DecodeParams&, const Launch&);
const char* append_kv(const AppendParams&, const Launch&);
const char* rms_norm(const RmsNormParams&, const Launch&);
const char* rms_norm_backward(const RmsNormBackwardParams&, const Launch&);
const char* rotary(const RotaryParams&, const Launch&);
const char* swiglu(const SwigluParams&, const Launch&);
const char* swiglu_backward(const SwigluBackwardParams&, const Launch&);
const char* retention_output(const RetentionOutputParams&, const Launch&);
const char* retention_output_backward(const RetentionOutputBackwardParams&, const Launch&);
const char* pair_norm(const PairNormParams&, const Launch&);
const char* pair_norm_backward(const PairNormBackwardParams&, const Launch&);

}  // namespace yoco::cpu::YOCO_ISA
