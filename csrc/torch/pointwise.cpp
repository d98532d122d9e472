// Row-wise and elementwise ops: argument checks, outputs, params.
#include "ops.h"

namespace yoco {
namespace {

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

void check_like(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_device(t, name, like, like_name);
  check_dtype(t, name, like.scalar_type());
  check_shape(t, name, sizes_of(like));
}

int64_t rows_of(const Tensor& x) { return x.size(x.dim() - 1) == 0 ? 0 : x.numel() / x.size(x.dim() - 1); }

DType check_weight(const OptionalTensor& weight, const Tensor& x) {
  if (!weight) return dtype_of(x, "x");
  check(weight->scalar_type() == x.scalar_type() || weight->scalar_type() == ScalarType::Float, "weight has dtype ",
        name_of(weight->scalar_type()), "; expected x's dtype or float32");
  check_side_input(weight, "weight", {x.size(x.dim() - 1)}, weight->scalar_type(), x);
  return dtype_of(*weight, "weight");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x_given, const OptionalTensor& weight,
                                            const OptionalTensor& residual, double eps) {
  check(x_given.dim() >= 1, "x has no dimensions");
  const Tensor x = torch::stable::contiguous(x_given);
  RmsNormParams p{};
  p.dtype = dtype_of(x, "x");
  p.weight_dtype = check_weight(weight, x);
  OptionalTensor other;
  if (residual) {
    check_like(*residual, "residual", x, "x");
    other = torch::stable::contiguous(*residual);
  }
  p.rows = rows_of(x), p.dim = x.size(x.dim() - 1), p.eps = eps;
  Tensor y = empty(x, sizes_of(x), x.scalar_type());
  Tensor residual_out = residual ? empty(x, sizes_of(x), x.scalar_type()) : nothing(x);
  auto rstd_sizes = sizes_of(x);
  rstd_sizes.pop_back();
  Tensor rstd = empty(x, rstd_sizes, accumulator_type(x));
  p.x = x.data_ptr(), p.residual = data_or_null<void>(other), p.weight = data_or_null<void>(weight);
  p.y = y.data_ptr(), p.residual_out = residual ? residual_out.data_ptr() : nullptr, p.rstd = rstd.data_ptr();
  const Backend backend = backend_for(x);
  run(backend, "rms_norm", backend.table->rms_norm, p);
  return {y, residual_out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_given, const OptionalTensor& d_residual_out,
                                             const Tensor& x_given, const OptionalTensor& weight, const Tensor& rstd) {
  const Tensor x = torch::stable::contiguous(x_given), dy = torch::stable::contiguous(dy_given);
  check_like(dy, "dy", x, "x");
  OptionalTensor d_residual;
  if (d_residual_out) {
    check_like(*d_residual_out, "d_residual_out", x, "x");
    d_residual = torch::stable::contiguous(*d_residual_out);
  }
  RmsNormBackwardParams p{};
  p.dtype = dtype_of(x, "x");
  p.weight_dtype = check_weight(weight, x);
  p.rows = rows_of(x), p.dim = x.size(x.dim() - 1);
  auto rstd_sizes = sizes_of(x);
  rstd_sizes.pop_back();
  check_side_input(rstd, "rstd", rstd_sizes, accumulator_type(x), x);
  Tensor dx = empty(x, sizes_of(x), x.scalar_type());
  Tensor d_weight = weight ? empty(x, {p.dim}, accumulator_type(x)) : nothing(x);
  p.dy = dy.data_ptr(), p.d_residual_out = data_or_null<void>(d_residual), p.x = x.data_ptr();
  p.weight = data_or_null<void>(weight), p.rstd = rstd.data_ptr();
  p.dx = dx.data_ptr(), p.d_weight = weight ? d_weight.data_ptr() : nullptr;
  const Backend backend = backend_for(x);
  const Tensor workspace = allocate_workspace(backend, backend.table->rms_norm_backward_workspace, p, x);
  run(backend, "rms_norm_backward", backend.table->rms_norm_backward, p);
  return {dx, d_weight};
}

Tensor rotary(const Tensor& x_given, const OptionalTensor& inv_freq, const OptionalTensor& cos,
              const OptionalTensor& sin, const OptionalTensor& offsets, const OptionalTensor& cu_seqlens,
              bool interleaved, bool inverse) {
  const Tensor x = with_contiguous_last(x_given);
  check(x.dim() == 4, "x has shape ", shape_of(x), "; expected [batch, time, heads, dim]");
  RotaryParams p{};
  p.dtype = dtype_of(x, "x");
  p.batch = x.size(0), p.time = x.size(1), p.heads = x.size(2), p.dim = x.size(3);
  check(inv_freq.has_value() != (cos.has_value() || sin.has_value()) && cos.has_value() == sin.has_value(),
        "rotary takes either inv_freq or both cos and sin");
  p.num_sequences = p.batch;
  if (cu_seqlens) {
    check(p.batch == 1, "x has batch ", p.batch, "; packed sequences (cu_seqlens) need batch 1");
    check_cu_seqlens(cu_seqlens, "cu_seqlens", p.time, x);
    p.num_sequences = cu_seqlens->size(0) - 1;
  }
  check_side_input(offsets, "offsets", {p.num_sequences}, ScalarType::Int, x);
  check_index_range(offsets, "offsets", 0, INT32_MAX, x);
  p.cu_seqlens = data_or_null<int32_t>(cu_seqlens), p.offsets = data_or_null<int32_t>(offsets);
  if (inv_freq) {
    check(inv_freq->dim() == 1, "inv_freq has shape ", shape_of(*inv_freq), "; expected [rotary_dim / 2]");
    p.rotary_dim = 2 * inv_freq->size(0);
    check_side_input(inv_freq, "inv_freq", {p.rotary_dim / 2}, ScalarType::Float, x);
    p.inv_freq = data_or_null<float>(inv_freq);
    p.table_dtype = DType::kFloat32;
  } else {
    check(cos->dim() == 2, "cos has shape ", shape_of(*cos), "; expected [positions, rotary_dim / 2]");
    p.rotary_dim = 2 * cos->size(1), p.table_length = cos->size(0);
    check(cos->scalar_type() == x.scalar_type() || cos->scalar_type() == ScalarType::Float, "cos has dtype ",
          name_of(cos->scalar_type()), "; expected x's dtype or float32");
    check_side_input(cos, "cos", {p.table_length, p.rotary_dim / 2}, cos->scalar_type(), x);
    check_side_input(sin, "sin", {p.table_length, p.rotary_dim / 2}, cos->scalar_type(), x);
    p.cos = cos->data_ptr(), p.sin = sin->data_ptr();
    p.table_dtype = dtype_of(*cos, "cos");
    if (x.is_cpu()) {
      for (int64_t n = 0; n < p.num_sequences; ++n) {
        const int64_t length = p.cu_seqlens ? p.cu_seqlens[n + 1] - p.cu_seqlens[n] : p.time;
        const int64_t end = (p.offsets ? p.offsets[n] : 0) + length;
        check(end <= p.table_length, "cos and sin have ", p.table_length, " positions; sequence ", n, " reaches ", end);
      }
    }
  }
  check(p.rotary_dim <= p.dim, "the rotated dimension is ", p.rotary_dim, "; x has only ", p.dim);
  p.interleaved = interleaved, p.inverse = inverse;
  Tensor y = empty(x, sizes_of(x), x.scalar_type());
  p.x = view_of(x), p.y = view_of(y);
  const Backend backend = backend_for(x);
  run(backend, "rotary", backend.table->rotary, p);
  return y;
}

Tensor swiglu(const Tensor& gate_given, const Tensor& up_given) {
  check_like(up_given, "up", gate_given, "gate");
  const Tensor gate = torch::stable::contiguous(gate_given), up = torch::stable::contiguous(up_given);
  Tensor y = empty(gate, sizes_of(gate), gate.scalar_type());
  const SwigluParams p{dtype_of(gate, "gate"), gate.numel(), gate.data_ptr(), up.data_ptr(), y.data_ptr()};
  const Backend backend = backend_for(gate);
  run(backend, "swiglu", backend.table->swiglu, p);
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_given, const Tensor& gate_given, const Tensor& up_given) {
  check_like(up_given, "up", gate_given, "gate");
  check_like(dy_given, "dy", gate_given, "gate");
  const Tensor gate = torch::stable::contiguous(gate_given), up = torch::stable::contiguous(up_given);
  const Tensor dy = torch::stable::contiguous(dy_given);
  Tensor d_gate = empty(gate, sizes_of(gate), gate.scalar_type());
  Tensor d_up = empty(gate, sizes_of(gate), gate.scalar_type());
  const SwigluBackwardParams p{dtype_of(gate, "gate"), gate.numel(),      gate.data_ptr(), up.data_ptr(),
                               dy.data_ptr(),          d_gate.data_ptr(), d_up.data_ptr()};
  const Backend backend = backend_for(gate);
  run(backend, "swiglu_backward", backend.table->swiglu_backward, p);
  return {d_gate, d_up};
}

Tensor retention_output(const Tensor& o, const Tensor& gate, double eps) {
  check(o.dim() == 4, "o has shape ", shape_of(o), "; expected [batch, time, heads, dim]");
  check_last_contiguous(o, "o");
  check_bthd(gate, "gate", sizes_of(o), o.scalar_type(), o, "o");
  Tensor y = empty(o, sizes_of(o), o.scalar_type());
  const RetentionOutputParams p{dtype_of(o, "o"), o.size(0),     o.size(1), o.size(2), o.size(3), eps,
                                view_of(o),       view_of(gate), view_of(y)};
  const Backend backend = backend_for(o);
  run(backend, "retention_output", backend.table->retention_output, p);
  return y;
}

std::tuple<Tensor, Tensor> retention_output_backward(const Tensor& dy_given, const Tensor& o, const Tensor& gate,
                                                     double eps) {
  const Tensor dy = with_contiguous_last(dy_given);
  check(o.dim() == 4, "o has shape ", shape_of(o), "; expected [batch, time, heads, dim]");
  check_last_contiguous(o, "o");
  check_bthd(gate, "gate", sizes_of(o), o.scalar_type(), o, "o");
  check_bthd(dy, "dy", sizes_of(o), o.scalar_type(), o, "o");
  Tensor d_o = empty(o, sizes_of(o), o.scalar_type());
  Tensor d_gate = empty(o, sizes_of(o), o.scalar_type());
  const RetentionOutputBackwardParams p{dtype_of(o, "o"), o.size(0),     o.size(1),   o.size(2),    o.size(3),      eps,
                                        view_of(o),       view_of(gate), view_of(dy), view_of(d_o), view_of(d_gate)};
  const Backend backend = backend_for(o);
  run(backend, "retention_output_backward", backend.table->retention_output_backward, p);
  return {d_o, d_gate};
}

namespace {

// Head 2h + offset of a tensor whose heads come in pairs.
View pair_view(const Tensor& t, int64_t offset) {
  View v = view_of(t);
  v.data = static_cast<char*>(v.data) + offset * v.head_stride * static_cast<int64_t>(t.element_size());
  v.head_stride *= 2;
  return v;
}

PairNormParams differential_params(const Tensor& a, const Tensor& lam, const OptionalTensor& weight, bool normalize,
                                   bool sigmoid, double eps, double scale) {
  check(a.dim() == 4 && a.size(2) % 2 == 0, "a has shape ", shape_of(a),
        "; expected [batch, time, 2 * heads, dim], the heads of a pair side by side");
  check_last_contiguous(a, "a");
  PairNormParams p{};
  p.kind = PairKind::kDifference;
  p.dtype = dtype_of(a, "a");
  p.batch = a.size(0), p.time = a.size(1), p.heads = a.size(2) / 2, p.dim = a.size(3);
  check_device(lam, "lam", a, "a");
  check_dtype(lam, "lam", accumulator_type(a));
  check_shape(lam, "lam", {p.batch, p.time, p.heads});
  p.weight_dtype = check_weight(weight, a);
  p.normalize = normalize, p.eps = eps, p.scale = scale;
  p.first = pair_view(a, 0), p.second = pair_view(a, 1);
  p.weight = data_or_null<void>(weight);
  p.lambda = View{lam.data_ptr(), lam.stride(0), lam.stride(1), lam.stride(2)};
  p.lambda_is_logit = sigmoid;
  return p;
}

// [..., groups * dim] as [1, rows, groups, dim], contiguous.
View grouped_view(const Tensor& t, int64_t groups) {
  const int64_t width = t.size(t.dim() - 1);
  return View{t.data_ptr(), 0, width, width / groups};
}

PairNormParams gated_memory_params(const Tensor& gate, const Tensor& memory, const OptionalTensor& weight,
                                   int64_t groups, double eps) {
  check(memory.dim() >= 1, "memory has no dimensions");
  check_like(gate, "gate", memory, "memory");
  const int64_t width = memory.size(memory.dim() - 1);
  check(groups >= 1 && width % groups == 0 && width > 0, "groups is ", groups, "; memory has ", width,
        " components, which it must divide");
  PairNormParams p{};
  p.kind = PairKind::kGate;
  p.dtype = dtype_of(memory, "memory");
  p.weight_dtype = check_weight(weight, memory);
  p.batch = 1, p.time = rows_of(memory), p.heads = groups, p.dim = width / groups;
  p.normalize = true, p.eps = eps, p.scale = 1;
  p.first = grouped_view(memory, groups), p.second = grouped_view(gate, groups);
  p.weight = data_or_null<void>(weight), p.weight_per_head = true;
  return p;
}

}  // namespace

Tensor differential_combine(const Tensor& a, const Tensor& lam, const OptionalTensor& weight, bool normalize,
                            bool sigmoid, double eps, double scale) {
  PairNormParams p = differential_params(a, lam, weight, normalize, sigmoid, eps, scale);
  Tensor y = empty(a, {p.batch, p.time, p.heads, p.dim}, a.scalar_type());
  p.y = view_of(y);
  const Backend backend = backend_for(a);
  run(backend, "differential_combine", backend.table->pair_norm, p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> differential_combine_backward(const Tensor& dy_given, const Tensor& a,
                                                                 const Tensor& lam, const OptionalTensor& weight,
                                                                 bool normalize, bool sigmoid, double eps, double scale,
                                                                 int64_t grads) {
  PairNormBackwardParams p{};
  static_cast<PairNormParams&>(p) = differential_params(a, lam, weight, normalize, sigmoid, eps, scale);
  const Tensor dy = with_contiguous_last(dy_given);
  check_bthd(dy, "dy", {p.batch, p.time, p.heads, p.dim}, a.scalar_type(), a, "a");
  Tensor d_a = empty(a, sizes_of(a), a.scalar_type());
  const bool want_weight = (grads & 2) != 0 && weight;
  Tensor d_lam = (grads & 1) ? empty(a, {p.batch, p.time, p.heads}, accumulator_type(a)) : nothing(lam);
  Tensor d_weight = want_weight ? empty(a, {p.dim}, accumulator_type(a)) : nothing(lam);
  p.dy = view_of(dy), p.d_first = pair_view(d_a, 0), p.d_second = pair_view(d_a, 1);
  p.d_lambda = (grads & 1) ? d_lam.data_ptr() : nullptr;
  p.d_weight = want_weight ? d_weight.data_ptr() : nullptr;
  const Backend backend = backend_for(a);
  const Tensor workspace = allocate_workspace(backend, backend.table->pair_norm_backward_workspace, p, a);
  run(backend, "differential_combine_backward", backend.table->pair_norm_backward, p);
  return {d_a, d_lam, d_weight};
}

Tensor gated_memory(const Tensor& gate_given, const Tensor& memory_given, const OptionalTensor& weight, int64_t groups,
                    double eps) {
  const Tensor gate = torch::stable::contiguous(gate_given), memory = torch::stable::contiguous(memory_given);
  PairNormParams p = gated_memory_params(gate, memory, weight, groups, eps);
  Tensor y = empty(memory, sizes_of(memory), memory.scalar_type());
  p.y = grouped_view(y, groups);
  const Backend backend = backend_for(memory);
  run(backend, "gated_memory", backend.table->pair_norm, p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_memory_backward(const Tensor& dy_given, const Tensor& gate_given,
                                                         const Tensor& memory_given, const OptionalTensor& weight,
                                                         int64_t groups, double eps) {
  const Tensor gate = torch::stable::contiguous(gate_given), memory = torch::stable::contiguous(memory_given);
  const Tensor dy = torch::stable::contiguous(dy_given);
  PairNormBackwardParams p{};
  static_cast<PairNormParams&>(p) = gated_memory_params(gate, memory, weight, groups, eps);
  check_like(dy, "dy", memory, "memory");
  Tensor d_gate = empty(memory, sizes_of(memory), memory.scalar_type());
  Tensor d_memory = empty(memory, sizes_of(memory), memory.scalar_type());
  Tensor d_weight = weight ? empty(memory, {p.heads * p.dim}, accumulator_type(memory)) : nothing(memory);
  p.dy = grouped_view(dy, groups);
  p.d_first = grouped_view(d_memory, groups), p.d_second = grouped_view(d_gate, groups);
  p.d_weight = weight ? d_weight.data_ptr() : nullptr;
  const Backend backend = backend_for(memory);
  const Tensor workspace = allocate_workspace(backend, backend.table->pair_norm_backward_workspace, p, memory);
  run(backend, "gated_memory_backward", backend.table->pair_norm_backward, p);
  return {d_gate, d_memory, d_weight};
}

}  // namespace yoco
