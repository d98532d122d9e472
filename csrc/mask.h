// Which keys a query row sees. Causal, sliding window, prefix rows, packed documents and latents all reduce to one
// interval of keys per row and K/V segment; every kernel of every back end asks here. Host and device code.
#pragma once

#include "params.h"

#if defined(__CUDACC__)
#define YOCO_HOST_DEVICE __host__ __device__ inline
#else
#define YOCO_HOST_DEVICE inline
#endif

namespace yoco {

// Keys [begin, end) of one segment; empty when begin >= end.
struct KeyRange {
  int64_t begin, end;
};

// The sequence that a query row works in: its rows in q and k and their numbers.
struct Sequence {
  int64_t batch;    // index into the batch dimension of q, k, v
  int64_t q_begin;  // first row in the time dimension of q
  int64_t k_begin;  // first row in the time dimension of k
  int64_t len_q;
  int64_t len_k;  // seqused_k respected
};

YOCO_HOST_DEVICE int64_t clamp_index(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

// cu_seqlens and seqused_k live where the kernel runs and are not trusted: clamped into the tensors.
YOCO_HOST_DEVICE Sequence make_sequence(const AttentionParams& p, int64_t n) {
  Sequence s;
  if (p.cu_seqlens_q != nullptr) {
    s.batch = 0;
    s.q_begin = clamp_index(p.cu_seqlens_q[n], 0, p.time_q);
    s.k_begin = clamp_index(p.cu_seqlens_k[n], 0, p.time_k);
    s.len_q = clamp_index(p.cu_seqlens_q[n + 1], s.q_begin, p.time_q) - s.q_begin;
    s.len_k = clamp_index(p.cu_seqlens_k[n + 1], s.k_begin, p.time_k) - s.k_begin;
  } else {
    s.batch = n;
    s.q_begin = 0;
    s.k_begin = 0;
    s.len_q = p.time_q;
    s.len_k = p.time_k;
  }
  if (p.seqused_k != nullptr) s.len_k = clamp_index(p.seqused_k[n], 0, s.len_k);
  return s;
}

// Keys that row i of a block of len_q queries sees among len_k keys: diagonal aligned bottom-right, window inclusive
// on both sides.
YOCO_HOST_DEVICE KeyRange window_range(int64_t window_left, int64_t window_right, int64_t i, int64_t len_q,
                                       int64_t len_k) {
  const int64_t diagonal = i + len_k - len_q;
  KeyRange r{0, len_k};
  if (window_left >= 0 && diagonal - window_left > 0) r.begin = diagonal - window_left;
  if (window_right >= 0 && diagonal + window_right + 1 < len_k) r.end = diagonal + window_right + 1;
  return r;
}

// Row i (counted inside its sequence) against the main segment.
YOCO_HOST_DEVICE KeyRange key_range(const AttentionParams& p, const Sequence& s, int64_t i) {
  if (p.mask.prefix_len != nullptr) {
    const int64_t n = p.mask.prefix_len[s.batch * p.time_q + s.q_begin + i];
    return KeyRange{0, clamp_index(n, 0, s.len_k)};
  }
  return window_range(p.mask.window_left, p.mask.window_right, i, s.len_q, s.len_k);
}

// Row i against the latent segment.
YOCO_HOST_DEVICE KeyRange latent_range(const AttentionParams& p, const Sequence& s, int64_t i) {
  const int64_t row = s.batch * p.time_q + s.q_begin + i;
  KeyRange r{0, p.num_latents};
  if (p.latent_begin != nullptr) r.begin = clamp_index(p.latent_begin[row], 0, p.num_latents);
  if (p.latent_end != nullptr) r.end = clamp_index(p.latent_end[row], 0, p.num_latents);
  return r;
}

// Inverse of the window: the query rows that see key j; empty when begin >= end. Not for prefix rows.
YOCO_HOST_DEVICE KeyRange query_range(int64_t window_left, int64_t window_right, int64_t j, int64_t len_q,
                                      int64_t len_k) {
  const int64_t diagonal = j - (len_k - len_q);
  KeyRange r{0, len_q};
  if (window_right >= 0 && diagonal - window_right > 0) r.begin = diagonal - window_right;
  if (window_left >= 0 && diagonal + window_left + 1 < len_q) r.end = diagonal + window_left + 1;
  return r;
}

}  // namespace yoco
