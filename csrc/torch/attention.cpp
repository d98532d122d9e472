// Attention: argument checks, outputs, params.
#include "ops.h"

namespace yoco {
namespace {

constexpr int64_t kGradQ = 1, kGradKV = 2, kGradLatents = 4, kGradSinks = 8;

void check_window(int64_t left, int64_t right) {
  check(left >= -1 && right >= -1, "window is (", left, ", ", right, "); allowed: -1 (unlimited) or more on each side");
}

void fill_alibi(const OptionalTensor& slopes, int64_t sequences, int64_t heads_q, const Tensor& q, const float*& data,
                int64_t& batch_stride) {
  if (!slopes) return;
  const bool per_sequence = slopes->dim() == 2;
  check_side_input(slopes, "alibi_slopes",
                   per_sequence ? std::vector<int64_t>{sequences, heads_q} : std::vector<int64_t>{heads_q},
                   ScalarType::Float, q);
  data = data_or_null<float>(slopes);
  batch_stride = per_sequence ? heads_q : 0;
}

// Latents [batch or 1, n, heads_kv, dim] in q's dtype.
void fill_latents(const OptionalTensor& latent_k, const OptionalTensor& latent_v, int64_t batch, int64_t heads_kv,
                  int64_t dim_qk, int64_t dim_v, const Tensor& q, int64_t& n, View& k, View& v, bool& shared) {
  check(latent_k.has_value() == latent_v.has_value(), "latents need both k and v");
  if (!latent_k) return;
  check(latent_k->dim() == 4 && (latent_k->size(0) == batch || latent_k->size(0) == 1), "latents[0] has shape ",
        shape_of(*latent_k), "; expected [", batch, " or 1, n, ", heads_kv, ", ", dim_qk, "]");
  n = latent_k->size(1);
  const int64_t rows = latent_k->size(0);
  check_bthd(*latent_k, "latents[0]", {rows, n, heads_kv, dim_qk}, q.scalar_type(), q, "q");
  check_bthd(*latent_v, "latents[1]", {rows, n, heads_kv, dim_v}, q.scalar_type(), q, "q");
  k = broadcast_view_of(*latent_k);
  v = broadcast_view_of(*latent_v);
  shared = rows == 1 && batch > 1;
}

void fill(AttentionParams& p, YOCO_ATTENTION_ARGS) {
  check(q.dim() == 4, "q has shape ", shape_of(q), "; expected [batch, time_q, heads_q, dim]");
  check(k.dim() == 4, "k has shape ", shape_of(k), "; expected [batch, time_k, heads_kv, dim]");
  check(v.dim() == 4, "v has shape ", shape_of(v), "; expected [batch, time_k, heads_kv, dim_v]");
  p.dtype = dtype_of(q, "q");
  p.batch = q.size(0), p.time_q = q.size(1), p.heads_q = q.size(2), p.dim_qk = q.size(3);
  p.time_k = k.size(1), p.heads_kv = k.size(2), p.dim_v = v.size(3);
  check_last_contiguous(q, "q");
  check_bthd(k, "k", {p.batch, p.time_k, p.heads_kv, p.dim_qk}, q.scalar_type(), q, "q");
  check_bthd(v, "v", {p.batch, p.time_k, p.heads_kv, p.dim_v}, q.scalar_type(), q, "q");
  check(p.heads_kv > 0 && p.heads_q % p.heads_kv == 0, "q has ", p.heads_q, " heads and k has ", p.heads_kv,
        "; the heads of q must be a multiple of those of k");
  for (const auto& [dim, name] : {std::pair{p.dim_qk, "head dim of q and k"}, std::pair{p.dim_v, "head dim of v"}}) {
    check(dim >= 8 && dim <= 256 && dim % 8 == 0, name, " is ", dim, "; allowed: multiples of 8 up to 256");
  }
  check(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k go together");
  p.num_sequences = p.batch;
  p.max_seqlen_q = p.time_q, p.max_seqlen_k = p.time_k;
  if (cu_seqlens_q) {
    check(p.batch == 1, "q has batch ", p.batch, "; packed sequences (cu_seqlens) need batch 1");
    check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", p.time_q, q);
    check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", p.time_k, q);
    p.num_sequences = cu_seqlens_q->size(0) - 1;
    check_shape(*cu_seqlens_k, "cu_seqlens_k", {p.num_sequences + 1});
    if (max_seqlen_q >= 0 && max_seqlen_q < p.max_seqlen_q) p.max_seqlen_q = max_seqlen_q;
    if (max_seqlen_k >= 0 && max_seqlen_k < p.max_seqlen_k) p.max_seqlen_k = max_seqlen_k;
  }
  check_side_input(seqused_k, "seqused_k", {p.num_sequences}, ScalarType::Int, q);
  check_index_range(seqused_k, "seqused_k", 0, p.time_k, q);
  check_side_input(prefix_len, "prefix_len", {p.batch, p.time_q}, ScalarType::Int, q);
  check_index_range(prefix_len, "prefix_len", 0, p.time_k, q);
  check_window(window_left, window_right);
  check(softcap >= 0, "softcap is ", softcap, "; it must not be negative (0 = none)");
  check_side_input(sinks, "sinks", {p.heads_q}, ScalarType::Float, q);
  fill_alibi(alibi_slopes, p.num_sequences, p.heads_q, q, p.alibi_slopes, p.alibi_batch_stride);
  fill_latents(latent_k, latent_v, p.batch, p.heads_kv, p.dim_qk, p.dim_v, q, p.num_latents, p.latent_k, p.latent_v,
               p.latents_shared);
  check(latent_k || (!latent_begin && !latent_end), "latent_begin and latent_end need latents");
  for (const auto& [t, name] : {std::pair{&latent_begin, "latent_begin"}, std::pair{&latent_end, "latent_end"}}) {
    check_side_input(*t, name, {p.batch, p.time_q}, ScalarType::Int, q);
    check_index_range(*t, name, 0, p.num_latents, q);
  }
  p.cu_seqlens_q = data_or_null<int32_t>(cu_seqlens_q);
  p.cu_seqlens_k = data_or_null<int32_t>(cu_seqlens_k);
  p.seqused_k = data_or_null<int32_t>(seqused_k);
  p.scale = scale, p.softcap = softcap;
  p.mask = MaskParams{window_left, window_right, data_or_null<int32_t>(prefix_len)};
  p.sinks = data_or_null<float>(sinks);
  p.latent_begin = data_or_null<int32_t>(latent_begin);
  p.latent_end = data_or_null<int32_t>(latent_end);
  p.q = view_of(q), p.k = view_of(k), p.v = view_of(v);
}

#define YOCO_ATTENTION_PASS                                                                                          \
  q, k, v, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqused_k, prefix_len, latent_k, latent_v, latent_begin, \
      latent_end, max_seqlen_q, max_seqlen_k, scale, window_left, window_right, softcap

struct Gradients {
  Tensor dq, dk, dv, d_latent_k, d_latent_v, d_sinks;
};

// accumulators: null, or dk's and dv's.
Gradients backward(const Tensor& d_out_given, const OptionalTensor& d_lse_given, const Tensor& out, const Tensor& lse,
                   YOCO_ATTENTION_ARGS, int64_t grads, bool deterministic, const Tensor* dk_accumulator,
                   const Tensor* dv_accumulator) {
  AttentionBackwardParams p{};
  fill(p, YOCO_ATTENTION_PASS);
  const Tensor d_out = with_contiguous_last(d_out_given);
  check_bthd(d_out, "d_out", {p.batch, p.time_q, p.heads_q, p.dim_v}, q.scalar_type(), q, "q");
  check_bthd(out, "out", {p.batch, p.time_q, p.heads_q, p.dim_v}, q.scalar_type(), q, "q");
  const std::vector<int64_t> lse_shape{p.batch, p.heads_q, p.time_q};
  check_side_input(lse, "lse", lse_shape, accumulator_type(q), q);
  const OptionalTensor d_lse = d_lse_given ? OptionalTensor(torch::stable::contiguous(*d_lse_given)) : std::nullopt;
  check_side_input(d_lse, "d_lse", lse_shape, accumulator_type(q), q);

  const auto wanted = [&](int64_t bit, std::vector<int64_t> sizes, ScalarType dtype) {
    return grads & bit ? empty(q, sizes, dtype) : nothing(q);
  };
  const bool own_dkv = dk_accumulator == nullptr;
  const auto kv_bit = own_dkv ? kGradKV : 0;
  const auto latent_bit = latent_k ? kGradLatents : 0;
  const auto dims_of = [](const OptionalTensor& t) {
    return t ? std::vector<int64_t>(t->sizes().begin(), t->sizes().end()) : std::vector<int64_t>{0};
  };
  Gradients d{wanted(kGradQ, {p.batch, p.time_q, p.heads_q, p.dim_qk}, q.scalar_type()),
              wanted(kv_bit, {p.batch, p.time_k, p.heads_kv, p.dim_qk}, q.scalar_type()),
              wanted(kv_bit, {p.batch, p.time_k, p.heads_kv, p.dim_v}, q.scalar_type()),
              wanted(latent_bit, dims_of(latent_k), q.scalar_type()),
              wanted(latent_bit, dims_of(latent_v), q.scalar_type()),
              wanted(sinks ? kGradSinks : 0, {p.heads_q}, ScalarType::Float)};
  if (grads & kGradQ) p.dq = view_of(d.dq);
  if (!own_dkv) {
    check_bthd(*dk_accumulator, "dk_accumulator", {p.batch, p.time_k, p.heads_kv, p.dim_qk}, accumulator_type(q), q,
               "q");
    check_bthd(*dv_accumulator, "dv_accumulator", {p.batch, p.time_k, p.heads_kv, p.dim_v}, accumulator_type(q), q,
               "q");
    p.dk = view_of(*dk_accumulator), p.dv = view_of(*dv_accumulator);
    p.accumulate_dkv = true;
  } else if (grads & kGradKV) {
    p.dk = view_of(d.dk), p.dv = view_of(d.dv);
  }
  if (grads & latent_bit) {
    p.d_latent_k = broadcast_view_of(d.d_latent_k), p.d_latent_v = broadcast_view_of(d.d_latent_v);
  }
  if (sinks && (grads & kGradSinks)) p.d_sinks = static_cast<float*>(d.d_sinks.data_ptr());
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  p.d_out = view_of(d_out);
  p.d_lse = data_or_null<void>(d_lse);
  p.deterministic = deterministic;
  const Backend backend = backend_for(q);
  const Tensor workspace = allocate_workspace(backend, backend.table->attention_backward_workspace, p, q);
  run(backend, "attention_backward", backend.table->attention_backward, p);
  return d;
}

// A tensor of t's shape with all strides zero: something for autograd to hang a gradient on, without memory.
Tensor token_like(const Tensor& t) {
  return expand(zeros(t, {1}, accumulator_type(t)), {t.sizes().begin(), t.sizes().end()});
}

}  // namespace

std::tuple<Tensor, Tensor> attention(YOCO_ATTENTION_ARGS, bool /*deterministic*/) {
  AttentionParams p{};
  fill(p, YOCO_ATTENTION_PASS);
  const Backend backend = backend_for(q);
  Tensor out = empty(q, {p.batch, p.time_q, p.heads_q, p.dim_v}, q.scalar_type());
  Tensor lse = empty(q, {p.batch, p.heads_q, p.time_q}, accumulator_type(q));
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  const Tensor workspace = allocate_workspace(backend, backend.table->attention_forward_workspace, p, q);
  run(backend, "attention", backend.table->attention_forward, p);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shared_attention(YOCO_ATTENTION_ARGS, bool deterministic,
                                                            const Tensor& /*token_k*/, const Tensor& /*token_v*/) {
  auto [out, lse] = attention(YOCO_ATTENTION_PASS, deterministic);
  return {out, lse, token_like(k), token_like(v)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& d_out,
                                                                              const OptionalTensor& d_lse,
                                                                              const Tensor& out, const Tensor& lse,
                                                                              YOCO_ATTENTION_ARGS, int64_t grads,
                                                                              bool deterministic) {
  Gradients d = backward(d_out, d_lse, out, lse, YOCO_ATTENTION_PASS, grads, deterministic, nullptr, nullptr);
  return {d.dq, d.dk, d.dv, d.d_latent_k, d.d_latent_v, d.d_sinks};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_accumulate(
    const Tensor& d_out, const OptionalTensor& d_lse, const Tensor& out, const Tensor& lse, YOCO_ATTENTION_ARGS,
    int64_t grads, bool deterministic, const Tensor& dk_accumulator, const Tensor& dv_accumulator) {
  Gradients d =
      backward(d_out, d_lse, out, lse, YOCO_ATTENTION_PASS, grads, deterministic, &dk_accumulator, &dv_accumulator);
  return {d.dq, d.d_latent_k, d.d_latent_v, d.d_sinks};
}

// ---- the cache
namespace {

struct CacheShape {
  int64_t capacity, max_pages, page_size, num_pages;
};

// k_cache, v_cache: [sequences, capacity, heads, dim], or [num_pages, page_size, heads, dim] with a block table.
CacheShape check_cache(const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& block_table,
                       int64_t sequences, int64_t heads, int64_t dim_k, int64_t dim_v, bool ring, const Tensor& like,
                       DType dtype, DType& cache_dtype) {
  check(k_cache.dim() == 4, "k_cache has shape ", shape_of(k_cache), "; expected 4 dimensions");
  const int64_t rows = k_cache.size(0), slots = k_cache.size(1);
  CacheShape c{slots, 0, 0, 0};
  cache_dtype = cache_dtype_of(k_cache, "k_cache");
  check(cache_dtype == dtype || cache_dtype == DType::kFloat8E4M3 || cache_dtype == DType::kInt8, "k_cache has dtype ",
        name_of(k_cache.scalar_type()), "; allowed: the dtype of the other tensors, float8_e4m3fn, int8");
  if (block_table) {
    check(!ring, "ring: a paged cache (block_table) cannot be a ring");
    check(block_table->dim() == 2, "block_table has shape ", shape_of(*block_table), "; expected [batch, max_pages]");
    c = CacheShape{block_table->size(1) * slots, block_table->size(1), slots, rows};
    check_side_input(block_table, "block_table", {sequences, c.max_pages}, ScalarType::Int, like);
  } else {
    check(rows == sequences, "k_cache has batch ", rows, "; expected ", sequences);
  }
  check_bthd(k_cache, "k_cache", {rows, slots, heads, dim_k}, k_cache.scalar_type(), like, "the other tensors");
  check_bthd(v_cache, "v_cache", {rows, slots, heads, dim_v}, k_cache.scalar_type(), like, "the other tensors");
  return c;
}

// The pages a sequence uses must be pages of the cache; entries behind them are never read.
void check_pages(const OptionalTensor& block_table, const int32_t* used, int64_t sequences, const CacheShape& c,
                 const Tensor& like) {
  if (!block_table || !like.is_cpu()) return;
  const auto* table = static_cast<const int32_t*>(block_table->data_ptr());
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t page = 0; page * c.page_size < used[b]; ++page) {
      const int32_t entry = table[b * c.max_pages + page];
      check(entry >= 0 && entry < c.num_pages, "block_table[", b, ", ", page, "] is ", entry, "; allowed: 0 to ",
            c.num_pages - 1);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                            const Tensor& seqused_k, const OptionalTensor& block_table,
                                            const OptionalTensor& sinks, const OptionalTensor& alibi_slopes,
                                            const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                            const OptionalTensor& latent_k, const OptionalTensor& latent_v,
                                            const OptionalTensor& latent_len, double scale, int64_t window_left,
                                            int64_t window_right, double softcap, bool ring, int64_t num_splits) {
  DecodeParams p{};
  check(q.dim() == 4, "q has shape ", shape_of(q), "; expected [batch, time_q, heads_q, dim]");
  check(k_cache.dim() == 4 && v_cache.dim() == 4, "k_cache and v_cache have shapes ", shape_of(k_cache), " and ",
        shape_of(v_cache), "; expected 4 dimensions each");
  p.dtype = dtype_of(q, "q");
  p.batch = q.size(0), p.time_q = q.size(1), p.heads_q = q.size(2), p.dim_qk = q.size(3);
  p.heads_kv = k_cache.size(2), p.dim_v = v_cache.size(3);
  check_last_contiguous(q, "q");
  check(p.time_q >= 1 && p.time_q <= 16, "q has time ", p.time_q,
        "; attention_decode takes 1 to 16 tokens, attention any number");
  check(p.heads_kv > 0 && p.heads_q % p.heads_kv == 0, "q has ", p.heads_q, " heads and k_cache has ", p.heads_kv,
        "; the heads of q must be a multiple of those of the cache");
  for (const auto& [dim, name] : {std::pair{p.dim_qk, "head dim of q"}, std::pair{p.dim_v, "head dim of v_cache"}}) {
    check(dim >= 8 && dim <= 256 && dim % 8 == 0, name, " is ", dim, "; allowed: multiples of 8 up to 256");
  }
  const CacheShape c = check_cache(k_cache, v_cache, block_table, p.batch, p.heads_kv, p.dim_qk, p.dim_v, ring, q,
                                   p.dtype, p.cache_dtype);
  p.capacity = c.capacity, p.max_pages = c.max_pages, p.page_size = c.page_size, p.num_pages = c.num_pages;
  check_side_input(seqused_k, "seqused_k", {p.batch}, ScalarType::Int, q);
  check_index_range(seqused_k, "seqused_k", 0, ring ? INT32_MAX : p.capacity, q);
  p.seqused_k = static_cast<const int32_t*>(seqused_k.data_ptr());
  check_pages(block_table, p.seqused_k, p.batch, c, q);
  check_window(window_left, window_right);
  check(softcap >= 0, "softcap is ", softcap, "; it must not be negative (0 = none)");
  check(num_splits >= 0, "num_splits is ", num_splits, "; it must not be negative (0 = chosen here)");
  if (ring) {
    check(window_left >= 0 && window_left + p.time_q <= p.capacity, "ring: window (", window_left, ", ...) and ",
          p.time_q, " tokens need a capacity of window_left + time; k_cache has ", p.capacity);
  }
  check_side_input(sinks, "sinks", {p.heads_q}, ScalarType::Float, q);
  fill_alibi(alibi_slopes, p.batch, p.heads_q, q, p.alibi_slopes, p.alibi_batch_stride);
  check_side_input(k_scale, "k_scale", {p.heads_kv}, ScalarType::Float, q);
  check_side_input(v_scale, "v_scale", {p.heads_kv}, ScalarType::Float, q);
  bool shared = false;
  fill_latents(latent_k, latent_v, p.batch, p.heads_kv, p.dim_qk, p.dim_v, q, p.num_latents, p.latent_k, p.latent_v,
               shared);
  check(latent_k || !latent_len, "latent_len needs latents");
  check_side_input(latent_len, "latent_len", {p.batch}, ScalarType::Int, q);
  check_index_range(latent_len, "latent_len", 0, p.num_latents, q);
  p.scale = scale, p.softcap = softcap;
  p.mask = MaskParams{window_left, window_right, nullptr};
  p.sinks = data_or_null<float>(sinks);
  p.ring = ring;
  p.block_table = data_or_null<int32_t>(block_table);
  p.q = view_of(q), p.k_cache = view_of(k_cache), p.v_cache = view_of(v_cache);
  p.k_scale = data_or_null<float>(k_scale), p.v_scale = data_or_null<float>(v_scale);
  p.latent_len = data_or_null<int32_t>(latent_len);
  p.num_splits = num_splits;
  const Backend backend = backend_for(q);
  Tensor out = empty(q, {p.batch, p.time_q, p.heads_q, p.dim_v}, q.scalar_type());
  Tensor lse = empty(q, {p.batch, p.heads_q, p.time_q}, accumulator_type(q));
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  const Tensor workspace = allocate_workspace(backend, backend.table->decode_workspace, p, q);
  run(backend, "attention_decode", backend.table->decode, p);
  return {out, lse};
}

void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seqused_k,
               const OptionalTensor& block_table, const OptionalTensor& cu_seqlens, const OptionalTensor& k_scale,
               const OptionalTensor& v_scale, const OptionalTensor& inv_freq, bool interleaved, bool ring) {
  AppendParams p{};
  check(k.dim() == 4 && v.dim() == 4, "k and v have shapes ", shape_of(k), " and ", shape_of(v),
        "; expected [batch, time, heads, dim]");
  p.dtype = dtype_of(k, "k");
  p.batch = k.size(0), p.time = k.size(1), p.heads = k.size(2), p.dim_k = k.size(3), p.dim_v = v.size(3);
  check_last_contiguous(k, "k");
  check_bthd(v, "v", {p.batch, p.time, p.heads, p.dim_v}, k.scalar_type(), k, "k");
  p.num_sequences = p.batch;
  if (cu_seqlens) {
    check(p.batch == 1, "k has batch ", p.batch, "; packed sequences (cu_seqlens) need batch 1");
    check_cu_seqlens(cu_seqlens, "cu_seqlens", p.time, k);
    p.num_sequences = cu_seqlens->size(0) - 1;
  }
  const CacheShape c = check_cache(k_cache, v_cache, block_table, p.num_sequences, p.heads, p.dim_k, p.dim_v, ring, k,
                                   p.dtype, p.cache_dtype);
  p.capacity = c.capacity, p.max_pages = c.max_pages, p.page_size = c.page_size, p.num_pages = c.num_pages;
  check_side_input(seqused_k, "seqused_k", {p.num_sequences}, ScalarType::Int, k);
  p.seqused_k = static_cast<const int32_t*>(seqused_k.data_ptr());
  p.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  if (k.is_cpu()) {
    std::vector<int32_t> used(p.num_sequences);
    for (int64_t n = 0; n < p.num_sequences; ++n) {
      const int64_t length = p.cu_seqlens ? p.cu_seqlens[n + 1] - p.cu_seqlens[n] : p.time;
      const int64_t end = p.seqused_k[n] + length;
      check(p.seqused_k[n] >= 0, "seqused_k[", n, "] is ", p.seqused_k[n], "; it must not be negative");
      check(ring ? end <= INT32_MAX : end <= p.capacity, "sequence ", n, " would grow to ", end,
            " tokens; the cache holds ", p.capacity);
      used[n] = length > 0 ? static_cast<int32_t>(end) : 0;
    }
    check_pages(block_table, used.data(), p.num_sequences, c, k);
  }
  check_side_input(k_scale, "k_scale", {p.heads}, ScalarType::Float, k);
  check_side_input(v_scale, "v_scale", {p.heads}, ScalarType::Float, k);
  if (inv_freq) {
    p.rotary_dim = 2 * inv_freq->numel();
    check(p.rotary_dim <= p.dim_k, "inv_freq has ", inv_freq->numel(), " entries; at most ", p.dim_k / 2,
          " (half the dim of k) are allowed");
    check_side_input(inv_freq, "inv_freq", {p.rotary_dim / 2}, ScalarType::Float, k);
  }
  p.inv_freq = data_or_null<float>(inv_freq);
  p.interleaved = interleaved, p.ring = ring;
  p.block_table = data_or_null<int32_t>(block_table);
  p.k = view_of(k), p.v = view_of(v), p.k_cache = view_of(k_cache), p.v_cache = view_of(v_cache);
  p.k_scale = data_or_null<float>(k_scale), p.v_scale = data_or_null<float>(v_scale);
  const Backend backend = backend_for(k);
  run(backend, "append_kv", backend.table->append_kv, p);
}

}  // namespace yoco
