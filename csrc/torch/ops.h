// The op implementations that register.cpp binds; signatures follow schemas.h.
#pragma once

#include "backend.h"
#include "tensor.h"

namespace yoco {

std::tuple<Tensor, Tensor, Tensor> gated_retention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                                   const OptionalTensor& initial_state,
                                                   const OptionalTensor& cu_seqlens, double scale,
                                                   bool return_final_state, double gate_normalizer,
                                                   const OptionalTensor& inv_freq, const OptionalTensor& offsets,
                                                   bool interleaved, const OptionalTensor& output_gate, double norm_eps,
                                                   bool keep_o);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_retention_backward(
    const Tensor& d_o, const OptionalTensor& d_final_state, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& g, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, double scale,
    double gate_normalizer, const OptionalTensor& inv_freq, const OptionalTensor& offsets, bool interleaved);
Tensor gated_retention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& state,
                            double scale, double gate_normalizer, const OptionalTensor& inv_freq,
                            const OptionalTensor& offsets, bool interleaved, const OptionalTensor& output_gate,
                            double norm_eps);

// YOCO_ATTENTION_INPUTS of schemas.h, in that order.
#define YOCO_ATTENTION_ARGS                                                                                           \
  const Tensor &q, const Tensor &k, const Tensor &v, const OptionalTensor &sinks, const OptionalTensor &alibi_slopes, \
      const OptionalTensor &cu_seqlens_q, const OptionalTensor &cu_seqlens_k, const OptionalTensor &seqused_k,        \
      const OptionalTensor &prefix_len, const OptionalTensor &latent_k, const OptionalTensor &latent_v,               \
      const OptionalTensor &latent_begin, const OptionalTensor &latent_end, int64_t max_seqlen_q,                     \
      int64_t max_seqlen_k, double scale, int64_t window_left, int64_t window_right, double softcap

std::tuple<Tensor, Tensor> attention(YOCO_ATTENTION_ARGS, bool deterministic);
std::tuple<Tensor, Tensor, Tensor, Tensor> shared_attention(YOCO_ATTENTION_ARGS, bool deterministic,
                                                            const Tensor& token_k, const Tensor& token_v);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& d_out,
                                                                              const OptionalTensor& d_lse,
                                                                              const Tensor& out, const Tensor& lse,
                                                                              YOCO_ATTENTION_ARGS, int64_t grads,
                                                                              bool deterministic);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_accumulate(
    const Tensor& d_out, const OptionalTensor& d_lse, const Tensor& out, const Tensor& lse, YOCO_ATTENTION_ARGS,
    int64_t grads, bool deterministic, const Tensor& dk_accumulator, const Tensor& dv_accumulator);

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                            const Tensor& seqused_k, const OptionalTensor& block_table,
                                            const OptionalTensor& sinks, const OptionalTensor& alibi_slopes,
                                            const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                            const OptionalTensor& latent_k, const OptionalTensor& latent_v,
                                            const OptionalTensor& latent_len, double scale, int64_t window_left,
                                            int64_t window_right, double softcap, bool ring, int64_t num_splits);
void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seqused_k,
               const OptionalTensor& block_table, const OptionalTensor& cu_seqlens, const OptionalTensor& k_scale,
               const OptionalTensor& v_scale, const OptionalTensor& inv_freq, bool interleaved, bool ring);

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const OptionalTensor& weight,
                                            const OptionalTensor& residual, double eps);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const OptionalTensor& d_residual_out, const Tensor& x,
                                             const OptionalTensor& weight, const Tensor& rstd);
Tensor rotary(const Tensor& x, const OptionalTensor& inv_freq, const OptionalTensor& cos, const OptionalTensor& sin,
              const OptionalTensor& offsets, const OptionalTensor& cu_seqlens, bool interleaved, bool inverse);
Tensor swiglu(const Tensor& gate, const Tensor& up);
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up);
Tensor retention_output(const Tensor& o, const Tensor& gate, double eps);
std::tuple<Tensor, Tensor> retention_output_backward(const Tensor& dy, const Tensor& o, const Tensor& gate, double eps);

Tensor differential_combine(const Tensor& a, const Tensor& lam, const OptionalTensor& weight, bool normalize,
                            bool sigmoid, double eps, double scale);
std::tuple<Tensor, Tensor, Tensor> differential_combine_backward(const Tensor& dy, const Tensor& a, const Tensor& lam,
                                                                 const OptionalTensor& weight, bool normalize,
                                                                 bool sigmoid, double eps, double scale, int64_t grads);
Tensor gated_memory(const Tensor& gate, const Tensor& memory, const OptionalTensor& weight, int64_t groups, double eps);
std::tuple<Tensor, Tensor, Tensor> gated_memory_backward(const Tensor& dy, const Tensor& gate, const Tensor& memory,
                                                         const OptionalTensor& weight, int64_t groups, double eps);

}  // namespace yoco
