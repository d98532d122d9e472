// Plain structs that every back end shares: pointers, int64 strides, sizes, flags. No torch, no CUDA.
//
// Conventions: tensors are [batch, time, heads, dim] ("BTHD"); the last dimension is contiguous, the
// other strides are free and counted in elements. An optional tensor is a null pointer. With packed
// sequences batch == 1 and cu_seqlens[num_sequences + 1] gives the boundaries; without, sequence n is
// batch row n and num_sequences == batch. Rows after cu_seqlens[num_sequences] belong to no sequence:
// kernels write zeros there (lse: -inf).
#pragma once

#include <cstddef>
#include <cstdint>

namespace yoco {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64, kFloat8E4M3, kInt8 };

// A [batch, time, heads, dim] view.
struct View {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t time_stride = 0;
  int64_t head_stride = 0;
};

// q and k rotated by their positions as a kernel loads them; their gradients are those of q and k as given.
struct RotaryOnLoad {
  const float* inv_freq;   // [dim / 2], or null: q and k are taken as they are
  const int32_t* offsets;  // [num_sequences]: position of each sequence's first token, or null (0)
  int64_t dim;             // of the components that turn; those behind pass through
  bool interleaved;        // pairs (2i, 2i + 1), else (i, i + dim / 2)
};

// ---- gated retention
// S_t = exp(g_t) S_{t-1} + k_t^T v_t,  o_t = scale * q_t S_t.  State dtype: float32 (float64 for float64 inputs).
// gate_normalizer > 0: g holds logits x, the log decay is logsigmoid(x) / gate_normalizer, and dg is the gradient of x.
// 0: g is the log decay itself.
// output_gate: the layer's end is part of the call, y = o / sqrt(mean_dim(o^2) + norm_eps) * silu(output_gate) per
// head.
struct RetentionParams {
  DType dtype;       // of q, k, v, o and their gradients
  DType gate_dtype;  // of g and dg: dtype or float32
  int64_t batch, time, heads, dim_k, dim_v;
  int64_t num_sequences;
  const int32_t* cu_seqlens;  // [num_sequences + 1] or null
  double scale;
  double gate_normalizer;
  View q, k;                  // [batch, time, heads, dim_k]
  View v, o;                  // [batch, time, heads, dim_v]
  View g;                     // [batch, time, heads]: log decay <= 0, or logits
  const void* initial_state;  // [num_sequences, heads, dim_k, dim_v] contiguous, or null (zero)
  void* final_state;          // same shape, or null (not wanted)
  RotaryOnLoad rotary;        // of q and k; states belong to the rotated k
  View output_gate, y;        // [batch, time, heads, dim_v], or null data: o is the result
  double norm_eps;            // with output_gate; o may then have null data (not wanted)
  void* workspace;            // *_workspace(params) bytes, 256-byte aligned; contents undefined
};

struct RetentionBackwardParams : RetentionParams {
  // o, final_state, output_gate, y and norm_eps of the base are unused.
  View d_o;                   // [batch, time, heads, dim_v]
  const void* d_final_state;  // [num_sequences, heads, dim_k, dim_v] or null (zero)
  View dq, dk;                // [batch, time, heads, dim_k]
  View dv;                    // [batch, time, heads, dim_v]
  View dg;                    // [batch, time, heads]
  void* d_initial_state;      // [num_sequences, heads, dim_k, dim_v] or null (not wanted)
};

// 1..16 tokens per sequence, the state updated in place. batch == num_sequences.
struct RetentionStepParams {
  DType dtype, gate_dtype;
  int64_t batch, time, heads, dim_k, dim_v;
  double scale, gate_normalizer;
  View q, k, v, o, g;
  void* state;  // [batch, heads, dim_k, dim_v] contiguous, in and out
  RotaryOnLoad rotary;
  View output_gate;  // [batch, time, heads, dim_v], or null data; with it o is RetentionParams' y
  double norm_eps;
};

// ---- attention
// Which keys a query row sees; csrc/mask.h turns it into one interval of keys per row.
struct MaskParams {
  int64_t window_left;        // keys before the diagonal that are visible; -1 = all
  int64_t window_right;       // keys after the diagonal that are visible; -1 = all; causal: 0
  const int32_t* prefix_len;  // [batch, time_q]: row i sees keys [0, prefix_len_i) and the window is ignored; or null
};

