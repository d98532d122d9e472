// Gated retention: argument checks, outputs, params.
#include <cmath>

#include "ops.h"

namespace yoco {
namespace {

struct Inputs {
  const Tensor &q, &k, &v, &g;
  const OptionalTensor &initial_state, &cu_seqlens;
  double scale, gate_normalizer;
  const OptionalTensor &inv_freq, &offsets;
  bool interleaved;
};

RotaryOnLoad rotary_on_load(const Inputs& in, const RetentionParams& p) {
  if (!in.inv_freq) {
    check(!in.offsets, "offsets are given without inv_freq; they are the positions that q and k are rotated by");
    return {};
  }
  check(in.inv_freq->dim() == 1, "inv_freq has shape ", shape_of(*in.inv_freq), "; expected [rotary_dim / 2]");
  const int64_t dim = 2 * in.inv_freq->size(0);
  check(dim <= p.dim_k, "inv_freq has ", dim / 2, " entries; at most ", p.dim_k / 2,
        " (half the dim of k) are allowed");
  check_side_input(in.inv_freq, "inv_freq", {dim / 2}, ScalarType::Float, in.q);
  check_side_input(in.offsets, "offsets", {p.num_sequences}, ScalarType::Int, in.q);
  check_index_range(in.offsets, "offsets", 0, INT32_MAX, in.q);
  if (dim == 0) return {};
  return {data_or_null<float>(in.inv_freq), data_or_null<int32_t>(in.offsets), dim, in.interleaved};
}

// Shape of states, and everything of RetentionParams that forward and backward share.
std::vector<int64_t> fill(const Inputs& in, RetentionParams& p) {
  const Tensor& q = in.q;
  check(q.dim() == 4, "q has shape ", shape_of(q), "; expected [batch, time, heads, dim_k]");
  check(in.v.dim() == 4, "v has shape ", shape_of(in.v), "; expected [batch, time, heads, dim_v]");
  p.dtype = dtype_of(q, "q");
  p.batch = q.size(0), p.time = q.size(1), p.heads = q.size(2), p.dim_k = q.size(3), p.dim_v = in.v.size(3);
  check_last_contiguous(q, "q");
  check_bthd(in.k, "k", {p.batch, p.time, p.heads, p.dim_k}, q.scalar_type(), q, "q");
  check_bthd(in.v, "v", {p.batch, p.time, p.heads, p.dim_v}, q.scalar_type(), q, "q");
  for (const auto& [dim, name] :
       {std::pair{p.dim_k, "dim_k (last of q, k)"}, std::pair{p.dim_v, "dim_v (last of v)"}}) {
    check(dim >= 8 && dim <= 256 && dim % 8 == 0, name, " is ", dim, "; allowed: multiples of 8 up to 256");
  }
  check_device(in.g, "g", q, "q");
  check_shape(in.g, "g", {p.batch, p.time, p.heads});
  check(in.g.scalar_type() == q.scalar_type() || in.g.scalar_type() == ScalarType::Float, "g has dtype ",
        name_of(in.g.scalar_type()), "; expected q's dtype or float32");
  p.gate_dtype = dtype_of(in.g, "g");
  p.num_sequences = p.batch;
  if (in.cu_seqlens) {
    check(p.batch == 1, "q has batch ", p.batch, "; packed sequences (cu_seqlens) need batch 1");
    check_cu_seqlens(in.cu_seqlens, "cu_seqlens", p.time, q);
    p.num_sequences = in.cu_seqlens->size(0) - 1;
  }
  std::vector<int64_t> state_shape{p.num_sequences, p.heads, p.dim_k, p.dim_v};
  check_side_input(in.initial_state, "initial_state", state_shape, accumulator_type(q), q);
  p.cu_seqlens = data_or_null<int32_t>(in.cu_seqlens);
  p.scale = in.scale;
  check(in.gate_normalizer >= 0, "gate_normalizer is ", in.gate_normalizer, "; it must be positive, or 0 (log decays)");
  p.gate_normalizer = in.gate_normalizer;
  p.q = view_of(q), p.k = view_of(in.k), p.v = view_of(in.v), p.g = view_of(in.g);
  p.initial_state = data_or_null<void>(in.initial_state);
  p.final_state = nullptr;
  p.rotary = rotary_on_load(in, p);
  p.workspace = nullptr;
  return state_shape;
}

// The norm and the gate behind the retention, if there is a gate.
void fill_output_gate(const OptionalTensor& gate, double eps, const Tensor& q, RetentionParams& p) {
  if (!gate) return;
  check_bthd(*gate, "output_gate", {p.batch, p.time, p.heads, p.dim_v}, q.scalar_type(), q, "q");
  check(eps >= 0 && std::isfinite(eps), "norm_eps is ", eps, "; it must be a number >= 0");
  p.output_gate = view_of(*gate);
  p.norm_eps = eps;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gated_retention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                                   const OptionalTensor& initial_state,
                                                   const OptionalTensor& cu_seqlens, double scale,
                                                   bool return_final_state, double gate_normalizer,
                                                   const OptionalTensor& inv_freq, const OptionalTensor& offsets,
                                                   bool interleaved, const OptionalTensor& output_gate, double norm_eps,
                                                   bool keep_o) {
  RetentionParams p{};
  const auto state_shape =
      fill({q, k, v, g, initial_state, cu_seqlens, scale, gate_normalizer, inv_freq, offsets, interleaved}, p);
  fill_output_gate(output_gate, norm_eps, q, p);
  const Backend backend = backend_for(q);
  const std::vector<int64_t> shape{p.batch, p.time, p.heads, p.dim_v};
  keep_o = keep_o && output_gate;
  Tensor out = empty(q, shape, q.scalar_type());
  Tensor final_state = return_final_state ? empty(q, state_shape, accumulator_type(q)) : nothing(q);
  Tensor o = keep_o ? empty(q, shape, q.scalar_type()) : nothing(q);
  (output_gate ? p.y : p.o) = view_of(out);
  if (keep_o) p.o = view_of(o);
  if (return_final_state) p.final_state = final_state.data_ptr();
  const Tensor workspace = allocate_workspace(backend, backend.table->retention_forward_workspace, p, q);
  run(backend, "gated_retention", backend.table->retention_forward, p);
  return {out, final_state, o};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_retention_backward(
    const Tensor& d_o_given, const OptionalTensor& d_final_state, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& g, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, double scale,
    double gate_normalizer, const OptionalTensor& inv_freq, const OptionalTensor& offsets, bool interleaved) {
  RetentionBackwardParams p{};
  const auto state_shape =
      fill({q, k, v, g, initial_state, cu_seqlens, scale, gate_normalizer, inv_freq, offsets, interleaved}, p);
  const Tensor d_o = with_contiguous_last(d_o_given);
  check_bthd(d_o, "d_o", {p.batch, p.time, p.heads, p.dim_v}, q.scalar_type(), q, "q");
  const OptionalTensor d_state =
      d_final_state ? OptionalTensor(torch::stable::contiguous(*d_final_state)) : std::nullopt;
  check_side_input(d_state, "d_final_state", state_shape, accumulator_type(q), q);
  const Backend backend = backend_for(q);
  Tensor dq = empty(q, {p.batch, p.time, p.heads, p.dim_k}, q.scalar_type());
  Tensor dk = empty(q, {p.batch, p.time, p.heads, p.dim_k}, q.scalar_type());
  Tensor dv = empty(q, {p.batch, p.time, p.heads, p.dim_v}, q.scalar_type());
  Tensor dg = empty(q, {p.batch, p.time, p.heads}, g.scalar_type());
  Tensor d_initial_state = initial_state ? empty(q, state_shape, accumulator_type(q)) : nothing(q);
  p.d_o = view_of(d_o);
  p.d_final_state = data_or_null<void>(d_state);
  p.dq = view_of(dq), p.dk = view_of(dk), p.dv = view_of(dv), p.dg = view_of(dg);
  p.d_initial_state = initial_state ? d_initial_state.data_ptr() : nullptr;
  const Tensor workspace = allocate_workspace(backend, backend.table->retention_backward_workspace, p, q);
  run(backend, "gated_retention_backward", backend.table->retention_backward, p);
  return {dq, dk, dv, dg, d_initial_state};
}

Tensor gated_retention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& state,
                            double scale, double gate_normalizer, const OptionalTensor& inv_freq,
                            const OptionalTensor& offsets, bool interleaved, const OptionalTensor& output_gate,
                            double norm_eps) {
  RetentionParams shared{};
  const auto state_shape =
      fill({q, k, v, g, state, std::nullopt, scale, gate_normalizer, inv_freq, offsets, interleaved}, shared);
  check(shared.time >= 1 && shared.time <= 16, "q has time ", shared.time,
        "; gated_retention_step takes 1 to 16 tokens, gated_retention any number");
  fill_output_gate(output_gate, norm_eps, q, shared);
  RetentionStepParams p{};
  p.dtype = shared.dtype, p.gate_dtype = shared.gate_dtype;
  p.batch = shared.batch, p.time = shared.time, p.heads = shared.heads;
  p.dim_k = shared.dim_k, p.dim_v = shared.dim_v, p.scale = scale, p.gate_normalizer = gate_normalizer;
  p.q = shared.q, p.k = shared.k, p.v = shared.v, p.g = shared.g;
  const Backend backend = backend_for(q);
  Tensor o = empty(q, {p.batch, p.time, p.heads, p.dim_v}, q.scalar_type());
  p.o = view_of(o);
  p.state = state.data_ptr();
  p.rotary = shared.rotary;
  p.output_gate = shared.output_gate, p.norm_eps = shared.norm_eps;
  run(backend, "gated_retention_step", backend.table->retention_step, p);
  return o;
}

}  // namespace yoco
