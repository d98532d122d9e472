// Every op of the namespace yoco_ext, on one screen. Layout BTHD; semantics in yoco_ext/ops, structs in params.h.
// Optional outputs that were not asked for come back as tensors with no elements.
#pragma once

namespace yoco {

// clang-format off
#define YOCO_RETENTION_INPUTS "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state, Tensor? cu_seqlens, float scale"

#define YOCO_ATTENTION_INPUTS \
  "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, " \
  "Tensor? seqused_k, Tensor? prefix_len, Tensor? latent_k, Tensor? latent_v, Tensor? latent_begin, " \
  "Tensor? latent_end, int max_seqlen_q, int max_seqlen_k, float scale, int window_left, int window_right, " \
  "float softcap"

// q and k rotated on load, see RotaryOnLoad of params.h.
#define YOCO_ROTARY_ON_LOAD "Tensor? inv_freq=None, Tensor? offsets=None, bool interleaved=False"

// With output_gate the result is retention_output(o, output_gate, norm_eps) instead of o.
#define YOCO_OUTPUT_GATE "Tensor? output_gate=None, float norm_eps=0.0"

inline constexpr const char* kSchemas[] = {
  "gated_retention(" YOCO_RETENTION_INPUTS ", bool return_final_state, "
    "float gate_normalizer=0.0, " YOCO_ROTARY_ON_LOAD ", " YOCO_OUTPUT_GATE ", bool keep_o=False)"
    " -> (Tensor out, Tensor final_state, Tensor o)",
  // gate_normalizer > 0: g holds logits, see params.h. With keep_o an output gate leaves o too, for the backward.
  // final_state gradient and initial_state may be absent; d_initial_state is empty unless initial_state was given.
  "gated_retention_backward(Tensor d_o, Tensor? d_final_state, " YOCO_RETENTION_INPUTS ", "
    "float gate_normalizer=0.0, " YOCO_ROTARY_ON_LOAD ")"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor d_initial_state)",
  "gated_retention_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor(a!) state, float scale, "
    "float gate_normalizer=0.0, " YOCO_ROTARY_ON_LOAD ", " YOCO_OUTPUT_GATE ") -> Tensor",

  // window_left, window_right: -1 = unlimited; causal is window_right = 0.
  // deterministic is for the backward, which takes it from here.
  "attention(" YOCO_ATTENTION_INPUTS ", bool deterministic) -> (Tensor out, Tensor lse)",
  // attention over a SharedKV: the tokens carry no data, only the accumulator of dK and dV from layer to layer in the
  // backward (yoco_ext/ops/shared_kv.py). token, next: float32, k's and v's shape, all strides zero.
  "shared_attention(" YOCO_ATTENTION_INPUTS ", bool deterministic, Tensor token_k, Tensor token_v)"
    " -> (Tensor out, Tensor lse, Tensor next_k, Tensor next_v)",
  // grads: bit 0 dq, 1 dk and dv, 2 d_latent_k and d_latent_v, 3 d_sinks.
  "attention_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, " YOCO_ATTENTION_INPUTS ", int grads, "
    "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_latent_k, Tensor d_latent_v, Tensor d_sinks)",
  // dk, dv of this call are added into float32 accumulators of k's and v's shape (SharedKV).
  "attention_backward_accumulate(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, " YOCO_ATTENTION_INPUTS ", "
    "int grads, bool deterministic, Tensor(a!) dk_accumulator, Tensor(b!) dv_accumulator)"
    " -> (Tensor dq, Tensor d_latent_k, Tensor d_latent_v, Tensor d_sinks)",

  "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqused_k, Tensor? block_table, Tensor? sinks, "
    "Tensor? alibi_slopes, Tensor? k_scale, Tensor? v_scale, Tensor? latent_k, Tensor? latent_v, Tensor? latent_len, "
    "float scale, int window_left, int window_right, float softcap, bool ring, int num_splits)"
    " -> (Tensor out, Tensor lse)",
  "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor seqused_k, Tensor? block_table, "
    "Tensor? cu_seqlens, Tensor? k_scale, Tensor? v_scale, Tensor? inv_freq, bool interleaved, bool ring) -> ()",

  "rms_norm(Tensor x, Tensor? weight, Tensor? residual, float eps) -> (Tensor y, Tensor residual_out, Tensor rstd)",
  "rms_norm_backward(Tensor dy, Tensor? d_residual_out, Tensor x, Tensor? weight, Tensor rstd)"
    " -> (Tensor dx, Tensor d_weight)",
  // either inv_freq, or both tables
  "rotary(Tensor x, Tensor? inv_freq, Tensor? cos, Tensor? sin, Tensor? offsets, Tensor? cu_seqlens, bool interleaved, "
    "bool inverse) -> Tensor",
  "swiglu(Tensor gate, Tensor up) -> Tensor",
  "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor d_gate, Tensor d_up)",
  "retention_output(Tensor o, Tensor gate, float eps) -> Tensor",
  "retention_output_backward(Tensor dy, Tensor o, Tensor gate, float eps) -> (Tensor d_o, Tensor d_gate)",

  // heads 2h and 2h + 1 of a [B, T, 2 H, D] belong together; lambda [B, T, H]. grads: bit 0 d_lambda, 1 d_weight.
  "differential_combine(Tensor a, Tensor lam, Tensor? weight, bool normalize, bool sigmoid, float eps, float scale)"
    " -> Tensor",
  "differential_combine_backward(Tensor dy, Tensor a, Tensor lam, Tensor? weight, bool normalize, bool sigmoid, "
    "float eps, float scale, int grads) -> (Tensor d_a, Tensor d_lam, Tensor d_weight)",
  "gated_memory(Tensor gate, Tensor memory, Tensor? weight, int groups, float eps) -> Tensor",
  "gated_memory_backward(Tensor dy, Tensor gate, Tensor memory, Tensor? weight, int groups, float eps)"
    " -> (Tensor d_gate, Tensor d_memory, Tensor d_weight)",
};
// clang-format on

}  // namespace yoco