struct AttentionParams {
  DType dtype;  // of q, k, v, out and their gradients
  int64_t batch, time_q, time_k, heads_q, heads_kv, dim_qk, dim_v;
  int64_t num_sequences;
  const int32_t* cu_seqlens_q;  // [num_sequences + 1] or null
  const int32_t* cu_seqlens_k;  // [num_sequences + 1] or null; both or neither
  int64_t max_seqlen_q;         // upper bounds for the launch; time_q and time_k when not packed
  int64_t max_seqlen_k;
  const int32_t* seqused_k;  // [num_sequences]: keys really there, or null (all)
  double scale;
  double softcap;  // s -> softcap * tanh(s / softcap) when > 0
  MaskParams mask;
  const float* sinks;          // [heads_q]: one extra logit per head in the softmax denominator, or null
  const float* alibi_slopes;   // [alibi_batch, heads_q]: adds -slope * |i + len_k - len_q - j|, or null
  int64_t alibi_batch_stride;  // 0 or heads_q
  // Second K/V segment under the same softmax; never causal, no alibi. Null data: absent.
  int64_t num_latents;
  View latent_k;                // [batch or 1, num_latents, heads_kv, dim_qk]; batch_stride 0 when shared
  View latent_v;                // [batch or 1, num_latents, heads_kv, dim_v]
  bool latents_shared;          // latents have batch 1: their gradients sum over the batch
  const int32_t* latent_begin;  // [batch, time_q] or null (0)
  const int32_t* latent_end;    // [batch, time_q] or null (num_latents)
  View q;                       // [batch, time_q, heads_q, dim_qk]
  View k;                       // [batch, time_k, heads_kv, dim_qk]
  View v;                       // [batch, time_k, heads_kv, dim_v]
  View out;                     // [batch, time_q, heads_q, dim_v]
  void* lse;                    // [batch, heads_q, time_q] contiguous, float32 (float64 for float64): natural log,
                                // sinks included; -inf where nothing is visible
  void* workspace;
};

// Gradients that are not wanted have null data.
struct AttentionBackwardParams : AttentionParams {
  View d_out;                   // [batch, time_q, heads_q, dim_v]
  const void* d_lse;            // [batch, heads_q, time_q] contiguous like lse, or null: dS += d_lse * P
  View dq;                      // [batch, time_q, heads_q, dim_qk]
  View dk, dv;                  // like k and v: in dtype, or in float32 (float64) when accumulate_dkv
  bool accumulate_dkv;          // dk, dv += in a float32 accumulator shared by several calls (SharedKV)
  View d_latent_k, d_latent_v;  // like latent_k, latent_v (summed over the batch when latents_shared)
  float* d_sinks;               // [heads_q], or null
  bool deterministic;
};

// Few query tokens against a long cache (contiguous, paged or ring), possibly quantised.
struct DecodeParams {
  DType dtype;        // of q, latents and out
  DType cache_dtype;  // of k_cache and v_cache: dtype, float8 e4m3 or int8
  int64_t batch, time_q, heads_q, heads_kv, dim_qk, dim_v;
  int64_t capacity;  // contiguous: slots per sequence; paged: max_pages * page_size
  double scale, softcap;
  MaskParams mask;            // causal, aligned bottom-right to seqused_k; prefix_len is null
  const float* sinks;         // [heads_q] or null
  const float* alibi_slopes;  // [alibi_batch, heads_q] or null
  int64_t alibi_batch_stride;
  const int32_t* seqused_k;    // [batch]: tokens so far, the time_q query tokens included
  bool ring;                   // position p lives in slot p % capacity
  const int32_t* block_table;  // [batch, max_pages] page numbers, or null (contiguous cache)
  int64_t max_pages, page_size, num_pages;
  View q;                // [batch, time_q, heads_q, dim_qk]
  View k_cache;          // [batch, capacity, heads_kv, dim_qk], or [num_pages, page_size, heads_kv, dim_qk]
  View v_cache;          // [batch, capacity, heads_kv, dim_v],  or [num_pages, page_size, heads_kv, dim_v]
  const float* k_scale;  // [heads_kv]: value = stored * scale, or null (1)
  const float* v_scale;
  int64_t num_latents;
  View latent_k, latent_v;    // [batch or 1, num_latents, heads_kv, dim], in dtype; null data: absent
  const int32_t* latent_len;  // [batch] or null (num_latents)
  int64_t num_splits;         // 0: chosen by the back end
  View out;                   // [batch, time_q, heads_q, dim_v]
  void* lse;                  // [batch, heads_q, time_q] contiguous, float32 (float64 for float64)
  void* workspace;
};

// Writes rows of k and v behind the tokens a cache already holds: row i of sequence b goes to position seqused_k[b] +
// i.
struct AppendParams {
  DType dtype, cache_dtype;
  int64_t batch, time, heads, dim_k, dim_v;  // batch and time of k, v as given (packed: 1 and the sum of lengths)
  int64_t num_sequences;
  const int32_t* cu_seqlens;  // [num_sequences + 1] or null
  int64_t capacity;
  bool ring;                   // position p goes to slot p % capacity; a later token overwrites an earlier one
  const int32_t* seqused_k;    // [num_sequences]: tokens in the cache before this call
  const int32_t* block_table;  // [num_sequences, max_pages] or null
  int64_t max_pages, page_size, num_pages;
  View k, v;              // [batch, time, heads, dim]
  View k_cache, v_cache;  // [num_sequences, capacity, heads, dim] or [num_pages, page_size, heads, dim]
  const float* k_scale;   // [heads]: stored = value / scale, or null (1)
  const float* v_scale;
  const float* inv_freq;  // [rotary_dim / 2]: k is rotated by its position before it is stored, or null
  int64_t rotary_dim;
  bool interleaved;
};

// ---- pointwise and row-wise
// y = x / sqrt(mean(x^2) + eps) * weight, x = input (+ residual).
struct RmsNormParams {
  DType dtype, weight_dtype;  // weight_dtype: dtype or float32
  int64_t rows, dim;
  double eps;
  const void* x;         // [rows, dim] contiguous
  const void* residual;  // [rows, dim] or null
  const void* weight;    // [dim] or null
  void* y;               // [rows, dim]
  void* residual_out;    // [rows, dim]: x + residual in dtype, or null (no residual)
  void* rstd;            // [rows] float32 (float64 for float64)
};

struct RmsNormBackwardParams {
  DType dtype, weight_dtype;
  int64_t rows, dim;
  const void* dy;              // [rows, dim]
  const void* d_residual_out;  // [rows, dim] or null: gradient through residual_out, added to dx
  const void* x;               // [rows, dim]: what was normalised (residual_out when there was a residual)
  const void* weight;          // [dim] or null
  const void* rstd;            // [rows]
  void* dx;                    // [rows, dim]: gradient of x, and of residual
  void* d_weight;              // [dim] float32 (float64 for float64), or null
  void* workspace;
};

// Rotates pairs of the first rotary_dim components by position * inv_freq (or by tables cos, sin).
struct RotaryParams {
  DType dtype;
  int64_t batch, time, heads, dim, rotary_dim;
  int64_t num_sequences;
  const int32_t* cu_seqlens;  // [num_sequences + 1] or null
  const int32_t* offsets;     // [num_sequences]: position of each sequence's first token, or null (0)
  const float* inv_freq;      // [rotary_dim / 2], or null: cos and sin are given
  const void* cos;            // [table_length, rotary_dim / 2] contiguous, in table_dtype
  const void* sin;
  DType table_dtype;  // dtype or float32
  int64_t table_length;
  bool interleaved;  // pairs (2i, 2i + 1), else (i, i + rotary_dim / 2)
  bool inverse;      // rotate by the negative angle (the backward)
  View x, y;         // [batch, time, heads, dim]
};

// y = silu(gate) * up
struct SwigluParams {
  DType dtype;
  int64_t numel;
  const void* gate;  // [numel] contiguous
  const void* up;
  void* y;
};

struct SwigluBackwardParams {
  DType dtype;
  int64_t numel;
  const void *gate, *up, *dy;
  void *d_gate, *d_up;
};

// y = o / sqrt(mean_dim(o^2) + eps) * silu(gate), the norm per head and without weight.
struct RetentionOutputParams {
  DType dtype;
  int64_t batch, time, heads, dim;
  double eps;
  View o, gate, y;
};

struct RetentionOutputBackwardParams {
  DType dtype;
  int64_t batch, time, heads, dim;
  double eps;
  View o, gate, dy, d_o, d_gate;
};

// y = norm(x) * weight * scale, where x is made of two tensors: the two halves of differential attention, or the memory
// and the gate of a gated memory unit. norm(x) = x / sqrt(mean_dim(x^2) + eps), or x.
enum class PairKind : int32_t {
  kDifference,  // x = first - lambda * second
  kGate,        // x = first * silu(second)
};

struct PairNormParams {
  PairKind kind;
  DType dtype, weight_dtype;  // weight_dtype: dtype or float32
  int64_t batch, time, heads, dim;
  bool normalize;
  double eps, scale;
  View first, second, y;  // [batch, time, heads, dim]
  const void* weight;     // [dim] or [heads, dim] contiguous, or null (1)
  bool weight_per_head;
  View lambda;           // kDifference: [batch, time, heads], strides may be 0; float32 (float64 for float64)
  bool lambda_is_logit;  // the sigmoid of what is given
};

struct PairNormBackwardParams : PairNormParams {
  // y of the base is unused.
  View dy, d_first, d_second;  // [batch, time, heads, dim]
  void* d_lambda;              // kDifference: [batch, time, heads] contiguous, lambda's dtype; or null (not wanted)
  void* d_weight;              // like weight, float32 (float64 for float64), or null
  void* workspace;
};

// ---- how a back end is called
// CPU kernels get their threads from here (torch's pool), CUDA kernels their stream.
struct Launch {
  void* stream = nullptr;
  int32_t device = 0;
  int32_t num_threads = 1;
  // Calls body(ctx, begin, end) over a partition of [begin, end), one piece per thread.
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(void* ctx, int64_t begin, int64_t end),
                       void* ctx) = nullptr;
};

// Every back end exports one of these. A kernel returns null, or a message that says why it cannot run these
// parameters (static storage or thread-local; nothing was written then). A null entry: op not in this back end.
// *_workspace gives the bytes that params.workspace must hold; a null entry means none.
struct KernelTable {
  int32_t abi_version;       // kKernelTableVersion
  const char* name;          // "cpu", "cuda"
  const char* (*variant)();  // what was picked at run time: "avx512_bf16", "sm_90a", ...
  const char* (*retention_forward)(const RetentionParams&, const Launch&);
  size_t (*retention_forward_workspace)(const RetentionParams&, const Launch&);
  const char* (*retention_backward)(const RetentionBackwardParams&, const Launch&);
  size_t (*retention_backward_workspace)(const RetentionBackwardParams&, const Launch&);
  const char* (*retention_step)(const RetentionStepParams&, const Launch&);
  const char* (*attention_forward)(const AttentionParams&, const Launch&);
  size_t (*attention_forward_workspace)(const AttentionParams&, const Launch&);
  const char* (*attention_backward)(const AttentionBackwardParams&, const Launch&);
  size_t (*attention_backward_workspace)(const AttentionBackwardParams&, const Launch&);
  const char* (*decode)(const DecodeParams&, const Launch&);
  size_t (*decode_workspace)(const DecodeParams&, const Launch&);
  const char* (*append_kv)(const AppendParams&, const Launch&);
  const char* (*rms_norm)(const RmsNormParams&, const Launch&);
  const char* (*rms_norm_backward)(const RmsNormBackwardParams&, const Launch&);
  size_t (*rms_norm_backward_workspace)(const RmsNormBackwardParams&, const Launch&);
  const char* (*rotary)(const RotaryParams&, const Launch&);
  const char* (*swiglu)(const SwigluParams&, const Launch&);
  const char* (*swiglu_backward)(const SwigluBackwardParams&, const Launch&);
  const char* (*retention_output)(const RetentionOutputParams&, const Launch&);
  const char* (*retention_output_backward)(const RetentionOutputBackwardParams&, const Launch&);
  const char* (*pair_norm)(const PairNormParams&, const Launch&);
  const char* (*pair_norm_backward)(const PairNormBackwardParams&, const Launch&);
  size_t (*pair_norm_backward_workspace)(const PairNormBackwardParams&, const Launch&);
};

constexpr int32_t kKernelTableVersion = 5;

}  // namespace yoco
